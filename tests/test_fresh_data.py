"""The study of fresh data: the rows that it takes for trained on are, and its verdict follows its rule."""

import csv
import dataclasses

import numpy as np
import pytest

from trimask.diffusion.data.batches import BatchConfig
from trimask.diffusion.evaluation.intervals import ratio_and_half_width
from trimask.diffusion.pretraining.trained_model import load
from trimask.diffusion.pretraining.training_batches import training_batches
from trimask.diffusion.studies import fresh_data
from trimask.diffusion.studies.fresh_data import (
    ALL,
    SEEN,
    FreshData,
    RowBounds,
    RowsTrial,
    claim_of,
    relative_difference,
    sums_of,
)
from trimask.diffusion.studies.trials import Trials, of_model


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


def test_a_study_trains_once_and_measures_rows_that_were_trained_on_and_others(prepared, train, tmp_path, monkeypatch):
    monkeypatch.setattr(fresh_data, "draw_intervals", lambda *_, **__: None)
    monkeypatch.setattr(fresh_data, "_CHUNK", 3)
    config = FreshData(base=train, rows=8, draws=2)
    with Trials(tmp_path, prepared.folder, 0, lambda *_: None) as trials:
        found = fresh_data.study(config, trials)
        with (tmp_path / "bounds.csv").open() as file:
            rows = list(csv.DictReader(file))
        tasks = {"drawn": ("text_to_image", "image_to_text"), "spoken": ("text_to_audio", "audio_to_text")}
        assert {(row["dataset"], row["task"]) for row in rows} == {
            (name, task) for name, of_name in tasks.items() for task in (*of_name, ALL)
        }
        sizes = {(row["dataset"], row["part"]): int(row["rows"]) for row in rows}
        assert sizes["drawn", SEEN] == sizes["drawn", "validation"] == 4 and sizes["drawn", "test"] == 3
        assert not {part for _, part in sizes} & {"train"}
        # The sums of a part's trials are those of all its rows at once.
        loaded = load(tmp_path / "run")
        (whole,) = (
            RowsTrial(
                **of_model(str(tmp_path / "run"), loaded.step),
                dataset="drawn",
                part=SEEN,
                total=4,
                first=0,
                rows=4,
                draws=2,
            ),
        )
        (bound,) = (row for row in rows if (row["dataset"], row["part"], row["task"]) == ("drawn", SEEN, ALL))
        ratio, half = fresh_data.measure_rows(whole, prepared.folder).tasks[ALL].ratio_and_half_width()
        assert (float(bound["bits_per_token"]), float(bound["half_width"])) == pytest.approx((ratio, half), rel=1e-5)
        assert found.claims and "Passes over the training rows: drawn " in found.report
    # Nothing is trained or measured again.
    monkeypatch.setattr(fresh_data, "train", lambda *_: pytest.fail("trained again"))
    with Trials(tmp_path, prepared.folder, 0, lambda *_: None, adds=False) as trials:
        assert fresh_data.study(config, trials) == found
    # Nor is the model needed to draw the report again, wherever the folder is.
    moved = tmp_path.with_name(f"{tmp_path.name}-moved")
    (tmp_path / "run").rename(tmp_path.with_name(f"{tmp_path.name}-run"))
    tmp_path.rename(moved)
    with Trials(moved, prepared.folder, 0, lambda *_: None, adds=False) as trials:
        assert fresh_data.study(config, trials) == found
        with pytest.raises(ValueError, match="rows must be at least two for each of 3 datasets, got 5"):
            fresh_data.study(dataclasses.replace(config, rows=5), trials)
    other, said = tmp_path / "other", "holds no complete study: its training is missing"
    with (
        Trials(other, prepared.folder, 0, lambda *_: None, adds=False) as trials,
        pytest.raises(ValueError, match=said),
    ):
        fresh_data.study(config, trials)


def test_sums_give_the_ratio_and_interval_of_the_rows():
    draw = np.random.default_rng(0)
    bits, tokens = draw.uniform(1, 9, 30), draw.integers(1, 5, 30).astype(float)
    parts = [sums_of(bits[part], tokens[part]) for part in (slice(0, 11), slice(11, 30))]
    assert parts[0].plus(parts[1]).ratio_and_half_width() == pytest.approx(ratio_and_half_width(bits, tokens))
    assert parts[0].plus(parts[1]).rows == 30


def bounds(seen, held_out, half=0.001):
    return [
        RowBounds(dataset, ALL, part, 100, bits, half, tokens)
        for dataset, tokens in (("drawn", 300.0), ("spoken", 100.0))
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
    claim = claim_of(bounds(seen, held_out, half))
    assert claim.verdict == verdict and "200 rows of each" in claim.effect


def test_datasets_are_weighted_by_their_tokens():
    found = [
        RowBounds(dataset, task, part, 10, bits, half, tokens)
        for dataset, task, part, bits, half, tokens in (
            ("drawn", ALL, SEEN, 3.0, 0.3, 30.0),
            ("drawn", ALL, "validation", 3.3, 0.4, 99.0),
            ("drawn", "text_to_image", SEEN, 7.0, 0.4, 20.0),
            ("spoken", ALL, SEEN, 1.0, 0.0, 10.0),
            ("spoken", ALL, "validation", 1.0, 0.0, 7.0),
        )
    ]
    mean, half = relative_difference(found)
    assert mean == pytest.approx((0.75 * 3.3 + 0.25) / 2.5 - 1) and half == pytest.approx(0.75 * 0.5 / 2.5)
