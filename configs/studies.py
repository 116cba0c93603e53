"""Named settings of the studies: `cpu` for two cores and half an hour, or hours, `accelerator` for more."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal, NamedTuple

from trimask.configs import policies
from trimask.configs.presets import stream, tiny
from trimask.diffusion.data.batches import BatchConfig
from trimask.diffusion.data.prepare_config import PrepareConfig
from trimask.diffusion.loss import LossConfig
from trimask.diffusion.optimizer import OptimizerConfig
from trimask.diffusion.parametrization import Family, ModuleMultipliers, ParametrizationConfig
from trimask.diffusion.pretraining.description import TrainConfig
from trimask.diffusion.sampling.generation_config import GenerationConfig
from trimask.diffusion.studies import (
    batch_invariance,
    coordinate_check,
    critical_batch,
    fresh_data,
    kill_and_resume,
    learning_rate_transfer,
    mask_variance,
    masks,
    mixing,
    multiplier_search,
    sampling_fronts,
    schedules,
)
from trimask.diffusion.studies.batch_invariance import BatchInvariance
from trimask.diffusion.studies.claims import Findings
from trimask.diffusion.studies.coordinate_check import CoordinateCheck
from trimask.diffusion.studies.critical_batch import CriticalBatch
from trimask.diffusion.studies.final import Final
from trimask.diffusion.studies.fresh_data import FreshData
from trimask.diffusion.studies.kill_and_resume import KillAndResume
from trimask.diffusion.studies.learning_rate_transfer import LearningRateTransfer
from trimask.diffusion.studies.mask_variance import MaskVariance
from trimask.diffusion.studies.masks import MaskStudy
from trimask.diffusion.studies.mixing import MixingStudy
from trimask.diffusion.studies.multiplier_search import MultiplierSearch
from trimask.diffusion.studies.sampling_fronts import SamplingStudy
from trimask.diffusion.studies.schedules import ScheduleStudy
from trimask.diffusion.studies.trials import Trials
from trimask.diffusion.transformer import TransformerConfig
from trimask.sampling_rl.studies import policy_study, unmasking
from trimask.sampling_rl.studies.policy_study import PolicyStudy
from trimask.sampling_rl.studies.unmasking import UnmaskingStudy

DATA = tiny().prepare
"""Data that studies train on by default: real handwritten digits and synthetic speech, with captions.

Sums are left out: they are learned in a sudden jump, so a result would mostly depend on whether the run has
passed it."""

STREAM = stream().prepare
"""Data of studies of masks and noise schedules: digits warped and spoken anew, none of them twice."""


_SHORT = OptimizerConfig(
    horizon_tokens=200_000, warmup_tokens=20_000, ema_decay=0.98, weight_decay=0.1, final_fraction=0.0
)
"""Optimizer configuration for runs of a few hundred steps."""


def _proxy(width: int, layers: int, optimizer: OptimizerConfig, batch: int = 256) -> TrainConfig:
    """A small network and training configuration for scaling studies: heads of size 16, `batch` positions per step."""
    return TrainConfig(
        model=TransformerConfig(num_layers=layers, width=width, num_heads=width // 16),
        loss=LossConfig(weighting="unweighted"),
        optimizer=optimizer,
        batch=BatchConfig(tokens=batch, weights={"handwritten": 2.0, "spoken": 1.0, "sums": 0.0}),
    )


def coordinate_check_cpu() -> CoordinateCheck:
    """Widths 64 to 512 and depths 2 to 32, after twenty steps."""
    optimizer = OptimizerConfig(horizon_tokens=20 * 256, warmup_tokens=0, schedule="constant")
    small_start = ModuleMultipliers(init=Family(of={"unembedding": 0.1}))
    parametrization = ParametrizationConfig(multipliers=small_start)
    return CoordinateCheck(base=replace(_proxy(64, 4, optimizer), parametrization=parametrization))


def coordinate_check_accelerator() -> CoordinateCheck:
    """Widths up to 4,096 and depths up to 128."""
    widths, depths = (128, 256, 512, 1024, 2048, 4096), (2, 4, 8, 16, 32, 64, 128)
    return replace(coordinate_check_cpu(), widths=widths, depths=depths, seeds=4)


def lr_transfer_cpu() -> LearningRateTransfer:
    """Widths 64 to 256 and depths 2 to 16, 200,000 tokens per run, in about 800 steps."""
    return LearningRateTransfer(base=_proxy(64, 4, _SHORT))


def lr_transfer_accelerator() -> LearningRateTransfer:
    """Widths up to 2,048 and depths up to 64, with twenty times the tokens in batches eight times as large."""
    base = _proxy(128, 4, replace(_SHORT, horizon_tokens=4_000_000, warmup_tokens=200_000), batch=2048)
    widths, depths = (128, 256, 512, 1024, 2048), (2, 4, 8, 16, 32, 64)
    return LearningRateTransfer(base=base, widths=widths, depths=depths, seeds=3)


def critical_batch_cpu() -> CriticalBatch:
    """Horizons of 100,000, 200,000 and 400,000 tokens."""
    return CriticalBatch(base=_proxy(32, 4, replace(_SHORT, learning_rate=2**-8)))


def critical_batch_accelerator() -> CriticalBatch:
    """Horizons twenty times as long as on a CPU, and a network of 3M parameters."""
    recipe = replace(_SHORT, learning_rate=2**-9, horizon_tokens=4_000_000, warmup_tokens=200_000)
    batches = (1024, 2048, 4096, 8192, 16384, 32768)
    base = _proxy(256, 4, recipe, batch=1024)
    return CriticalBatch(base=base, horizons=(2_000_000, 4_000_000), predicted_horizon=8_000_000, batches=batches)


def batch_invariance_cpu() -> BatchInvariance:
    """0.1M parameters, 800,000 tokens, batches of 64 to 4,096 positions."""
    return BatchInvariance(base=_proxy(32, 4, replace(_SHORT, horizon_tokens=800_000), batch=512))


def batch_invariance_accelerator() -> BatchInvariance:
    """3M parameters, 5M tokens, batches of 256 to 16,384 positions, five seeds."""
    recipe = replace(_SHORT, horizon_tokens=5_000_000, warmup_tokens=400_000)
    return BatchInvariance(base=_proxy(256, 4, recipe, batch=2048), seeds=5)


def search_cpu() -> MultiplierSearch:
    """0.1M parameters, 100,000 tokens per run; verified on a network four times as wide and twice as deep."""
    return MultiplierSearch(base=_proxy(32, 2, replace(_SHORT, horizon_tokens=100_000)))


def search_accelerator() -> MultiplierSearch:
    """3M parameters, 4M tokens per run, 600 runs; verified on networks of 50M parameters and more."""
    recipe = replace(_SHORT, horizon_tokens=4_000_000, warmup_tokens=200_000)
    return MultiplierSearch(base=_proxy(256, 4, recipe, batch=2048), runs=601, per_round=20)


def policies_cpu() -> PolicyStudy:
    """115 policies, each trained for a minute or two."""
    return PolicyStudy(
        blocks=policies.blocks(), full=policies.full(), steered=policies.steered(), imitation=policies.imitation()
    )


def policies_accelerator() -> PolicyStudy:
    """Policies of the paper's size, and ten times as many problems."""
    small, of_paper = policies_cpu(), policies.paper().policy
    return replace(
        small,
        blocks=replace(small.blocks, policy=of_paper),
        full=replace(small.full, policy=of_paper),
        steered=replace(small.steered, policy=of_paper),
        imitation=replace(small.imitation, policy=of_paper),
        imitated=10 * small.imitated,
        problems=10 * small.problems,
        scratch=10 * small.scratch,
    )


def mask_variance_cpu() -> MaskVariance:
    """1.0M parameters, 800,000 tokens; gradients of 50 examples of each task."""
    return MaskVariance(base=stream().train)


def mask_variance_accelerator() -> MaskVariance:
    """8M parameters, 8M tokens; gradients of 200 examples of each task."""
    return MaskVariance(base=_ten_times(stream().train), examples=200)


def fresh_data_cpu() -> FreshData:
    """1.0M parameters, 1.6M tokens: the longest run of the studies on a stream."""
    base = stream().train
    return FreshData(base=replace(base, optimizer=replace(base.optimizer, horizon_tokens=1_600_000)))


def fresh_data_accelerator() -> FreshData:
    """8M parameters, 8M tokens; the stream must have ten times the rows."""
    return FreshData(base=_ten_times(stream().train))


def mixing_cpu() -> MixingStudy:
    """0.1M parameters, 1.6M tokens, at most eight seeds."""
    return MixingStudy(base=_small_stream(horizon=1_600_000), max_seeds=8)


def mixing_accelerator() -> MixingStudy:
    """8M parameters, 8M tokens, eight seeds."""
    return replace(mixing_cpu(), base=_ten_times(stream().train))


def masks_cpu() -> MaskStudy:
    """1.0M parameters, 800,000 tokens, eight ways to mask and weigh."""
    return MaskStudy(base=stream().train, samplings={"fixed": _on_grid("linear")})


def masks_accelerator() -> MaskStudy:
    """8M parameters, 8M tokens."""
    return replace(masks_cpu(), base=_ten_times(stream().train))


def schedules_cpu() -> ScheduleStudy:
    """1.0M parameters, 800,000 tokens, five noise schedules with two kinds of weights, at most ten seeds."""
    samplings = {"fixed": _on_grid("linear"), "own": _on_grid("trained")}
    return ScheduleStudy(base=stream().train, samplings=samplings, smallest_effect=0.01, max_seeds=10)


def schedules_accelerator() -> ScheduleStudy:
    """8M parameters, 8M tokens."""
    return replace(schedules_cpu(), base=_ten_times(stream().train))


def _on_grid(grid: Literal["linear", "trained"]) -> dict[str, GenerationConfig]:
    """Sampling settings of the stream's modalities, with their shares of masks planned on a grid."""
    return {modality: replace(how, grid=grid) for modality, how in stream().train.generation.items()}


def _small_stream(horizon: int) -> TrainConfig:
    """Training of 0.1M parameters on a stream."""
    base = stream().train
    model = TransformerConfig(num_layers=4, width=32, num_heads=2)
    return replace(base, model=model, optimizer=replace(base.optimizer, horizon_tokens=horizon))


def _ten_times(config: TrainConfig) -> TrainConfig:
    """The training with 7.6 times the parameters and ten times the tokens, transferred by Complete(d)P."""
    base, optimizer = config.model, config.optimizer
    model = replace(base.at_width(3 * base.width), num_layers=base.num_layers)
    parametrization = replace(
        config.parametrization, base_width=base.width, base_layers=base.num_layers, base_heads=base.num_heads
    )
    return replace(
        config,
        model=model,
        parametrization=parametrization,
        optimizer=replace(optimizer, horizon_tokens=10 * optimizer.horizon_tokens),
        batch=replace(config.batch, tokens=8 * config.batch.tokens),
    )


class Study(NamedTuple):
    """A study: its function, its named configurations and a summary."""

    run: Callable[[Any, Trials], str | Findings]
    """Takes the configuration and the runner of trials, writes tables and figures, and returns the report in Markdown,
    with what was found of its claims if it has any."""
    presets: dict[str, Callable[[], Any]]
    """Name → function that returns the configuration."""
    summary: str
    """The question that the study answers, for `--help`."""
    data: PrepareConfig = DATA
    """Data on which models are trained, unless others are named."""
    final: Final | None = None
    """Rule by which the study chooses, and score of the choice on the test split. None: nothing is scored there."""


STUDIES = {
    "coordinate-check": Study(
        coordinate_check.study,
        {"cpu": coordinate_check_cpu, "accelerator": coordinate_check_accelerator},
        "do activations and their updates keep their size when the network grows?",
    ),
    "lr-transfer": Study(
        learning_rate_transfer.study,
        {"cpu": lr_transfer_cpu, "accelerator": lr_transfer_accelerator},
        "does the best learning rate stay where it is when the network grows?",
    ),
    "critical-batch": Study(
        critical_batch.study,
        {"cpu": critical_batch_cpu, "accelerator": critical_batch_accelerator},
        "how few steps are enough? measures S_crit at two horizons, and predicts a third",
    ),
    "batch-invariance": Study(
        batch_invariance.study,
        {"cpu": batch_invariance_cpu, "accelerator": batch_invariance_accelerator},
        "does the loss depend on the batch, with and without the SDE rule?",
    ),
    "search": Study(
        multiplier_search.study,
        {"cpu": search_cpu, "accelerator": search_accelerator},
        "which multipliers per module are best? searched on a small network and verified on a larger one",
    ),
    "sampling": Study(
        sampling_fronts.study,
        {"cpu": SamplingStudy, "accelerator": SamplingStudy},
        "how should each modality be sampled? quality against evaluations, and against guidance",
        final=Final(sampling_fronts.rule, sampling_fronts.final),
    ),
    "unmasking": Study(
        unmasking.study,
        {"cpu": UnmaskingStudy, "accelerator": UnmaskingStudy},
        "does a learned policy beat the heuristics? accuracy against evaluations, in blocks and without",
        final=Final(unmasking.rule, unmasking.final),
    ),
    "policies": Study(
        policy_study.study,
        {"cpu": policies_cpu, "accelerator": policies_accelerator},
        "which policies learn what? trains them with many rewards, starts, inputs and laws, and measures each",
        final=Final(policy_study.rule, policy_study.final),
    ),
    "mask-variance": Study(
        mask_variance.study,
        {"cpu": mask_variance_cpu, "accelerator": mask_variance_accelerator},
        "how much do complementary masks, masks by counts and stratified times lower the gradient's variance?",
        STREAM,
    ),
    "fresh-data": Study(
        fresh_data.study,
        {"cpu": fresh_data_cpu, "accelerator": fresh_data_accelerator},
        "are rows that were trained on known better than others of the same stream?",
        STREAM,
    ),
    "mixing": Study(
        mixing.study,
        {"cpu": mixing_cpu, "accelerator": mixing_accelerator},
        "does it matter whether every update mixes all datasets?",
        STREAM,
    ),
    "masks": Study(
        masks.study,
        {"cpu": masks_cpu, "accelerator": masks_accelerator},
        "which masks train best: independent, complementary, by counts, or both?",
        STREAM,
    ),
    "schedules": Study(
        schedules.study,
        {"cpu": schedules_cpu, "accelerator": schedules_accelerator},
        "does the noise schedule matter, and does each modality want its own?",
        STREAM,
    ),
    "kill-and-resume": Study(
        kill_and_resume.study,
        {"cpu": KillAndResume, "accelerator": KillAndResume},
        "does a run that is killed and resumed many times end with the same bits as an uninterrupted one?",
    ),
}
