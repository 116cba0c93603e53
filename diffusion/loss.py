"""The training objective: weighted cross-entropy at masked positions, normalised per modality.

    L = Σ_m λ_m / N_m · Σ_{i masked, of modality m} [w_i · (−log p(x_i | noised)) + z · (log Z_i)²]

where p is the softmax over the ids allowed at position i, Z_i its normaliser, and z the coefficient of the z-loss.

N_m counts the *maskable* tokens of modality m in the global batch, never the masked ones, so that the expectation over
masks is the bound per token. With w_i the ELBO's weight and λ = 1, L is the negative ELBO per token of each modality.
The reported bound always uses the ELBO's weight, whichever weight is trained on.
"""

from dataclasses import dataclass, field
from typing import Literal

import jax.numpy as jnp
from jaxtyping import Array, Float

from trimask.diffusion.cross_entropy import masked_cross_entropy
from trimask.diffusion.masking import Noised
from trimask.diffusion.run.running_mean import Mean
from trimask.tokenizers.sequence import task_tokens
from trimask.tokenizers.storage.ranges import Checked, NonNegative, Size
from trimask.tokenizers.vocabulary import Vocabulary


@dataclass(frozen=True, kw_only=True)
class LossConfig(Checked):
    """Configuration of the training objective."""

    weighting: Literal["elbo", "unweighted"] = "elbo"
    """Weight of a masked token: w(t) of the ELBO, or 1."""
    modality_weights: dict[str, NonNegative] = field(default_factory=dict)
    """Loss weight λ of each modality, by name; 1 if a modality is not listed."""
    z_loss: NonNegative = 0.0
    """Coefficient of (log Σ exp logits)² at masked positions, which keeps logits from drifting."""
    tile_positions: Size = 512
    """Number of masked positions whose logits are computed at a time."""
    tile_ids: Size = 4096
    """Approximate number of ids whose logits are computed at a time; the largest range is divided into equal tiles."""

    def ids_of_tile(self, vocabulary: Vocabulary) -> int:
        """Exact number of ids per tile, a multiple of 16 that divides the largest range almost evenly.

        Otherwise, with tiles of 4,096 ids, a range of 8,193 would need a third tile for its last id.
        """
        largest = max(r.stop - r.start for r in vocabulary.ranges)
        share = -(-largest // max(1, round(largest / self.tile_ids)))
        return -(-share // 16) * 16


def target_counts(noised: Noised, vocabulary: Vocabulary) -> Float[Array, " modality"]:
    """N_m: number of maskable tokens of each modality."""
    return jnp.bincount(
        noised.sequence.modality.reshape(-1),
        weights=noised.is_target.reshape(-1).astype(jnp.float32),
        length=len(vocabulary.modalities),
    )


def loss_and_metrics(
    hidden: Float[Array, "batch seq width"],
    matrix: Float[Array, "width vocab"],
    noised: Noised,
    counts: Float[Array, " modality"],
    vocabulary: Vocabulary,
    config: LossConfig,
    dtype: str = "float32",
) -> tuple[Float[Array, ""], dict[str, Mean]]:
    """Loss of a (micro-)batch, and the bound in bits per token of each modality and task.

    `counts` are N_m of the whole batch. Logits are hidden · matrix, multiplied in `dtype`.
    """
    sequence = noised.sequence
    weight = noised.weight if config.weighting == "elbo" else jnp.ones_like(noised.weight)
    modality_weight = jnp.array([config.modality_weights.get(name, 1.0) for name in vocabulary.modalities])
    scale = (modality_weight / jnp.maximum(counts, 1))[sequence.modality]
    bounds = vocabulary.allowed_bounds(sequence.modality, sequence.coordinates)
    of_positions = (noised.clean, bounds, noised.is_masked, scale * weight, scale * config.z_loss)
    flat = (x.reshape(-1, *x.shape[2:]) for x in of_positions)
    loss, nll = masked_cross_entropy(
        hidden.reshape(-1, hidden.shape[-1]),
        matrix,
        *flat,
        config.tile_positions,
        config.ids_of_tile(vocabulary),
        dtype,
    )
    return loss, bound_metrics(noised, nll.reshape(noised.clean.shape), vocabulary)


def bound_metrics(noised: Noised, nll: Float[Array, "batch seq"], vocabulary: Vocabulary) -> dict[str, Mean]:
    """Negative ELBO in bits per token: of each modality, and of each task's target."""
    bits = noised.weight * nll / jnp.log(2)

    def mean(where):
        return Mean(jnp.sum(bits * where), jnp.sum(noised.is_target & where).astype(jnp.float32))

    modality, task = noised.sequence.modality, task_tokens(noised.sequence)
    metrics = {f"bits/{name}": mean(modality == number) for number, name in enumerate(vocabulary.modalities) if number}
    for name, direction in vocabulary.tasks.items():
        is_target = (task == vocabulary.task_id(name)) & (modality == vocabulary.number_of(direction.target))
        metrics[f"bits/task/{name}"] = mean(is_target)
    return metrics
