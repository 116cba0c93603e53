"""AdamW with per-class multipliers, whose learning rate follows the number of tokens seen.

    u_t = m̂_t / (√v̂_t + ε·mult) + λ·mult·p,     p ← p − lr(tokens) · mult · u_t

Horizon and warmup are counted in non-padding tokens, so that a run means the same at every batch size.
"""

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from trimask.diffusion.parametrization import Multipliers, Parametrization


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW, its schedule and the weight average."""

    learning_rate: float = 2e-3
    """Peak learning rate."""
    beta1: float = 0.9
    """Decay of the first moment per step."""
    beta2: float = 0.98
    """Decay of the second moment per step."""
    epsilon: float = 1e-8
    """Added to the root of the second moment."""
    weight_decay: float = 0.01
    """Decoupled weight decay λ; a step shrinks weights by learning rate × λ."""
    clip_norm: float = 1.0
    """Gradients of a larger global norm are scaled down to it."""
    horizon_tokens: int = 2_000_000
    """Non-padding tokens to train on."""
    warmup_tokens: int = 50_000
    """The learning rate rises linearly over the first so many tokens, then falls as a cosine."""
    final_fraction: float = 0.02
    """Learning rate at the horizon as a fraction of the peak."""
    ema_decay: float = 0.995
    """Decay per step of the weight average that is evaluated and sampled from."""

    def __post_init__(self):
        if not 0 <= self.warmup_tokens < self.horizon_tokens:
            raise ValueError(
                f"warmup_tokens must lie in [0, horizon_tokens), got {self.warmup_tokens} of {self.horizon_tokens}"
            )
        for name in ("beta1", "beta2", "ema_decay"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must lie in [0, 1), got {getattr(self, name)}")
        if min(self.learning_rate, self.epsilon, self.clip_norm) <= 0:
            raise ValueError(f"learning_rate, epsilon and clip_norm must be positive, got {self}")

    def learning_rate_at(self, tokens: Float[Array, ""]) -> Float[Array, ""]:
        """Warmup, then cosine, as a function of tokens seen."""
        return optax.warmup_cosine_decay_schedule(
            0.0,
            self.learning_rate,
            self.warmup_tokens,
            self.horizon_tokens,
            self.learning_rate * self.final_fraction,
        )(tokens)

    def ema_decay_at(self, step: Int[Array, ""]) -> Float[Array, ""]:
        """The average's decay, smaller at first so that the random initial weights are soon forgotten."""
        return jnp.minimum(self.ema_decay, (1 + step) / (10 + step))


def adamw(
    config: OptimizerConfig, classes: Any, parametrization: Parametrization
) -> optax.GradientTransformationExtraArgs:
    """Clipping and AdamW up to the learning rate: the transformation returns u_t · mult, to be scaled by −lr.

    `classes` is a tree like the parameters, with the class of each.
    """

    def one_class(multipliers: Multipliers) -> optax.GradientTransformation:
        return optax.chain(
            optax.scale_by_adam(config.beta1, config.beta2, config.epsilon * multipliers.epsilon),
            optax.add_decayed_weights(config.weight_decay * multipliers.weight_decay),
            optax.scale(multipliers.learning_rate),
        )

    per_class = {name: one_class(multipliers) for name, multipliers in parametrization.items()}
    return optax.chain(optax.clip_by_global_norm(config.clip_norm), optax.partition(per_class, classes))
