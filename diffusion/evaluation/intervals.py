"""95 % confidence intervals of ratios and shares that are measured on a sample of examples.

A ratio is R = Σ totals / Σ counts over n examples: bits over tokens, word errors over words; with equal counts it is a
mean. Its standard error is that of the delta method, √(n · var(totals − R · counts)) / Σ counts.
"""

import numpy as np
from jaxtyping import Float

_Z = 1.96
"""Quantile 97.5 % of the normal distribution."""


def ratio_and_half_width(
    totals: Float[np.ndarray, " items"], counts: Float[np.ndarray, " items"]
) -> tuple[float, float | None]:
    """R, and half the width of its 95 % interval, which is None for a single example."""
    value = float(totals.sum() / counts.sum())
    if len(totals) < 2:
        return value, None
    deviation = float((totals - value * counts).std(ddof=1))
    return value, _Z * len(totals) ** 0.5 * deviation / float(counts.sum())


def wilson_interval(successes: int, trials: int) -> tuple[float, float]:
    """95 % interval of the share successes / trials, within [0, 1] (Wilson 1927)."""
    share = successes / trials
    center = (share + _Z**2 / (2 * trials)) / (1 + _Z**2 / trials)
    half = _Z / (1 + _Z**2 / trials) * (share * (1 - share) / trials + _Z**2 / (4 * trials**2)) ** 0.5
    return max(0.0, center - half), min(1.0, center + half)  # rounding may leave it
