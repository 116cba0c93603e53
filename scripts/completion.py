"""trimask completion: prints a script that completes commands, flags, presets and your folders in bash, zsh or fish.

    bash    trimask completion bash > ~/.local/share/bash-completion/completions/trimask
    zsh     trimask completion zsh > "${fpath[1]}/_trimask"
    fish    trimask completion fish > ~/.config/fish/completions/trimask.fish

The script holds the flags of this version, so write it again after an update. Folders of runs, policies and prepared
data are searched for whenever Tab is pressed, by `trimask completion folders KIND BEGINNING`.
"""

import importlib
import os
import re
import shlex
import sys
from argparse import ArgumentParser
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import tyro

from trimask.scripts import cli

_FOLDERS: dict[str, Callable[[Path], bool]] = {
    "run": lambda path: (path / "config.json").is_file() and (path / "checkpoints").is_dir() and not _is_data(path),
    "data": lambda path: _is_data(path),
    "policy": lambda path: (path / "policy.json").is_file(),
    "made": lambda path: any(_FOLDERS[kind](path) for kind in ("run", "data")),
}
"""Kind of folder → whether a folder is of this kind. "made" are runs and prepared data."""
_KIND_OF_ARGUMENT = {
    "run": "run",
    "init-from": "run",
    "tuned-at": "run",
    "data": "data",
    "policy": "policy",
    "folder": "made",
    "tokenizers": "made",
    "strategy": "policy",
    "init-from of train-policy": "policy",
}
"""Last part of the name of an argument that is a path, or "NAME of COMMAND" → kind of folder that it names."""
_NO_FILES = ("media", "tfds")
"""Flags of sources that do not begin with the name of a file or folder."""
_DEPTH = 2
"""Number of levels below a folder that are searched for folders of a kind, to offer the path to them."""
_MOST = 2_000
"""Largest number of entries of one folder that are examined."""


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Shell for which a completion script is printed."""

    shell: tyro.conf.Positional[Literal["bash", "zsh", "fish"]]
    """Shell for which the completion script is printed."""


def run(shell: str) -> str:
    """Completion script for a shell."""
    import shtab

    return shtab.complete(parser_of_all(), shell)


def parser_of_all() -> ArgumentParser:
    """All commands and their flags as one parser, whose arguments say how shtab completes their values."""
    from trimask.configs.studies import STUDIES
    from trimask.scripts.benchmark import BENCHMARKS

    inner: dict[str, dict[str, str]] = {
        "study": {name: study.summary for name, study in STUDIES.items()},
        "benchmark": {name: _summary(module) for name, module in BENCHMARKS.items()},
    }
    whole = ArgumentParser("trimask", add_help=False)
    commands = whole.add_subparsers()
    for name, command in cli.COMMANDS.items():
        parser = commands.add_parser(name, help=command.summary, add_help=False)
        if name not in inner:
            _add_flags(parser, name, _command_parser(command.module, []))
            continue
        parts = parser.add_subparsers()
        for part, summary in inner[name].items():
            _add_flags(
                parts.add_parser(part, help=summary, add_help=False), name, _command_parser(command.module, [part])
            )
    return whole


def _summary(module: str) -> str:
    """First line of a module's docstring, without the command's name."""
    text = importlib.import_module(module).__doc__ or ""
    return text.splitlines()[0].partition(": ")[2].rstrip(".")


def _command_parser(module: str, words: list[str]) -> Any:
    """The parser of a command, which has the attributes of one of argparse."""
    from trimask.scripts.console import ParserRequested, parser_only

    try:
        with parser_only():
            importlib.import_module(module).main(words)
    except ParserRequested as request:
        return request.parser
    raise RuntimeError(f"{module} did not parse its arguments")


def _add_flags(parser: ArgumentParser, command: str, of_command: Any) -> None:
    """Adds the arguments of a command's own parser to one that shtab reads."""
    for action in of_command._actions:
        name, takes = action.dest.rpartition(".")[2], action.nargs
        options: dict[str, Any] = {"dest": action.dest} if action.option_strings else {}
        words = action.option_strings or [action.dest]
        summary = _first_sentence(action)
        if takes == 0:
            parser.add_argument(*words, **options, action="store_true", help=summary)
            continue
        added = parser.add_argument(*words, **options, nargs=None if takes == 1 else takes, metavar=name, help=summary)
        choices = [*_choices(action, command)]
        completer = _completer(action, command, choices)
        if completer is not None:
            added.complete = completer  # type: ignore[attr-defined]  # read by shtab, unknown to argparse
        elif choices:
            added.choices = choices


def _completer(action: Any, command: str, choices: list[str]) -> Any:
    """Completer of an argument that is a path, in the form that shtab takes; None if it is none."""
    import shtab

    from trimask.scripts.prepare import SOURCE_FLAGS

    files = {"text-tokenizer", *SOURCE_FLAGS}.difference(_NO_FILES)
    flag = (action.option_strings or [action.dest])[0].removeprefix("--")
    name = flag if flag.rpartition(".")[2] not in ("run", "strategy") else flag.rpartition(".")[2]
    kind = _KIND_OF_ARGUMENT.get(f"{name} of {command}", _KIND_OF_ARGUMENT.get(name))
    if kind is not None and command != "inspect":  # which also takes a file, a trace
        return _folder_completer(kind, choices)
    return shtab.FILE if "PATH" in str(action.metavar) or flag in files or kind is not None else None


def _first_sentence(action: Any) -> str:
    """First sentence of a flag's help, without its default."""
    text = " ".join((action.help or "").split()).partition(" (default:")[0].partition(" (required")[0]
    return re.split(r"(?<=[a-z])[.:;] ", text)[0].rstrip(".").replace("%", "%%")


def _choices(action: Any, command: str) -> Iterable[str]:
    """Possible values of an argument: those that its parser lists, and names of presets and strategies."""
    from trimask.configs.policies import POLICIES
    from trimask.configs.presets import PRESETS
    from trimask.diffusion.sampling.strategies import STRATEGIES

    if action.choices is not None:
        return map(str, action.choices)
    if action.dest == "preset":
        return POLICIES if command == "train-policy" else PRESETS
    if action.dest.rpartition(".")[2] == "strategy":
        return STRATEGIES
    braces = re.findall(r"\{([^{}]*)\}", str(action.metavar))
    return (word for group in braces for word in group.split(",") if word != "None")


def _folder_completer(kind: str, words: Sequence[str] = ()) -> dict[str, str | dict[str, str]]:
    """Completer of folders of a kind, or of words, in the form that shtab takes: functions that call this module."""
    # -P: modules in the folder where Tab is pressed are not imported.
    ask = f"{shlex.quote(sys.executable)} -P -m trimask.scripts.cli completion folders {shlex.join([kind, *words])}"
    # In bash, shtab takes what a function offers for file names if its own name contains _dir.
    name = f"_trimask_{kind}{'_or_word' if words else ''}_dirs"
    return {
        "bash": name,
        "zsh": name,
        "fish": f"({name})",
        "preamble": {
            "bash": f'{name}() {{ {ask} "$1" 2>/dev/null; }}',
            "zsh": f"{name}() {{\n  local -a found\n"
            f'  found=("${{(@f)$({ask} "${{(Q)PREFIX}}" 2>/dev/null)}}")\n'
            "  compadd -f -- $found\n}",
            "fish": f"function {name}\n  {ask} (commandline -ct) 2>/dev/null\nend",
        },
    }


def folders(kind: str, beginning: str) -> list[str]:
    """Folders that begin so and are of a kind, or lead to one of that kind; all folders that begin so if there is none.

    The beginning is as it was typed: it may have an opening quote, backslashes and environment variables.
    """
    beginning = beginning[1:] if beginning[:1] in "'\"" else re.sub(r"\\(.)", r"\1", beginning)
    beginning = os.path.expandvars(beginning)
    parent, slash, start = beginning.rpartition("/")
    here = Path(os.path.expanduser(parent + slash) or ".")
    names = sorted(path.name for path in _children(here, is_hidden=start.startswith(".")))
    names = [name for name in names if name.startswith(start) and name.isprintable()]
    found = [name for name in names if _leads_to(here / name, _FOLDERS[kind], _DEPTH)]
    if not found and not _FOLDERS[kind](here):
        found = names
    return [f"{parent}{slash}{name}" for name in found]


def _leads_to(path: Path, is_kind: Callable[[Path], bool], depth: int) -> bool:
    """Whether the folder, or one a few levels below it, is of the kind."""
    if is_kind(path):
        return True
    return depth > 0 and any(_leads_to(child, is_kind, depth - 1) for child in _children(path))


def _children(path: Path, is_hidden: bool = False) -> Iterator[Path]:
    """Folders in a readable folder; hidden ones only with `is_hidden`."""
    with suppress(OSError):
        for child in islice(path.iterdir(), _MOST):
            if child.is_dir() and (is_hidden or not child.name.startswith(".")):
                yield child


def _is_data(path: Path) -> bool:
    return (path / "manifest.json").is_file()


def main(arguments: Sequence[str]) -> None:
    """Runs `trimask completion` with these arguments."""
    if arguments[:1] == ["folders"] and len(arguments) >= 3 and arguments[1] in _FOLDERS:
        _, kind, *words, beginning = arguments
        for found in [*(word for word in words if word.startswith(beginning)), *folders(kind, beginning)]:
            print(found)
        return
    from trimask.scripts.console import parse

    parsed: Arguments = parse(Arguments, list(arguments), "completion", __doc__ or "")
    print(run(parsed.shell))


if __name__ == "__main__":
    sys.exit(cli.main(["completion", *sys.argv[1:]]))
