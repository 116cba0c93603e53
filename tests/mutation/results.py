"""Verdicts on mutants: kept as JSON lines, counted by folder and shown with the diffs of those that survived."""

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
    """What became of one mutant."""

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
    """A verdict with the mutant it is about."""
    (file, function, before, after), line = mutant.identity, mutant.statement.node.lineno
    verdict_of = (verdict.status, verdict.test, verdict.why, verdict.tests_run)
    return Result(file, function, line, mutant.kind, before, after, mutant.diff, *verdict_of, round(seconds, 1))


Key = tuple[str, int, str]


def read(path: Path) -> dict[Key, Result]:
    """Results of a file by file, line and diff of their mutant; none if there is no file."""
    lines = path.read_text().splitlines() if path.exists() else []
    results = (Result(**json.loads(line)) for line in lines)
    return {(result.file, result.line, result.diff): result for result in results}


def write(path: Path, results: Iterable[Result]) -> None:
    """Replaces the file in one step, so that it is whole whenever the command is killed."""
    new = path.with_suffix(".new")
    new.write_text("".join(f"{json.dumps(asdict(result))}\n" for result in results))
    new.replace(path)


def equivalents(text: str) -> dict[Identity, str]:
    """Mutants that change nothing a test could see → the reason, from a TOML text."""
    entries = tomllib.loads(text).get("equivalent", [])
    return {(entry["file"], entry["function"], entry["before"], entry["after"]): entry["reason"] for entry in entries}


def stale(known: Iterable[Identity], sources: Mapping[str, str]) -> list[Identity]:
    """Equivalents whose lines the sources no longer contain."""
    lines = {file: {line.strip() for line in source.splitlines()} for file, source in sources.items()}
    return [one for one in known if not set(one[2].splitlines()) <= lines.get(one[0], set())]


def disproved(results: Iterable[Result], failing: Collection[str]) -> list[Result]:
    """The results, where tests that fail on the original code too have caught nothing."""
    return [
        replace(result, status="survived", why=f"{result.test} fails on the original code too")
        if result.status == "caught" and result.test in failing
        else result
        for result in results
    ]


def share(results: Collection[Result]) -> float:
    """Share of the mutants that were caught, equivalent ones apart."""
    counts = Counter(result.status for result in results)
    return counts["caught"] / max(len(results) - counts["equivalent"], 1)


def table(results: Iterable[Result]) -> Table:
    """Number of mutants of every status, by folder."""
    counts: dict[str, Counter[str]] = {}
    for result in results:
        for row in (str(Path(result.file).parent), "all"):
            counts.setdefault(row, Counter())[result.status] += 1
    shown = Table("folder", *STATUSES, "drawn")
    for row in sorted(counts, key=lambda name: (name == "all", name)):
        shown.add_row(row, *(f"{counts[row][status]}" for status in STATUSES), f"{counts[row].total()}")
    return shown
