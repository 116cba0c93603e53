"""Commands that are killed, run out of disk, or run twice at once; afterwards the same command makes what it would.

Whatever happened, nothing of it is left: no process, no file in the making, and not a different bit.
"""

import os
import random
import re
import shutil
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from breaking.damage import result_of
from breaking.judging import faults_of
from breaking.running import Child, Outcome, start
from breaking.world import COMMANDS, can_run, copied

DISKS = (0.02, 0.2, 0.4, 0.7, 0.95)
"""Sizes of disks, as shares of what a command writes."""
_LEFT = re.compile(r"\.partial|\.complete|\.tmp|tmp-|\.orbax-checkpoint-tmp")


@dataclass(frozen=True)
class Writer:
    """A command that writes a folder."""

    words: str
    folder: str
    result: str
    copies: tuple[str, ...] = ()
    """Folders that are copied before, since it adds to them."""
    processes: int = 1
    share: int = 1
    """How often it is drawn: those that take little time, more often."""


def _new(name: str, folder: str, more: str = "") -> str:
    return f"{COMMANDS[name].words.replace(f'{{{folder}}}', '{new}')} {more}"


WRITERS = {
    "prepare": Writer(_new("prepare", "data"), "new", "files:new", share=3),
    "prepare, 2 workers": Writer(_new("prepare", "data").replace("--workers 1", "--workers 2"), "new", "files:new"),
    "train": Writer(_new("train", "run"), "new", "state:new", share=2),
    "train, 2 workers": Writer(_new("train", "run", "--loop.workers 2"), "new", "state:new"),
    "train, 2 processes": Writer(_new("train", "run"), "new", "state:new", processes=2),
    "train-policy": Writer(_new("train-policy", "policy"), "new", "state:new"),
    "generate": Writer(
        "generate {run} --prompt two --to image --num 3 --trace", "run", "files:run/generated", ("run",), share=4
    ),
    "evaluate": Writer(COMMANDS["evaluate"].words, "run", "evaluation:run", ("run",)),
    "study": Writer(_new("study", "study"), "new", "files:new", share=2),
    "inspect trace": Writer(
        "inspect {run}/generated/one-3.trace.jsonl", "run", "files:run/generated", ("run",), share=2
    ),
}
"""Name → a command that writes."""


@dataclass(frozen=True)
class Trouble:
    """What happens to a command while it writes."""

    writer: str
    kind: str
    """killed, disk or twice."""
    number: float
    """When, as a share of its time; or how large the disk is, as a share of what it writes."""

    def __str__(self) -> str:
        return f"{self.writer}: {self.kind} {self.number:.3f}"


@dataclass(frozen=True)
class Reference:
    """What a command does when nothing happens."""

    result: object
    seconds: float
    bytes: int
    names: set[str]


def draw(folders: dict[str, Path], rng: random.Random, kind: str) -> Iterator[Trouble]:
    """Cases without end."""
    possible = [name for name, writer in WRITERS.items() if can_run(writer.words, folders)]
    while True:
        (writer,) = rng.choices(possible, [WRITERS[name].share for name in possible])
        if kind == "disk":
            yield Trouble(writer, kind, rng.choice(DISKS))
        else:
            yield Trouble(writer, kind, rng.uniform(0, 1.05))


def reference(name: str, folders: dict[str, Path], root: Path) -> Reference:
    """Runs a command when nothing happens."""
    with _place(name, folders, root) as here:
        before = _bytes(here[WRITERS[name].folder])
        (done, *_) = _run(name, here)
        if done.status:
            raise RuntimeError(f"{name} fails when nothing happens:\n{done.out}\n{done.err}")
        folder = here[WRITERS[name].folder]
        return Reference(_result(name, here, done), done.seconds, _bytes(folder) - before, _names(folder))


def judged(case: Trouble, folders: dict[str, Path], expected: Reference, root: Path) -> list[str]:
    """What is wrong with what became of it."""
    faults: list[str] = []
    disk = max(16 << 10, int(case.number * expected.bytes)) if case.kind == "disk" else None
    with _place(case.writer, folders, root, disk) as here:
        if case.kind == "killed":
            outcomes = _run(case.writer, here, kill_after_s=case.number * expected.seconds)
            for done in outcomes:
                faults += [f"left running: {'; '.join(done.left)}"] * bool(done.left)
            faults += [fault for done in outcomes if done.status != -9 for fault in faults_of(done)]
        elif case.kind == "twice":
            outcomes = _run(case.writer, here, times=2)
            faults += [fault for done in outcomes for fault in faults_of(done)]
        else:
            outcomes = _run(case.writer, here, file_bytes=None if _mounts() else disk)
            faults += [fault for done in outcomes for fault in faults_of(done)]
            _grow(here)
        done, *_ = again = _run(case.writer, here)
        for each in again:
            faults += [f"the same command: {fault}" for fault in faults_of(each)]
            if each.status:
                faults.append(f"the same command fails: {each.err.strip()[-300:]}")
        if done.status == 0:
            is_more = case.writer == "generate" and any(each.status == 0 for each in outcomes)
            if not is_more and _result(case.writer, here, done) != expected.result:
                faults.append("the same command makes something else")
            names = _names(here[WRITERS[case.writer].folder])
            left = {name for name in names if _LEFT.search(name)} | (set() if is_more else names - expected.names)
            if left:
                faults.append(f"left: {', '.join(sorted(left)[:5])}")
    return faults


@contextmanager
def _place(name: str, folders: dict[str, Path], root: Path, disk: int | None = None) -> Iterator[dict[str, Path]]:
    """Folders for a case: what the command writes lies on a disk of some bytes, where mounting is allowed."""
    place = root / "case-0"
    shutil.rmtree(place, ignore_errors=True)
    target = place / "disk"
    target.mkdir(parents=True)
    writer = WRITERS[name]
    is_mounted = disk is not None and _mounts()
    if is_mounted:
        room = (disk or 0) + sum(_bytes(folders[copy]) * 2 for copy in writer.copies)
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={room}", "tmpfs", target], check=True)
    try:
        yield {**copied(folders, target, *writer.copies), "new": target / "new"}
    finally:
        if is_mounted:
            subprocess.run(["umount", "-l", target], check=True)


def _grow(here: dict[str, Path]) -> None:
    if _mounts():
        subprocess.run(["mount", "-o", "remount,size=1g", here["new"].parent], check=True)


def _mounts() -> bool:
    """Whether this process may mount a disk."""
    return os.geteuid() == 0 and shutil.which("mount") is not None and _can_mount()


_answer: list[bool] = []


def _can_mount() -> bool:
    if not _answer:
        folder = Path("/tmp") / f"breaking-{os.getpid()}"
        folder.mkdir()
        done = subprocess.run(["mount", "-t", "tmpfs", "tmpfs", folder], check=False, capture_output=True)
        if done.returncode == 0:
            subprocess.run(["umount", folder], check=True)
        folder.rmdir()
        _answer.append(done.returncode == 0)
    return _answer[0]


def _run(
    name: str,
    here: dict[str, Path],
    *,
    kill_after_s: float | None = None,
    file_bytes: int | None = None,
    times: int = 1,
) -> list[Outcome]:
    """Runs the command, in one process or several, once or several times at once; only the first is killed."""
    from trimask.scripts import cli

    writer = WRITERS[name]
    argv = [word.format(**here) for word in writer.words.split()]
    folder = here["new"].parent.parent
    children: list[Child] = []
    for _ in range(times):
        port = _free_port()
        for process in range(writer.processes):
            environment = {}
            if writer.processes > 1:
                environment = {
                    "JAX_COORDINATOR_ADDRESS": f"localhost:{port}",
                    "JAX_NUM_PROCESSES": str(writer.processes),
                    "JAX_PROCESS_ID": str(process),
                }
            children.append(start(lambda: cli.main(argv), folder, environment=environment, file_bytes=file_bytes))
    victim = 0 if kill_after_s is None else int(kill_after_s * 1000) % len(children)
    outcomes = {victim: children[victim].wait(kill_after_s=kill_after_s)}
    outcomes |= {number: child.wait() for number, child in enumerate(children) if number != victim}
    return [outcomes[number] for number in range(len(children))]


def _free_port() -> int:
    with socket.create_server(("", 0)) as server:
        return server.getsockname()[1]


def _result(name: str, here: dict[str, Path], done: Outcome) -> object:
    kind, _, folder = WRITERS[name].result.partition(":")
    if kind == "state":
        return result_of(f"losses:{folder}", here, done), _state(here[folder])
    if kind == "evaluation":
        return (here[folder] / "evaluation.json").read_text()
    return result_of(WRITERS[name].result, here, done)


def _state(folder: Path) -> str:
    """SHA-256 of the parameters of a run or a policy at its newest step, read by a process of its own."""

    def run() -> int:
        import hashlib

        import jax
        import numpy as np

        from trimask.diffusion.pretraining.trained_model import load
        from trimask.diffusion.sampling.learned import open_policy

        is_policy = (folder / "policy.json").exists()
        parameters = open_policy(str(folder)).parameters if is_policy else load(folder).parameters
        print(hashlib.sha256(b"".join(np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(parameters))).hexdigest())
        return 0

    done = start(run, folder.parent).wait()
    if done.status:
        raise RuntimeError(f"{folder}: no state: {done.err}")
    return done.out.strip()


def _bytes(folder: Path) -> int:
    return sum(path.stat().st_size + 4096 for path in folder.rglob("*")) if folder.exists() else 0


def _names(folder: Path) -> set[str]:
    """Names of all that is in a folder, without what another run names otherwise."""
    names = (str(path.relative_to(folder)) for path in folder.rglob("*") if path.name != "verified.json")
    return {re.sub(r"events\.out\..*|[0-9a-f]{32}", "", name) for name in names}
