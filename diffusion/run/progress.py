"""How long-running work reports its progress to its caller."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path

Report = Callable[[str, int, int], None]
"""Called with the name of the current task, the amount done and the total amount."""


def silent(what: str, done: int, total: int) -> None:
    """A `Report` that discards progress."""


@contextmanager
def without_bars() -> Iterator[None]:
    """Nothing is printed within, so that progress bars of several processes do not overwrite each other."""
    with Path(os.devnull).open("w", encoding="utf-8") as nowhere, redirect_stdout(nowhere):
        yield
