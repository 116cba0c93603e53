"""Does a run that is killed again and again, at arbitrary moments, end bit for bit as an uninterrupted run does?

The study trains a small run without interruption. Then it trains the same run again, kills it by SIGKILL and resumes it
until it is finished. Of every five kills, two are aimed at a checkpoint write, two at a random moment of training and
one at a random moment of starting up. It compares parameters, averaged parameters, optimizer state and counters of the
last checkpoint, and every line of metrics.jsonl without its timings.
"""

import os
import random
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import jax
import numpy as np

from trimask.diffusion.data.batches import BatchConfig
from trimask.diffusion.loss import LossConfig
from trimask.diffusion.optimizer import OptimizerConfig
from trimask.diffusion.pretraining.description import RunDescription, TrainConfig
from trimask.diffusion.pretraining.train_run import train
from trimask.diffusion.pretraining.training_step import Pretraining
from trimask.diffusion.run.checkpoint import Checkpoints
from trimask.diffusion.run.children import end_with
from trimask.diffusion.run.folder import checkpoint_steps, read_step_lines
from trimask.diffusion.run.progress import Report
from trimask.diffusion.run.step_loop import LoopConfig
from trimask.diffusion.studies.findings import markdown_table, write_csv
from trimask.diffusion.studies.trials import Trials
from trimask.diffusion.transformer import TransformerConfig
from trimask.tokenizers.storage import configuration
from trimask.tokenizers.storage.ranges import Checked, PositiveInt, Seed, Size

RUN_CONFIG = TrainConfig(
    model=TransformerConfig(num_layers=1, width=32, num_heads=2, mlp_width=32),
    loss=LossConfig(weighting="unweighted"),
    optimizer=OptimizerConfig(warmup_tokens=4_000),
    batch=BatchConfig(tokens=240),
    loop=LoopConfig(log_every=1, checkpoint_every=5, keep_every=50, keep_best=1),
)
"""Training configuration of the run, but for its horizon."""
_AIMS = ("write", "start", "step", "write", "step")
"""What successive kills are aimed at: a checkpoint write, starting up, or any moment of training."""
_TIMINGS = ("tokens_per_second", "data_wait")
"""Metrics that depend on the machine's speed, and are not compared."""


@dataclass(frozen=True, kw_only=True)
class KillAndResume(Checked):
    """Length of the run, and number of kills."""

    kills: Size = 20
    """Number of times that the run is killed; less than three quarters of the steps."""
    seed: Seed = 0
    """Seed of the moments of the kills, which also depend on the machine's timing."""
    steps: PositiveInt = 150
    """Number of training steps of the run."""

    def __post_init__(self):
        super().__post_init__()
        if self.kills >= self.steps * 3 // 4:
            raise ValueError(f"kills must be less than three quarters of the steps, got {self.kills} of {self.steps}")

    @property
    def training(self) -> TrainConfig:
        """Training configuration of the run."""
        tokens = round(RUN_CONFIG.batch.tokens * self.steps)
        return replace(RUN_CONFIG, optimizer=replace(RUN_CONFIG.optimizer, horizon_tokens=tokens))


@dataclass(frozen=True)
class Kill:
    """One kill, and the state of the run after it."""

    aim: str
    """What the kill was aimed at: write, start or step."""
    reached: int
    """Last step in metrics.jsonl; when killed while starting up, an earlier process may have written it."""
    resumes: int
    """Step of the newest complete checkpoint, from which the run resumes; 0 if there is none."""
    hit: str
    """What the process was doing when it was killed, in words."""


class TrainingProcess:
    """The run, trained in a process of its own."""

    def __init__(self, config: TrainConfig, run: Path, data: Path, cache: Path):
        self.run = run
        self._left, self._boards = self._temporary(), self._num_boards()
        self.process = get_context("spawn").Process(target=_train, args=(os.getpid(), run, data, config), daemon=True)
        with _compiled_in(cache):
            self.process.start()

    def is_running(self) -> bool:
        """Whether the process is still running. Raises ChildProcessError if it failed; it has printed its error."""
        status = self.process.exitcode
        if status not in (None, 0):
            raise ChildProcessError(f"training ended with status {status}")
        return status is None

    def finish(self) -> None:
        """Waits for the end of the process. Raises ChildProcessError if it failed."""
        self.process.join()
        self.is_running()

    def kill(self) -> None:
        """Kills the process by SIGKILL."""
        self.process.kill()
        self.process.join()

    def reached(self) -> int:
        """Last step in metrics.jsonl; 0 if there is none."""
        return max((line["step"] for line in read_step_lines(self.run / "metrics.jsonl")), default=0)

    def has_begun(self) -> bool:
        """Whether the process has repaired metrics.jsonl and takes steps: it has opened its TensorBoard file."""
        return self._num_boards() > self._boards

    def is_writing(self) -> bool:
        """Whether the process is writing a checkpoint, or was when it was killed; leftovers of others do not count."""
        return bool(self._temporary() - self._left)

    def _num_boards(self) -> int:
        """Number of TensorBoard files in the run folder: one per process that took steps."""
        return sum(1 for _ in (self.run / "tensorboard").glob("events*"))

    def _temporary(self) -> set[int]:
        """Inodes of the incomplete checkpoint folders, which Orbax renames when they are complete."""
        folder = self.run / "checkpoints"
        if not folder.is_dir():
            return set()
        return {entry.inode() for entry in os.scandir(folder) if "orbax-checkpoint-tmp" in entry.name}


def _train(parent: int, run: Path, data: Path, config: TrainConfig) -> None:
    end_with(parent)
    train(run, data, config)


@contextmanager
def _compiled_in(cache: Path) -> Iterator[None]:
    """Processes that start within share a compilation cache: all run the same programs, and start seconds sooner."""
    cached = {"JAX_COMPILATION_CACHE_DIR": str(cache), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    before = {name: os.environ.get(name) for name in cached}
    os.environ.update(cached)
    yield
    for name, value in before.items():
        if value is None:
            del os.environ[name]
        else:
            os.environ[name] = value


def kill_at(child: TrainingProcess, aim: str, step: int, start_seconds: float, rng: random.Random) -> Kill | None:
    """Kills the process; returns None if it ended before.

    `aim` is "start" (within `start_seconds` of its start), "step" (at `step`, or the first step after the checkpoint
    that it resumes from, if that is later) or "write" (during the first checkpoint write after that step).
    """
    resumed = max(checkpoint_steps(child.run), default=0)
    moment = time.monotonic() + rng.uniform(0, start_seconds)
    while child.is_running() and not (child.has_begun() and child.reached() >= max(step, resumed + 1)):
        if aim == "start" and (time.monotonic() > moment or child.has_begun()):
            break
        time.sleep(0.002)
    while child.is_running() and aim == "write" and not child.is_writing():
        time.sleep(0.0005)
    time.sleep(rng.uniform(0, {"start": 0.0, "write": 0.01, "step": 0.05}[aim]))
    if not child.is_running():
        return None
    child.kill()
    hit = "a checkpoint write" if child.is_writing() else "training" if child.has_begun() else "starting up"
    return Kill(aim, child.reached(), max(checkpoint_steps(child.run), default=0), hit)


def study(config: KillAndResume, trials: Trials) -> str:
    """Trains both runs in new folders, writes kills.csv, and returns the report in Markdown.

    Raises ValueError if one of the folders exists, or if only recorded trials may be used, since there are none.
    """
    if not trials.adds:
        raise ValueError(f"{trials.folder}: this study records no trials; its report is {trials.folder / 'README.md'}")
    uninterrupted, killed = trials.folder / "uninterrupted", trials.folder / "killed"
    for folder in (uninterrupted, killed):
        if folder.exists():
            raise ValueError(f"{folder} exists already; remove it or choose another folder")
    kills, differences = kill_and_resume(
        config, uninterrupted, killed, trials.data, trials.folder / "compiled", trials.report
    )
    if kills:
        write_csv(trials.folder / "kills.csv", [asdict(kill) for kill in kills])
    return _text(kills, differences)


def kill_and_resume(
    config: KillAndResume, uninterrupted: Path, killed: Path, data: Path, cache: Path, report: Report
) -> tuple[list[Kill], list[str]]:
    """Trains both runs; returns the kills, and the differences between the runs in words."""
    rng = random.Random(config.seed)
    report("uninterrupted", 0, 1)
    start, child = time.perf_counter(), TrainingProcess(config.training, uninterrupted, data, cache)
    while child.is_running() and not child.reached():
        time.sleep(0.01)
    start_seconds = time.perf_counter() - start
    child.finish()
    report("uninterrupted", 1, 1)
    steps, kills = max(checkpoint_steps(uninterrupted)), list[Kill]()
    for number, step in enumerate(sorted(rng.sample(range(1, steps * 3 // 4), config.kills))):
        report("kills", number, config.kills)
        child = TrainingProcess(config.training, killed, data, cache)
        kill = kill_at(child, _AIMS[number % len(_AIMS)], step, start_seconds, rng)
        if kill is None:
            return kills, [f"the run was finished after {number} kills"]
        kills.append(kill)
    report("kills", config.kills, config.kills)
    TrainingProcess(config.training, killed, data, cache).finish()
    return kills, run_differences(uninterrupted, killed)


def run_differences(uninterrupted: Path, killed: Path) -> list[str]:
    """Arrays, steps and metrics that are not bit for bit the same in two finished runs, in words."""
    leaves = [_leaves(run) for run in (uninterrupted, killed)]
    differences = [name for name, leaf in leaves[0].items() if leaf != leaves[1][name]]
    lines = [read_step_lines(run / "metrics.jsonl") for run in (uninterrupted, killed)]
    steps = [[line["step"] for line in of_run] for of_run in lines]
    if steps[0] != steps[1] or steps[1] != list(range(1, len(steps[1]) + 1)):
        differences.append(f"steps in metrics.jsonl: {len(steps[0])} lines, {len(steps[1])} after kills")
    for old, new in zip(*lines, strict=False):
        names = [name for name in old if name not in _TIMINGS and old[name] != new.get(name)]
        differences += [f"step {old['step']}: {name} {old[name]} → {new.get(name)}" for name in names]
    return differences


def _leaves(run: Path) -> dict[str, bytes]:
    """Path of every array of the last checkpoint → its bytes."""
    description = configuration.load(run / "config.json", RunDescription)
    like = jax.eval_shape(Pretraining(description.train, description.vocabulary).init)
    with Checkpoints(run) as checkpoints:
        tree: Any = checkpoints.restore(max(checkpoints.steps()), like).tree
    named = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(leaf).tobytes() for path, leaf in named}


def _text(kills: Sequence[Kill], differences: Sequence[str]) -> str:
    rows = [[str(n), kill.aim, str(kill.reached), str(kill.resumes), kill.hit] for n, kill in enumerate(kills, 1)]
    inside = sum(kill.hit == "a checkpoint write" for kill in kills)
    verdict = "the same bits" if not differences else f"{len(differences)} differences"
    return "\n\n".join(
        [
            markdown_table(["kill", "aimed at", "step reached", "resumes at", "hit"], rows),
            f"Killed: {len(kills)}×, {inside}× inside a checkpoint write. Found: {verdict}.",
            *(f"- different: {line}" for line in differences[:20]),
        ]
    )
