"""Command line and terminal, for all commands: parsing with presets, progress bars, tables."""

import argparse
import io
import sys
import warnings
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from typing import Any, TypeVar

import tyro
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from trimask.configs.presets import PRESETS, Experiment, preset
from trimask.scripts.compile_cache import Compiling
from trimask.scripts.flags import ESCAPE, FLAGS, escaped
from trimask.tokenizers.storage.files import printable

_T = TypeVar("_T")

console = Console()
_parser_only = False
"""Whether `parse` raises `ParserRequested` instead of parsing."""


def parse(
    kind: Any, arguments: list[str], command: str, description: str, default: Any = None, *, lists: Sequence[str] = ()
) -> Any:
    """Parses the arguments of a command as the dataclass `kind`, with `default` for all that they do not set.

    `lists` names flags that take several values and may be repeated; see `joined`. Impossible arguments end the process
    with status 2, a usage message and suggestions.
    """
    given = {} if default is None else {"default": default}
    arguments = joined(arguments, *lists) if lists else arguments
    with FLAGS, _plain_errors(arguments):
        if _parser_only:
            with warnings.catch_warnings(action="ignore", category=DeprecationWarning):  # it has no other name so far
                raise ParserRequested(tyro.extras.get_parser(kind, prog=f"trimask {command}", **given))
        parsed = tyro.cli(kind, args=arguments, prog=f"trimask {command}", description=description, **given)
    if isinstance(getattr(parsed, "compiling", None), Compiling):
        parsed.compiling.settle()
    return parsed


class ParserRequested(Exception):
    """Raised by `parse` within `parser_only`; carries the command's parser."""

    def __init__(self, parser: Any):
        self.parser = parser  # has the attributes of argparse's; tyro has a copy of argparse


@contextmanager
def parser_only() -> Iterator[None]:
    """Makes `parse` raise `ParserRequested` within, so that commands end once their parser is made."""
    global _parser_only
    _parser_only = True
    try:
        yield
    finally:
        _parser_only = False


def parse_from_preset(make: Callable[[Experiment], _T], arguments: list[str], command: str, description: str) -> _T:
    """Parses the arguments with defaults that `make` takes from the experiment which --preset names.

    The presets are listed in the help.
    """
    presets = "\n".join(f"  {name:12} {(preset.__doc__ or '').splitlines()[0]}" for name, preset in PRESETS.items())
    default = make(preset(option(arguments, "--preset")))
    description = f"{description}\n\nPresets; the values of the chosen one are the defaults below:\n{presets}"
    return parse(type(default), arguments, command, description, default)


@contextmanager
def _plain_errors(arguments: list[str]) -> Iterator[None]:
    """Removes terminal control characters, and colours, from messages about arguments that contain such characters."""
    if all(printable(word, keep="\n\t") == word for word in arguments):
        yield
        return
    said = io.StringIO()
    try:
        with redirect_stdout(said), redirect_stderr(said):
            yield
    except SystemExit:
        print(printable(said.getvalue().replace(ESCAPE, ""), keep="\n\t"), end="", file=sys.stderr)
        raise


def joined(arguments: list[str], *flags: str) -> list[str]:
    """Joins repeated flags that take several values: --infill A --infill B becomes --infill A B.

    After = a value may begin with dashes: --prompt=--x. The values are `escaped`; parsing undoes this.
    """
    values: dict[str, list[str]] = {}
    rest: list[str] = []
    current: str | None = None
    for word in arguments:
        name, equals, value = word.partition("=")
        if name in flags:
            values.setdefault(name, []).extend([escaped(value)] if equals else [])
            current = None if equals else name
        elif current is not None and not word.startswith("--"):
            values[current].append(escaped(word))
        else:
            rest, current = [*rest, word], None
    return [*rest, *(word for name, given in values.items() for word in (name, *given))]


def option(arguments: list[str], *names: str) -> str | None:
    """Value of the option with one of these names, before all arguments are parsed; None if it is not given."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument(*names, dest="value")
    try:
        return parser.parse_known_args(arguments)[0].value
    except argparse.ArgumentError:
        return None  # its value is missing, which `parse` will report


class _Rate(ProgressColumn):
    """Column of a progress bar: items per second."""

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text("" if speed is None or (task.total or 0) < 10 else f"{speed:,.0f}/s", style="progress.data.speed")


@contextmanager
def progress_report() -> Iterator[Callable[[str, int, int], None]]:
    """Shows progress bars; yields a function `report(what, done, total)` that moves the bar of `what`."""
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        _Rate(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, TextColumn("left"), TimeRemainingColumn(), console=console) as bar:
        tasks: dict[str, Any] = {}

        def report(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bar.add_task(what, total=total)
            bar.update(tasks[what], completed=done, total=total)

        yield report


def tracked(items: Collection[_T], what: str) -> Iterator[_T]:
    """Iterates over the items and shows how many are done in a progress bar labelled `what`."""
    with progress_report() as report:
        for done, item in enumerate(items):
            report(what, done, len(items))
            yield item
        report(what, len(items), len(items))


def say(text: str) -> None:
    """Prints text literally: no markup, no line wrapping, and without terminal control characters."""
    console.print(Text(printable(text, keep="\n\t")), soft_wrap=True)


def table(title: str, columns: list[str], rows: list[list[str]]) -> Table:
    """A table with its first column left-aligned and the others right-aligned; cells are literal text, not markup."""
    result = Table(title=Text(printable(title), style="table.title"), title_justify="left")
    for number, column in enumerate(columns):
        result.add_column(Text(printable(column)), justify="right" if number else "left", overflow="fold")
    for row in rows:
        result.add_row(*(Text(printable(cell)) for cell in row))
    return result
