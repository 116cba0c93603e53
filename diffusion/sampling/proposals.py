"""From logits to a proposal per position: its token, and how sure the denoiser is of it.

    confidence = p(proposal)    margin = p(1st) − p(2nd)    entropy = −Σ p log p, in nats

where p is the denoiser's distribution over the allowed ids: before temperature, filters and noise. A token is the most
probable one (temperature 0; of equals the lowest id), or drawn from the tempered and filtered distribution by inverting
its cumulative sum at one uniform number per position (float32, 23 bits). Gumbel noise, the usual way, needs a number
per id: at a vocabulary of 32k it takes longer than the unembedding, and in float32 its largest values are cut off,
which makes unlikely tokens rarer than they are (arXiv 2409.02908). Here rounding moves a probability by some 10⁻⁷.

Filters apply after the temperature, each to what the one before has left: the `top_k` most probable ids; the smallest
set of most probable ids whose mass reaches `top_p`; the ids at least `min_p` times as probable as the most probable
one. Ids as probable as the last one of a set belong to it. The smallest probability of a set is found by bisection
of its bits, which is exact, and on a CPU far faster than sorting a vocabulary.
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
class Draw:
    """How a token is taken from a distribution; a filter that is None is not there."""

    temperature: Float[Array, ""] | float = 0.0
    """0 takes the most probable."""
    top_k: Int[Array, ""] | int | None = None
    top_p: Float[Array, ""] | float | None = None
    min_p: Float[Array, ""] | float | None = None


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Proposals:
    """What is proposed at each position; zeros where nothing was asked."""

    token: Int[Array, "batch asked"]
    confidence: Float[Array, "batch asked"]
    entropy: Float[Array, "batch asked"]
    margin: Float[Array, "batch asked"]
    top: Float[Array, "batch asked top"]
    """The largest probabilities, in falling order."""


def propose(
    output: DenoiserOutput,
    is_wanted: Bool[Array, "batch asked"],
    positions: Int[Array, "batch asked"],
    keys: Key[Array, " batch"],
    draw: Draw,
    chunk: int,
    num_top: int = 0,
) -> Proposals:
    """Proposals where they are wanted. Only there are logits computed, about `chunk` positions of the batch at a time.

    `positions` are places in the row: a draw depends on its row's key and place, not on what else is asked.
    """
    batch, asked = is_wanted.shape
    chunk = -(-chunk // batch)  # of a row
    if asked <= chunk:
        return _masked_to(is_wanted, _propose(output, output.features, positions, keys, draw, num_top))
    # Wanted positions first, as they come; what is past the end is read as the last one and then dropped.
    order = jnp.argsort(~is_wanted, axis=-1, stable=True)
    order = jnp.pad(order, ((0, 0), (0, -asked % chunk)), constant_values=asked)
    num_chunks = -(-is_wanted.sum(axis=-1).max() // chunk)
    rows = jnp.arange(batch)[:, None]

    def body(number, proposals):
        here = jax.lax.dynamic_slice_in_dim(order, number * chunk, chunk, axis=1)
        at = jnp.minimum(here, asked - 1)
        features = jax.tree.map(lambda x: x[rows, at], output.features)
        new = _propose(output, features, positions[rows, at], keys, draw, num_top)
        return jax.tree.map(lambda old, part: old.at[rows, here].set(part, mode="drop"), proposals, new)

    return _masked_to(is_wanted, jax.lax.fori_loop(0, num_chunks, body, _nothing(batch, asked, num_top)))


def _propose(output: DenoiserOutput, features: Any, positions, keys, draw: Draw, num_top: int) -> Proposals:
    logits = output.read(features).astype(jnp.float32)
    best = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    shifted = logits - jnp.max(logits, axis=-1, keepdims=True)
    unnormalised = jnp.exp(shifted)
    total = unnormalised.sum(axis=-1)

    def drawn():
        uniform = jax.vmap(lambda key, row: jax.vmap(lambda place: _uniform(key, place))(row))(keys, positions)
        return jnp.where(draw.temperature > 0, drawn_tokens(shifted, uniform, draw), best)

    token = jax.lax.cond(jnp.asarray(draw.temperature) > 0, drawn, lambda: best)
    others = jnp.where(jnp.arange(logits.shape[-1]) == best[..., None], 0.0, unnormalised)
    return Proposals(
        token=token,
        confidence=jnp.take_along_axis(unnormalised, token[..., None], axis=-1)[..., 0] / total,
        entropy=jnp.log(total) - jnp.sum(jnp.where(unnormalised > 0, unnormalised * shifted, 0.0), axis=-1) / total,
        margin=(1 - others.max(axis=-1)) / total,
        top=jax.lax.top_k(unnormalised, num_top)[0] / total[..., None],
    )


def drawn_tokens(
    logits: Float[Array, "*shape vocab"], uniform: Float[Array, "*shape"], draw: Draw
) -> Int[Array, "*shape"]:
    """Tokens of the tempered and filtered distribution, by one number in [0, 1) each."""
    p = jax.nn.softmax(logits / jnp.maximum(draw.temperature, 1e-6), axis=-1)
    if draw.top_k is not None:
        p = _renormalised(p, least(p, lambda kept: kept.sum(axis=-1) >= draw.top_k))
    if draw.top_p is not None:
        # The sum of a whole distribution may be a little less than 1.
        mass = jnp.minimum(draw.top_p, p.sum(axis=-1))
        p = _renormalised(p, least(p, lambda kept: jnp.where(kept, p, 0.0).sum(axis=-1) >= mass))
    if draw.min_p is not None:
        p = _renormalised(p, draw.min_p * p.max(axis=-1))
    # In two levels, groups of ids and ids of a group: sums of few numbers are quick, and round little.
    size = round(p.shape[-1] ** 0.5)
    groups = jnp.pad(p, [(0, 0)] * (p.ndim - 1) + [(0, -p.shape[-1] % size)]).reshape(*p.shape[:-1], -1, size)
    group, rest = _inverse(groups.sum(axis=-1), uniform)
    inside, _ = _inverse(jnp.take_along_axis(groups, group[..., None, None], axis=-2)[..., 0, :], rest)
    return (group * size + inside).astype(jnp.int32)


def least(p: Float[Array, "*shape vocab"], is_enough: Callable[[Any], Any]) -> Float[Array, "*shape"]:
    """The largest c for which the set {p ≥ c} is enough; 0 if none is. Positive floats are ordered as their bits."""
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
    kept = jnp.where(p >= cutoff[..., None], p, 0.0)
    return kept / kept.sum(axis=-1, keepdims=True)


def _inverse(p, uniform):
    """The first index whose cumulative sum exceeds `uniform` of the total, and how far into its own mass that is."""
    # A parallel sum need not grow with every term, nor stay where a term is 0.
    cumulative = jnp.cumsum(p, axis=-1)
    wanted = uniform * cumulative[..., -1]
    is_beyond = (cumulative > wanted[..., None]) & (p > 0)
    last = p.shape[-1] - 1 - jnp.argmax(p[..., ::-1] > 0, axis=-1)
    index = jnp.where(is_beyond.any(axis=-1), jnp.argmax(is_beyond, axis=-1), last)
    mass = jnp.take_along_axis(p, index[..., None], axis=-1)[..., 0]
    before = jnp.take_along_axis(cumulative, index[..., None], axis=-1)[..., 0] - mass
    return index, jnp.clip((wanted - before) / mass, 0.0, 1.0)


def _uniform(key, place):
    return jax.random.uniform(jax.random.fold_in(key, place))


def _nothing(batch: int, asked: int, num_top: int) -> Proposals:
    zeros = jnp.zeros((batch, asked), jnp.float32)
    return Proposals(zeros.astype(jnp.int32), zeros, zeros, zeros, jnp.zeros((batch, asked, num_top)))


def _masked_to(is_wanted, proposals: Proposals) -> Proposals:
    def masked(x):
        return jnp.where(is_wanted.reshape(*is_wanted.shape, *[1] * (x.ndim - 2)), x, jnp.zeros_like(x))

    return jax.tree.map(masked, proposals)
