"""The study of policies beside heuristics, and the command that trains them, on an untrained model."""

import csv
import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pytest
from test_policy import SMALL

from trimask.diffusion import configuration
from trimask.diffusion.loop import LoopConfig
from trimask.diffusion.sampling.config import GenerationConfig
from trimask.diffusion.sampling.requests import Generator
from trimask.diffusion.studies.trials import Trials
from trimask.sampling_rl.grpo import GRPOConfig
from trimask.sampling_rl.policy_study import PolicyStudy, chains, trainings
from trimask.sampling_rl.policy_study import study as run_policy_study
from trimask.sampling_rl.tasks import from_prepared
from trimask.sampling_rl.train import PolicyTrainConfig, PolicyTraining, train_policy
from trimask.sampling_rl.unmasking_report import Point, front, merged
from trimask.sampling_rl.unmasking_study import UnmaskingStudy, _when, study, trainings_of, ways
from trimask.scripts import train_policy as command

CONFIG = PolicyTrainConfig(
    policy=SMALL,
    grpo=GRPOConfig(group=2, updates=1, chunk=16),
    generation=GenerationConfig(temperature=0.0, stop_at_eos=False, block_length=2),
    problems_per_step=5,
    loop=LoopConfig(log_every=1, spike_factor=None),
)
INPUTS = ("top", "margin", "entropy", "hidden")
STUDY = UnmaskingStudy(
    dataset="sums",
    blocks=(2,),
    planned=(),
    thresholds=(0.9,),
    factors=(),
    entropy_bounds=(),
    scales=(1.0, 3.0),
    shown=3,
)


@pytest.fixture(scope="module")
def policies(loaded, prepared, tmp_path_factory):
    """Two policies that differ in their seed."""
    problems = from_prepared(prepared, "sums", "text", "train")
    folders = [tmp_path_factory.mktemp("policies") / f"seed{seed}" for seed in (0, 1)]
    for seed, folder in enumerate(folders):
        train_policy(folder, dataclasses.replace(CONFIG, seed=seed), problems, loaded.denoise, "sums")
    return tuple(map(str, folders))


def test_heuristics_and_policies_are_measured(policies, loaded, prepared, tmp_path, monkeypatch):
    monkeypatch.setattr("trimask.sampling_rl.unmasking_study.load", lambda folder: loaded)
    asked = dataclasses.replace(STUDY, policies=policies, max_examples=4)
    with Trials(tmp_path, prepared.folder, 0, lambda *_: None) as trials:
        text = study(asked, trials)
    with (tmp_path / "points.csv").open() as file:
        rows = list(csv.DictReader(file))
    label = "policy, α 1, blocks of 2"
    own = [row["label"] for row in rows if row["block"] == "2"]
    assert {name: own.count(name) for name in own} == {"threshold": 1, "leftmost": 1, label: 4}
    assert all(1 <= float(row["nfe"]) <= 4 and 0 <= float(row["accuracy"]) <= 1 for row in rows)
    assert text.count(label) == 2 + 1 and (tmp_path / "fronts.png").stat().st_size
    with (tmp_path / "orders.csv").open() as file:
        orders = list(csv.DictReader(file))
    assert len(orders) == 1 + 1 + 2 and (tmp_path / "orders.png").stat().st_size
    # Leftmost in blocks of two goes from left to right.
    (leftmost,) = (row for row in orders if row["label"] == "leftmost" and row["block"] == "2")
    assert float(leftmost["left_to_right"]) > 0.5
    # What was measured is not measured again, but for what the problems are.
    monkeypatch.setattr("trimask.sampling_rl.unmasking_study.Generator", lambda *_, **__: pytest.fail("measured again"))
    with Trials(tmp_path, prepared.folder, 0, lambda *_: None) as trials:
        assert study(asked, trials) == text
        with pytest.raises(BaseException, match="measured again"):
            study(dataclasses.replace(asked, max_examples=2), trials)


def test_policies_of_other_blocks_are_measured_only_if_that_is_wanted(policies):
    elsewhere = dataclasses.replace(STUDY, policies=policies[:1], blocks=(3,), thresholds=(), scales=(1.0,))
    with pytest.raises(ValueError, match=r"trained in blocks of 2, which are not among \(3,\)"):
        list(ways(elsewhere, 7))
    for everywhere, blocks in ((False, [2]), (True, [2, 3])):
        found = list(ways(dataclasses.replace(elsewhere, blocks=(2, 3), everywhere=everywhere), 7))
        assert [point.block for point, _ in found] == [way.how.block_length for _, way in found] == blocks
        assert {(way.shown, way.model_step, way.policy_step) for _, way in found} == {(3, 7, 4)}


def test_other_lengths_are_other_problems(prepared):
    problems = from_prepared(prepared, "sums", "text", "test", length=6, max_examples=3)
    assert {problem.length for problem in problems.problems} == {6}


def test_only_policies_that_differ_in_their_seed_are_one_curve(policies):
    first, second = trainings_of(policies)
    assert first.label == second.label and (first.seed, second.seed) == (0, 1)
    again, best, _ = trainings_of((policies[0], f"{policies[0]}@best", policies[1]))
    assert (again.label, best.label) == (f"{first.label} (seed0)", f"{first.label} (seed0@best)")


def test_only_answers_of_texts_have_a_length_to_choose(prepared):
    with pytest.raises(ValueError, match="can be chosen of texts; got 3 of text_to_image"):
        from_prepared(prepared, "drawn", "text_to_image", "test", length=3)
    with pytest.raises(ValueError, match="at least 1, can be chosen of texts; got 0 of text"):
        from_prepared(prepared, "sums", "text", "test", length=0)


ALL_PARTS = PolicyStudy(
    dataset="sums",
    seeds=1,
    scratch=5,
    blocks=CONFIG,
    full=dataclasses.replace(CONFIG, generation=dataclasses.replace(CONFIG.generation, block_length=None)),
    steered=dataclasses.replace(CONFIG, experts=(0.9,)),
    imitation=dataclasses.replace(CONFIG, learns_from="experts", experts=(0.5, 0.9)),
    measure=dataclasses.replace(STUDY, blocks=(0,), thresholds=(), scales=(1.0,), shown=2),
)


def test_every_part_differs_from_the_rest_in_what_it_says(tmp_path):
    found = {training.name: training.config for training in trainings(ALL_PARTS, tmp_path, 16)}
    starts = {f"imitated-{name}-s0" for name in ("full", "blocks", *(f"full-{x}" for x in INPUTS), "full-dpls")}
    alphas = {f"{name}-a{alpha}-s0" for name in ("full", "blocks") for alpha in (1, 0.3, 3)}
    scratch = {f"scratch-{name}-s0" for name in ("full", "steered", "blocks", "additive")}
    assert set(found) == starts | alphas | scratch | {"imitated-alone-s0"} | {
        f"full-{name}-s0" for name in (*INPUTS, "dpls")
    }
    base = found["full-a1-s0"]
    assert base == dataclasses.replace(ALL_PARTS.full, init_from=str(tmp_path / "imitated-full-s0"))
    differs = {name: configuration.differences(base, config) for name, config in found.items()}
    assert differs["full-a0.3-s0"] == ["reward.alpha: 1.0 → 0.3"]
    assert [line.partition(":")[0] for line in differs["blocks-a1-s0"]] == ["generation.block_length", "init_from"]
    assert [line.partition(":")[0] for line in differs["scratch-additive-s0"]] == ["reward.kind", "init_from"]
    assert found["full-hidden-s0"].policy.hidden_size == found["imitated-full-hidden-s0"].policy.hidden_size == 16
    assert found["full-dpls-s0"].policy.law == "dpls" and found["scratch-steered-s0"].experts == (0.9,)
    names = [training.name for training in trainings(dataclasses.replace(ALL_PARTS, seeds=2), tmp_path, 16)]
    for name, config in found.items():
        assert config.init_from is None or names.index(Path(config.init_from).name) < names.index(name)
        assert name.replace("-s0", "-s1") in names
    problems = {training.name: training.problems for training in trainings(ALL_PARTS, tmp_path, 16)}
    # Of two experts, and of a group of two: as many episodes.
    assert problems["imitated-alone-s0"] == 1600 + 2000 and problems["full-a1-s0"] == 2000
    with pytest.raises(ValueError, match="there must be parts"):
        dataclasses.replace(ALL_PARTS, parts=())


def test_policies_are_trained_and_measured_and_not_trained_again(loaded, prepared, tmp_path, monkeypatch):
    monkeypatch.setattr("trimask.sampling_rl.policy_study.load", lambda folder: loaded)
    small = dataclasses.replace(ALL_PARTS, parts=("rewards",))
    monkeypatch.setattr(
        "trimask.sampling_rl.unmasking_study.study", lambda config, _: " ".join((config.dataset, *config.policies))
    )
    reports = list[tuple[int, int]]()
    with Trials(tmp_path, prepared.folder, 0, lambda _, *counts: reports.append(counts)) as trials:
        text = run_policy_study(small, trials)
    assert reports == [(0, 1), (1, 1)]
    assert text == f"sums {tmp_path / 'policies/scratch-additive-s0'}"
    assert (
        json.loads((tmp_path / "policies/scratch-additive-s0/config.json").read_text())["reward"]["kind"] == "additive"
    )
    monkeypatch.setattr(PolicyTraining, "step", lambda *_: pytest.fail("trained again"))
    with Trials(tmp_path, prepared.folder, 0, lambda *_: None) as trials:
        assert run_policy_study(small, trials) == text


def test_a_chain_is_a_start_and_all_that_goes_on_from_it(tmp_path):
    config = dataclasses.replace(ALL_PARTS, parts=("alphas", "scratch"), seeds=2)
    planned = list(trainings(config, tmp_path, 16))
    names = [[training.name for training in chain] for chain in chains(planned)]
    assert names[0] == ["imitated-full-s0", "full-a1-s0", "full-a0.3-s0", "full-a3-s0"]
    assert [len(chain) for chain in names] == [4, 4, 1, 1, 1] * 2
    assert sorted(name for chain in names for name in chain) == sorted(training.name for training in planned)


def test_the_front_is_what_nothing_cheaper_reaches():
    points = [(4.0, 0.5), (2.0, 0.3), (3.0, 0.2), (4.0, 0.6), (8.0, 0.6)]
    assert front(points) == [(2.0, 0.3), (4.0, 0.6)] and front([]) == []


def test_curves_of_several_seeds_are_one_with_the_error_of_the_mean():
    points = [
        Point(0, "p", 1.0, accuracy, nfe, 50, seed) for seed, (accuracy, nfe) in enumerate([(0.4, 5.0), (0.6, 7.0)])
    ]
    ((number, accuracy, nfe, error),) = merged(points)
    assert (number, accuracy, nfe) == (1.0, 0.5, 6.0) and error == pytest.approx(0.1)
    ((_, _, _, alone),) = merged(points[:1])
    assert alone == pytest.approx(math.sqrt(0.24 / 50), rel=0.05)


def test_the_step_of_a_place_is_the_one_that_revealed_it(loaded, prepared):
    problem = from_prepared(prepared, "sums", "text", "test").problems[0]
    how = GenerationConfig(strategy="given", steps=problem.length, temperature=0.0, stop_at_eos=False)
    (path,) = Generator(loaded.denoise, loaded.vocabulary).trajectories([problem.request], how, 0)
    np.testing.assert_array_equal(_when(path), np.arange(1, problem.length + 1))


def test_the_command_trains_on_questions_of_prepared_data(loaded, prepared, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(command, "load", lambda folder, checkpoint: loaded)
    words = [str(tmp_path / "fast"), "--run", str(tmp_path), "--data", str(prepared.folder), "--preset", "blocks"]
    small = ["--policy.width", "8", "--policy.mlp-width", "8", "--policy.num-heads", "1", "--grpo.group", "2"]
    with pytest.raises(ValueError, match="several datasets; --dataset names one of drawn"):
        command.main([*words, *small])
    command.main([*words, *small, "--dataset", "sums", "--max-problems", "8"])
    config = json.loads((tmp_path / "fast/config.json").read_text())
    assert config["generation"]["block_length"] == 8 and config["grpo"]["learning_rate"] == 3e-4
    assert len((tmp_path / "fast/metrics.jsonl").read_text().splitlines()) == 1
    assert "A policy of" in capsys.readouterr().out
    about = json.loads((tmp_path / "fast/policy.json").read_text())
    assert "8 problems of sums text train" in about["trained_on"]
    with pytest.raises(ValueError, match="no preset 'quick'; there are paper"):
        command.main(["policies/p", "--run", "x", "--preset", "quick"])


def test_a_study_without_orders_ends_well(loaded, prepared, tmp_path, monkeypatch):
    monkeypatch.setattr("trimask.sampling_rl.unmasking_study.load", lambda folder: loaded)
    few = dataclasses.replace(STUDY, thresholds=(0.5,), max_examples=2)
    with Trials(tmp_path, prepared.folder, 0, lambda *_: None) as trials:
        assert "| threshold | 0.5 |" in study(few, trials)
    assert not (tmp_path / "orders.csv").exists()


@pytest.mark.parametrize("bad", [{"blocks": (-1,)}, {"thresholds": (2.0,)}, {"shown": 0}])
def test_impossible_studies_are_refused(bad):
    with pytest.raises(ValueError, match="must be"):
        UnmaskingStudy(**bad)
