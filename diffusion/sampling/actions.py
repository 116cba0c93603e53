"""The two laws by which a policy draws actions, and the probability of an action under each."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from trimask.diffusion.sampling.state import RowKeys
from trimask.diffusion.sampling.strategies import uniform

Ranks = Int[Array, "batch seq"]
"""When a position was picked: 1 for the first; 0 for those that were not. Of bernoulli all are first."""


def drawn(
    law: str, keys: RowKeys, logits: Float[Array, "batch seq"], candidates: Bool[Array, "batch seq"], scale=1.0
) -> Ranks:
    """An action by the law. With a scale β the probabilities of bernoulli are min(1, β·σ(b))."""
    if law == "bernoulli":
        return (candidates & (uniform(keys, logits.shape[-1]) < scale * jax.nn.sigmoid(logits))).astype(jnp.int32)
    stages = jax.vmap(lambda key: jax.random.split(key, 3))(keys)
    first_noise, noise = (_gumbel(uniform(stages[:, stage], logits.shape[-1])) for stage in (0, 1))
    noisy = jnp.where(candidates, logits + first_noise, -jnp.inf)
    first = candidates & (jnp.arange(logits.shape[-1]) == jnp.argmax(noisy, axis=-1, keepdims=True))
    # Fresh noise: with that of the first pick, which was the largest, STOP would come too soon.
    noisy = jnp.where(candidates & ~first, logits + noise, -jnp.inf)
    stop = _gumbel(uniform(stages[:, 2], 1))
    order = jnp.argsort(jnp.argsort(-noisy, axis=-1, stable=True), axis=-1)
    return jnp.where(first, 1, jnp.where(noisy > stop, order + 2, 0))


def log_probability(
    law: str, logits: Float[Array, "batch seq"], ranks: Ranks, candidates: Bool[Array, "batch seq"]
) -> Float[Array, " batch"]:
    """Of actions, in nats; of a row without candidates 0. Rounding apart, exact for both laws."""
    if law == "bernoulli":
        signed = jnp.where(ranks > 0, logits, -logits)
        return jnp.sum(jnp.where(candidates, jax.nn.log_sigmoid(signed), 0.0), axis=-1)
    nothing = jnp.finfo(jnp.float32).min / 2
    # Picked ones in their order, then those left, then all else.
    order = jnp.argsort(jnp.where(ranks > 0, ranks, jnp.where(candidates, 1 << 20, 1 << 21)), axis=-1, stable=True)
    ordered = jnp.take_along_axis(jnp.where(candidates, logits, nothing), order, axis=-1)
    left = jax.lax.cumlogsumexp(ordered, axis=ordered.ndim - 1, reverse=True)
    number = jnp.arange(logits.shape[-1])
    or_stop = jnp.where(number == 0, left, jnp.logaddexp(left, 0.0))
    count = jnp.sum(ranks > 0, axis=-1, keepdims=True)
    picked = jnp.sum(jnp.where(number < count, ordered - or_stop, 0.0), axis=-1)
    at_stop = jnp.take_along_axis(
        jnp.pad(left, [(0, 0)] * (left.ndim - 1) + [(0, 1)], constant_values=nothing), count, -1
    )
    stop = -jnp.logaddexp(at_stop[..., 0], 0.0)
    return jnp.where(candidates.any(axis=-1), picked + stop, 0.0)


def _gumbel(uniform: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Standard Gumbel noise of numbers in [0, 1), which have 23 bits: their middle stands for each."""
    return -jnp.log(-jnp.log(uniform + 2.0**-24))
