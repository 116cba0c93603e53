"""95 % confidence intervals: over examples, of ratios and shares; over seeds or draws, of means (Student's t).

A ratio is R = Σ totals / Σ counts over n examples: bits over tokens, word errors over words; with equal counts it is a
mean. Its standard error is that of the delta method, √(n · var(totals − R · counts)) / Σ counts.

The mean of n independent values, such as the losses of n seeds, has the interval mean ± t(n − 1) · s / √n, with s their
standard deviation and t(n − 1) the quantile 97.5 % of Student's distribution: 12.7 for two values, 4.3 for three.
"""

from collections.abc import Sequence

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


def standard_error_of(interval: tuple[float, float]) -> float:
    """Standard error of which an interval over examples is the normal approximation: its width / (2 · 1.96)."""
    low, high = interval
    return (high - low) / (2 * _Z)


def mean_and_half_width(
    values: Float[np.ndarray, "repeats *rest"],
) -> tuple[Float[np.ndarray, "*rest"], Float[np.ndarray, "*rest"]]:
    """Mean of independent values along the first axis, and half the width of its 95 % interval.

    There must be at least two values.
    """
    repeats = len(values)
    error = np.std(values, axis=0, ddof=1) / repeats**0.5
    return np.asarray(np.mean(values, axis=0)), np.asarray(_t(repeats - 1) * error)


def half_width_of_mean(values: Sequence[float]) -> float | None:
    """Half the width of the 95 % interval of the mean of independent values; None for a single value."""
    if len(values) < 2:
        return None
    return float(mean_and_half_width(np.asarray(values, float))[1])


def half_width_of_one(deviation: float, draws: int) -> float:
    """Half the width of the 95 % interval that one draw gives for the expected value.

    `deviation` is the standard deviation over `draws` draws, of this quantity or of one that varies as much.
    """
    return _t(draws - 1) * deviation


def _t(degrees: int) -> float:
    """Quantile 97.5 % of Student's distribution."""
    from scipy.special import stdtrit  # takes a third of a second to load

    return float(stdtrit(degrees, 0.975))
