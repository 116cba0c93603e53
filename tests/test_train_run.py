"""Runs: resumed equals uninterrupted, one compilation, micro-batches and devices that change nothing."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
from pathlib import Path

import fakes
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from trimask.diffusion.data.batches import BatchConfig, Batches
from trimask.diffusion.data.prepared import Prepared
from trimask.diffusion.loss import LossConfig, loss_scale
from trimask.diffusion.masking import MaskingConfig, forward_process
from trimask.diffusion.mesh import MeshConfig, rows_to_devices
from trimask.diffusion.optimizer import OptimizerConfig
from trimask.diffusion.parametrization import Family, ModuleMultipliers
from trimask.diffusion.pretraining import train_run as training
from trimask.diffusion.pretraining.description import TrainConfig
from trimask.diffusion.pretraining.train_run import train
from trimask.diffusion.pretraining.trained_model import load
from trimask.diffusion.pretraining.training_batches import training_batches
from trimask.diffusion.pretraining.training_step import Pretraining
from trimask.diffusion.run.step_loop import Interrupted, LoopConfig
from trimask.diffusion.schedule import ScheduleConfig
from trimask.diffusion.transformer import TransformerConfig
from trimask.tokenizers.storage import configuration

CONFIG = TrainConfig(
    model=TransformerConfig(num_layers=1, width=16, num_heads=2, mlp_width=16),
    optimizer=OptimizerConfig(horizon_tokens=900, warmup_tokens=100, learning_rate=1e-2),
    batch=BatchConfig(tokens=120, weights={"spoken": 0.0}),  # rows of two lengths are enough
    loop=LoopConfig(log_every=2, checkpoint_every=3, keep_last=2),
)


def equal(a, b):
    return jax.tree.all(jax.tree.map(lambda x, y: bool((np.asarray(x) == np.asarray(y)).all()), a, b))


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


# Called as it is, each of its operations is compiled.
NOISED = jax.jit(forward_process, static_argnums=(2, 3))
TARGETS = {"text": 20.0, "image": 30.0, "audio": 40.0}
"""Mean number of targets per step, in tests without a run."""


@pytest.fixture(scope="module")
def run_and_programs(prepared, tmp_path_factory):
    """An uninterrupted run, and the number of programs that its steps were compiled to."""
    folder = tmp_path_factory.mktemp("run")
    Pretraining.update.clear_cache()
    return (folder, train(folder, prepared.folder, CONFIG)), Pretraining.update._cache_size()


@pytest.fixture(scope="module")
def run(run_and_programs):
    return run_and_programs[0]


def test_a_run_interrupted_and_resumed_ends_bit_for_bit_like_an_uninterrupted_one(prepared, run, tmp_path):
    folder, whole = run

    def stop_at_5(_, step):
        if step == 5:
            signal.raise_signal(signal.SIGTERM)

    stopping = changed_loop(sample_every=1)
    with pytest.raises(Interrupted, match=r"stopped at step 5.*same command resumes"):
        train(tmp_path, prepared.folder, stopping, stop_at_5)
    resumed = train(tmp_path, prepared.folder, stopping, lambda *_: None)
    assert resumed.step == whole.step > 6
    assert equal(resumed.parameters, whole.parameters)
    steps = [line["step"] for line in lines(tmp_path)]
    assert steps == sorted(set(steps)) and steps[-1] == whole.step
    for old, new in zip(lines(folder)[-1:], lines(tmp_path)[-1:], strict=True):
        for name in ("loss", "tokens", "largest_learning_rate"):
            assert old[name] == new[name]


def test_a_line_of_metrics_is_the_mean_of_its_steps(prepared, run):
    """All names of metrics, and the values of the first line, of which gradients and learning rate are recomputed."""
    pretraining = run[1].pretraining
    batches, state, mesh = Batches(prepared, CONFIG.batch, seed=0), pretraining.init(), CONFIG.mesh.over(jax.devices())
    first, seen = lines(run[0])[0], []
    tokens = 0
    for step in range(2):
        batch = rows_to_devices(batches(step), mesh)
        key = jax.random.fold_in(jax.random.fold_in(pretraining.key, 1), step)
        noised = NOISED(key, batch, pretraining.vocabulary, CONFIG.masking)
        loss, metrics, gradients = jax.jit(pretraining.gradients)(state.parameters, noised, pretraining.loss_scale)
        tokens += int((~np.asarray(batch.is_padding)).sum())
        squares = sum(float((np.asarray(leaf, np.float64) ** 2).sum()) for leaf in jax.tree.leaves(gradients))
        share = 0.02 + 0.98 * (0.5 + 0.5 * np.cos(np.pi * (tokens - 100) / 800))  # after warmup, 100 tokens of 900
        scales = np.asarray(pretraining.loss_scale)[np.asarray(noised.sequence.modality)]
        per_target = float(loss) / (scales * np.asarray(noised.is_target)).sum()
        values = {"loss": float(loss), "loss_per_target": per_target, "gradient_norm": squares**0.5, "tokens": tokens}
        seen.append((values | {"largest_learning_rate": 1e-2 * share}, metrics))
        if step == 0:
            state, _ = pretraining.step(state, batch)
    for name in ("loss", "loss_per_target", "gradient_norm", "tokens", "largest_learning_rate"):
        assert first[name] == pytest.approx(np.mean([values[name] for values, _ in seen]), rel=1e-4), name
    # Bits of a modality are over all its masked tokens of both steps.
    for name in seen[0][1]:
        total, count = (sum(float(getattr(metrics[name], part)) for _, metrics in seen) for part in ("total", "count"))
        assert count == 0 or first[name] == pytest.approx(total / count, rel=1e-4), name
    trained = [name for name in prepared.manifest.datasets if CONFIG.batch.weights.get(name, 1.0) > 0]
    tasks = [task for name in trained for task in prepared.dataset(name).tasks(pretraining.vocabulary)]
    bits = {f"bits/{task.target}" for task in tasks} | {f"bits/task/{task.name}" for task in tasks}
    bits |= {f"bits/joint/{task.name}" for task in tasks if task.condition is not None}
    others = {"step", "tokens_per_second", "data_wait", "tokens", "largest_learning_rate"}
    others |= {"loss", "loss_per_target", "gradient_norm"}
    assert set().union(*lines(run[0])) == bits | others
    assert all(line["tokens_per_second"] > 0 and 0 <= line["data_wait"] <= 1 for line in lines(run[0]))


def test_training_learns(run):
    losses = [line["loss"] for line in lines(run[0])]
    assert losses[-1] < losses[0]


def test_any_schedule_can_be_trained_under(prepared):
    masking = dataclasses.replace(fakes.MASKINGS["by modality"], complementary=True)
    config = dataclasses.replace(CONFIG, masking=masking)
    pretraining = Pretraining(config, prepared.tokenizers.vocabulary, mean_targets=TARGETS)
    state = pretraining.init()
    before = jax.tree.map(np.array, state.parameters)
    state, metrics = pretraining.step(state, Batches(prepared, CONFIG.batch, seed=0, copies=2)(0))
    assert np.isfinite(float(metrics["loss"])) and float(metrics["gradient_norm"]) > 0
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(state.parameters)) and not equal(state.parameters, before)


def test_a_run_folder_alone_gives_the_model_back(run):
    folder, whole = run
    loaded = load(folder)
    assert equal(loaded.parameters, whole.parameters)
    assert loaded.step == whole.step and loaded.description.train == CONFIG
    assert loaded.tokenizers.fingerprints == whole.tokenizers.fingerprints


def test_a_finished_run_is_not_trained_further(prepared, run):
    folder, whole = run
    before = (folder / "metrics.jsonl").read_text()
    assert equal(train(folder, prepared.folder, CONFIG).parameters, whole.parameters)
    assert (folder / "metrics.jsonl").read_text() == before


def changed_loop(**changes):
    return dataclasses.replace(CONFIG, loop=dataclasses.replace(CONFIG.loop, **changes))


def copied(run, tmp_path):
    """A copy of the run that a test may spoil."""
    return shutil.copytree(run[0], tmp_path / "copy")


def test_how_often_to_log_and_save_may_change_and_is_written_down(prepared, run, tmp_path):
    folder = copied(run, tmp_path)
    config = changed_loop(log_every=1, checkpoint_every=7, keep_last=5, spike_factor=None)
    assert equal(train(folder, prepared.folder, config).parameters, run[1].parameters)
    assert load(folder).description.train == config


def test_prepared_data_may_move_but_not_change(prepared, run, tmp_path):
    folder, moved = copied(run, tmp_path), shutil.copytree(prepared.folder, tmp_path / "moved")
    train(folder, moved, CONFIG)
    assert load(folder).description.data == str(moved)
    content = json.loads((moved / "manifest.json").read_text()) | {"trimask": "9.9"}
    (moved / "manifest.json").write_text(json.dumps(content))
    assert Prepared(moved).fingerprint == prepared.fingerprint  # whichever version wrote it
    content["content"] = "0" * 64
    (moved / "manifest.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"data_fingerprint: [0-9a-f]{16} → [0-9a-f]{16}"):
        train(folder, moved, CONFIG)


def test_not_to_resume_is_refused_where_there_is_something_to_lose(prepared, run):
    with pytest.raises(ValueError, match="holds a run at step 8; --no-resume needs a folder without one"):
        train(run[0], prepared.folder, CONFIG, resume=False)


def test_checkpoints_without_a_configuration_are_not_guessed_at(prepared, run, tmp_path):
    folder = copied(run, tmp_path)
    (folder / "config.json").unlink()
    with pytest.raises(ValueError, match="holds checkpoints without a config"):
        train(folder, prepared.folder, CONFIG)


def test_a_run_opens_at_the_checkpoint_that_is_asked_for(run):
    folder, whole = run
    losses = {line["step"]: line["loss"] for line in lines(folder)}
    assert load(folder, 6).step == 6 and not equal(load(folder, 6).parameters, whole.parameters)
    assert load(folder, "best").step == min((6, 8), key=losses.__getitem__)
    with pytest.raises(ValueError, match="no checkpoint of step 7; there are 6, 8"):
        load(folder, 7)


def test_of_a_damaged_newest_checkpoint_the_one_before_is_opened_and_named(run, tmp_path, capfd):
    folder = copied(run, tmp_path)
    for path in (folder / "checkpoints" / "8" / "state").rglob("d/*"):
        path.write_bytes(path.read_bytes()[:-7])
    assert load(folder).step == 6
    error = capfd.readouterr().err
    assert "checkpoints/8: damaged" in error and error.endswith("; going back to step 6\n") and error.count("\n") == 1
    assert (folder / "checkpoints" / "8").is_dir()


def test_a_training_that_its_first_step_shows_to_be_impossible_leaves_nothing(prepared, tmp_path):
    changed = dataclasses.replace(CONFIG, loop=dataclasses.replace(CONFIG.loop, best_metric="bits"))
    with pytest.raises(ValueError, match=r"--loop\.best-metric must be one of .*loss.*; got bits"):
        train(tmp_path / "new", prepared.folder, changed)
    assert not (tmp_path / "new").exists()


def test_a_changed_configuration_is_refused_with_the_difference(prepared, run):
    changed = dataclasses.replace(CONFIG, optimizer=dataclasses.replace(CONFIG.optimizer, learning_rate=0.5))
    with pytest.raises(ValueError, match=r"optimizer\.learning_rate: 0\.01 → 0\.5"):
        train(run[0], prepared.folder, changed)


def test_another_vocabulary_is_refused_with_the_difference(run, tmp_path):
    folder = copied(run, tmp_path)
    content = json.loads((folder / "config.json").read_text())
    content["vocabulary"]["codebook_sizes"]["image"] = [99]
    (folder / "config.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"codebook_sizes.*99"):
        load(folder)


def test_a_checkpoint_of_another_model_is_refused_by_name_and_in_short(run, tmp_path, capfd):
    folder = copied(run, tmp_path)
    content = json.loads((folder / "config.json").read_text())
    content["train"]["model"]["num_layers"] += 1
    (folder / "config.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"copy/checkpoints/\d+: not a checkpoint of the model") as caught:
        load(folder)
    assert len(str(caught.value)) < 500 + len(str(folder))
    assert capfd.readouterr().err == ""


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="not a run folder"):
        load(tmp_path)


def test_an_unknown_field_in_a_configuration_is_named(run, tmp_path):
    content = json.loads((run[0] / "config.json").read_text())
    content["train"]["optimizer"]["lr"] = 1
    (tmp_path / "config.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="lr"):
        load(tmp_path)


def test_a_configuration_that_is_no_object_is_refused(tmp_path):
    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(ValueError, match=r"must be an object, got \[1\] @ \$"):
        load(tmp_path)


def test_configurations_survive_json():
    content = json.loads(json.dumps(configuration.to_dict(CONFIG)))
    assert configuration.from_dict(content, TrainConfig, "here") == CONFIG


@pytest.fixture(scope="module")
def one_batch(prepared):
    """A batch of pairs with rows divisible by 8."""
    batch = Batches(prepared, BatchConfig(tokens=112, weights={"spoken": 0.0, "sums": 0.0}), seed=0)(0)
    assert len(batch.tokens) == 8
    return jax.tree.map(jnp.asarray, batch)


@pytest.fixture(scope="module")
def plain(prepared, one_batch):
    """A noised batch, the program of its gradients, and what it gives: loss, metrics, gradients."""
    noised = NOISED(jax.random.key(0), one_batch, prepared.tokenizers.vocabulary, MaskingConfig())
    return noised, *gradients(CONFIG, prepared, noised)


def gradients(config, prepared, noised):
    pretraining = Pretraining(config, prepared.tokenizers.vocabulary, mean_targets=TARGETS)
    arguments = pretraining.init().parameters, noised, pretraining.loss_scale
    program = jax.jit(pretraining.gradients)
    return str(program.trace(*arguments).jaxpr), program(*arguments)


def test_micro_batches_give_the_gradients_of_the_whole_batch(prepared, plain):
    noised, _, (loss, metrics, whole) = plain
    _, (same_loss, same_metrics, parts) = gradients(dataclasses.replace(CONFIG, accumulate=4), prepared, noised)
    np.testing.assert_allclose(loss, same_loss, rtol=1e-5)
    np.testing.assert_allclose(float(metrics["bits/image"]), float(same_metrics["bits/image"]), rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), whole, parts)


def test_the_gradient_of_a_batch_is_the_mean_of_its_halves(prepared, plain):
    """Also if the halves have different numbers of targets: batches of their size have the same mean numbers."""
    noised, _, (loss, _, whole) = plain
    means = {name: mean / 2 for name, mean in TARGETS.items()}
    pretraining = Pretraining(CONFIG, prepared.tokenizers.vocabulary, mean_targets=means)
    program, parameters = jax.jit(pretraining.gradients), pretraining.init().parameters
    halves = [jax.tree.map(lambda x, part=part: x[part::2], noised) for part in (0, 1)]
    assert halves[0].is_target.sum() != halves[1].is_target.sum()
    (loss_a, _, a), (loss_b, _, b) = (program(parameters, half, pretraining.loss_scale) for half in halves)
    jax.tree.map(lambda w, a, b: np.testing.assert_allclose(w, (a + b) / 2, rtol=1e-5, atol=1e-6), whole, a, b)
    assert float(loss) == pytest.approx((float(loss_a) + float(loss_b)) / 2, rel=1e-5)


def test_a_token_is_divided_by_the_targets_of_its_modality_or_of_all(prepared):
    vocabulary, means = prepared.tokenizers.vocabulary, {"text": 20.0, "audio": 60.0}
    weights = {"text": 3.0, "image": 5.0}
    divided = {
        "modality": {"text": 3 / 20, "image": 0, "audio": 1 / 60},
        "tokens": {"text": 3 / 80, "image": 0, "audio": 1 / 80},
    }
    for normaliser, expected in divided.items():
        scale = loss_scale(LossConfig(normaliser=normaliser, modality_weights=weights), means, vocabulary)
        assert dict(zip(vocabulary.modalities[1:], scale[1:].tolist(), strict=True)) == pytest.approx(expected)


def test_training_without_mean_numbers_of_targets_is_refused(prepared):
    with pytest.raises(ValueError, match="needs the mean numbers of targets"):
        _ = Pretraining(CONFIG, prepared.tokenizers.vocabulary).loss_scale


@pytest.mark.parametrize(
    ("masking", "loss", "said"),
    [
        (
            {"counts": False, "schedule": ScheduleConfig(kind="polynomial", power=0.9)},
            {},
            "of at least 1 .* of 0.5 without .*, got 0.9",
        ),
        ({"schedule": ScheduleConfig(kind="polynomial", power=0.4)}, {"weighting": "unweighted"}, "got 0.4"),
        ({"schedule": ScheduleConfig(kind="cosine_md4", min_share=1e-7)}, {}, "at least 1e-06, .* got 1e-07"),
        ({"schedule": ScheduleConfig(kind="polynomial", power=33.0)}, {}, "a power of at most 32 with masks by counts"),
        ({"schedules": {"audio": ScheduleConfig(power=4.0)}}, {}, "is for the polynomial schedule, got 4 for linear"),
        (
            {"schedule": ScheduleConfig(kind="cosine_mdlm"), "complementary": True},
            {"weighting": "unweighted"},
            "need the linear schedule, got cosine_mdlm",
        ),
    ],
)
def test_what_would_change_the_objective_is_refused(prepared, masking, loss, said):
    config = dataclasses.replace(CONFIG, masking=MaskingConfig(**masking), loss=LossConfig(**loss))
    with pytest.raises(ValueError, match=said):
        training_batches(prepared, config)
    line = MaskingConfig(complementary=True, schedule=ScheduleConfig(kind="polynomial", power=1.0))
    training_batches(prepared, dataclasses.replace(config, masking=line))


def test_a_run_of_former_rules_has_the_logits_it_had_under_mup(run, tmp_path):
    """Its μP divided the logits by the ratio of widths; today's does not."""
    folder = Path(shutil.copytree(run[0], tmp_path / "former"))
    content = json.loads((folder / "config.json").read_text())
    content["train"]["parametrization"] |= {"kind": "mup", "base_width": CONFIG.model.width // 2}
    for rules, factor in ((1, 2.0), (2, 1.0)):
        (folder / "config.json").write_text(json.dumps(content | {"rules": rules}))
        parameters = load(folder).parameters
        np.testing.assert_allclose(parameters["unembedding"] * factor, run[1].parameters["unembedding"], rtol=1e-6)
        np.testing.assert_array_equal(parameters["embedding"], run[1].parameters["embedding"])


def test_a_step_compiles_once_per_row_length(prepared, run_and_programs):
    run, programs = run_and_programs
    batches = Batches(prepared, CONFIG.batch, seed=0)
    shapes = [batches(step).tokens.shape for step in range(run[1].step)]
    assert programs == len(set(shapes)) > 1
    assert min(map(shapes.count, shapes)) > 1


@pytest.mark.parametrize(
    ("part", "changed", "is_same"),
    [
        ("optimizer", {"learning_rate": 1.0, "beta1": 0.5, "clip_norm": 0.1, "ema_decay": 0.5}, True),
        ("optimizer", {"warmup_tokens": 99}, False),
        ("optimizer", {"schedule": "constant"}, False),
        ("parametrization", {"multipliers": ModuleMultipliers(learning_rate=Family(of={"down": 0.5}))}, True),
        ("parametrization", {"kind": "mup", "base_width": 8}, True),
        ("parametrization", {"kind": "completep", "base_width": 8}, False),
        ("loop", {"log_every": 7}, True),
        ("loss", {"modality_weights": {"text": 3.0}, "normaliser": "tokens"}, True),
        ("loss", {"z_loss": 0.1}, False),
        ("masking", {"complementary": True}, False),
        ("model", {"width": 32}, False),
        ("model", {"compute_dtype": "bfloat16"}, False),
    ],
)
def test_configurations_are_the_same_program_that_differ_in_what_a_step_is_given(prepared, part, changed, is_same):
    config = dataclasses.replace(CONFIG, **{part: dataclasses.replace(getattr(CONFIG, part), **changed)})
    plain, other = (Pretraining(c, prepared.tokenizers.vocabulary) for c in (CONFIG, config))
    assert (plain == other) is is_same and plain != "another type"
    assert hash(plain) == hash(other) or not is_same


def test_what_takes_more_micro_batches_or_devices_is_another_program(prepared):
    vocabulary = prepared.tokenizers.vocabulary
    plain = Pretraining(CONFIG, vocabulary)
    assert plain != Pretraining(dataclasses.replace(CONFIG, accumulate=2), vocabulary)
    assert plain != Pretraining(CONFIG, vocabulary, mesh=MeshConfig().over(jax.devices()))
    assert plain != Pretraining(CONFIG, dataclasses.replace(vocabulary, text_size=vocabulary.text_size + 1))


def test_tokens_are_counted_where_a_float32_would_miss_them(prepared, run):
    """Counts beyond the integers that float32 and int32 can hold stay exact."""
    pretraining, first = run[1].pretraining, Batches(prepared, CONFIG.batch, seed=0)(0)
    first = rows_to_devices(first, CONFIG.mesh.over(jax.devices()))
    seen, batch = 30_000_000_000, int((~first.is_padding).sum())
    tokens = jax.device_put(np.array([seen >> 20, seen % (1 << 20)], np.int32), jax.devices()[0])
    state = dataclasses.replace(pretraining.init(), tokens=tokens)
    for _ in range(2):
        state, metrics = pretraining.step(state, first)
    high, low = map(int, state.tokens)
    assert (high << 20) + low == seen + 2 * batch and np.float32(seen) + np.float32(batch) == np.float32(seen)
    assert float(metrics["tokens"]) == pytest.approx(seen) == float(state.num_tokens)


def test_what_is_computed_again_is_what_was(prepared, plain):
    noised, program, (loss, _, whole) = plain
    model = dataclasses.replace(CONFIG.model, remat="block")
    again, (same_loss, _, same) = gradients(dataclasses.replace(CONFIG, model=model), prepared, noised)
    assert "remat" not in program and "remat" in again
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), (loss, whole), (same_loss, same))


@pytest.mark.skipif(shutil.which("git") is None, reason="there is no git")
def test_a_run_knows_the_commit_of_the_checkout_it_was_made_by(tmp_path, monkeypatch):
    for name in [name for name in os.environ if name.startswith("GIT_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", os.devnull)
    monkeypatch.setenv("GIT_CONFIG_NOSYSTEM", "1")
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    monkeypatch.setattr(training, "__file__", str(tmp_path / "diffusion/pretraining/train_run.py"))
    assert training.git_commit() is None
    (tmp_path / ".git").mkdir()
    assert training.git_commit() is None, "a folder without a commit"
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b.c"]
    for words in (["init", "-q"], ["commit", "-q", "--allow-empty", "-m", "first"]):
        subprocess.run([*git, *words], check=True)
    head = subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout.strip()
    assert head and training.git_commit() == head
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert training.git_commit() is None


def test_nothing_is_announced_or_written_before_all_processes_know_what_the_folder_holds(
    prepared, tmp_path, monkeypatch
):
    waited, announced = [], []

    def announce(*_):
        announced.append(list(waited))
        raise KeyboardInterrupt

    monkeypatch.setattr(training, "wait_for_all", lambda what: waited.append((what, list(tmp_path.glob("*.json")))))
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, prepared.folder, CONFIG, announce=announce)
    assert announced == [[("every process has read the folder", [])]]
