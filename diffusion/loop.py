"""The training loop: step, log, save, and nothing else.

`fit` knows a pure `step(state, batch) -> (state, metrics)` and a pure `batch(step)`; pretraining, policies and codecs
all use it. Because both are pure and the randomness of a step is folded in from its number, what has to be stored to
resume bit for bit is the state and one integer.
"""

import json
import signal
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import grain
import jax
import numpy as np
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from tensorboardX import SummaryWriter

from trimask.diffusion.checkpoint import Checkpoints

State = TypeVar("State")
Metrics = Mapping[str, Any]
"""Name → Mean; a mean of nothing is not logged."""


@dataclass(frozen=True, kw_only=True)
class LoopConfig:
    """How often to log, save and look."""

    log_every: int = 10
    """Steps per line of metrics.jsonl; each line is the mean over them."""
    checkpoint_every: int = 500
    """Steps between checkpoints; the last step is always saved."""
    keep_checkpoints: int = 2
    """Older ones are deleted."""
    sample_every: int = 0
    """Steps between samples written to samples/; 0 means none."""
    prefetch: int = 4
    """Batches prepared ahead of the step."""

    def __post_init__(self):
        for name in ("log_every", "checkpoint_every", "keep_checkpoints", "prefetch"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.sample_every < 0:
            raise ValueError(f"sample_every must not be negative, got {self.sample_every}")


class Interrupted(KeyboardInterrupt):
    """Training was asked to stop; everything up to `step` is saved."""

    def __init__(self, step: int, folder: Path):
        super().__init__(f"stopped at step {step}, saved in {folder}; the same command resumes")
        self.step = step


def fit(
    step: Callable[[State, Any], tuple[State, Metrics]],
    state: State,
    batch: Callable[[int], Any],
    *,
    num_steps: int,
    folder: Path,
    config: LoopConfig,
    items_per_batch: Callable[[Any], int],
    sample: Callable[[State, int], None] | None = None,
) -> State:
    """Takes `num_steps` steps in all, from the newest checkpoint in `folder` if there is one.

    `items_per_batch` counts what the rate is quoted in (tokens). SIGTERM and Ctrl-C save and raise `Interrupted`.
    """
    with Checkpoints(folder / "checkpoints", keep=config.keep_checkpoints) as checkpoints:
        start = checkpoints.latest() or 0
        if start:
            state = checkpoints.restore(start, state)
        log = _Log(folder, start)
        with _progress(num_steps, start) as progress, _StopRequest() as stop:
            clock = _Clock()
            for index, host_batch in _prefetched(batch, start, num_steps, config.prefetch):
                clock.waited()
                state, metrics = step(state, jax.device_put(host_batch))
                done = index + 1
                log.add(metrics, items_per_batch(host_batch))
                is_last = done == num_steps or stop.requested
                is_save = is_last or done % config.checkpoint_every == 0
                if is_save or done % config.log_every == 0:
                    progress(done, log.write(done, clock))
                if is_save:
                    checkpoints.save(done, state)
                if sample is not None and config.sample_every and done % config.sample_every == 0:
                    sample(state, done)
                if stop.requested and done < num_steps:
                    checkpoints.wait()
                    raise Interrupted(done, folder)
                clock.stepped()
        log.close()
    return state


def _prefetched(batch: Callable[[int], Any], start: int, stop: int, buffer: int):
    """(step, batch) in order, prepared by a background thread."""
    numbered = grain.MapDataset.range(start, stop).map(lambda step: (int(step), batch(int(step))))
    return iter(numbered.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=buffer)))


class _Clock:
    """Where the time since the last line went."""

    def __init__(self):
        self.reset()

    def reset(self):
        self.start = self.last = time.perf_counter()
        self.waiting = 0.0

    def waited(self):
        """The time since the end of the last step was spent waiting for data."""
        self.waiting += time.perf_counter() - self.last

    def stepped(self):
        """A step is over."""
        self.last = time.perf_counter()

    def read(self) -> tuple[float, float]:
        """Seconds since the last reading, and the share of them spent waiting for data."""
        seconds = time.perf_counter() - self.start
        share = self.waiting / seconds
        self.reset()
        return seconds, share


class _Log:
    """metrics.jsonl and TensorBoard; on resuming, lines after the checkpoint are dropped, for they come again."""

    def __init__(self, folder: Path, start: int):
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / "metrics.jsonl"
        _keep_lines_until(self.path, start)
        self.board = SummaryWriter(str(folder / "tensorboard"), purge_step=start + 1)
        self.sums: dict[str, Any] = {}
        self.items = 0

    def add(self, metrics: Metrics, items: int):
        self.sums = {name: self.sums[name] + m if name in self.sums else m for name, m in metrics.items()}
        # Waiting for this step's numbers keeps the queue of steps at one, so that a signal is obeyed at once.
        jax.block_until_ready(self.sums)
        self.items += items

    def write(self, step: int, clock: _Clock) -> dict[str, float]:
        values = {name: float(mean) for name, mean in self.sums.items()}
        values = {name: value for name, value in values.items() if not np.isnan(value) or name == "loss"}
        seconds, waiting = clock.read()
        values |= {"tokens_per_second": self.items / seconds, "data_wait": waiting}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")
        for name, value in values.items():
            self.board.add_scalar(name, value, step)
        self.sums, self.items = {}, 0
        return values

    def close(self):
        self.board.close()


def _keep_lines_until(path: Path, step: int) -> None:
    """Drops the lines of later steps and a torn last line."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
        if line.endswith("\n") and json.loads(line)["step"] <= step:
            kept.append(line)
    path.write_text("".join(kept), encoding="utf-8")


class _progress:
    """A progress bar with the loss, the rate and the time left."""

    def __init__(self, num_steps: int, start: int):
        self.bar = Progress(
            TextColumn("train"),
            BarColumn(),
            TextColumn("{task.completed}/{task.total} steps"),
            TextColumn("{task.fields[numbers]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
        )
        self.task = self.bar.add_task("train", total=num_steps, completed=start, numbers="compiling")

    def __enter__(self):
        self.bar.start()
        return self

    def __exit__(self, *_):
        self.bar.stop()

    def __call__(self, done: int, values: dict[str, float]):
        numbers = f"loss {values['loss']:.3f} · {values['tokens_per_second']:,.0f} tokens/s"
        self.bar.update(self.task, completed=done, numbers=numbers)


class _StopRequest:
    """True once SIGTERM or SIGINT came; a second Ctrl-C interrupts at once."""

    def __init__(self):
        self.requested = False
        self.old: dict[int, Any] = {}

    def __enter__(self):
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self.old[number] = signal.signal(number, self._request)
        return self

    def __exit__(self, *_):
        for number, handler in self.old.items():
            signal.signal(number, handler)

    def _request(self, number, _):
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.requested = True
