"""Is a run that was killed again and again, at any moment, the run that was not, bit for bit?

A small run is trained in one go; then the same run is killed by SIGKILL and started again until it is through. Of five
kills two come inside a checkpoint write, two at any moment of training and one at any moment of starting up. What
counts is parameters, average, optimizer state and counters of the last checkpoint, and every line of metrics.jsonl but
its timings.
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

CONFIG = TrainConfig(
    model=TransformerConfig(num_layers=1, width=32, num_heads=2, mlp_width=32),
    loss=LossConfig(weighting="unweighted"),
    optimizer=OptimizerConfig(warmup_tokens=4_000),
    batch=BatchConfig(tokens=240),
    loop=LoopConfig(log_every=1, checkpoint_every=5, keep_every=50, keep_best=1),
)
_AIMS = ("write", "start", "step", "write", "step")
_TIMINGS = ("tokens_per_second", "data_wait")


@dataclass(frozen=True, kw_only=True)
class KillAndResume(Checked):
    """How often, and when."""

    kills: Size = 20
    """How often to kill."""
    seed: Seed = 0
    """Fixes when, up to the machine's own timing."""
    steps: PositiveInt = 150
    """Of the run."""

    def __post_init__(self):
        super().__post_init__()
        if self.kills >= self.steps * 3 // 4:
            raise ValueError(f"kills must be less than three quarters of the steps, got {self.kills} of {self.steps}")

    @property
    def training(self) -> TrainConfig:
        """The run."""
        tokens = round(CONFIG.batch.tokens * self.steps)
        return replace(CONFIG, optimizer=replace(CONFIG.optimizer, horizon_tokens=tokens))


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
    """Training, in a process of its own."""

    def __init__(self, config: TrainConfig, run: Path, data: Path, cache: Path):
        self.run = run
        self._left, self._boards = self._temporary(), self._num_boards()
        self.process = get_context("spawn").Process(target=_train, args=(os.getpid(), run, data, config), daemon=True)
        with _compiled_in(cache):
            self.process.start()

    def is_running(self) -> bool:
        """Whether it goes on; an error of its own, which it has printed, is ours too."""
        status = self.process.exitcode
        if status not in (None, 0):
            raise ChildProcessError(f"training ended with status {status}")
        return status is None

    def finish(self) -> None:
        """Waits until it is through, and raises if that was by an error."""
        self.process.join()
        self.is_running()

    def kill(self) -> None:
        """SIGKILL."""
        self.process.kill()
        self.process.join()

    def reached(self) -> int:
        """Last step in metrics.jsonl."""
        return max((line["step"] for line in read_step_lines(self.run / "metrics.jsonl")), default=0)

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


def _train(parent: int, run: Path, data: Path, config: TrainConfig) -> None:
    end_with(parent)
    train(run, data, config)


@contextmanager
def _compiled_in(cache: Path) -> Iterator[None]:
    """What is compiled once is the same bits every time, and a start takes seconds less."""
    cached = {"JAX_COMPILATION_CACHE_DIR": str(cache), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    before = {name: os.environ.get(name) for name in cached}
    os.environ.update(cached)
    yield
    for name, value in before.items():
        if value is None:
            del os.environ[name]
        else:
            os.environ[name] = value


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


def study(config: KillAndResume, trials: Trials) -> str:
    """Trains both runs in fresh folders, writes kills.csv; returns the text."""
    whole, killed = trials.folder / "uninterrupted", trials.folder / "killed"
    for folder in (whole, killed):
        if folder.exists():
            raise ValueError(f"{folder} is there already; remove it or choose another folder")
    kills, found = kill_and_resume(config, whole, killed, trials.data, trials.folder / "compiled", trials.report)
    if kills:
        write_csv(trials.folder / "kills.csv", [asdict(kill) for kill in kills])
    return _text(kills, found)


def kill_and_resume(
    config: KillAndResume, whole: Path, killed: Path, data: Path, cache: Path, report: Report
) -> tuple[list[Kill], list[str]]:
    """Trains both runs; returns the kills, and every difference found."""
    draw = random.Random(config.seed)
    report("uninterrupted", 0, 1)
    start, child = time.perf_counter(), Child(config.training, whole, data, cache)
    while child.is_running() and not child.reached():
        time.sleep(0.01)
    start_seconds = time.perf_counter() - start
    child.finish()
    report("uninterrupted", 1, 1)
    steps, done = max(checkpoint_steps(whole)), list[Kill]()
    for number, step in enumerate(sorted(draw.sample(range(1, steps * 3 // 4), config.kills))):
        report("kills", number, config.kills)
        kill = kill_at(
            Child(config.training, killed, data, cache), _AIMS[number % len(_AIMS)], step, start_seconds, draw
        )
        if kill is None:
            return done, [f"the run was through after {number} kills"]
        done.append(kill)
    report("kills", config.kills, config.kills)
    Child(config.training, killed, data, cache).finish()
    return done, differences(whole, killed)


def differences(whole: Path, killed: Path) -> list[str]:
    """What is not bit for bit the same in two finished runs."""
    leaves = [_leaves(run) for run in (whole, killed)]
    found = [name for name, leaf in leaves[0].items() if leaf != leaves[1][name]]
    lines = [read_step_lines(run / "metrics.jsonl") for run in (whole, killed)]
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


def _text(kills: Sequence[Kill], found: Sequence[str]) -> str:
    rows = [[str(n), kill.aim, str(kill.reached), str(kill.resumes), kill.hit] for n, kill in enumerate(kills, 1)]
    inside = sum(kill.hit == "a checkpoint write" for kill in kills)
    verdict = "the same bits" if not found else f"{len(found)} differences"
    return "\n\n".join(
        [
            markdown_table(["kill", "aimed at", "step reached", "resumes at", "hit"], rows),
            f"Killed: {len(kills)}×, {inside}× inside a checkpoint write. Found: {verdict}.",
            *(f"- different: {line}" for line in found[:20]),
        ]
    )
