"""Runs commands in processes forked from this one, which has done the slow imports, and watches them.

A child is the leader of a session of its own, so that processes it leaves running are found by their session.
"""

import atexit
import os
import resource
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

LIMIT_S = 90.0
"""Time in seconds after which a command is sent SIGTERM."""
GRACE_S = 30.0
"""Time in seconds in which a command must end after SIGTERM, compilation included."""
LIMIT_BYTES = 6 << 30
"""Largest memory of a command, in bytes."""
_MODULES = (
    "diffusion.pretraining.training_step",
    "diffusion.pretraining.train_run",
    "diffusion.evaluation.evaluate",
    "diffusion.data.prepare",
    "sampling_rl.train_policy",
    "scripts.train",
    "scripts.prepare",
    "scripts.generate",
    "scripts.evaluate",
    "scripts.train_policy",
    "scripts.study",
    "scripts.plan",
    "scripts.inspection",
    "scripts.output.report",
    "scripts.benchmarks.sample",
)
_LIBRARIES = ("sklearn.cluster", "sklearn.linear_model", "scipy.stats", "matplotlib.pyplot", "rich.markdown")
"""Slow libraries that trimask imports only inside functions."""


@dataclass(frozen=True)
class Outcome:
    """Outcome of a command."""

    status: int
    """Exit status; −n after signal n."""
    out: str
    """Standard output."""
    err: str
    """Standard error."""
    seconds: float
    """Time that the command took."""
    left_running: tuple[str, ...] = ()
    """Titles of processes that still ran five seconds after the command's end."""
    fault: str = ""
    """Fault for which the command was killed: too much memory, or no end after SIGTERM; empty if there is none."""
    is_late: bool = False
    """Whether the command was sent SIGTERM at its time limit."""


def prepare_to_fork() -> None:
    """Imports the modules that commands import, without initialising a device of JAX."""
    import importlib

    for name in _MODULES:
        importlib.import_module(f"trimask.{name}")
    for name in _LIBRARIES:
        importlib.import_module(name)


def call(
    arguments: Sequence[str],
    folder: Path,
    *,
    environment: dict[str, str] | None = None,
    limit_s: float = LIMIT_S,
) -> Outcome:
    """Runs `trimask ARGUMENTS` in a folder and waits for its end."""
    from trimask.scripts import cli

    return start(lambda: cli.main(list(arguments)), folder, environment=environment).wait(limit_s)


@dataclass
class Child:
    """A forked process, which may be running."""

    pid: int
    out: Path
    """File of its standard output."""
    err: Path
    """File of its standard error."""
    began: float
    """Monotonic time at which it was started, in seconds."""

    def wait(self, limit_s: float = LIMIT_S, kill_after_s: float | None = None) -> Outcome:
        """Waits for the end of the process and of all processes of its session.

        It is sent SIGTERM after `limit_s` seconds, and SIGKILL after `kill_after_s`. The session is killed if it uses
        too much memory, or if it does not end in time after SIGTERM.
        """
        fault, killed, is_late = "", False, False
        while True:
            done, wait_status = os.waitpid(self.pid, os.WNOHANG)
            now = time.monotonic() - self.began
            if done:
                break
            if kill_after_s is not None and not killed and now > kill_after_s:
                os.kill(self.pid, signal.SIGKILL)
                killed = True
            elif not is_late and now > limit_s:
                is_late = True
                os.kill(self.pid, signal.SIGTERM)
            elif not fault and now > limit_s + GRACE_S:
                fault = f"hangs: {GRACE_S:g} s after SIGTERM it is still there"
            elif not fault and memory_bytes(self.pid) > LIMIT_BYTES:
                fault = f"eats the machine: more than {LIMIT_BYTES >> 30} GiB"
            if fault:
                end_session(self.pid)
            time.sleep(0.01 if now < 2 else 0.05)
        seconds, left = time.monotonic() - self.began, ()
        deadline = time.monotonic() + 5
        while (members := session_members(self.pid)) and time.monotonic() < deadline:
            time.sleep(0.05)
        if members:
            left = tuple(_title(member) for member in members)
            end_session(self.pid)
        out, err = (path.read_bytes().decode(errors="replace") for path in (self.out, self.err))
        return Outcome(os.waitstatus_to_exitcode(wait_status), out, err, seconds, left, fault, is_late)


_num_started = 0


def start(
    run: Callable[[], int],
    folder: Path,
    *,
    environment: dict[str, str] | None = None,
    file_bytes: int | None = None,
) -> Child:
    """Forks a child that runs a function in a folder and ends with its status; `file_bytes` limits its files' size."""
    global _num_started
    _num_started += 1
    logs = folder / ".logs"
    logs.mkdir(parents=True, exist_ok=True)
    out, err = logs / f"{_num_started}.out", logs / f"{_num_started}.err"
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid:
        return Child(pid, out, err, time.monotonic())
    status = 70
    try:
        os.setsid()
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # instead of the handler of the parent
        os.chdir(folder)
        os.environ.update(environment or {})
        descriptors = (
            os.open(os.devnull, os.O_RDONLY),
            *(os.open(p, os.O_WRONLY | os.O_CREAT, 0o600) for p in (out, err)),
        )
        for target, descriptor in enumerate(descriptors):
            os.dup2(descriptor, target)
            os.close(descriptor)
        _reopen_streams()
        if file_bytes is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (file_bytes, file_bytes))
        status = run()
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else 0 if error.code is None else 1
    except BaseException:
        import traceback

        traceback.print_exc()
        status = 1
    finally:
        status = _finish(status)
        os._exit(status)


def _reopen_streams() -> None:
    """Replaces Python's standard streams by new ones on the present file descriptors."""
    from trimask.scripts import console

    for target, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        stream = os.fdopen(target, mode, closefd=False)
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)
    console.console._live_stack.clear()


def _finish(status: int) -> int:
    """Ends as Python does: waits for threads, calls exit functions, flushes streams. Returns the exit status."""
    try:
        threading._shutdown()
        atexit._run_exitfuncs()
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
    except BrokenPipeError:
        return status
    except BaseException:
        import traceback

        traceback.print_exc()
        return 120
    return status


def session_members(session: int) -> list[int]:
    """Ids of the processes of a session that are not dead."""
    members = []
    for path in Path("/proc").iterdir():
        if not path.name.isdecimal():
            continue
        try:
            fields = (path / "stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[3]) == session and fields[0] not in "ZX":
            members.append(int(path.name))
    return members


def end_session(session: int) -> None:
    """Kills all processes of a session."""
    for member in session_members(session):
        try:
            os.kill(member, signal.SIGKILL)
        except ProcessLookupError:
            continue


def memory_bytes(process: int) -> int:
    """Resident memory of a process without shared pages, in bytes; 0 if there is no such process."""
    try:
        pages = Path(f"/proc/{process}/statm").read_text().split()
    except OSError:
        return 0
    return (int(pages[1]) - int(pages[2])) * os.sysconf("SC_PAGE_SIZE") if len(pages) > 2 else 0


def _title(process: int) -> str:
    """Beginning of the command line of a process, or its id if it has ended."""
    try:
        return Path(f"/proc/{process}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")[:80]
    except OSError:
        return str(process)
