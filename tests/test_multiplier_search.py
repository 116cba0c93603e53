"""The search for multipliers: everything that it writes, for made-up outcomes."""

import csv

import madeup
import numpy as np
import pytest
from madeup import MadeUp, written

from trimask.diffusion.data.batches import BatchConfig
from trimask.diffusion.optimizer import OptimizerConfig
from trimask.diffusion.parametrization import ModuleMultipliers
from trimask.diffusion.pretraining.description import TrainConfig
from trimask.diffusion.studies import multiplier_search
from trimask.diffusion.studies.multiplier_search import MultiplierSearch, multipliers_at, search_dimensions
from trimask.diffusion.transformer import TransformerConfig
from trimask.tokenizers.storage import configuration

BASE = TrainConfig(
    model=TransformerConfig(num_layers=2, width=32, num_heads=4),
    optimizer=OptimizerConfig(horizon_tokens=32_000, warmup_tokens=1000, learning_rate=0.1),
    batch=BatchConfig(tokens=400),
    seed=5,
)
DIMENSIONS = search_dimensions()
MLP, DEPTH = DIMENSIONS.index(("learning_rate", "mlp")), DIMENSIONS.index(("init", "depth 1"))


def at(mlp, depth):
    """A point of the search with given values in two dimensions, and 0.125 in nine others."""
    point = np.zeros(len(DIMENSIONS))
    point[-9:] = 0.125
    point[[MLP, DEPTH]] = mlp, depth
    return point


ROUNDS = {1: [at(2.0, -3.0), at(1.0, -0.5)], 2: [at(3.0, 0.5), at(-1.0, 1.0)], 3: [at(0.5, 0.5), at(0.25, 0.25)]}
SEARCHED = {0.0: 2.9, 2.0: 2.8, 1.0: 2.7, 3.0: 2.75, -1.0: 2.95, 0.5: 2.7, 0.25: 2.71}
"""log2 of the multiplier of the MLP's learning rate → loss in the search."""
COMPARED = {
    (32, 2): ((3.0, 3.5), (2.5, 2.75)),
    (128, 2): ((2.0, 2.25), (2.0, 2.0)),
    (32, 6): ((1.0, 1.5), (1.5, 2.25)),
    (128, 6): ((4.0, 4.0), (3.0, 3.5)),
}
"""Width and depth → losses of the two seeds, without multipliers and with them."""


def made_up(config):
    model, multipliers = config.model, config.parametrization.multipliers
    rate = config.optimizer.learning_rate
    if rate != 2.0**-7 or config.seed == 105:
        return madeup.outcome({-6: 2.4, -7: 2.0, -8: 2.2}[round(np.log2(rate))])
    if config.seed == 5:
        return madeup.outcome(SEARCHED[round(np.log2(multipliers.learning_rate.at("up", None)), 3)])
    is_tuned = multipliers != ModuleMultipliers()
    loss = COMPARED[model.width, model.num_layers][is_tuned][config.seed - 6]
    curve = [[tokens, 9.0, loss + (3.0 - 3.0 * tokens / 32_000) / (1 + is_tuned)] for tokens in (8e3, 16e3, 32e3)]
    return madeup.outcome(loss, curve=curve, steps=7, num_parameters=1000 * model.width + model.num_layers)


def test_all_that_is_written(tmp_path, monkeypatch):
    asked = []

    def random_points(config, seed, number, centre, radius):
        asked.append((seed, number, centre[MLP], centre[DEPTH], radius))
        return ROUNDS[number]

    monkeypatch.setattr(multiplier_search, "random_points", random_points)
    figures = madeup.figures(monkeypatch, multiplier_search)
    config = MultiplierSearch(
        base=BASE,
        log2_learning_rates=(-7.0, -6.0, -8.0),
        runs=7,
        per_round=2,
        radius=0.5,
        width_factor=4,
        depth_factor=3,
        seeds=2,
    )
    made = MadeUp(tmp_path, made_up)
    text = multiplier_search.study(config, made)
    assert text == written(
        r"""
        Tuned learning rate 0.00781; 7 runs of 32,000 tokens in 52 dimensions lowered the loss of the searched seed \
        from 2.9000 to 2.7000. On 2 other seeds, at the base and transferred:

        | shape | parameters | untuned | with multipliers | difference | speed-up |
        | --- | --- | --- | --- | --- | --- |
        | base | 32,002 | 3.2500 | 2.6250 | -19.2% ± 48.9% | 1.71 |
        | 4 times as wide | 128,002 | 2.1250 | 2.0000 | -5.9% ± 74.7% | 1.09 |
        | 3 times as deep | 32,006 | 1.2500 | 1.8750 | +50.0% ± 127.1% | 0.79 |
        | both | 128,006 | 4.0000 | 3.2500 | -18.8% ± 79.4% | 2.00 |

        ± is half the width of the 95 % interval of the mean over 2 seed(s), by Student's t.

        Speed-up: ratio of the tokens that the untuned runs need to those that the runs with multipliers need, to the \
        same held-out loss of the averaged weights.

        The largest multipliers: learning_rate of mlp ×2.00, init of depth 1 ×0.71, init of unembedding ×1.09, \
        init of depth 0 ×1.09, init of depth 2 ×1.09, residual of attention ×1.09, residual of mlp ×1.09, residual \
        of depth 0 ×1.09, residual of depth 1 ×1.09, residual of depth 2 ×1.09. All of them: multipliers.json, for \
        `trimask train --multipliers`.
        """
    )
    # A round starts from the best point so far; the region grows by a fifth after a gain, and shrinks after none.
    assert asked == [
        (5, 1, 0.0, 0.0, 0.5),
        (5, 2, 1.0, -0.5, pytest.approx(0.6)),
        (5, 3, 1.0, -0.5, pytest.approx(0.48)),
    ]
    assert [(what, len(configs)) for what, _, configs in made.asked] == [
        ("tuning the learning rate", 3),
        ("search", 1),
        ("search, round 1", 2),
        ("search, round 2", 2),
        ("search, round 3", 2),
        ("comparison", 16),
    ]
    assert madeup.files(tmp_path) == ["comparison.csv", "multipliers.json", "search.csv"]
    assert configuration.load(tmp_path / "multipliers.json", ModuleMultipliers) == multipliers_at(at(1.0, -0.5))
    with (tmp_path / "search.csv").open() as file:
        rows = [[float(row[name]) for name in ("runs", "loss", "radius")] for row in csv.DictReader(file)]
    assert np.array(rows) == pytest.approx(np.array([[1, 2.9, 0.5], [3, 2.7, 0.6], [5, 2.7, 0.48], [7, 2.7, 0.384]]))
    assert (tmp_path / "comparison.csv").read_text().strip() == written(
        """
        shape,multipliers,seed,loss,steps
        base,False,0,3.0,7
        base,False,1,3.5,7
        base,True,0,2.5,7
        base,True,1,2.75,7
        4 times as wide,False,0,2.0,7
        4 times as wide,False,1,2.25,7
        4 times as wide,True,0,2.0,7
        4 times as wide,True,1,2.0,7
        3 times as deep,False,0,1.0,7
        3 times as deep,False,1,1.5,7
        3 times as deep,True,0,1.5,7
        3 times as deep,True,1,2.25,7
        both,False,0,4.0,7
        both,False,1,4.0,7
        both,True,0,3.0,7
        both,True,1,3.5,7
        """
    )
    assert list(figures) == ["search.png"]
    assert figures["search.png"][0][0].curves == {
        "loss at the centre": [(1.0, 2.9), (3.0, 2.7), (5.0, 2.7), (7.0, 2.7)]
    }
    assert madeup.described(figures) == written(
        """
        search.png, 4 columns
        search: runs (linear) × loss (linear): loss at the centre: markers
        """
    )


def test_the_points_of_a_round_stay_the_same():
    """A resumed search must try the same points, or it would train again."""
    centre = np.arange(len(DIMENSIONS)) / 8
    config = MultiplierSearch(base=BASE, per_round=400, radius=9.0)
    points = np.array(multiplier_search.random_points(config, 3, 2, centre, 0.5))
    assert points.shape == (400, len(DIMENSIONS))
    steps = points - centre
    assert np.flatnonzero(steps[0])[:3].tolist() == [6, 7, 8]
    np.testing.assert_allclose(steps[0][6:9], [-0.320685, 0.412719, -0.250356], atol=1e-6)


def test_steps_of_a_search_are_normal_along_a_share_of_the_dimensions():
    """400 · 52 numbers have a share of 0.3 and a standard deviation of 0.5, within five standard errors."""
    config = MultiplierSearch(base=BASE, per_round=400, changed=0.3, radius=9.0)
    steps = np.array(multiplier_search.random_points(config, 3, 2, np.zeros(len(DIMENSIONS)), 0.5))
    changed = steps != 0
    assert changed.mean() == pytest.approx(0.3, abs=0.02) and steps[changed].std() == pytest.approx(0.5, abs=0.01)
    for other in ((4, 2), (3, 1)):
        assert not np.array_equal(
            multiplier_search.random_points(config, *other, np.zeros(len(DIMENSIONS)), 0.5), steps
        )
