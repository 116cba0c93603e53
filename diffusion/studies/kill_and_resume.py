"""Is a run that was killed again and again, at any moment, the run that was not, bit for bit?

    python -m trimask.diffusion.studies.kill_and_resume --kills 20

A small run is trained in one go; then the same command is killed by SIGKILL and started again until it is through. Of
five kills two come inside a checkpoint write, two at any moment of training and one at any moment of starting up. What
counts is parameters, average, optimizer state and counters of the last checkpoint, and every line of metrics.jsonl but
its timings.
"""

import argparse
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from trimask.diffusion import configuration
from trimask.diffusion.checkpoint import Checkpoints
from trimask.diffusion.data.batches import BatchConfig
from trimask.diffusion.data.plan import PrepareConfig
from trimask.diffusion.data.prepare import prepare
from trimask.diffusion.data.sources import SourceConfig
from trimask.diffusion.description import RunDescription
from trimask.diffusion.loop import LoopConfig
from trimask.diffusion.loss import LossConfig
from trimask.diffusion.optimizer import OptimizerConfig
from trimask.diffusion.run_folder import checkpoint_steps, read_lines
from trimask.diffusion.train import Pretraining, TrainConfig, train
from trimask.diffusion.transformer import TransformerConfig

CONFIG = TrainConfig(
    model=TransformerConfig(num_layers=1, width=32, num_heads=2, mlp_width=32),
    loss=LossConfig(weighting="unweighted"),
    optimizer=OptimizerConfig(horizon_tokens=36_000, warmup_tokens=4_000),
    batch=BatchConfig(tokens=240),
    loop=LoopConfig(log_every=1, checkpoint_every=5, keep_every=50, keep_best=1),
)
_AIMS = ("write", "start", "step", "write", "step")
_TIMINGS = ("tokens_per_second", "data_wait")


@dataclass(frozen=True)
class Kill:
    """One kill, and what was found afterwards."""

    aim: str
    reached: int
    """Last step in metrics.jsonl; when killed while starting up, an earlier process may have written it."""
    resumes: int
    """Newest complete checkpoint; 0 for none."""
    hit: str


class Child:
    """The training command, in a process of its own."""

    def __init__(self, run: Path, data: Path, cache: Path):
        self.run = run
        self._left, self._boards = self._temporary(), self._num_boards()
        # What is compiled once is the same bits every time, and a start takes seconds less.
        cached = {"JAX_COMPILATION_CACHE_DIR": str(cache), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "trimask.diffusion.studies.kill_and_resume", "--train", run, "--data", data],
            env={**os.environ, **cached},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )

    def is_running(self) -> bool:
        """Whether it goes on; an error of its own is ours too."""
        status = self.process.poll()
        if status not in (None, 0):
            raise RuntimeError(f"training ended with status {status}:\n{self.process.communicate()[1]}")
        return status is None

    def finish(self) -> None:
        """Waits until it is through."""
        while self.is_running():
            time.sleep(0.01)
        self.process.communicate()

    def kill(self) -> None:
        """SIGKILL."""
        self.process.kill()
        self.process.communicate()

    def reached(self) -> int:
        """Last step in metrics.jsonl."""
        return max((line["step"] for line in read_lines(self.run / "metrics.jsonl")), default=0)

    def has_begun(self) -> bool:
        """Whether it has repaired metrics.jsonl and takes steps."""
        return self._num_boards() > self._boards

    def is_writing(self) -> bool:
        """Whether it is writing a checkpoint, or was when it was killed; what another one left does not count."""
        return bool(self._temporary() - self._left)

    def _num_boards(self) -> int:
        return sum(1 for _ in (self.run / "tensorboard").glob("events*"))

    def _temporary(self) -> set[int]:
        """Inodes of the folders that Orbax renames when they are complete."""
        folder = self.run / "checkpoints"
        if not folder.is_dir():
            return set()
        return {entry.inode() for entry in os.scandir(folder) if "orbax-checkpoint-tmp" in entry.name}


def kill_at(child: Child, aim: str, step: int, start_seconds: float, draw: random.Random) -> Kill | None:
    """Kills the process where aimed, or at `step` if it has not come there yet; None if it was through before."""
    resumed = max(checkpoint_steps(child.run), default=0)
    moment = time.monotonic() + draw.uniform(0, start_seconds)
    while child.is_running() and not (child.has_begun() and child.reached() >= max(step, resumed + 1)):
        if aim == "start" and (time.monotonic() > moment or child.has_begun()):
            break
        time.sleep(0.002)
    while child.is_running() and aim == "write" and not child.is_writing():
        time.sleep(0.0005)
    time.sleep(draw.uniform(0, {"start": 0.0, "write": 0.01, "step": 0.05}[aim]))
    if not child.is_running():
        return None
    child.kill()
    hit = "a checkpoint write" if child.is_writing() else "training" if child.has_begun() else "starting up"
    return Kill(aim, child.reached(), max(checkpoint_steps(child.run), default=0), hit)


def kill_and_resume(folder: Path, data: Path, kills: int, seed: int, console: Console) -> tuple[list[Kill], list[str]]:
    """Trains both runs; returns the kills, and every difference found."""
    draw = random.Random(seed)
    whole, killed, cache = folder / "uninterrupted", folder / "killed", folder / "compiled"
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    done: list[Kill] = []
    with Progress(*columns, console=console) as bar:
        task = bar.add_task("uninterrupted", total=kills)
        start, child = time.perf_counter(), Child(whole, data, cache)
        while child.is_running() and not child.reached():
            time.sleep(0.01)
        start_seconds = time.perf_counter() - start
        child.finish()
        steps = max(checkpoint_steps(whole))
        targets = sorted(draw.sample(range(1, steps * 3 // 4), kills))
        for number, step in enumerate(targets):
            bar.update(task, description="killed", completed=number)
            kill = kill_at(Child(killed, data, cache), _AIMS[number % len(_AIMS)], step, start_seconds, draw)
            if kill is None:
                return done, [f"the run was through after {number} kills"]
            done.append(kill)
        bar.update(task, description="finishing", completed=kills)
        Child(killed, data, cache).finish()
    return done, differences(whole, killed)


def differences(whole: Path, killed: Path) -> list[str]:
    """What is not bit for bit the same in two finished runs."""
    leaves = [_leaves(run) for run in (whole, killed)]
    found = [name for name, leaf in leaves[0].items() if leaf != leaves[1][name]]
    lines = [read_lines(run / "metrics.jsonl") for run in (whole, killed)]
    steps = [[line["step"] for line in of_run] for of_run in lines]
    if steps[0] != steps[1] or steps[1] != list(range(1, len(steps[1]) + 1)):
        found.append(f"steps in metrics.jsonl: {len(steps[0])} lines, {len(steps[1])} after kills")
    for old, new in zip(*lines, strict=False):
        names = [name for name in old if name not in _TIMINGS and old[name] != new.get(name)]
        found += [f"step {old['step']}: {name} {old[name]} → {new.get(name)}" for name in names]
    return found


def _leaves(run: Path) -> dict[str, bytes]:
    """Every array of the last checkpoint, as bytes."""
    description = configuration.load(run / "config.json", RunDescription)
    like = jax.eval_shape(Pretraining(description.train, description.vocabulary).init)
    with Checkpoints(run) as checkpoints:
        tree: Any = checkpoints.restore(max(checkpoints.steps()), like).tree
    named = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(leaf).tobytes() for path, leaf in named}


def _table(kills: Sequence[Kill]) -> Table:
    table = Table(title="Kills", title_justify="left")
    for column in ("kill", "aimed at", "step reached", "resumes at", "hit"):
        table.add_column(column, justify="left" if column in ("aimed at", "hit") else "right")
    for number, kill in enumerate(kills, 1):
        table.add_row(str(number), kill.aim, str(kill.reached), str(kill.resumes), kill.hit)
    return table


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the kills and the verdict; returns the exit status, 1 for any difference."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20, help="how often to kill")
    parser.add_argument("--seed", type=int, default=0, help="fixes when, up to the machine's own timing")
    parser.add_argument("--folder", type=Path, help="where to put both runs; a temporary folder unless given")
    parser.add_argument("--data", type=Path, help="prepared data; the embedded sums unless given")
    parser.add_argument("--train", type=Path, help="train this run folder and nothing else: what is killed")
    parsed = parser.parse_args(arguments)
    if parsed.train is not None:
        train(parsed.train, parsed.data, CONFIG)
        return 0
    console = Console()
    with tempfile.TemporaryDirectory() as scratch:
        folder = parsed.folder or Path(scratch)
        data = parsed.data or folder / "data"
        if parsed.data is None:
            prepare(data, PrepareConfig(sources={"sums": SourceConfig(kind="digits", where=("sums",))}))
        kills, found = kill_and_resume(folder, data, parsed.kills, parsed.seed, console)
    console.print(_table(kills))
    inside = sum(kill.hit == "a checkpoint write" for kill in kills)
    console.print(f"{len(kills)} kills, {inside} of them inside a checkpoint write")
    for line in found[:20]:
        console.print(f"different: {line}", markup=False)
    console.print("the same bits" if not found else f"{len(found)} differences")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
