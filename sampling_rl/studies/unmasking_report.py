"""What the study of unmasking shows: fronts of accuracy against evaluations (NFE), orders, and their tables."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from trimask.diffusion.evaluation.intervals import wilson_interval
from trimask.diffusion.sampling.strategies import STRATEGIES
from trimask.diffusion.studies.findings import Panel, draw, markdown_table


@dataclass(frozen=True)
class Point:
    """One way to sample, measured."""

    block: int
    label: str
    """Strategy, or what a policy was trained with."""
    number: float
    """Steps, threshold, factor, bound or β."""
    accuracy: float
    nfe: float
    problems: int
    seed: int | None = None
    """Of a policy's training."""


@dataclass(frozen=True)
class Order:
    """When positions were revealed."""

    block: int
    label: str
    seed: int | None
    left_to_right: float
    """Spearman's correlation of place and step, the mean over problems."""
    steps: Sequence[float]
    """Of each place, the mean step in which it was revealed, as a share of the last."""
    per_step: Sequence[float]
    """Tokens revealed in the first, second, … step, the mean over problems."""


def draw_fronts(path: Path, points: Sequence[Point]) -> None:
    """Of each setting of blocks the heuristics, then policies beside the best of the heuristics, six in a panel."""
    panels = []
    for block in dict.fromkeys(point.block for point in points):
        own = [point for point in points if point.block == block]
        title = f"blocks of {block}" if block else "full diffusion"
        curves = {
            label: sorted((nfe, accuracy) for _, accuracy, nfe, _ in merged([p for p in own if p.label == label]))
            for label in _labels(own)
        }
        best = {"best heuristic": front([(point.nfe, point.accuracy) for point in own if point.label in STRATEGIES])}
        policies = [label for label in curves if label not in STRATEGIES]
        shown = [{label: curve for label, curve in curves.items() if label in STRATEGIES}]
        shown += [best | {label: curves[label] for label in some} for some in _sixes(policies)]
        panels += [Panel(title=title, curves=one, x="evaluations (NFE)", y="accuracy") for one in shown if one]
    draw(path, panels, columns=2)


def _sixes(labels: Sequence[str]) -> list[Sequence[str]]:
    return [labels[first : first + 6] for first in range(0, len(labels), 6)]


def front(points: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    """Those of (NFE, accuracy) that no cheaper one is as accurate as."""
    found: list[tuple[float, float]] = []
    for nfe, accuracy in sorted(points, key=lambda point: (point[0], -point[1])):
        if not found or accuracy > found[-1][1]:
            found.append((nfe, accuracy))
    return found


def draw_orders(path: Path, orders: Sequence[Order]) -> None:
    """A curve for each label, the mean over its seeds; the heuristics in a row of panels with each six policies."""
    panels = []
    for block in dict.fromkeys(order.block for order in orders):
        own = [order for order in orders if order.block == block]
        title, linear = f"blocks of {block}" if block else "full diffusion", ("linear", "linear")
        steps = {label: _mean_curve([o.steps for o in own if o.label == label], 0) for label in _labels(own)}
        counts = {label: _mean_curve([o.per_step for o in own if o.label == label], 1) for label in _labels(own)}
        heuristics = [label for label in steps if label in STRATEGIES]
        for some in _sixes([label for label in steps if label not in STRATEGIES]) or [[]]:
            for curves, x, y in ((steps, "place", "step, share of the last"), (counts, "step", "tokens revealed")):
                shown = {label: curves[label] for label in (*heuristics, *some)}
                panels.append(Panel(title=title, curves=shown, x=x, y=y, scales=linear))
    if panels:
        draw(path, panels, columns=2)


def _mean_curve(curves: Sequence[Sequence[float]], first: int) -> list[tuple[float, float]]:
    """The mean of curves over `first`, `first` + 1, …; where one has ended it counts as 0."""
    longest = max(map(len, curves))
    values = np.mean([np.pad(curve, (0, longest - len(curve))) for curve in curves], axis=0)
    return [(float(number), float(value)) for number, value in enumerate(values, first)]


def merged(points: Sequence[Point]) -> list[tuple[float, float, float, float]]:
    """(number, accuracy, NFE, error) of one label; the error is that of the mean over seeds, of one over problems."""
    found = []
    for number in dict.fromkeys(point.number for point in points):
        same = [point for point in points if point.number == number]
        accuracies = [point.accuracy for point in same]
        if len(same) > 1:
            error = float(np.std(accuracies, ddof=1)) / len(same) ** 0.5
        else:
            low, high = wilson_interval(round(accuracies[0] * same[0].problems), same[0].problems)
            error = (high - low) / (2 * 1.96)
        found.append((number, float(np.mean(accuracies)), float(np.mean([point.nfe for point in same])), error))
    return found


def _labels(measured: Iterable[Point | Order]) -> list[str]:
    """Each once, in order."""
    return list(dict.fromkeys(one.label for one in measured))


def table_of_points(points: Sequence[Point]) -> str:
    cells = []
    for block in dict.fromkeys(point.block for point in points):
        own = [point for point in points if point.block == block]
        where = f"blocks of {block}" if block else "full"
        for label in _labels(own):
            of_label = [point for point in own if point.label == label]
            for number, accuracy, nfe, error in merged(of_label):
                seeds = [f"{p.accuracy:.1%}" for p in of_label if p.number == number and p.seed is not None]
                shown = [f"{nfe:.1f}", f"{accuracy:.1%} ± {error:.1%}", ", ".join(seeds)]
                cells.append([where, label, f"{number:g}", *shown])
    return markdown_table(["", "strategy", "number", "NFE", "accuracy ± standard error", "of each seed"], cells)


def table_of_orders(orders: Sequence[Order]) -> str:
    cells = []
    for block in dict.fromkeys(order.block for order in orders):
        own = [order for order in orders if order.block == block]
        for label in _labels(own):
            tendencies = [f"{order.left_to_right:+.2f}" for order in own if order.label == label]
            cells.append([f"blocks of {block}" if block else "full", label, ", ".join(tendencies)])
    return markdown_table(["", "strategy", "left to right, of each seed"], cells)
