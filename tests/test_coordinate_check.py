"""The coordinate check: everything that it writes, for made-up activations."""

import csv

import madeup
import pytest
from madeup import MadeUp, written

from trimask.diffusion.data.batches import BatchConfig
from trimask.diffusion.optimizer import OptimizerConfig
from trimask.diffusion.pretraining.description import TrainConfig
from trimask.diffusion.studies import coordinate_check
from trimask.diffusion.studies.coordinate_check import CoordinateCheck, Coordinates, unexpected_exponents
from trimask.diffusion.transformer import TransformerConfig

BASE = TrainConfig(
    model=TransformerConfig(num_layers=3, width=32, num_heads=4),
    optimizer=OptimizerConfig(horizon_tokens=6500, warmup_tokens=1000),
    batch=BatchConfig(tokens=1000),
    seed=5,
)


EXPONENTS = {
    ("completed_p", 0.5, "initial"): ((0.01, -0.02, 0.03, -0.04, -0.5), (-0.01, 0.02, 0.09, 0.04)),
    ("completed_p", 0.5, "update"): ((-0.05, 0.06, -0.07, 0.08, -0.09), (0.05, -0.06, 0.07, -0.08)),
    ("mup", 1.0, "initial"): ((0.01, 0.02, 0.03, 0.2, -0.3), (-0.5, -0.06, -0.07, -0.08)),
    ("mup", 1.0, "update"): ((0.5, 0.06, 0.07, 0.08, 0.09), (0.01, 0.02, 0.03, 1.0)),
}
"""(Parametrization, α, initial or update) → exponents of width, and of depth, of the layers compared along them."""


def made_up(config):
    """RMS that are powers of the shape; for the two seeds twice and four times as large. Elsewhere they are not."""
    layers, parametrization = config.model.num_layers, config.parametrization
    size = 2.0 if (config.model.width, layers) != (32, 3) else 1.0
    found = {}
    for number, what in enumerate(("initial", "update"), 1):
        widths, depths = EXPONENTS[parametrization.kind, parametrization.alpha, what]
        exponents = widths if layers == 3 else (depths[0], 0.0, *depths[1:])
        values = [1e9] * (layers + 2)
        for place, layer in enumerate((0, 1, 3 if layers == 6 else 2, layers, layers + 1)):
            values[layer] = {5: 2.0, 6: 4.0}[config.seed] * 10.0**place * number * size ** exponents[place]
        found[what] = values
    return Coordinates(**found)


def test_all_that_is_written(tmp_path, monkeypatch):
    figures = madeup.figures(monkeypatch, coordinate_check)
    config = CoordinateCheck(
        base=BASE, widths=(64, 32), depths=(3, 6), kinds=(("completed_p", 0.5), ("mup", 1.0)), seeds=2
    )
    made = MadeUp(tmp_path, made_up)
    text = coordinate_check.study(config, made)
    assert text == written(
        r"""
        Exponents a of RMS ∝ size^a; widths 64, 32 at depth 3, depths 3, 6 at width 32; updates after about 6 steps; \
        mean of 2 seeds.

        | against width | RMS of | embedding | first block | middle block | last block | logits |
        | --- | --- | --- | --- | --- | --- | --- |
        | completed_p, α = 0.5 | initial | +0.01 | -0.02 | +0.03 | -0.04 | -0.50 |
        | completed_p, α = 0.5 | update | -0.05 | +0.06 | -0.07 | +0.08 | -0.09 |
        | mup | initial | +0.01 | +0.02 | +0.03 | +0.20 | -0.30 |
        | mup | update | +0.50 | +0.06 | +0.07 | +0.08 | +0.09 |

        | against depth | RMS of | embedding | middle block | last block | logits |
        | --- | --- | --- | --- | --- | --- |
        | completed_p, α = 0.5 | initial | -0.01 | +0.02 | +0.09 | +0.04 |
        | completed_p, α = 0.5 | update | +0.05 | -0.06 | +0.07 | -0.08 |
        | mup | initial | -0.50 | -0.06 | -0.07 | -0.08 |
        | mup | update | +0.01 | +0.02 | +0.03 | +1.00 |

        - completed_p, α = 0.5: all exponents within 0.1 of the prediction

        - mup: 5 of 18 exponents off by more than 0.1: last block, initial, against width: +0.20; logits, initial, \
        against width: -0.30; embedding, update, against width: +0.50; embedding, initial, against depth: -0.50; \
        logits, update, against depth: +1.00
        """
    )
    ((what, measure, _),) = made.asked
    assert (what, measure) == ("networks", coordinate_check.coordinates_of)
    assert madeup.files(tmp_path) == ["exponents.csv", "rms.csv"]
    with (tmp_path / "rms.csv").open() as file:
        rms = list(csv.DictReader(file))
    assert len(rms) == 2 * 2 * 9 * 2 and list(rms[0]) == ["axis", "kind", "size", "what", "place", "rms"]
    # The mean of the seeds is three times a power of ten and of the shape.
    for number, cell, value in (
        (0, ("width", "completed_p, α = 0.5", "64.0", "initial", "embedding"), 3 * 2**0.01),
        (1, ("width", "completed_p, α = 0.5", "32.0", "initial", "embedding"), 3),
        (4, ("width", "completed_p, α = 0.5", "64.0", "initial", "middle block"), 300 * 2**0.03),
        (-1, ("depth", "mup", "6.0", "update", "logits"), 60_000 * 2),
    ):
        *found, last = rms[number].values()
        assert tuple(found) == cell and float(last) == pytest.approx(value)
    with (tmp_path / "exponents.csv").open() as file:
        exponents = list(csv.DictReader(file))
    assert len(exponents) == 2 * 2 * 9 and list(exponents[0]) == ["axis", "kind", "what", "place", "exponent"]
    *found, last = exponents[-5].values()
    assert found == ["depth", "mup", "initial", "logits"] and float(last) == pytest.approx(-0.08)
    assert {name: (len(panels), columns) for name, (panels, columns) in figures.items()} == {
        "width.png": (10, 5),
        "depth.png": (8, 4),
    }
    panel = figures["depth.png"][0][5]
    assert (panel.title, panel.x, panel.y) == ("middle block, update", "depth", "RMS")
    assert panel.curves == {
        "completed_p, α = 0.5": [(3.0, pytest.approx(600)), (6.0, pytest.approx(600 * 2**-0.06))],
        "mup": [(3.0, pytest.approx(600)), (6.0, pytest.approx(600 * 2**0.02))],
    }
    assert madeup.described(figures) == written(
        """
        depth.png, 4 columns
        embedding, initial: depth (log) × RMS (log): completed_p, α = 0.5, mup: markers, coincide
        middle block, initial: depth (log) × RMS (log): completed_p, α = 0.5, mup: markers, coincide
        last block, initial: depth (log) × RMS (log): completed_p, α = 0.5, mup: markers, coincide
        logits, initial: depth (log) × RMS (log): completed_p, α = 0.5, mup: markers, coincide
        embedding, update: depth (log) × RMS (log): completed_p, α = 0.5, mup: markers, coincide
        middle block, update: depth (log) × RMS (log): completed_p, α = 0.5, mup: markers, coincide
        last block, update: depth (log) × RMS (log): completed_p, α = 0.5, mup: markers, coincide
        logits, update: depth (log) × RMS (log): completed_p, α = 0.5, mup: markers, coincide
        width.png, 5 columns
        embedding, initial: width (log) × RMS (log): completed_p, α = 0.5, mup: markers, coincide
        first block, initial: width (log) × RMS (log): completed_p, α = 0.5, mup: markers, coincide
        middle block, initial: width (log) × RMS (log): completed_p, α = 0.5, mup: markers, coincide
        last block, initial: width (log) × RMS (log): completed_p, α = 0.5, mup: markers, coincide
        logits, initial: width (log) × RMS (log): completed_p, α = 0.5, mup: markers, coincide
        embedding, update: width (log) × RMS (log): completed_p, α = 0.5, mup: markers, coincide
        first block, update: width (log) × RMS (log): completed_p, α = 0.5, mup: markers, coincide
        middle block, update: width (log) × RMS (log): completed_p, α = 0.5, mup: markers, coincide
        last block, update: width (log) × RMS (log): completed_p, α = 0.5, mup: markers, coincide
        logits, update: width (log) × RMS (log): completed_p, α = 0.5, mup: markers, coincide
        """
    )


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        ({"seeds": 0}, "seeds must be at least 1, got 0"),
        ({"kinds": ()}, "kinds must be at least 1, got 0"),
        ({"widths": (32,)}, "widths must be at least 2, got 1"),
        ({"depths": (3,)}, "depths must be at least 2, got 1"),
    ],
)
def test_a_check_of_nothing_is_refused(bad, reason):
    with pytest.raises(ValueError, match=reason):
        CoordinateCheck(base=BASE, **bad)


def test_exponents_may_differ_by_a_tenth_from_the_prediction():
    def found(slope):
        return {("depth", "mup", "initial", "logits"): slope, ("width", "mup", "initial", "logits"): slope - 0.5}

    assert unexpected_exponents(found(0.1), "mup") == unexpected_exponents(found(0.11), "standard") == []
    assert unexpected_exponents(found(-0.11), "mup") == [
        "logits, initial, against depth: -0.11",
        "logits, initial, against width: -0.61",
    ]
