"""`make mutate N=100 SEED=7`: changes statements drawn at random, one at a time, and shows which changes tests catch.

The lines that each test executes are recorded once for a state of sources and tests. Every verdict is written to
.mutation/ at once, so that the same command continues where it was stopped.
"""

import json
import math
import queue
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import tyro
from mutation.copies import Copy, Limits, Verdict, files_of, judge, make_copy, rooms_of, run_tests, stop_all
from mutation.mutants import Identity, Mutant, draw_mutants
from mutation.recording import Recording, record_coverage, state_digest
from mutation.results import (
    Result,
    caught_share,
    disproved,
    equivalents,
    read_results,
    result_of,
    results_table,
    write_results,
)
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

EQUIVALENTS = Path("tests/mutation/equivalents.toml")
STANDARD = 0.93
"""Share of the mutants, equivalent ones apart, that the tests must catch."""
console = Console()


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Change statements drawn at random, one at a time, and show which changes the tests catch."""

    number: int
    """Number of mutants."""
    seed: int
    """Seed of the draw. A larger number with the same seed draws the same statements and more."""
    jobs: int = 2
    """Number of mutants to try at once."""
    patience_s: float = 60.0
    """Time in seconds that a test may take in addition to ten times its recorded time; a test that takes longer counts
    as hanging."""
    cap_s: float = 900.0
    """Time in seconds that all tests of one mutant may take together."""


def main(arguments: Arguments, root: Path) -> int:
    """Tests the mutants and returns the exit status: 0 if the tests catch the share that the standard requires."""
    files = files_of(root)
    rooms = tuple(f"{room}/" for room in rooms_of(root).values())
    sources = {name: (root / name).read_text() for name in files if name.startswith(rooms) and name.endswith(".py")}
    drawn = list(islice(draw_mutants(sources, arguments.seed), arguments.number))
    kept, state = root / ".mutation", state_digest(root, files)
    with tempfile.TemporaryDirectory(prefix="trimask-mutation-") as scratch, ThreadPoolExecutor(arguments.jobs) as pool:
        try:
            copies = [make_copy(root, files, Path(scratch, f"{n}"), kept / "compiled") for n in range(arguments.jobs)]
            recording = _recorded(copies[0], kept / state, arguments.jobs)
            limits = Limits(recording.seconds, arguments.patience_s, arguments.cap_s)
            path, known = kept / f"{state}-seed-{arguments.seed}.jsonl", equivalents((root / EQUIVALENTS).read_text())
            judged = _judged(drawn, known, path, recording, limits, copies, pool)
            results = disproved(judged, _failing(judged, limits, copies[0], kept / f"{state}-control.json"))
        except BaseException:
            stop_all()
            raise
    console.print(results_table(results))
    for result in results:
        if result.status not in ("caught", "equivalent"):
            console.print(f"\n{result.described}\n{result.diff}", markup=False, highlight=False, soft_wrap=True)
    console.print(
        f"\nThe tests catch {caught_share(results):.1%} of the mutants that are not equivalent; "
        f"standard {STANDARD:.0%}."
    )
    return 0 if caught_share(results) >= STANDARD else 1


def _recorded(copy: Copy, folder: Path, jobs: int) -> Recording:
    """Recording in a folder, made if it does not exist."""
    recording = Recording(folder)
    if not folder.exists():
        with _bar("recording coverage by test") as report:
            record_coverage(copy, folder, jobs, report)
    for test in sorted(recording.failing):
        console.print(f"left out, since it fails on the original code: {test}", markup=False)
    return recording


def _judged(
    drawn: Collection[Mutant],
    known: Mapping[Identity, str],
    path: Path,
    recording: Recording,
    limits: Limits,
    copies: list[Copy],
    pool: ThreadPoolExecutor,
) -> list[Result]:
    """Results of the drawn mutants, in their order. Mutants that are neither equivalent nor in the file are tested."""
    free = queue.SimpleQueue[Copy]()
    for copy in copies:
        free.put(copy)

    def judged(mutant: Mutant) -> Result:
        began, copy = time.monotonic(), free.get()
        try:
            with copy.holding(mutant):
                verdict = judge(copy, recording.choose(mutant.statement), limits)
        finally:
            free.put(copy)
        return result_of(mutant, verdict, time.monotonic() - began)

    results = read_results(path)
    todo = [one for one in drawn if one.key not in results and one.identity not in known]
    with _bar("testing mutants") as report:
        report(0, len(todo))
        for done, future in enumerate(as_completed([pool.submit(judged, mutant) for mutant in todo]), 1):
            result = future.result()
            results[result.file, result.line, result.diff] = result
            write_results(path, results.values())
            console.print(result.described, markup=False, highlight=False, soft_wrap=True)
            report(done, len(todo))
    equivalent = {one.key: Verdict("equivalent", why=known[one.identity]) for one in drawn if one.identity in known}
    return [result_of(one, equivalent[one.key]) if one.key in equivalent else results[one.key] for one in drawn]


def _failing(results: list[Result], limits: Limits, copy: Copy, path: Path) -> set[str]:
    """Tests that caught a mutant but fail on the original code too, without the tests that usually run before them."""
    passes = json.loads(path.read_text()) if path.exists() else {}
    caught_by = {result.test for result in results if result.status == "caught"}
    if unknown := (caught_by & limits.seconds.keys()) - passes.keys():
        console.print(f"running the {len(unknown)} tests that caught a mutant on the original code")
        outcome = run_tests(copy, sorted(unknown), limits, math.inf, "--maxfail=0")
        passes |= {test: test in outcome.ended and test not in outcome.failed for test in unknown}
        path.write_text(json.dumps(passes, indent=1))
    return {test for test, does_pass in passes.items() if not does_pass}


class _PerMinute(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text(f"{60 * (task.finished_speed or task.speed or 0):.1f}/min")


@contextmanager
def _bar(what: str) -> Iterator[Callable[[int, int], None]]:
    """Context of a progress bar; the function it gives takes the number done and the total number."""
    columns = (TextColumn(what), BarColumn(), MofNCompleteColumn(), _PerMinute(), TimeElapsedColumn())
    left = (TextColumn("left"), TimeRemainingColumn())
    with Progress(*columns, *left, console=console, speed_estimate_period=1800) as progress:
        task = progress.add_task(what, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total or None)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    sys.exit(main(tyro.cli(Arguments), Path.cwd()))
