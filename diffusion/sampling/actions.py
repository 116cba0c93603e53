"""Two probability laws for a policy's actions: sampling an action, and the log-probability of an action.

From a logit b per position, over the candidates (masked positions of the current block):

    bernoulli   reveals each position independently with probability σ(b)
    dpls        dynamic Plackett–Luce with stop: draws the first position by softmax(b), then more without replacement,
                each by softmax over the remaining candidates and STOP, whose logit is 0, until STOP is drawn

Both are of arXiv 2512.09106.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from trimask.diffusion.sampling.state import RowKeys
from trimask.diffusion.sampling.strategies import uniform

Ranks = Int[Array, "batch seq"]
"""Order in which an action reveals positions: 1 for the first, 0 for those not revealed; 1 for all in bernoulli."""


def draw_action(
    law: str, keys: RowKeys, logits: Float[Array, "batch seq"], candidates: Bool[Array, "batch seq"], scale=1.0
) -> Ranks:
    """Samples an action per row. `scale` is β of bernoulli, whose probabilities are min(1, β·σ(b)); dpls ignores it."""
    if law == "bernoulli":
        return (candidates & (uniform(keys, logits.shape[-1]) < scale * jax.nn.sigmoid(logits))).astype(jnp.int32)
    stages = jax.vmap(lambda key: jax.random.split(key, 3))(keys)
    first_noise, noise = (_gumbel(uniform(stages[:, stage], logits.shape[-1])) for stage in (0, 1))
    noisy = jnp.where(candidates, logits + first_noise, -jnp.inf)
    first = candidates & (jnp.arange(logits.shape[-1]) == jnp.argmax(noisy, axis=-1, keepdims=True))
    # Fresh noise: the first pick took the largest of its own noise, so reusing that would make STOP too likely.
    noisy = jnp.where(candidates & ~first, logits + noise, -jnp.inf)
    stop = _gumbel(uniform(stages[:, 2], 1))
    order = jnp.argsort(jnp.argsort(-noisy, axis=-1, stable=True), axis=-1)
    return jnp.where(first, 1, jnp.where(noisy > stop, order + 2, 0))


def log_probability(
    law: str, logits: Float[Array, "batch seq"], ranks: Ranks, candidates: Bool[Array, "batch seq"]
) -> Float[Array, " batch"]:
    """Log-probability of each row's action in nats; 0 for rows without candidates.

    Exact for both laws up to rounding; that of bernoulli is with β = 1.
    """
    if law == "bernoulli":
        signed = jnp.where(ranks > 0, logits, -logits)
        return jnp.sum(jnp.where(candidates, jax.nn.log_sigmoid(signed), 0.0), axis=-1)
    nothing = jnp.finfo(jnp.float32).min / 2
    # Picked positions in their order, then the other candidates, then everything else.
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
    """Standard Gumbel noise from uniform numbers in [0, 1).

    They have 23 bits; adding half of the last one moves each to the middle of its interval, and so away from 0.
    """
    return -jnp.log(-jnp.log(uniform + 2.0**-24))
