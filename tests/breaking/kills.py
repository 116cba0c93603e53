"""Commands that are killed, run out of disk, or run twice at once; afterwards the same command has the usual result.

An incident leaves no process, no partial file, and no difference in any bit.
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
from functools import cache
from pathlib import Path

from breaking.damage import result_of
from breaking.judging import faults_of
from breaking.running import Child, Outcome, start
from breaking.world import COMMANDS, can_run, copied

DISKS = (0.02, 0.2, 0.4, 0.7, 0.95)
"""Sizes of disks, as shares of the bytes that a command writes."""
_PARTIAL = re.compile(r"\.partial|\.complete|\.tmp|tmp-|\.orbax-checkpoint-tmp")
"""Names of files that are being written."""


@dataclass(frozen=True)
class Writer:
    """A command that writes a folder."""

    words: str
    """The command line, with the names of folders in braces."""
    folder: str
    """Name of the folder that it writes."""
    result: str
    """Result that must be the same, as in `damage.Reader`; or the parameters and losses of a run (state:FOLDER), or
    evaluation.json (evaluation:FOLDER)."""
    copies: tuple[str, ...] = ()
    """Names of the folders that it adds to, which are copied first."""
    processes: int = 1
    """Number of processes that run the command together."""
    share: int = 1
    """Relative frequency with which it is drawn; higher for quick commands."""


def _new(name: str, folder: str, more: str = "") -> str:
    """Command line of a command of the world that writes a new folder instead of `folder`."""
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
"""Name → a command that writes a folder."""


@dataclass(frozen=True)
class Incident:
    """A kill, a full disk or a second start of a command while it writes."""

    writer: str
    """Name of the command in `WRITERS`."""
    kind: str
    """Kind of incident: killed, disk or twice."""
    number: float
    """Moment of the kill, as a share of the command's time; or size of the disk, as a share of what it writes."""

    def __str__(self) -> str:
        return f"{self.writer}: {self.kind} {self.number:.3f}"


@dataclass(frozen=True)
class Reference:
    """Outcome of a command without an incident."""

    result: object
    seconds: float
    bytes: int
    """Number of bytes that the command writes, with 4,096 for each file."""
    names: set[str]
    """Paths of everything in the folder that it writes."""


def draw(folders: dict[str, Path], rng: random.Random, kind: str) -> Iterator[Incident]:
    """Endless stream of cases of a kind."""
    possible = [name for name, writer in WRITERS.items() if can_run(writer.words, folders)]
    while True:
        (writer,) = rng.choices(possible, [WRITERS[name].share for name in possible])
        if kind == "disk":
            yield Incident(writer, kind, rng.choice(DISKS))
        else:
            yield Incident(writer, kind, rng.uniform(0, 1.05))


def reference(name: str, folders: dict[str, Path], root: Path) -> Reference:
    """Runs a command without an incident."""
    with _case_folders(name, folders, root) as paths:
        before = _bytes(paths[WRITERS[name].folder])
        (done, *_) = _run(name, paths)
        if done.status:
            raise RuntimeError(f"{name} fails without an incident:\n{done.out}\n{done.err}")
        folder = paths[WRITERS[name].folder]
        return Reference(_result(name, paths, done), done.seconds, _bytes(folder) - before, _names(folder))


def judged(case: Incident, folders: dict[str, Path], expected: Reference, root: Path) -> list[str]:
    """Tries a case and returns its faults; `expected` is the outcome without an incident."""
    faults: list[str] = []
    disk = max(16 << 10, int(case.number * expected.bytes)) if case.kind == "disk" else None
    with _case_folders(case.writer, folders, root, disk) as paths:
        if case.kind == "killed":
            outcomes = _run(case.writer, paths, kill_after_s=case.number * expected.seconds)
            for done in outcomes:
                faults += [f"left running: {'; '.join(done.left_running)}"] * bool(done.left_running)
            faults += [fault for done in outcomes if done.status != -9 for fault in faults_of(done)]
        elif case.kind == "twice":
            outcomes = _run(case.writer, paths, times=2)
            faults += [fault for done in outcomes for fault in faults_of(done)]
        else:
            outcomes = _run(case.writer, paths, file_bytes=None if _can_mount() else disk)
            faults += [fault for done in outcomes for fault in faults_of(done)]
            _grow_disk(paths)
        done, *_ = again = _run(case.writer, paths)
        for each in again:
            faults += [f"the same command: {fault}" for fault in faults_of(each)]
            if each.status:
                faults.append(f"the same command fails: {each.err.strip()[-300:]}")
        if done.status == 0:
            is_more = case.writer == "generate" and any(each.status == 0 for each in outcomes)
            if not is_more and _result(case.writer, paths, done) != expected.result:
                faults.append("the same command has another result")
            names = _names(paths[WRITERS[case.writer].folder])
            left = {name for name in names if _PARTIAL.search(name)} | (set() if is_more else names - expected.names)
            if left:
                faults.append(f"left: {', '.join(sorted(left)[:5])}")
    return faults


@contextmanager
def _case_folders(
    name: str, folders: dict[str, Path], root: Path, disk: int | None = None
) -> Iterator[dict[str, Path]]:
    """Name → path of the folders of a case; those it writes are on a disk of `disk` bytes, if one can be mounted."""
    case_folder = root / "case-0"
    shutil.rmtree(case_folder, ignore_errors=True)
    target = case_folder / "disk"
    target.mkdir(parents=True)
    writer = WRITERS[name]
    is_mounted = disk is not None and _can_mount()
    if is_mounted:
        num_bytes = (disk or 0) + sum(_bytes(folders[copy]) * 2 for copy in writer.copies)
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={num_bytes}", "tmpfs", target], check=True)
    try:
        yield {**copied(folders, target, *writer.copies), "new": target / "new"}
    finally:
        if is_mounted:
            subprocess.run(["umount", "-l", target], check=True)


def _grow_disk(paths: dict[str, Path]) -> None:
    if _can_mount():
        subprocess.run(["mount", "-o", "remount,size=1g", paths["new"].parent], check=True)


@cache
def _can_mount() -> bool:
    """Whether this process may mount a disk, found out by mounting one."""
    if os.geteuid() != 0 or shutil.which("mount") is None:
        return False
    folder = Path("/tmp") / f"breaking-{os.getpid()}"
    folder.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "tmpfs", folder], check=False, capture_output=True)
    if done.returncode == 0:
        subprocess.run(["umount", folder], check=True)
    folder.rmdir()
    return done.returncode == 0


def _run(
    name: str,
    paths: dict[str, Path],
    *,
    kill_after_s: float | None = None,
    file_bytes: int | None = None,
    times: int = 1,
) -> list[Outcome]:
    """Runs a command in its number of processes, `times` times at once; returns the outcome of every process.

    After `kill_after_s` seconds one of the processes, picked by that time, is killed. `file_bytes` limits the size of
    files.
    """
    from trimask.scripts import cli

    writer = WRITERS[name]
    argv = [word.format(**paths) for word in writer.words.split()]
    folder = paths["new"].parent.parent
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


def _result(name: str, paths: dict[str, Path], done: Outcome) -> object:
    """Result of a command that can be compared, of the kind that `Writer.result` names."""
    kind, _, folder = WRITERS[name].result.partition(":")
    if kind == "state":
        return result_of(f"losses:{folder}", paths, done), _parameters_digest(paths[folder])
    if kind == "evaluation":
        return (paths[folder] / "evaluation.json").read_text()
    return result_of(WRITERS[name].result, paths, done)


def _parameters_digest(folder: Path) -> str:
    """SHA-256 of the parameters of a run or a policy at its newest step, computed in a process of its own."""

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
        raise RuntimeError(f"{folder}: its parameters cannot be read: {done.err}")
    return done.out.strip()


def _bytes(folder: Path) -> int:
    """Number of bytes of everything in a folder, with 4,096 more for each file and folder; 0 if there is none."""
    return sum(path.stat().st_size + 4096 for path in folder.rglob("*")) if folder.exists() else 0


def _names(folder: Path) -> set[str]:
    """Paths of everything in a folder, without the parts of names that differ between runs."""
    names = (str(path.relative_to(folder)) for path in folder.rglob("*") if path.name != "verified.json")
    return {re.sub(r"events\.out\..*|[0-9a-f]{32}", "", name) for name in names}
