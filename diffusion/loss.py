"""The training objective: weighted cross-entropy at masked positions, normalised per modality.

    L = Σ_m λ_m / N_m · Σ_{i masked, of modality m} [w_i · (−log p(x_i | noised)) + z · (log Z_i)²]

where p, the softmax over the allowed ids, has the normaliser Z_i, and z is the coefficient of the z-loss.

N_m counts the *maskable* tokens of modality m in the global batch, never the masked ones, so that the expectation over
masks is the bound per token. With w_i the ELBO's weight and λ = 1 this is the negative ELBO per token of each
modality; the reported bound always uses the ELBO's weight, whatever is trained on.
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
    """What is minimised."""

    weighting: Literal["elbo", "unweighted"] = "elbo"
    """Weight of a masked token: the ELBO's w(t), or 1."""
    modality_weights: dict[str, NonNegative] = field(default_factory=dict)
    """λ of each modality by name; 1 where none is given."""
    z_loss: NonNegative = 0.0
    """Coefficient of (log Σ exp logits)² at masked positions, which keeps logits from drifting."""
    tile_positions: Size = 512
    """Masked positions whose logits are computed at a time."""
    tile_ids: Size = 4096
    """Ids for which they are, about: the largest range is made a whole number of tiles."""

    def ids_of_tile(self, vocabulary: Vocabulary) -> int:
        """Ids of a tile: with 4,096 of them, a range of 8,193 would take a third tile for its last id."""
        largest = max(r.stop - r.start for r in vocabulary.ranges)
        share = -(-largest // max(1, round(largest / self.tile_ids)))
        return -(-share // 16) * 16


def target_counts(noised: Noised, vocabulary: Vocabulary) -> Float[Array, " modality"]:
    """N_m: tokens of each modality that could have been masked."""
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
    """The loss of a (micro-)batch, with N_m given for the whole batch, and the bound per modality and direction.

    Logits are hidden · matrix, products of numbers of type `dtype`.
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
