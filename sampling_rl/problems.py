"""Questions whose answers can be judged: what environments and rollouts are played on."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float

from trimask.tokenizers.sequence import Example
from trimask.tokenizers.vocabulary import Vocabulary


@dataclass(frozen=True)
class Problem:
    """One question."""

    request: Example
    """What is asked is masked (code -1)."""
    reference: Mapping[str, Any]
    """Media of the real example by modality, as judges take them; "prompt" is what was given of a text."""

    @property
    def length(self) -> int:
        """Tokens asked for: L of the paper."""
        return sum(int((segment.codes < 0).sum()) for segment in self.request.segments)


Grade = Callable[[Sequence[Problem], Sequence[Example]], Float[np.ndarray, " answers"]]
"""Problems and their answers, where code -1 is a token that was never revealed → how right each is, in [0, 1]."""


@dataclass(frozen=True)
class ProblemSet:
    """Problems of one kind, and who judges."""

    name: str
    vocabulary: Vocabulary
    problems: Sequence[Problem]
    grade: Grade

    def __post_init__(self):
        if not self.problems:
            raise ValueError(f"{self.name} has no problems")
        if any(problem.length == 0 for problem in self.problems):
            raise ValueError(f"{self.name} has a problem that asks for nothing")

    @property
    def length(self) -> int:
        """The most tokens that a problem asks for."""
        return max(problem.length for problem in self.problems)
