"""What protects a folder: one process at a time, errors that say what is still good, lines that are whole or gone.

.lock                  held by the process that works in the folder; the kernel frees it however that process ends
checkpoints/<step>/    a folder named by a number alone is complete: Orbax gives it that name last
.partial-<name>/       files in the making; .complete/ holds them for the moment in which they move to the folder
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
"""What a training has in its folder before its first checkpoint is finished."""
_LISTS = ("index.jsonl", "samples.jsonl")
"""Files that say what a folder holds."""
_PATIENCE_S = 60.0
"""How long to wait for another process that moves files into a folder."""


class NotWritten(OSError):
    """The run folder could not be written to; what was there before is as it was."""


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keeps every other process out of a run folder, which is made if need be; those of this run share its lock.

    A folder that was made for a block that fails before anything is written goes again.
    """
    if not is_first():
        yield
        return
    made = _missing(folder)
    with writing(folder):
        lock = _acquired(folder, 0.0)
    try:
        yield
    except BaseException:
        _undo(folder, made, ".lock")
        raise
    finally:
        lock.release()


@contextmanager
def undone_if_empty(folder: Path, *names: str) -> Iterator[None]:
    """Removes a folder that the block makes if it fails and leaves nothing there but the lock and what is so named.

    A folder with a finished checkpoint stays.
    """
    if not is_first():
        yield
        return
    made = _missing(folder)
    try:
        yield
    except BaseException:
        _undo(folder, made, ".lock", *names)
        raise


def _missing(folder: Path) -> list[Path]:
    """The folder and its parents that do not exist, the innermost first."""
    return [path for path in (folder, *folder.parents) if not path.exists()]


def _undo(folder: Path, made: list[Path], *names: str) -> None:
    """Removes folders that were made, if the first holds nothing but what has these names, and no checkpoint."""
    if not made or not folder.is_dir() or checkpoint_steps(folder):
        return
    if {path.name for path in folder.iterdir()} <= set(names):
        with suppress(OSError):  # where another process has come since
            for path in folder.iterdir():
                _remove(path)
            for path in made:
                path.rmdir()


@contextmanager
def staged(folder: Path) -> Iterator[Path]:
    """An empty folder to write files into, which move to `folder` together when the block ends; none if it fails.

    One process at a time does this, and others wait for it. Killed within the block, it has changed nothing; killed
    later, its files move before anything else when the next process is here.
    """
    lock = _acquired(folder, _PATIENCE_S)
    try:
        complete = folder / ".complete"
        _move_files(complete, folder)
        for left in folder.glob(".partial-*"):
            _remove(left)
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
    """The folder's lock, held; the folder is made if need be. Raises ValueError if another process keeps it."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / ".lock"
    # One object per path and process, so that a command and the loop it calls may both hold it.
    lock = FileLock(path, is_singleton=True)
    try:
        lock.acquire(timeout=patience_s)
    except Timeout as error:
        holder = path.read_text(encoding="utf-8").strip()
        who = f"process {holder}" if holder.isdecimal() else "another process"
        raise ValueError(f"{folder} is in use: {who} works there") from error
    try:
        file = os.open(path, os.O_WRONLY | os.O_TRUNC | getattr(os, "O_NOFOLLOW", 0))
        os.write(file, f"{os.getpid()}\n".encode())
        os.close(file)
    except OSError:
        lock.release()
        raise
    return lock


def _move_files(complete: Path, folder: Path) -> None:
    """Moves what `staged` completed, the list of files last, so that it never names one that is not there."""
    if complete.is_dir() and not complete.is_symlink():
        for path in sorted(complete.iterdir(), key=lambda path: (path.name in _LISTS, path.name)):
            if path.is_file() and not path.is_symlink():
                path.replace(folder / path.name)
    _remove(complete)


def _remove(path: Path) -> None:
    """Removes a folder and what it holds, or a link that stands in its place."""
    if path.is_symlink() or path.is_file():
        path.unlink()
    elif path.exists():
        shutil.rmtree(path)


@contextmanager
def writing(folder: Path, kinds: type[Exception] = OSError) -> Iterator[None]:
    """Turns a failed write into one line: which folder, why, and which checkpoint is still good.

    `kinds` is what counts as a failed write; Orbax's writers raise almost anything.
    """
    try:
        yield
    except NotWritten:
        raise
    except kinds as error:
        steps = checkpoint_steps(folder)
        good = f"; the last good checkpoint, of step {steps[-1]}, is untouched" if steps else ""
        raise NotWritten(
            f"{folder}: could not be written: {reason_of(error)}{good}. The same command resumes once that is mended"
        ) from error


def checkpoint_steps(folder: Path) -> list[int]:
    """Steps of the complete checkpoints of a run folder, ascending; whether they are sound is seen on reading them."""
    if not (folder / "checkpoints").is_dir():
        return []
    names = (path.name for path in (folder / "checkpoints").iterdir())
    return sorted(int(name) for name in names if name.isdecimal())


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSON-lines file; what a crash tore, or filled with NUL bytes, is left out."""
    if not path.exists():
        return []
    require_regular_file(path)
    objects = []
    for line in path.read_bytes().split(b"\n"):
        try:
            content = parse_json(line, None, allows_infinity=True)  # which losses of trials that diverged are
        except ValueError:
            continue
        if isinstance(content, dict):
            objects.append(content)
    return objects


def read_steps(path: Path) -> list[dict[str, Any]]:
    """The lines of a JSON-lines file that say their step, as a whole number; others are left out, as torn ones are."""
    return [line for line in read_lines(path) if type(line.get("step")) is int]


def keep_lines_until(path: Path, step: int) -> None:
    """Drops the lines of later steps, and torn ones, all at once: killed on the way, the old file stands."""
    if not path.exists():
        return
    kept = [line for line in read_steps(path) if line["step"] <= step]
    text = "".join(line_of(content) for content in kept)
    if path.read_bytes() != text.encode("utf-8"):
        write_text(path, text)


def line_of(content: dict[str, Any]) -> str:
    """One line of a JSON-lines file."""
    return json.dumps(content, ensure_ascii=False) + "\n"
