"""How long-running work reports its progress to its caller."""

from collections.abc import Callable

Report = Callable[[str, int, int], None]
"""Called with the name of the current task, the amount done and the total amount."""


def silent(what: str, done: int, total: int) -> None:
    """A `Report` that discards progress."""
