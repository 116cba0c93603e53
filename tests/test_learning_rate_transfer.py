"""The study of learning-rate transfer: everything that it writes, for made-up outcomes."""

import csv
import math

import madeup
import pytest
from madeup import MadeUp, written

from trimask.diffusion.data.batches import BatchConfig
from trimask.diffusion.optimizer import OptimizerConfig
from trimask.diffusion.pretraining.description import TrainConfig
from trimask.diffusion.studies import learning_rate_transfer
from trimask.diffusion.studies.learning_rate_transfer import LearningRateTransfer
from trimask.diffusion.transformer import TransformerConfig

BASE = TrainConfig(
    model=TransformerConfig(num_layers=2, width=32, num_heads=4),
    optimizer=OptimizerConfig(horizon_tokens=32_000, warmup_tokens=1000),
    batch=BatchConfig(tokens=1256),
    seed=5,
)
LOSSES = {
    # Parabolas, lowest at -7.75, -8.25 and -7.5.
    ("completed_p", 32, 2): (3.5625, 2.0625, 2.5625),
    ("completed_p", 64, 2): (3.5625, 3.0625, 4.5625),
    ("completed_p", 32, 1): (4.0, 3.0, 3.0),
    # Two at an edge of the grid, and one beside runs that diverged.
    ("mup", 32, 2): (2.0, 2.25, 2.5),
    ("mup", 64, 2): (2.75, 2.5, math.inf),
    ("mup", 32, 1): (1.25, 1.75, 2.0),
    ("standard", 32, 2): (2.5, 2.75, 3.0),
    ("standard", 64, 2): (1.0, 1.25, 1.5),
    ("standard", 32, 1): (2.0, 1.75, 1.5),
}
"""(Parametrization, width, depth) → mean losses at 2^-9, 2^-8 and 2^-7."""


def made_up(config):
    """Outcomes whose losses are below the mean for seed 5 and above it for seed 6."""
    model, rate = config.model, round(math.log2(config.optimizer.learning_rate))
    mean = LOSSES[config.parametrization.kind, model.width, model.num_layers][rate + 9]
    return madeup.outcome(
        mean + {5: -0.5, 6: 0.5}[config.seed],
        last_loss=float(-rate),
        num_parameters=1000 * model.width + model.num_layers,
        seconds=3.14159,
    )


def test_all_that_is_written(tmp_path, monkeypatch):
    figures = madeup.figures(monkeypatch, learning_rate_transfer)
    config = LearningRateTransfer(
        base=BASE,
        widths=(64,),
        depths=(1,),
        log2_learning_rates=(-7, -9, -8),
        kinds=("completed_p", "mup", "standard"),
        seeds=2,
    )
    text = learning_rate_transfer.study(config, MadeUp(tmp_path, made_up))
    assert text == written(
        r"""
        Tuned at 32 × 2; 32,000 tokens in batches of 1,256 positions; 2 seed(s). The best learning rate is the lowest \
        point's, refined by a parabola.

        | parametrization | width × depth | best learning rate | loss |
        | --- | --- | --- | --- |
        | completed_p | 32 × 2 | 2^-7.75 | 2.0000 |
        | completed_p | 64 × 2 | 2^-8.25 | 3.0000 |
        | completed_p | 32 × 1 | 2^-7.50 | 2.8750 |
        | mup | 32 × 2 | ≤ 2^-9.00 | 2.0000 |
        | mup | 64 × 2 | 2^-8.00 | 2.5000 |
        | mup | 32 × 1 | ≤ 2^-9.00 | 1.2500 |
        | standard | 32 × 2 | ≤ 2^-9.00 | 2.5000 |
        | standard | 64 × 2 | ≤ 2^-9.00 | 1.0000 |
        | standard | 32 × 1 | ≥ 2^-7.00 | 1.5000 |

        - completed_p: the best learning rates are 2^0.50 apart over widths and 2^0.25 over depths, at most a factor \
        of 2.

        - mup: the best learning rates are 2^1.00 apart over widths and 2^0.00 over depths, at most a factor of 2. At \
        the edge of the grid (≤, ≥) they may lie further.

        - standard: the best learning rates are 2^0.00 apart over widths and 2^2.00 over depths, more than a factor \
        of 2. At the edge of the grid (≤, ≥) they may lie further.
        """
    )
    assert madeup.files(tmp_path) == ["losses.csv", "optima.csv"]
    lines = (tmp_path / "losses.csv").read_text().splitlines()
    assert len(lines) == 1 + 3 * 3 * 3 * 2
    assert "\n".join([*lines[:8], lines[25], lines[-1]]) == written(
        """
        kind,width,depth,log2_learning_rate,seed,loss,last_loss,num_parameters,seconds
        completed_p,32,2,-7,0,2.0625,7.0,32002,3.1
        completed_p,32,2,-7,1,3.0625,7.0,32002,3.1
        completed_p,32,2,-9,0,3.0625,9.0,32002,3.1
        completed_p,32,2,-9,1,4.0625,9.0,32002,3.1
        completed_p,32,2,-8,0,1.5625,8.0,32002,3.1
        completed_p,32,2,-8,1,2.5625,8.0,32002,3.1
        mup,32,2,-7,0,2.0,7.0,32002,3.1
        mup,64,2,-7,0,inf,7.0,64002,3.1
        standard,32,1,-8,1,2.25,8.0,32001,3.1
        """
    )
    with (tmp_path / "optima.csv").open() as file:
        optima = list(csv.DictReader(file))
    assert list(optima[0]) == ["kind", "width", "depth", "log2_learning_rate", "loss", "edge"]
    assert [(row["kind"], row["width"], row["depth"], row["edge"]) for row in optima[1:5]] == [
        ("completed_p", "64", "2", ""),
        ("completed_p", "32", "1", ""),
        ("mup", "32", "2", "≤"),
        ("mup", "64", "2", ""),
    ]
    assert (float(optima[1]["log2_learning_rate"]), float(optima[1]["loss"])) == pytest.approx((-8.25, 3.0))
    ((panels, columns),) = figures.values()
    assert list(figures) == ["loss.png"] and columns == 2
    assert [(panel.title, list(panel.curves)) for panel in panels] == [
        ("completed_p, by width", ["width 32", "width 64"]),
        ("mup, by width", ["width 32", "width 64"]),
        ("standard, by width", ["width 32", "width 64"]),
        ("completed_p, by depth", ["depth 1", "depth 2"]),
        ("mup, by depth", ["depth 1", "depth 2"]),
        ("standard, by depth", ["depth 1", "depth 2"]),
    ]
    assert panels[3].curves["depth 1"] == [(2**-9, 4.0), (2**-8, 3.0), (2**-7, 3.0)]
    # The third largest of 26 finite losses and its neighbour decide.
    assert panels[0].y_max == pytest.approx(3.5625)
    assert madeup.described(figures) == written(
        """
        loss.png, 2 columns
        completed_p, by width: learning rate at the base (log) × loss (linear): width 32, width 64: markers, up \\
        to 3.5625
        mup, by width: learning rate at the base (log) × loss (linear): width 32, width 64: markers, up to 3.5625
        standard, by width: learning rate at the base (log) × loss (linear): width 32, width 64: markers, up to 3.5625
        completed_p, by depth: learning rate at the base (log) × loss (linear): depth 1, depth 2: markers, up to 3.5625
        mup, by depth: learning rate at the base (log) × loss (linear): depth 1, depth 2: markers, up to 3.5625
        standard, by depth: learning rate at the base (log) × loss (linear): depth 1, depth 2: markers, up to 3.5625
        """
    )
