"""From logits to a proposal per position: a token, and statistics of the denoiser's distribution there.

    confidence = p(proposal)    margin = p(1st) − p(2nd)    entropy = −Σ p log p, in nats

where p is the denoiser's distribution over the allowed ids: before temperature, filters and noise. A token is the most
probable one (temperature 0; the lowest id in a tie), or drawn from the tempered and filtered distribution by inverting
its cumulative sum at one uniform number per position (float32, 23 bits). The Gumbel-max trick would need a number per
id: at a vocabulary of 32k that takes longer than the unembedding, and in float32 its largest values are cut off, which
makes unlikely tokens rarer than they should be (arXiv 2409.02908). Here rounding moves a probability by some 10⁻⁷.

Filters apply after the temperature, each to what the one before has left: the `top_k` most probable ids; the smallest
set of most probable ids whose mass reaches `top_p`; the ids at least `min_p` times as probable as the most probable
one. Ids that tie with the least probable one of a set belong to it. The smallest probability of a set is found by
bisection of its bits, which is exact, and on a CPU far faster than sorting a vocabulary.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from trimask.diffusion.denoiser import DenoiserOutput


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class TokenSampling:
    """How a token is drawn from a distribution; a filter that is None is not applied."""

    temperature: Float[Array, ""] | float = 0.0
    """Logits are divided by it; 0 takes the most probable token."""
    top_k: Int[Array, ""] | int | None = None
    top_p: Float[Array, ""] | float | None = None
    min_p: Float[Array, ""] | float | None = None


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Proposals:
    """Proposed token and statistics at each position; zeros where nothing was wanted."""

    token: Int[Array, "batch asked"]
    confidence: Float[Array, "batch asked"]
    entropy: Float[Array, "batch asked"]
    margin: Float[Array, "batch asked"]
    top: Float[Array, "batch asked top"]
    """The largest probabilities, in descending order."""


def propose(
    output: DenoiserOutput,
    is_wanted: Bool[Array, "batch asked"],
    positions: Int[Array, "batch asked"],
    keys: Key[Array, " batch"],
    sampling: TokenSampling,
    chunk: int,
    num_top: int = 0,
) -> Proposals:
    """Proposals at the wanted positions, zeros elsewhere.

    Logits are computed only at wanted positions, about `chunk` positions of the batch at a time. `positions` are those
    of the output in its row: a draw depends on the row's key and its position, not on which other positions are wanted.
    `num_top` is the number of largest probabilities to return.
    """
    batch, asked = is_wanted.shape
    chunk = -(-chunk // batch)  # positions per row
    if asked <= chunk:
        return _zero_unless(is_wanted, _propose(output, output.features, positions, keys, sampling, num_top))
    # Wanted positions first, in order; indices past the end are clipped for reading, and dropped when writing.
    order = jnp.argsort(~is_wanted, axis=-1, stable=True)
    order = jnp.pad(order, ((0, 0), (0, -asked % chunk)), constant_values=asked)
    num_chunks = -(-is_wanted.sum(axis=-1).max() // chunk)
    rows = jnp.arange(batch)[:, None]

    def body(number, proposals):
        target = jax.lax.dynamic_slice_in_dim(order, number * chunk, chunk, axis=1)
        source = jnp.minimum(target, asked - 1)
        features = jax.tree.map(lambda x: x[rows, source], output.features)
        new = _propose(output, features, positions[rows, source], keys, sampling, num_top)
        return jax.tree.map(lambda old, part: old.at[rows, target].set(part, mode="drop"), proposals, new)

    return _zero_unless(is_wanted, jax.lax.fori_loop(0, num_chunks, body, _empty_proposals(batch, asked, num_top)))


def _propose(
    output: DenoiserOutput, features: Any, positions, keys, sampling: TokenSampling, num_top: int
) -> Proposals:
    logits = output.read(features).astype(jnp.float32)
    best = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    shifted = logits - jnp.max(logits, axis=-1, keepdims=True)
    unnormalised = jnp.exp(shifted)
    total = unnormalised.sum(axis=-1)

    def drawn():
        uniform = jax.vmap(lambda key, row: jax.vmap(lambda position: _uniform(key, position))(row))(keys, positions)
        return jnp.where(sampling.temperature > 0, draw_tokens(shifted, uniform, sampling), best)

    token = jax.lax.cond(jnp.asarray(sampling.temperature) > 0, drawn, lambda: best)
    others = jnp.where(jnp.arange(logits.shape[-1]) == best[..., None], 0.0, unnormalised)
    return Proposals(
        token=token,
        confidence=jnp.take_along_axis(unnormalised, token[..., None], axis=-1)[..., 0] / total,
        entropy=jnp.log(total) - jnp.sum(jnp.where(unnormalised > 0, unnormalised * shifted, 0.0), axis=-1) / total,
        margin=(1 - others.max(axis=-1)) / total,
        top=jax.lax.top_k(unnormalised, num_top)[0] / total[..., None],
    )


def draw_tokens(
    logits: Float[Array, "*shape vocab"], uniform: Float[Array, "*shape"], sampling: TokenSampling
) -> Int[Array, "*shape"]:
    """Tokens of the tempered and filtered distribution, each by one uniform number in [0, 1)."""
    p = jax.nn.softmax(logits / jnp.maximum(sampling.temperature, 1e-6), axis=-1)
    if sampling.top_k is not None:
        p = _renormalised(p, probability_cutoff(p, lambda kept: kept.sum(axis=-1) >= sampling.top_k))
    if sampling.top_p is not None:
        # The sum of a whole distribution may be a little less than 1.
        mass = jnp.minimum(sampling.top_p, p.sum(axis=-1))
        p = _renormalised(p, probability_cutoff(p, lambda kept: jnp.where(kept, p, 0.0).sum(axis=-1) >= mass))
    if sampling.min_p is not None:
        p = _renormalised(p, sampling.min_p * p.max(axis=-1))
    # In two levels, groups of ids and ids of a group: sums of few numbers are quick, and round little.
    size = round(p.shape[-1] ** 0.5)
    groups = jnp.pad(p, [(0, 0)] * (p.ndim - 1) + [(0, -p.shape[-1] % size)]).reshape(*p.shape[:-1], -1, size)
    group, rest = _invert_cumulative_sum(groups.sum(axis=-1), uniform)
    inside, _ = _invert_cumulative_sum(jnp.take_along_axis(groups, group[..., None, None], axis=-2)[..., 0, :], rest)
    return (group * size + inside).astype(jnp.int32)


def probability_cutoff(p: Float[Array, "*shape vocab"], is_enough: Callable[[Any], Any]) -> Float[Array, "*shape"]:
    """The largest cutoff c for which `is_enough` holds of the set {p ≥ c}; 0 if there is none.

    Bisects the bits of c, since positive floats are ordered as their bits are.
    """
    low = jnp.zeros(p.shape[:-1], jnp.int32)
    high = jnp.full_like(low, jax.lax.bitcast_convert_type(jnp.float32(1.0), jnp.int32) + 1)

    def body(_, bounds):
        low, high = bounds
        middle = low + (high - low) // 2
        cutoff = jax.lax.bitcast_convert_type(middle, jnp.float32)
        enough = is_enough(p >= cutoff[..., None])
        return jnp.where(enough, middle, low), jnp.where(enough, high, middle)

    return jax.lax.bitcast_convert_type(jax.lax.fori_loop(0, 30, body, (low, high))[0], jnp.float32)


def _renormalised(p, cutoff):
    """The distribution restricted to probabilities of at least the cutoff."""
    kept = jnp.where(p >= cutoff[..., None], p, 0.0)
    return kept / kept.sum(axis=-1, keepdims=True)


def _invert_cumulative_sum(p, uniform):
    """The first index whose cumulative sum exceeds `uniform` times the total, and how far into its mass that is."""
    # By rounding, a parallel cumulative sum may fall, or change where a term is 0.
    cumulative = jnp.cumsum(p, axis=-1)
    wanted = uniform * cumulative[..., -1]
    is_beyond = (cumulative > wanted[..., None]) & (p > 0)
    last = p.shape[-1] - 1 - jnp.argmax(p[..., ::-1] > 0, axis=-1)
    index = jnp.where(is_beyond.any(axis=-1), jnp.argmax(is_beyond, axis=-1), last)
    mass = jnp.take_along_axis(p, index[..., None], axis=-1)[..., 0]
    before = jnp.take_along_axis(cumulative, index[..., None], axis=-1)[..., 0] - mass
    return index, jnp.clip((wanted - before) / mass, 0.0, 1.0)


def _uniform(key, position):
    return jax.random.uniform(jax.random.fold_in(key, position))


def _empty_proposals(batch: int, asked: int, num_top: int) -> Proposals:
    zeros = jnp.zeros((batch, asked), jnp.float32)
    return Proposals(zeros.astype(jnp.int32), zeros, zeros, zeros, jnp.zeros((batch, asked, num_top)))


def _zero_unless(is_wanted, proposals: Proposals) -> Proposals:
    def masked(x):
        return jnp.where(is_wanted.reshape(*is_wanted.shape, *[1] * (x.ndim - 2)), x, jnp.zeros_like(x))

    return jax.tree.map(masked, proposals)
