"""The training loop: step, log, save, and nothing else.

`train_loop` needs a pure `step(state, batch) -> (state, metrics)` and a pure `batch(step)`; pretraining and policy
training share it. Both are pure and the randomness of a step is derived from its number, so the state, one integer and
the loss watch are all that must be stored to resume bit for bit.
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
from trimask.diffusion.run.divergence import LossWatch, divergence_error, first_non_finite
from trimask.diffusion.run.folder import locked, writing
from trimask.diffusion.run.limits import WorkLimits
from trimask.diffusion.run.metrics import Metrics, MetricsLog
from trimask.diffusion.run.processes import any_process, is_first
from trimask.tokenizers.storage.formats import added_field
from trimask.tokenizers.storage.ranges import Checked, NonNegativeInt, PositiveInt, Workers, real, whole

_State = TypeVar("_State")
_UNSAID = "ignore:resource_tracker:UserWarning"
"""Python's resource tracker warns about the workers of a process that was ended at once; this filter hides it."""


@dataclass(frozen=True, kw_only=True)
class LoopConfig(Checked):
    """How often to log, sample and save, and how to load batches; nothing here changes what is learned."""

    log_every: PositiveInt = 10
    """Number of steps per line of metrics.jsonl; each line is a mean over them."""
    checkpoint_every: PositiveInt = 500
    """Number of steps between checkpoints; the last step is always saved."""
    keep_last: PositiveInt = 2
    """Number of newest checkpoints to keep; older ones are kept only by keep_every and keep_best."""
    keep_every: PositiveInt | None = None
    """Also keep checkpoints whose step is a multiple of this. None: keep no others."""
    keep_best: NonNegativeInt = 0
    """Number of checkpoints with the lowest best_metric to keep as well."""
    best_metric: str = "loss"
    """Metric, as named in metrics.jsonl, that ranks checkpoints; lower is better. `--checkpoint best` of other commands
    uses it too."""
    sample_every: NonNegativeInt = 0
    """Number of steps between samples written to samples/; 0 writes none."""
    spike_factor: Annotated[float, real(above=1)] | None = 10.0
    """Stop if the loss exceeds this many times its recent mean. None: stop only if loss or gradients are not finite."""
    prefetch: Annotated[int, whole(1, 4096)] = 4
    """Number of batches prepared ahead of the training step."""
    workers: Workers = 0
    """Number of processes that prepare batches. 0: a thread of this process."""
    limits: WorkLimits = added_field(as_before=WorkLimits(), default=WorkLimits())
    """Estimated memory and time above which the training is refused."""

    @property
    def retention(self) -> Retention:
        """Which checkpoints to keep."""
        return Retention(last=self.keep_last, every=self.keep_every, best=self.keep_best, metric=self.best_metric)


class Interrupted(KeyboardInterrupt):
    """Training was asked to stop; everything up to `step` is saved."""

    def __init__(self, step: int, folder: Path, signal_number: int):
        super().__init__(f"stopped at step {step}, saved in {folder}; the same command resumes")
        self.step = step
        self.exit_status = 128 + signal_number


def train_loop(
    step: Callable[[_State, Any], tuple[_State, Metrics]],
    state: _State,
    batch: Callable[[int], Any],
    *,
    num_steps: int,
    folder: Path,
    config: LoopConfig,
    items: Callable[[int], int],
    sample: Callable[[_State, int], None] | None = None,
    describe: Callable[[int], Any] | None = None,
    milestone: int | None = None,
    watched: str = "loss",
    to_devices: Callable[[Any], Any] = jax.device_put,
) -> _State:
    """Trains up to step `num_steps`, resuming from the newest good checkpoint in `folder`.

    `items` counts what the rate is quoted in (tokens) for a step; `describe` gives the content of its batch as plain
    JSON types, for the report of a divergence; the checkpoint of step `milestone` is always kept; `watched` is the
    metric whose spikes are faults; `to_devices` copies a batch to the devices. SIGTERM and Ctrl-C save and raise
    `Interrupted`; a loss that is not finite, or spikes, raises `Diverged` and saves nothing. No other run may use the
    folder at the same time. All processes of one run call this, and a signal to one of them stops all at the same step.
    """
    retention = dataclasses.replace(config.retention, step=milestone)
    with locked(folder), _StopRequest() as stop, Checkpoints(folder, retention) as checkpoints:
        start, state, watch = _resumed(checkpoints, state, config, watched)
        done, is_stopping = start, False
        with MetricsLog(folder, start) as log, _ProgressBar(num_steps, start) as progress:
            clock = _Clock()
            for index, host_batch in prefetched(batch, start, num_steps, config):
                clock.waited()
                state, step_metrics = step(state, to_devices(host_batch))
                done = index + 1
                metrics = log.add(step_metrics, items(index))
                _require_metric(config.best_metric, metrics)
                fault = watch.fault(metrics)
                if fault is None and sample is not None and config.sample_every and done % config.sample_every == 0:
                    # Before saving: if the run is killed in between, step and samples are repeated.
                    with writing(folder):
                        sample(state, done)
                is_stopping = any_process(stop.signal is not None)
                is_save = is_stopping or done in (num_steps, milestone) or done % config.checkpoint_every == 0
                if is_save:
                    fault = _agreed_fault(fault, state)
                if fault is not None:
                    checkpoints.wait()
                    raise divergence_error(folder, done, fault, watch, metrics, describe(index) if describe else None)
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


def _resumed(
    checkpoints: Checkpoints, state: _State, config: LoopConfig, watched: str
) -> tuple[int, _State, LossWatch]:
    """First step, state and loss watch: of the newest good checkpoint, or of a new run if there is none."""
    restored = checkpoints.restore_newest(state, set_aside=True)
    if restored is None:
        return 0, state, LossWatch(config.spike_factor, metric=watched)
    return restored.step, restored.tree, LossWatch(config.spike_factor, restored.notes["recent_loss"], watched)


def _require_metric(name: str, metrics: Metrics) -> None:
    if name not in metrics:
        raise ValueError(f"--loop.best-metric must be one of {', '.join(metrics)}; got {name}")


def _agreed_fault(fault: str | None, state: Any) -> str | None:
    """The fault of a step about to be saved, None on all processes or on none.

    The loss is the same on all processes, but each sees only its own part of the state.
    """
    fault = fault or first_non_finite(state)
    if any_process(fault is not None):
        return fault or "another process found a fault in its part of the state"
    return None


def prefetched(batch: Callable[[int], Any], start: int, stop: int, config: LoopConfig) -> Iterator[tuple[int, Any]]:
    """Yields (step, batch) in order, prepared ahead by a thread or by worker processes."""
    import grain  # takes a tenth of a second to load, and only training needs it

    numbered = grain.MapDataset.range(start, stop).map(partial(_numbered, batch))
    if config.workers == 0:
        return iter(numbered.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=config.prefetch)))
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()  # or Grain's workers would ask for absl's command line
    if _UNSAID not in sys.warnoptions:
        sys.warnoptions.append(_UNSAID)
    ahead = -(-config.prefetch // config.workers)
    options = grain.MultiprocessingOptions(num_workers=config.workers, per_worker_buffer_size=ahead)
    shared = numbered.to_iter_dataset(grain.ReadOptions(num_threads=1))
    shared = shared.mp_prefetch(options, partial(_end_with, os.getpid()))
    return _copied(shared)


def _copied(shared: Any) -> Iterator[tuple[int, Any]]:
    """Copies batches out of Grain's shared memory, and ends its worker processes when the iteration ends."""
    iterator = iter(shared)
    try:
        for step, content in iterator:
            yield step, jax.tree.map(np.array, content)
    finally:
        iterator.close()


def _end_with(parent: int, *_: int) -> None:
    """First call of each Grain worker, which passes its number and the number of workers."""
    end_with(parent)


def _numbered(batch: Callable[[int], Any], step: Any) -> tuple[int, Any]:
    return int(step), batch(int(step))


class _Clock:
    """Measures the time since the last log line, and how much of it was spent waiting for data."""

    def __init__(self):
        self.reset()

    def reset(self):
        """Starts measuring from now."""
        self.start = self.last = time.perf_counter()
        self.waiting = 0.0

    def waited(self):
        """Counts the time since the last step ended as waiting for data."""
        self.waiting += time.perf_counter() - self.last

    def stepped(self):
        """Marks the end of a step."""
        self.last = time.perf_counter()

    def read(self) -> tuple[float, float]:
        """Seconds since the last reading, and the fraction of them spent waiting for data."""
        seconds = time.perf_counter() - self.start
        share = self.waiting / seconds
        self.reset()
        return seconds, share


class _ProgressBar:
    """Progress bar with loss, rate and remaining time."""

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
    """Remembers SIGTERM or SIGINT, so that the loop can stop after its step; a second Ctrl-C interrupts at once."""

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
