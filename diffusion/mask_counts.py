"""Masks by counts: the number of masked tokens of an example is drawn, and then a random set of that many tokens.

If each of n tokens is masked independently at a random time, l of them are with probability

    P(l) = ∫₀¹ Bin(l; n, s(t)) dt,   l = 0 … n,

and all sets of l tokens are equally likely. The negative ELBO of masked diffusion is Σ_l 1/l · E Σ_{i masked} of a
random set of l ≥ 1 tokens, whatever the schedule (the any-order bound; arXiv 2502.09992, eq. 6). So the weight of a
masked token is 1/(l·P(l)), which is the mean of the weight w(t) over the times at which l tokens may be masked; no time
has to be cut off. It is n/l for the linear schedule, whose counts are uniform, and at most 1.6 n for `cosine_md4`.

Without complements P is restricted to l ≥ 1, since a loss needs a masked token. In a pair with its complement l may be
0 and n, and the weight of the complement is 1/((n − l)·P(l)).
"""

from functools import lru_cache

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from trimask.diffusion.schedule import ScheduleConfig

MAX_LENGTH = 4096
"""Longest row whose masks can be drawn by counts that are not uniform: a table has (length + 1)² numbers."""
_INTERVALS = 4096
"""Number of intervals of masked shares over which P(l) is integrated."""


def cumulative_counts(schedule: ScheduleConfig, length: int) -> Float[np.ndarray, "n l"]:
    """P(at most l of n tokens are masked) for n and l from 0 to `length`; 1 where l ≥ n.

    P is integrated over s = sin²θ, in which all Bin(l; n, s) have about the same width: for n = `length` by the
    midpoint rule, and for all smaller n by Bin(l; n−1) = (n−l)/n · Bin(l; n) + (l+1)/n · Bin(l+1; n).
    """
    ends = np.sin(np.linspace(0, np.pi / 2, _INTERVALS + 1)) ** 2
    with jax.ensure_compile_time_eval():
        times = np.asarray(schedule.time_of(jnp.asarray(ends, jnp.float32)), np.float64)
    shares = np.sin((np.arange(_INTERVALS) + 0.5) / _INTERVALS * np.pi / 2) ** 2
    table = np.ones((length + 1, length + 1))
    counts = binomials(length, shares) @ np.diff(times)
    for n in range(length, 0, -1):
        table[n, : n + 1] = np.cumsum(counts) / counts.sum()
        count = np.arange(n)
        counts = (n - count) / n * counts[:-1] + (count + 1) / n * counts[1:]
    return table


@lru_cache(maxsize=4)
def _log_binomials(n: int) -> Float[np.ndarray, " l"]:
    """Logarithms of the binomial coefficients of n over l = 0 … n."""
    log_factorials = np.cumsum(np.log(np.maximum(np.arange(n + 1), 1)))
    return log_factorials[n] - log_factorials - log_factorials[::-1]


def binomials(n: int, shares: Float[np.ndarray, " shares"]) -> Float[np.ndarray, "l shares"]:
    """Bin(l; n, s) of l = 0 … n and every masked share s, which is neither 0 nor 1."""
    count = np.arange(n + 1)[:, None]
    return np.exp(_log_binomials(n)[:, None] + count * np.log(shares) + (n - count) * np.log1p(-shares))


def draw_counts(
    quantile: Float[Array, "*shape"],
    num_targets: Int[Array, "*shape"],
    tables: Float[Array, "table n l"],
    table_index: Int[Array, "*shape"],
    least: int,
) -> tuple[Int[Array, "*shape"], Float[Array, "*shape"]]:
    """Number of masked tokens of n targets at each quantile of P(l) restricted to l ≥ `least`, and its probability.

    `table_index` says which table each has; `least` is 0 or 1. Where n is 0 the number is 0.
    """

    def cumulative(count):
        return jnp.where(count < 0, 0.0, tables[table_index, num_targets, jnp.maximum(count, 0)])

    below = cumulative(jnp.full_like(num_targets, least - 1))
    level = below + quantile * (1 - below)
    low, high = jnp.minimum(least, num_targets), num_targets
    for _ in range(tables.shape[-1].bit_length()):
        middle = (low + high) // 2
        is_below = cumulative(middle) <= level
        low, high = jnp.where(is_below, jnp.minimum(middle + 1, high), low), jnp.where(is_below, high, middle)
    return low, (cumulative(low) - cumulative(low - 1)) / (1 - below)


def draw_uniform_counts(
    quantile: Float[Array, "*shape"], num_targets: Int[Array, "*shape"], least: int
) -> tuple[Int[Array, "*shape"], Float[Array, "*shape"]]:
    """`draw_counts` for the linear schedule, P(l) = 1/(n + 1), which needs no table and has no longest row."""
    numbers = jnp.maximum(num_targets + 1 - least, 1)
    count = least + (quantile * numbers).astype(jnp.int32)
    return jnp.minimum(count, num_targets), 1 / numbers.astype(jnp.float32)


def random_subsets(
    key: PRNGKeyArray,
    is_target: Bool[Array, "batch seq"],
    group: Int[Array, "batch seq"],
    size: Int[Array, "batch seq"],
) -> Bool[Array, "batch seq"]:
    """True for `size` random targets of each group of a row; `size` is the same at all positions of a group.

    Groups are numbered from 0, with numbers below 2 · (seq + 1).
    """
    batch, length = is_target.shape
    last = 2 * (length + 1)
    groups = jnp.where(is_target, group, last)
    order = jnp.lexsort((jax.random.uniform(key, is_target.shape), groups))
    rank = jnp.argsort(order, axis=-1)
    sizes = jnp.zeros((batch, last + 1), jnp.int32).at[jnp.arange(batch)[:, None], groups].add(1)
    starts = jnp.cumsum(sizes, axis=-1) - sizes
    return is_target & (rank - jnp.take_along_axis(starts, groups, axis=-1) < size)
