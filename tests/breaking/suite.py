"""The five kinds of cases, each a stream that a seed fixes, and what their verdicts need: helps and references."""

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
_CASES = {"calls": calls.Call, "files": damage.Damage, "kills": kills.Trouble, "disks": kills.Trouble}
_CASES["twice"] = kills.Trouble
_SLOW = ("train", "evaluate", "study", "benchmark")
_TROUBLE = {"kills": "killed", "disks": "disk", "twice": "twice"}


@dataclass
class Suite:
    """Judges cases in a world; what it finds out about commands without any trouble it remembers."""

    folders: dict[str, Path]
    scratch: Path
    is_quick: bool = False
    flags: dict[str, list[calls.Flag]] = field(default_factory=dict)
    references: dict[tuple[str, str], Any] = field(default_factory=dict)

    def cases(self, kind: Kind, seed: int) -> Iterator[Any]:
        """The cases of a kind, without end."""
        rng = random.Random(f"{kind} {seed}")
        if kind == "calls":
            return calls.draw(self._flags(), rng)
        if kind == "files":
            return damage.draw(self.folders, rng)
        return kills.draw(self.folders, rng, _TROUBLE[kind])

    def faults(self, kind: Kind, case: Any) -> list[str]:
        """What is wrong with what becomes of a case."""
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
        """Whether the world has what the case needs, and where time is short, whether it takes little of it."""
        if kind == "calls":
            is_short = case.must_refuse or not case.base.startswith(_SLOW)
            return case.base in calls.bases(self.folders) and (is_short or not self.is_quick)
        table: Any = damage.READERS if kind == "files" else kills.WRITERS
        name = case.reader if kind == "files" else case.writer
        return can_run(table[name].words, self.folders) and not (
            self.is_quick and (name.startswith(_SLOW) or "workers" in name)
        )


def kept(path: Path) -> list[tuple[Kind, Any]]:
    """Cases of a file: those that had a fault once."""
    lines = path.read_text().splitlines() if path.exists() else []
    contents = map(json.loads, lines)
    return [(content["kind"], from_json(content["kind"], content["case"])) for content in contents]


def to_json(case: Any) -> dict[str, Any]:
    """A case as plain JSON."""
    return dataclasses.asdict(case)


def from_json(kind: Kind, content: dict[str, Any]) -> Any:
    """A case from plain JSON."""
    return _CASES[kind](**{name: tuple(value) if isinstance(value, list) else value for name, value in content.items()})
