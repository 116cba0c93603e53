"""What commands share on the terminal: parsing by preset, progress bars, tables."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import tyro
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

_T = TypeVar("_T")

console = Console()


def parse(kind: Any, arguments: list[str], command: str, description: str) -> Any:
    """The command's arguments as its dataclass; wrong ones end with a usage message and suggestions."""
    return tyro.cli(kind, args=arguments, prog=f"trimask {command}", description=description)


def by_preset(presets: dict[str, Callable[[], Any]], make: Callable[[Any], _T]) -> Any:
    """A type for `parse`: one subcommand per preset, whose flags override what `make(preset())` holds."""
    defaults = {name: make(preset()) for name, preset in presets.items()}
    descriptions = {name: (preset.__doc__ or "").strip() for name, preset in presets.items()}
    return tyro.extras.subcommand_type_from_defaults(defaults, descriptions)


@contextmanager
def progress_report() -> Iterator[Callable[[str, int, int], None]]:
    """A function `report(what, done, total)` that moves a progress bar per `what`."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TextColumn("left"), TimeRemainingColumn(), console=console) as bar:
        tasks: dict[str, Any] = {}

        def report(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bar.add_task(what, total=total)
            bar.update(tasks[what], completed=done, total=total)

        yield report


def table(title: str, columns: list[str], rows: list[list[str]]) -> Table:
    """A table whose first column is left-aligned and whose others are right-aligned."""
    result = Table(title=title, title_justify="left")
    for number, column in enumerate(columns):
        result.add_column(column, justify="right" if number else "left")
    for row in rows:
        result.add_row(*row)
    return result
