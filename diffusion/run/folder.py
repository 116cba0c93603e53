"""Protects run folders: one process at a time, errors that name the last good checkpoint, no half-written lines.

.lock                  held by the process that works in the folder; the kernel releases it when the process ends
checkpoints/<step>/    a folder named by a number alone is complete: Orbax renames it last
.partial-<name>/       files being written; .complete/ holds them just before they move into the folder
"""

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from trimask.diffusion.run.processes import is_first
from trimask.tokenizers.storage.files import reason_of, require_regular_file, write_text
from trimask.tokenizers.storage.json_text import parse_json

WRITTEN_FIRST = ("config.json", "tokenizers", "checkpoints", "metrics.jsonl", "tensorboard")
"""Names that a training creates in its folder before its first checkpoint is complete."""
_LISTS = ("index.jsonl", "samples.jsonl")
"""Files that list the other files of a folder."""
_PATIENCE_S = 60.0
"""Time to wait for another process that moves files into a folder, in seconds."""


class NotWritten(OSError):
    """The run folder could not be written to; earlier content is unchanged."""


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Locks a run folder against other runs; the folder is created if missing. Processes of one run share the lock.

    A folder created here is removed if the block fails before anything is written. Raises ValueError if another process
    holds the lock.
    """
    if not is_first():
        yield
        return
    created = _missing(folder)
    with writing(folder):
        lock = _acquired(folder, 0.0)
    try:
        yield
    except BaseException:
        _undo(folder, created, ".lock")
        raise
    finally:
        lock.release()


@contextmanager
def undone_if_empty(folder: Path, *names: str) -> Iterator[None]:
    """Removes a folder that the block created if the block fails and left only the lock and files of these names.

    A folder with a complete checkpoint is kept.
    """
    if not is_first():
        yield
        return
    created = _missing(folder)
    try:
        yield
    except BaseException:
        _undo(folder, created, ".lock", *names)
        raise


def _missing(folder: Path) -> list[Path]:
    """The folder and its parents that do not exist, innermost first."""
    return [path for path in (folder, *folder.parents) if not path.exists()]


def _undo(folder: Path, created: list[Path], *names: str) -> None:
    """Removes the created folders if the first holds no checkpoint and only files of these names."""
    if not created or not folder.is_dir() or checkpoint_steps(folder):
        return
    if {path.name for path in folder.iterdir()} <= set(names):
        with suppress(OSError):  # if another process has created files since
            for path in folder.iterdir():
                _remove(path)
            for path in created:
                path.rmdir()


@contextmanager
def staged(folder: Path) -> Iterator[Path]:
    """Yields an empty folder; files written to it move to `folder` together when the block succeeds, else none does.

    Other processes wait for their turn. If the process is killed inside the block, `folder` is unchanged; if it is
    killed later, the next process to come here moves the remaining files first.
    """
    lock = _acquired(folder, _PATIENCE_S)
    try:
        complete = folder / ".complete"
        _move_files(complete, folder)
        for abandoned in folder.glob(".partial-*"):
            _remove(abandoned)
        stage = Path(tempfile.mkdtemp(prefix=".partial-", dir=folder))
        try:
            yield stage
            stage.rename(complete)
        finally:
            _remove(stage)
        _move_files(complete, folder)
    finally:
        lock.release()


def _acquired(folder: Path, patience_s: float) -> FileLock:
    """Locks the folder, which is created if missing. Raises ValueError if another process keeps the lock."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / ".lock"
    # One object per path and process, so that a command and the loop it calls may both hold it.
    lock = FileLock(path, is_singleton=True)
    try:
        lock.acquire(timeout=patience_s)
    except Timeout as error:
        holder = path.read_text(encoding="utf-8").strip()
        who = f"process {holder}" if holder.isdecimal() else "another process"
        raise ValueError(f"{folder} is in use by {who}") from error
    try:
        file = os.open(path, os.O_WRONLY | os.O_TRUNC | getattr(os, "O_NOFOLLOW", 0))
        os.write(file, f"{os.getpid()}\n".encode())
        os.close(file)
    except OSError:
        lock.release()
        raise
    return lock


def _move_files(complete: Path, folder: Path) -> None:
    """Moves the files that `staged` completed; lists of files last, so that they never name a missing file."""
    if complete.is_dir() and not complete.is_symlink():
        for path in sorted(complete.iterdir(), key=lambda path: (path.name in _LISTS, path.name)):
            if path.is_file() and not path.is_symlink():
                path.replace(folder / path.name)
    _remove(complete)


def _remove(path: Path) -> None:
    """Removes a folder with its content, or a link in its place."""
    if path.is_symlink() or path.is_file():
        path.unlink()
    elif path.exists():
        shutil.rmtree(path)


@contextmanager
def writing(folder: Path, kinds: type[Exception] = OSError) -> Iterator[None]:
    """Turns a failed write into a one-line NotWritten error: folder, reason, and the last good checkpoint.

    `kinds` are the exceptions that count as a failed write; Orbax's writers raise almost any.
    """
    try:
        yield
    except NotWritten:
        raise
    except kinds as error:
        steps = checkpoint_steps(folder)
        good = f"; the last good checkpoint, of step {steps[-1]}, is untouched" if steps else ""
        raise NotWritten(
            f"{folder}: could not be written: {reason_of(error)}{good}. The same command resumes once that is fixed"
        ) from error


def checkpoint_steps(folder: Path) -> list[int]:
    """Steps of the complete checkpoints of a run folder, ascending. They are not checked for damage."""
    if not (folder / "checkpoints").is_dir():
        return []
    names = (path.name for path in (folder / "checkpoints").iterdir())
    return sorted(int(name) for name in names if name.isdecimal())


def read_intact_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSON-lines file; lines torn by a crash or filled with NUL bytes are left out."""
    if not path.exists():
        return []
    require_regular_file(path)
    objects = []
    for line in path.read_bytes().split(b"\n"):
        try:
            content = parse_json(line, None, allows_infinity=True)  # trials that diverged have infinite losses
        except ValueError:
            continue
        if isinstance(content, dict):
            objects.append(content)
    return objects


def read_step_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a JSON-lines file that have a whole number as `step`; all others are left out, like torn lines."""
    return [line for line in read_intact_lines(path) if type(line.get("step")) is int]


def keep_lines_until(path: Path, step: int) -> None:
    """Removes torn lines and the lines of later steps, atomically."""
    if not path.exists():
        return
    kept = [line for line in read_step_lines(path) if line["step"] <= step]
    text = "".join(json_line(content) for content in kept)
    if path.read_bytes() != text.encode("utf-8"):
        write_text(path, text)


def json_line(content: dict[str, Any]) -> str:
    """One line of a JSON-lines file, with its line ending."""
    return json.dumps(content, ensure_ascii=False) + "\n"
