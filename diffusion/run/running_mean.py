"""A mean whose sum and count can be added over micro-batches, devices and steps."""

from dataclasses import dataclass
from typing import Any

import jax


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Mean:
    """A mean stored as sum and count, so that it can be added; `float()` is their quotient, NaN if the count is 0."""

    total: Any
    """Sum of the terms, a scalar."""
    count: Any
    """Number of terms (or sum of weights), a scalar."""

    def __add__(self, other: "Mean") -> "Mean":
        return Mean(self.total + other.total, self.count + other.count)

    def __float__(self) -> float:
        return float(self.total) / float(self.count) if float(self.count) else float("nan")
