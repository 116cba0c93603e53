"""How long work tells whoever started it how far it has come."""

from collections.abc import Callable

Report = Callable[[str, int, int], None]
"""What is being done, how much of it is done, and how much there is."""


def silent(what: str, done: int, total: int) -> None:
    """Tells nobody."""
