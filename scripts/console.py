"""What commands share on the terminal: parsing by preset, progress bars, tables."""

import argparse
import io
import sys
import warnings
from collections.abc import Callable, Collection, Iterator
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
_only_flags = False


def parse(kind: Any, arguments: list[str], command: str, description: str, default: Any = None) -> Any:
    """The command's arguments as its dataclass; wrong ones end with a usage message and suggestions.

    What they say of compiling is settled here, before anything is compiled.
    """
    given = {} if default is None else {"default": default}
    with FLAGS, _plain_errors(arguments):
        if _only_flags:
            with warnings.catch_warnings(action="ignore", category=DeprecationWarning):  # it has no other name so far
                raise AskedForFlags(tyro.extras.get_parser(kind, prog=f"trimask {command}", **given))
        parsed = tyro.cli(kind, args=arguments, prog=f"trimask {command}", description=description, **given)
    if isinstance(getattr(parsed, "compiling", None), Compiling):
        parsed.compiling.settle()
    return parsed


class AskedForFlags(Exception):
    """What a command ends with that was only asked for its flags."""

    def __init__(self, parser: Any):
        self.parser = parser  # like argparse's: tyro has a copy of that


@contextmanager
def only_flags() -> Iterator[None]:
    """Lets commands that parse their arguments here go no further, and raise `AskedForFlags`."""
    global _only_flags
    _only_flags = True
    try:
        yield
    finally:
        _only_flags = False


def parse_from_preset(make: Callable[[Experiment], _T], arguments: list[str], command: str, description: str) -> _T:
    """The arguments as a dataclass whose defaults are what `make` takes of the experiment that --preset names."""
    presets = "\n".join(f"  {name:12} {(preset.__doc__ or '').splitlines()[0]}" for name, preset in PRESETS.items())
    default = make(preset(option(arguments, "--preset")))
    description = f"{description}\n\nWhat --preset can name; its values are the defaults shown below:\n{presets}"
    return parse(type(default), arguments, command, description, default)


@contextmanager
def _plain_errors(arguments: list[str]) -> Iterator[None]:
    """What is said of arguments with characters that steer a terminal is said without them, and without colours."""
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
    """Flags of several values may be given several times: --infill A --infill B is --infill A B.

    After = a value may begin with dashes: --prompt=--x. The values are `escaped`, which parsing takes back.
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
    """The value of one option, ahead of parsing all of them."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument(*names, dest="value")
    try:
        return parser.parse_known_args(arguments)[0].value
    except argparse.ArgumentError:
        return None  # it lacks its value, which the real parser will say


class _Rate(ProgressColumn):
    """Items per second."""

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text("" if speed is None or (task.total or 0) < 10 else f"{speed:,.0f}/s", style="progress.data.speed")


@contextmanager
def progress_report() -> Iterator[Callable[[str, int, int], None]]:
    """A function `report(what, done, total)` that moves a progress bar per `what`."""
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
    """The items in turn; a progress bar counts those that are done."""
    with progress_report() as report:
        for done, item in enumerate(items):
            report(what, done, len(items))
            yield item
        report(what, len(items), len(items))


def say(text: str) -> None:
    """Prints text as it is: never markup, on one line however long, without characters that steer a terminal."""
    console.print(Text(printable(text, keep="\n\t")), soft_wrap=True)


def table(title: str, columns: list[str], rows: list[list[str]]) -> Table:
    """A table whose first column is left-aligned and whose others are right-aligned."""
    result = Table(title=Text(printable(title), style="table.title"), title_justify="left")
    for number, column in enumerate(columns):
        result.add_column(Text(printable(column)), justify="right" if number else "left", overflow="fold")
    for row in rows:
        result.add_row(*(Text(printable(cell)) for cell in row))  # not markup, whatever a caption holds
    return result
