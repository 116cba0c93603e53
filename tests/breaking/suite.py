"""The five kinds of cases, each a stream that is fixed by a seed, and the flags and references that judge them."""

import dataclasses
import json
import random
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from breaking import calls, damage, kills
from breaking.world import can_run

Kind = Literal["calls", "files", "kills", "disks", "twice"]
KINDS: tuple[Kind, ...] = get_args(Kind)
_CASES = {"calls": calls.Call, "files": damage.Damage, "kills": kills.Incident, "disks": kills.Incident}
_CASES["twice"] = kills.Incident
_SLOW = ("train", "evaluate", "study", "benchmark")
_INCIDENTS = {"kills": "killed", "disks": "disk", "twice": "twice"}


@dataclass
class Suite:
    """Judges cases in a world, and remembers the flags and the reference outcomes of its commands."""

    folders: dict[str, Path]
    """Name → path of the folders of the world."""
    scratch: Path
    """Folder for the files of one case at a time."""
    is_quick: bool = False
    """Whether only cases that take little time are possible."""
    flags: dict[str, list[calls.Flag]] = field(default_factory=dict)
    """Base → its flags."""
    references: dict[tuple[str, str], Any] = field(default_factory=dict)
    """Module and name of a command → its outcome without damage or incident."""

    def cases(self, kind: Kind, seed: int) -> Iterator[Any]:
        """Endless stream of the cases of a kind."""
        rng = random.Random(f"{kind} {seed}")
        if kind == "calls":
            return calls.draw(self._flags(), rng)
        if kind == "files":
            return damage.draw(self.folders, rng)
        return kills.draw(self.folders, rng, _INCIDENTS[kind])

    def faults(self, kind: Kind, case: Any) -> list[str]:
        """Tries a case and returns its faults."""
        shutil.rmtree(self.scratch, ignore_errors=True)
        self.scratch.mkdir(parents=True)
        if kind == "calls":
            return calls.judged(case, self.folders, self.scratch)
        judges: Any = damage if kind == "files" else kills
        name = case.reader if kind == "files" else case.writer
        key = (judges.__name__, name)
        if key not in self.references:
            self.references[key] = judges.reference(name, self.folders, self.scratch)
        return judges.judged(case, self.folders, self.references[key], self.scratch)

    def _flags(self) -> dict[str, list[calls.Flag]]:
        if not self.flags:
            self.flags |= {
                base: calls.flags_of(base, self.folders["sources"].parent) for base in calls.bases(self.folders)
            }
        return self.flags

    def is_possible(self, kind: Kind, case: Any) -> bool:
        """Whether the world has the folders that the case needs; in a quick run also, whether it takes little time."""
        if kind == "calls":
            is_short = case.must_refuse or not case.base.startswith(_SLOW)
            return case.base in calls.bases(self.folders) and (is_short or not self.is_quick)
        table: Any = damage.READERS if kind == "files" else kills.WRITERS
        name = case.reader if kind == "files" else case.writer
        return can_run(table[name].words, self.folders) and not (
            self.is_quick and (name.startswith(_SLOW) or "workers" in name)
        )


def recorded_cases(path: Path) -> list[tuple[Kind, Any]]:
    """Cases of the file at `path`, which had a fault once; empty if there is no file."""
    lines = path.read_text().splitlines() if path.exists() else []
    contents = map(json.loads, lines)
    return [(content["kind"], from_json(content["kind"], content["case"])) for content in contents]


def to_json(case: Any) -> dict[str, Any]:
    """A case as JSON types."""
    return dataclasses.asdict(case)


def from_json(kind: Kind, content: dict[str, Any]) -> Any:
    """The case that `to_json` wrote."""
    return _CASES[kind](**{name: tuple(value) if isinstance(value, list) else value for name, value in content.items()})
