"""The study of samplers: what it chooses, and what it leaves behind."""

import csv
import dataclasses
import json
from collections import Counter
from dataclasses import replace

import pytest

from trimask.diffusion import configuration
from trimask.diffusion.description import RunDescription
from trimask.diffusion.sampling.config import GenerationConfig
from trimask.diffusion.studies.sampling import Point, SamplingStudy, Verdict, choose, study
from trimask.diffusion.studies.trials import Trials


def point(score, nfe, error=0.02, distance=None):
    verdicts = [Verdict("label", score, error, True)]
    verdicts += [] if distance is None else [Verdict("frechet", distance, 0.5, False)]
    return Point("image", "a: b", "strategy", GenerationConfig(steps=int(nfe)), tuple(verdicts), float(nfe), 1.0)


def test_the_cheapest_of_those_as_good_as_the_best_is_chosen():
    scores = [(0.97, 8), (0.99, 32), (0.98, 16), (0.99, 24), (0.5, 1)]
    for error, nfe in ((0.02, 8), (0.01, 16), (0.0, 24)):
        assert choose([point(*score, error) for score in scores], 0.0).nfe == nfe


def test_of_those_that_are_right_the_nearest_to_real_media_are_chosen():
    points = [point(1.0, 1, distance=9.0), point(0.99, 8, distance=3.4), point(0.99, 16, distance=3.0)]
    assert choose(points, 0.0).nfe == 8
    # To be classified better than real media is not better.
    real = [replace(p, verdicts=(replace(p.verdicts[0], on_real=0.9), p.verdicts[1])) for p in points]
    assert choose([*real[:2], point(0.89, 4, distance=3.4), real[2]], 0.0).nfe == 4
    # What is wrong is not chosen, however near.
    assert choose([*points, point(0.5, 2, distance=0.1)], 0.0).nfe == 8
    assert choose([*points, point(0.99, 32, distance=2.0)], 0.0).nfe == 32


def test_answers_that_are_all_the_same_are_not_chosen_while_others_differ():
    points = [replace(point(1.0, 1), distinct=0.1), replace(point(0.9, 4), distinct=0.96)]
    assert choose(points, 0.95).nfe == 4
    assert choose(points[:1], 0.95).nfe == 1


SMALL = SamplingStudy(
    guidances=(0.0, 1.0),
    temperatures=(1.0,),
    steps=(1,),
    planned=("random",),
    thresholds=(),
    factors=(),
    entropy_bounds=(),
    blocks=(1, 1000),
    draws=2,
)


@pytest.fixture
def trials(loaded, prepared, tmp_path, monkeypatch):
    monkeypatch.setattr("trimask.diffusion.studies.sampling.load", lambda folder: loaded)
    return Trials(tmp_path, prepared.folder, 0, lambda *_: None)


def test_every_task_is_measured_and_what_is_chosen_becomes_the_runs_default(trials, loaded, tmp_path):
    text = study(dataclasses.replace(SMALL, modalities=("text", "image"), max_examples=4, apply=True), trials)
    with (tmp_path / "points.csv").open() as file:
        rows = list(csv.DictReader(file))
    lines = {(row["task"].split(": ")[1], row["judge"]) for row in rows}
    texts = {(task, "exact_match") for task in ("text", "image_to_text", "audio_to_text")}
    media = {("text_to_image", judge) for judge in ("label", "frechet")}
    assert lines == texts | media
    # Before, two guidances, one step of random, three caches; of text there is no guidance to choose.
    for task, judge in lines:
        own = [row for row in rows if row["task"].endswith(f": {task}") and row["judge"] == judge]
        parts = Counter(row["part"] for row in own)
        assert parts == {"before": 1, "guidance": 1 if (task, judge) in texts else 2, "strategy": 1, "cache": 3}
        assert all(float(row["error"]) >= 0 for row in own)
        # Blocks of one token: a cache that is made anew for each approximates nothing.
        assert len({row["value"] for row in own if row["part"] == "cache"}) == 1
    ways = json.loads((tmp_path / "generation.json").read_text())
    assert set(ways) == {"text", "image"} and ways["text"]["guidance"] == 0
    assert (tmp_path / "guidance.png").stat().st_size and (tmp_path / "fronts.png").stat().st_size
    assert text.count("| chosen |") == text.count("| before |") == 4
    description = configuration.load(loaded.folder / "config.json", RunDescription)
    (loaded.folder / "config.json").unlink()
    usual = {name: configuration.to_dict(way) for name, way in loaded.description.train.generation.items()}
    found = {name: configuration.to_dict(way) for name, way in description.train.generation.items()}
    assert found == usual | ways
    assert description == dataclasses.replace(loaded.description, train=description.train)


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        ({"steps": ()}, "there must be"),
        ({"draws": 1}, "draws must be at least 2"),
        ({"blocks": (0,)}, "blocks at least 1"),
        ({"planned": ("best",)}, "no strategy 'best'"),
        ({"thresholds": (2.0,)}, "2.0"),
    ],
)
def test_impossible_grids_are_refused(bad, reason):
    with pytest.raises(ValueError, match=reason):
        SamplingStudy(**bad)


def test_a_split_without_questions_is_refused(trials):
    with pytest.raises(ValueError, match="its split 'tset' asks nothing"):
        study(dataclasses.replace(SMALL, split="tset"), trials)
    with pytest.raises(ValueError, match="asks nothing of smells that can be judged"):
        study(dataclasses.replace(SMALL, modalities=("smells",)), trials)
