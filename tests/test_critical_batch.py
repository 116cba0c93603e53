"""The study of the critical batch: everything that it writes, for made-up outcomes."""

import csv

import madeup
import pytest
from madeup import MadeUp, written

from trimask.diffusion.data.batches import BatchConfig
from trimask.diffusion.optimizer import OptimizerConfig
from trimask.diffusion.pretraining.description import TrainConfig
from trimask.diffusion.studies import critical_batch
from trimask.diffusion.studies.critical_batch import CriticalBatch, largest_flat_batch
from trimask.diffusion.transformer import TransformerConfig

BASE = TrainConfig(
    model=TransformerConfig(num_layers=2, width=32, num_heads=4),
    optimizer=OptimizerConfig(horizon_tokens=32_000, warmup_tokens=1000),
    batch=BatchConfig(tokens=256),
    seed=5,
)


def made_up(config):
    """Losses by the formula; the two seeds differ in S_crit. A tenth of the positions is padding."""
    horizon, batch = config.optimizer.horizon_tokens, config.batch.tokens
    steps = round(horizon / (0.9 * batch))
    critical = {5: 38, 6: 42}[config.seed] + (10 if horizon == 64_000 else 0)
    plateau = {16_000: 3.0, 32_000: 2.5, 64_000: 2.0}[horizon]
    return madeup.outcome(plateau * (1 + 0.01 * (critical / steps) ** 1.5), steps=steps)


def test_all_that_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(critical_batch, "as_sde_base", lambda config, data: config)
    monkeypatch.setattr(critical_batch, "_DRAWS", 40)
    figures = madeup.figures(monkeypatch, critical_batch)
    config = CriticalBatch(
        base=BASE, horizons=(32_000, 16_000), predicted_horizon=64_000, batches=(512, 128, 2048), seeds=2
    )
    text = critical_batch.study(config, MadeUp(tmp_path, made_up))
    assert text == written(
        r"""
        | horizon | batch in positions | in tokens | steps | loss |
        | --- | --- | --- | --- | --- |
        | 32,000 | 512 | 464 | 69 | 2.5110 ± 0.0105 |
        | 32,000 | 128 | 115 | 278 | 2.5014 ± 0.0013 |
        | 32,000 | 2,048 | 1,882 | 17 | 2.5903 ± 0.0860 |
        | 16,000 | 512 | 457 | 35 | 3.0367 ± 0.0349 |
        | 16,000 | 128 | 115 | 139 | 3.0046 ± 0.0044 |
        | 16,000 | 2,048 | 1,778 | 9 | 3.2814 ± 0.2678 |
        | 64,000 | 512 | 460 | 139 | 2.0043 ± 0.0033 |
        | 64,000 | 128 | 115 | 556 | 2.0005 ± 0.0004 |
        | 64,000 | 2,048 | 1,829 | 35 | 2.0342 ± 0.0260 |

        ± is half the width of the 95 % interval of the mean over 2 seed(s), by Student's t.

        S_crit = 40 steps (95 % over seeds: 38–42), p = 1.50, from horizons 32,000 and 16,000.

        Predicted for 64,000 tokens: B_crit = 1,599 tokens (95 % over seeds: 1,524–1,684). Measured there alone: \
        S_crit = 50 steps (95 % over seeds: 48–52), p = 1.50, that is B_crit = 1,280. The largest batch whose loss is \
        within noise of the plateau has 460 tokens.
        """
    )
    assert madeup.files(tmp_path) == ["losses.csv"]
    with (tmp_path / "losses.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 3 * 3 * 2
    for number, cell, loss in (
        (0, ("32000", "512", "0", "69"), 2.51022),
        (1, ("32000", "512", "1", "69"), 2.51187),
        (2, ("32000", "128", "0", "278"), 2.50126),
        (6, ("16000", "512", "0", "35"), 3.03394),
        (17, ("64000", "2048", "1", "35"), 2.03622),
    ):
        assert list(rows[number]) == ["horizon", "batch", "seed", "steps", "loss"]
        *found, last = rows[number].values()
        assert tuple(found) == cell and float(last) == pytest.approx(loss, abs=1e-5)
    assert madeup.described(figures) == written(
        """
        loss.png, 4 columns
        32,000 tokens: steps (log) × loss (linear): fit + runs: S_crit of the first two
        16,000 tokens: steps (log) × loss (linear): fit + runs: S_crit of the first two
        64,000 tokens, predicted: steps (log) × loss (linear): fit + runs: S_crit of the first two
        """
    )
    (panels, _) = figures.pop("loss.png")
    assert not figures
    assert [panel.title for panel in panels] == ["32,000 tokens", "16,000 tokens", "64,000 tokens, predicted"]
    for panel, steps, last in zip(panels, (17, 9, 35), (278, 139, 556), strict=True):
        fitted = panel.curves["fit"]
        assert (len(fitted), fitted[0][0], fitted[-1][0]) == (50, pytest.approx(steps), pytest.approx(last))
        assert panel.vertical_lines == {"S_crit of the first two": pytest.approx(40, abs=0.1)}
    assert [(steps, round(loss, 4)) for steps, loss in panels[1].points["runs"]] == [
        (9, 3.2603), (9, 3.3024), (35, 3.0339), (35, 3.0394), (139, 3.0043), (139, 3.005)
    ]  # fmt: skip
    # By the formula, of the horizons that were fitted and of the one that was measured alone.
    assert panels[1].curves["fit"][0][1] == pytest.approx(3.0 * (1 + 0.01 * (40 / 9) ** 1.5), rel=1e-3)
    assert panels[2].curves["fit"][0][1] == pytest.approx(2.0 * (1 + 0.01 * (50 / 35) ** 1.5), rel=1e-3)


def test_the_largest_flat_batch_is_within_noise_of_the_plateau():
    losses = {
        (1000, 10): [(100.0, 2.0)],
        (1000, 20): [(50.0, 2.02)],  # one per cent above, and no more
        (1000, 40): [(25.0, 2.03)],
        (1000, 80): [(12.5, 2.0), (12.5, 2.1)],  # by its mean too far, but for its own noise
        (9000, 900): [(10.0, 2.0)],
    }
    assert largest_flat_batch(losses, 1000, 2.0) == 80
    del losses[1000, 80]
    assert largest_flat_batch(losses, 1000, 2.0) == 20
    assert largest_flat_batch(losses, 1000, 1.9) is None


def test_a_study_without_a_flat_batch_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(critical_batch, "as_sde_base", lambda config, data: config)
    madeup.figures(monkeypatch, critical_batch)
    monkeypatch.setattr(critical_batch, "largest_flat_batch", lambda *_: None)
    config = CriticalBatch(base=BASE, horizons=(16_000,), predicted_horizon=64_000, batches=(512, 128, 2048), seeds=1)
    text = critical_batch.study(config, MadeUp(tmp_path, made_up))
    assert text.endswith("No measured batch has a loss within noise of the plateau.")
    assert "S_crit = 38 steps (one seed: no interval), p = 1.50, from horizons 16,000." in text
