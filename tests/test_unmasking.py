"""The study of policies beside heuristics, and the command that trains them, on an untrained model."""

import csv
import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace

import fakes
import madeup
import numpy as np
import pytest
from madeup import MadeUp, written
from test_policy import SMALL

from trimask.diffusion.evaluation.intervals import wilson_interval
from trimask.diffusion.run.step_loop import LoopConfig
from trimask.diffusion.sampling.generation_config import GenerationConfig
from trimask.diffusion.sampling.generator import Answer, Generator
from trimask.diffusion.studies.claims import Findings, table_of_claims
from trimask.diffusion.studies.final import FinalResult
from trimask.diffusion.studies.trials import Trials, weights_digest
from trimask.sampling_rl.grpo import GRPOConfig
from trimask.sampling_rl.problem_sets import from_prepared
from trimask.sampling_rl.reward import RewardConfig
from trimask.sampling_rl.studies import policy_study, unmasking, unmasking_report
from trimask.sampling_rl.studies.policy_study import PolicyStudy, chains, policy_trials
from trimask.sampling_rl.studies.policy_study import study as run_policy_study
from trimask.sampling_rl.studies.unmasking import (
    Measurement,
    PolicyOrigin,
    UnmaskingStudy,
    _reveal_steps,
    planned_trials,
    policy_origins,
    study,
)
from trimask.sampling_rl.studies.unmasking_report import FrontPoint, Order, front, merged
from trimask.sampling_rl.train_policy import PolicyTrainConfig, PolicyTraining, train_policy
from trimask.scripts import train_policy as command
from trimask.tokenizers.sequence import Example, Segment
from trimask.tokenizers.storage import configuration

CONFIG = PolicyTrainConfig(
    policy=SMALL,
    grpo=GRPOConfig(group=2, updates=1, chunk=16),
    generation=GenerationConfig(temperature=0.0, stop_at_eos=False, block_length=2),
    problems_per_step=5,
    loop=LoopConfig(log_every=1, spike_factor=None),
)
INPUTS = ("top", "margin", "entropy", "hidden")
STUDY = UnmaskingStudy(
    run="runs/made-up",
    dataset="sums",
    blocks=(2,),
    planned=(),
    thresholds=(0.9,),
    factors=(),
    entropy_bounds=(),
    scales=(1.0, 3.0),
    shown=3,
)


@pytest.fixture(autouse=True)
def digests(monkeypatch):
    """Digests of the weights in folders; those of models that are nowhere are made up."""

    def digest(folder, step):
        return weights_digest(folder, step) if folder.exists() else f"made up at {step}"

    for module in ("trimask.diffusion.studies.trials", "trimask.sampling_rl.studies.unmasking"):
        monkeypatch.setattr(f"{module}.weights_digest", digest)


@pytest.fixture(scope="module")
def policies(loaded, prepared, tmp_path_factory):
    """Folders of two policies that differ only in their seed."""
    problems = from_prepared(prepared, "sums", "text", "train")
    folders = [tmp_path_factory.mktemp("policies") / f"seed{seed}" for seed in (0, 1)]
    for seed, folder in enumerate(folders):
        train_policy(
            folder, dataclasses.replace(CONFIG, seed=seed), problems, loaded.denoise, f"{STUDY.run} at step 7: sums"
        )
    return tuple(map(str, folders))


def test_heuristics_and_policies_are_measured(policies, loaded, prepared, tmp_path, monkeypatch):
    cleared = []
    monkeypatch.setattr("trimask.diffusion.studies.trainings._compiled", set())
    monkeypatch.setattr("jax.clear_caches", lambda: cleared.append(1))  # here the programs serve the next setting, too
    for module in ("trimask.diffusion.studies.trials", "trimask.sampling_rl.studies.unmasking"):
        monkeypatch.setattr(f"{module}.load", fakes.opening(loaded, Path(STUDY.run)))
    asked = dataclasses.replace(STUDY, policies=policies, max_examples=4)
    with Trials(tmp_path, prepared.folder, 0, lambda *_: None) as trials:
        text = study(asked, trials).report
    with (tmp_path / "points.csv").open() as file:
        rows = list(csv.DictReader(file))
    label = "policy, α 1, blocks of 2"
    own = [row["label"] for row in rows if row["block"] == "2"]
    assert {name: own.count(name) for name in own} == {"threshold": 1, "leftmost": 1, label: 4}
    assert all(1 <= float(row["nfe"]) <= 4 and 0 <= float(row["accuracy"]) <= 1 for row in rows)
    assert text.count(f"| {label} |") == 2 + 1 and (tmp_path / "fronts.png").stat().st_size
    assert len(cleared) == 1 + 1 + 2 - 1, "programs of a strategy are cleared when the next begins"
    with (tmp_path / "orders.csv").open() as file:
        orders = list(csv.DictReader(file))
    assert len(orders) == 1 + 1 + 2 and (tmp_path / "orders.png").stat().st_size
    # Leftmost in blocks of two goes from left to right.
    (leftmost,) = (row for row in orders if row["label"] == "leftmost" and row["block"] == "2")
    assert float(leftmost["left_to_right"]) > 0.5
    # Recorded measurements are not repeated, except for other problems.
    monkeypatch.setattr("trimask.sampling_rl.studies.unmasking._opened", lambda *_: pytest.fail("measured again"))
    with Trials(tmp_path, prepared.folder, 0, lambda *_: None) as trials:
        assert study(asked, trials).report == text
        with pytest.raises(BaseException, match="measured again"):
            study(dataclasses.replace(asked, max_examples=2), trials)
        # Nor are they those of a model that was trained again to the same step.
        monkeypatch.setattr("trimask.diffusion.studies.trials.weights_digest", lambda *_: "another")
        monkeypatch.setattr(Trials, "run_unordered", lambda _, __, work: pytest.fail(f"{len(work)} measured again"))
        with pytest.raises(BaseException, match="6 measured again"):
            study(asked, trials)


MADE_UP = {
    # Strategy → number → accuracy and NFE, in blocks of 2 and without.
    "random": {1: ((0.1, 1.0), (0.2, 1.5)), 4: ((0.3, 4.0), (0.4, 4.5))},
    "threshold": {0.9: ((0.5, 3.0), (0.56, 3.5))},
    "leftmost": {0.9: ((0.6, 5.0), (0.66, 5.5))},
    "factor": {0.5: ((0.7, 2.0), (0.76, 2.5))},
    "entropy_bound": {0.25: ((0.8, 6.0), (0.86, 6.5))},
    "p/a": {1.0: ((0.9, 7.0),), 2.0: ((0.92, 7.5),)},
    "p/b": {1.0: ((0.8, 9.0),), 2.0: ((0.96, 9.5),)},
    "p/c": {1.0: ((0.94, 8.0), (0.98, 8.5))},
}
TRAININGS = [
    PolicyOrigin("policy, α 1", 3, 2, "alike"),
    PolicyOrigin("policy, α 1", 4, 2, "alike"),
    PolicyOrigin("policy of before", None, None, "other"),
]


def seen(way):
    """Made-up measurement of a trial; the answers of policy p/a have no order, as if they were revealed in one step."""
    how, at = way.how, 0 if way.how.block_length else 1
    numbers = {"threshold": how.threshold, "leftmost": how.threshold, "factor": how.factor}
    numbers |= {"random": how.steps, "entropy_bound": how.entropy_bound}
    accuracy, nfe = MADE_UP[how.strategy][numbers.get(how.strategy, how.policy_scale)][at]
    tendency = None if how.strategy == "p/a" else -accuracy
    order = (tendency, [0.5, 1.0], [1.0, nfe]) if way.shown else (None, [], [])
    return Measurement(accuracy, nfe, 50, *order)


def test_all_that_is_written(tmp_path, monkeypatch):
    opened = fakes.opening((SimpleNamespace(step=1234), None), "runs/other", tmp_path / "data")
    monkeypatch.setattr(unmasking, "open_run", opened)
    laws = {"p/a": "bernoulli", "p/b": "bernoulli", "p/c": "dpls"}
    monkeypatch.setattr(
        unmasking, "describe_policy", lambda name: SimpleNamespace(policy=dataclasses.replace(SMALL, law=laws[name]))
    )
    monkeypatch.setattr(GenerationConfig, "__post_init__", lambda _: None)  # policies that are nowhere
    monkeypatch.setattr(unmasking, "policy_origins", lambda names, run: TRAININGS)
    monkeypatch.setattr(unmasking, "checkpoint_steps", lambda folder: [30, 20])
    figures = madeup.figures(monkeypatch, unmasking_report)
    config = UnmaskingStudy(
        run="runs/other",
        policies=tuple(laws),
        dataset="sums",
        split="test",
        blocks=(2, 0),
        steps=(1, 4),
        planned=("random",),
        thresholds=(0.9,),
        factors=(0.5,),
        entropy_bounds=(0.25,),
        scales=(1.0, 2.0),
        shown=3,
        seed=17,
    )
    trials = MadeUp(tmp_path, seen)
    found = study(config, trials)
    points, claims = found.report.split("\n\n## Claims\n\n")
    assert claims == table_of_claims(found.claims) and {claim.claim: claim.verdict for claim in found.claims} == {
        "other: policy, α 1, in blocks of 2: as accurate as the best threshold": "undecided",
        "other: policy, α 1, in blocks of 2: more accurate than threshold with as many evaluations": "undecided",
        "other: threshold collapses without blocks of 2": "refuted",
        "other: the most accurate heuristic collapses without blocks of 2": "refuted",
    }
    assert points == written(
        """
        runs/other at step 1234, 50 problems of sums text test.

        |  | strategy | number | NFE | accuracy | 95 % interval | over | of each seed |
        | --- | --- | --- | --- | --- | --- | --- | --- |
        | blocks of 2 | random | 1 | 1.0 | 10.0% | 4.3%–21.4% | 50 problems |  |
        | blocks of 2 | random | 4 | 4.0 | 30.0% | 19.1%–43.8% | 50 problems |  |
        | blocks of 2 | threshold | 0.9 | 3.0 | 50.0% | 36.6%–63.4% | 50 problems |  |
        | blocks of 2 | leftmost | 0.9 | 5.0 | 60.0% | 46.2%–72.4% | 50 problems |  |
        | blocks of 2 | factor | 0.5 | 2.0 | 70.0% | 56.2%–80.9% | 50 problems |  |
        | blocks of 2 | entropy_bound | 0.25 | 6.0 | 80.0% | 67.0%–88.8% | 50 problems |  |
        | blocks of 2 | policy, α 1 | 1 | 8.0 | 85.0% | 21.5%–100.0% | 2 seeds | 90.0%, 80.0% |
        | blocks of 2 | policy, α 1 | 2 | 8.5 | 94.0% | 68.6%–100.0% | 2 seeds | 92.0%, 96.0% |
        | blocks of 2 | policy of before | 1 | 8.0 | 94.0% | 83.8%–97.9% | 50 problems |  |
        | full | random | 1 | 1.5 | 20.0% | 11.2%–33.0% | 50 problems |  |
        | full | random | 4 | 4.5 | 40.0% | 27.6%–53.8% | 50 problems |  |
        | full | threshold | 0.9 | 3.5 | 56.0% | 42.3%–68.8% | 50 problems |  |
        | full | leftmost | 0.9 | 5.5 | 66.0% | 52.2%–77.6% | 50 problems |  |
        | full | factor | 0.5 | 2.5 | 76.0% | 62.6%–85.7% | 50 problems |  |
        | full | entropy_bound | 0.25 | 6.5 | 86.0% | 73.8%–93.0% | 50 problems |  |
        | full | policy of before | 1 | 8.5 | 98.0% | 89.5%–99.6% | 50 problems |  |

        |  | strategy | left to right, of each seed |
        | --- | --- | --- |
        | blocks of 2 | threshold | -0.50 |
        | blocks of 2 | leftmost | -0.60 |
        | blocks of 2 | policy, α 1 | +0.00, -0.80 |
        | blocks of 2 | policy of before | -0.94 |
        | full | threshold | -0.56 |
        | full | leftmost | -0.66 |
        | full | policy of before | -0.98 |
        """
    )
    assert madeup.files(tmp_path) == ["orders.csv", "points.csv"]
    lines = (tmp_path / "points.csv").read_text().splitlines()
    assert len(lines) == 1 + 11 + 7
    assert "\n".join([*lines[:2], lines[7], lines[10], lines[-1]]) == written(
        """
        block,label,number,accuracy,nfe,problems,seed
        2,random,1.0,0.1,1.0,50,
        2,"policy, α 1",1.0,0.9,7.0,50,3
        2,"policy, α 1",2.0,0.96,9.5,50,4
        0,policy of before,1.0,0.98,8.5,50,
        """
    )
    lines = (tmp_path / "orders.csv").read_text().splitlines()
    assert len(lines) == 1 + 5 + 3
    assert "\n".join([*lines[:2], lines[4], lines[-1]]) == written(
        """
        block,label,seed,left_to_right,steps,per_step
        2,threshold,,-0.5,"[0.5, 1.0]","[1.0, 3.0]"
        2,"policy, α 1",4,-0.8,"[0.5, 1.0]","[1.0, 9.0]"
        0,policy of before,,-0.98,"[0.5, 1.0]","[1.0, 8.5]"
        """
    )
    ((what, measured_by, asked),) = trials.asked
    assert (what, measured_by, len(asked)) == ("ways to sample", unmasking.measure, 18)
    assert {(way.run, way.dataset, way.task, way.split, way.seed, way.model_step) for way in asked} == {
        ("runs/other", "sums", "text", "test", 17, 1234)
    }
    assert [way.policy_step for way in asked] == [None] * 6 + [30] * 5 + [None] * 6 + [30]
    assert {(way.how.temperature, way.how.stop_at_eos) for way in asked} == {(0.0, False)}
    (fronts, _), (orders, _) = figures["fronts.png"], figures["orders.png"]
    assert [(panel.title, list(panel.curves)) for panel in fronts] == [
        ("blocks of 2", ["random", "threshold", "leftmost", "factor", "entropy_bound"]),
        ("blocks of 2", ["best heuristic", "policy, α 1", "policy of before"]),
        ("full diffusion", ["random", "threshold", "leftmost", "factor", "entropy_bound"]),
        ("full diffusion", ["best heuristic", "policy of before"]),
    ]
    assert fronts[1].curves["best heuristic"] == [(1.0, 0.1), (2.0, 0.7), (6.0, 0.8)]
    assert fronts[1].curves["policy, α 1"] == [(8.0, pytest.approx(0.85)), (8.5, pytest.approx(0.94))]
    assert [(panel.title, panel.x, list(panel.curves)) for panel in orders] == [
        ("blocks of 2", "position", ["threshold", "leftmost", "policy, α 1", "policy of before"]),
        ("blocks of 2", "step", ["threshold", "leftmost", "policy, α 1", "policy of before"]),
        ("full diffusion", "position", ["threshold", "leftmost", "policy of before"]),
        ("full diffusion", "step", ["threshold", "leftmost", "policy of before"]),
    ]
    assert orders[0].curves["policy, α 1"] == [(0.0, 0.5), (1.0, 1.0)]
    assert orders[1].curves["policy, α 1"] == [(1.0, 1.0), (2.0, 8.0)]
    assert madeup.described(figures) == written(
        """
        fronts.png, 2 columns
        blocks of 2: evaluations (NFE) (log) × accuracy (linear): random, threshold, leftmost, factor, \\
        entropy_bound: markers
        blocks of 2: evaluations (NFE) (log) × accuracy (linear): best heuristic, policy, α 1, policy of before: markers
        full diffusion: evaluations (NFE) (log) × accuracy (linear): random, threshold, leftmost, factor, \\
        entropy_bound: markers
        full diffusion: evaluations (NFE) (log) × accuracy (linear): best heuristic, policy of before: markers
        orders.png, 2 columns
        blocks of 2: position (linear) × step, share of the last (linear): threshold, leftmost, policy, α 1, \\
        policy of before: markers
        blocks of 2: step (linear) × tokens revealed (linear): threshold, leftmost, policy, α 1, policy of \\
        before: markers
        full diffusion: position (linear) × step, share of the last (linear): threshold, leftmost, policy of \\
        before: markers
        full diffusion: step (linear) × tokens revealed (linear): threshold, leftmost, policy of before: markers
        """
    )


def test_more_policies_than_fit_in_a_panel_are_shown_six_at_a_time(tmp_path, monkeypatch):
    figures = madeup.figures(monkeypatch, unmasking_report)
    unmasking_report.draw_fronts(tmp_path / "f.png", [FrontPoint(0, f"p{n}", 1.0, 0.5, 2.0, 10, 0) for n in range(7)])
    unmasking_report.draw_orders(
        tmp_path / "o.png",
        [Order(0, "threshold", None, 0.0, [1.0], [1.0]), *(Order(0, f"p{n}", 0, 0.0, [1.0], [1.0]) for n in range(7))],
    )
    assert [list(panel.curves)[1:] for panel in figures["f.png"][0]] == [[f"p{n}" for n in range(6)], ["p6"]]
    shown = [list(panel.curves) for panel in figures["o.png"][0]]
    assert shown == [["threshold", *(f"p{n}" for n in range(6))]] * 2 + [["threshold", "p6"]] * 2


def test_a_policy_is_called_by_what_is_not_usual_in_its_training(tmp_path, monkeypatch):
    usual = PolicyTrainConfig(reward=RewardConfig(alpha=3.0))
    configs = {
        "policy, α 3, full": usual,
        "policy, α 3, blocks of 8": dataclasses.replace(
            usual, generation=dataclasses.replace(usual.generation, block_length=8), seed=5
        ),
        "policy, α 3, full, experts": dataclasses.replace(usual, experts=(0.5,)),
        "policy, α 3, full, imitated, 40 steps": dataclasses.replace(usual, experts=(0.5,), learns_from="experts"),
        "policy, α 3, full, from a start": dataclasses.replace(usual, init_from="x"),
        "policy, α 3, full, dpls, margin and entropy, additive": dataclasses.replace(
            usual,
            policy=dataclasses.replace(usual.policy, law="dpls", inputs=("margin", "entropy")),
            reward=RewardConfig(alpha=3.0, kind="additive"),
        ),
    }
    monkeypatch.setattr(unmasking, "checkpoint_steps", lambda folder: [7, 40])
    monkeypatch.setattr(
        unmasking, "describe_policy", lambda name: SimpleNamespace(trained_on="runs/sums at step 9: 5 problems")
    )
    for number, config in enumerate(configs.values()):
        (tmp_path / f"p{number}").mkdir()
        configuration.save(tmp_path / f"p{number}/config.json", config)
    names = [str(tmp_path / f"p{number}") for number in range(len(configs))]
    found = policy_origins(names, "elsewhere/sums")
    assert [training.label for training in found] == list(configs)
    assert policy_origins(names, "runs/sorting")[0].label == "policy, α 3, full, trained on sums"
    assert [(training.seed, training.block) for training in found] == [(0, 0), (5, 8)] + [(0, 0)] * 4
    (of_another,) = policy_origins([str(tmp_path / "elsewhere/fast")], "runs/sums")
    assert (of_another.label, of_another.seed, of_another.block) == ("fast", None, None)


def answer(*codes):
    return Answer(Example("text", (Segment("text", np.array(codes)),)), 1, np.zeros(0), np.zeros(0, int))


def test_an_order_is_the_mean_over_problems_of_the_steps_in_which_positions_are_revealed():
    """Code 0 is a token like others; positions that are given do not count."""
    paths = [
        [answer(5, -1, -1, -1), answer(5, -1, -1, 0), answer(5, 0, 3, 0)],
        [answer(-1, -1), answer(0, -1), answer(0, -1), answer(0, 2)],
        [answer(-1, -1), answer(4, 0)],
    ]
    assert [_reveal_steps(path).tolist() for path in paths] == [[2, 2, 1], [1, 3], [1, 1]]
    tendency, shares, per_step = unmasking._order(paths)
    # Ranks (2.5, 2.5, 1) against (1, 2, 3); in order; and one without an order of its own.
    assert tendency == pytest.approx((-(3**0.5) / 2 + 1) / 2)
    assert shares == pytest.approx([(1 + 1 / 3 + 1) / 3, (1 + 1 + 1) / 3, 0.5])
    assert per_step == pytest.approx([(1 + 1 + 2) / 3, 2 / 3, 1 / 3])
    assert unmasking._order(paths[2:])[0] is None


def test_policies_of_other_blocks_are_measured_only_if_that_is_wanted(policies):
    elsewhere = dataclasses.replace(STUDY, policies=policies[:1], blocks=(3,), thresholds=(), scales=(1.0,))
    with pytest.raises(ValueError, match=r"trained in blocks of 2, which are not among \(3,\)"):
        list(planned_trials(elsewhere, 7))
    for everywhere, blocks in ((False, [2]), (True, [2, 3])):
        found = list(planned_trials(dataclasses.replace(elsewhere, blocks=(2, 3), everywhere=everywhere), 7))
        assert [point.block for point, _ in found] == [way.how.block_length for _, way in found] == blocks
        assert {(way.shown, way.model_step, way.policy_step) for _, way in found} == {(3, 7, 4)}


def test_other_lengths_are_other_problems(prepared):
    problems = from_prepared(prepared, "sums", "text", "test", length=6, max_examples=3)
    assert {problem.length for problem in problems.problems} == {6}


def test_only_policies_that_differ_in_their_seed_are_one_curve(policies):
    first, second = policy_origins(policies, STUDY.run)
    assert first.label == second.label and (first.seed, second.seed) == (0, 1)
    again, best, _ = policy_origins((policies[0], f"{policies[0]}@best", policies[1]), STUDY.run)
    assert (again.label, best.label) == (f"{first.label} (seed0)", f"{first.label} (seed0@best)")


def test_only_answers_of_texts_have_a_length_to_choose(prepared):
    with pytest.raises(ValueError, match="can be chosen of texts; got 3 of text_to_image"):
        from_prepared(prepared, "drawn", "text_to_image", "test", length=3)
    with pytest.raises(ValueError, match="at least 1, can be chosen of texts; got 0 of text"):
        from_prepared(prepared, "sums", "text", "test", length=0)


ALL_PARTS = PolicyStudy(
    run="runs/made-up",
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
    """All trainings in order, with their differences from the base, initial policy and number of problems."""
    imitation = dataclasses.replace(ALL_PARTS.imitation, experts=(0.5, 0.7, 0.9, 0.95, 0.99))
    config = dataclasses.replace(ALL_PARTS, alphas=(2.0, 0.3), imitated=100, problems=70, imitation=imitation)
    alpha, block = "reward.alpha: 1.0 → 2.0", "generation.block_length: 2 → None"
    experts = ["learns_from: itself → experts", "experts: () → (0.5, 0.7, 0.9, 0.95, 0.99)"]

    def policy(name, size=None):
        sees = [f"policy.inputs: ('confidence',) → ('{name}',)"]
        return sees + ([] if size is None else [f"policy.hidden_size: None → {size}"])

    expected = [
        ("imitated-full-s0", "", 100, [alpha, *experts]),
        ("full-a2-s0", "imitated-full-s0", 70, [block, alpha]),
        ("full-a0.3-s0", "imitated-full-s0", 70, [block, "reward.alpha: 1.0 → 0.3"]),
        ("imitated-blocks-s0", "", 100, [alpha, *experts]),
        ("blocks-a2-s0", "imitated-blocks-s0", 70, [alpha]),
        ("blocks-a0.3-s0", "imitated-blocks-s0", 70, ["reward.alpha: 1.0 → 0.3"]),
        ("scratch-full-s0", "", 5, [block, alpha]),
        ("scratch-steered-s0", "", 5, [alpha, "experts: () → (0.9,)"]),
        ("scratch-blocks-s0", "", 5, [alpha]),
        ("imitated-full-top-s0", "", 100, [*policy("top"), alpha, *experts]),
        ("full-top-s0", "imitated-full-top-s0", 70, [*policy("top"), block, alpha]),
        ("imitated-full-hidden-s0", "", 100, [*policy("hidden", 16), alpha, *experts]),
        ("full-hidden-s0", "imitated-full-hidden-s0", 70, [*policy("hidden", 16), block, alpha]),
        ("imitated-full-dpls-s0", "", 100, ["policy.law: bernoulli → dpls", alpha, *experts]),
        ("full-dpls-s0", "imitated-full-dpls-s0", 70, ["policy.law: bernoulli → dpls", block, alpha]),
        ("scratch-additive-s0", "", 5, [block, "reward.kind: multiplicative → additive", alpha]),
        # Five experts play a problem, of which GRPO makes two episodes.
        ("imitated-alone-s0", "", 100 + 70 * 2 // 5, [alpha, *experts]),
    ]
    planned = list(policy_trials(dataclasses.replace(config, inputs=("top", "hidden")), tmp_path, 16))
    assert [training.name for training in planned] == [name for name, *_ in expected]
    for training, (_, start, problems, differs) in zip(planned, expected, strict=True):
        found = training.config
        assert found.init_from == (str(tmp_path / start) if start else None) and training.problems == problems
        assert sorted(configuration.changed_fields(CONFIG, dataclasses.replace(found, init_from=None))) == sorted(
            differs
        )
    seeds = [training.config.seed for training in policy_trials(dataclasses.replace(config, seeds=2), tmp_path, 16)]
    assert seeds == sorted(seeds) and set(seeds) == {0, 1}


@pytest.mark.parametrize("bad", [{"parts": ()}, {"alphas": ()}, {"seeds": 0}, {"scratch": 0}])
def test_a_study_without_trainings_is_refused(bad):
    with pytest.raises(ValueError, match=r"there must be parts and alphas|must be at least 1, got 0"):
        dataclasses.replace(ALL_PARTS, **bad)


def test_policies_are_trained_and_measured_and_not_trained_again(loaded, prepared, tmp_path, monkeypatch):
    monkeypatch.setattr("trimask.diffusion.studies.trials.load", fakes.opening(loaded, Path(ALL_PARTS.run)))
    small = dataclasses.replace(ALL_PARTS, parts=("rewards",))
    monkeypatch.setattr(
        "trimask.sampling_rl.studies.unmasking.study",
        lambda config, _, claimed: Findings(" ".join((config.dataset, *config.policies, "claims on", *claimed)), []),
    )
    reports, let_go = list[tuple[int, int]](), list[int]()
    monkeypatch.setattr("jax.clear_caches", lambda: let_go.append(len(reports)))
    with Trials(tmp_path, prepared.folder, 0, lambda _, *counts: reports.append(counts)) as trials:
        text = run_policy_study(small, trials).report
    assert reports == [(0, 1), (1, 1)] and let_go == [1]
    claimed = " ".join(str(tmp_path / f"policies/{how}-a1-s0") for how in ("blocks", "full"))
    assert text == f"sums {tmp_path / 'policies/scratch-additive-s0'} claims on {claimed}"
    assert (
        json.loads((tmp_path / "policies/scratch-additive-s0/config.json").read_text())["reward"]["kind"] == "additive"
    )
    monkeypatch.setattr(PolicyTraining, "step", lambda *_: pytest.fail("trained again"))
    with Trials(tmp_path, prepared.folder, 0, lambda *_: None) as trials:
        assert run_policy_study(small, trials).report == text
    # The final score is that of the same comparison, and of trained policies alone.
    scored = FinalResult(text.split(" claims")[0], [], [])
    monkeypatch.setattr(
        unmasking, "final", lambda config, _: scored._replace(model=" ".join((config.dataset, *config.policies)))
    )
    with Trials(tmp_path, prepared.folder, 0, lambda *_: None, adds=False) as trials:
        assert policy_study.final(small, trials) == scored and policy_study.rule(small) == unmasking.rule(small.measure)
        untrained = dataclasses.replace(small, seeds=2)
        for called in (policy_study.final, run_policy_study):
            with pytest.raises(ValueError, match="1 of 2 policies are not trained, such as scratch-additive-s1"):
                called(untrained, trials)


def test_a_chain_is_a_start_and_all_that_goes_on_from_it(tmp_path):
    config = dataclasses.replace(ALL_PARTS, parts=("alphas", "scratch"), seeds=2)
    later = list(policy_trials(dataclasses.replace(config, first_seed=10), tmp_path, 16))
    assert {(trial.name[-3:], trial.config.seed) for trial in later} == {("s10", 10), ("s11", 11)}
    planned = list(policy_trials(config, tmp_path, 16))
    names = [[training.name for training in chain] for chain in chains(planned)]
    assert names[0] == ["imitated-full-s0", "full-a1-s0", "full-a0.3-s0", "full-a3-s0"]
    assert [len(chain) for chain in names] == [4, 4, 1, 1, 1] * 2
    assert sorted(name for chain in names for name in chain) == sorted(training.name for training in planned)


def test_the_front_is_what_nothing_cheaper_reaches():
    points = [(4.0, 0.5), (2.0, 0.3), (3.0, 0.2), (4.0, 0.6), (8.0, 0.6)]
    assert front(points) == [(2.0, 0.3), (4.0, 0.6)] and front([]) == []


def test_curves_of_several_seeds_are_one_with_the_interval_of_the_mean():
    points = [
        FrontPoint(0, "p", 1.0, accuracy, nfe, 50, seed)
        for seed, (accuracy, nfe) in enumerate([(0.49, 5.0), (0.51, 7.0)])
    ]
    half = 12.7062 * 0.01  # Student's quantile for two values, times their standard error
    (mean,) = merged(points)
    assert (mean.number, mean.accuracy, mean.nfe, mean.over) == (1.0, 0.5, 6.0, "2 seeds")
    assert mean.interval == pytest.approx((0.5 - half, 0.5 + half), rel=1e-4)
    (alone,) = merged(points[:1])
    assert (alone.interval, alone.over) == (wilson_interval(24, 50), "50 problems")


def test_chosen_are_the_fronts_of_all_heuristics_and_of_each_policy_by_its_mean_over_seeds():
    points = {
        # Setting → whether it is chosen.
        FrontPoint(8, "random", 1.0, 0.3, 1.0, 50): True,
        FrontPoint(8, "random", 2.0, 0.2, 2.0, 50): False,
        FrontPoint(8, "threshold", 0.5, 0.5, 4.0, 50): True,
        FrontPoint(8, "factor", 1.0, 0.5, 5.0, 50): False,  # as accurate, and not as cheap
        FrontPoint(0, "factor", 1.0, 0.1, 9.0, 50): True,  # other blocks
        FrontPoint(8, "fast", 1.0, 0.2, 7.0, 50, 0): True,
        FrontPoint(8, "fast", 1.0, 0.4, 9.0, 50, 1): True,
        FrontPoint(8, "fast", 2.0, 0.5, 9.0, 50, 0): False,  # 0.3 in 10 evaluations, on average
        FrontPoint(8, "fast", 2.0, 0.1, 11.0, 50, 1): False,
        FrontPoint(8, "slow", 1.0, 0.1, 30.0, 50, 0): True,  # another policy
    }
    assert unmasking_report.on_fronts(list(points)) == list(points.values())


def test_what_validation_chooses_is_scored_on_the_test_split_alone(loaded, prepared, tmp_path, monkeypatch):
    for module in ("trimask.diffusion.studies.trials", "trimask.sampling_rl.studies.unmasking"):
        monkeypatch.setattr(f"{module}.load", fakes.opening(loaded, Path(STUDY.run)))
    config = dataclasses.replace(STUDY, thresholds=(0.5, 0.9), shown=2, seed=5)
    seen = []

    def made_up(trial, data):
        """On validation the threshold 0.9 is right more often in as many evaluations; on test it is the other way."""
        seen.append(trial)
        is_right = (trial.how.threshold == 0.9) == (trial.split == "validation") and trial.how.strategy == "threshold"
        return Measurement(0.75 if is_right else 0.25, 2.0, 40, None, [], [])

    made_up.__name__ = "measure"
    monkeypatch.setattr(unmasking, "measure", made_up)
    with (
        Trials(tmp_path, prepared.folder, 0, lambda *_: None, adds=False) as trials,
        pytest.raises(ValueError, match="holds no complete study: 4 of 4 trials are missing"),
    ):
        unmasking.final(config, trials)
    assert not seen
    with Trials(tmp_path, prepared.folder, 0, lambda *_: None) as trials:
        trials.measurements([trial for _, trial in planned_trials(config, loaded.step)], made_up, Measurement)
    assert {trial.split for trial in seen} == {"validation"} and len(seen) == 4
    seen.clear()
    before = (tmp_path / "trials.jsonl").read_bytes()
    with Trials(tmp_path, prepared.folder, 0, lambda *_: None, adds=False) as trials:
        result = unmasking.final(config, trials)
    assert [(t.split, t.how.strategy, t.how.threshold, t.seed, t.shown) for t in seen] == [
        ("test", "threshold", 0.9, 5, 0)
    ]
    assert (tmp_path / "trials.jsonl").read_bytes() == before
    (figure,) = result.figures
    assert result.chosen == [figure.setting] == ["blocks of 2: threshold, 0.9"]
    assert result.model == f"{STUDY.run} at step {loaded.step}"
    assert (figure.split, figure.value, figure.over, figure.nfe) == ("test", 0.25, "40 problems", 2.0)
    assert figure.interval == wilson_interval(10, 40)
    assert "front of validation" in unmasking.rule(config)


def test_a_policy_without_a_checkpoint_is_not_compared(tmp_path):
    with pytest.raises(FileNotFoundError, match="not a policy with a complete checkpoint; `trimask train-policy`"):
        list(planned_trials(dataclasses.replace(STUDY, policies=(str(tmp_path / "p"),)), 7))


def test_the_step_of_a_place_is_the_one_that_revealed_it(loaded, prepared):
    problem = from_prepared(prepared, "sums", "text", "test").problems[0]
    how = GenerationConfig(strategy="given", steps=problem.length, temperature=0.0, stop_at_eos=False)
    (path,) = Generator(loaded.denoise, loaded.vocabulary).trajectories([problem.request], how, 0)
    np.testing.assert_array_equal(_reveal_steps(path), np.arange(1, problem.length + 1))


def test_the_command_trains_on_questions_of_prepared_data(loaded, prepared, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(command, "load", fakes.opening(loaded, tmp_path, 7))
    words = [str(tmp_path / "fast"), "--run", str(tmp_path), "--data", str(prepared.folder), "--preset", "blocks"]
    words += ["--checkpoint", "7"]
    small = ["--policy.width", "8", "--policy.mlp-width", "8", "--policy.num-heads", "1", "--grpo.group", "2"]
    command.main([*words, *small, "--max-problems", "8"])  # only one of the datasets is text alone
    config = json.loads((tmp_path / "fast/config.json").read_text())
    assert config["generation"]["block_length"] == 8 and config["grpo"]["learning_rate"] == 3e-4
    assert len((tmp_path / "fast/metrics.jsonl").read_text().splitlines()) == 1
    assert "Policy with" in capsys.readouterr().out
    about = json.loads((tmp_path / "fast/policy.json").read_text())
    assert "8 problems of sums text train" in about["trained_on"]
    with pytest.raises(ValueError, match="no preset 'quick'; there are paper"):
        command.main(["policies/p", "--run", "x", "--preset", "quick"])


def test_a_study_without_orders_ends_well(loaded, prepared, tmp_path, monkeypatch):
    monkeypatch.setattr("trimask.diffusion.studies.trials.load", fakes.opening(loaded, Path(STUDY.run)))
    trials = MadeUp(tmp_path, lambda way: Measurement(0.5, 1.0, 2, None, [], []))
    trials.data = prepared.folder
    assert "| threshold | 0.5 |" in study(dataclasses.replace(STUDY, thresholds=(0.5,)), trials).report
    assert not (tmp_path / "orders.csv").exists()


@pytest.mark.parametrize("bad", [{"blocks": (-1,)}, {"thresholds": (2.0,)}, {"shown": 0}])
def test_impossible_studies_are_refused(bad):
    with pytest.raises(ValueError, match=r"must (not be negative|lie in \[0, 1\]|be at least 1), got"):
        UnmaskingStudy(**bad)


def test_trainings_in_several_processes_show_no_bars(monkeypatch, capsys):
    asked = []
    monkeypatch.setattr(policy_study, "train_chain", lambda *arguments: print("a bar") or asked.append(arguments))
    policy_study._train_chain_quietly("runs/other", Path("data"), None, Path("folder"), [])
    assert asked == [("runs/other", Path("data"), None, Path("folder"), [])] and capsys.readouterr().out == ""
