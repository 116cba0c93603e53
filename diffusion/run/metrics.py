"""What a training run writes down: metrics.jsonl, a line per few steps, and the same numbers for TensorBoard.

Each step stands in metrics.jsonl once, however often the run was stopped: on resuming, the lines after the checkpoint
are dropped, for they come again.
"""

import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from trimask.diffusion.run.folder import keep_lines_until, line_of, read_steps, writing
from trimask.diffusion.run.processes import is_first
from trimask.tokenizers.storage.files import append_text, require_regular_file
from trimask.tokenizers.storage.formats import present_name

Metrics = Mapping[str, Any]
"""Name → Mean; a mean of nothing is not logged."""


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl, by the present names of metrics."""
    path = folder / "metrics.jsonl"
    if not os.path.lexists(path):
        raise FileNotFoundError(f"{path}: no such file; `trimask train` writes it")
    require_regular_file(path)
    return [
        {present_name("metric", name): value for name, value in line.items() if type(value) in (int, float)}
        for line in read_steps(path)
    ]


class MetricsLog:
    """metrics.jsonl and tensorboard/ of one run folder, written by the first process of the run."""

    def __init__(self, folder: Path, start: int):
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
            # Not SummaryWriter: its queue's thread dies of a full disk, and then the next call waits for ever.
            self._board = EventsWriter(str(folder / "tensorboard" / "events"))
            # What TensorBoard holds of later steps was written before the run was stopped.
            self._board.write_event(Event(step=start + 1, session_log=SessionLog(status=SessionLog.START)))

    def __enter__(self) -> "MetricsLog":
        return self

    def __exit__(self, *_) -> None:
        if self._board is not None:
            with writing(self._folder):
                self._board.close()

    def add(self, metrics: Metrics, items: int) -> Metrics:
        """Adds a step's numbers to the line in the making; returns them as they are on the host.

        Fetching them waits for the step, which keeps the queue of steps at one, so that a signal is obeyed at once.
        """
        fetched = jax.device_get(dict(metrics))
        self._sums = {name: self._sums[name] + m if name in self._sums else m for name, m in fetched.items()}
        self._items += items
        return fetched

    def write(self, step: int, read_clock: Callable[[], tuple[float, float]]) -> dict[str, float]:
        """Ends the line; `read_clock` gives the seconds since the last one and the share of them spent waiting."""
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
            append_text(self._path, line_of({"step": step, **values}))
            for name, value in values.items():
                self._board.write_event(Event(step=step, wall_time=time.time(), summary=scalar(name, value)))
        return values

    def flush(self) -> None:
        """Everything written so far is on disk."""
        if self._board is not None:
            with writing(self._folder):
                self._board.flush()
