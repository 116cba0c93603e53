"""AdamW with factors per parameter, and a learning rate that follows the number of training tokens.

    m ← β1·m + (1 − β1)·g,    v ← β2·v + (1 − β2)·g²,    u = m̂ / (√v̂ + ε) + λ·p,    p ← p − lr(tokens)·u

(arXiv 1711.05101). Each parameter has its own lr, ε and λ, the global values times its `Multipliers`, and its own β1
and β2, the global values to the power of its multipliers. Horizon and warmup are counted in non-padding tokens, so a
configuration means the same at every batch size.
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
class Hyperparameters:
    """The hyperparameters that a training step takes as arguments, so that a sweep over them compiles once.

    Those of AdamW have one value per parameter, in the order of `jax.tree.leaves`.
    """

    learning_rate: Float[Any, " parameters"]
    """Peak learning rate of every parameter."""
    beta1: Float[Any, " parameters"]
    beta2: Float[Any, " parameters"]
    epsilon: Float[Any, " parameters"]
    weight_decay: Float[Any, " parameters"]
    clip_norm: Float[Any, ""]
    ema_decay: Float[Any, ""]


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig(Checked):
    """Configuration of AdamW, its learning-rate schedule and the weight average (EMA)."""

    learning_rate: Positive = 2e-3
    """Peak learning rate, which the schedule reaches after warmup."""
    beta1: Annotated[float, real(0, below=1)] = 0.9
    """Decay of the first moment per step."""
    beta2: Annotated[float, real(0, below=1)] = 0.98
    """Decay of the second moment per step."""
    epsilon: Positive = 1e-8
    """ε added to the root of the second moment."""
    weight_decay: NonNegative = 0.01
    """Decoupled weight decay λ; a step shrinks weights by learning rate × λ."""
    clip_norm: Positive = 1.0
    """Largest global norm of the gradients; larger gradients are scaled down to it."""
    horizon_tokens: PositiveInt = 2_000_000
    """Number of non-padding tokens to train on."""
    warmup_tokens: NonNegativeInt = 50_000
    """Number of non-padding tokens over which the learning rate rises linearly from 0 to its peak, at most a quarter of
    the horizon."""
    schedule: Literal["cosine", "constant", "warmup_stable_decay"] = "cosine"
    """Learning rate after warmup: cosine decay to the horizon, constant, or constant followed by a linear decay."""
    decay_tokens: PositiveInt | None = None
    """Length of the linear decay of warmup_stable_decay in tokens. None: a fifth of the horizon."""
    final_fraction: Share = 0.02
    """Learning rate at the horizon as a fraction of the peak; not used by the constant schedule."""
    ema_decay: Annotated[float, real(0, below=1)] = 0.995
    """Decay per step of the weight average (EMA), which is used for evaluation and sampling."""

    def __post_init__(self):
        super().__post_init__()
        if self.decay_tokens is not None and self.schedule != "warmup_stable_decay":
            raise ValueError(f"decay_tokens is only for the schedule warmup_stable_decay, not for {self.schedule}")
        if self.length_of_decay > self.horizon_tokens - self.length_of_warmup:
            raise ValueError(
                f"decay_tokens must lie in [1, {self.horizon_tokens - self.length_of_warmup}], after warmup; "
                f"got {self.length_of_decay}"
            )

    @property
    def length_of_warmup(self) -> int:
        """Number of tokens of warmup: `warmup_tokens`, but at most a quarter of the horizon."""
        return min(self.warmup_tokens, self.horizon_tokens // 4)

    @property
    def length_of_decay(self) -> int:
        """Number of tokens over which warmup_stable_decay decays."""
        return self.decay_tokens or max(1, self.horizon_tokens // 5)

    @property
    def schedule_only(self) -> "OptimizerConfig":
        """The configuration with the hyperparameters that a step takes as arguments reset to their defaults."""
        return replace(
            self, **{name: getattr(OptimizerConfig(), name) for name in Hyperparameters.__dataclass_fields__}
        )

    def hyperparameters(self, multipliers: Any) -> Hyperparameters:
        """Hyperparameters of every parameter; `multipliers` is a tree of `Multipliers` like the parameters."""
        leaves: list[Multipliers] = jax.tree.leaves(multipliers)
        return Hyperparameters(
            learning_rate=jnp.array([self.learning_rate * one.learning_rate for one in leaves], jnp.float32),
            beta1=jnp.array([self.beta1**one.beta1 for one in leaves], jnp.float32),
            beta2=jnp.array([self.beta2**one.beta2 for one in leaves], jnp.float32),
            epsilon=jnp.array([self.epsilon * one.epsilon for one in leaves], jnp.float32),
            weight_decay=jnp.array([self.weight_decay * one.weight_decay for one in leaves], jnp.float32),
            clip_norm=jnp.float32(self.clip_norm),
            ema_decay=jnp.float32(self.ema_decay),
        )

    def learning_rate_fraction(self, tokens: Float[Array, ""]) -> Float[Array, ""]:
        """Learning rate after `tokens` training tokens, as a fraction of its peak."""
        warmup, horizon, final = self.length_of_warmup, self.horizon_tokens, self.final_fraction
        if self.schedule == "cosine":
            return optax.warmup_cosine_decay_schedule(0.0, 1.0, warmup, horizon, final)(tokens)
        rise = optax.linear_schedule(0.0, 1.0, warmup) if warmup else optax.constant_schedule(1.0)
        if self.schedule == "constant":
            return jnp.asarray(rise(tokens))
        fall = optax.linear_schedule(1.0, final, self.length_of_decay)
        return optax.join_schedules([rise, fall], [horizon - self.length_of_decay])(tokens)


def adamw(hyperparameters: Hyperparameters) -> optax.GradientTransformation:
    """Clipping and AdamW without the schedule: p ← p − rate·update, where rate is a fraction of the peak.

    The state is that of optax's Adam.
    """
    clip = optax.clip_by_global_norm(hyperparameters.clip_norm)

    def update(gradients, state, parameters):
        gradients, _ = clip.update(gradients, clip.init(parameters))
        count = optax.safe_increment(state.count)

        def update_one(number, p, g, m, v):
            beta1, beta2 = hyperparameters.beta1[number], hyperparameters.beta2[number]
            m, v = beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g**2
            direction = (m / (1 - beta1**count)) / (jnp.sqrt(v / (1 - beta2**count)) + hyperparameters.epsilon[number])
            return hyperparameters.learning_rate[number] * (direction + hyperparameters.weight_decay[number] * p), m, v

        structure = jax.tree.structure(parameters)
        numbers = jax.tree.unflatten(structure, range(len(hyperparameters.learning_rate)))
        results = jax.tree.map(update_one, numbers, parameters, gradients, state.mu, state.nu)
        updates, mu, nu = jax.tree.transpose(structure, jax.tree.structure((0, 0, 0)), results)
        return updates, optax.ScaleByAdamState(count, mu, nu)

    return optax.GradientTransformation(initial_adam_state, update)


def initial_adam_state(parameters: Any) -> optax.ScaleByAdamState:
    """State of `adamw` before the first step, which does not depend on its hyperparameters."""
    zeros = jax.tree.map(jnp.zeros_like, parameters)
    return optax.ScaleByAdamState(jnp.zeros((), jnp.int32), zeros, jax.tree.map(jnp.copy, zeros))


def update_average(average: Any, parameters: Any, decay: Float[Array, ""], steps: Int[Array, ""]) -> Any:
    """The weight average after step number `steps`, in which step s has weight decay^(steps − s).

    The weights are normalised by their sum, so nothing remains of the random weights before the first step.
    """
    weight = (1 - decay) / (1 - decay**steps)
    return jax.tree.map(lambda a, p: a + weight * (p - a), average, parameters)
