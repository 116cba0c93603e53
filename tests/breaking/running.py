"""Runs commands in processes forked from this one, which has imported what is slow to import; and watches them.

A child is the leader of a session of its own, so that whatever it leaves running is found by its session.
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
"""Seconds after which a command is asked to end."""
GRACE_S = 30.0
"""Seconds in which a command ends that was asked to, compiling included."""
LIMIT_BYTES = 6 << 30
"""Memory of a command and its children, beyond which it eats the machine."""
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
"""What trimask imports where it is needed, and takes long."""


@dataclass(frozen=True)
class Outcome:
    """What became of a command."""

    status: int
    """Exit status; −n after signal n."""
    out: str
    err: str
    seconds: float
    left: tuple[str, ...] = ()
    """Processes that were still there five seconds after the command's end."""
    fault: str = ""
    """That it ate the machine, or did not end when it was asked to."""
    is_late: bool = False
    """Whether it was asked to end, since its time was over."""


def prepare_to_fork() -> None:
    """Imports what commands import; JAX is not asked for a device."""
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
    """Runs `trimask ARGUMENTS` in a folder to its end."""
    from trimask.scripts import cli

    return start(lambda: cli.main(list(arguments)), folder, environment=environment).wait(limit_s)


@dataclass
class Child:
    """A process that was started."""

    number: int
    out: Path
    err: Path
    began: float

    def wait(self, limit_s: float = LIMIT_S, kill_after_s: float | None = None) -> Outcome:
        """Waits for its end, and for that of whatever it started."""
        fault, killed, is_late = "", False, False
        while True:
            done, wait_status = os.waitpid(self.number, os.WNOHANG)
            now = time.monotonic() - self.began
            if done:
                break
            if kill_after_s is not None and not killed and now > kill_after_s:
                os.kill(self.number, signal.SIGKILL)
                killed = True
            elif not is_late and now > limit_s:
                is_late = True
                os.kill(self.number, signal.SIGTERM)
            elif not fault and now > limit_s + GRACE_S:
                fault = f"hangs: {GRACE_S:g} s after SIGTERM it is still there"
            elif not fault and memory_of(self.number) > LIMIT_BYTES:
                fault = f"eats the machine: more than {LIMIT_BYTES >> 30} GiB"
            if fault:
                end_session(self.number)
            time.sleep(0.01 if now < 2 else 0.05)
        seconds, left = time.monotonic() - self.began, ()
        deadline = time.monotonic() + 5
        while (members := members_of(self.number)) and time.monotonic() < deadline:
            time.sleep(0.05)
        if members:
            left = tuple(_title(member) for member in members)
            end_session(self.number)
        out, err = (path.read_bytes().decode(errors="replace") for path in (self.out, self.err))
        return Outcome(os.waitstatus_to_exitcode(wait_status), out, err, seconds, left, fault, is_late)


_started = 0


def start(
    run: Callable[[], int],
    folder: Path,
    *,
    environment: dict[str, str] | None = None,
    file_bytes: int | None = None,
) -> Child:
    """Forks a child that runs a function and ends with its status; its files may have a largest size."""
    global _started
    _started += 1
    logs = folder / ".logs"
    logs.mkdir(parents=True, exist_ok=True)
    out, err = logs / f"{_started}.out", logs / f"{_started}.err"
    sys.stdout.flush()
    sys.stderr.flush()
    number = os.fork()
    if number:
        return Child(number, out, err, time.monotonic())
    status = 70
    try:
        os.setsid()
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # or it would have this process's own way to end
        os.chdir(folder)
        os.environ.update(environment or {})
        descriptors = (
            os.open(os.devnull, os.O_RDONLY),
            *(os.open(p, os.O_WRONLY | os.O_CREAT, 0o600) for p in (out, err)),
        )
        for target, descriptor in enumerate(descriptors):
            os.dup2(descriptor, target)
            os.close(descriptor)
        _renew_streams()
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


def _renew_streams() -> None:
    """Python's own streams on the new descriptors."""
    from trimask.scripts import console

    for target, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        stream = os.fdopen(target, mode, closefd=False)
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)
    console.console._live_stack.clear()


def _finish(status: int) -> int:
    """The end of a Python process: threads are waited for, exit functions called, streams flushed."""
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


def members_of(session: int) -> list[int]:
    """Processes of a session that are not dead."""
    found = []
    for path in Path("/proc").iterdir():
        if not path.name.isdecimal():
            continue
        try:
            fields = (path / "stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[3]) == session and fields[0] not in "ZX":
            found.append(int(path.name))
    return found


def end_session(session: int) -> None:
    """Kills all processes of a session."""
    for member in members_of(session):
        try:
            os.kill(member, signal.SIGKILL)
        except ProcessLookupError:
            continue


def memory_of(process: int) -> int:
    """Bytes that a process holds for itself."""
    try:
        pages = Path(f"/proc/{process}/statm").read_text().split()
    except OSError:
        return 0
    return (int(pages[1]) - int(pages[2])) * os.sysconf("SC_PAGE_SIZE") if len(pages) > 2 else 0


def _title(process: int) -> str:
    try:
        return Path(f"/proc/{process}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")[:80]
    except OSError:
        return str(process)
