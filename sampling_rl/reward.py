"""Rewards of episodes: higher for right answers that took few function evaluations (arXiv 2512.09106).

`right` is the grade of each episode's answer in [0, 1], `nfe` its number of function evaluations, `length` (L) the
number of requested tokens, and α the weight of speed.
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
    """Reward right · ((L − min(NFE, L) + 1)/L)^α."""
    return right * ((length - np.minimum(nfe, length) + 1) / length) ** alpha


def additive(
    right: Float[np.ndarray, " episodes"],
    nfe: Int[np.ndarray, " episodes"],
    length: Int[np.ndarray, " episodes"],
    alpha: float,
) -> Float[np.ndarray, " episodes"]:
    """Reward right − α · NFE/L. Policies collapse under it: revealing everything at once pays, even if it is wrong."""
    return right - alpha * nfe / length


REWARDS: dict[str, Callable[..., Float[np.ndarray, " episodes"]]] = {
    "multiplicative": multiplicative,
    "additive": additive,
}
"""Name → function (right, nfe, length, alpha) → rewards. Rewards must rise with `right` and not rise with `nfe`."""

if TYPE_CHECKING:
    RewardKind = str
else:
    RewardKind = Literal[tuple(REWARDS)]  # `--help` and errors list the table


@dataclass(frozen=True, kw_only=True)
class RewardConfig(Checked):
    """Reward of an episode by the grade of its answer and its number of function evaluations."""

    kind: RewardKind = "multiplicative"
    """Formula of the reward, for an answer of L tokens with the grade right in [0, 1]: multiplicative is
    right · ((L − min(NFE, L) + 1)/L)^α; additive is right − α · NFE/L, under which policies collapse to revealing
    everything at once."""
    alpha: NonNegative = 1.0
    """α: weight of speed in the reward; 0 rewards right answers alone."""

    def __call__(
        self,
        right: Float[np.ndarray, " episodes"],
        nfe: Int[np.ndarray, " episodes"],
        length: Int[np.ndarray, " episodes"],
    ) -> Float[np.ndarray, " episodes"]:
        """Rewards of finished episodes, in float64."""
        return REWARDS[self.kind](np.asarray(right, np.float64), nfe, length, self.alpha)
