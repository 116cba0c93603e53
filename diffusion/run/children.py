"""Ends child processes together with the command that started them, even if that is killed by SIGKILL.

A child in our own Python watches its parent itself (`end_with`). Any other program is started through a small process
that watches the parent for it (`run_watched`).
"""

import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

_EVERY_S = 0.2
_GRACE_S = 1.0
"""Time for a child to tidy up by itself after its parent has ended normally, in seconds."""


def end_with(parent: int) -> None:
    """Starts a thread that ends this process within two seconds of the end of its parent process `parent` (a pid)."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(_EVERY_S)
        time.sleep(_GRACE_S)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def run_watched(command: Sequence[str]) -> "subprocess.CompletedProcess[str]":
    """Runs a program that is killed if this process ends; returns its status, output and errors as text."""
    watched = [sys.executable, __file__, str(os.getpid()), *command]
    return subprocess.run(watched, capture_output=True, text=True, errors="replace", check=False)


def require_program(path: Path, flag: str) -> None:
    """Raises ValueError that names the flag unless the path is an executable program."""
    if shutil.which(path) is None:
        raise ValueError(f"{flag} must be an executable program, got {str(path)!r}")


def _watch(parent: int, command: Sequence[str]) -> int:
    child = subprocess.Popen(command)
    while True:
        try:
            return child.wait(_EVERY_S)
        except subprocess.TimeoutExpired:
            if os.getppid() != parent:
                child.kill()


if __name__ == "__main__":
    sys.exit(_watch(int(sys.argv[1]), sys.argv[2:]))
