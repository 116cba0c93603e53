"""The five kinds of cases, each a stream that a seed fixes, and what their verdicts need: helps and references."""

import dataclasses
import random
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Literal, get_args

from breaking import calls, damage, kills

Kind = Literal["calls", "files", "kills", "disks", "twice"]
KINDS: tuple[Kind, ...] = get_args(Kind)
_CASES = {"calls": calls.Call, "files": damage.Damage, "kills": kills.Trouble, "disks": kills.Trouble}
_CASES["twice"] = kills.Trouble
_TROUBLE = {"kills": "killed", "disks": "disk", "twice": "twice"}


@dataclass
class Suite:
    """Judges cases in a world; what it finds out about commands without any trouble it remembers."""

    folders: dict[str, Path]
    scratch: Path
    flags: dict[str, list[calls.Flag]] = field(default_factory=dict)
    references: dict[tuple[str, str], Any] = field(default_factory=dict)

    def cases(self, kind: Kind, seed: int) -> Iterator[Any]:
        """The cases of a kind, without end."""
        rng = random.Random(f"{kind} {seed}")
        if kind == "calls":
            return calls.draw(self._flags(), rng)
        if kind == "files":
            return damage.draw(self.folders, rng)
        return kills.draw(rng, _TROUBLE[kind])

    def case(self, kind: Kind, seed: int, number: int) -> Any:
        """One of them."""
        return next(islice(self.cases(kind, seed), number, None))

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
            self.flags |= {base: calls.flags_of(base, self.folders["sources"].parent) for base in calls.BASES}
        return self.flags


def to_json(case: Any) -> dict[str, Any]:
    """A case as plain JSON."""
    return dataclasses.asdict(case)


def from_json(kind: Kind, content: dict[str, Any]) -> Any:
    """A case from plain JSON."""
    return _CASES[kind](**{name: tuple(value) if isinstance(value, list) else value for name, value in content.items()})
