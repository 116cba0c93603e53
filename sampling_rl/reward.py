"""What an episode is worth: a right answer, made in few evaluations (arXiv 2512.09106)."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Float, Int

Reward = Callable[
    [Float[np.ndarray, " episodes"], Int[np.ndarray, " episodes"], Int[np.ndarray, " episodes"]],
    Float[np.ndarray, " episodes"],
]
"""How right the answers are, in [0, 1], evaluations (NFE), and tokens asked for → rewards."""


@dataclass(frozen=True, kw_only=True)
class RewardConfig:
    """How evaluations count against being right."""

    kind: Literal["multiplicative", "additive"] = "multiplicative"
    """right · ((L − min(NFE, L) + 1)/L)^α, or right − α · NFE/L, which collapses: revealing everything at once pays."""
    alpha: float = 1.0
    """α: how much speed is worth. 0: nothing."""

    def __post_init__(self):
        if not 0 <= self.alpha < float("inf"):
            raise ValueError(f"alpha must be finite and not negative, got {self.alpha}")

    def __call__(
        self,
        right: Float[np.ndarray, " episodes"],
        nfe: Int[np.ndarray, " episodes"],
        length: Int[np.ndarray, " episodes"],
    ) -> Float[np.ndarray, " episodes"]:
        """Rewards of finished episodes."""
        right = np.asarray(right, np.float64)
        if self.kind == "additive":
            return right - self.alpha * nfe / length
        return right * ((length - np.minimum(nfe, length) + 1) / length) ** self.alpha
