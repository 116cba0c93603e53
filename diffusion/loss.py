"""The training objective: weighted cross-entropy at masked positions, normalised by mean numbers of targets.

    L = Σ_m λ_m / N_m · Σ_{i masked, of modality m} [w_i · (−log p(x_i | noised)) + z · (log Z_i)²]

where p is the softmax over the ids allowed at position i, Z_i its normaliser, and z the coefficient of the z-loss.

N_m is the mean number of *maskable* tokens of modality m per step over the whole run, all devices and copies included.
It is a constant of the run, so the gradient of a batch is the mean of those of its rows, and a token of a modality has
the same weight in every step. With w_i the ELBO's weight, λ = 1, z = 0 and no example whose loss is no bound
(`masking.py`), the mean of L over the run is the sum of the negative ELBO per token of each modality. With the
normaliser `tokens`, N = Σ_m N_m takes the place of all N_m.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from trimask.diffusion.cross_entropy import masked_cross_entropy
from trimask.diffusion.masking import CONDITIONAL, JOINT, Noised
from trimask.diffusion.run.running_mean import Mean
from trimask.tokenizers.sequence import task_tokens
from trimask.tokenizers.storage.formats import added_field
from trimask.tokenizers.storage.ranges import Checked, NonNegative, Size
from trimask.tokenizers.vocabulary import Vocabulary


@dataclass(frozen=True, kw_only=True)
class LossConfig(Checked):
    """Configuration of the training objective."""

    weighting: Literal["elbo", "unweighted"] = "elbo"
    """Weight of a masked token: w(t) of the ELBO, or 1."""
    normaliser: Literal["modality", "tokens"] = added_field(as_before="modality", default="modality")
    """Divisor of a token's loss: the mean number of targets of its modality per step (modality), so that every modality
    has the same total weight, or of all modalities (tokens), so that every token has the same weight."""
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


def loss_scale(
    config: LossConfig, mean_targets: Mapping[str, float], vocabulary: Vocabulary
) -> Float[Array, " modality"]:
    """λ_m / N_m, or λ_m / N, by modality number; 0 for modalities without targets.

    `mean_targets` is N_m by the modality's name, 0 if a modality is not listed.
    """
    targets = np.array([mean_targets.get(name, 0.0) for name in vocabulary.modalities])
    weights = np.array([config.modality_weights.get(name, 1.0) for name in vocabulary.modalities])
    divisors = np.where(targets > 0, targets if config.normaliser == "modality" else targets.sum(), np.inf)
    return jnp.asarray(weights / divisors, jnp.float32)


def loss_and_metrics(
    hidden: Float[Array, "batch seq width"],
    matrix: Float[Array, "width vocab"],
    noised: Noised,
    scale: Float[Array, " modality"],
    vocabulary: Vocabulary,
    config: LossConfig,
    dtype: str = "float32",
) -> tuple[Float[Array, ""], dict[str, Mean]]:
    """Loss of a (micro-)batch, and training estimates of the bits per token.

    `scale` is λ_m / N_m (`loss_scale`). Logits are hidden · matrix, multiplied in `dtype`.
    """
    sequence = noised.sequence
    weight = noised.weight if config.weighting == "elbo" else jnp.ones_like(noised.weight)
    scales = scale[sequence.modality]
    bounds = vocabulary.allowed_bounds(sequence.modality, sequence.coordinates)
    of_positions = (noised.clean, bounds, noised.is_masked, scales * weight, scales * config.z_loss)
    flat = (x.reshape(-1, *x.shape[2:]) for x in of_positions)
    loss, nll = masked_cross_entropy(
        hidden.reshape(-1, hidden.shape[-1]),
        matrix,
        *flat,
        config.tile_positions,
        config.ids_of_tile(vocabulary),
        dtype,
    )
    return loss, training_estimates(noised, nll.reshape(noised.clean.shape), vocabulary)


def training_estimates(noised: Noised, nll: Float[Array, "batch seq"], vocabulary: Vocabulary) -> dict[str, Mean]:
    """Training estimates of the negative ELBO, in bits per token, with the ELBO's weight whatever is trained on.

        bits/task/TASK    of the target given its condition, from the examples of the task that are masked so
        bits/joint/TASK   of both sides together, from those that are masked on both sides at one time
        bits/MODALITY     of all tokens of the modality in both kinds of examples

    The first two estimate bounds. Examples with two times or a hidden condition estimate none, and are in none.
    """
    bits = noised.weight * nll / jnp.log(2)

    def mean(where):
        return Mean(jnp.sum(bits * where), jnp.sum(noised.is_target & where).astype(jnp.float32))

    modality, task = noised.sequence.modality, task_tokens(noised.sequence)
    is_conditional, is_joint = noised.mode == CONDITIONAL, noised.mode == JOINT
    is_counted = is_conditional | is_joint
    names = enumerate(vocabulary.modalities)
    metrics = {f"bits/{name}": mean(is_counted & (modality == number)) for number, name in names if number}
    for name, direction in vocabulary.tasks.items():
        is_of_task = task == vocabulary.task_id(name)
        metrics[f"bits/task/{name}"] = mean(is_of_task & is_conditional)
        if direction.condition is not None:
            metrics[f"bits/joint/{name}"] = mean(is_of_task & is_joint)
    return metrics
