"""The study of complementary masks: its variance is that of NumPy, and other tokenizers are refused."""

import csv
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from trimask.diffusion.data.batches import BatchConfig, Batches
from trimask.diffusion.description import TrainConfig
from trimask.diffusion.loss import LossConfig
from trimask.diffusion.masking import MaskingConfig, forward_process
from trimask.diffusion.optimizer import OptimizerConfig
from trimask.diffusion.pretraining import Pretraining
from trimask.diffusion.schedule import ScheduleConfig
from trimask.diffusion.studies.mask_variance import MaskVariance
from trimask.diffusion.train import train
from trimask.diffusion.trained import load
from trimask.diffusion.transformer import TransformerConfig
from trimask.scripts import study

TRAIN = TrainConfig(
    model=TransformerConfig(num_layers=1, width=16, num_heads=2, mlp_width=16),
    optimizer=OptimizerConfig(horizon_tokens=200, warmup_tokens=20),
    batch=BatchConfig(tokens=120, weights={"spoken": 0.0, "sums": 0.0}),
)


@pytest.fixture(scope="module")
def run(prepared, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    train(folder, prepared.folder, TRAIN)
    return folder


def test_the_variance_is_the_trace_of_the_covariance(prepared, run, tmp_path):
    arguments = ["--run", str(run), "--draws", "4", "--schedules", "cosine_md4"]
    study.main(["mask-variance", str(tmp_path / "out"), "--data", str(prepared.folder), *arguments])
    with (tmp_path / "out/variances.csv").open() as file:
        (row,) = csv.DictReader(file)
    loaded = load(run)
    masking = MaskingConfig(schedule=ScheduleConfig(kind="cosine_md4"), complementary=True)
    config = dataclasses.replace(TRAIN, masking=masking, loss=LossConfig(weighting="elbo"))
    pretraining = Pretraining(config, loaded.vocabulary)
    batches = Batches(prepared, BatchConfig(tokens=120, weights={"spoken": 0.0, "sums": 0.0}), seed=1, copies=2)
    gradients_of, flat = jax.jit(pretraining.gradients), []
    for number, key in enumerate(jax.random.split(jax.random.key(0), 4)):
        noised = forward_process(key, jax.tree.map(jnp.asarray, batches(number)), loaded.vocabulary, masking)
        gradients = gradients_of(loaded.parameters, noised)[2]
        flat.append(np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(gradients)]))
    assert 0 < float(row["independent"]) != float(row["complementary"])
    assert float(row["complementary"]) == pytest.approx(np.trace(np.cov(np.array(flat).T)), rel=1e-3)


def test_one_draw_has_no_variance():
    with pytest.raises(ValueError, match="at least 2 draws, got 1"):
        MaskVariance(draws=1)
