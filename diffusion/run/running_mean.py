"""A mean whose sum and count add up over micro-batches, devices and steps."""

from dataclasses import dataclass
from typing import Any

import jax


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Mean:
    """A mean in the making: sums add up over micro-batches, devices and steps; the quotient is taken at the end."""

    total: Any
    """Scalar."""
    count: Any
    """Scalar."""

    def __add__(self, other: "Mean") -> "Mean":
        return Mean(self.total + other.total, self.count + other.count)

    def __float__(self) -> float:
        return float(self.total) / float(self.count) if float(self.count) else float("nan")
