"""Runs that are made longer: the same bits as one that was that long from the beginning, and nothing is lost."""

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

from trimask.diffusion.data.batches import BatchConfig, Batches
from trimask.diffusion.masking import MaskingConfig
from trimask.diffusion.optimizer import OptimizerConfig
from trimask.diffusion.pretraining.description import TrainConfig, load_description
from trimask.diffusion.pretraining.longer import last_step_before_decay, set_aside
from trimask.diffusion.pretraining.train_run import train
from trimask.diffusion.pretraining.trained_model import load
from trimask.diffusion.run.folder import checkpoint_steps
from trimask.diffusion.run.step_loop import LoopConfig
from trimask.diffusion.sde import SDEScaling
from trimask.diffusion.transformer import TransformerConfig

CONFIG = TrainConfig(
    model=TransformerConfig(num_layers=1, width=16, num_heads=2, mlp_width=16),
    batch=BatchConfig(tokens=60, weights={"spoken": 0.0, "sums": 0.0}),
    loop=LoopConfig(log_every=1, checkpoint_every=3, keep_last=2),
)


def config(schedule: str, horizon: int, **changes) -> TrainConfig:
    optimizer = OptimizerConfig(
        horizon_tokens=horizon,
        warmup_tokens=100,
        learning_rate=1e-2,
        schedule=schedule,
        decay_tokens=200 if schedule == "warmup_stable_decay" else None,
    )
    return dataclasses.replace(CONFIG, optimizer=optimizer, **changes)


def equal(a, b):
    return jax.tree.all(jax.tree.map(lambda x, y: bool((np.asarray(x) == np.asarray(y)).all()), a, b))


def learning(folder: Path) -> list[tuple[float, ...]]:
    """The metrics of each line that concern learning rather than time."""
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [tuple(line[name] for name in ("step", "loss", "tokens", "largest_learning_rate")) for line in lines]


@pytest.fixture(scope="module")
def whole(prepared, tmp_path_factory):
    """Schedule → a run of 900 tokens trained without interruption, and its result."""
    folders = {schedule: tmp_path_factory.mktemp(schedule) for schedule in ("constant", "warmup_stable_decay")}
    return {s: (folder, train(folder, prepared.folder, config(s, 900))) for s, folder in folders.items()}


@pytest.fixture(scope="module")
def shorter(prepared, tmp_path_factory):
    """A run of 600 tokens whose learning rate decays at the end."""
    folder = tmp_path_factory.mktemp("shorter")
    return folder, train(folder, prepared.folder, config("warmup_stable_decay", 600))


@pytest.fixture
def copy(shorter, tmp_path):
    return shutil.copytree(shorter[0], tmp_path / "run")


def test_with_a_constant_rate_a_longer_run_goes_on_from_the_last_step(prepared, whole, tmp_path):
    folder, expected = whole["constant"]
    train(tmp_path, prepared.folder, config("constant", 600))
    longer = train(tmp_path, prepared.folder, config("constant", 900))
    assert longer.step == expected.step and equal(longer.parameters, expected.parameters)
    assert learning(tmp_path) == learning(folder)
    assert not list(tmp_path.glob("decayed-*"))


def test_with_a_decay_it_goes_on_from_before_it_and_the_shorter_run_stays(prepared, whole, shorter, copy):
    (folder, expected), (_, short) = whole["warmup_stable_decay"], shorter
    before, lines = checkpoint_steps(copy), learning(copy)
    longer = train(copy, prepared.folder, config("warmup_stable_decay", 900))
    assert longer.step == expected.step and equal(longer.parameters, expected.parameters)
    assert learning(copy) == learning(folder)
    aside = copy / f"decayed-{short.step}"
    assert equal(load(aside).parameters, short.parameters) and learning(aside) == lines
    assert load_description(aside) == short.description
    batches = Batches(prepared, CONFIG.batch, CONFIG.seed)
    stable = last_step_before_decay(config("warmup_stable_decay", 600).optimizer, batches)
    assert stable in before and checkpoint_steps(aside) == [step for step in before if step > stable]


def test_the_last_step_before_the_decay_stays_and_is_the_last_of_the_full_rate(shorter):
    folder, short = shorter
    full = [step for step, _, _, rate in learning(folder) if rate == pytest.approx(1e-2, rel=1e-6)]
    assert full[-1] % CONFIG.loop.checkpoint_every
    usual = {step for step in range(1, short.step + 1) if step % CONFIG.loop.checkpoint_every == 0} | {short.step}
    assert checkpoint_steps(folder) == [full[-1], *sorted(usual)[-2:]]


def test_the_description_says_what_stays_that_of_the_first_horizon(prepared, tmp_path):
    sde = SDEScaling(base_batch_tokens=80.0, base_horizon_tokens=200)
    first, second, third = (config("constant", horizon, sde=sde) for horizon in (300, 500, 600))
    before = train(tmp_path, prepared.folder, first).description
    train(tmp_path, prepared.folder, second)
    after = train(tmp_path, prepared.folder, third).description
    assert load_description(tmp_path) == after
    assert before.first_horizon_tokens is None and before.kappa != 1
    assert after.first_horizon_tokens == after.tuned_horizon == before.tuned_horizon == 300
    same = ("kappa", "batch_tokens", "mean_targets", "vocabulary", "layouts", "data_fingerprint", "rules")
    assert all(getattr(before, name) == getattr(after, name) for name in same)
    # Warmup, a quarter of the first horizon instead of 100 tokens, does not become longer either.
    assert before.optimizer.length_of_warmup == 75
    assert after.optimizer == dataclasses.replace(before.optimizer, horizon_tokens=600, warmup_tokens=75)
    assert after.num_steps > before.num_steps and after.epochs["drawn"] > before.epochs["drawn"]
    assert {rate for step, _, _, rate in learning(tmp_path) if step > 2} == {learning(tmp_path)[3][3]}


def test_killed_while_the_decay_moves_it_goes_on(prepared, whole, shorter, copy, monkeypatch):
    moved, original = [], Path.rename

    def rename(path, target):
        if path.parent.name == "checkpoints" and "decayed" in str(target):
            if moved:
                raise KeyboardInterrupt
            moved.append(path.name)
        return original(path, target)

    longer = config("warmup_stable_decay", 900)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", rename)
        with pytest.raises(KeyboardInterrupt):
            train(copy, prepared.folder, longer)
    assert len(moved) == 1 and load_description(copy) == shorter[1].description
    assert equal(train(copy, prepared.folder, longer).parameters, whole["warmup_stable_decay"][1].parameters)
    assert [path.name for path in copy.glob("decayed-*")] == [f"decayed-{shorter[1].step}"]
    assert equal(load(copy / f"decayed-{shorter[1].step}").parameters, shorter[1].parameters)


def test_with_the_last_step_before_the_decay_damaged_nothing_moves(prepared, copy, capsys):
    stable, *decayed = checkpoint_steps(copy)
    for path in (copy / "checkpoints" / str(stable) / "state").rglob("*"):
        if path.is_file() and path.parent.name == "d":
            path.write_bytes(bytes(len(path.read_bytes())))
    with pytest.raises(ValueError, match="no undamaged checkpoint from before its decay"):
        train(copy, prepared.folder, config("warmup_stable_decay", 900))
    assert f"checkpoints/{stable}: damaged" in capsys.readouterr().err
    assert checkpoint_steps(copy) == [stable, *decayed] and not list(copy.glob("decayed-*"))


def test_what_was_made_of_the_decayed_run_goes_with_it(copy):
    first = checkpoint_steps(copy)[-1]
    made = ("generated/index.jsonl", "evaluation.json", "likelihood.jsonl")
    for name in (*made, "samples/step-000003-words.wav", f"samples/step-{first:06}-words.wav"):
        (copy / name).parent.mkdir(exist_ok=True)
        (copy / name).write_text("x")
    (copy / "samples/samples.jsonl").write_text(f'{{"step": 3}}\n{{"step": {first}}}\n')
    target = set_aside(copy, [first])
    assert all((target / name).exists() and not (copy / name).exists() for name in made)
    assert sorted(path.name for path in (copy / "samples").iterdir()) == ["samples.jsonl", "step-000003-words.wav"]
    assert (copy / "samples/samples.jsonl").read_text() == '{"step": 3}\n'
    assert len(list((target / "samples").iterdir())) == 3
    assert len((target / "samples/samples.jsonl").read_text().splitlines()) == 2


def test_links_in_a_run_are_set_aside_as_links(copy, tmp_path):
    (tmp_path / "outside").write_text("secret")
    for name in ("metrics.jsonl", "samples/step.png"):
        (copy / name).parent.mkdir(exist_ok=True)
        (copy / name).unlink(missing_ok=True)
        (copy / name).symlink_to(tmp_path / "outside")
    target = set_aside(copy, checkpoint_steps(copy)[-1:])
    assert (target / "metrics.jsonl").is_symlink() and (target / "samples/step.png").is_symlink()


def test_a_run_without_a_checkpoint_from_before_its_decay_is_left_as_it_is(prepared, copy):
    stable, *decayed = checkpoint_steps(copy)
    shutil.rmtree(copy / "checkpoints" / str(stable))
    before = {path: path.read_bytes() for path in copy.rglob("*") if path.is_file() and path.name != ".lock"}
    said = (
        f"no undamaged checkpoint from before its decay, which begins after step {stable}; it has those of {decayed[0]}"
    )
    with pytest.raises(ValueError, match=f"{said}.* --init-from"):
        train(copy, prepared.folder, config("warmup_stable_decay", 900))
    assert before == {path: path.read_bytes() for path in copy.rglob("*") if path.is_file() and path.name != ".lock"}


@pytest.mark.parametrize("copies", [1, 2])
def test_steps_within_so_many_tokens_are_counted_exactly(prepared, copies):
    batches = Batches(prepared, BatchConfig(tokens=240), seed=3, copies=copies)
    sums = np.cumsum([batches.num_tokens(step) for step in range(60)])
    for tokens in (0, sums[0] - 1, sums[0], sums[7] - 1, sums[7], sums[7] + 1, sums[40]):
        assert batches.steps_within(int(tokens)) == np.count_nonzero(sums <= tokens)


def test_the_tokens_of_a_step_are_those_that_the_horizon_counts(prepared, tmp_path):
    """With complementary masks each row is seen twice."""
    train(tmp_path, prepared.folder, config("constant", 300, masking=MaskingConfig(complementary=True)))
    batches = Batches(prepared, CONFIG.batch, CONFIG.seed, copies=2)
    counted = np.cumsum([batches.num_tokens(step) for step in range(10)])
    assert [tokens for _, _, tokens, _ in learning(tmp_path)] == counted[: len(learning(tmp_path))].tolist()
