"""Damaged files: any file of any folder, damaged in any way, before any command that reads the folder.

A command may either do without the damaged file, if its result is the same, or fail with a message. After the file is
put back, the same command succeeds with the result that it has without any damage.
"""

import os
import random
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from breaking.judging import faults_of, file_digest
from breaking.running import Outcome, call
from breaking.world import COMMANDS, can_run, copied

DEEP = b"[" * 100_000
"""Content of a file that nests JSON too deeply."""
VICTIM = b"not to be touched\n"
"""Content of a file outside the damaged folder, to which a link in it leads."""


def _cut(path: Path, rng: random.Random) -> None:
    path.write_bytes(path.read_bytes()[: rng.choice([0, path.stat().st_size // 2, path.stat().st_size - 1])])


def _nul(path: Path, rng: random.Random) -> None:
    content = path.read_bytes()
    start = rng.randrange(len(content) or 1)
    path.write_bytes(content[:start] + bytes(len(content[start : start + 512])) + content[start + 512 :])


def _bit(path: Path, rng: random.Random) -> None:
    content = bytearray(path.read_bytes() or b"\0")
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    path.write_bytes(bytes(content))


def _appended(path: Path, rng: random.Random) -> None:
    with path.open("ab") as file:
        file.write(rng.randbytes(100))


def _swapped(path: Path, rng: random.Random) -> None:
    """Swaps the file with one of the same ending in its folder that has other content, else with any other one."""
    others = [p for p in path.parent.iterdir() if p.is_file() and p != path and p.read_bytes() != path.read_bytes()]
    others = [p for p in others if p.suffix == path.suffix] or others
    if others:
        other = rng.choice(sorted(others))
        mine, theirs = path.read_bytes(), other.read_bytes()
        path.write_bytes(theirs)
        other.write_bytes(mine)


def _link(path: Path, rng: random.Random) -> None:
    path.unlink()
    path.symlink_to(_victim_of(path))


def _folder(path: Path, rng: random.Random) -> None:
    path.unlink()
    path.mkdir()


def _fifo(path: Path, rng: random.Random) -> None:
    path.unlink()
    os.mkfifo(path)


def _deep(path: Path, rng: random.Random) -> None:
    path.write_bytes(DEEP)


def _gone(path: Path, rng: random.Random) -> None:
    path.unlink()


DAMAGES: dict[str, Callable[[Path, random.Random], None]] = {
    "cut": _cut,
    "NUL": _nul,
    "bit": _bit,
    "appended": _appended,
    "swapped": _swapped,
    "link": _link,
    "folder": _folder,
    "FIFO": _fifo,
    "deep": _deep,
    "gone": _gone,
}
"""Name of a way to damage a file → function that does so."""


def _victim_of(path: Path) -> Path:
    """Path of the file outside the damaged folder, to which a link leads."""
    return next(parent for parent in path.parents if parent.name.startswith("case-")) / "victim"


@dataclass(frozen=True)
class Reader:
    """A command that reads a folder which may be damaged."""

    words: str
    """The command line, with the names of folders in braces."""
    damaged: str
    """Name of the folder that is damaged."""
    copies: tuple[str, ...] = ()
    """Names of other folders that the command writes to."""
    result: str = "out"
    """Result that must be the same: the printed output (out), all files of a folder (files:FOLDER), its new files
    (added:FOLDER), losses (losses:FOLDER), or nothing (none)."""


_FRESH_TRAIN = COMMANDS["train"].words.replace("{run}", "{new}")
_FRESH_POLICY = COMMANDS["train-policy"].words.replace("{policy}", "{new}")
_TEXT = "generate {run} --prompt one --to text --out {new}"
READERS = {
    "prepare": Reader(COMMANDS["prepare"].words.replace("{data}", "{new}"), "sources", (), "none"),
    "prepare again": Reader(COMMANDS["prepare"].words, "data", (), "files:data"),
    "prepare tokenizers": Reader(
        "prepare {new} --text prose={sources}/prose.txt --tokenizers {data} --workers 1", "data", (), "files:new"
    ),
    "inspect data": Reader("inspect {data}", "data"),
    "inspect --verify": Reader("inspect {data} --verify", "data"),
    "train on": Reader(_FRESH_TRAIN, "data", (), "losses:new"),
    "train again": Reader(COMMANDS["train"].words, "run", (), "none"),
    "train further": Reader(COMMANDS["train"].words.replace("{run}", "{half}"), "half", (), "losses:half"),
    "train from": Reader(f"{_FRESH_TRAIN} --init-from {{run}}", "run", (), "losses:new"),
    "train tuned": Reader("train {new} --data {data} --tuned-at {run}", "run", (), "losses:new"),
    "generate": Reader(_TEXT, "run", (), "files:new"),
    "generate more": Reader("generate {run} --prompt two --to image", "run", (), "added:run/generated"),
    "generate by policy": Reader(f"{_TEXT} --strategy {{policy}}", "policy", (), "files:new"),
    "evaluate": Reader(COMMANDS["evaluate"].words, "run"),
    "evaluate on": Reader(COMMANDS["evaluate"].words + " --data {data}", "data", ("run",)),
    "inspect run": Reader("inspect {run}", "run"),
    "train-policy": Reader(_FRESH_POLICY, "data", (), "losses:new"),
    "train-policy again": Reader(COMMANDS["train-policy"].words, "policy", (), "none"),
    "inspect trace": Reader("inspect {run}/generated/one-3.trace.jsonl", "run", (), "none"),
    "study again": Reader(COMMANDS["study"].words, "study", (), "none"),
}
"""Name → the command, and the folder that is damaged."""
_SLOW = tuple(name for name in READERS if name.startswith(("train", "evaluate")))
"""Readers that are drawn less often, because they take long."""
_KEEPING_VALID = ("bit", "NUL", "swapped", "link", "deep", "appended", "cut")
"""Ways that may turn an unchecked file into another valid one."""
_UNCHECKED = re.compile(
    r"(config|policy|manifest|plan|tokenizer|block-\d+|verified|evaluation|index|metrics).*\.jsonl?$|README.md|\.txt$|\.npy$"
)
"""Files of which no digest is kept, so that a valid change of them cannot be noticed."""
_LOSSES = re.compile(r'"step": (\d+),.*?"loss": ([^,}]+)')


@dataclass(frozen=True)
class Damage:
    """A file that is damaged before a command."""

    reader: str
    """Name of the command in `READERS`."""
    file: str
    """Path of the file, relative to the damaged folder."""
    way: str
    """Way of damaging the file, a key of `DAMAGES`."""
    seed: int
    """Seed of random choices within the way."""

    def __str__(self) -> str:
        return f"{self.reader}: {READERS[self.reader].damaged}/{self.file} {self.way} ({self.seed})"


def draw(folders: dict[str, Path], rng: random.Random) -> Iterator[Damage]:
    """Endless stream of cases; files whose names differ only in numbers are drawn as one."""
    possible = [name for name, reader in READERS.items() if can_run(reader.words, folders)]
    kinds = {name: _kinds(folders[READERS[name].damaged]) for name in possible}
    while True:
        (reader,) = rng.choices(possible, [1 if name in _SLOW else 4 for name in possible])
        file = _one_of(_one_of(kinds[reader], rng), rng)
        yield Damage(reader, file, rng.choice(list(DAMAGES)), rng.randrange(1 << 30))


def _one_of(items: list, rng: random.Random) -> Any:
    """A random item, by exactly one number of `rng`, because the number of items differs between worlds."""
    return items[int(rng.random() * len(items))]


def _kinds(folder: Path) -> list[list[str]]:
    """Paths of the files of a folder, in groups of names that differ only in numbers."""
    kinds: dict[str, list[str]] = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_file() and path.name != ".lock":
            kinds.setdefault(re.sub(r"[0-9a-f]{32}|\d+", "0", name), []).append(name)
    return list(kinds.values())


def reference(name: str, folders: dict[str, Path], root: Path) -> object:
    """Result of a command without any damage."""
    paths, case_folder = _make_case_folder(name, folders, root)
    done = _run(name, paths, case_folder)
    if done.status:
        raise RuntimeError(f"{name} fails without any damage:\n{done.out}\n{done.err}")
    return result_of(READERS[name].result, paths, done)


def judged(case: Damage, folders: dict[str, Path], expected: object, root: Path) -> list[str]:
    """Tries a case and returns its faults; `expected` is the result without any damage."""
    reader = READERS[case.reader]
    paths, case_folder = _make_case_folder(case.reader, folders, root)
    folder = paths[reader.damaged]
    path, undamaged = folder / case.file, folder.parent / "kept"
    shutil.copytree(folder, undamaged, symlinks=True)
    (case_folder / "victim").write_bytes(VICTIM)
    DAMAGES[case.way](path, random.Random(case.seed))
    done = _run(case.reader, paths, case_folder)
    faults = faults_of(done)
    if (case_folder / "victim").read_bytes() != VICTIM:
        faults.append("wrote through a link")
    may_differ = (case.way in _KEEPING_VALID and _UNCHECKED.search(case.file)) or "going back to step" in done.err
    if done.status == 0 and not may_differ and result_of(reader.result, paths, done) != expected:
        faults.append("status 0, and another result")
    if done.status == 0:
        return faults
    _put_back(path, case.way, folder, undamaged)
    again = _run(case.reader, paths, case_folder)
    if again.status:
        faults.append(f"fails with the file put back: {again.err.strip()[-300:]}")
    elif result_of(reader.result, paths, again) != expected:
        faults.append("another result with the file put back")
    return faults + faults_of(again)


def _make_case_folder(name: str, folders: dict[str, Path], root: Path) -> tuple[dict[str, Path], Path]:
    """Name → path of the folders of a case, and the folder of the case, with copies of those that may be changed."""
    reader = READERS[name]
    shutil.rmtree(root / "case-0", ignore_errors=True)
    case_folder = root / "case-0"
    (case_folder / "in").mkdir(parents=True)
    paths = copied(folders, case_folder / "in", reader.damaged, *reader.copies)
    return {**paths, f"{reader.damaged} before": folders[reader.damaged], "new": case_folder / "new"}, case_folder


def _run(name: str, paths: dict[str, Path], case_folder: Path) -> Outcome:
    return call([word.format(**paths) for word in READERS[name].words.split()], case_folder)


def _put_back(path: Path, way: str, folder: Path, undamaged: Path) -> None:
    """Restores the damaged file from the undamaged copy of its folder, and files that it may have been swapped with.

    If the file's own folder is gone, because the command has set a checkpoint aside, everything is restored.
    """
    if not path.parent.is_dir():
        shutil.rmtree(folder)
        shutil.copytree(undamaged, folder, symlinks=True)
        return
    copy = undamaged / path.relative_to(folder)
    for original in undamaged.rglob("*") if way == "swapped" else (copy,):
        target = folder / original.relative_to(undamaged)
        if original.is_file() and target.parent.is_dir() and (way != "swapped" or original.parent == copy.parent):
            if target.is_dir() and not target.is_symlink():
                shutil.rmtree(target)
            target.unlink(missing_ok=True)
            shutil.copy2(original, target)


def result_of(what: str, paths: dict[str, Path], done: Outcome) -> object:
    """Result of a command that can be compared: `what` is a value of `Reader.result`."""
    kind, _, name = what.partition(":")
    if kind == "none":
        return None
    first, _, rest = name.partition("/")
    folder = paths[first] / rest if name else Path()
    if kind in ("files", "added"):
        files = {str(path.relative_to(folder)): path for path in folder.rglob("*") if path.is_file()}
        skipped = {".lock", "verified.json"}
        if kind == "added":
            before = paths[f"{first} before"] / rest
            skipped |= {str(path.relative_to(before)) for path in before.rglob("*")}
        return {name: file_digest(path) for name, path in files.items() if name not in skipped}
    if kind == "losses":
        return dict(_LOSSES.findall((folder / "metrics.jsonl").read_text()))
    return [line for line in done.out.splitlines() if "━" not in line and "%|" not in line]
