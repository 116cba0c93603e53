"""What protects a run folder: one process at a time, errors that say what is still good, lines that are whole or gone.

RUN/.lock                  held by the process that trains; the kernel frees it however that process ends
RUN/checkpoints/<step>/    a folder named by a number alone is complete: Orbax gives it that name last
"""

import errno
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from trimask.diffusion import configuration
from trimask.diffusion.processes import is_first

_REASONS = tuple(
    os.strerror(number)
    for number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO)
)


class NotWritten(OSError):
    """The run folder could not be written to; what was there before is as it was."""


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keeps every other process out of a run folder, which is made if need be; those of this run share its lock."""
    if not is_first():
        yield
        return
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        # One object per path and process, so that a command and the loop it calls may both hold it.
        lock = FileLock(folder / ".lock", is_singleton=True)
        try:
            lock.acquire(blocking=False)
        except Timeout as error:
            holder = (folder / ".lock").read_text(encoding="utf-8").strip()
            who = f"process {holder}" if holder else "another process"
            raise ValueError(f"{folder} is in use: {who} works there") from error
    try:
        with writing(folder):
            (folder / ".lock").write_text(f"{os.getpid()}\n", encoding="utf-8")
        yield
    finally:
        lock.release()


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
        good = f"the last good checkpoint, of step {steps[-1]}, is untouched" if steps else "it has no checkpoint yet"
        raise NotWritten(
            f"{folder}: could not be written: {_reason(error)}; {good}. The same command resumes once that is mended"
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
    objects = []
    for line in path.read_bytes().split(b"\n"):
        try:
            content = json.loads(line.decode("utf-8"))
        except ValueError:
            continue
        if isinstance(content, dict):
            objects.append(content)
    return objects


def keep_lines_until(path: Path, step: int) -> None:
    """Drops the lines of later steps, and torn ones, all at once: killed on the way, the old file stands."""
    if not path.exists():
        return
    kept = [line for line in read_lines(path) if line.get("step", step + 1) <= step]
    text = "".join(line_of(content) for content in kept)
    if path.read_bytes() != text.encode("utf-8"):
        configuration.write_text(path, text)


def line_of(content: dict[str, Any]) -> str:
    """One line of a JSON-lines file."""
    return json.dumps(content, ensure_ascii=False) + "\n"


def _reason(error: Exception) -> str:
    """Why a write failed, in the system's words where they can be found; TensorStore wraps them in many of its own."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror} ({error.filename})" if error.filename else error.strerror
    text = str(error) or type(error).__name__
    known = next((reason for reason in _REASONS if reason in text), None)
    return known or shortened(text)


def shortened(text: str) -> str:
    """The first line, or as much of it as can be read at a glance."""
    line = text.partition("\n")[0]
    return line if len(line) <= 200 else f"{line[:199]}…"
