"""Recording of the lines that each test executes, in all tests and in the processes that they start."""

import hashlib
import json
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import coverage
from mutation.copies import Copy, events_in, kill, rooms_of, start_pytest
from mutation.mutants import Statement
from mutation.plugin import CONTEXT

_CONFIG = """
[run]
data_file = {data}
parallel = true
include = {include}
context = ${{{context}-}}
patch = _exit
"""
_READS_DEFINITIONS = "tests/test_defaults.py"
_OF_THIS_TOOL = ("tests/mutation/", "tests/test_mutate.py")


@dataclass(frozen=True)
class Recording:
    """Lines that every test executed, kept in a folder."""

    folder: Path

    @cached_property
    def _events(self) -> list[dict]:
        return events_in(self.folder / "events")

    @cached_property
    def failing(self) -> set[str]:
        """Tests that failed on the original code, and therefore cannot catch a mutant."""
        return {event["test"] for event in self._events if event["event"] == "failed"}

    @cached_property
    def seconds(self) -> dict[str, float]:
        """Test that passed → its time in seconds, including the fixtures that it set up."""
        ended = [event for event in self._events if event["event"] == "end"]
        return {event["test"]: event["seconds"] for event in ended if event["test"] not in self.failing}

    @cached_property
    def _users(self) -> dict[str, set[str]]:
        """Coverage context → its tests. The lines of a shared fixture count for every test that uses the fixture."""
        users = {test: {test} for test in self.seconds}
        for event in self._events:
            if event["event"] == "end" and event["test"] in self.seconds:
                for fixture in event["shared"]:
                    users.setdefault(fixture, set()).add(event["test"])
        return users

    @cached_property
    def _data(self) -> coverage.CoverageData:
        data = coverage.CoverageData(str(self.folder / "coverage"))
        data.read()
        return data

    def choose(self, statement: Statement) -> list[str]:
        """Tests to run on a mutant of a statement: those of the module's own test file first, then the quickest files.

        They are the tests that execute the statement; for one that runs at import, all tests that use its file, and
        those that read definitions. A compiled function runs as Python only in the first test that needs it, and a
        later test may execute nothing else of the file; therefore the other tests of the same test files come last.
        """
        paths = [path for path in self._data.measured_files() if path.endswith(f"/tree/{statement.file}")]
        contexts = [pair for path in paths for pair in self._data.contexts_by_lineno(path).items()]
        using = self._expand(name for _, names in contexts for name in names)
        executing = self._expand(name for line, names in contexts if line in statement.lines for name in names)
        first = using | self._reading if statement.runs_at_import else executing
        own = f"tests/test_{Path(statement.file).stem}.py"
        files = {_file(test) for test in first}
        beside = using if statement.runs_at_import else self.seconds.keys()
        later = {test for test in beside if _file(test) in files} - first
        return [*self._ordered(first, own), *self._ordered(later, own)]

    @cached_property
    def _reading(self) -> set[str]:
        """Tests that read the definitions of all modules without executing them."""
        return {test for test in self.seconds if _file(test) == _READS_DEFINITIONS}

    def _expand(self, contexts: Iterable[str]) -> set[str]:
        return {test for context in set(contexts) for test in self._users.get(context, ())}

    def _ordered(self, tests: set[str], own: str) -> list[str]:
        """Sorts tests file by file, so that shared fixtures are set up once: the file `own` first, then by time."""
        totals: dict[str, float] = {}
        for test in tests:
            totals[_file(test)] = totals.get(_file(test), 0.0) + self.seconds[test]
        return sorted(tests, key=lambda t: (_file(t) != own, totals[_file(t)], _file(t), self.seconds[t], t))


def _file(test: str) -> str:
    return test.split("::")[0]


def state_digest(root: Path, files: Iterable[str]) -> str:
    """Digest of the sources and of all files of the tests, without those of this tool."""
    digest = hashlib.sha256()
    for name in sorted(files):
        is_code = name.endswith((".py", ".toml", ".jinja", "constraints.txt")) or name.startswith("tests/")
        if is_code and not name.startswith(_OF_THIS_TOOL):
            digest.update(f"{name}\0".encode() + (root / name).read_bytes() + b"\0")
    return digest.hexdigest()[:12]


def record_coverage(copy: Copy, folder: Path, jobs: int, report: Callable[[int, int], None]) -> Recording:
    """Runs all tests of a copy with coverage, and keeps the recording in `folder`.

    If an earlier call was stopped, the tests that ended then do not run again. Raises RuntimeError if pytest fails for
    another reason than failing tests.
    """
    work = folder.with_suffix(".partial").absolute()
    work.mkdir(parents=True, exist_ok=True)
    told, config, start = work / "events", work / "config", copy.site / "sitecustomize.py"
    told.write_text("".join(f"{json.dumps(event)}\n" for event in (events_in(told) if told.exists() else ())))
    include = ", ".join(f"{copy.tree.resolve()}/{room}/*" for room in rooms_of(copy.tree).values())
    config.write_text(_CONFIG.format(data=work / "coverage", include=include, context=CONTEXT))
    start.write_text("import coverage\n\ncoverage.process_startup()\n")  # Python runs it first, in every process
    options = ("-n", f"{jobs}", "--dist", "loadfile") if jobs > 1 else ()
    with (work / "log").open("w") as log:
        process = start_pytest(copy, options, log, MUTATION_EVENTS=told, COVERAGE_PROCESS_START=config)
        try:
            while process.poll() is None:
                time.sleep(0.5)
                events = events_in(told)
                totals = (event["tests"] for event in events if event["event"] == "collected")
                report(sum(event["event"] == "end" for event in events), next(totals, 0))
        finally:
            kill(process)
            start.unlink()
    if process.returncode not in (0, 1, 5):  # passed, failed, nothing left to run
        raise RuntimeError(f"tests of the original code ended with status {process.returncode}: see {log.name}")
    combined = coverage.Coverage(config_file=str(config))
    combined.combine()
    combined.save()
    return Recording(work.rename(folder))
