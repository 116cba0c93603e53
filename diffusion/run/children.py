"""Processes that a command starts end with it, whatever ends it: a signal that cannot be caught, too.

A process of our own Python watches its parent itself (`end_with`). Another program is started by a small process that
watches for it (`run_watched`).
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
"""For a child that tidies up after a parent that ended in the usual way."""


def end_with(parent: int) -> None:
    """Lets this process end within two seconds of its parent, the process of that number, if not by itself."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(_EVERY_S)
        time.sleep(_GRACE_S)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def run_watched(command: Sequence[str]) -> "subprocess.CompletedProcess[str]":
    """Runs a program to its end and returns its status, output and errors as text."""
    watched = [sys.executable, __file__, str(os.getpid()), *command]
    return subprocess.run(watched, capture_output=True, text=True, errors="replace", check=False)


def require_program(path: Path, flag: str) -> None:
    """Raises ValueError, with the flag's name, where a path is not that of a program that can be run."""
    if shutil.which(path) is None:
        raise ValueError(f"{flag} must be a program; got {str(path)!r}, which is none that can be run")


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
