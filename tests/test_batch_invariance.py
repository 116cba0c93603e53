"""The study of batch invariance: everything that it writes, for made-up outcomes."""

import math

import madeup
import pytest
from madeup import MadeUp, written

from trimask.diffusion.data.batches import BatchConfig
from trimask.diffusion.optimizer import OptimizerConfig
from trimask.diffusion.pretraining.description import TrainConfig
from trimask.diffusion.studies import batch_invariance, critical_batch, trainings
from trimask.diffusion.studies.batch_invariance import BatchInvariance, Flatness
from trimask.diffusion.transformer import TransformerConfig

BASE = TrainConfig(
    model=TransformerConfig(num_layers=2, width=32, num_heads=4),
    optimizer=OptimizerConfig(horizon_tokens=32_000, warmup_tokens=1000, learning_rate=0.1),
    batch=BatchConfig(tokens=400),
    seed=5,
)
TUNING = {-6: (2.0, 2.0), -7: (2.125, 2.125), -8: (1.5, 3.0)}
"""log2 of the learning rate → losses of the two seeds, of which the mean decides."""
LOSSES = {
    ("nothing", 400): (2.0, 2.01),
    ("nothing", 200): (2.1, 2.13),
    ("nothing", 1600): (2.3, 2.4),
    ("sde", 400): (2.0, 2.01),
    ("sde", 200): (2.015, 2.035),
    ("sde", 1600): (3.0, 3.5),
}
"""(Rule, positions of a batch) → losses of the two seeds. A tenth of the positions is padding."""


def made_up(config):
    horizon, batch, rate = config.optimizer.horizon_tokens, config.batch.tokens, config.optimizer.learning_rate
    steps = round(horizon / (0.9 * batch))
    if config.seed >= 105:
        return madeup.outcome(TUNING[round(math.log2(rate))][config.seed - 105])
    if horizon == 16_000:
        critical = {5: 36, 6: 40}[config.seed]
        return madeup.outcome(3.0 * (1 + 0.01 * (critical / steps) ** 1.5), steps=steps)
    rule = "nothing" if rate == 2**-6 else "sde"
    loss = LOSSES[rule, batch][config.seed - 5]
    bent = {("nothing", 200): 0.2, ("sde", 200): 0.06}.get((rule, batch), 0.0)
    curve = [[horizon * share, 9.0, 2.0 + bent * share] for share in (0.25, 0.5, 1.0)]
    return madeup.outcome(loss, last_loss=loss + 1, curve=curve, steps=steps, batch_tokens=0.9 * batch)


def test_all_that_is_written(tmp_path, monkeypatch):
    for module in (batch_invariance, trainings):
        monkeypatch.setattr(module, "mean_tokens", lambda config, data: 0.9 * config.batch.tokens)
    monkeypatch.setattr(critical_batch, "_DRAWS", 40)
    figures = madeup.figures(monkeypatch, batch_invariance)
    config = BatchInvariance(
        base=BASE, log2_learning_rates=(-7.0, -6.0, -8.0), log2_factors=(0, -1, 2), rules=("sde", "nothing"), seeds=2
    )
    made = MadeUp(tmp_path, made_up)
    text = batch_invariance.study(config, made)
    assert text == written(
        r"""
        100 parameters, 32,000 tokens, base batch 360 tokens, tuned learning rate 0.0156 (at the edge of the grid: the \
        best one may lie beyond), 2 seeds. S_crit = 38 steps (95 % over seeds: 36–40), p = 1.50, at half the horizon \
        predicts B_crit = 842 tokens (95 % over seeds: 800–889).

        | batch in tokens | steps | sde | nothing |
        | --- | --- | --- | --- |
        | 360 | 89 | 2.0050 ± 0.0635 | 2.0050 ± 0.0635 |
        | 180 | 178 | 2.0250 ± 0.1271 | 2.1150 ± 0.1906 |
        | 1,440 | 22 | 3.2500 ± 3.1766 | 2.3500 ± 0.6353 |

        ± is half the width of the 95 % interval of the mean over 2 seed(s), by Student's t.

        - sde: flat; spread 1.0% ± 3.2% over the 2 batches up to B_crit, allowed 1.1%; held-out curves within 1.5% of \
        their mean.

        - nothing: not flat; spread 5.5% ± 6.3% over the 2 batches up to B_crit, allowed 1.6%; held-out curves within \
        4.8% of their mean.
        """
    )
    assert [(what, len(configs)) for what, _, configs in made.asked] == [
        ("tuning the learning rate", 6),
        ("half the horizon", 6),
        ("batches", 12),
    ]
    assert madeup.files(tmp_path) == ["losses.csv"]
    assert (tmp_path / "losses.csv").read_text().strip() == written(
        """
        rule,log2_factor,seed,batch_tokens,steps,loss,last_loss
        sde,0,0,360.0,89,2.0,3.0
        sde,0,1,360.0,89,2.01,3.01
        sde,-1,0,180.0,178,2.015,3.015
        sde,-1,1,180.0,178,2.035,3.035
        sde,2,0,1440.0,22,3.0,4.0
        sde,2,1,1440.0,22,3.5,4.5
        nothing,0,0,360.0,89,2.0,3.0
        nothing,0,1,360.0,89,2.01,3.01
        nothing,-1,0,180.0,178,2.1,3.1
        nothing,-1,1,180.0,178,2.13,3.13
        nothing,2,0,1440.0,22,2.3,3.3
        nothing,2,1,1440.0,22,2.4,3.4
        """
    )
    ((loss,), _), (curves, _) = figures["loss.png"], figures["curves.png"]
    assert len(figures) == 2
    assert {rule: [batch for batch, _ in curve] for rule, curve in loss.curves.items()} == {
        "sde": [360.0, 180.0, 1440.0],
        "nothing": [360.0, 180.0, 1440.0],
    }
    assert [mean for _, mean in loss.curves["nothing"]] == pytest.approx([2.005, 2.115, 2.35])
    assert loss.vertical_lines == {"B_crit, predicted": pytest.approx(842, abs=1)} and loss.y_max == pytest.approx(
        1.5 * 2.005
    )
    assert [panel.title for panel in curves] == ["sde", "nothing"]
    assert curves[1].curves == {
        "batch × 1": [(8000.0, 2.0), (16_000.0, 2.0), (32_000.0, 2.0)],
        "batch × 0.5": [(8000.0, 2.05), (16_000.0, 2.1), (32_000.0, 2.2)],
        "batch × 4": [(8000.0, 2.0), (16_000.0, 2.0), (32_000.0, 2.0)],
    }
    assert madeup.described(figures) == written(
        """
        curves.png, 4 columns
        sde: tokens (linear) × held-out loss (log): batch × 1, batch × 0.5, batch × 4
        nothing: tokens (linear) × held-out loss (log): batch × 1, batch × 0.5, batch × 4
        loss.png, 1 columns
        loss at the end: batch in tokens (log) × loss (linear): sde, nothing: markers, B_crit, predicted, up to 3.0075
        """
    )


@pytest.mark.parametrize(
    ("batches", "spread", "verdict"),
    [(1, 0.0, "undecided, too few batches below B_crit"), (2, 0.01, "flat"), (2, 0.011, "not flat")],
)
def test_two_batches_may_be_flat(batches, spread, verdict):
    assert Flatness(batches, spread=spread, half_width=0.0, allowed=0.01, curve_deviation=0.0).verdict == verdict
