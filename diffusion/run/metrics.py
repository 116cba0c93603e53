"""Writes the metrics of a training run: metrics.jsonl, one line every few steps, and the same numbers for TensorBoard.

Each step appears in metrics.jsonl once, however often the run was interrupted: on resuming, lines later than the
checkpoint are removed, because those steps are repeated.
"""

import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from trimask.diffusion.run.folder import json_line, keep_lines_until, read_step_lines, writing
from trimask.diffusion.run.processes import is_first
from trimask.tokenizers.storage.files import append_text, require_regular_file
from trimask.tokenizers.storage.formats import current_name

Metrics = Mapping[str, Any]
"""Metric name → `Mean`; a mean over nothing is not logged."""


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """Lines of a run's metrics.jsonl, under the current metric names. Raises FileNotFoundError if there is none."""
    path = folder / "metrics.jsonl"
    if not os.path.lexists(path):
        raise FileNotFoundError(f"{path}: no such file; `trimask train` writes it")
    require_regular_file(path)
    return [
        {current_name("metric", name): value for name, value in line.items() if type(value) in (int, float)}
        for line in read_step_lines(path)
    ]


class MetricsLog:
    """Writer of metrics.jsonl and tensorboard/ in a run folder; only the first process of the run writes."""

    def __init__(self, folder: Path, start: int):
        """Opens the files, and removes from metrics.jsonl what follows step `start`."""
        self._folder, self._path = folder, folder / "metrics.jsonl"
        self._sums: dict[str, Any] = {}
        self._items = 0
        self._board: Any = None
        if not is_first():
            return
        from tensorboardX.event_file_writer import EventsWriter  # loaded here, for only training needs it
        from tensorboardX.proto.event_pb2 import Event, SessionLog

        with writing(folder):
            keep_lines_until(self._path, start)
            (folder / "tensorboard").mkdir(parents=True, exist_ok=True)
            # Not SummaryWriter: its writer thread dies if the disk is full, and the next call then blocks forever.
            self._board = EventsWriter(str(folder / "tensorboard" / "events"))
            # Tells TensorBoard to discard the later steps, which were written before the run was interrupted.
            self._board.write_event(Event(step=start + 1, session_log=SessionLog(status=SessionLog.START)))

    def __enter__(self) -> "MetricsLog":
        return self

    def __exit__(self, *_) -> None:
        if self._board is not None:
            with writing(self._folder):
                self._board.close()

    def add(self, metrics: Metrics, items: int) -> Metrics:
        """Adds a step's metrics to the current line, and returns them as host arrays.

        Fetching them waits for the step to finish. This keeps at most one step queued, so that a signal is obeyed at
        once.
        """
        fetched = jax.device_get(dict(metrics))
        self._sums = {name: self._sums[name] + m if name in self._sums else m for name, m in fetched.items()}
        self._items += items
        return fetched

    def write(self, step: int, read_clock: Callable[[], tuple[float, float]]) -> dict[str, float]:
        """Writes the current line and returns it.

        `read_clock` gives the seconds since the last line and the fraction of them spent waiting for data.
        """
        values = {name: float(mean) for name, mean in self._sums.items()}
        values = {name: value for name, value in values.items() if not np.isnan(value)}
        seconds, waiting = read_clock()
        values |= {"tokens_per_second": self._items / seconds, "data_wait": waiting}
        self._sums, self._items = {}, 0
        if self._board is None:
            return values
        from tensorboardX.proto.event_pb2 import Event
        from tensorboardX.summary import scalar

        with writing(self._folder):
            append_text(self._path, json_line({"step": step, **values}))
            for name, value in values.items():
                self._board.write_event(Event(step=step, wall_time=time.time(), summary=scalar(name, value)))
        return values

    def flush(self) -> None:
        """Flushes everything written so far to disk."""
        if self._board is not None:
            with writing(self._folder):
                self._board.flush()
