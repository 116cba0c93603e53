"""The study of sampling: the settings that it chooses, and the files that it writes."""

import csv
import dataclasses
import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import fakes
import madeup
import pytest
from madeup import MadeUp, written

from trimask.diffusion.pretraining.description import RunDescription
from trimask.diffusion.sampling.generation_config import GenerationConfig
from trimask.diffusion.studies import sampling_fronts
from trimask.diffusion.studies.sampling_fronts import (
    SamplingPoint,
    SamplingStudy,
    Verdict,
    cheapest_of_best,
    exams_to_measure,
    measure_target,
    study,
)
from trimask.diffusion.studies.trials import Trials
from trimask.tokenizers.storage import configuration


def point(score, nfe, error=0.02, distance=None):
    verdicts = [Verdict("label", score, error, True)]
    verdicts += [] if distance is None else [Verdict("frechet", distance, 0.5, False)]
    return SamplingPoint(
        "image", "a: b", "strategy", GenerationConfig(steps=int(nfe)), tuple(verdicts), float(nfe), 1.0
    )


def test_the_cheapest_of_those_as_good_as_the_best_is_chosen():
    scores = [(0.97, 8), (0.99, 32), (0.98, 16), (0.99, 24), (0.5, 1)]
    for error, nfe in ((0.02, 8), (0.01, 16), (0.0, 24)):
        assert cheapest_of_best([point(*score, error) for score in scores], 0.0).nfe == nfe


def test_of_those_that_are_right_the_nearest_to_real_media_are_chosen():
    points = [point(1.0, 1, distance=9.0), point(0.99, 8, distance=3.4), point(0.99, 16, distance=3.0)]
    assert cheapest_of_best(points, 0.0).nfe == 8
    # To be classified better than real media is not better.
    real = [replace(p, verdicts=(replace(p.verdicts[0], on_real=0.9), p.verdicts[1])) for p in points]
    assert cheapest_of_best([*real[:2], point(0.89, 4, distance=3.4), real[2]], 0.0).nfe == 4
    # Settings with many wrong answers are not chosen, however small their distance.
    assert cheapest_of_best([*points, point(0.5, 2, distance=0.1)], 0.0).nfe == 8
    assert cheapest_of_best([*points, point(0.99, 32, distance=2.0)], 0.0).nfe == 32


def test_answers_that_are_all_the_same_are_not_chosen_while_others_differ():
    points = [replace(point(1.0, 1), distinct=0.1), replace(point(0.9, 4), distinct=0.96)]
    assert cheapest_of_best(points, 0.95).nfe == 4
    assert cheapest_of_best(points[:1], 0.95).nfe == 1


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
    monkeypatch.setattr("trimask.diffusion.studies.trials.load", fakes.opening(loaded, Path(SMALL.run)))
    return Trials(tmp_path, prepared.folder, 0, lambda *_: None)


IMAGE, TEXT = (
    GenerationConfig(strategy="threshold", threshold=0.75, guidance=0.5, temperature=0.25),
    GenerationConfig(strategy="random", steps=7, temperature=0.125),
)
"""Sampling settings of the run, for pictures and for texts."""


def made(task, part, config, values, nfe, distinct):
    """A point; pictures have two judges, one of which also judges real ones."""
    if task.endswith("image"):
        verdicts = (Verdict("label", values[0], 0.0125, True, 0.875), Verdict("frechet", values[1], 0.25, False, 1.5))
        return SamplingPoint("image", task, part, config, verdicts, nfe, distinct)
    return SamplingPoint("text", task, part, config, (Verdict("exact_match", values[0], 0.0625, True),), nfe, distinct)


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


def test_all_that_is_written(tmp_path, monkeypatch):
    exams = [SimpleNamespace(task=SimpleNamespace(target=target)) for target in ("image", "text", "text")]
    opened = fakes.opening((SimpleNamespace(step=1234), None), "runs/small", tmp_path / "data")
    monkeypatch.setattr(sampling_fronts, "open_run", opened)
    monkeypatch.setattr(sampling_fronts, "exams_to_measure", lambda *_: exams)
    monkeypatch.setattr(
        sampling_fronts, "measure_target", lambda own, *_: (POINTS[own[0].task.target], CHOSEN[own[0].task.target])
    )
    figures = madeup.figures(monkeypatch, sampling_fronts)
    text = study(replace(SMALL, run="runs/small", split="validation"), MadeUp(tmp_path, None))
    assert text == written(
        r"""
        runs/small at step 1234, split validation: 16 measurements. Chosen: the settings with the fewest evaluations among \
        all as good as the best.

        | task |  | settings | score | NFE | distinct |
        | --- | --- | --- | --- | --- | --- |
        | a: text_to_image | before | threshold, 0.75, temperature 0.25, guidance 0.5 | label 50.0% ± 1.2%; frechet 9 ± 0.25 | 16.5 | 100.0% |
        | a: text_to_image | chosen | random, 3 steps, temperature 0.25, guidance 0.5 | label 75.0% ± 1.2%; frechet 6.25 ± 0.25 | 3.0 | 90.0% |
        | a: text_to_image | real media |  | label 87.5%; frechet 1.5 |  |  |
        | b: text | before | random, 7 steps, temperature 0.125, guidance 0 | exact_match 93.8% ± 6.2% | 7.0 | 43.8% |
        | b: text | chosen | random, 5 steps, temperature 0.125, guidance 0 | exact_match 96.9% ± 6.2% | 5.0 | 56.2% |
        | c: image_to_text | before | random, 7 steps, temperature 0.125, guidance 0 | exact_match 81.2% ± 6.2% | 8.0 | 31.2% |
        | c: image_to_text | chosen | random, 5 steps, temperature 0.125, guidance 0 | exact_match 100.0% ± 6.2% | 6.0 | 68.8% |

        With --apply they become the run's defaults.

        The chosen settings in blocks, with caches:

        | task | block | NFE | none | prefix | dual |
        | --- | --- | --- | --- | --- | --- |
        | a: text_to_image | 8 | 31.0 | label 10.0% ± 1.2% | label 20.0% ± 1.2% | label 30.0% ± 1.2% |
        | a: text_to_image | 8 | 31.0 | frechet 10 ± 0.25 | frechet 20 ± 0.25 | frechet 30 ± 0.25 |
        | a: text_to_image | 4 | 61.0 | label 40.0% ± 1.2% | label 60.0% ± 1.2% | label 70.0% ± 1.2% |
        | a: text_to_image | 4 | 61.0 | frechet 40 ± 0.25 | frechet 60 ± 0.25 | frechet 70 ± 0.25 |
        """  # noqa: E501
    )
    assert madeup.files(tmp_path) == ["generation.json", "points.csv"]
    lines = (tmp_path / "points.csv").read_text().splitlines()
    assert len(lines) == 1 + 12 * 2 + 4
    assert "\n".join([*lines[:3], lines[14], lines[-1]]) == written(
        """
        task,part,strategy,steps,threshold,factor,entropy_bound,temperature,guidance,block_length,cache,nfe,distinct,judge,value,error,on_real
        a: text_to_image,before,threshold,16,0.75,1.0,0.1,0.25,0.5,,none,16.5,1.0,label,0.5,0.0125,0.875
        a: text_to_image,before,threshold,16,0.75,1.0,0.1,0.25,0.5,,none,16.5,1.0,frechet,9.0,0.25,1.5
        a: text_to_image,cache,random,3,0.75,1.0,0.1,0.25,0.5,8,none,31.0,0.1,frechet,10.0,0.25,1.5
        c: image_to_text,guidance,random,5,0.9,1.0,0.1,0.125,0.0,,none,6.0,0.6875,exact_match,1.0,0.0625,
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
    of = {name: sampling_fronts.summary(config) for name, config in configs.items()}
    assert {name: words.removesuffix(", temperature 1, guidance 0") for name, words in of.items()} == {
        "factor": "factor, 2.5",
        "entropy_bound": "entropy_bound, 0.25",
        "threshold": "threshold, 0.9",
        "margin": "margin, 3 steps",
    }


def test_what_is_tried_is_every_strategy_then_guidance_then_caches(loaded, prepared, tmp_path, monkeypatch):
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
    exams = [exam for exam in exams_to_measure(loaded, prepared, config) if exam.task.name != "audio_to_text"]
    before = loaded.generation("text")
    asked, reports, let_go = [], [], []
    monkeypatch.setattr("trimask.diffusion.studies.trials._compiled", set())
    monkeypatch.setattr("jax.clear_caches", lambda: let_go.append(len(asked)))

    def made_up(exam, part, way, generator, seed):
        asked.append((exam.task.name, part, way, seed))
        score = {"before": 0.5 + (seed - 40) / 4, "cache": 0.0}.get(part, 0.75)
        score += 0.25 * (way.temperature == 0.5) + 0.0625 * (exam.task.name == "text")
        nfe = 10.0 * way.steps + (way.strategy == "threshold")
        return SamplingPoint("text", exam.task.name, part, way, (Verdict("exact_match", score, 0.0, True),), nfe, 1.0)

    monkeypatch.setattr(sampling_fronts, "_measure_point", made_up)
    points, chosen = measure_target(exams, config, lambda *report: reports.append(report))
    names = [exam.task.name for exam in exams]
    assert sorted(names) == ["image_to_text", "text"]
    best = replace(before, strategy="random", steps=2)
    tried = [
        ("before", before, 40),
        ("before", before, 41),
        ("strategy", best, 40),
        ("strategy", replace(best, steps=4), 40),
        ("strategy", replace(before, strategy="threshold", threshold=0.75), 40),
        # Texts are not guided.
        ("guidance", replace(best, guidance=0.0, temperature=1.0), 40),
        ("guidance", replace(best, guidance=0.0, temperature=0.5), 40),
        *(
            ("cache", replace(best, temperature=0.5, block_length=2, cache=cache), 40)
            for cache in ("none", "prefix", "dual")
        ),
    ]
    assert asked == [(name, *one) for one in tried for name in names]
    assert let_go == [4, 8, 10], "where another strategy begins"
    # All but the second draw of the run's own way, which is there for the error.
    assert [(point.task, point.part, point.config) for point in points] == [
        (name, part, way) for part, way, seed in tried if seed == 40 for name in names
    ]
    assert [point.verdicts[0].error for point in points] == [pytest.approx(0.25 / 2**0.5)] * 18
    assert chosen == replace(best, temperature=0.5)
    assert reports[0] == ("making text", 0, 10) and reports[-1] == ("making text", 10, 10)
    assert [done for _, done, _ in reports[:-1]] == list(range(10))


def test_exams_are_of_every_dataset_that_has_the_split_and_media_are_compared_with_real_ones(
    loaded, prepared, monkeypatch
):
    datasets = prepared.manifest.datasets
    name, first = next(iter(datasets.items()))
    splits = {split: shards for split, shards in first.splits.items() if split != SMALL.split}
    changed = dataclasses.replace(
        prepared.manifest, datasets=datasets | {name: dataclasses.replace(first, splits=splits)}
    )
    monkeypatch.setattr(prepared, "manifest", changed)
    usual = sampling_fronts.choose_judges
    monkeypatch.setattr(sampling_fronts, "choose_judges", lambda *given: usual(*given) * 2)  # of several, the first
    exams = exams_to_measure(loaded, prepared, SMALL)
    judges = {exam.task.name: [judge.name for judge in exam.judges] for exam in exams}
    assert judges == {
        "text_to_audio": ["label", "frechet", "frechet"],
        "audio_to_text": ["exact_match"],
        "text": ["exact_match"],
    }


def test_a_task_is_measured_and_what_is_chosen_becomes_the_runs_default(trials, loaded, tmp_path, monkeypatch):
    monkeypatch.setattr("jax.clear_caches", lambda: None)  # other tests go on with what is compiled
    text = study(dataclasses.replace(SMALL, modalities=("image",), max_examples=4, apply=True), trials)
    with (tmp_path / "points.csv").open() as file:
        rows = list(csv.DictReader(file))
    # Before, one step of random, two guidances, three caches.
    parts = {"before": 1, "strategy": 1, "guidance": 2, "cache": 3}
    for judge in ("label", "frechet"):
        own = [row for row in rows if row["judge"] == judge]
        assert Counter(row["part"] for row in own) == parts and {row["task"] for row in own} == {"drawn: text_to_image"}
        assert all(float(row["error"]) >= 0 for row in own)
        # Blocks of one token: a cache that is made anew for each approximates nothing.
        assert len({row["value"] for row in own if row["part"] == "cache"}) == 1
    ways = json.loads((tmp_path / "generation.json").read_text())
    assert set(ways) == {"image"} and "These are the run's defaults now." in text
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
        study(dataclasses.replace(SMALL, split="tset"), trials)
    with pytest.raises(ValueError, match="no questions for smells that can be judged"):
        study(dataclasses.replace(SMALL, modalities=("smells",)), trials)
