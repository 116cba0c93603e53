"""How the examples of a dataset are laid out: what a model was trained on, and can be asked."""

import math
from dataclasses import dataclass
from typing import Literal

from trimask.tokenizers.storage.ranges import Checked, Size
from trimask.tokenizers.vocabulary import TEXT, Task, Vocabulary

MAX_LENGTH = 1 << 24
"""Most tokens of one example."""

Fill = Literal["whole", "answer", "none"]
"""What is filled with EOS to one length: the whole text; the text after what is given; nothing."""


@dataclass(frozen=True, kw_only=True)
class Layout(Checked):
    """Shapes of the codes of an example."""

    shapes: dict[str, list[Size]]
    """Modality → shape of its codes; of text, the length of the longest."""
    fill: Fill
    """What of the text is filled with EOS."""
    answer_length: Size | None = None
    """Tokens of every answer, EOS included, where answers are filled."""
    is_cropped: bool = True
    """True where pictures of other proportions lose what sticks out; else they are stretched."""

    def __post_init__(self):
        super().__post_init__()
        if TEXT not in self.shapes or self.example_length() > MAX_LENGTH:
            raise ValueError(
                f"a layout has text and {MAX_LENGTH:,} tokens at most; got the shapes {self.shapes} of an example"
            )

    @property
    def medium(self) -> str | None:
        """What is paired with the text; None: text alone."""
        return next((modality for modality in self.shapes if modality != TEXT), None)

    @property
    def is_uniform(self) -> bool:
        """True where all examples have the same length."""
        return self.fill == "whole"

    def text_length(self, num_given: int) -> int:
        """Tokens of a text of which so many are given, filled as the layout says; the longest where nothing is."""
        return num_given + self.answer_length if self.answer_length is not None else self.shapes[TEXT][0]

    @property
    def max_prompt(self) -> int:
        """Tokens of the longest text that leaves a place for an answer, or for EOS."""
        return self.shapes[TEXT][0] - (self.answer_length or 1)

    def example_length(self, text_length: int | None = None) -> int:
        """Tokens of an example with its task and boundary tokens; of the longest, if the text's is not given."""
        lengths = {modality: math.prod(shape) for modality, shape in self.shapes.items()}
        if text_length is not None:
            lengths[TEXT] = text_length
        return 1 + sum(1 + length for length in lengths.values())

    def tasks(self, vocabulary: Vocabulary) -> list[Task]:
        """The directions that such examples can teach."""
        return [task for task in vocabulary.tasks.values() if set(task.modalities) == set(self.shapes)]
