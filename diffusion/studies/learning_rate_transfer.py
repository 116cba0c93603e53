"""Does the best learning rate stay where it is when the network grows?

For each parametrization and shape, the loss at the end against the learning rate of the base, on a grid of factors 2.
Under Complete(d)P the best one is to move by at most one step of the grid from that of the base shape; under the
standard parametrization it moves visibly more.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from trimask.diffusion.description import TrainConfig
from trimask.diffusion.parametrization import Kind
from trimask.diffusion.studies.findings import Panel, draw, markdown_table, write_csv
from trimask.diffusion.studies.trials import Outcome, Trials, at_shape, with_learning_rate


@dataclass(frozen=True, kw_only=True)
class LearningRateTransfer:
    """Shapes, learning rates and parametrizations to compare."""

    base: TrainConfig
    """The network and recipe that are scaled."""
    widths: tuple[int, ...] = (64, 128, 256)
    """At the base's depth."""
    depths: tuple[int, ...] = (2, 4, 8, 16)
    """At the base's width."""
    log2_learning_rates: tuple[int, ...] = (-11, -10, -9, -8, -7)
    """The grid."""
    kinds: tuple[Kind, ...] = ("completed_p", "standard")
    """Parametrizations."""
    seeds: int = 1
    """Seeds, whose losses are averaged."""


Shape = tuple[int, int]
"""Width and depth."""
Cell = tuple[Kind, Shape]
"""Parametrization and shape."""


def shapes(config: LearningRateTransfer) -> list[Shape]:
    """Each shape once: the scan over widths, then that over depths."""
    base = config.base.model
    scans = [(width, base.num_layers) for width in config.widths] + [(base.width, depth) for depth in config.depths]
    return list(dict.fromkeys(scans))


def study(config: LearningRateTransfer, trials: Trials) -> str:
    """Runs it, writes losses.csv, optima.csv and a figure; returns the text."""
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
    outcomes = dict(zip(cells, trials.losses(configs), strict=True))
    names = ("kind", "width", "depth", "log2_learning_rate", "seed", "loss", "last_loss", "num_parameters", "seconds")
    write_csv(trials.folder / "losses.csv", [_row(names, cell, outcome) for cell, outcome in outcomes.items()])
    curves = {
        (kind, shape): [
            (float(rate), float(np.mean([outcomes[kind, shape, rate, seed].loss for seed in range(config.seeds)])))
            for rate in config.log2_learning_rates
        ]
        for kind in config.kinds
        for shape in shapes(config)
    }
    best = {cell: optimum(curve) for cell, curve in curves.items()}
    rows = [
        {"kind": kind, "width": width, "depth": depth, "log2_learning_rate": rate, "loss": loss}
        for (kind, (width, depth)), (rate, loss) in best.items()
    ]
    write_csv(trials.folder / "optima.csv", rows)
    draw(trials.folder / "loss.png", _panels(config, curves), columns=2)
    return _text(config, best)


def optimum(curve: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """(x, y) of the lowest point, x refined by the parabola through it and its neighbours; at an edge as it is."""
    losses = [loss for _, loss in curve]
    lowest = int(np.argmin(losses))
    if lowest in (0, len(curve) - 1) or not math.isfinite(losses[lowest - 1] + losses[lowest + 1]):
        return curve[lowest]
    xs, ys = zip(*curve[lowest - 1 : lowest + 2], strict=True)
    a, b, c = np.polyfit(xs, ys, 2)
    x = -b / (2 * a) if a > 0 else xs[1]
    return float(x), float(a * x**2 + b * x + c)


def largest_move(best: Mapping[Cell, tuple[float, float]], kind: str, base: Shape, axis: int) -> float:
    """How far the best learning rate goes from that of the base shape when width (0) or depth (1) changes, in log2."""
    along = {shape: rate for (of, shape), (rate, _) in best.items() if of == kind and shape[1 - axis] == base[1 - axis]}
    return max((abs(rate - along[base]) for rate in along.values()), default=0.0)


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
                    highest=float(np.quantile(finite, 0.9)),
                )
            )
    return panels


def _text(config: LearningRateTransfer, best: Mapping[Cell, tuple[float, float]]) -> str:
    model, recipe = config.base.model, config.base.optimizer
    base = (model.width, model.num_layers)
    rows = [
        [kind, f"{width} × {depth}", f"2^{rate:.2f}", f"{loss:.4f}"]
        for (kind, (width, depth)), (rate, loss) in best.items()
    ]
    lines = [
        f"Tuned at {base[0]} × {base[1]}; {recipe.horizon_tokens:,} tokens in batches of {config.base.batch.tokens:,} "
        f"positions; {config.seeds} seed(s). The best learning rate is the lowest point's, refined by a parabola.",
        markdown_table(["parametrization", "width × depth", "best learning rate", "loss"], rows),
    ]
    for kind in config.kinds:
        by_width, by_depth = (largest_move(best, kind, base, axis) for axis in (0, 1))
        within = "at most one step" if max(by_width, by_depth) <= 1 else "more than one step"
        lines.append(
            f"- {kind}: the best learning rate moves by up to 2^{by_width:.2f} over widths and 2^{by_depth:.2f} over "
            f"depths, {within} of the grid."
        )
    return "\n\n".join(lines)
