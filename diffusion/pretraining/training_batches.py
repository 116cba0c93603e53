"""Batches of a training, and the refusal of configurations that training would not follow or that do not fit."""

from functools import partial

import jax
from jax.sharding import Mesh

from trimask.diffusion.cost import StepOnMesh, count_parameters, flops_per_token
from trimask.diffusion.data.batches import Batches
from trimask.diffusion.data.prepared import Prepared
from trimask.diffusion.mask_counts import MAX_LENGTH
from trimask.diffusion.mesh import AXES, local_rows
from trimask.diffusion.pretraining.description import TrainConfig
from trimask.diffusion.run.limits import require_room_for_workers
from trimask.diffusion.schedule import ScheduleConfig
from trimask.tokenizers.vocabulary import Vocabulary

_SMALLEST_SHARE = 1e-6
"""Smallest masked share at which a training can cut off its noise schedule."""

_LARGEST_POWER = 32
"""Largest power of a polynomial schedule by which counts are drawn."""


def training_batches(prepared: Prepared, config: TrainConfig, mesh: Mesh | None = None) -> Batches:
    """Batches of a configuration; on a mesh each has only the rows that this process takes.

    Raises ValueError if they do not fit memory or the time allowed, or for an objective that masking would change.
    """
    _require_unbiased(config, prepared.tokenizers.vocabulary)
    copies = 2 if config.masking.complementary else 1
    rows_taken = None if mesh is None else partial(local_rows, mesh=mesh, parts=config.accumulate)
    limits = config.loop.limits
    batches = Batches(
        prepared, config.batch, config.seed, copies, config.accumulate, local_rows=rows_taken, limits=limits
    )
    vocabulary, longest = prepared.tokenizers.vocabulary, max(group.row_length for group in batches.groups)
    if config.masking.counts and longest > MAX_LENGTH and not config.masking.schedule_of(vocabulary).is_linear:
        raise ValueError(
            f"masking.counts is for rows of at most {MAX_LENGTH:,} tokens with schedules that are not linear, got "
            f"{longest:,}; choose a smaller batch.packed_length, linear schedules, or --masking.no-counts"
        )
    _require_room(batches, config, vocabulary, copies, mesh)
    return batches


def _require_unbiased(config: TrainConfig, vocabulary: Vocabulary) -> None:
    """Raises ValueError if times or masks would change the objective that the configuration states."""
    for schedule in dict.fromkeys(config.masking.schedule_of(vocabulary).of_modality):
        _require_unbiased_masks(schedule, config)


def _require_unbiased_masks(schedule: ScheduleConfig, config: TrainConfig) -> None:
    """Raises ValueError for a noise schedule whose times or complements would change the objective."""
    is_elbo, counts = config.loss.weighting == "elbo", config.masking.counts
    power, least = schedule.power_of_time, 1 if is_elbo and not counts else 0.5
    if power is not None and power < least:
        raise ValueError(
            "a polynomial schedule needs a power of at least 1 for the ELBO's weights at random times, and of 0.5 "
            f"without them or with masks by counts, got {power}: with a smaller one many tokens are masked at times "
            "that float32 cannot tell apart; choose another schedule"
        )
    if schedule.kind != "polynomial" and schedule.power != ScheduleConfig.power:
        raise ValueError(
            f"a power is for the polynomial schedule, got {schedule.power:g} for {schedule.kind}; give "
            "--masking.schedule.kind polynomial, or --masking.schedules.MODALITY.kind for that of a modality"
        )
    if counts and power is not None and power > _LARGEST_POWER:
        raise ValueError(
            f"a polynomial schedule needs a power of at most {_LARGEST_POWER} with masks by counts, got {power:g}: "
            "with a larger one nearly all counts are 1, and float32 cannot tell how rare the others are"
        )
    if schedule.min_share < _SMALLEST_SHARE:
        raise ValueError(
            f"masking.schedule.min_share must be at least {_SMALLEST_SHARE}, as float32 tells no smaller share of kept "
            f"tokens from none; got {schedule.min_share}"
        )
    if config.masking.complementary and not is_elbo and power != 1:
        raise ValueError(
            f"complementary masks with the unweighted loss need the linear schedule, got {schedule.kind}: a mask and "
            "its complement have the same distribution only there, so the loss would weigh masked shares otherwise "
            "than without complements; choose --masking.schedule.kind linear or --loss.weighting elbo"
        )


def _require_room(
    batches: Batches, config: TrainConfig, vocabulary: Vocabulary, copies: int, mesh: Mesh | None
) -> None:
    """Raises ValueError if training does not fit the devices' memory or the time allowed, as estimated by `cost.py`."""
    devices = jax.local_devices()[:1] if mesh is None else mesh.local_devices
    data, fsdp, tensor = (1, 1, 1) if mesh is None else (mesh.shape[axis] for axis in AXES)
    model, horizon, limits = config.model, config.optimizer.horizon_tokens, config.loop.limits
    for group in batches.groups:
        step = StepOnMesh(
            model,
            vocabulary,
            data,
            fsdp,
            tensor,
            group.row_length,
            config.accumulate,
            devices[0].platform,
            config.loss,
        )
        rows = -(-copies * group.num_rows // (data * fsdp * config.accumulate))
        what = (
            f"a step of {count_parameters(model, vocabulary).total:,} parameters on {rows:,} rows of {group.name}, "
            f"of {group.row_length:,} tokens each,"
        )
        limits.require_memory(step.estimate(rows).total, what, devices)
    shortest = min(group.row_length for group in batches.groups)
    flops = horizon * flops_per_token(model, vocabulary, shortest)
    all_devices = devices if mesh is None else list(mesh.devices.flat)
    require_room_for_workers(config.loop.workers, "loop.workers")
    limits.require_time(flops, f"training on {horizon:,} tokens", all_devices)
