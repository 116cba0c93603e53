"""Layout of a dataset's examples: shapes of their codes and filling of their text, at training and at generation."""

import math
from dataclasses import dataclass
from typing import Literal

from trimask.tokenizers.storage.ranges import Checked, Size
from trimask.tokenizers.vocabulary import TEXT, Task, Vocabulary

MAX_EXAMPLE_TOKENS = 1 << 24
"""Largest number of tokens of one example."""

Fill = Literal["whole", "answer", "none"]
"""Part of the text that is padded with EOS to one length: the whole text, the answer after the prompt, or nothing."""


@dataclass(frozen=True, kw_only=True)
class Layout(Checked):
    """Shapes of the codes of a dataset's examples, and how their text is padded."""

    shapes: dict[str, list[Size]]
    """Modality → shape of its codes; for text, the length of the longest text in tokens."""
    fill: Fill
    """Part of the text that is padded with EOS: whole, answer or none."""
    answer_length: Size | None = None
    """Number of tokens of every answer, EOS included. None: answers are not padded."""
    is_cropped: bool = True
    """True if pictures of other proportions are cropped, False if they are stretched."""

    def __post_init__(self):
        super().__post_init__()
        if TEXT not in self.shapes or self.example_length() > MAX_EXAMPLE_TOKENS:
            raise ValueError(
                f"a layout has text and at most {MAX_EXAMPLE_TOKENS:,} tokens; got an example of shapes {self.shapes}"
            )

    @property
    def medium(self) -> str | None:
        """Modality that is paired with the text; None for text alone."""
        return next((modality for modality in self.shapes if modality != TEXT), None)

    @property
    def is_uniform(self) -> bool:
        """True if all examples have the same length."""
        return self.fill == "whole"

    def text_length(self, num_given: int) -> int:
        """Number of tokens of a text whose prompt has `num_given` tokens, padded as the layout says."""
        return num_given + self.answer_length if self.answer_length is not None else self.shapes[TEXT][0]

    @property
    def max_prompt_tokens(self) -> int:
        """Number of tokens of the longest prompt that leaves room for a padded answer, or else for EOS."""
        return self.shapes[TEXT][0] - (self.answer_length or 1)

    def example_length(self, text_length: int | None = None) -> int:
        """Number of tokens of an example whose text has `text_length` tokens, task and boundary tokens included.

        None: of the longest example.
        """
        lengths = {modality: math.prod(shape) for modality, shape in self.shapes.items()}
        if text_length is not None:
            lengths[TEXT] = text_length
        return 1 + sum(1 + length for length in lengths.values())

    def tasks(self, vocabulary: Vocabulary) -> list[Task]:
        """Tasks (directions between modalities) that examples of this layout can teach."""
        return [task for task in vocabulary.tasks.values() if set(task.modalities) == set(self.shapes)]
