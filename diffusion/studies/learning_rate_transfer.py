"""Does the best learning rate stay the same when the network grows?

For each parametrization and shape, the study measures the final loss against the learning rate, on a grid of powers of
2; learning rates are those of the base shape, and are transferred to the others. Under Complete(d)P the best ones
should be at most a factor of 2 apart; under the standard parametrization they are visibly further apart.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated

import numpy as np

from trimask.diffusion.parametrization import ParametrizationKind
from trimask.diffusion.pretraining.description import TrainConfig
from trimask.diffusion.studies.findings import Panel, draw_panels, markdown_table, write_csv
from trimask.diffusion.studies.trainings import Outcome, at_shape, with_learning_rate
from trimask.diffusion.studies.trials import Trials, require_at_least
from trimask.tokenizers.storage.ranges import Checked, Size, whole


@dataclass(frozen=True, kw_only=True)
class LearningRateTransfer(Checked):
    """Shapes, learning rates and parametrizations that the study of learning-rate transfer compares."""

    base: TrainConfig
    """Training configuration that is scaled to every shape."""
    widths: tuple[Size, ...] = (64, 128, 256)
    """Widths to compare, at the number of layers of `base`."""
    depths: tuple[Size, ...] = (2, 4, 8, 16)
    """Numbers of layers to compare, at the width of `base`."""
    log2_learning_rates: tuple[Annotated[int, whole(-100, 100)], ...] = (-11, -10, -9, -8, -7)
    """Logarithms to base 2 of the learning rates to compare."""
    kinds: tuple[ParametrizationKind, ...] = ("completed_p", "standard")
    """Parametrizations to compare."""
    seeds: Size = 1
    """Number of seeds of every training, over which the loss is averaged."""

    def __post_init__(self):
        super().__post_init__()
        require_at_least(1, kinds=len(self.kinds), learning_rates=len(self.log2_learning_rates))


Shape = tuple[int, int]
"""Width and number of layers."""
Cell = tuple[ParametrizationKind, Shape]
"""Parametrization and shape."""


def shapes(config: LearningRateTransfer) -> list[Shape]:
    """All shapes without repetition: that of the base, then the scan over widths, then the scan over depths."""
    base = config.base.model
    scans = [(width, base.num_layers) for width in config.widths] + [(base.width, depth) for depth in config.depths]
    return list(dict.fromkeys([(base.width, base.num_layers), *scans]))


def study(config: LearningRateTransfer, trials: Trials) -> str:
    """Runs the study of learning-rate transfer, writes losses.csv, optima.csv and a figure; returns the report."""
    cells = [
        (kind, shape, log2_rate, seed)
        for shape in shapes(config)
        for kind in config.kinds
        for log2_rate in config.log2_learning_rates
        for seed in range(config.seeds)
    ]
    configs = [
        dataclasses.replace(
            with_learning_rate(at_shape(config.base, kind, *shape), 2.0**log2_rate), seed=config.base.seed + seed
        )
        for kind, shape, log2_rate, seed in cells
    ]
    outcomes = dict(zip(cells, trials.outcomes(configs), strict=True))
    names = ("kind", "width", "depth", "log2_learning_rate", "seed", "loss", "last_loss", "num_parameters", "seconds")
    write_csv(trials.folder / "losses.csv", [_row(names, cell, outcome) for cell, outcome in outcomes.items()])
    curves = {
        (kind, shape): [
            (float(rate), float(np.mean([outcomes[kind, shape, rate, seed].loss for seed in range(config.seeds)])))
            for rate in sorted(config.log2_learning_rates)
        ]
        for kind in config.kinds
        for shape in shapes(config)
    }
    best = {cell: optimum(curve) for cell, curve in curves.items()}
    rows = [
        {"kind": kind, "width": width, "depth": depth} | dataclasses.asdict(optimum)
        for (kind, (width, depth)), optimum in best.items()
    ]
    write_csv(trials.folder / "optima.csv", rows)
    draw_panels(trials.folder / "loss.png", _panels(config, curves), columns=2)
    return _text(config, best)


@dataclass(frozen=True)
class Optimum:
    """Best learning rate of a shape under a parametrization."""

    log2_learning_rate: float
    loss: float
    edge: str = ""
    """≤ or ≥ if it is the first or the last of the grid, so that the best one may lie beyond; else empty."""


def optimum(curve: Sequence[tuple[float, float]]) -> Optimum:
    """Minimum of a curve of (log2 learning rate, loss): the lowest point, refined by a parabola.

    The parabola goes through that point and its two neighbours. Without refinement if one of these is missing or not
    finite.
    """
    losses = [loss for _, loss in curve]
    lowest = int(np.argmin(losses))
    if lowest in (0, len(curve) - 1):
        return Optimum(*curve[lowest], edge="≤" if lowest == 0 else "≥")
    if not math.isfinite(losses[lowest - 1] + losses[lowest + 1]):
        return Optimum(*curve[lowest])
    xs, ys = zip(*curve[lowest - 1 : lowest + 2], strict=True)
    a, b, c = np.polyfit(xs, ys, 2)
    x = -b / (2 * a) if a > 0 else xs[1]
    return Optimum(float(x), float(a * x**2 + b * x + c))


def optimum_range(best: Mapping[Cell, Optimum], kind: str, base: Shape, axis: int) -> tuple[float, bool]:
    """log2 of the ratio of the largest to the smallest best learning rate along width (axis 0) or depth (axis 1).

    Also returns whether one of them is at an edge of the grid.
    """
    along = [o for (of_kind, shape), o in best.items() if of_kind == kind and shape[1 - axis] == base[1 - axis]]
    rates = [o.log2_learning_rate for o in along]
    return max(rates) - min(rates), any(o.edge for o in along)


def _row(names: Sequence[str], cell: tuple[str, Shape, int, int], outcome: Outcome) -> dict[str, object]:
    kind, shape, log2_rate, seed = cell
    measured = (outcome.loss, outcome.last_loss, outcome.num_parameters, round(outcome.seconds, 1))
    return dict(zip(names, (kind, *shape, log2_rate, seed, *measured), strict=True))


def _panels(config: LearningRateTransfer, curves: Mapping[Cell, Sequence[tuple[float, float]]]) -> list[Panel]:
    base = config.base.model
    finite = [loss for curve in curves.values() for _, loss in curve if math.isfinite(loss)]
    panels = []
    for axis, (name, fixed) in enumerate((("width", base.num_layers), ("depth", base.width))):
        for kind in config.kinds:
            lines = {
                f"{name} {shape[axis]}": [(2.0**rate, loss) for rate, loss in curves[kind, shape]]
                for shape in sorted(shapes(config))
                if shape[1 - axis] == fixed
            }
            panels.append(
                Panel(
                    title=f"{kind}, by {name}",
                    curves=lines,
                    x="learning rate at the base",
                    y="loss",
                    y_max=float(np.quantile(finite, 0.9)),
                )
            )
    return panels


def _text(config: LearningRateTransfer, best: Mapping[Cell, Optimum]) -> str:
    model, recipe = config.base.model, config.base.optimizer
    base = (model.width, model.num_layers)
    rows = [
        [kind, f"{width} × {depth}", f"{o.edge} 2^{o.log2_learning_rate:.2f}".strip(), f"{o.loss:.4f}"]
        for (kind, (width, depth)), o in best.items()
    ]
    lines = [
        f"Tuned at {base[0]} × {base[1]}; {recipe.horizon_tokens:,} tokens in batches of {config.base.batch.tokens:,} "
        f"positions; {config.seeds} seed(s). The best learning rate is the lowest point's, refined by a parabola.",
        markdown_table(["parametrization", "width × depth", "best learning rate", "loss"], rows),
    ]
    for kind in config.kinds:
        (by_width, _), (by_depth, _) = ranges = [optimum_range(best, kind, base, axis) for axis in (0, 1)]
        within = "at most" if max(by_width, by_depth) <= 1 else "more than"
        edge = " At the edge of the grid (≤, ≥) they may lie further." if any(is_edge for _, is_edge in ranges) else ""
        lines.append(
            f"- {kind}: the best learning rates are 2^{by_width:.2f} apart over widths and 2^{by_depth:.2f} over "
            f"depths, {within} a factor of 2.{edge}"
        )
    return "\n\n".join(lines)
