"""The training loop: step, log, save, and nothing else.

`fit` knows a pure `step(state, batch) -> (state, metrics)` and a pure `batch(step)`; pretraining, policies and codecs
all use it. Because both are pure and the randomness of a step is folded in from its number, what has to be stored to
resume bit for bit is the state, one integer, and what the watch over the loss remembers.
"""

import dataclasses
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, TypeVar

import jax
import numpy as np
from absl import flags
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from trimask.diffusion.run.checkpoint import Checkpoints, Retention
from trimask.diffusion.run.children import end_with
from trimask.diffusion.run.divergence import LossWatch, diverged, not_finite
from trimask.diffusion.run.folder import locked, writing
from trimask.diffusion.run.limits import WorkLimits
from trimask.diffusion.run.metrics import Metrics, MetricsLog
from trimask.diffusion.run.processes import any_process, is_first
from trimask.tokenizers.storage.formats import added
from trimask.tokenizers.storage.ranges import Checked, NonNegativeInt, PositiveInt, Workers, real, whole

State = TypeVar("State")
_UNSAID = "ignore:resource_tracker:UserWarning"
"""What Python's tracker, which tidies up after a process with workers that was ended at once, need not say."""


@dataclass(frozen=True, kw_only=True)
class LoopConfig(Checked):
    """How often to log, save and look; nothing here changes what is learned."""

    log_every: PositiveInt = 10
    """Steps per line of metrics.jsonl; each line is the mean over them."""
    checkpoint_every: PositiveInt = 500
    """Steps between checkpoints; the last step is always saved."""
    keep_last: PositiveInt = 2
    """Checkpoints to keep, the newest; of older ones only those that the next three fields name."""
    keep_every: PositiveInt | None = None
    """Also keep the checkpoints of steps that are multiples of this."""
    keep_best: NonNegativeInt = 0
    """Also keep so many checkpoints with the lowest best_metric."""
    best_metric: str = "loss"
    """Name in metrics.jsonl; lower is better. `--checkpoint best` of other commands goes by it too."""
    sample_every: NonNegativeInt = 0
    """Steps between samples written to samples/; 0 means none."""
    spike_factor: Annotated[float, real(above=1)] | None = 10.0
    """Stop at a loss above so many times its recent mean. None: only where loss or gradient are not finite."""
    prefetch: Annotated[int, whole(1, 4096)] = 4
    """Batches prepared ahead of the step."""
    workers: Workers = 0
    """Processes that prepare batches. 0: a thread of this process."""
    limits: WorkLimits = added(as_before=WorkLimits(), default=WorkLimits())
    """What the training may take."""

    @property
    def retention(self) -> Retention:
        """Which checkpoints stay."""
        return Retention(last=self.keep_last, every=self.keep_every, best=self.keep_best, metric=self.best_metric)


class Interrupted(KeyboardInterrupt):
    """Training was asked to stop; everything up to `step` is saved."""

    def __init__(self, step: int, folder: Path, signal_number: int):
        super().__init__(f"stopped at step {step}, saved in {folder}; the same command resumes")
        self.step = step
        self.exit_status = 128 + signal_number


def fit(
    step: Callable[[State, Any], tuple[State, Metrics]],
    state: State,
    batch: Callable[[int], Any],
    *,
    num_steps: int,
    folder: Path,
    config: LoopConfig,
    items: Callable[[int], int],
    sample: Callable[[State, int], None] | None = None,
    describe: Callable[[int], Any] | None = None,
    milestone: int | None = None,
    to_devices: Callable[[Any], Any] = jax.device_put,
) -> State:
    """Takes `num_steps` steps in all, from the newest good checkpoint in `folder` if there is one.

    `items` counts what the rate is quoted in (tokens) of a step; `describe` says what its batch holds, as plain JSON
    types; after the step `milestone` the state is saved to stay; `to_devices` copies a batch to the devices. SIGTERM
    and Ctrl-C save and raise `Interrupted`; a loss that is not finite, or spikes, raises `Diverged` and saves nothing.
    No other process may train in the folder at the same time, but for those of the same run: all of them call this, and
    a signal to one stops all at the same step.
    """
    retention = dataclasses.replace(config.retention, step=milestone)
    with locked(folder), _StopRequest() as stop, Checkpoints(folder, retention) as checkpoints:
        start, watch = 0, LossWatch(config.spike_factor)
        restored = checkpoints.restore_newest(state, set_aside=True)
        if restored is not None:
            start, state, notes = restored
            watch = LossWatch(config.spike_factor, notes["recent_loss"])
        done, is_stopping = start, False
        with MetricsLog(folder, start) as log, _ProgressBar(num_steps, start) as progress:
            clock = _Clock()
            for index, host_batch in prefetched(batch, start, num_steps, config):
                clock.waited()
                state, step_metrics = step(state, to_devices(host_batch))
                done = index + 1
                metrics = log.add(step_metrics, items(index))
                if config.best_metric not in metrics:
                    names = ", ".join(metrics)
                    raise ValueError(f"--loop.best-metric must be one of {names}; got {config.best_metric}")
                fault = watch.fault(metrics)
                if fault is None and sample is not None and config.sample_every and done % config.sample_every == 0:
                    # Before saving: killed in between, the step comes again and its samples with it.
                    with writing(folder):
                        sample(state, done)
                is_stopping = any_process(stop.signal is not None)
                is_save = is_stopping or done in (num_steps, milestone) or done % config.checkpoint_every == 0
                if is_save:
                    # The loss is the same for all processes; of the state each sees its own part.
                    fault = fault or not_finite(state)
                    if any_process(fault is not None):
                        fault = fault or "another process found a fault in its part of the state"
                if fault is not None:
                    checkpoints.wait()
                    raise diverged(folder, done, fault, watch, metrics, describe(index) if describe else None)
                if is_save or done % config.log_every == 0:
                    line = log.write(done, clock.read)
                    progress(done, line)
                if is_save:
                    log.flush()
                    checkpoints.save(done, state, notes={"recent_loss": watch.recent}, metrics=line)
                if is_stopping:
                    break
                clock.stepped()
    if is_stopping:
        raise Interrupted(done, folder, stop.signal or signal.SIGTERM)
    return state


def prefetched(batch: Callable[[int], Any], start: int, stop: int, config: LoopConfig) -> Iterator[tuple[int, Any]]:
    """(step, batch) in order, prepared ahead by a thread or by processes."""
    import grain  # takes a tenth of a second to load, and only training needs it

    numbered = grain.MapDataset.range(start, stop).map(partial(_numbered, batch))
    if config.workers == 0:
        return iter(numbered.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=config.prefetch)))
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()  # or Grain's workers would want a command line of absl's
    if _UNSAID not in sys.warnoptions:
        sys.warnoptions.append(_UNSAID)
    ahead = -(-config.prefetch // config.workers)
    options = grain.MultiprocessingOptions(num_workers=config.workers, per_worker_buffer_size=ahead)
    shared = numbered.to_iter_dataset(grain.ReadOptions(num_threads=1))
    shared = shared.mp_prefetch(options, partial(_end_with, os.getpid()))
    return _copied(shared)


def _copied(shared: Any) -> Iterator[tuple[int, Any]]:
    """Copies batches out of the memory that Grain shares between processes, and ends these when it is through."""
    iterator = iter(shared)
    try:
        for step, content in iterator:
            yield step, jax.tree.map(np.array, content)
    finally:
        iterator.close()


def _end_with(parent: int, *_: int) -> None:
    """What each of Grain's workers begins with; Grain adds its number and how many there are."""
    end_with(parent)


def _numbered(batch: Callable[[int], Any], step: Any) -> tuple[int, Any]:
    return int(step), batch(int(step))


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


class _ProgressBar:
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
            disable=not is_first(),
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
    """The signal by which the run was asked to stop, SIGTERM or SIGINT; a second Ctrl-C interrupts at once."""

    def __init__(self):
        self.signal: int | None = None
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
        if self.signal is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = number
