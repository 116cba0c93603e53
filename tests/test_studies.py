"""The studies' conclusions, in worlds where the truth is known; and the coordinate check in small on real networks.

What each study writes is compared with literals in the test of its module.
"""

import csv
import dataclasses
import json
import math

import madeup
import numpy as np
import pytest

from trimask.diffusion.data.batches import BatchConfig
from trimask.diffusion.optimizer import OptimizerConfig
from trimask.diffusion.parametrization import Family, ModuleMultipliers, ParametrizationConfig
from trimask.diffusion.pretraining.description import TrainConfig
from trimask.diffusion.sde import SDEScaling, rescaled
from trimask.diffusion.studies import (
    batch_invariance,
    coordinate_check,
    critical_batch,
    learning_rate_transfer,
    multiplier_search,
)
from trimask.diffusion.studies.batch_invariance import RULES, BatchInvariance, under_rule
from trimask.diffusion.studies.coordinate_check import CoordinateCheck, coordinates_of
from trimask.diffusion.studies.critical_batch import CriticalBatch, CriticalBatchFit
from trimask.diffusion.studies.learning_rate_transfer import LearningRateTransfer, Optimum, optimum
from trimask.diffusion.studies.multiplier_search import (
    MultiplierSearch,
    SearchRound,
    multipliers_at,
    next_round,
    search_dimensions,
    speedup,
)
from trimask.diffusion.studies.trainings import Outcome, as_sde_base, at_shape, mean_tokens
from trimask.diffusion.studies.trials import Trials
from trimask.diffusion.transformer import TransformerConfig
from trimask.scripts import study as study_script
from trimask.tokenizers.storage import configuration

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

    def outcomes(self, configs, what="trials"):
        self.asked += configs
        return [self._outcome(config) for config in configs]

    def _outcome(self, config):
        steps = round(config.optimizer.horizon_tokens / config.batch.tokens)
        loss = self.loss(config)
        curve = [
            [share * config.optimizer.horizon_tokens, loss * (2 - share), loss * (2 - share)]
            for share in np.linspace(0.05, 1, 20).tolist()
        ]
        return Outcome(loss, loss, curve, steps, float(config.batch.tokens), 100, 0.0)


def rows(path):
    with path.open() as file:
        return list(csv.DictReader(file))


@pytest.fixture
def world(prepared, tmp_path, monkeypatch):
    monkeypatch.setattr(critical_batch, "_DRAWS", 50)
    for module in (learning_rate_transfer, critical_batch, batch_invariance, multiplier_search):
        madeup.figures(monkeypatch, module)
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
    assert "completed_p: the best learning rates are 2^0.00 apart over widths" in text
    assert (
        "standard: the best learning rates are 2^1.00 apart over widths and 2^0.00 over depths, at most a factor"
        in text
    )
    optima = {(row["kind"], row["width"]): float(row["log2_learning_rate"]) for row in rows(tmp_path / "optima.csv")}
    assert optima["completed_p", "128"] == pytest.approx(-8.6) and optima["standard", "128"] == pytest.approx(-9.6)
    assert len(rows(tmp_path / "losses.csv")) == len(trials.asked) == 3 * 2 * 5
    assert {c.parametrization.base_width for c in trials.asked} == {32}


def test_the_lowest_point_is_refined_only_inside():
    points = [(float(x), (x - 1.3) ** 2) for x in range(4)]
    best = optimum(points)
    assert (best.log2_learning_rate, best.loss, best.edge) == (pytest.approx(1.3), pytest.approx(0.0, abs=1e-9), "")
    uneven = optimum([(0.0, 5.0), (1.0, 1.0), (2.0, 2.0), (3.0, 100.0), (4.0, 100.0)])
    assert uneven.log2_learning_rate == pytest.approx(1.3) and uneven.loss == pytest.approx(0.775)  # of three points
    assert optimum(points[2:]) == Optimum(*points[2], "≤")
    assert optimum(points[:2]) == Optimum(*points[1], "≥")
    assert optimum([(0.0, 2.0), (1.0, 1.0), (2.0, math.inf)]) == Optimum(1.0, 1.0)


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
    fitted = critical_batch.fit_critical_steps({cell: points for cell, points in losses.items() if cell[0] < 64_000})
    low, high = fitted.interval
    assert low < fitted.critical_steps < high and 1.01 < high / low < 1.5
    assert fitted.critical_steps == pytest.approx(80, rel=0.1)
    assert fitted.power == pytest.approx(1.5, abs=0.15)
    assert fitted.plateaus[32_000] == pytest.approx(2.0, rel=0.003)
    assert f"S_crit = {fitted.critical_steps:.0f} steps" in text and "largest batch whose loss is within noise" in text
    # B_crit = 64,000 / 80 = 800: 512 is the last of the grid below.
    assert text.endswith("512 tokens.")


def test_diverged_runs_do_not_break_the_fit():
    losses = {(1000, 10): [(100.0, 2.0)], (1000, 20): [(50.0, 2.02)], (1000, 100): [(10.0, math.inf)]}
    fitted = critical_batch.fit_critical_steps(losses)
    finite = losses | {(1000, 100): [(10.0, 20.2)]}
    assert fitted.critical_steps == critical_batch.fit_critical_steps(finite).critical_steps
    with pytest.raises(ValueError, match="all runs diverged"):
        critical_batch.fit_critical_steps(
            {cell: [(steps, math.inf) for steps, _ in points] for cell, points in losses.items()}
        )


def test_what_speaks_against_a_fit_is_said():
    sure = CriticalBatchFit(100.0, (90.0, 110.0), 1.5, 400.0, {})
    assert sure.summary == "S_crit = 100 steps (95 % over seeds: 90–110), p = 1.50,"
    assert "beyond the longest runs of 80," in dataclasses.replace(sure, longest=80.0).summary
    assert "p = 4.00, at its bound" in dataclasses.replace(sure, power=4.0).summary
    assert "(one seed: no interval)" in dataclasses.replace(sure, interval=(math.nan, math.nan)).summary


def test_a_seed_that_is_common_to_all_batches_does_not_widen_the_interval():
    """Seeds that shift all losses alike leave S_crit as certain as it is."""
    steps = (800.0, 400.0, 200.0, 100.0, 50.0)
    losses = {
        (16_000, int(16_000 / s)): [(s, (1 + 0.05 * seed) * (1 + 0.01 * (80 / s) ** 1.5)) for seed in range(4)]
        for s in steps
    }
    low, high = critical_batch.fit_critical_steps(losses).interval
    assert high / low < 1.2


def test_one_run_that_went_wrong_moves_the_fit_little():
    losses = {(16_000, int(16_000 / s)): [(s, 1 + 0.01 * (80 / s) ** 1.5)] for s in (800.0, 400.0, 200.0, 100.0, 50.0)}
    alone = critical_batch.fit_critical_steps(losses)
    assert alone.critical_steps == pytest.approx(80, rel=0.02) and np.isnan(alone.interval).all(), "of one seed"
    ((cell, [(steps, loss)]), *_) = losses.items()
    spoilt = critical_batch.fit_critical_steps({**losses, cell: [(steps, 1.3 * loss)]}).critical_steps
    assert spoilt == pytest.approx(80, rel=0.5)


# --- batch invariance ---


def test_each_rule_scales_what_it_says(prepared):
    tuned = as_sde_base(BASE, prepared.folder)
    of = {rule: under_rule(tuned, rule, 4.0, 1, prepared.folder) for rule in RULES}
    tokens, base_tokens = (mean_tokens(config, prepared.folder) for config in (of["sde"], BASE))
    kappa = tokens / base_tokens  # not 4: rows that do not fill a batch are left out
    assert kappa != 4 and kappa == pytest.approx(4, rel=0.2)
    assert of["nothing"].optimizer == BASE.optimizer
    assert of["linear"].optimizer == dataclasses.replace(BASE.optimizer, learning_rate=2**-8 * kappa)
    assert of["root"].optimizer == dataclasses.replace(BASE.optimizer, learning_rate=2**-8 * kappa**0.5)
    assert of["sde"].optimizer == rescaled(BASE.optimizer, kappa, kappa)
    assert {(c.batch.tokens, c.seed, c.sde) for c in of.values()} == {(1024, 1, SDEScaling())}


def test_flat_is_told_from_not_flat_below_the_predicted_batch(world, tmp_path):
    """A world in which only the recipe rescaled to the batch has the lowest loss, down to 20 steps."""

    def loss(config):
        factor = math.log2(config.batch.tokens / 256)
        is_tuned = config.sde.base_batch_tokens is not None
        rate = math.log2(config.optimizer.learning_rate) + 8 - (0 if is_tuned else factor / 2)
        steps = config.optimizer.horizon_tokens / config.batch.tokens
        return 2.0 * (1 + 0.05 * rate**2 + 0.01 * (20 / steps) ** 2) * (1 + 0.001 * (config.seed % 3))

    config = BatchInvariance(base=BASE, log2_factors=(-2, -1, 0, 1, 2, 3), seeds=3)
    text = batch_invariance.study(config, world(loss))
    lines = {line.split(":")[0].removeprefix("- "): line for line in text.splitlines() if line.startswith("- ")}
    assert lines["sde"].count(": flat;") == lines["root"].count(": flat;") == 1
    assert "not flat" in lines["nothing"] and "not flat" in lines["linear"]
    assert "over the 5 batches up to B_crit" in lines["sde"]
    assert "S_crit = 20 steps" in text and "predicts B_crit = 1,6" in text.replace("1,5", "1,6")
    assert {row["rule"] for row in rows(tmp_path / "losses.csv")} == {"nothing", "linear", "root", "sde"}


def test_flatness_by_hand():
    """Seeds differ by 0.1 at both batches alike: the spread is 1 %, and its interval has no width."""

    def runs(batch, losses):
        curve = [[1000.0 * share, 9.0, 2.0 + batch / 100] for share in (0.5, 1.0)]
        return [Outcome(loss, loss, curve, 1000 // batch, float(batch), 1, 0.0) for loss in losses]

    cells = {("sde", 0): runs(10, (2.0, 2.1)), ("sde", 1): runs(20, (2.02, 2.12)), ("sde", 2): runs(40, (3.0, 3.1))}
    of = batch_invariance.flatness(cells, "sde", 20.0)
    assert (of.batches, of.verdict) == (2, "flat")
    assert (of.spread, of.half_width) == (pytest.approx(0.02 / 2.05), pytest.approx(0.0, abs=1e-9))
    assert of.allowed == pytest.approx(2 * 0.1 / 2**0.5 / 2.05)
    assert of.curve_deviation == pytest.approx(0.05 / 2.15)
    assert batch_invariance.flatness(cells, "sde", 40.0).verdict == "not flat"
    assert batch_invariance.flatness(cells, "sde", 15.0).verdict == "undecided, too few batches below B_crit"
    # With one seed there is no interval; with two of which one differs more, it is 12.7062 standard errors wide.
    alone = {cell: of_cell[:1] for cell, of_cell in cells.items()}
    assert batch_invariance.flatness(alone, "sde", 20.0).half_width is None
    wider = {**cells, ("sde", 1): runs(20, (2.02, 2.14))}
    assert batch_invariance.flatness(wider, "sde", 20.0).half_width == pytest.approx(12.7062 * 0.01 / 2.05, rel=1e-4)
    diverged = {**cells, ("sde", 1): runs(20, (2.02, math.inf))}
    assert batch_invariance.flatness(diverged, "sde", 20.0).verdict == "not flat"


def test_settings_that_cannot_be_run_are_refused_at_once():
    with pytest.raises(ValueError, match="log2_factors must contain 0"):
        BatchInvariance(base=BASE, log2_factors=(-1, 1))
    with pytest.raises(ValueError, match="seeds must be at least 1, got 0"):
        LearningRateTransfer(base=BASE, seeds=0)
    with pytest.raises(ValueError, match="batches must be at least 3, got 2"):
        CriticalBatch(base=BASE, batches=(64, 128))
    with pytest.raises(ValueError, match="per_round must be at least 1, got 0"):
        MultiplierSearch(base=BASE, per_round=0)
    with pytest.raises(ValueError, match="kinds must differ from each other"):
        CoordinateCheck(base=BASE, kinds=(("mup", 0.5), ("mup", 1.0)))


# --- search ---


def test_every_coordinate_is_a_multiplier_of_its_own():
    listed = search_dimensions()
    plain = multipliers_at(np.zeros(len(listed)))
    for number in range(len(listed)):
        point = np.zeros(len(listed))
        point[number] = 1.0
        family, group = listed[number]
        changed = configuration.changed_fields(plain, multipliers_at(point))
        assert len(changed) == 1 and changed[0].startswith(f"{family}.{'depth' if 'depth' in group else 'of'}")
    assert {family for family, _ in listed} == {field.name for field in dataclasses.fields(ModuleMultipliers)}


def test_the_trust_region_grows_after_a_gain_and_shrinks_without():
    here = SearchRound(1, np.zeros(2), 2.0, 0.5)
    better = next_round(here, [np.ones(2), np.full(2, 2.0)], [1.9, 1.8])
    assert (better.runs, better.loss, better.radius) == (3, 1.8, 0.6) and better.centre.tolist() == [2.0, 2.0]
    worse = next_round(here, [np.ones(2)], [math.inf])
    assert (worse.runs, worse.loss, worse.radius) == (2, 2.0, 0.4) and worse.centre.tolist() == [0.0, 0.0]
    ends = [
        next_round(dataclasses.replace(here, radius=r), [np.ones(2)], [loss]).radius
        for r, loss in ((0.9, 1.0), (0.06, 3.0))
    ]
    assert ends == [1.0, 0.05]


def bowl(config):
    """Lowest where the learning rate of the MLP is 4 times the others' and the residual of attention half."""
    of = config.parametrization.multipliers
    mlp, attention = (math.log2(x) for x in (of.learning_rate.at("up", None), of.residual.at("attention", None)))
    return 2.0 + 0.1 * (mlp - 2) ** 2 + 0.1 * (attention + 1) ** 2 + valley(config, 0.0) - 2.0


def test_the_search_finds_what_there_is_to_find_and_transfers_it(world, tmp_path):
    config = MultiplierSearch(base=BASE, runs=241, per_round=12, radius=0.4)
    trials = world(bowl)
    text = multiplier_search.study(config, trials)
    found = configuration.load(tmp_path / "multipliers.json", ModuleMultipliers)
    assert math.log2(found.learning_rate.at("up", None)) == pytest.approx(2, abs=0.5)
    assert math.log2(found.residual.at("attention", None)) == pytest.approx(-1, abs=0.5)
    final = [c for c in trials.asked if c.parametrization.multipliers == found and c.model.width == 128]
    assert {(c.model.num_layers, c.seed) for c in final} == {(layers, seed) for layers in (2, 4) for seed in (1, 2, 3)}
    assert len({json.dumps(configuration.to_dict(c)) for c in trials.asked if c.model.width == 32}) <= 8 + 241 + 12
    assert "4 times as wide" in text and "learning_rate of mlp" in text


def test_a_search_goes_the_same_way_again(world):
    config = MultiplierSearch(base=BASE, runs=49, per_round=12)
    first, second = world(bowl), world(bowl)
    assert multiplier_search.study(config, first) == multiplier_search.study(config, second)
    assert first.asked == second.asked


def test_no_time_no_rounds(world):
    trials = world(bowl)
    multiplier_search.study(MultiplierSearch(base=BASE, runs=1000, hours=0.0), trials)
    assert len(trials.asked) == 8 + 1 + 2 * 4 * 3


def test_speedup_is_the_ratio_of_tokens_to_the_same_loss():
    def run(rate, noise=0.0):
        curve = [[float(t), 9.0, 3.0 - rate * t / 100 + noise * (t % 20 == 0)] for t in range(10, 101, 10)]
        return [Outcome(curve[-1][2], curve[-1][2], curve, 1, 1.0, 1, 0.0)]

    assert speedup(run(1.0), run(2.0)) == pytest.approx(2.0)
    assert speedup(run(2.0), run(1.0)) == pytest.approx(0.5)
    assert speedup(run(1.0, 0.3), run(1.0, 0.3)) == 1.0
    diverged = [Outcome(math.inf, math.inf, [[10.0, math.inf, math.inf]], 1, 1.0, 1, 0.0)]
    assert math.isnan(speedup(run(1.0), diverged))


# --- coordinate check ---


def test_a_small_coordinate_check(prepared, tmp_path, monkeypatch):
    """Complete(d)P with α = ½ keeps activations and updates; the standard parametrization does not."""
    small_start = ModuleMultipliers(init=Family(of={"unembedding": 0.1}))
    base = dataclasses.replace(
        BASE,
        model=TransformerConfig(num_layers=2, width=64, num_heads=4),
        parametrization=ParametrizationConfig(multipliers=small_start),
        optimizer=OptimizerConfig(horizon_tokens=6 * 250, warmup_tokens=0, schedule="constant", learning_rate=2e-3),
    )
    config = CoordinateCheck(base=base, widths=(64, 256), depths=(2, 6), kinds=(("completed_p", 0.5),), seeds=1)
    monkeypatch.setattr(coordinate_check, "draw_panels", lambda *_, **__: None)
    with Trials(tmp_path, prepared.folder, 0, lambda *_: None) as trials:
        coordinate_check.study(config, trials)
    found = {
        (row["axis"], row["what"], row["place"]): float(row["exponent"]) for row in rows(tmp_path / "exponents.csv")
    }
    assert len(found) == 18
    assert found.pop(("width", "initial", "logits")) == pytest.approx(-0.5, abs=0.1)
    # Two sizes, one seed and six steps: a wider margin than the study's ±0.1.
    assert not {name: slope for name, slope in found.items() if abs(slope) > 0.2}
    narrow, wide = (coordinates_of(at_shape(base, "standard", width), prepared.folder) for width in (64, 256))
    assert wide.initial[-1] == pytest.approx(narrow.initial[-1], rel=0.1)
    assert all(after > 2 * before for before, after in zip(narrow.update[1:], wide.update[1:], strict=True))


# --- writing, and the command ---


def test_the_fit_is_what_its_formula_says():
    fitted = CriticalBatchFit(100.0, (90.0, 110.0), 2.0, 400.0, {1000: 3.0})
    assert fitted.loss(1000, 100.0) == pytest.approx(3.03)
    assert fitted.loss(1000, 10.0) == pytest.approx(6.0)


def test_the_command_runs_a_study_and_says_what_was_found(prepared, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("trimask.diffusion.studies.trainings._HELD_OUT_TOKENS", 512)
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
    assert "apart over widths" in capsys.readouterr().out
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
