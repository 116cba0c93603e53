"""Metrics of a run in progress: lines of JSON, and events for TensorBoard."""

import json
import struct
from pathlib import Path

import jax.numpy as jnp
import pytest
from tensorboardX.proto.event_pb2 import Event, SessionLog

from trimask.diffusion.run.metrics import MetricsLog
from trimask.diffusion.run.running_mean import Mean


def events_in(folder: Path) -> list[Event]:
    """Events in the folder's file: each is its length, a checksum, the event, and another checksum."""
    (path,) = folder.iterdir()
    data, events = path.read_bytes(), []
    while data:
        (length,) = struct.unpack("<Q", data[:8])
        events.append(Event.FromString(data[12 : 12 + length]))
        data = data[16 + length :]
    return events


def mean(value: float, weight: float = 1.0) -> Mean:
    return Mean(jnp.array(value * weight), jnp.array(weight))


def test_what_was_written_is_on_disk_once_it_is_flushed(tmp_path):
    with MetricsLog(tmp_path, start=4) as log:
        log.add({"loss": mean(2.0), "empty": mean(1.0, weight=0.0)}, items=30)
        fetched = log.add({"loss": mean(5.0, weight=3.0), "empty": mean(1.0, weight=0.0)}, items=10)
        assert float(fetched["loss"]) == 5.0
        values = log.write(6, lambda: (8.0, 0.25))
        log.flush()
        begin, *scalars = [event for event in events_in(tmp_path / "tensorboard") if event.step]
    assert values == {"loss": pytest.approx((2 + 15) / 4), "tokens_per_second": 5.0, "data_wait": 0.25}
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == {"step": 6, **values}
    assert (begin.step, begin.session_log.status) == (5, SessionLog.START)
    shown = {(event.step, value.tag): value.simple_value for event in scalars for value in event.summary.value}
    assert shown == pytest.approx({(6, name): value for name, value in values.items()})


def test_a_line_counts_only_what_came_since_the_last(tmp_path):
    with MetricsLog(tmp_path, start=0) as log:
        log.add({"loss": mean(2.0)}, items=30)
        log.write(1, lambda: (1.0, 0.0))
        log.add({"loss": mean(4.0)}, items=10)
        assert log.write(2, lambda: (2.0, 0.0)) == {"loss": 4.0, "tokens_per_second": 5.0, "data_wait": 0.0}
    assert [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [1, 2]


def test_lines_of_steps_that_are_done_again_are_dropped(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n')
    with MetricsLog(tmp_path, start=1):
        pass
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1}\n'
