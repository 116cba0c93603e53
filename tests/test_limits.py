"""Work that exceeds the machine's memory or the time limit is refused before it begins."""

from types import SimpleNamespace

import jax
import numpy as np
import pytest
from fakes import VOCABULARY

from trimask.diffusion.cost import StepOnMesh, count_parameters, evaluation_bytes
from trimask.diffusion.data.batches import BatchConfig, Batches
from trimask.diffusion.data.prepare import prepare
from trimask.diffusion.data.prepare_config import PrepareConfig
from trimask.diffusion.data.sources import SourceConfig
from trimask.diffusion.optimizer import OptimizerConfig
from trimask.diffusion.pretraining.description import TrainConfig
from trimask.diffusion.pretraining.training_batches import training_batches
from trimask.diffusion.pretraining.training_step import Pretraining
from trimask.diffusion.run import limits
from trimask.diffusion.run.limits import WorkLimits, memory_of_host
from trimask.diffusion.run.progress import silent
from trimask.diffusion.run.step_loop import LoopConfig
from trimask.diffusion.studies.trials import Trials
from trimask.diffusion.transformer import TransformerConfig
from trimask.scripts.benchmark import BENCHMARKS, main

TINY = TransformerConfig(num_layers=1, width=16, num_heads=2, mlp_width=16)


def config(model=TINY, horizon=400, batch=120, **loop):
    return TrainConfig(
        model=model,
        optimizer=OptimizerConfig(horizon_tokens=horizon, warmup_tokens=0),
        batch=BatchConfig(tokens=batch),
        loop=LoopConfig(**loop),
    )


@pytest.mark.parametrize(
    ("asked", "reason"),
    [
        (
            config(TransformerConfig(width=2**24)),
            r"a step of 13,5\d\d,\d{3},\d{3},\d{3},\d{3} parameters on \d+ rows of",
        ),
        (config(TransformerConfig(mlp_width=2**24)), "a step of .* takes about .* GB of memory, and this machine has"),
        (config(batch=2**40), r"a batch of .* rows of drawn, of \d+ tokens each, takes about"),
        (config(horizon=10**15), "a training of 1,000,000,000,000,000 tokens, with .* steps to plan"),
        (config(workers=4096), "loop.workers 4096 takes about 1,024 GB of memory"),
        (config(batch=10**6, limits=WorkLimits(memory_gb=0.01)), r"limits.memory-gb allows 0.01; make it smaller, or"),
        (
            config(horizon=10**9, limits=WorkLimits(days=1e-7)),
            "training on 1,000,000,000 tokens takes .* days at least",
        ),
    ],
)
def test_a_training_that_does_not_fit_is_refused_with_the_estimate(prepared, monkeypatch, asked, reason):
    monkeypatch.setattr(limits, "memory_of_host", lambda: 32 * 10**9)
    with pytest.raises(ValueError, match=reason):
        batches = training_batches(prepared, asked)
        batches.num_steps(asked.optimizer.horizon_tokens)


@pytest.mark.parametrize("name", sorted(set(BENCHMARKS) - {"data"}))
def test_a_benchmark_that_does_not_fit_is_refused_before_it_writes(tmp_path, name):
    with pytest.raises(ValueError, match=r".* takes about .* GB of memory, and limits.memory-gb allows 1e-09"):
        main([name, str(tmp_path / "out"), "--limits.memory-gb", "1e-9"])
    assert not (tmp_path / "out").exists()


def test_more_processes_than_there_is_memory_for_are_refused_before_any_starts(prepared, tmp_path, monkeypatch):
    monkeypatch.setattr(limits, "memory_of_host", lambda: 32 * 10**9)
    source = {"drawn": SourceConfig(kind="synthetic", where=("drawn",))}
    with pytest.raises(ValueError, match=r"workers 129 takes about 32\.2 GB of memory, and .* has 32; at most 128 fit"):
        prepare(tmp_path / "new", PrepareConfig(sources=source, workers=129))
    with pytest.raises(ValueError, match="workers 4096 takes about 1,024 GB"):
        Trials(tmp_path / "new", prepared.folder, 4096, silent)
    with pytest.raises(ValueError, match="--workers 4096 takes about 1,024 GB"):
        main(["data", str(tmp_path / "new"), "--data", str(prepared.folder), "--workers", "0", "4096"])
    assert not (tmp_path / "new").exists()


def test_a_training_that_fits_by_its_flag_alone_is_allowed(prepared, monkeypatch):
    monkeypatch.setattr(limits, "memory_of_host", lambda: 10**5)
    with pytest.raises(
        ValueError, match=r"this machine has 0.0001; make it smaller, or allow more with limits.memory-gb"
    ):
        training_batches(prepared, config())
    assert training_batches(prepared, config(limits=WorkLimits(memory_gb=1.0)))(0).tokens.size


def test_more_steps_than_are_counted_are_refused_on_any_machine(prepared, monkeypatch):
    monkeypatch.setattr(limits, "memory_of_host", lambda: None)
    batches = Batches(prepared, BatchConfig(tokens=120), seed=0)
    least = float(np.min(batches.mixture.batch_tokens))
    with pytest.raises(ValueError, match="more than the 2,147,483,647 that are counted; use larger batches"):
        batches.num_steps(int(least * 2**31) + 1)


def test_the_estimate_without_shapes_is_that_with_shapes(prepared):
    vocabulary = prepared.tokenizers.vocabulary
    step = StepOnMesh(TINY, vocabulary, 1, 1, 1, row_length=32)
    shapes = Pretraining(config(), vocabulary).abstract().parameters
    assert step.estimate(7) == step.memory(shapes, 7)


def test_an_evaluation_takes_its_parameters_and_what_grows_with_rows_and_length():
    vocabulary = VOCABULARY
    parameter_bytes = 4 * count_parameters(TINY, vocabulary).total
    one = evaluation_bytes(TINY, vocabulary, 1, 10) - parameter_bytes
    assert one == pytest.approx(4 * (10 * (7.3 * 16 + 8.6 * 16) + 1.2 * 10 * 10 * 2 + 2 * 10 * VOCABULARY.size))
    assert evaluation_bytes(TINY, vocabulary, 3, 10) - parameter_bytes == pytest.approx(3 * one)


def test_accelerators_are_asked_for_their_own_memory():
    device = SimpleNamespace(platform="gpu", memory_stats=lambda: {"bytes_limit": 10**9}, process_index=0)
    WorkLimits().require_memory(0.9e9, "it", [device, device])
    with pytest.raises(ValueError, match=r"it takes about 1.1 GB of memory, and this machine has 1;"):
        WorkLimits().require_memory(1.1e9, "it", [device, device])
    silent = SimpleNamespace(platform="tpu", memory_stats=lambda: None)
    WorkLimits().require_memory(1e18, "it", [silent])
    with pytest.raises(ValueError, match="it takes 462,963 days at least, even at 5e"):
        WorkLimits().require_time(2e23 * 1000, "it", [device])


def test_simulated_devices_share_the_memory_of_the_host(monkeypatch):
    monkeypatch.setattr(limits, "memory_of_host", lambda: 10**9)
    cpu = jax.devices()[:1]
    WorkLimits().require_memory(0.6e9, "it", cpu)
    with pytest.raises(ValueError, match=r"takes about 1.2 GB"):
        WorkLimits().require_memory(0.6e9, "it", cpu * 2)


def test_the_least_limit_of_a_control_group_counts(tmp_path, monkeypatch):
    whole = memory_of_host()
    assert whole is None or whole > 1 << 28
    (tmp_path / "max").write_text("max\n")
    (tmp_path / "some").write_text("123456\n")
    monkeypatch.setattr(limits, "_CONTROL_GROUPS", (str(tmp_path / "max"), str(tmp_path / "none")))
    assert memory_of_host() == whole or whole < 1 << 40
    monkeypatch.setattr(limits, "_CONTROL_GROUPS", (str(tmp_path / "max"), str(tmp_path / "some")))
    assert memory_of_host() == 123456


def test_a_model_says_whether_it_can_be_evaluated(loaded):
    loaded.require_room(WorkLimits(memory_gb=1.0), 32, 8)
    with pytest.raises(ValueError, match=r"evaluating the model on 32 rows of 16,777,216 tokens takes about"):
        loaded.require_room(WorkLimits(memory_gb=1.0), 32, 2**24)
