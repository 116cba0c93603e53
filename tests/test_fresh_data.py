"""The study of fresh data: the rows that it takes for trained on are, and its verdict follows its rule."""

import csv
import dataclasses

import numpy as np
import pytest
from madeup import MadeUp

from trimask.diffusion.data.batches import BatchConfig
from trimask.diffusion.pretraining.description import TrainConfig
from trimask.diffusion.pretraining.training_batches import training_batches
from trimask.diffusion.studies import fresh_data
from trimask.diffusion.studies.fresh_data import (
    SEEN,
    Fresh,
    FreshData,
    FreshTrial,
    RowBounds,
    claim_of,
    known_rows,
    relative_difference,
)


@pytest.fixture(scope="module")
def train(loaded):
    base = loaded.description.train
    optimizer = dataclasses.replace(base.optimizer, horizon_tokens=400, warmup_tokens=0)
    return dataclasses.replace(base, optimizer=optimizer, batch=BatchConfig(tokens=120, weights={"sums": 0.0}))


def test_examples_seen_are_those_of_the_batches(prepared, train):
    batches = training_batches(prepared, train)
    steps = batches.num_steps(400)
    ids = {name: set() for name in ("drawn", "spoken")}
    for step in range(steps):
        described = batches.describe(step)
        ids[described["dataset"]] |= {id for row in described["ids"] for id in row}
    for name, numbers in batches.examples_seen(steps).items():
        records = prepared.examples(name, "train")
        assert len(set(numbers.tolist())) == len(numbers) > 0
        assert {records[number]["id"] for number in numbers.tolist()} == ids[name]


def test_rows_that_were_trained_on_and_others_are_measured(prepared, train):
    found = known_rows(FreshTrial(train=train, rows=8, draws=2), prepared.folder)
    parts = {(bound.dataset, bound.task, bound.part) for bound in found.bounds}
    assert {(d, t) for d, t, _ in parts} == {
        *(("drawn", task) for task in ("text_to_image", "image_to_text")),
        *(("spoken", task) for task in ("text_to_audio", "audio_to_text")),
    }
    assert {part for _, _, part in parts} >= {SEEN, "validation"} and "train" not in {part for _, _, part in parts}
    assert all(bound.rows <= 4 and np.isfinite(bound.bits_per_token) and bound.tokens > 0 for bound in found.bounds)
    assert found.epochs.keys() == {"drawn", "spoken"} and all(epochs > 0 for epochs in found.epochs.values())


def bounds(seen, held_out, half=0.001):
    return [
        RowBounds("drawn", task, part, 100, bits, half, tokens)
        for task, tokens in (("text_to_image", 300.0), ("image_to_text", 100.0))
        for part, bits in ((SEEN, seen), ("validation", held_out), ("test_original", 9.0))
    ]


@pytest.mark.parametrize(
    ("seen", "held_out", "half", "verdict"),
    [
        (2.0, 2.004, 0.004, "shown"),
        (2.0, 1.99, 0.004, "shown"),
        (2.0, 2.004, 0.02, "undecided"),
        (2.0, 2.012, 0.004, "undecided"),
        (2.0, 2.1, 0.004, "refuted"),
    ],
)
def test_the_verdict_follows_its_rule(seen, held_out, half, verdict):
    claim = claim_of(Fresh({"drawn": 0.4}, bounds(seen, held_out, half)))
    assert claim.verdict == verdict and "200 rows of each" in claim.effect


def test_tasks_are_weighted_by_their_tokens():
    found = [
        RowBounds("drawn", task, part, 10, bits, half, tokens)
        for task, part, bits, half, tokens in (
            ("text_to_image", SEEN, 3.0, 0.3, 30.0),
            ("text_to_image", "validation", 3.3, 0.4, 99.0),
            ("image_to_text", SEEN, 1.0, 0.0, 10.0),
            ("image_to_text", "validation", 1.0, 0.0, 7.0),
        )
    ]
    mean, half = relative_difference(found)
    assert mean == pytest.approx((0.75 * 3.3 + 0.25) / 2.5 - 1) and half == pytest.approx(0.75 * 0.5 / 2.5)


def test_all_that_is_written(prepared, tmp_path, monkeypatch):
    drawn = {}
    monkeypatch.setattr(fresh_data, "draw_intervals", lambda path, panels, *_, columns: drawn.update(panels))
    trials = MadeUp(tmp_path, lambda trial: Fresh({"drawn": 0.42}, bounds(2.0, 2.001)))
    trials.prepared = prepared
    found = fresh_data.study(FreshData(base=TrainConfig()), trials)
    assert (
        "drawn 0.42 times" in found.report
        and "| drawn | text_to_image | trained on | 100 | 2.0000 ± 0.0010 |" in found.report
    )
    assert found.claims[0].verdict == "shown"
    with (tmp_path / "bounds.csv").open() as file:
        assert len(list(csv.DictReader(file))) == 6
    ((_, _, (trial,)),) = trials.asked
    assert trial.rows == 40_000
    assert drawn["drawn: text_to_image"][""]["trained on"] == pytest.approx((2.0, 1.999, 2.001))
