"""A run folder: one process at a time, torn lines repaired, failed writes explained."""

import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from trimask.diffusion.run import folder
from trimask.diffusion.run.folder import (
    WRITTEN_FIRST,
    NotWritten,
    json_line,
    keep_lines_until,
    locked,
    read_intact_lines,
    read_step_lines,
    staged,
    undone_if_empty,
    writing,
)
from trimask.tokenizers.storage import configuration, files

HOLD = "import sys, pathlib\nfrom trimask.diffusion.run.folder import locked\nfolder = pathlib.Path(sys.argv[1])\n"


@pytest.fixture
def holder(tmp_path):
    """Another process that trains in tmp_path."""
    code = HOLD + "with locked(folder): print('held', flush=True); sys.stdin.read()"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], **pipes) as process:
        assert process.stdout.readline() == b"held\n"
        yield process
        process.kill()


def test_a_second_process_is_refused_by_number_until_the_first_is_killed(holder, tmp_path):
    with pytest.raises(ValueError, match=f"{tmp_path} is in use by process {holder.pid}"), locked(tmp_path):
        pass
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    with locked(tmp_path):
        assert (tmp_path / ".lock").read_text() == f"{os.getpid()}\n"


def test_a_command_and_the_loop_it_calls_may_both_hold_the_lock(tmp_path):
    with locked(tmp_path), locked(tmp_path):
        pass


@pytest.mark.parametrize(
    "torn",
    [
        b'{"step": 3, "lo',
        b'{"step": 3, "text": "' + "ä".encode()[:1],
        b"\0" * 40,
        b'{"step": 2, "loss"' + b"\0" * 9 + b"}\n",
        b"\n",
        b"7\n",
    ],
)
def test_whatever_is_torn_goes_and_every_whole_line_stays(torn, tmp_path):
    path = tmp_path / "metrics.jsonl"
    whole = [{"step": 1, "text": "ä\u2028"}, {"step": 2, "loss": 0.5}]
    path.write_bytes("".join(map(json_line, whole)).encode() + torn)
    keep_lines_until(path, 2)
    assert [json.loads(line) for line in path.read_bytes().decode().split("\n")[:-1]] == whole


def test_a_torn_line_in_the_middle_takes_no_other_with_it(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n{"st\0\0\n{"step": 3}\n{"step": 4}\n')
    keep_lines_until(path, 3)
    assert path.read_bytes() == b'{"step": 1}\n{"step": 3}\n'


def test_a_last_line_that_lacks_only_its_end_is_kept(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n{"step": 2}')
    assert read_intact_lines(path) == [{"step": 1}, {"step": 2}]
    keep_lines_until(path, 2)
    assert path.read_bytes() == b'{"step": 1}\n{"step": 2}\n'


def test_a_repair_that_is_killed_on_the_way_loses_nothing(tmp_path, monkeypatch):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n{"step": 2}\n{"st')
    before = path.read_bytes()

    def killed(*_):
        assert path.read_bytes() == before
        raise SystemExit

    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(files.os, "fsync", killed)
        keep_lines_until(path, 2)
    assert path.read_bytes() == before
    keep_lines_until(path, 2)
    assert read_intact_lines(path) == [{"step": 1}, {"step": 2}]


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (OSError(errno.EROFS, os.strerror(errno.EROFS), "x/.lock"), r"Read-only file system \(x/.lock\)"),
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), "No space left on device"),
        (OSError("status: pwrite [OS error 28: ENOSPC No space left on device] at " + 300 * "x"), "No space left on d"),
        (OSError("first line\nsecond"), "first line;"),
    ],
)
def test_a_failed_write_names_folder_reason_and_last_good_checkpoint(error, reason, tmp_path):
    for name in ("3", "12", "damaged-15", "18.orbax-checkpoint-tmp"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    refused = pytest.raises(NotWritten, match=f"{tmp_path}: .*{reason}.*last good checkpoint, of step 12,")
    with refused as caught, writing(tmp_path):
        raise error
    assert "second" not in str(caught.value)


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    refused = pytest.raises(NotWritten, match=r"file/run: could not be written: .*The same command resumes")
    with refused, locked(tmp_path / "file" / "run"):
        pass


def test_what_is_said_of_a_folder_is_not_said_again_of_the_one_around_it(tmp_path):
    with pytest.raises(NotWritten, match=r"^the disk is full$"), writing(tmp_path):
        raise NotWritten("the disk is full")


def test_a_long_reason_is_cut_to_its_first_line_and_200_letters():
    assert files.shortened("x" * 200 + "\ny") == "x" * 200
    assert files.shortened("x" * 199 + "yz") == "x" * 199 + "…"


def test_a_folder_to_work_in_is_made_with_those_around_it(tmp_path):
    with locked(tmp_path / "runs/mine"):
        assert (tmp_path / "runs/mine/.lock").is_file()


def test_files_say_letters_as_they_are_and_come_all_at_once(tmp_path, monkeypatch):
    assert json_line({"prompt": "größer"}) == '{"prompt": "größer"}\n'
    configuration.write_json(tmp_path / "a.json", {"prompt": "größer"})
    assert (tmp_path / "a.json").read_bytes().decode("utf-8") == '{\n  "prompt": "größer"\n}\n'
    on_disk = []
    monkeypatch.setattr(os, "fsync", lambda _: on_disk.append((tmp_path / "a.json.partial").read_text()))
    files.write_text(tmp_path / "a.json", "new")
    assert on_disk == ["new"] and [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_lines_that_say_no_step_are_left_out_as_torn_ones_are(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text(
        '{"step": 1, "loss": 2}\n{"step": "two"}\n{"loss": 3}\n{"step": true}\n{"step": 2.0}\n[3]\n{"step": 9}\n'
    )
    assert read_step_lines(path) == [{"step": 1, "loss": 2}, {"step": 9}]
    keep_lines_until(path, 5)
    assert path.read_text() == '{"step": 1, "loss": 2}\n'


def in_a_process(act):
    """Runs `act` in a child process without its cleanup, and returns the exit status."""
    child = os.fork()
    if child == 0:
        try:
            act()
        finally:
            os._exit(7)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def write_two(folder):
    with staged(folder) as stage:
        (stage / "a.txt").write_text("new")
        (stage / "index.jsonl").write_text("a, b")
        (stage / "b.txt").write_text("new")


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_staged_files_arrive_together_or_not_at_all(tmp_path):
    folder = tmp_path / "new" / "out"
    write_two(folder)
    with pytest.raises(RuntimeError), staged(folder) as stage:
        (stage / "a.txt").write_text("other")
        (stage / "c.txt").write_text("other")
        raise RuntimeError
    assert names(folder) == [".lock", "a.txt", "b.txt", "index.jsonl"] and (folder / "a.txt").read_text() == "new"


@pytest.mark.parametrize("moved", [0, 1, 2, 3])
def test_killed_while_files_move_the_next_call_ends_what_was_begun(tmp_path, monkeypatch, moved):
    move, done = Path.replace, []

    def replace(path, target):
        if len(done) == moved:
            os._exit(9)
        done.append(target)
        return move(path, target)

    def killed():
        monkeypatch.setattr(Path, "replace", replace)
        monkeypatch.setattr(folder, "_remove", lambda path: os._exit(9) if path.name == ".complete" and done else 0)
        write_two(tmp_path)

    (tmp_path / "a.txt").write_text("old")
    assert in_a_process(killed) == 9
    assert ("index.jsonl" in names(tmp_path)) == (moved == 3), "the list comes last"
    with staged(tmp_path) as stage:
        assert names(tmp_path) == [".lock", stage.name, "a.txt", "b.txt", "index.jsonl"]
        assert (tmp_path / "a.txt").read_text() == "new"
    assert names(tmp_path) == [".lock", "a.txt", "b.txt", "index.jsonl"]


def test_killed_before_files_move_nothing_has_changed_and_what_is_left_goes(tmp_path):
    def killed():
        with staged(tmp_path) as stage:
            (stage / "a.txt").write_text("half")
            os._exit(9)

    (tmp_path / "a.txt").write_text("old")
    (tmp_path / "mine.partial").write_text("mine")
    assert in_a_process(killed) == 9 and len(list(tmp_path.glob(".partial-*"))) == 1
    with staged(tmp_path):
        assert (tmp_path / "a.txt").read_text() == "old"
    assert names(tmp_path) == [".lock", "a.txt", "mine.partial"]


def test_links_among_what_was_left_are_removed_and_not_followed(tmp_path):
    outside, folder = tmp_path / "outside", tmp_path / "out"
    outside.mkdir()
    folder.mkdir()
    (outside / "mine.txt").write_text("mine")
    for name in (".partial-1", ".complete"):
        (folder / name).symlink_to(outside)
    with staged(folder):
        pass
    (folder / ".complete").mkdir()
    (folder / ".complete" / "mine.txt").symlink_to(outside / "mine.txt")
    with staged(folder):
        pass
    assert names(folder) == [".lock"] and names(outside) == ["mine.txt"]
    (folder / ".lock").unlink()
    (folder / ".lock").symlink_to(outside / "mine.txt")
    with pytest.raises(OSError, match="symbolic links"), staged(folder):
        pass
    assert (outside / "mine.txt").read_text() == "mine"


def test_of_two_processes_the_second_waits_and_sees_what_the_first_wrote(tmp_path, monkeypatch):
    def slow():
        with staged(tmp_path) as stage:
            (tmp_path / "begun").touch()
            time.sleep(0.3)
            (stage / "a.txt").write_text("first")

    child = os.fork()
    if child == 0:
        try:
            slow()
        finally:
            os._exit(0)
    while not (tmp_path / "begun").exists():
        time.sleep(0.01)
    monkeypatch.setattr(folder, "_PATIENCE_S", 0.0)
    with pytest.raises(ValueError, match=f"is in use by process {child}"), staged(tmp_path):
        pass
    monkeypatch.setattr(folder, "_PATIENCE_S", 60.0)
    with staged(tmp_path):
        assert (tmp_path / "a.txt").read_text() == "first"
    os.waitpid(child, 0)


def test_a_folder_made_for_work_that_fails_before_it_writes_goes_again(tmp_path):
    inner = tmp_path / "new" / "run"
    with pytest.raises(ValueError, match="refused"), locked(inner):
        raise ValueError("refused")
    assert not inner.parent.exists()
    with pytest.raises(ValueError, match="refused"), undone_if_empty(inner, "config.json"):
        inner.mkdir(parents=True)
        (inner / "config.json").write_text("{}")
        raise ValueError("refused")
    assert not inner.parent.exists()


def test_a_folder_that_was_there_or_holds_work_stays_when_the_work_fails(tmp_path):
    there, begun = tmp_path / "there", tmp_path / "begun"
    there.mkdir()
    for path in (there, begun):
        with pytest.raises(ValueError, match="refused"), undone_if_empty(path, "config.json"), locked(path):
            (path / "config.json").write_text("{}")
            if path is begun:
                (path / "trials.jsonl").write_text("")
            raise ValueError("refused")
    assert (there / "config.json").exists() and (begun / "trials.jsonl").exists() and (begun / "config.json").exists()


@pytest.mark.parametrize("checkpoint", ["7.partial", "7"])
def test_a_training_that_is_refused_leaves_a_folder_only_with_a_finished_checkpoint(tmp_path, checkpoint):
    folder = tmp_path / "new" / "run"
    with pytest.raises(ValueError, match="refused"), undone_if_empty(folder, *WRITTEN_FIRST), locked(folder):
        (folder / "checkpoints" / checkpoint).mkdir(parents=True)
        (folder / "config.json").write_text("{}")
        raise ValueError("refused")
    assert folder.parent.exists() == (folder / "config.json").exists() == (checkpoint == "7")


WAYS = [
    folder.read_intact_lines,
    folder.read_step_lines,
    lambda path: folder.keep_lines_until(path, 1),
    lambda path: files.append_text(path, "x"),
]


@pytest.mark.parametrize("use", WAYS)
def test_a_pipe_in_the_place_of_a_list_is_refused_and_not_waited_for(tmp_path, use):
    os.mkfifo(tmp_path / "metrics.jsonl")
    with pytest.raises(OSError, match=r"metrics\.jsonl: not a regular file"):
        use(tmp_path / "metrics.jsonl")
