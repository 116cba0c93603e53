"""AdamW with factors per parameter, whose learning rate follows the number of tokens seen.

    m ← β1·m + (1 − β1)·g,    v ← β2·v + (1 − β2)·g²,    u = m̂ / (√v̂ + ε) + λ·p,    p ← p − lr(tokens)·u

Each parameter has its own lr, ε and λ, the global ones times its `Multipliers`, and its own β, the global ones to the
power of theirs. Horizon and warmup are counted in non-padding tokens, so that a run means the same at every batch size.
"""

from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from trimask.diffusion.parametrization import Multipliers
from trimask.tokenizers.storage.ranges import Checked, NonNegative, NonNegativeInt, Positive, PositiveInt, Share, real


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Knobs:
    """The numbers that a step takes as arguments, so that a sweep over them compiles once.

    Those of AdamW are one per parameter, in the order of `jax.tree.leaves`.
    """

    learning_rate: Float[Any, " parameters"]
    """Peak."""
    beta1: Float[Any, " parameters"]
    beta2: Float[Any, " parameters"]
    epsilon: Float[Any, " parameters"]
    weight_decay: Float[Any, " parameters"]
    clip_norm: Float[Any, ""]
    ema_decay: Float[Any, ""]


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig(Checked):
    """AdamW, its schedule and the weight average."""

    learning_rate: Positive = 2e-3
    """Peak learning rate."""
    beta1: Annotated[float, real(0, below=1)] = 0.9
    """Decay of the first moment per step."""
    beta2: Annotated[float, real(0, below=1)] = 0.98
    """Decay of the second moment per step."""
    epsilon: Positive = 1e-8
    """Added to the root of the second moment."""
    weight_decay: NonNegative = 0.01
    """Decoupled weight decay λ; a step shrinks weights by learning rate × λ."""
    clip_norm: Positive = 1.0
    """Gradients of a larger global norm are scaled down to it."""
    horizon_tokens: PositiveInt = 2_000_000
    """Non-padding tokens to train on."""
    warmup_tokens: NonNegativeInt = 50_000
    """The learning rate rises linearly over the first so many tokens."""
    schedule: Literal["cosine", "constant", "warmup_stable_decay"] = "cosine"
    """What follows warmup: a cosine down to the end, a constant, or a constant and a linear decay at the end."""
    decay_tokens: PositiveInt | None = None
    """Length of the decay of warmup_stable_decay. None: a fifth of the horizon."""
    final_fraction: Share = 0.02
    """Learning rate at the horizon as a fraction of the peak, unless it is constant."""
    ema_decay: Annotated[float, real(0, below=1)] = 0.995
    """Decay per step of the weight average that is evaluated and sampled from."""

    def __post_init__(self):
        super().__post_init__()
        if self.warmup_tokens >= self.horizon_tokens:
            raise ValueError(
                f"warmup_tokens must lie in [0, horizon_tokens), got {self.warmup_tokens} of {self.horizon_tokens}"
            )
        if self.decay_tokens is not None and self.schedule != "warmup_stable_decay":
            raise ValueError(f"decay_tokens belongs to the schedule warmup_stable_decay, not to {self.schedule}")
        if self.length_of_decay > self.horizon_tokens - self.warmup_tokens:
            raise ValueError(
                f"decay_tokens must lie in [1, {self.horizon_tokens - self.warmup_tokens}], after warmup; "
                f"got {self.length_of_decay}"
            )

    @property
    def length_of_decay(self) -> int:
        """Tokens over which warmup_stable_decay decays, at most all that follow warmup."""
        if self.decay_tokens is not None:
            return self.decay_tokens
        return max(1, min(self.horizon_tokens // 5, self.horizon_tokens - self.warmup_tokens))

    @property
    def schedule_alone(self) -> "OptimizerConfig":
        """What is left without the numbers that a step takes as arguments."""
        return replace(self, **{name: getattr(OptimizerConfig(), name) for name in Knobs.__dataclass_fields__})

    def knobs(self, multipliers: Any) -> Knobs:
        """The numbers of every parameter; `multipliers` is a tree of `Multipliers` like the parameters."""
        of: list[Multipliers] = jax.tree.leaves(multipliers)
        return Knobs(
            learning_rate=jnp.array([self.learning_rate * one.learning_rate for one in of], jnp.float32),
            beta1=jnp.array([self.beta1**one.beta1 for one in of], jnp.float32),
            beta2=jnp.array([self.beta2**one.beta2 for one in of], jnp.float32),
            epsilon=jnp.array([self.epsilon * one.epsilon for one in of], jnp.float32),
            weight_decay=jnp.array([self.weight_decay * one.weight_decay for one in of], jnp.float32),
            clip_norm=jnp.float32(self.clip_norm),
            ema_decay=jnp.float32(self.ema_decay),
        )

    def rate_at(self, tokens: Float[Array, ""]) -> Float[Array, ""]:
        """The learning rate after so many tokens, as a fraction of its peak."""
        warmup, horizon, final = self.warmup_tokens, self.horizon_tokens, self.final_fraction
        if self.schedule == "cosine":
            return optax.warmup_cosine_decay_schedule(0.0, 1.0, warmup, horizon, final)(tokens)
        rise = optax.linear_schedule(0.0, 1.0, warmup) if warmup else optax.constant_schedule(1.0)
        if self.schedule == "constant":
            return jnp.asarray(rise(tokens))
        fall = optax.linear_schedule(1.0, final, self.length_of_decay)
        return optax.join_schedules([rise, fall], [horizon - self.length_of_decay])(tokens)


def adamw(knobs: Knobs) -> optax.GradientTransformation:
    """Clipping and AdamW up to the schedule: p ← p − rate·update, where rate is a fraction of the peak.

    The state is that of optax's Adam.
    """
    clip = optax.clip_by_global_norm(knobs.clip_norm)

    def update(gradients, state, parameters):
        gradients, _ = clip.update(gradients, clip.init(parameters))
        count = optax.safe_increment(state.count)

        def one(number, p, g, m, v):
            beta1, beta2 = knobs.beta1[number], knobs.beta2[number]
            m, v = beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g**2
            direction = (m / (1 - beta1**count)) / (jnp.sqrt(v / (1 - beta2**count)) + knobs.epsilon[number])
            return knobs.learning_rate[number] * (direction + knobs.weight_decay[number] * p), m, v

        structure = jax.tree.structure(parameters)
        numbers = jax.tree.unflatten(structure, range(len(knobs.learning_rate)))
        results = jax.tree.map(one, numbers, parameters, gradients, state.mu, state.nu)
        updates, mu, nu = jax.tree.transpose(structure, jax.tree.structure((0, 0, 0)), results)
        return updates, optax.ScaleByAdamState(count, mu, nu)

    return optax.GradientTransformation(moments, update)


def moments(parameters: Any) -> optax.ScaleByAdamState:
    """AdamW's state before the first step, whatever the knobs."""
    zeros = jax.tree.map(jnp.zeros_like, parameters)
    return optax.ScaleByAdamState(jnp.zeros((), jnp.int32), zeros, jax.tree.map(jnp.copy, zeros))


def averaged(average: Any, parameters: Any, decay: Float[Array, ""], steps: Int[Array, ""]) -> Any:
    """Moves the weight average on to the parameters after so many steps, weighing step s by decay^(steps − s).

    Divided by the sum of those weights, so that nothing is left of the random weights before the first step.
    """
    weight = (1 - decay) / (1 - decay**steps)
    return jax.tree.map(lambda a, p: a + weight * (p - a), average, parameters)
