"""Results of mutants: kept as JSON lines, and counted by folder."""

import json
import tomllib
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from mutation.copies import Verdict
from mutation.mutants import Identity, Mutant
from rich.table import Table

STATUSES = ("caught", "timed out", "survived", "not executed", "equivalent")


@dataclass(frozen=True)
class Result:
    """A mutant and the verdict on it."""

    file: str
    function: str
    line: int
    kind: str
    before: str
    after: str
    diff: str
    status: str
    """One of STATUSES."""
    test: str
    """The test that failed or hung."""
    why: str
    tests_run: int
    seconds: float

    @property
    def described(self) -> str:
        """The result in one line."""
        return f"{self.status:12}  {self.file}:{self.line}  {self.kind}  {self.test} {self.why}".rstrip()


def result_of(mutant: Mutant, verdict: Verdict, seconds: float = 0.0) -> Result:
    """Result of a mutant with this verdict, which took `seconds`."""
    (file, function, before, after), line = mutant.identity, mutant.statement.node.lineno
    verdict_of = (verdict.status, verdict.test, verdict.why, verdict.tests_run)
    return Result(file, function, line, mutant.kind, before, after, mutant.diff, *verdict_of, round(seconds, 1))


Key = tuple[str, int, str]


def read_results(path: Path) -> dict[Key, Result]:
    """File, line and diff of a mutant → its result, read from `path`; empty if there is no file."""
    lines = path.read_text().splitlines() if path.exists() else []
    results = (Result(**json.loads(line)) for line in lines)
    return {(result.file, result.line, result.diff): result for result in results}


def write_results(path: Path, results: Iterable[Result]) -> None:
    """Replaces the file at `path` atomically, so that it is complete whenever the command is killed."""
    new = path.with_suffix(".new")
    new.write_text("".join(f"{json.dumps(asdict(result))}\n" for result in results))
    new.replace(path)


def equivalents(text: str) -> dict[Identity, str]:
    """Identity of an equivalent mutant, which no test can notice → the reason, from a TOML text."""
    entries = tomllib.loads(text).get("equivalent", [])
    return {(entry["file"], entry["function"], entry["before"], entry["after"]): entry["reason"] for entry in entries}


def stale_equivalents(known: Iterable[Identity], sources: Mapping[str, str]) -> list[Identity]:
    """Equivalent mutants whose lines the sources no longer contain."""
    lines = {file: {line.strip() for line in source.splitlines()} for file, source in sources.items()}
    return [one for one in known if not set(one[2].splitlines()) <= lines.get(one[0], set())]


def disproved(results: Iterable[Result], failing: Collection[str]) -> list[Result]:
    """The results, in which mutants caught only by tests that fail on the original code too have survived."""
    return [
        replace(result, status="survived", why=f"{result.test} fails on the original code too")
        if result.status == "caught" and result.test in failing
        else result
        for result in results
    ]


def caught_share(results: Collection[Result]) -> float:
    """Share of caught mutants among those that are not equivalent."""
    counts = Counter(result.status for result in results)
    return counts["caught"] / max(len(results) - counts["equivalent"], 1)


def results_table(results: Iterable[Result]) -> Table:
    """Table of the number of mutants of every status, by folder."""
    counts: dict[str, Counter[str]] = {}
    for result in results:
        for row in (str(Path(result.file).parent), "all"):
            counts.setdefault(row, Counter())[result.status] += 1
    shown = Table("folder", *STATUSES, "drawn")
    for row in sorted(counts, key=lambda name: (name == "all", name)):
        shown.add_row(row, *(f"{counts[row][status]}" for status in STATUSES), f"{counts[row].total()}")
    return shown
