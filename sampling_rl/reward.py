"""What an episode is worth: a right answer, made in few evaluations (arXiv 2512.09106).

`right` says how right each episode's answer is, in [0, 1]; `nfe` is its number of function evaluations, `length` (L)
the number of tokens asked for, and α how much speed is worth.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
from jaxtyping import Float, Int

from trimask.tokenizers.storage.ranges import Checked, NonNegative

Reward = Callable[
    [Float[np.ndarray, " episodes"], Int[np.ndarray, " episodes"], Int[np.ndarray, " episodes"]],
    Float[np.ndarray, " episodes"],
]
"""(right, nfe, length) → rewards."""


def multiplicative(
    right: Float[np.ndarray, " episodes"],
    nfe: Int[np.ndarray, " episodes"],
    length: Int[np.ndarray, " episodes"],
    alpha: float,
) -> Float[np.ndarray, " episodes"]:
    """right · ((L − min(NFE, L) + 1)/L)^α."""
    return right * ((length - np.minimum(nfe, length) + 1) / length) ** alpha


def additive(
    right: Float[np.ndarray, " episodes"],
    nfe: Int[np.ndarray, " episodes"],
    length: Int[np.ndarray, " episodes"],
    alpha: float,
) -> Float[np.ndarray, " episodes"]:
    """right − α · NFE/L, which collapses: revealing everything at once pays."""
    return right - alpha * nfe / length


REWARDS: dict[str, Callable[..., Float[np.ndarray, " episodes"]]] = {
    "multiplicative": multiplicative,
    "additive": additive,
}
"""Name → (right, nfe, length, alpha) → rewards. None may rise with evaluations, and each rises with rightness."""

if TYPE_CHECKING:
    Kind = str
else:
    Kind = Literal[tuple(REWARDS)]  # `--help` and errors list the table


@dataclass(frozen=True, kw_only=True)
class RewardConfig(Checked):
    """How evaluations count against being right."""

    kind: Kind = "multiplicative"
    """right · ((L − min(NFE, L) + 1)/L)^α, or right − α · NFE/L, which collapses: revealing everything at once pays."""
    alpha: NonNegative = 1.0
    """α: how much speed is worth. 0: nothing."""

    def __call__(
        self,
        right: Float[np.ndarray, " episodes"],
        nfe: Int[np.ndarray, " episodes"],
        length: Int[np.ndarray, " episodes"],
    ) -> Float[np.ndarray, " episodes"]:
        """Rewards of finished episodes."""
        return REWARDS[self.kind](np.asarray(right, np.float64), nfe, length, self.alpha)
