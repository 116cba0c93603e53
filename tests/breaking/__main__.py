"""`make break SEED=7`: draws bad calls, damaged files, kills, full disks and commands that run twice at once.

Every verdict is written to .breaking/ at once, so that the same command continues where it was stopped. A fault is
printed on one line, with the command that repeats it; with --keep it becomes a case of tests/breaking/cases.jsonl,
which every later run tries first.
"""

import atexit
import json
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import compiling
import tyro
from breaking.running import prepare_to_fork
from breaking.suite import KINDS, Kind, Suite, recorded_cases, to_json
from breaking.world import COMMANDS, make_world
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

_QUICK = ("prepare",)
"""Commands that make the world of a quick run."""
CASES = Path(__file__).with_name("cases.jsonl")
"""File of the cases that had a fault once."""
console = Console()


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Draw cases by a seed, try them, and report their faults."""

    seed: int
    """Seed of the draw. Larger numbers of cases with the same seed draw the same cases and more."""
    calls: int = 1000
    """Number of calls with a bad value."""
    files: int = 1000
    """Number of damaged files."""
    kills: int = 100
    """Number of commands that are killed."""
    disks: int = 50
    """Number of commands whose disk fills up."""
    twice: int = 30
    """Number of commands that run twice at once."""
    quick: bool = False
    """Try only commands on prepared data, which is made in seconds, and only cases that take little time."""
    only: str | None = None
    """Single case to try, as KIND:NUMBER. None: all cases."""
    jobs: int = 2
    """Number of cases to try at once."""
    keep: bool = False
    """Add cases with a fault to tests/breaking/cases.jsonl."""


def main(arguments: Arguments, root: Path) -> int:
    """Tries all cases and returns the exit status: 1 if a case has a fault, else 0."""
    compiling.settle(_at_exit_of_this_process)
    prepare_to_fork()
    folder = root / ".breaking" / f"seed-{arguments.seed}"
    scratch = Path(tempfile.mkdtemp(prefix="trimask-breaking-"))
    try:
        with console.status("making a world to break") as status:
            names = _QUICK if arguments.quick else tuple(COMMANDS)
            folders = make_world(
                scratch / "world", names, lambda name: status.update(f"making a world to break: {name}")
            )
        wanted = _wanted(arguments)
        if arguments.only is not None:
            kind, _, number = arguments.only.partition(":")
            wanted, folder = {kind: range(int(number), int(number) + 1)}, scratch
        folder.mkdir(parents=True, exist_ok=True)
        _judge(arguments, folders, scratch, folder, wanted)
        return _summary(arguments, folder, wanted)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _wanted(arguments: Arguments) -> dict[Kind, range]:
    """Kind → numbers of its cases to try."""
    return {kind: range(getattr(arguments, kind)) for kind in KINDS}


def _judge(
    arguments: Arguments, folders: dict[str, Path], scratch: Path, folder: Path, wanted: dict[Kind, range]
) -> None:
    """Tries the cases without a verdict in several processes, and shows faults and progress."""
    known = {(line["kind"], line["number"]) for line in _verdicts(folder)}
    total = sum(map(len, wanted.values()))
    workers = []
    for job in range(arguments.jobs):
        number = os.fork()
        if not number:
            _work(arguments, folders, scratch / f"job-{job}", folder, wanted, known, job)
        workers.append(number)
    columns = (TextColumn("cases"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("left"))
    seen = len(known)
    _at_exit_of_this_process(partial(_stop, workers))
    with Progress(*columns, TimeRemainingColumn(), console=console, speed_estimate_period=600) as progress:
        task = progress.add_task("cases", total=total, completed=len(known))
        while workers:
            workers[:] = [number for number in workers if os.waitpid(number, os.WNOHANG) == (0, 0)]
            time.sleep(1)
            verdicts = _verdicts(folder)
            for line in verdicts[seen:]:
                if line["faults"]:
                    console.print(_described(arguments, line), markup=False, highlight=False, soft_wrap=True)
            seen = len(verdicts)
            progress.update(task, completed=seen)


def _at_exit_of_this_process(function: Callable[[], Any]) -> None:
    """Calls a function at the end of this process, but not of processes that are forked from it."""
    this_process = os.getpid()
    atexit.register(lambda: function() if os.getpid() == this_process else None)


def _stop(workers: list[int]) -> None:
    """Kills the processes that try cases; a command that they have started ends by its own time limit."""
    for number in workers:
        with suppress(ProcessLookupError):
            os.kill(number, signal.SIGKILL)


def _work(
    arguments: Arguments,
    folders: dict[str, Path],
    scratch: Path,
    folder: Path,
    wanted: dict[Kind, range],
    known: set[tuple[str, int]],
    job: int,
) -> None:
    """Tries every case whose number modulo the number of jobs is `job`, and ends the process."""
    suite = Suite(folders, scratch, arguments.quick)
    for number, (kind, case) in enumerate(recorded_cases(CASES)):
        is_ours = number % arguments.jobs == job and ("kept", number) not in known
        if arguments.only is None and is_ours and suite.is_possible(kind, case):
            _note(folder, "kept", number, kind, case, suite)
    streams = {kind: suite.cases(kind, arguments.seed) for kind, numbers in wanted.items() if numbers}
    for number in range(max(numbers.stop for numbers in wanted.values())):
        for kind, stream in streams.items():
            case = next(stream)
            is_ours = number in wanted[kind] and number % arguments.jobs == job and (kind, number) not in known
            if is_ours and suite.is_possible(kind, case):
                _note(folder, kind, number, kind, case, suite)
    os._exit(0)


def _note(folder: Path, label: str, number: int, kind: Kind, case: Any, suite: Suite) -> None:
    """Tries a case and appends its verdict to verdicts.jsonl."""
    began = time.monotonic()
    try:
        faults = suite.faults(kind, case)
    except Exception as error:
        faults = [f"the harness fails: {error!r}"]
    line = {"kind": label, "number": number, "case": to_json(case), "faults": faults, "described": str(case)}
    line["seconds"] = round(time.monotonic() - began, 1)
    with (folder / "verdicts.jsonl").open("a") as file:
        file.write(json.dumps(line) + "\n")


def _verdicts(folder: Path) -> list[dict]:
    """Verdicts so far, without a line that is still being written."""
    path = folder / "verdicts.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("}")]


def _described(arguments: Arguments, line: dict) -> str:
    """A verdict with faults in one line, with the command that repeats its case."""
    only = "" if line["kind"] == "kept" else f" ONLY={line['kind']}:{line['number']}"
    again = f"make break SEED={arguments.seed}{only}"
    return f"{line['kind']} {line['described']}: {'; '.join(line['faults'])} [{again}]"


def _summary(arguments: Arguments, folder: Path, wanted: dict[Kind, range]) -> int:
    """Prints a line for each kind, adds faulty cases to the file if `--keep` is given, and returns the exit status."""
    wanted = {**wanted, "kept": range(10**9)}
    lines = [line for line in _verdicts(folder) if line["number"] in wanted.get(line["kind"], ())]
    for kind in wanted:
        of_kind = [line for line in lines if line["kind"] == kind]
        faulty = sum(bool(line["faults"]) for line in of_kind)
        console.print(f"{kind}: {len(of_kind):,} cases, {faulty:,} with a fault, seed {arguments.seed}")
    faults = [line for line in lines if line["faults"]]
    if arguments.keep:
        with CASES.open("a") as file:
            for line in faults:
                if line["kind"] != "kept":
                    file.write(json.dumps({name: line[name] for name in ("kind", "case", "faults")}) + "\n")
    return 1 if faults else 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    sys.exit(main(tyro.cli(Arguments), Path.cwd()))
