"""Checkpoints: damage is noticed and kept, other models' checkpoints are refused, old ones are kept or deleted."""

import logging
import os
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from trimask.diffusion.run import checkpoint
from trimask.diffusion.run.checkpoint import Checkpoints, DamagedCheckpoint, Retention
from trimask.diffusion.run.folder import checkpoint_steps

KEEP_ALL = Retention(last=100)


def tree(step: int) -> dict:
    """Arrays of several kinds that differ from step to step."""
    weights = np.random.default_rng(step).normal(size=(50, 70)).astype(np.float32)
    half = jnp.asarray(weights[0], jnp.bfloat16)
    return {"a": {"weights": jnp.asarray(weights), "half": half}, "step": jnp.asarray(step, jnp.int32)}


def same(a, b) -> bool:
    return jax.tree.all(jax.tree.map(lambda x, y: np.asarray(x).tobytes() == np.asarray(y).tobytes(), a, b))


def save(run: Path, losses: dict[int, float], keep=KEEP_ALL) -> None:
    with Checkpoints(run, keep) as checkpoints:
        for step, loss in losses.items():
            checkpoints.save(step, tree(step), notes={"of": step}, metrics={"loss": loss})


def flip(path: Path, place: float) -> None:
    content = bytearray(path.read_bytes())
    content[int(place * (len(content) - 1))] ^= 1 << 4
    path.write_bytes(content)


def data_files(checkpoint: Path) -> list[Path]:
    return sorted(path for path in (checkpoint / "state").rglob("d/*") if path.is_file())


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """A run with checkpoints of steps 3 and 6."""
    run = tmp_path_factory.mktemp("run")
    save(run, {3: 2.0, 6: 1.0})
    return run


@pytest.fixture
def copy(saved, tmp_path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "run"))


@pytest.mark.parametrize("at_a_time", [1, 30, 1 << 20])
def test_a_checksum_is_the_sum_of_bits_times_weights_of_places(at_a_time, monkeypatch):
    monkeypatch.setattr(checkpoint, "_ELEMENTS_AT_A_TIME", at_a_time)
    values = np.random.default_rng(0).normal(size=(7, 5, 3)).astype(np.float32)
    numbers = enumerate(values.reshape(-1).view(np.uint32).tolist())
    total = sum(bits * (place * 0x9E3779B97F4A7C15 | 1) for place, bits in numbers) % 2**64
    assert checkpoint._checksum_here(values) == checkpoint._checksum_here(jnp.asarray(values)) == total
    values[2, 1, 0], values[3, 0, 2] = values[3, 0, 2], values[2, 1, 0]
    assert checkpoint._checksum_here(values) != total
    assert checkpoint._checksum_here(np.float32(0.0)) == checkpoint._checksum_here(np.zeros((0, 3))) == 0


def test_what_was_saved_comes_back_bit_for_bit_with_its_notes(saved):
    with Checkpoints(saved) as checkpoints:
        restored = checkpoints.restore_newest(jax.eval_shape(lambda: tree(0)), set_aside=False)
    assert restored.step == 6 and restored.notes == {"of": 6} and same(restored.tree, tree(6))


def test_a_digest_is_that_of_the_arrays(saved, tmp_path):
    save(tmp_path, {3: 9.0})
    with Checkpoints(saved) as ours, Checkpoints(tmp_path) as same:
        digests = [ours.digest(3), same.digest(3), ours.digest(6)]
    assert digests[0] == digests[1] != digests[2]


def test_a_flipped_bit_anywhere_is_noticed_or_does_no_harm(saved, copy):
    noticed = 0
    files = [path.relative_to(saved) for path in (saved / "checkpoints" / "6").rglob("*") if path.is_file()]
    for file in files:
        for place in (0.1, 0.5, 0.9):
            if (saved / file).stat().st_size == 0:
                continue
            flip(copy / file, place)
            with Checkpoints(copy) as checkpoints:
                try:
                    restored = checkpoints.restore(6, tree(0))
                    assert same(restored.tree, tree(6)) and restored.notes == {"of": 6}, f"{file} at {place}"
                except DamagedCheckpoint:
                    noticed += 1
            shutil.copy(saved / file, copy / file)
    assert noticed >= 6 and len(files) >= 8


def test_an_edited_note_is_noticed_too(copy):
    path = copy / "checkpoints" / "6" / "about" / "metadata"
    path.write_bytes(path.read_bytes().replace(b'"of": 6', b'"of": 7'))
    with Checkpoints(copy) as checkpoints, pytest.raises(DamagedCheckpoint, match="6: damaged: about/ is not what was"):
        checkpoints.restore(6, tree(0))


def test_of_a_damaged_newest_the_one_before_is_used_and_the_damaged_one_kept(copy, capfd):
    before = {path.name: path.read_bytes() for path in data_files(copy / "checkpoints" / "6")}
    name = next(iter(before))
    flip(data_files(copy / "checkpoints" / "6")[0], 0.5)
    with Checkpoints(copy, KEEP_ALL) as checkpoints:
        restored = checkpoints.restore_newest(tree(0), set_aside=True)
        assert restored.step == 3 and same(restored.tree, tree(3))
        checkpoints.save(6, tree(6), notes={"of": 6}, metrics={"loss": 1.0})
    error = capfd.readouterr().err
    assert error.count("\n") == 1 and "checkpoints/6: damaged" in error
    assert error.endswith(", kept as damaged-6; going back to step 3\n")
    assert {path.name for path in data_files(copy / "checkpoints" / "damaged-6")} == before.keys()
    assert (copy / "checkpoints" / "damaged-6").is_dir() and name in before
    assert checkpoint_steps(copy) == [3, 6]


def test_a_step_damaged_twice_is_kept_twice(copy):
    for _ in range(2):
        flip(data_files(copy / "checkpoints" / "6")[0], 0.5)
        with Checkpoints(copy, KEEP_ALL) as checkpoints:
            assert checkpoints.restore_newest(tree(0), set_aside=True).step == 3
            checkpoints.save(6, tree(6), notes={}, metrics={"loss": 1.0})
    assert {path.name for path in (copy / "checkpoints").glob("damaged-*")} == {"damaged-6", "damaged-6-2"}


def test_reading_alone_renames_nothing_and_says_what_it_reads(copy, capfd):
    shutil.rmtree(copy / "checkpoints" / "6" / "state")
    with Checkpoints(copy) as checkpoints:
        assert checkpoints.restore_newest(tree(0), set_aside=False).step == 3
    assert capfd.readouterr().err.endswith("; going back to step 3\n")
    assert checkpoint_steps(copy) == [3, 6]


def test_where_no_checkpoint_is_good_training_does_not_begin_anew(copy):
    for step in (3, 6):
        flip(data_files(copy / "checkpoints" / str(step))[0], 0.5)
    for _ in range(2):  # the second time they have been set aside already
        with Checkpoints(copy, KEEP_ALL) as checkpoints, pytest.raises(ValueError, match="damaged-3, damaged-6"):
            checkpoints.restore_newest(tree(0), set_aside=True)


def test_a_checkpoint_of_another_model_is_refused_and_stays(copy, capfd):
    other = {"a": {"weights": jnp.zeros((50, 71)), "half": jnp.zeros(70)}, "step": jnp.zeros((), jnp.int32)}
    with Checkpoints(copy, KEEP_ALL) as checkpoints:
        with pytest.raises(ValueError, match=r"not a checkpoint of the model.*float32\[50, 70\] → float32\[50, 71\]"):
            checkpoints.restore_newest(other, set_aside=True)
        with pytest.raises(ValueError, match=r"not a checkpoint of the model.*extra: absent → int32\[\]"):
            checkpoints.restore_newest({**tree(0), "extra": jnp.zeros((), jnp.int32)}, set_aside=True)
    assert checkpoint_steps(copy) == [3, 6]
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(
    "fault",
    [
        RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 80 bytes"),
        MemoryError("out of memory"),
        PermissionError("not yours"),
    ],
    ids=repr,
)
def test_what_the_machine_refuses_is_not_taken_for_damage(copy, monkeypatch, fault):
    with Checkpoints(copy, KEEP_ALL) as checkpoints:
        monkeypatch.setattr(checkpoints._manager, "restore", lambda *_, **__: (_ for _ in ()).throw(fault))
        with pytest.raises(type(fault), match=str(fault)):
            checkpoints.restore_newest(tree(0), set_aside=True)
    assert checkpoint_steps(copy) == [3, 6]


def test_a_checkpoint_that_does_not_say_what_it_holds_is_of_another_version(copy, monkeypatch):
    with Checkpoints(copy, KEEP_ALL) as checkpoints:
        monkeypatch.setattr(checkpoints, "_about", {6: {"notes": {}}}.__getitem__)
        with pytest.raises(ValueError, match="checkpoints/6: was written by another version of trimask"):
            checkpoints.restore(6, tree(0))


@pytest.mark.parametrize(
    ("file", "said", "is_shown"),
    [
        ("/site/orbax/reader.py", "boom", False),
        ("/mine/reader.py", "Event loop is closed", False),
        ("/mine/reader.py", "boom", True),
        (None, "boom", True),
    ],
)
def test_late_answers_of_readers_are_not_shown_and_all_else_is(monkeypatch, file, said, is_shown):
    shown = []
    monkeypatch.setattr(sys, "unraisablehook", shown.append)
    checkpoint._quiet_orbax()
    coroutine = SimpleNamespace(**({} if file is None else {"cr_code": SimpleNamespace(co_filename=file)}))
    failure = SimpleNamespace(object=coroutine, exc_value=RuntimeError(said))
    sys.unraisablehook(failure)
    assert shown == [failure] * is_shown


def test_what_a_killed_process_left_half_written_is_cleared_away(copy):
    left = copy / "checkpoints" / "9.orbax-checkpoint-tmp"
    shutil.copytree(copy / "checkpoints" / "6", left)
    with Checkpoints(copy, KEEP_ALL) as checkpoints:
        assert checkpoints.restore_newest(tree(0), set_aside=True).step == 6
        checkpoints.save(9, tree(9), notes={}, metrics={"loss": 1.0})
    assert not left.exists() and checkpoint_steps(copy) == [3, 6, 9]


@pytest.mark.parametrize(
    ("policy", "kept"),
    [
        (Retention(last=2), [5, 6]),
        (Retention(last=1, every=3), [3, 6]),
        (Retention(last=1, best=2), [2, 4, 6]),
        (Retention(last=2, every=3, best=1), [2, 3, 5, 6]),
    ],
)
def test_the_last_every_kth_and_the_best_stay(policy, kept, tmp_path):
    save(tmp_path, dict(zip(range(1, 7), (9.0, 1.0, 5.0, 2.0, 6.0, 7.0), strict=True)), policy)
    assert checkpoint_steps(tmp_path) == kept


def test_the_best_is_still_known_to_the_next_process(tmp_path):
    policy = Retention(last=1, best=1)
    save(tmp_path, {1: 9.0, 2: 1.0, 3: 5.0}, policy)
    save(tmp_path, {4: 4.0, 5: 3.0}, policy)
    assert checkpoint_steps(tmp_path) == [2, 5]
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.best("loss") == 2
        assert checkpoints.restore(5, tree(0)).step == 5
        with pytest.raises(ValueError, match="no checkpoint has the metric 'bits'; there are loss"):
            checkpoints.best("bits")
        with pytest.raises(ValueError, match="no checkpoint of step 4; there are 2, 5"):
            checkpoints.restore(4, tree(0))


def test_orbax_logs_nothing_at_any_time_and_others_do(saved, caplog):
    with Checkpoints(saved):
        pass
    logger = logging.getLogger("absl")
    for path in ("/x/orbax/checkpoint/future.py", "/x/grain/loader.py"):
        logger.handle(logger.makeRecord("absl", logging.ERROR, path, 1, f"said in {path}", (), None))
    lost = logging.getLogger("asyncio")
    for path in ("/x/orbax/future.py", "/x/mine.py"):
        lost.error("Task exception was never retrieved, of %s", path)
    for of in ('Error opening "zarr" driver: Error reading', "mine"):
        lost.error("Future exception was never retrieved\nfuture: %s", of)
    said = ["said in /x/grain/loader.py", "Task exception was never retrieved, of /x/mine.py"]
    said.append("Future exception was never retrieved\nfuture: mine")
    assert [record.message for record in caplog.records] == said


def _as_pipe(path):
    path.unlink()
    os.mkfifo(path)


def _as_link(path):
    path.rename(path.with_name("moved"))
    path.symlink_to("moved")


def _as_deep_json(path):
    path.write_text(100_000 * "[")


@pytest.mark.parametrize(
    ("file", "change", "reason"),
    [
        ("state/manifest.ocdbt", _as_pipe, "state/manifest.ocdbt is neither a file nor a folder"),
        ("state/manifest.ocdbt", _as_link, "state/manifest.ocdbt is neither a file nor a folder"),
        ("_CHECKPOINT_METADATA", _as_pipe, "_CHECKPOINT_METADATA is neither a file nor a folder"),
        ("state/_METADATA", _as_deep_json, "state/_METADATA, line 1"),
        ("about/metadata", _as_deep_json, "about/metadata, line 1"),
    ],
)
def test_what_orbax_would_wait_for_or_follow_is_damage(copy, capfd, file, change, reason):
    change(copy / "checkpoints" / "6" / file)
    with Checkpoints(copy) as checkpoints:
        assert checkpoints.restore_newest(tree(0), set_aside=False).step == 3
    assert f"checkpoints/6: damaged: {reason}" in capfd.readouterr().err


def test_a_thread_whose_write_failed_does_not_wait_for_the_others(monkeypatch):
    waited = []
    barrier = SimpleNamespace(get_barrier_sync_fn=lambda: lambda key, timeout_ms: waited.append((key, timeout_ms)))
    monkeypatch.setattr(checkpoint.ocp, "multihost", barrier)
    checkpoint._barrier(key="a", timeout_ms=7)
    assert waited == [("a", 7)]
    with pytest.raises(OSError, match="disk is full"):
        try:
            raise OSError("disk is full")
        finally:
            checkpoint._barrier(key="b", timeout_ms=7)
    assert waited == [("a", 7)]
