"""Fields of config.json that must stay, and that may change, when a run is resumed."""

import dataclasses
import shutil

import fakes
import pytest

from trimask.diffusion.data.batches import BatchConfig
from trimask.diffusion.mesh import MeshConfig
from trimask.diffusion.optimizer import OptimizerConfig
from trimask.diffusion.pretraining.description import RunDescription, TrainConfig, load_description, resumed_description
from trimask.diffusion.run.step_loop import LoopConfig
from trimask.diffusion.sampling.generation_config import GenerationConfig
from trimask.diffusion.transformer import TransformerConfig
from trimask.tokenizers.storage import configuration

TRAIN = TrainConfig(model=TransformerConfig(num_layers=1, width=16, num_heads=2))
DESCRIPTION = RunDescription(
    train=TRAIN,
    vocabulary=fakes.VOCABULARY,
    layouts={},
    data="data/a",
    data_fingerprint="1a",
    num_steps=7,
    batch_tokens=1.0,
    kappa=1.0,
    optimizer=TRAIN.optimizer,
    epochs={},
    trimask="0",
    git_commit="old",
)


@pytest.fixture
def folder(tmp_path):
    """Folder of a run with a checkpoint at step 3."""
    configuration.save(tmp_path / "config.json", DESCRIPTION)
    (tmp_path / "checkpoints/3").mkdir(parents=True)
    return tmp_path


def asked(**train) -> RunDescription:
    return dataclasses.replace(DESCRIPTION, git_commit="new", train=dataclasses.replace(TRAIN, **train))


@pytest.mark.parametrize(
    "change",
    [
        {"loop": LoopConfig(log_every=3)},
        {"generation": {"text": GenerationConfig(steps=5)}},
        {"mesh": MeshConfig(fsdp=1)},
        {"batch": BatchConfig(warn_epochs=2.0)},
        {"model": dataclasses.replace(TRAIN.model, remat="block", blocks="scanned", attention="kernel")},
    ],
    ids=lambda change: next(iter(change)),
)
def test_a_run_goes_on_with_other_ways_to_compute_save_and_show_and_is_else_what_it_was(folder, change):
    description = dataclasses.replace(asked(**change), data="elsewhere/a", num_steps=99)
    expected = dataclasses.replace(DESCRIPTION, train=description.train, data="elsewhere/a")
    assert resumed_description(folder, description, resume=True) == expected


@pytest.mark.parametrize(
    ("description", "said"),
    [
        (asked(seed=1), "seed: 0 → 1"),
        (
            asked(seed=1, optimizer=OptimizerConfig(horizon_tokens=3_000_000)),
            "optimizer.horizon_tokens: 2000000 → 3000000; seed: 0 → 1",
        ),
        (asked(batch=BatchConfig(tokens=5)), "batch.tokens: 4096 → 5"),
        (asked(model=dataclasses.replace(TRAIN.model, width=32)), "model.width: 16 → 32"),
        (dataclasses.replace(DESCRIPTION, data_fingerprint="2b"), "data_fingerprint: 1a → 2b"),
        (dataclasses.replace(DESCRIPTION, init_from="runs/b"), "init_from: None → runs/b"),
        (
            dataclasses.replace(DESCRIPTION, vocabulary=dataclasses.replace(fakes.VOCABULARY, text_size=9)),
            "vocabulary.text_size: 6 → 9",
        ),
    ],
)
def test_another_run_is_refused_by_what_differs(folder, description, said):
    with pytest.raises(
        ValueError, match=f"holds a run of another configuration; .* In the folder → requested: {said}$"
    ):
        resumed_description(folder, description, resume=True)


def test_a_run_of_former_rules_is_not_continued(folder):
    configuration.save(folder / "config.json", dataclasses.replace(DESCRIPTION, rules=1))
    assert "rules" not in (folder / "config.json").read_text() and load_description(folder).rules == 1
    said = "rules 1, which this version, of rules 2, does not .* normalised by the run's mean .* --init-from"
    for description in (DESCRIPTION, dataclasses.replace(DESCRIPTION, rules=1)):
        with pytest.raises(ValueError, match=said):
            resumed_description(folder, description, resume=True)
    assert load_description(folder).rules == 1


@pytest.mark.parametrize(
    ("schedule", "horizon", "said"),
    [
        ("cosine", 3_000_000, r"cosine ends at 2,000,000 tokens.* --init-from .* --optimizer.schedule warmup_stable"),
        ("cosine", 1_000_000, "run of 2,000,000 tokens, which can be made longer and not shorter; got 1,000,000"),
        ("constant", 1_999_999, "can be made longer and not shorter; got 1,999,999"),
        ("warmup_stable_decay", 1_999_999, "can be made longer and not shorter; got 1,999,999"),
    ],
)
def test_a_horizon_that_a_run_cannot_get_is_refused(folder, schedule, horizon, said):
    there = asked(optimizer=OptimizerConfig(schedule=schedule))
    configuration.save(folder / "config.json", there)
    longer = asked(optimizer=OptimizerConfig(schedule=schedule, horizon_tokens=horizon))
    with pytest.raises(ValueError, match=said):
        resumed_description(folder, longer, resume=True)
    assert load_description(folder) == there


@pytest.mark.parametrize(("first", "longer"), [({"text": 9.0}, 4.0), ({"text": 9.0}, 19.0), ({}, 9.0)])
def test_an_extension_that_would_need_another_normaliser_is_refused(folder, first, longer):
    optimizer = OptimizerConfig(schedule="constant")
    there = dataclasses.replace(asked(optimizer=optimizer), mean_targets=first)
    configuration.save(folder / "config.json", there)
    extended = asked(optimizer=dataclasses.replace(optimizer, horizon_tokens=3_000_000))
    with pytest.raises(ValueError, match=rf"has {longer:g} targets of text per step, .* batch.anneal_tokens end"):
        resumed_description(folder, dataclasses.replace(extended, mean_targets={"text": longer}), resume=True)
    same = dataclasses.replace(extended, mean_targets={name: 1.5 * mean for name, mean in first.items()})
    assert resumed_description(folder, same, resume=True).mean_targets == first


def test_a_folder_without_a_checkpoint_takes_another_run(folder):
    shutil.rmtree(folder / "checkpoints")
    other = asked(seed=1)
    assert resumed_description(folder, other, resume=True) == resumed_description(folder, other, resume=False) == other


def test_a_run_that_is_there_is_not_begun_anew(folder):
    with pytest.raises(ValueError, match="holds a run at step 3; --no-resume needs a folder without one"):
        resumed_description(folder, DESCRIPTION, resume=False)
    (folder / "config.json").unlink()
    with pytest.raises(ValueError, match=r"holds checkpoints without a config.json"):
        resumed_description(folder, DESCRIPTION, resume=True)
    (folder / "checkpoints/3").rmdir()
    for resume in (True, False):
        assert resumed_description(folder, DESCRIPTION, resume) is DESCRIPTION


def test_a_folder_that_is_not_a_run_is_refused(folder):
    assert load_description(folder) == DESCRIPTION
    (folder / "manifest.json").write_text("{}")  # of prepared data, which have a config.json too
    with pytest.raises(FileNotFoundError, match="not a run folder; `trimask train` makes one"):
        load_description(folder)
    with pytest.raises(FileNotFoundError, match="not a run folder"):
        load_description(folder / "checkpoints")
