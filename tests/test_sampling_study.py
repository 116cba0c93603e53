"""The study of samplers: what it chooses, and what it leaves behind."""

import csv
import dataclasses
import json

import pytest

from trimask.diffusion import configuration
from trimask.diffusion.description import RunDescription
from trimask.diffusion.sampling.config import GenerationConfig
from trimask.diffusion.studies.sampling import Point, SamplingStudy, choose, study
from trimask.diffusion.studies.trials import Trials


def point(score, nfe, error=0.02, distinct=1.0):
    return Point("text_to_image", "strategy", GenerationConfig(steps=int(nfe)), score, error, float(nfe), distinct)


def test_the_cheapest_of_those_as_good_as_the_best_is_chosen():
    points = [point(0.97, 8), point(0.99, 32), point(0.98, 16), point(0.99, 24), point(0.5, 1)]
    assert choose(points, 0.0).nfe == 8
    assert choose([dataclasses.replace(p, error=0.0) for p in points], 0.0).nfe == 24
    assert choose([dataclasses.replace(p, error=0.01) for p in points], 0.0).nfe == 16


def test_answers_that_are_all_the_same_are_not_chosen_while_others_differ():
    points = [point(1.0, 1, distinct=0.1), point(0.9, 4, distinct=0.96)]
    assert choose(points, 0.95).nfe == 4
    assert choose(points[:1], 0.95).nfe == 1


SMALL = SamplingStudy(
    guidances=(0.0, 1.0),
    temperatures=(1.0,),
    steps=(1, 2),
    planned=("random",),
    thresholds=(0.5,),
    factors=(),
    entropy_bounds=(),
)


@pytest.fixture
def trials(loaded, prepared, tmp_path, monkeypatch):
    monkeypatch.setattr("trimask.diffusion.studies.sampling.load", lambda folder: loaded)
    return Trials(tmp_path, prepared.folder, 0, lambda *_: None)


def test_every_task_is_measured_and_each_modality_gets_a_way(trials, loaded, tmp_path):
    text = study(SMALL, trials)
    with (tmp_path / "points.csv").open() as file:
        rows = list(csv.DictReader(file))
    tasks = {row["task"] for row in rows}
    assert tasks == {"text", "image_to_text", "text_to_image", "audio_to_text", "text_to_audio"}
    # Before, two guidances, then two steps of random and a threshold; of text there is no guidance to choose.
    assert [sum(row["task"] == task for row in rows) for task in ("text_to_image", "text")] == [6, 5]
    ways = json.loads((tmp_path / "generation.json").read_text())
    assert set(ways) == {"text", "image", "audio"} and ways["text"]["guidance"] == 0
    assert (tmp_path / "guidance.png").stat().st_size and (tmp_path / "fronts.png").stat().st_size
    assert text.count("| chosen |") == text.count("| before |") == 5
    assert not (loaded.folder / "config.json").exists()


def test_what_is_chosen_can_become_the_runs_default(trials, loaded, tmp_path):
    study(dataclasses.replace(SMALL, apply=True), trials)
    description = configuration.load(loaded.folder / "config.json", RunDescription)
    (loaded.folder / "config.json").unlink()
    ways = json.loads((tmp_path / "generation.json").read_text())
    assert {name: configuration.to_dict(way) for name, way in description.train.generation.items()} == ways
    assert description == dataclasses.replace(loaded.description, train=description.train)


@pytest.mark.parametrize(
    ("bad", "reason"),
    [({"steps": ()}, "there must be"), ({"planned": ("best",)}, "no strategy 'best'"), ({"thresholds": (2.0,)}, "2.0")],
)
def test_impossible_grids_are_refused(bad, reason):
    with pytest.raises(ValueError, match=reason):
        SamplingStudy(**bad)


def test_a_split_without_questions_is_refused(trials):
    with pytest.raises(ValueError, match="its split 'tset' asks nothing"):
        study(dataclasses.replace(SMALL, split="tset"), trials)
