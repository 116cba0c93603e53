"""Every file of every folder, damaged in every way, before every command that reads the folder.

A command may do without the damaged file, if what it makes is the same; or it refuses in words. Where the file is put
back, the same command succeeds, and makes what it makes without any damage.
"""

import os
import random
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from breaking.judging import digest, faults_of
from breaking.running import Outcome, call
from breaking.world import COMMANDS, can_run, copied

DEEP = b"[" * 100_000
VICTIM = b"not to be touched\n"


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
    """With a sibling of the same ending, if there is one with other content; else with any file of its folder."""
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


WAYS: dict[str, Callable[[Path, random.Random], None]] = {
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


def _victim_of(path: Path) -> Path:
    """The file outside to which a link of the damaged folder leads."""
    return next(parent for parent in path.parents if parent.name.startswith("case-")) / "victim"


@dataclass(frozen=True)
class Reader:
    """A command that reads a folder which may be damaged."""

    words: str
    damaged: str
    """Name of the folder that is damaged."""
    copies: tuple[str, ...] = ()
    """Other folders that it writes to."""
    result: str = "out"
    """What must be the same: what is printed (out), all files of a folder (files:FOLDER), those
    that are new there (added:FOLDER), or losses (losses:FOLDER)."""


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
"""Name → a command with the folder that is damaged."""
_SLOW = tuple(name for name in READERS if name.startswith(("train", "evaluate")))
"""Readers that are drawn less often, for they take long."""
_CONTENT = ("bit", "NUL", "swapped", "link", "deep", "appended", "cut")
"""Ways that may leave another valid file where that is text, and no digest of it is kept anywhere."""
_FREE = re.compile(
    r"(config|policy|manifest|plan|tokenizer|block-\d+|verified|evaluation|index|metrics).*\.jsonl?$|README.md|\.txt$|\.npy$"
)
_LOSSES = re.compile(r'"step": (\d+),.*?"loss": ([^,}]+)')


@dataclass(frozen=True)
class Damage:
    """A damaged file before a command."""

    reader: str
    file: str
    """Relative to the damaged folder."""
    way: str
    seed: int

    def __str__(self) -> str:
        return f"{self.reader}: {READERS[self.reader].damaged}/{self.file} {self.way} ({self.seed})"


def draw(folders: dict[str, Path], rng: random.Random) -> Iterator[Damage]:
    """Cases without end; files whose names differ in numbers alone count as one."""
    possible = [name for name, reader in READERS.items() if can_run(reader.words, folders)]
    kinds = {name: _kinds(folders[READERS[name].damaged]) for name in possible}
    while True:
        (reader,) = rng.choices(possible, [1 if name in _SLOW else 4 for name in possible])
        file = _one_of(_one_of(kinds[reader], rng), rng)
        yield Damage(reader, file, rng.choice(list(WAYS)), rng.randrange(1 << 30))


def _one_of(items: list, rng: random.Random) -> Any:
    """As `choice`, of one draw however many there are: of some kinds of files two worlds have not the same number."""
    return items[int(rng.random() * len(items))]


def _kinds(folder: Path) -> list[list[str]]:
    kinds: dict[str, list[str]] = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_file() and path.name != ".lock":
            kinds.setdefault(re.sub(r"[0-9a-f]{32}|\d+", "0", name), []).append(name)
    return list(kinds.values())


def reference(name: str, folders: dict[str, Path], root: Path) -> object:
    """What a command makes without any damage."""
    here, case = _place(name, folders, root)
    done = _run(name, here, case)
    if done.status:
        raise RuntimeError(f"{name} fails without any damage:\n{done.out}\n{done.err}")
    return result_of(READERS[name].result, here, done)


def judged(case: Damage, folders: dict[str, Path], expected: object, root: Path) -> list[str]:
    """What is wrong with what became of a damaged file."""
    reader = READERS[case.reader]
    here, place = _place(case.reader, folders, root)
    folder = here[reader.damaged]
    path, kept = folder / case.file, folder.parent / "kept"
    shutil.copytree(folder, kept, symlinks=True)
    (place / "victim").write_bytes(VICTIM)
    WAYS[case.way](path, random.Random(case.seed))
    done = _run(case.reader, here, place)
    faults = faults_of(done)
    if (place / "victim").read_bytes() != VICTIM:
        faults.append("wrote through a link")
    may_differ = (case.way in _CONTENT and _FREE.search(case.file)) or "going back to step" in done.err
    if done.status == 0 and not may_differ and result_of(reader.result, here, done) != expected:
        faults.append("status 0, and another result")
    if done.status == 0:
        return faults
    _put_back(path, kept / case.file, case.way, folder, kept)
    again = _run(case.reader, here, place)
    if again.status:
        faults.append(f"fails with the file put back: {again.err.strip()[-300:]}")
    elif result_of(reader.result, here, again) != expected:
        faults.append("another result with the file put back")
    return faults + faults_of(again)


def _place(name: str, folders: dict[str, Path], root: Path) -> tuple[dict[str, Path], Path]:
    reader = READERS[name]
    shutil.rmtree(root / "case-0", ignore_errors=True)
    place = root / "case-0"
    (place / "in").mkdir(parents=True)
    here = copied(folders, place / "in", reader.damaged, *reader.copies)
    return {**here, f"{reader.damaged} before": folders[reader.damaged], "new": place / "new"}, place


def _run(name: str, here: dict[str, Path], place: Path) -> Outcome:
    return call([word.format(**here) for word in READERS[name].words.split()], place)


def _put_back(path: Path, kept: Path, way: str, folder: Path, before: Path) -> None:
    """Puts back the file and the siblings it was swapped with, or all where the command set a checkpoint aside."""
    if not path.parent.is_dir():
        shutil.rmtree(folder)
        shutil.copytree(before, folder, symlinks=True)
        return
    for original in before.rglob("*") if way == "swapped" else (kept,):
        target = folder / original.relative_to(before)
        if original.is_file() and target.parent.is_dir() and (way != "swapped" or original.parent == kept.parent):
            if target.is_dir() and not target.is_symlink():
                shutil.rmtree(target)
            target.unlink(missing_ok=True)
            shutil.copy2(original, target)


def result_of(what: str, here: dict[str, Path], done: Outcome) -> object:
    """What a command made, so that it can be compared."""
    kind, _, name = what.partition(":")
    if kind == "none":
        return None
    first, _, rest = name.partition("/")
    folder = here[first] / rest if name else Path()
    if kind in ("files", "added"):
        files = {str(path.relative_to(folder)): path for path in folder.rglob("*") if path.is_file()}
        skipped = {".lock", "verified.json"}
        if kind == "added":
            before = here[f"{first} before"] / rest
            skipped |= {str(path.relative_to(before)) for path in before.rglob("*")}
        return {name: digest(path) for name, path in files.items() if name not in skipped}
    if kind == "losses":
        return dict(_LOSSES.findall((folder / "metrics.jsonl").read_text()))
    return [line for line in done.out.splitlines() if "━" not in line and "%|" not in line]
