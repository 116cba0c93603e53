"""The study of sampling: the settings that it chooses, and the files that it writes."""

import csv
import json
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import fakes
import madeup
import pytest
from madeup import MadeUp, written

from trimask.diffusion.evaluation.results import Score
from trimask.diffusion.pretraining.description import RunDescription
from trimask.diffusion.sampling.generation_config import GenerationConfig
from trimask.diffusion.studies import sampling_claims, sampling_fronts, sampling_report, sampling_trials
from trimask.diffusion.studies.sampling_fronts import (
    SamplingStudy,
    TaskOutcome,
    final,
    measure_target,
    measure_task,
    rule,
    study,
    tasks_to_measure,
)
from trimask.diffusion.studies.sampling_report import PointScore, SamplingPoint, cheapest_of_best
from trimask.diffusion.studies.trials import Trials, weights_digest
from trimask.tokenizers.storage import configuration


def point(score, nfe, error=0.02, distance=None):
    scores = [PointScore("label", score, error, None, True)]
    scores += [] if distance is None else [PointScore("frechet", distance, 0.5, None, False)]
    how = GenerationConfig(steps=int(nfe))
    return SamplingPoint("image", "a: b", "strategy", how, tuple(scores), float(nfe), 1.0, "validation", 10)


def test_the_cheapest_of_those_as_good_as_the_best_is_chosen():
    scores = [(0.97, 8), (0.99, 32), (0.98, 16), (0.99, 24), (0.5, 1)]
    for error, nfe in ((0.02, 8), (0.01, 16), (0.0, 24)):
        assert cheapest_of_best([point(*score, error) for score in scores], 0.0).nfe == nfe


def test_of_those_that_are_right_the_nearest_to_real_media_are_chosen():
    points = [point(1.0, 1, distance=9.0), point(0.99, 8, distance=3.4), point(0.99, 16, distance=3.0)]
    assert cheapest_of_best(points, 0.0).nfe == 8
    # To be classified better than real media is not better.
    real = [replace(p, scores=(replace(p.scores[0], on_real=0.9), p.scores[1])) for p in points]
    assert cheapest_of_best([*real[:2], point(0.89, 4, distance=3.4), real[2]], 0.0).nfe == 4
    # Settings with many wrong answers are not chosen, however small their distance.
    assert cheapest_of_best([*points, point(0.5, 2, distance=0.1)], 0.0).nfe == 8
    assert cheapest_of_best([*points, point(0.99, 32, distance=2.0)], 0.0).nfe == 32


def test_answers_that_are_all_the_same_are_not_chosen_while_others_differ():
    points = [replace(point(1.0, 1), distinct=0.1), replace(point(0.9, 4), distinct=0.96)]
    assert cheapest_of_best(points, 0.95).nfe == 4
    assert cheapest_of_best(points[:1], 0.95).nfe == 1


SMALL = SamplingStudy(
    run="runs/made-up",
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


@pytest.fixture(autouse=True)
def digests(monkeypatch):
    """Digests of the weights in folders; those of models that are nowhere are made up."""

    def digest(folder, step):
        return weights_digest(folder, step) if folder.exists() else f"made up at {step}"

    monkeypatch.setattr("trimask.diffusion.studies.trials.weights_digest", digest)


@pytest.fixture
def trials(loaded, prepared, tmp_path, monkeypatch):
    monkeypatch.setattr("trimask.diffusion.studies.trials.load", fakes.opening(loaded, Path(SMALL.run)))
    with Trials(tmp_path, prepared.folder, 0, lambda *_: None) as trials:
        yield trials


IMAGE, TEXT = (
    GenerationConfig(strategy="threshold", threshold=0.75, guidance=0.5, temperature=0.25),
    GenerationConfig(strategy="random", steps=7, temperature=0.125),
)
"""Sampling settings of the run, for pictures and for texts."""


def made(task, part, config, values, nfe, distinct):
    """A point; pictures have two judges, both of which also judge real ones."""
    share = (max(0.0, values[0] - 0.03125), min(1.0, values[0] + 0.03125))
    if task.endswith("image"):
        distance = (values[1] - 0.5, values[1] + 0.5)
        scores = (
            PointScore("label", values[0], 0.0125, share, True, 0.875),
            PointScore("frechet", values[1], 0.25, distance, False, 1.5),
        )
        return SamplingPoint("image", task, part, config, scores, nfe, distinct, "validation", 10)
    scores = (PointScore("exact_match", values[0], 0.0625, share, True),)
    return SamplingPoint("text", task, part, config, scores, nfe, distinct, "validation", 10)


CHOSEN = {"image": replace(IMAGE, strategy="random", steps=3), "text": replace(TEXT, guidance=0.0, steps=5)}
POINTS = {
    "image": [
        made("a: text_to_image", "before", IMAGE, (0.5, 9.0), 16.5, 1.0),
        made("a: text_to_image", "strategy", replace(IMAGE, strategy="random", steps=5), (0.625, 5.0), 5.0, 0.75),
        made("a: text_to_image", "strategy", CHOSEN["image"], (0.75, 6.0), 3.0, 0.875),
        made("a: text_to_image", "guidance", replace(CHOSEN["image"], guidance=2.0), (0.25, 7.0), 3.25, 0.5),
        made("a: text_to_image", "guidance", replace(CHOSEN["image"], guidance=1.0), (0.375, 8.0), 3.5, 0.625),
        made("a: text_to_image", "guidance", CHOSEN["image"], (0.75, 6.25), 3.0, 0.9),
        *(
            made("a: text_to_image", "cache", replace(CHOSEN["image"], block_length=block, cache=cache), *rest)
            for block, cache, *rest in (
                (8, "none", (0.1, 10.0), 31.0, 0.1),
                (8, "prefix", (0.2, 20.0), 32.0, 0.2),
                (8, "dual", (0.3, 30.0), 33.0, 0.3),
                (4, "none", (0.4, 40.0), 61.0, 0.4),
                (4, "prefix", (0.6, 60.0), 62.0, 0.6),
                (4, "dual", (0.7, 70.0), 63.0, 0.7),
            )
        ),
    ],
    "text": [
        made("b: text", "before", TEXT, (0.9375,), 7.0, 0.4375),
        made("c: image_to_text", "before", TEXT, (0.8125,), 8.0, 0.3125),
        made("b: text", "guidance", CHOSEN["text"], (0.96875,), 5.0, 0.5625),
        made("c: image_to_text", "guidance", CHOSEN["text"], (1.0,), 6.0, 0.6875),
    ],
}

NEW_DRAWS = {
    ("image", "image"): [
        [made("a: text_to_image", "crosswise", CHOSEN["image"], (0.5, 7.5), 3.0, 0.75)],
        [made("a: text_to_image", "crosswise", CHOSEN["image"], (0.75, 8.5), 4.0, 1.0)],
    ],
    ("text", "text"): [
        [
            made("b: text", "crosswise", CHOSEN["text"], (value,), 5.0, 0.5),
            made("c: image_to_text", "crosswise", CHOSEN["text"], (value + 0.03125,), 6.0, 0.75),
        ]
        for value in (0.8125, 0.9375)
    ],
}


def test_all_that_is_written(tmp_path, monkeypatch):
    loaded = SimpleNamespace(step=1234, description=SimpleNamespace(train=SimpleNamespace(generation={})))
    opened = fakes.opening((loaded, None), "runs/other", tmp_path / "data")
    monkeypatch.setattr(sampling_fronts, "open_run", opened)
    monkeypatch.setattr(sampling_fronts, "asked_by_target", lambda *_: {})
    monkeypatch.setattr(sampling_fronts, "choose", lambda *_: ([*POINTS["image"], *POINTS["text"]], CHOSEN))
    monkeypatch.setattr(sampling_fronts, "measure_crosswise", lambda *_: NEW_DRAWS)
    figures = madeup.figures(monkeypatch, sampling_report)
    found = study(replace(SMALL, run="runs/other", split="validation"), MadeUp(tmp_path, None))
    assert found.claims == [] and found.report == written(
        r"""
        runs/other at step 1234, split validation: 16 measurements. Chosen: the settings with the fewest evaluations among \
        all as good as the best.

        | task |  | settings | score (95 % interval) | NFE | distinct |
        | --- | --- | --- | --- | --- | --- |
        | a: text_to_image | before | threshold, 0.75, temperature 0.25, guidance 0.5 | label 50.0% (46.9%–53.1%); frechet 9 (8.5–9.5) | 16.5 | 100.0% |
        | a: text_to_image | chosen | random, 3 steps, temperature 0.25, guidance 0.5 | label 75.0% (71.9%–78.1%); frechet 6.25 (5.75–6.75) | 3.0 | 90.0% |
        | a: text_to_image | chosen, new draws | random, 3 steps, temperature 0.25, guidance 0.5 | label 62.5%; frechet 8 (1.65–14.4) | 3.5 | 87.5% |
        | a: text_to_image | real media |  | label 87.5%; frechet 1.5 |  |  |
        | b: text | before | random, 7 steps, temperature 0.125, guidance 0 | exact_match 93.8% (90.6%–96.9%) | 7.0 | 43.8% |
        | b: text | chosen | random, 5 steps, temperature 0.125, guidance 0 | exact_match 96.9% (93.8%–100.0%) | 5.0 | 56.2% |
        | b: text | chosen, new draws | random, 5 steps, temperature 0.125, guidance 0 | exact_match 87.5% | 5.0 | 50.0% |
        | c: image_to_text | before | random, 7 steps, temperature 0.125, guidance 0 | exact_match 81.2% (78.1%–84.4%) | 8.0 | 31.2% |
        | c: image_to_text | chosen | random, 5 steps, temperature 0.125, guidance 0 | exact_match 100.0% (96.9%–100.0%) | 6.0 | 68.8% |
        | c: image_to_text | chosen, new draws | random, 5 steps, temperature 0.125, guidance 0 | exact_match 90.6% | 6.0 | 75.0% |

        Intervals are 95 %: of shares over the questions; of distances over draws, from the deviation of 2 draws with \
        the run's own settings. The draw that chose the settings favours them; *new draws* is the mean over 5 others, with \
        intervals of distances over them. *Real media* are held-out ones for shares, and as many training ones for \
        distances. With --apply they become the run's defaults.

        The chosen settings in blocks, with caches:

        | task | block | NFE | none | prefix | dual |
        | --- | --- | --- | --- | --- | --- |
        | a: text_to_image | 8 | 31.0 | label 10.0% (6.9%–13.1%) | label 20.0% (16.9%–23.1%) | label 30.0% (26.9%–33.1%) |
        | a: text_to_image | 8 | 31.0 | frechet 10 (9.5–10.5) | frechet 20 (19.5–20.5) | frechet 30 (29.5–30.5) |
        | a: text_to_image | 4 | 61.0 | label 40.0% (36.9%–43.1%) | label 60.0% (56.9%–63.1%) | label 70.0% (66.9%–73.1%) |
        | a: text_to_image | 4 | 61.0 | frechet 40 (39.5–40.5) | frechet 60 (59.5–60.5) | frechet 70 (69.5–70.5) |
        """  # noqa: E501
    )
    assert madeup.files(tmp_path) == ["generation.json", "points.csv"]
    lines = (tmp_path / "points.csv").read_text().splitlines()
    assert len(lines) == 1 + 12 * 2 + 4
    assert "\n".join([*lines[:3], lines[14], lines[-1]]) == written(
        """
        task,part,strategy,steps,threshold,factor,entropy_bound,temperature,guidance,block_length,cache,nfe,distinct,judge,value,low,high,on_real
        a: text_to_image,before,threshold,16,0.75,1.0,0.1,0.25,0.5,,none,16.5,1.0,label,0.5,0.46875,0.53125,0.875
        a: text_to_image,before,threshold,16,0.75,1.0,0.1,0.25,0.5,,none,16.5,1.0,frechet,9.0,8.5,9.5,1.5
        a: text_to_image,cache,random,3,0.75,1.0,0.1,0.25,0.5,8,none,31.0,0.1,frechet,10.0,9.5,10.5,1.5
        c: image_to_text,guidance,random,5,0.9,1.0,0.1,0.125,0.0,,none,6.0,0.6875,exact_match,1.0,0.96875,1.0,
        """
    )
    ways = json.loads((tmp_path / "generation.json").read_text())
    assert ways == {modality: configuration.to_dict(way) for modality, way in CHOSEN.items()}
    assert {name: columns for name, (_, columns) in figures.items()} == {"guidance.png": 2, "fronts.png": 3}
    assert [(p.title, p.y, p.scales, p.curves) for p in figures["guidance.png"][0]] == [
        ("a: text to image", "label", ("linear", "linear"), {"temperature 0.25": [(0.5, 0.75), (1, 0.375), (2, 0.25)]}),
        ("a: text to image", "frechet", ("linear", "log"), {"temperature 0.25": [(0.5, 6.25), (1, 8.0), (2, 7.0)]}),
    ]
    assert [(p.title, p.y, p.scales, p.curves) for p in figures["fronts.png"][0]] == [
        ("a: text to image", "label", ("log", "linear"), {"random": [(3.0, 0.75), (5.0, 0.625)]}),
        ("a: text to image", "frechet", ("log", "log"), {"random": [(3.0, 6.0), (5.0, 5.0)]}),
        ("b: text", "exact_match", ("log", "linear"), {}),
        ("c: image to text", "exact_match", ("log", "linear"), {}),
    ]
    assert madeup.described(figures) == written(
        """
        fronts.png, 3 columns
        a: text to image: evaluations (NFE) (log) × label (linear): random: markers
        a: text to image: evaluations (NFE) (log) × frechet (log): random: markers
        b: text: evaluations (NFE) (log) × exact_match (linear): markers
        c: image to text: evaluations (NFE) (log) × exact_match (linear): markers
        guidance.png, 2 columns
        a: text to image: guidance (linear) × label (linear): temperature 0.25: markers
        a: text to image: guidance (linear) × frechet (log): temperature 0.25: markers
        """
    )


def test_a_way_is_described_by_the_number_that_it_goes_by():
    names = ("factor", "entropy_bound", "threshold", "margin")
    configs = {name: GenerationConfig(strategy=name, factor=2.5, entropy_bound=0.25, steps=3) for name in names}
    of = {name: sampling_report.summary(config) for name, config in configs.items()}
    assert {name: words.removesuffix(", temperature 1, guidance 0") for name, words in of.items()} == {
        "factor": "factor, 2.5",
        "entropy_bound": "entropy_bound, 0.25",
        "threshold": "threshold, 0.9",
        "margin": "margin, 3 steps",
    }


def judged(trial, value, nfe=1.0):
    """Made-up outcome of a trial whose ten answers a judge scores as a whole."""
    asked = {"dataset": trial.dataset, "task": trial.task, "split": trial.split, "judge": "exact_match", "examples": 10}
    rest = {"interval": None, "is_share": False, "higher_is_better": True, "on_real": None, "mean_nfe": nfe}
    return TaskOutcome(scores=[Score(**asked, value=value, **rest)], distinct=1.0)


def test_what_is_tried_is_every_strategy_then_guidance_then_caches(loaded, prepared, tmp_path):
    """Two tasks that make text, of made-up scores: the cheapest strategy and the second temperature are best."""
    config = replace(
        SMALL,
        guidances=(0.0, 3.0),
        temperatures=(1.0, 0.5),
        steps=(2, 4),
        thresholds=(0.75,),
        blocks=(2, 1000),
        modalities=("text",),
        max_examples=2,
        seed=40,
    )
    tasks = tasks_to_measure(loaded, prepared, config, ["validation"])
    tasks = [asked for asked in tasks if asked.task.name != "audio_to_text"]
    before = loaded.generation("text")

    def made_up(trial):
        way = trial.how
        score = 0.5 + (trial.seed - 40) / 4 if way == before else 0.0 if way.block_length else 0.75
        score += 0.25 * (way.temperature == 0.5) + 0.0625 * (trial.task == "text")
        return judged(trial, score, 10.0 * way.steps + (way.strategy == "threshold"))

    trials = MadeUp(tmp_path, made_up)
    points, chosen = measure_target(tasks, config, 7, before, trials)
    names = [asked.task.name for asked in tasks]
    assert sorted(names) == ["image_to_text", "text"]
    best = replace(before, strategy="random", steps=2)
    tried = {
        "before": [(before, 40), (before, 41)],
        "strategy": [
            (best, 40),
            (replace(best, steps=4), 40),
            (replace(before, strategy="threshold", threshold=0.75), 40),
        ],
        # Texts are not guided.
        "guidance": [
            (replace(best, guidance=0.0, temperature=1.0), 40),
            (replace(best, guidance=0.0, temperature=0.5), 40),
        ],
        "cache": [
            (replace(best, temperature=0.5, block_length=2, cache=cache), 40) for cache in ("none", "prefix", "dual")
        ],
    }
    assert [(what, measure) for what, measure, _ in trials.asked] == [(f"text: {part}", measure_task) for part in tried]
    for (_, _, asked), settings in zip(trials.asked, tried.values(), strict=True):
        assert [(t.task, t.how, t.seed) for t in asked] == [(name, *one) for one in settings for name in names]
        assert {(t.run, t.model_step, t.split, t.max_examples) for t in asked} == {(SMALL.run, 7, "validation", 2)}
    # All but the second draw of the run's own way, which is there for the error.
    assert [(point.task.split(": ")[1], point.part, point.config) for point in points] == [
        (name, part, way) for part, settings in tried.items() for way, seed in settings if seed == 40 for name in names
    ]
    deviation = 0.25 / 2**0.5
    for score in (point.scores[0] for point in points):
        assert score.error == pytest.approx(deviation)
        # The quantile of Student's distribution for two draws is 12.7062.
        assert score.interval[1] - score.value == pytest.approx(12.7062 * deviation, rel=1e-5)
        assert score.value - score.interval[0] == pytest.approx(12.7062 * deviation, rel=1e-5)
    assert chosen == replace(best, temperature=0.5)


def test_a_share_has_the_interval_of_its_questions_and_its_standard_error(loaded, prepared):
    (asked, *_) = tasks_to_measure(loaded, prepared, SMALL, ["validation"])
    trial = sampling_fronts._trial(SMALL, 7, asked, TEXT, 0)
    outcome = judged(trial, 0.75)
    outcome = replace(outcome, scores=[replace(outcome.scores[0], interval=(0.5, 0.892), is_share=True)])
    point = sampling_trials._point(asked, "strategy", TEXT, outcome)
    point = sampling_report.with_errors(point, {"exact_match": 9.0}, 2)
    assert point.scores[0].interval == (0.5, 0.892) and point.scores[0].error == pytest.approx(0.1)
    two = [replace(point, scores=(replace(point.scores[0], value=v, error=0.3),)) for v in (0.5, 1.0)]
    (mean,) = sampling_report.mean_over_tasks(two).scores
    assert (mean.value, mean.interval) == (0.75, None) and mean.error == pytest.approx(0.3 * 2**0.5 / 2)


def test_tasks_are_of_every_dataset_that_has_the_split_and_media_are_compared_with_real_ones(
    loaded, prepared, monkeypatch
):
    datasets = prepared.manifest.datasets
    for name in datasets:
        prepared.examples(name, "train")  # opened, and compared with the manifest, once
    name, first = next(iter(datasets.items()))
    splits = {split: shards for split, shards in first.splits.items() if split != SMALL.split}
    changed = replace(prepared.manifest, datasets=datasets | {name: replace(first, splits=splits)})
    monkeypatch.setattr(prepared, "manifest", changed)
    monkeypatch.setattr(sampling_trials, "open_run", lambda *_: (loaded, prepared))
    usual = sampling_trials.choose_judges
    monkeypatch.setattr(sampling_trials, "choose_judges", lambda *given: usual(*given) * 2)  # of several, the first
    sampling_trials._opened.cache_clear()
    judges = {}
    for asked in tasks_to_measure(loaded, prepared, SMALL, [SMALL.split]):
        about = (asked.held_out.dataset, asked.task.name, asked.held_out.split)
        exam, _ = sampling_trials._exam.__wrapped__(SMALL.run, prepared.folder, *about, None)
        judges[asked.task.name] = [judge.name for judge in exam.judges]
    sampling_trials._opened.cache_clear()
    assert judges == {
        "text_to_audio": ["label", "frechet", "frechet"],
        "audio_to_text": ["exact_match"],
        "text": ["exact_match"],
    }


def test_a_task_is_measured_once_and_what_is_chosen_becomes_the_runs_default(
    trials, loaded, prepared, tmp_path, monkeypatch
):
    monkeypatch.setattr("jax.clear_caches", lambda: None)  # other tests go on with what is compiled
    config = replace(SMALL, modalities=("image",), max_examples=4, apply=True)
    text = study(config, trials).report
    with (tmp_path / "points.csv").open() as file:
        rows = list(csv.DictReader(file))
    # Before, one step of random, two guidances, three caches.
    parts = {"before": 1, "strategy": 1, "guidance": 2, "cache": 3}
    for judge in ("label", "frechet"):
        own = [row for row in rows if row["judge"] == judge]
        assert Counter(row["part"] for row in own) == parts and {row["task"] for row in own} == {"drawn: text_to_image"}
        assert all(float(row["low"]) <= float(row["value"]) <= float(row["high"]) for row in own)
        # Blocks of one token: a cache that is made anew for each approximates nothing.
        assert len({row["value"] for row in own if row["part"] == "cache"}) == 1
    ways = json.loads((tmp_path / "generation.json").read_text())
    assert set(ways) == {"image"} and "These are the run's defaults." in text
    description = configuration.load(loaded.folder / "config.json", RunDescription)
    (loaded.folder / "config.json").unlink()
    usual = {name: configuration.to_dict(way) for name, way in loaded.description.train.generation.items()}
    found = {name: configuration.to_dict(way) for name, way in description.train.generation.items()}
    assert found == usual | ways
    monkeypatch.setattr(Trials, "may_add", False)  # as with --final and --show
    assert "With --apply they become the run's defaults." in study(config, trials).report
    assert not (loaded.folder / "config.json").exists()
    assert description == replace(loaded.description, train=description.train)
    # The same command measures nothing again, although the run's own settings are others now; nor does --final.
    applied = replace(loaded, description=description)
    monkeypatch.setattr("trimask.diffusion.studies.trials.load", fakes.opening(applied, Path(SMALL.run)))
    monkeypatch.setattr(trials, "run_unordered", lambda _, work: iter(work and pytest.fail("measured again")))
    trials.adds = False
    assert study(config, trials).report == text and not (loaded.folder / "config.json").exists()
    asked = []

    def score(trial, data):
        asked.append(trial)
        return judged(trial, 0.5 if trial.seed == 0 else 0.75, 3.0)

    score.__name__ = "measure_task"
    monkeypatch.setattr(sampling_fronts, "measure_task", score)
    monkeypatch.setattr(
        trials, "run_unordered", lambda function, work: ((n, function(*one)) for n, one in enumerate(work))
    )
    # The run with its former settings: what is scored is what was chosen, not what the run does by default.
    monkeypatch.setattr("trimask.diffusion.studies.trials.load", fakes.opening(loaded, Path(SMALL.run)))
    result = final(config, trials)
    (way,) = {trial.how for trial in asked}
    assert configuration.to_dict(way) == ways["image"]
    assert [(trial.task, trial.split, trial.seed) for trial in asked] == [
        ("text_to_image", "test", 0),
        ("text_to_image", "test", 1),
    ]
    (figure,), half = result.figures, 12.7062 * 0.25 / 2**0.5
    assert result.chosen == [f"image: {sampling_report.summary(way)}"]
    assert (figure.split, figure.value, figure.over, figure.nfe) == ("test", 0.5, "2 draws", 3.0)
    assert figure.interval == pytest.approx((0.5 - half, 0.5 + half), rel=1e-5)
    assert figure.setting == f"drawn: text_to_image, {sampling_report.summary(way)}"


def test_every_modality_is_sampled_by_the_settings_of_the_others_in_draws_that_chose_nothing(
    loaded, prepared, tmp_path
):
    chosen = {"image": IMAGE, "text": replace(TEXT, guidance=1.0), "audio": IMAGE}
    tasks = tasks_to_measure(loaded, prepared, SMALL, ["validation"])
    asked = {name: [one for one in tasks if one.task.target == name] for name in chosen}

    def made_up(trial):
        by = trial.how
        score = 0.5 if by.strategy != TEXT.strategy else 0.75 if by.guidance == 0 else 0.625
        return judged(trial, score + 0.001 * trial.seed % 0.003)

    trials = MadeUp(tmp_path, made_up)
    crosswise = sampling_fronts.measure_crosswise(SMALL, 7, asked, chosen, trials)
    # Pictures and sounds have the same settings, and texts are not guided.
    assert set(crosswise) == {
        *(("image", "image"), ("image", "text"), ("audio", "audio"), ("audio", "text")),
        *(("text", "text"), ("text", "image"), ("text", "audio")),
    }
    assert all(len(draws) == 5 and len(draws[0]) == len(asked[name]) for (name, _), draws in crosswise.items())
    assert {trial.seed for _, _, trials in trials.asked for trial in trials} == set(range(1000, 1005))
    claims = {claim.claim: claim for claim in sampling_claims.claims_of("tiny", crosswise)}
    # By the settings of pictures and of sounds texts come out alike.
    assert len(claims) == 3
    of_text = claims["tiny: text is better sampled by its own settings than by those of image or audio"]
    assert of_text.verdict == "shown" and of_text.effect.startswith("more right +25.0% (")
    assert of_text.effect.endswith(" questions; NFE 1, against 1")
    alone = sampling_fronts.measure_crosswise(SMALL, 7, {"image": asked["image"]}, {"image": IMAGE}, trials)
    assert set(alone) == {("image", "image")} and not sampling_claims.claims_of("tiny", alone)


@pytest.mark.parametrize(
    ("other", "verdict", "effect"),
    [
        ((8.0, 8.2, 8.1, 7.9, 8.0), "shown", "frechet distance smaller by +25.4%"),
        ((6.0, 6.0, 6.1, 5.9, 6.0), "refuted", "frechet distance smaller by -0.0%"),
        ((4.0, 9.0, 5.0, 9.0, 6.0), "undecided", "frechet distance smaller by"),
        ((12.0, 12.2, 12.0, 11.8, 12.0), "undecided", "frechet distance smaller by +50.0% (+50.0% to +50.0%)"),
    ],
)
def test_media_are_compared_by_their_distance_relative_to_the_others(other, verdict, effect):
    own, crossed = (
        [[made("a: text_to_image", "crosswise", IMAGE, (0.5, value), 4.0, distinct)] for value in values]
        for values, distinct in (((6.0, 6.1, 6.0, 5.9, 6.0), 1.0), (other, 0.25))
    )
    (claim,) = sampling_claims.claims_of("tiny", {("image", "image"): own, ("image", "audio"): crossed})
    assert claim.verdict == verdict and claim.effect.startswith(effect)
    assert claim.effect.endswith("; NFE 4, against 4; label 50.0%, against 50.0%; distinct 100.0%, against 25.0%")
    assert bool(claim.more) == (verdict == "undecided")


@pytest.mark.parametrize(
    ("own", "other", "verdict"),
    [(0.9, 0.7, "shown"), (0.7, 0.9, "refuted"), (0.91, 0.9, "undecided"), (0.95, 0.9, "undecided")],
)
def test_texts_are_compared_over_questions_since_their_draws_are_alike(own, other, verdict):
    ours, theirs = ([[made("b: text", "crosswise", TEXT, (value,), 4.0, 1.0)] * 2] * 5 for value in (own, other))
    (claim,) = sampling_claims.claims_of("tiny", {("text", "text"): ours, ("text", "image"): theirs})
    # The errors of the two tasks are 0.0625 each.
    mean, low, high = (float(number) for number in re.findall(r"([+-][\d.]+)%", claim.effect))
    assert (low, high) == pytest.approx((mean - 196 * 0.0625, mean + 196 * 0.0625), abs=0.2)
    assert mean == pytest.approx(100 * (own - other), abs=0.06) and claim.verdict == verdict
    assert "20 questions" in claim.effect and bool(claim.more) == (verdict == "undecided")


def test_settings_that_give_the_same_results_are_compared_once_and_not_with_own_ones_like_them():
    own, worse = ([[made("b: text", "crosswise", TEXT, (value,), 4.0, 1.0)]] * 5 for value in (0.9, 0.5))
    slower = [[replace(point, nfe=5.0) for point in draw] for draw in own]
    crosswise = {("text", name): draws for name, draws in (("text", own), ("image", worse), ("audio", worse))}
    crosswise |= {("text", "video"): own, ("text", "depth"): slower}
    names = [claim.claim.split("those of ")[1] for claim in sampling_claims.claims_of("tiny", crosswise)]
    assert names == ["image or audio", "depth"]


def test_the_rule_says_every_number_that_it_depends_on():
    assert "on validation are as good" in rule(SMALL) and "more than 0.05 below" in rule(SMALL)
    assert rule(replace(SMALL, alike=0.25)) != rule(SMALL) == rule(replace(SMALL, steps=(1, 2)))


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        ({"steps": ()}, "there must be"),
        ({"draws": 1}, "draws must be at least 2"),
        ({"blocks": (0,)}, r"blocks\[0\] must be at least 1, got 0"),
        ({"planned": ("best",)}, "no strategy 'best'"),
        ({"thresholds": (2.0,)}, "2.0"),
    ],
)
def test_impossible_grids_are_refused(bad, reason):
    with pytest.raises(ValueError, match=reason):
        SamplingStudy(**bad)


def test_a_split_without_questions_is_refused(trials):
    with pytest.raises(ValueError, match="split 'tset' has no questions"):
        study(replace(SMALL, split="tset"), trials)
    with pytest.raises(ValueError, match="no questions for smells that can be judged"):
        study(replace(SMALL, modalities=("smells",)), trials)
