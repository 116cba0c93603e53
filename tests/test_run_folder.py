"""A run folder: one process at a time, torn lines repaired, failed writes explained."""

import errno
import json
import os
import signal
import subprocess
import sys

import pytest

from trimask.diffusion import configuration
from trimask.diffusion.run_folder import NotWritten, keep_lines_until, line_of, locked, read_lines, shortened, writing

HOLD = "import sys, pathlib\nfrom trimask.diffusion.run_folder import locked\nfolder = pathlib.Path(sys.argv[1])\n"


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
    with pytest.raises(ValueError, match=f"{tmp_path} is in use: process {holder.pid} works there"), locked(tmp_path):
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
    path.write_bytes("".join(map(line_of, whole)).encode() + torn)
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
    assert read_lines(path) == [{"step": 1}, {"step": 2}]
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
        patch.setattr(configuration.os, "fsync", killed)
        keep_lines_until(path, 2)
    assert path.read_bytes() == before
    keep_lines_until(path, 2)
    assert read_lines(path) == [{"step": 1}, {"step": 2}]


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
    refused = pytest.raises(NotWritten, match=r"file/run: could not be written: .*has no checkpoint yet")
    with refused, locked(tmp_path / "file" / "run"):
        pass


def test_what_is_said_of_a_folder_is_not_said_again_of_the_one_around_it(tmp_path):
    with pytest.raises(NotWritten, match=r"^the disk is full$"), writing(tmp_path):
        raise NotWritten("the disk is full")


def test_a_long_reason_is_cut_to_its_first_line_and_200_letters():
    assert shortened("x" * 200 + "\ny") == "x" * 200
    assert shortened("x" * 199 + "yz") == "x" * 199 + "…"


def test_a_folder_to_work_in_is_made_with_those_around_it(tmp_path):
    with locked(tmp_path / "runs/mine"):
        assert (tmp_path / "runs/mine/.lock").is_file()


def test_files_say_letters_as_they_are_and_come_all_at_once(tmp_path, monkeypatch):
    assert line_of({"prompt": "größer"}) == '{"prompt": "größer"}\n'
    configuration.write_json(tmp_path / "a.json", {"prompt": "größer"})
    assert (tmp_path / "a.json").read_bytes().decode("utf-8") == '{\n  "prompt": "größer"\n}\n'
    on_disk = []
    monkeypatch.setattr(os, "fsync", lambda _: on_disk.append((tmp_path / "a.json.partial").read_text()))
    configuration.write_text(tmp_path / "a.json", "new")
    assert on_disk == ["new"] and [path.name for path in tmp_path.iterdir()] == ["a.json"]
