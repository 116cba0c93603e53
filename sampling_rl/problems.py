"""Problems: requests to fill masked tokens, whose answers can be graded."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float

from trimask.tokenizers.sequence import Example
from trimask.tokenizers.vocabulary import Vocabulary


@dataclass(frozen=True)
class Problem:
    """A request to fill masked tokens, and its reference answer."""

    request: Example
    """The example with the requested tokens masked (code −1)."""
    reference: Mapping[str, Any]
    """Modality → medium of the real example, as judges take them; "prompt" → the part of a text that is given."""

    @property
    def length(self) -> int:
        """Number of requested tokens: L of the paper (arXiv 2512.09106)."""
        return sum(int((segment.codes < 0).sum()) for segment in self.request.segments)


Grade = Callable[[Sequence[Problem], Sequence[Example]], Float[np.ndarray, " answers"]]
"""(Problems, their answers) → grade of each answer in [0, 1], 1 for a right one. Code −1 is a token never revealed."""


@dataclass(frozen=True)
class ProblemSet:
    """Problems of one kind, and the function that grades their answers."""

    name: str
    vocabulary: Vocabulary
    problems: Sequence[Problem]
    grade: Grade

    def __post_init__(self):
        if not self.problems:
            raise ValueError(f"{self.name} has no problems")
        if any(problem.length == 0 for problem in self.problems):
            raise ValueError(f"{self.name} has a problem that asks for no tokens")

    @property
    def length(self) -> int:
        """Largest number of tokens that a problem asks for."""
        return max(problem.length for problem in self.problems)
