"""The studies' conclusions, in worlds where the truth is known; and the coordinate check in small on real networks."""

import csv
import dataclasses
import json
import math

import numpy as np
import pytest

from trimask.diffusion import configuration
from trimask.diffusion.data.batches import BatchConfig
from trimask.diffusion.optimizer import OptimizerConfig
from trimask.diffusion.parametrization import Family, ModuleMultipliers, ParametrizationConfig
from trimask.diffusion.studies import batch_invariance, coordinate_check, critical_batch, learning_rate_transfer, search
from trimask.diffusion.studies.batch_invariance import BatchInvariance, under_rule
from trimask.diffusion.studies.coordinate_check import CoordinateCheck
from trimask.diffusion.studies.critical_batch import CriticalBatch, Fit
from trimask.diffusion.studies.findings import exponent, markdown_table
from trimask.diffusion.studies.learning_rate_transfer import LearningRateTransfer, optimum
from trimask.diffusion.studies.search import Round, Search, coordinates, moved, multipliers_at, speedup
from trimask.diffusion.studies.trials import Outcome, Trials, tuned_here
from trimask.diffusion.train import TrainConfig
from trimask.diffusion.transformer import TransformerConfig
from trimask.scripts import study as study_script

BASE = TrainConfig(
    model=TransformerConfig(num_layers=2, width=32, num_heads=4),
    optimizer=OptimizerConfig(horizon_tokens=32_000, warmup_tokens=1000, learning_rate=2**-8),
    batch=BatchConfig(tokens=256, weights={"spoken": 0.0, "sums": 0.0}),
)


class World(Trials):
    """Trials whose loss is a formula."""

    def __init__(self, folder, data, loss):
        super().__init__(folder, data, 0, lambda *_: None)
        self.loss = loss
        self.asked = []

    def losses(self, configs, what="trials"):
        self.asked += configs
        return [self._outcome(config) for config in configs]

    def _outcome(self, config):
        steps = round(config.optimizer.horizon_tokens / config.batch.tokens)
        loss = self.loss(config)
        curve = [
            [share * config.optimizer.horizon_tokens, loss * (2 - share)] for share in np.linspace(0.05, 1, 20).tolist()
        ]
        return Outcome(loss, loss, curve, steps, float(config.batch.tokens), 100, 0.0)


def rows(path):
    with path.open() as file:
        return list(csv.DictReader(file))


@pytest.fixture
def world(prepared, tmp_path):
    return lambda loss: World(tmp_path, prepared.folder, loss)


# --- learning-rate transfer ---


def valley(config, drift):
    """A parabola in log2 of the learning rate; `drift` moves the best one with the width."""
    best = -8.6 - drift * math.log2(config.model.width / 32)
    return 2.0 + 0.01 * (math.log2(config.optimizer.learning_rate) - best) ** 2


def test_transfer_is_told_from_drift(world, tmp_path):
    config = LearningRateTransfer(base=BASE, widths=(32, 64, 128), depths=(2,), kinds=("completed_p", "standard"))
    trials = world(lambda c: valley(c, drift=0.5 * (c.parametrization.kind == "standard")))
    text = learning_rate_transfer.study(config, trials)
    assert "completed_p: the best learning rate moves by up to 2^0.00 over widths" in text
    assert "standard: the best learning rate moves by up to 2^1.00 over widths and 2^0.00 over depths" in text
    optima = {(row["kind"], row["width"]): float(row["log2_learning_rate"]) for row in rows(tmp_path / "optima.csv")}
    assert optima["completed_p", "128"] == pytest.approx(-8.6) and optima["standard", "128"] == pytest.approx(-9.6)
    assert len(rows(tmp_path / "losses.csv")) == len(trials.asked) == 3 * 2 * 5
    assert (tmp_path / "loss.png").stat().st_size > 5000
    assert {c.parametrization.base_width for c in trials.asked} == {32}


def test_the_lowest_point_is_refined_only_inside():
    points = [(float(x), (x - 1.3) ** 2) for x in range(4)]
    assert optimum(points) == pytest.approx((1.3, 0.0), abs=1e-9)
    assert optimum(points[2:]) == (2.0, pytest.approx(0.49))
    assert optimum([(0.0, 2.0), (1.0, 1.0), (2.0, math.inf)]) == (1.0, 1.0)


# --- critical batch ---


def with_critical_steps(critical, power=1.5, noise=0.0):
    def loss(config):
        steps = config.optimizer.horizon_tokens / config.batch.tokens
        plateau = 2.0 * (config.optimizer.horizon_tokens / 32_000) ** -0.1
        wobble = (
            noise * np.random.default_rng([config.seed, config.batch.tokens, config.optimizer.horizon_tokens]).normal()
        )
        return float(plateau * (1 + 0.01 * (critical / steps) ** power) * (1 + wobble))

    return loss


def test_critical_steps_are_found_with_an_interval_and_predict_a_third_horizon(world, tmp_path):
    config = CriticalBatch(
        base=BASE, horizons=(16_000, 32_000), predicted_horizon=64_000, batches=(64, 128, 256, 512, 1024)
    )
    text = critical_batch.study(config, world(with_critical_steps(80.0, noise=0.001)))
    losses = {}
    for row in rows(tmp_path / "losses.csv"):
        cell = (int(row["horizon"]), int(row["batch"]))
        losses.setdefault(cell, []).append((float(row["steps"]), float(row["loss"])))
    fitted = critical_batch.fit({cell: points for cell, points in losses.items() if cell[0] < 64_000})
    low, high = fitted.interval
    assert low < fitted.critical_steps < high and 1.01 < high / low < 1.5
    assert fitted.critical_steps == pytest.approx(80, rel=0.1)
    assert fitted.power == pytest.approx(1.5, abs=0.15)
    assert fitted.plateaus[32_000] == pytest.approx(2.0, rel=0.003)
    assert f"S_crit = {fitted.critical_steps:.0f} steps" in text and "largest batch whose loss is within noise" in text
    # B_crit = 64,000 / 80 = 800: 512 is the last of the grid below.
    assert text.endswith("512 positions.")


def test_diverged_runs_do_not_break_the_fit():
    outcomes = {
        (1000, b, 0): Outcome(loss, loss, [], 1000 // b, float(b), 1, 0.0) for b, loss in ((10, 2.0), (100, math.inf))
    }
    assert critical_batch.by_cell(outcomes) == {(1000, 10): [(100.0, 2.0)], (1000, 100): [(10.0, 20.0)]}


# --- batch invariance ---


def test_each_rule_scales_what_it_says(prepared):
    tuned = tuned_here(BASE, prepared.folder)
    linear, root, nothing = (under_rule(tuned, rule, 4.0, 1).optimizer for rule in ("linear", "root", "nothing"))
    assert linear == dataclasses.replace(BASE.optimizer, learning_rate=2**-6)
    assert root == dataclasses.replace(BASE.optimizer, learning_rate=2**-7)
    assert nothing == BASE.optimizer
    sde = under_rule(tuned, "sde", 4.0, 1)
    assert sde.optimizer == BASE.optimizer and sde.sde == tuned.sde and sde.batch.tokens == 1024
    assert {under_rule(tuned, rule, 4.0, 1).sde.base_batch_tokens for rule in ("linear", "root")} == {None}


def test_flat_is_told_from_not_flat_below_the_predicted_batch(world, tmp_path):
    """A world in which only the recipe rescaled to the batch has the lowest loss, down to 20 steps."""

    def loss(config):
        factor = math.log2(config.batch.tokens / 256)
        is_rescaled = config.sde.base_batch_tokens is not None
        rate = math.log2(config.optimizer.learning_rate) + 8 - (0 if is_rescaled else factor / 2)
        steps = config.optimizer.horizon_tokens / config.batch.tokens
        return 2.0 * (1 + 0.05 * rate**2 + 0.01 * (20 / steps) ** 2) * (1 + 0.001 * (config.seed % 3))

    config = BatchInvariance(base=BASE, log2_factors=(-2, -1, 0, 1, 2, 3), seeds=3)
    text = batch_invariance.study(config, world(loss))
    lines = {line.split(":")[0].removeprefix("- "): line for line in text.splitlines() if line.startswith("- ")}
    assert lines["sde"].count(": flat") == lines["root"].count(": flat") == 1
    assert "not flat" in lines["nothing"] and "not flat" in lines["linear"]
    assert "S_crit = 20 steps" in text and "predicts B_crit = 1,6" in text.replace("1,5", "1,6")
    assert {row["rule"] for row in rows(tmp_path / "losses.csv")} == {"nothing", "linear", "root", "sde"}
    assert (tmp_path / "curves.png").stat().st_size > 5000


def test_the_base_is_tuned_first(world):
    trials = world(lambda c: valley(c, 0.0))
    batch_invariance.study(BatchInvariance(base=BASE, log2_factors=(0, 1, 2), seeds=1), trials)
    assert trials.asked[-1].optimizer.learning_rate == 2**-8.5


# --- search ---


def test_every_coordinate_is_a_multiplier_of_its_own():
    listed = coordinates()
    plain = multipliers_at(np.zeros(len(listed)))
    for number in range(len(listed)):
        point = np.zeros(len(listed))
        point[number] = 1.0
        family, group = listed[number]
        changed = configuration.differences(plain, multipliers_at(point))
        assert len(changed) == 1 and changed[0].startswith(f"{family}.{'depth' if 'depth' in group else 'of'}")
    assert {family for family, _ in listed} == {field.name for field in dataclasses.fields(ModuleMultipliers)}


def test_the_trust_region_grows_after_a_gain_and_shrinks_without():
    here = Round(1, np.zeros(2), 2.0, 0.5)
    better = moved(here, [np.ones(2), np.full(2, 2.0)], [1.9, 1.8])
    assert (better.runs, better.loss, better.radius) == (3, 1.8, 0.6) and better.centre.tolist() == [2.0, 2.0]
    worse = moved(here, [np.ones(2)], [math.inf])
    assert (worse.loss, worse.radius) == (2.0, 0.4) and worse.centre.tolist() == [0.0, 0.0]


def bowl(config):
    """Lowest where the learning rate of the MLP is 4 times the others' and the residual of attention half."""
    of = config.parametrization.multipliers
    mlp, attention = (math.log2(x) for x in (of.learning_rate.at("up", None), of.residual.at("attention", None)))
    return 2.0 + 0.1 * (mlp - 2) ** 2 + 0.1 * (attention + 1) ** 2 + valley(config, 0.0) - 2.0


def test_the_search_finds_what_there_is_to_find_and_transfers_it(world, tmp_path):
    config = Search(base=BASE, runs=241, per_round=12, radius=0.4)
    trials = world(bowl)
    text = search.study(config, trials)
    found = configuration.load(tmp_path / "multipliers.json", ModuleMultipliers)
    assert math.log2(found.learning_rate.at("up", None)) == pytest.approx(2, abs=0.5)
    assert math.log2(found.residual.at("attention", None)) == pytest.approx(-1, abs=0.5)
    final = [c for c in trials.asked if c.parametrization.multipliers == found and c.model.width == 128]
    assert {(c.model.num_layers, c.seed) for c in final} == {(layers, seed) for layers in (2, 4) for seed in (1, 2, 3)}
    assert len({json.dumps(configuration.to_dict(c)) for c in trials.asked if c.model.width == 32}) <= 6 + 241 + 12
    assert "4 times as wide" in text and "learning_rate of mlp" in text


def test_a_search_goes_the_same_way_again(world):
    config = Search(base=BASE, runs=49, per_round=12)
    first, second = world(bowl), world(bowl)
    assert search.study(config, first) == search.study(config, second)
    assert first.asked == second.asked


def test_no_time_no_rounds(world):
    trials = world(bowl)
    search.study(Search(base=BASE, runs=1000, hours=0.0), trials)
    assert len(trials.asked) == 6 + 1 + 2 * 4 * 3


def test_speedup_is_the_ratio_of_tokens_to_the_same_loss():
    def run(rate):
        curve = [[float(t), 3.0 - rate * t / 100] for t in range(10, 101, 10)]
        return [Outcome(curve[-1][1], curve[-1][1], curve, 1, 1.0, 1, 0.0)]

    assert speedup(run(1.0), run(2.0)) == pytest.approx(2.0)
    assert speedup(run(2.0), run(1.0)) == pytest.approx(0.5)


# --- coordinate check ---


@pytest.mark.parametrize(("kind", "is_flat"), [("completed_p", True), ("standard", False)])
def test_a_small_coordinate_check(prepared, tmp_path, kind, is_flat):
    """Complete(d)P with α = ½ keeps activations and updates; the standard parametrization does not."""
    small_start = ModuleMultipliers(init=Family(of={"unembedding": 0.1}))
    base = dataclasses.replace(
        BASE,
        model=TransformerConfig(num_layers=2, width=64, num_heads=4),
        parametrization=ParametrizationConfig(multipliers=small_start),
        optimizer=OptimizerConfig(horizon_tokens=6 * 250, warmup_tokens=0, schedule="constant", learning_rate=2e-3),
    )
    config = CoordinateCheck(base=base, widths=(64, 256), depths=(2, 6), kinds=((kind, 0.5),), seeds=1)
    with Trials(tmp_path, prepared.folder, 0, lambda *_: None) as trials:
        coordinate_check.study(config, trials)
    found = {
        (row["axis"], row["what"], row["place"]): float(row["exponent"]) for row in rows(tmp_path / "exponents.csv")
    }
    assert len(found) == 18
    logits = found.pop(("width", "initial", "logits"))
    assert logits == pytest.approx(-0.5 if is_flat else 0.0, abs=0.1)
    # Two sizes, one seed and six steps: a wider margin than the study's ±0.1.
    off = {name: slope for name, slope in found.items() if abs(slope) > 0.2}
    assert (not off) if is_flat else len(off) >= 4, off


# --- writing, and the command ---


def test_an_exponent_is_the_slope_in_logarithms():
    x = np.array([1.0, 2.0, 8.0])
    assert exponent(x, 3 * x**-0.5) == pytest.approx(-0.5)


def test_tables_are_markdown():
    assert markdown_table(["a", "b"], [["1", "2"]]) == "| a | b |\n| --- | --- |\n| 1 | 2 |"


def test_the_fit_is_what_its_formula_says():
    fitted = Fit(100.0, (90.0, 110.0), 2.0, {1000: 3.0})
    assert fitted.loss(1000, 100.0) == pytest.approx(3.03)
    assert fitted.loss(1000, 10.0) == pytest.approx(6.0)


def test_the_command_runs_a_study_and_says_what_was_found(prepared, tmp_path, capsys):
    arguments = [
        "lr-transfer", str(tmp_path / "out"), "--data", str(prepared.folder), "--workers", "0",
        "--widths", "16", "--depths", "1", "--log2-learning-rates", "-7", "-6", "--kinds", "completed_p",
        "--base.model.width", "16", "--base.model.num-heads", "2", "--base.model.num-layers", "1",
        "--base.batch.tokens", "256", "--base.batch.weights", "spoken", "0", "sums", "0",
        "--base.optimizer.horizon-tokens", "2000", "--base.optimizer.warmup-tokens", "200",
    ]  # fmt: skip
    study_script.main(arguments)
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"README.md", "config.json", "losses.csv", "optima.csv", "loss.png", "trials.jsonl"} <= names
    text = (tmp_path / "out/README.md").read_text()
    assert text.startswith("# lr-transfer\n\n`trimask study lr-transfer ") and "![loss](loss.png)" in text
    assert len((tmp_path / "out/trials.jsonl").read_text().splitlines()) == 2
    assert "moves by up to" in capsys.readouterr().out
    before = (tmp_path / "out/trials.jsonl").read_bytes()
    study_script.main(arguments)
    assert (tmp_path / "out/trials.jsonl").read_bytes() == before


def test_an_unknown_study_is_refused_with_the_list():
    with pytest.raises(ValueError, match="no study 'lr'; there are coordinate-check, lr-transfer"):
        study_script.main(["lr"])


@pytest.mark.parametrize("name", study_script.STUDIES)
@pytest.mark.parametrize("preset", ["cpu", "accelerator"])
def test_every_preset_is_a_configuration_that_survives_json(name, preset):
    config = study_script.STUDIES[name].presets[preset]()
    content = json.loads(json.dumps(configuration.to_dict(config)))
    assert configuration.from_dict(content, type(config), "here") == config
