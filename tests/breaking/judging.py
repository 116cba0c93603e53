"""Rules that every command must obey in every case: no traceback, no silent failure, no process left running."""

import hashlib
from pathlib import Path

from breaking.running import Outcome

_TRACES = (
    "Traceback (most recent call last)",
    "Fatal Python error",
    "*** Check failure",
    "terminate called",
    "panicked at",
)


def faults_of(done: Outcome, may_be_late: bool = False) -> list[str]:
    """Faults of an outcome. With `may_be_late` a command may run into its time limit, if it ends on SIGTERM."""
    faults = [done.fault] if done.fault else []
    if done.is_late and not may_be_late:
        faults.append(f"not done in time: {_last_line(done.out)}")
    output = done.out + done.err
    if any(trace in output for trace in _TRACES):
        faults.append(f"traceback: {_last_line(done.err)}")
    elif done.status not in ((0, 1, 2, 143, -15) if done.is_late else (0, 1, 2)) and not done.fault:
        faults.append(f"status {done.status}: {_last_line(done.err)}")
    elif done.status > 0 and not done.err.strip() and not done.fault:
        faults.append(f"status {done.status} without a message")
    if any(ord(c) < 32 and c not in "\n\t\r" for c in output):
        faults.append("control characters on the terminal")
    if done.left_running:
        faults.append(f"left running: {'; '.join(done.left_running)}")
    return faults


def listing(folder: Path) -> list[str]:
    """Sorted paths of everything in a folder, with the sizes of files, without the harness's own logs."""
    return sorted(
        f"{path.relative_to(folder)} {path.stat().st_size if path.is_file() else ''}"
        for path in folder.rglob("*")
        if ".logs" not in path.parts
    )


def file_digest(path: Path) -> str:
    """SHA-256 of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _last_line(text: str) -> str:
    return (text.strip().splitlines() or [""])[-1][:300]
