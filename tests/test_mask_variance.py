"""The study of complementary masks: its variance is that of NumPy, and other tokenizers are refused."""

import csv
import dataclasses
from pathlib import Path
from types import SimpleNamespace

import fakes
import jax
import madeup
import numpy as np
import pytest
from madeup import MadeUp, written

from trimask.diffusion.data.batches import BatchConfig, Batches
from trimask.diffusion.loss import LossConfig
from trimask.diffusion.masking import MaskingConfig, forward_process
from trimask.diffusion.pretraining.training_step import Pretraining
from trimask.diffusion.schedule import ScheduleConfig
from trimask.diffusion.studies import mask_variance
from trimask.diffusion.studies.mask_variance import MaskVariance, Variance
from trimask.scripts import study

BATCH = BatchConfig(tokens=120, weights={"spoken": 0.0, "sums": 0.0})


@pytest.fixture(autouse=True)
def digests(monkeypatch):
    """The weights of a model that is in no folder have a made-up digest."""
    monkeypatch.setattr("trimask.diffusion.studies.trials.weights_digest", lambda folder, step: f"at {step}")


def test_the_variance_is_the_trace_of_the_covariance(prepared, loaded, tmp_path, monkeypatch):
    train = dataclasses.replace(loaded.description.train, batch=BATCH)
    loaded = dataclasses.replace(loaded, description=dataclasses.replace(loaded.description, train=train))
    monkeypatch.setattr("trimask.diffusion.studies.trials.load", fakes.opening(loaded, Path("runs/small")))
    arguments = ["--run", "runs/small", "--draws", "4", "--schedules", "cosine_md4"]
    words = ["mask-variance", str(tmp_path / "out"), "--data", str(prepared.folder), "--workers", "0", *arguments]
    study.main(words)
    with (tmp_path / "out/variances.csv").open() as file:
        (row,) = csv.DictReader(file)
    masking = MaskingConfig(schedule=ScheduleConfig(kind="cosine_md4"), complementary=True)
    config = dataclasses.replace(train, masking=masking, loss=LossConfig(weighting="elbo"))
    batches, flat = Batches(prepared, BATCH, seed=1, copies=2), []
    pretraining = Pretraining(config, loaded.vocabulary, mean_targets=batches.mean_targets(4, 0.2))

    @jax.jit
    def gradients_of(key, batch):
        noised = forward_process(key, batch, loaded.vocabulary, masking)
        return pretraining.gradients(loaded.parameters, noised, pretraining.loss_scale)[2]

    for number, key in enumerate(jax.random.split(jax.random.key(0), 4)):
        gradients = gradients_of(key, batches(number))
        flat.append(np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(gradients)]))
    assert 0 < float(row["independent"]) != float(row["complementary"])
    assert float(row["complementary"]) == pytest.approx(np.trace(np.cov(np.array(flat).T)), rel=1e-3)


def test_all_that_is_written(tmp_path, monkeypatch):
    traces = {("linear", False): 8.0, ("linear", True): 2.0, ("cosine_md4", False): 1.25, ("cosine_md4", True): 1.5}

    def variance(trial):
        return Variance(traces[trial.masking.schedule.kind, trial.masking.complementary])

    opened = fakes.opening((SimpleNamespace(step=1234), None), "runs/small", tmp_path / "data")
    monkeypatch.setattr(mask_variance, "open_run", opened)
    config = MaskVariance(run="runs/small", draws=7, schedules=("linear", "cosine_md4"))
    trials = MadeUp(tmp_path, variance)
    assert mask_variance.study(config, trials) == written(
        """
        Trace of the covariance of the ELBO's gradient, 7 draws, runs/small at step 1234.

        | schedule | independent | complementary | ratio |
        | --- | --- | --- | --- |
        | linear | 8 | 2 | 0.25 |
        | cosine_md4 | 1.25 | 1.5 | 1.20 |
        """
    )
    ((what, measure, asked),) = trials.asked
    assert (what, measure) == ("variances", mask_variance.measure_variance)
    assert [(trial.run, trial.model_step, trial.draws) for trial in asked] == [("runs/small", 1234, 7)] * 4
    assert madeup.files(tmp_path) == ["variances.csv"]
    assert (tmp_path / "variances.csv").read_text().splitlines() == [
        "schedule,independent,complementary",
        "linear,8.0,2.0",
        "cosine_md4,1.25,1.5",
    ]


def test_one_draw_has_no_variance():
    with pytest.raises(ValueError, match="draws must be at least 2, got 1"):
        MaskVariance(draws=1)
