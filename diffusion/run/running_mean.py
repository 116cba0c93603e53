"""A mean whose sum and count can be added over micro-batches, devices and steps."""

from dataclasses import dataclass
from typing import Any

import jax


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Mean:
    """A mean as its sum and count, so that means add up correctly; `float()` gives the quotient, NaN if the count is
    0.
    """

    total: Any
    """Scalar sum."""
    count: Any
    """Scalar count."""

    def __add__(self, other: "Mean") -> "Mean":
        return Mean(self.total + other.total, self.count + other.count)

    def __float__(self) -> float:
        return float(self.total) / float(self.count) if float(self.count) else float("nan")
