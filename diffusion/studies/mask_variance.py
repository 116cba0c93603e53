"""Do complementary masks lower the variance of the gradient at equal compute?

For a trained model and each noise schedule, the study estimates the trace of the covariance of the gradient over random
batches and masks: with n independently masked examples, and with n/2 examples that enter twice, with a mask and with
its complement. Both cost n rows.
"""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

from trimask.diffusion.data.batches import BatchConfig, Batches
from trimask.diffusion.data.prepared import Prepared
from trimask.diffusion.loss import LossConfig
from trimask.diffusion.masking import MaskingConfig, forward_process
from trimask.diffusion.pretraining.trained_model import LoadedRun
from trimask.diffusion.pretraining.training_step import Pretraining
from trimask.diffusion.schedule import ScheduleConfig, ScheduleKind
from trimask.diffusion.studies.findings import markdown_table, write_csv
from trimask.diffusion.studies.trials import ModelTrial, Trials, of_model, open_run
from trimask.tokenizers.storage.ranges import Checked, whole


@dataclass(frozen=True, kw_only=True)
class MaskVariance(Checked):
    """Model and noise schedules for which the study measures the variance of the gradient."""

    run: str = "runs/tiny"
    """Run folder of a trained model."""
    schedules: tuple[ScheduleKind, ...] = ("linear", "cosine_md4", "cosine_mdlm", "polynomial")
    """Noise schedules to compare."""
    draws: Annotated[int, whole(2, 1 << 24)] = 200
    """Number of batches for each schedule and kind of mask."""


@dataclass(frozen=True, kw_only=True)
class VarianceTrial(ModelTrial):
    """One schedule and kind of mask, and all else that its variance depends on; stored in trials.jsonl."""

    masking: MaskingConfig
    draws: int
    """Number of batches."""


@dataclass(frozen=True)
class Variance:
    """Result of a `VarianceTrial`; stored in trials.jsonl."""

    trace: float
    """Trace of the covariance of the gradient."""


def study(config: MaskVariance, trials: Trials) -> str:
    """Measures every schedule, writes variances.csv, and returns the report in Markdown."""
    loaded, _ = open_run(config.run, trials.data)
    maskings = [
        MaskingConfig(schedule=ScheduleConfig(kind=kind), complementary=complementary)
        for kind in config.schedules
        for complementary in (False, True)
    ]
    model = of_model(config.run, loaded.step)
    planned = [VarianceTrial(**model, masking=masking, draws=config.draws) for masking in maskings]
    traces = [result.trace for result in trials.measurements(planned, measure_variance, Variance, "variances")]
    rows, cells = [], []
    for kind, independent, pairs in zip(config.schedules, traces[::2], traces[1::2], strict=True):
        rows.append({"schedule": kind, "independent": independent, "complementary": pairs})
        cells.append([kind, f"{independent:.3g}", f"{pairs:.3g}", f"{pairs / independent:.2f}"])
    write_csv(trials.folder / "variances.csv", rows)
    table = markdown_table(["schedule", "independent", "complementary", "ratio"], cells)
    conditions = f"{config.draws} draws, {config.run} at step {loaded.step}"
    return f"Trace of the covariance of the ELBO's gradient, {conditions}.\n\n{table}"


def measure_variance(trial: VarianceTrial, data: Path) -> Variance:
    """Estimates the variance of the gradient.

    The name of this function is part of the keys in trials.jsonl, so it must not change.
    """
    loaded, prepared = open_run(trial.run, data)
    return Variance(gradient_variance(loaded, prepared, trial.masking, trial.draws))


def gradient_variance(loaded: LoadedRun, prepared: Prepared, masking: MaskingConfig, draws: int) -> float:
    """Trace of the covariance of the ELBO's gradient, estimated from `draws` batches of the first dataset."""
    train = dataclasses.replace(loaded.description.train, masking=masking, loss=LossConfig(weighting="elbo"))
    others = {name: 0.0 for name in list(prepared.manifest.datasets)[1:]}
    batch_config = BatchConfig(tokens=train.batch.tokens, weights=others)
    batches = Batches(prepared, batch_config, seed=1, copies=2 if masking.complementary else 1)

    mean_targets = batches.mean_targets(draws, masking.joint_probability)
    pretraining = Pretraining(train, loaded.vocabulary, mean_targets=mean_targets)

    @jax.jit
    def gradient(key, batch):
        noised = forward_process(key, batch, loaded.vocabulary, masking)
        return ravel_pytree(pretraining.gradients(loaded.parameters, noised, pretraining.loss_scale)[2])[0]

    keys = jax.random.split(jax.random.key(0), draws)
    total = squares = jnp.zeros(())
    for draw in range(draws):
        flat = gradient(keys[draw], batches(draw))
        total, squares = total + flat, squares + flat @ flat
    mean = total / draws
    return float((squares / draws - mean @ mean) * draws / (draws - 1))
