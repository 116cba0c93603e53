"""Report of the study of unmasking: fronts of accuracy against evaluations (NFE), orders of revealing, and tables."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np

from trimask.diffusion.evaluation.intervals import wilson_interval
from trimask.diffusion.sampling.strategies import STRATEGIES
from trimask.diffusion.studies.findings import (
    Panel,
    draw_panels,
    grouped,
    markdown_table,
    standard_error,
    standard_error_of_interval,
)

_PER_PANEL = 6
"""Largest number of policies in a panel."""


@dataclass(frozen=True)
class FrontPoint:
    """Accuracy and evaluations of one sampling setting; a row of points.csv."""

    block: int
    """Block length in tokens; 0: without blocks."""
    label: str
    """Strategy, or what a policy was trained with."""
    number: float
    """Number of steps, threshold, factor, entropy bound or β."""
    accuracy: float
    """Mean grade of the answers, in [0, 1]."""
    nfe: float
    """Mean number of function evaluations of an answer."""
    problems: int
    """Number of problems."""
    seed: int | None = None
    """Seed of the policy's training. None: a heuristic, or unknown."""


@dataclass(frozen=True)
class Order:
    """Order in which one sampling setting reveals positions; a row of orders.csv."""

    block: int
    """Block length in tokens; 0: without blocks."""
    label: str
    seed: int | None
    left_to_right: float
    """Spearman's correlation of position and step, the mean over problems."""
    steps: Sequence[float]
    """For each position, the mean step in which it was revealed, as a share of the last step."""
    per_step: Sequence[float]
    """Number of tokens revealed in the first, second, … step, the mean over problems."""


_Measured = TypeVar("_Measured", FrontPoint, Order)


def draw_fronts(path: Path, points: Sequence[FrontPoint]) -> None:
    """Draws accuracy against evaluations for every block length: heuristics in one panel, policies in the next.

    Panels of policies, of six each, also show the front of the heuristics.
    """
    panels = []
    for block, of_block in grouped(points, lambda point: point.block).items():
        curves = {
            label: sorted((nfe, accuracy) for _, accuracy, nfe, _ in merged(of_label))
            for label, of_label in _by_label(of_block).items()
        }
        heuristics = {label: curve for label, curve in curves.items() if label in STRATEGIES}
        best = front([(point.nfe, point.accuracy) for point in of_block if point.label in STRATEGIES])
        shown = [heuristics] if heuristics else []
        shown += [
            {"best heuristic": best} | {label: curves[label] for label in labels}
            for labels in _chunks([label for label in curves if label not in STRATEGIES])
        ]
        panels += [Panel(title=_title(block), curves=one, x="evaluations (NFE)", y="accuracy") for one in shown]
    draw_panels(path, panels, columns=2)


def _chunks(labels: Sequence[str]) -> list[Sequence[str]]:
    return [labels[first : first + _PER_PANEL] for first in range(0, len(labels), _PER_PANEL)]


def _title(block: int) -> str:
    return f"blocks of {block}" if block else "full diffusion"


def _by_label(measured: Iterable[_Measured]) -> dict[str, list[_Measured]]:
    return grouped(measured, lambda one: one.label)


def front(points: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    """Points (NFE, accuracy) that are more accurate than all with fewer or as many evaluations, by NFE."""
    best: list[tuple[float, float]] = []
    for nfe, accuracy in sorted(points, key=lambda point: (point[0], -point[1])):
        if not best or accuracy > best[-1][1]:
            best.append((nfe, accuracy))
    return best


def draw_orders(path: Path, orders: Sequence[Order]) -> None:
    """Draws for every block length the step of each position, and the tokens revealed per step.

    A curve is the mean over the seeds of a label. Each row of two panels shows the heuristics and six policies.
    """
    panels = []
    for block, of_block in grouped(orders, lambda order: order.block).items():
        by_label = _by_label(of_block)
        steps = {label: _mean_curve([o.steps for o in same], 0) for label, same in by_label.items()}
        counts = {label: _mean_curve([o.per_step for o in same], 1) for label, same in by_label.items()}
        heuristics = [label for label in steps if label in STRATEGIES]
        for policies in _chunks([label for label in steps if label not in STRATEGIES]) or [[]]:
            for curves, x, y in ((steps, "position", "step, share of the last"), (counts, "step", "tokens revealed")):
                shown = {label: curves[label] for label in (*heuristics, *policies)}
                panels.append(Panel(title=_title(block), curves=shown, x=x, y=y, scales=("linear", "linear")))
    if panels:
        draw_panels(path, panels, columns=2)


def _mean_curve(curves: Sequence[Sequence[float]], first: int) -> list[tuple[float, float]]:
    """Mean of curves whose x are `first`, `first` + 1, …; a curve counts as 0 beyond its end."""
    longest = max(map(len, curves))
    values = np.mean([np.pad(curve, (0, longest - len(curve))) for curve in curves], axis=0)
    return [(float(number), float(value)) for number, value in enumerate(values, first)]


def merged(points: Sequence[FrontPoint]) -> list[tuple[float, float, float, float]]:
    """(number, accuracy, NFE, standard error of the accuracy) of the points of one label, the mean over seeds.

    The error is that of the mean over seeds; for a single seed, it is that of the share of right answers.
    """
    rows = []
    for number, same in grouped(points, lambda point: point.number).items():
        accuracies = [point.accuracy for point in same]
        if len(same) > 1:
            error = standard_error(accuracies)
        else:
            interval = wilson_interval(round(accuracies[0] * same[0].problems), same[0].problems)
            error = standard_error_of_interval(*interval)
        rows.append((number, float(np.mean(accuracies)), float(np.mean([point.nfe for point in same])), error))
    return rows


def table_of_points(points: Sequence[FrontPoint]) -> str:
    """Markdown table of accuracy and evaluations of every setting."""
    cells = []
    for block, of_block in grouped(points, lambda point: point.block).items():
        for label, of_label in _by_label(of_block).items():
            for number, accuracy, nfe, error in merged(of_label):
                seeds = [f"{p.accuracy:.1%}" for p in of_label if p.number == number and p.seed is not None]
                shown = [f"{nfe:.1f}", f"{accuracy:.1%} ± {error:.1%}", ", ".join(seeds)]
                cells.append([_short_title(block), label, f"{number:g}", *shown])
    return markdown_table(["", "strategy", "number", "NFE", "accuracy ± standard error", "of each seed"], cells)


def table_of_orders(orders: Sequence[Order]) -> str:
    """Markdown table of how far every setting goes from left to right."""
    cells = []
    for block, of_block in grouped(orders, lambda order: order.block).items():
        for label, of_label in _by_label(of_block).items():
            tendencies = ", ".join(f"{order.left_to_right:+.2f}" for order in of_label)
            cells.append([_short_title(block), label, tendencies])
    return markdown_table(["", "strategy", "left to right, of each seed"], cells)


def _short_title(block: int) -> str:
    return f"blocks of {block}" if block else "full"
