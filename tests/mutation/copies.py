"""A copy of the project that may contain a mutant, and tests that run there under time limits.

`import trimask` imports the copy in every process that a test starts, since a folder with a link to it is first on
PYTHONPATH. The working tree is never changed.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from itertools import count
from pathlib import Path
from typing import IO, Literal

from mutation.mutants import Mutant
from mutation.plugin import CONTEXT

_MAX_HANGS = 2
"""Number of hanging tests after which the remaining tests are not run."""
_mtimes = count(1_000_000_000)
"""Times of last change for files, each used once: Python reuses a cached module if time and size are the same."""
_started: set[subprocess.Popen] = set()
_is_stopping = threading.Event()


@dataclass(frozen=True)
class Copy:
    """A copy of the project in a folder of its own."""

    folder: Path
    compiled: Path
    """Folder of XLA's compilation cache, shared by all copies."""

    @property
    def tree(self) -> Path:
        return self.folder / "tree"

    @property
    def site(self) -> Path:
        return self.folder / "site"

    def environment(self, **more: str | Path) -> dict[str, str]:
        """Environment of a process that imports this copy."""
        paths = (str(self.site), os.environ.get("PYTHONPATH"))
        ours = {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "TMPDIR": str(self.folder / "tmp")}
        ours |= {"JAX_COMPILATION_CACHE_DIR": str(self.compiled), "PYTEST_ADDOPTS": "", CONTEXT: ""}
        return os.environ | ours | {name: str(value) for name, value in more.items()}

    @contextmanager
    def holding(self, mutant: Mutant) -> Iterator[None]:
        """Context in which the copy contains a mutant; afterwards it has the original code again."""
        path = self.tree / mutant.statement.file
        _write(path, mutant.text)
        try:
            yield
        finally:
            _write(path, mutant.statement.source)


def _write(path: Path, text: str) -> None:
    path.write_text(text)
    moment = next(_mtimes)
    os.utime(path, (moment, moment))


def files_of(root: Path) -> list[str]:
    """Paths of the files that git tracks or does not ignore."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(command, cwd=root, check=True, capture_output=True, text=True).stdout.split("\0")
    return sorted(name for name in set(names) if (root / name).is_file())


def rooms_of(root: Path) -> dict[str, str]:
    """Name of every top-level package of the project → its folder."""
    packages = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["setuptools"]["package-dir"]
    return {name: folder for name, folder in packages.items() if "/" not in folder}


def make_copy(root: Path, files: Iterable[str], folder: Path, compiled: Path) -> Copy:
    """Copies the files into `folder`. Raises RuntimeError if Python does not import the copies."""
    copy = Copy(folder, compiled)
    for name in files:
        (copy.tree / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(root / name, copy.tree / name)
    rooms = rooms_of(root)
    for name, room in rooms.items():
        link = copy.site.joinpath(*name.split("."))
        if link.parent.is_symlink():  # a package, named before its rooms, that finds them beside the copy of itself
            continue
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(copy.tree / room)
    (folder / "tmp").mkdir()
    shutil.copy(Path(__file__).with_name("plugin.py"), copy.site / "mutation_plugin.py")
    code = "import sys\nfor name in sys.argv[1:]: print(__import__(name, fromlist=['']).__path__[0])"
    command = [sys.executable, "-c", code, *rooms]
    how = {"cwd": copy.tree, "env": copy.environment(), "check": True, "capture_output": True, "text": True}
    paths = subprocess.run(command, **how).stdout.split()
    if outside := [path for path in paths if not Path(path).resolve().is_relative_to(copy.tree.resolve())]:
        raise RuntimeError(f"Python imports {', '.join(outside)} rather than the copy in {copy.tree}")
    return copy


@dataclass(frozen=True)
class Limits:
    """Time limits of tests, in seconds."""

    seconds: Mapping[str, float]
    """Test → its time on the original code."""
    patience: float
    """Time that every test is granted."""
    cap: float
    """Time that all tests of a mutant may take together."""

    def timeout_s(self, test: str) -> float:
        """Time in seconds after which a test counts as hanging.

        It is generous, since the test may have to compile functions, or to set up what the tests of its file share,
        which another test did when the times were recorded.
        """
        of_file = self._seconds_of_files.get(test.split("::")[0], 0.0)
        return self.patience + 10 * self.seconds.get(test, 0.0) + 3 * of_file

    @cached_property
    def _seconds_of_files(self) -> dict[str, float]:
        """File → time of all its tests together."""
        totals: dict[str, float] = {}
        for test, seconds in self.seconds.items():
            totals[test.split("::")[0]] = totals.get(test.split("::")[0], 0.0) + seconds
        return totals


@dataclass(frozen=True)
class PytestRun:
    """Outcome of one pytest process."""

    ended: set[str]
    """Tests that ended, passed or failed."""
    failed: dict[str, str]
    """Test that failed → its error."""
    running: str
    """The test that did not end; empty if there is none."""
    status: int | None
    """Exit status; None if the process was killed because a test took too long."""


@dataclass(frozen=True)
class Verdict:
    """Verdict on a mutant."""

    status: Literal["caught", "survived", "timed out", "not executed", "equivalent"]
    test: str = ""
    """The test that failed, or the first that hung."""
    why: str = ""
    """Error of the test, or another reason for the status."""
    tests_run: int = 0
    """Number of tests that ended."""


def judge(copy: Copy, tests: list[str], limits: Limits) -> Verdict:
    """Runs tests in order until one fails, and returns the verdict on the mutant in the copy.

    A test that hangs is killed and the tests after it still run: to hang does not count as to fail.
    """
    if not tests:
        return Verdict("not executed")
    until, left, hung, ran = time.monotonic() + limits.cap, tests, "", 0
    for _ in range(_MAX_HANGS):
        run = run_tests(copy, left, limits, until)
        ran += len(run.ended)
        for test, why in run.failed.items():
            return Verdict("caught", test, why, ran)
        if run.status not in (None, 0, 5, -signal.SIGKILL):  # 5: the mutant has no such test
            return Verdict("caught", run.running or "importing", _last_line(copy.folder / "log"), ran)
        if run.status in (0, 5) or time.monotonic() >= until:
            break
        hung = hung or run.running or "importing"
        left = [test for test in left if test not in run.ended and test != run.running]
        if not left or not run.running:
            break
    if hung:
        return Verdict("timed out", hung, f"no end in {limits.timeout_s(hung):.0f} s", ran)
    why = f"not all of {len(tests)} tests ran in {limits.cap:.0f} s" if time.monotonic() >= until else ""
    return Verdict("survived", why=why, tests_run=ran)


def run_tests(copy: Copy, tests: list[str], limits: Limits, until: float, *options: str) -> PytestRun:
    """Runs tests in one pytest process, up to the first that fails unless `options` of pytest say otherwise.

    The process is killed when a test hangs, or at the monotonic time `until`.
    """
    event_file, listed, log = (copy.folder / name for name in ("events", "tests", "log"))
    event_file.write_text("")
    listed.write_text("\n".join(tests))
    files = dict.fromkeys(test.split("::")[0] for test in tests)
    with log.open("w") as output:
        options = (*(options or ("-x",)), *files)
        process = start_pytest(copy, options, output, MUTATION_EVENTS=event_file, MUTATION_TESTS=listed)
        events, status, deadline = [], None, time.monotonic() + 3 * limits.patience  # importing takes long
        try:
            while status is None and time.monotonic() < min(deadline, until):
                time.sleep(0.1)
                status, before, events = process.poll(), len(events), events_in(event_file)
                if len(events) > before:
                    is_between = events[-1]["event"] != "start"
                    deadline = time.monotonic() + limits.timeout_s("" if is_between else events[-1]["test"])
        finally:
            kill(process)
    ended = {event["test"] for event in events if event["event"] == "end"}
    failed = {event["test"]: event["why"] for event in events if event["event"] == "failed"}
    started = [event["test"] for event in events if event["event"] == "start"]
    return PytestRun(ended, failed, next((test for test in started if test not in ended), ""), status)


def events_in(path: Path) -> list[dict]:
    """Events that the plugin wrote, without a line that is still being written."""
    return [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]


def start_pytest(copy: Copy, arguments: Iterable[str], output: IO[str], **environment: str | Path) -> subprocess.Popen:
    """Starts pytest in the copy, in a process group of its own."""
    if _is_stopping.is_set():
        raise InterruptedError("stopped")
    quiet = ("-p", "no:cacheprovider", "-p", "mutation_plugin", "--basetemp", str(copy.folder / "tmp/pytest"))
    process = subprocess.Popen(
        [sys.executable, "-m", "pytest", *quiet, *arguments],
        cwd=copy.tree,
        env=copy.environment(**environment),
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    _started.add(process)
    return process


def kill(process: subprocess.Popen) -> None:
    """Kills a process and all processes of its group."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    _started.discard(process)


def stop_all() -> None:
    """Kills every running pytest, and prevents others from starting."""
    _is_stopping.set()
    for process in list(_started):
        kill(process)


def _last_line(log: Path) -> str:
    return next((line for line in reversed(log.read_text(errors="replace").splitlines()) if line.strip()), "")
