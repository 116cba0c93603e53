"""The training objective: weighted cross-entropy at masked positions, normalised per modality.

    L = Σ_m λ_m / N_m · Σ_{i masked, of modality m} w_i · (−log p(x_i | noised)),    p = softmax over the allowed ids

N_m counts the *maskable* tokens of modality m in the global batch, never the masked ones, so that the expectation over
masks is the bound per token. With w_i the ELBO's weight and λ = 1 this is the negative ELBO per token of each
modality; the reported bound always uses the ELBO's weight, whatever is trained on.
"""

from dataclasses import dataclass, field
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from trimask.diffusion.masking import Noised
from trimask.tokenizers.sequence import task_tokens
from trimask.tokenizers.vocabulary import Vocabulary


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """What is minimised."""

    weighting: Literal["elbo", "unweighted"] = "elbo"
    """Weight of a masked token: the ELBO's w(t), or 1."""
    modality_weights: dict[str, float] = field(default_factory=dict)
    """λ of each modality by name; 1 where none is given."""
    z_loss: float = 0.0
    """Coefficient of (log Σ exp logits)² at masked positions, which keeps logits from drifting."""

    def __post_init__(self):
        if self.z_loss < 0 or min(self.modality_weights.values(), default=0) < 0:
            raise ValueError(f"loss weights must not be negative, got {self}")


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Mean:
    """A mean in the making: sums add up over micro-batches, devices and steps; the quotient is taken at the end."""

    total: Any
    """Scalar."""
    count: Any
    """Scalar."""

    def __add__(self, other: "Mean") -> "Mean":
        return Mean(self.total + other.total, self.count + other.count)

    def __float__(self) -> float:
        return float(self.total) / float(self.count) if float(self.count) else float("nan")


def restrict(
    logits: Float[Array, "*shape vocab"], allowed: Bool[Array, "*shape vocab"]
) -> Float[Array, "*shape vocab"]:
    """Logits with probability zero for every id that is not allowed."""
    return jnp.where(allowed, logits, -jnp.inf)


def cross_entropy(
    logits: Float[Array, "batch seq vocab"], clean: Int[Array, "batch seq"]
) -> tuple[Float[Array, "batch seq"], Float[Array, "batch seq"]]:
    """−log p of the clean tokens in nats, and log Σ exp logits, at every position."""
    log_z = jax.nn.logsumexp(logits, axis=-1)
    return log_z - jnp.take_along_axis(logits, clean[..., None], axis=-1)[..., 0], log_z


def target_counts(noised: Noised, vocabulary: Vocabulary) -> Float[Array, " modality"]:
    """N_m: tokens of each modality that could have been masked."""
    return jnp.bincount(
        noised.sequence.modality.reshape(-1),
        weights=noised.is_target.reshape(-1).astype(jnp.float32),
        length=len(vocabulary.modalities),
    )


def loss_and_metrics(
    logits: Float[Array, "batch seq vocab"],
    noised: Noised,
    counts: Float[Array, " modality"],
    vocabulary: Vocabulary,
    config: LossConfig,
) -> tuple[Float[Array, ""], dict[str, Mean]]:
    """The loss of a (micro-)batch, with N_m given for the whole batch, and the bound per modality and direction."""
    sequence = noised.sequence
    allowed = vocabulary.allowed_ids(sequence.modality, sequence.place)
    nll, log_z = cross_entropy(restrict(logits, allowed), noised.clean)
    nll, log_z = jnp.where(noised.is_masked, nll, 0.0), jnp.where(noised.is_masked, log_z, 0.0)
    weight = noised.weight if config.weighting == "elbo" else jnp.ones_like(noised.weight)
    modality_weight = jnp.array([config.modality_weights.get(name, 1.0) for name in vocabulary.modalities])
    scale = (modality_weight / jnp.maximum(counts, 1))[sequence.modality]
    loss = jnp.sum(scale * (weight * nll + config.z_loss * log_z**2))
    return loss, bound_metrics(noised, nll, vocabulary)


def bound_metrics(noised: Noised, nll: Float[Array, "batch seq"], vocabulary: Vocabulary) -> dict[str, Mean]:
    """Bits per token (negative ELBO) of every modality, and of what each task asks for."""
    bits = noised.weight * nll / jnp.log(2)

    def mean(where):
        return Mean(jnp.sum(bits * where), jnp.sum(noised.is_target & where).astype(jnp.float32))

    modality, task = noised.sequence.modality, task_tokens(noised.sequence)
    metrics = {f"bits/{name}": mean(modality == number) for number, name in enumerate(vocabulary.modalities) if number}
    for name, direction in vocabulary.tasks.items():
        is_target = (task == vocabulary.task_id(name)) & (modality == vocabulary.number_of(direction.target))
        metrics[f"bits/task/{name}"] = mean(is_target)
    return metrics
