"""trimask completion: what the Tab key adds, in bash, zsh or fish: commands, flags, presets, and folders of your own.

    bash    trimask completion bash > ~/.local/share/bash-completion/completions/trimask
    zsh     trimask completion zsh > "${fpath[1]}/_trimask"
    fish    trimask completion fish > ~/.config/fish/completions/trimask.fish

What is printed lists the flags of this version, so write it again after an update. Folders of runs, policies and
prepared data are looked for when Tab is pressed, by `trimask completion folders KIND BEGINNING`.
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
"""Kind of folder → whether one is of it."""
_NAMED = {
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
"""Last part of an argument's name, which is a path → what kind of folder it names."""
_FILES = ("images", "audio", "text", "prompts", "text-tokenizer")
"""Arguments that are text, and name files."""
_DEPTH = 2
"""How far below a folder those of a kind are looked for, to offer the way to them."""
_MOST = 2_000
"""Files of one folder that are looked at."""


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """For which shell."""

    shell: tyro.conf.Positional[Literal["bash", "zsh", "fish"]]
    """Shell whose script is printed."""


def run(shell: str) -> str:
    """The shell's script."""
    import shtab

    return shtab.complete(parser_of_all(), shell)


def parser_of_all() -> ArgumentParser:
    """All commands and their flags as one parser, with what completes each value."""
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
            _add_flags(parser, name, _asked(command.module, []))
            continue
        parts = parser.add_subparsers()
        for part, summary in inner[name].items():
            _add_flags(parts.add_parser(part, help=summary, add_help=False), name, _asked(command.module, [part]))
    return whole


def _summary(module: str) -> str:
    text = importlib.import_module(module).__doc__ or ""
    return text.splitlines()[0].partition(": ")[2].rstrip(".")


def _asked(module: str, words: list[str]) -> Any:
    """The parser of a command, like one of argparse."""
    from trimask.scripts.console import AskedForFlags, only_flags

    try:
        with only_flags():
            importlib.import_module(module).main(words)
    except AskedForFlags as answer:
        return answer.parser
    raise RuntimeError(f"{module} did not parse its arguments")


def _add_flags(parser: ArgumentParser, command: str, theirs: Any) -> None:
    for action in theirs._actions:
        name, takes = action.dest.rpartition(".")[2], action.nargs
        options: dict[str, Any] = {"dest": action.dest} if action.option_strings else {}
        words = action.option_strings or [action.dest]
        about = _about(action)
        if takes == 0:
            parser.add_argument(*words, **options, action="store_true", help=about)
            continue
        added = parser.add_argument(*words, **options, nargs=None if takes == 1 else takes, metavar=name, help=about)
        choices = [*_choices(action, command)]
        completes = _completes(action, command, choices)
        if completes is not None:
            added.complete = completes  # type: ignore[attr-defined]  # what shtab goes by, and argparse does not know
        elif choices:
            added.choices = choices


def _completes(action: Any, command: str, choices: list[str]) -> Any:
    """What completes a path, as shtab takes it; None for what is none."""
    import shtab

    flag = (action.option_strings or [action.dest])[0].removeprefix("--")
    name = flag if flag.rpartition(".")[2] not in ("run", "strategy") else flag.rpartition(".")[2]
    kind = _NAMED.get(f"{name} of {command}", _NAMED.get(name))
    if kind is not None and command != "inspect":  # which also takes a trace
        return _completer(kind, choices)
    return shtab.FILE if "PATH" in str(action.metavar) or flag in _FILES or kind is not None else None


def _about(action: Any) -> str:
    """The first sentence of a flag's help."""
    text = " ".join((action.help or "").split()).partition(" (default:")[0].partition(" (required")[0]
    return re.split(r"(?<=[a-z])[.:;] ", text)[0].rstrip(".").replace("%", "%%")


def _choices(action: Any, command: str) -> Iterable[str]:
    """Words that a value may be: those the parser knows, and names that are kept in tables."""
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


def _completer(kind: str, words: Sequence[str] = ()) -> dict[str, str | dict[str, str]]:
    """How each shell completes a folder of a kind, or a word, as shtab takes it: a function that asks this module."""
    # -P: what lies in the folder where Tab is pressed is not imported.
    ask = f"{shlex.quote(sys.executable)} -P -m trimask.scripts.cli completion folders {shlex.join([kind, *words])}"
    # A name by which shtab lets bash know that these are files.
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
    """Folders of a kind that a beginning may become, or those on the way to one; of any kind where there is none.

    The beginning is as it was typed: after an opening quote, or with backslashes, and with variables.
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
    """Folders in a folder that can be looked at; hidden ones on request."""
    with suppress(OSError):
        for child in islice(path.iterdir(), _MOST):
            if child.is_dir() and (is_hidden or not child.name.startswith(".")):
                yield child


def _is_data(path: Path) -> bool:
    return (path / "manifest.json").is_file()


def main(arguments: Sequence[str]) -> None:
    """Entry point of the command."""
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
