"""Report of the study of unmasking: fronts of accuracy against evaluations (NFE), orders of revealing, and tables."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np

from trimask.diffusion.evaluation.intervals import half_width_of_mean, wilson_interval
from trimask.diffusion.sampling.strategies import STRATEGIES
from trimask.diffusion.studies.findings import Panel, draw_panels, grouped, markdown_table
from trimask.diffusion.studies.verdict import ScoredSetting

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
class MergedPoint:
    """Accuracy and evaluations of one sampling setting, the mean over its seeds if it has several."""

    number: float
    accuracy: float
    nfe: float
    interval: tuple[float, float]
    """95 % interval of the accuracy: of the mean over seeds, on the same problems; of a single seed or a heuristic over
    problems."""
    over: str
    """What the interval is over, such as 3 seeds or 300 problems."""


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
            label: sorted((point.nfe, point.accuracy) for point in merged(of_label))
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


def on_fronts(points: Sequence[FrontPoint]) -> list[bool]:
    """Whether each point is on the front of its block length: that of all heuristics, or that of its policy.

    Points of a policy are averaged over its seeds.
    """
    chosen = set[tuple[int, str, float]]()
    for block, of_block in grouped(points, lambda point: point.block).items():
        for of_front in grouped(of_block, lambda p: "" if p.label in STRATEGIES else p.label).values():
            settings = {
                (block, label, one.number): (one.nfe, one.accuracy)
                for label, of_label in _by_label(of_front).items()
                for one in merged(of_label)
            }
            best = front(settings.values())
            chosen |= {setting for setting, reached in settings.items() if reached in best}
    return [(point.block, point.label, point.number) in chosen for point in points]


def scored_settings(points: Sequence[FrontPoint], split: str) -> list[ScoredSetting]:
    """Figures of every setting on a test split."""
    return [
        ScoredSetting(
            setting=_in_words(block, label, one.number),
            split=split,
            measure="accuracy",
            value=one.accuracy,
            is_share=True,
            interval=one.interval,
            over=one.over,
            nfe=one.nfe,
        )
        for block, of_block in grouped(points, lambda point: point.block).items()
        for label, of_label in _by_label(of_block).items()
        for one in merged(of_label)
    ]


def setting_in_words(point: FrontPoint) -> str:
    """Block length, strategy and number of a setting."""
    return _in_words(point.block, point.label, point.number)


def _in_words(block: int, label: str, number: float) -> str:
    return f"{_title(block)}: {label}, {number:g}"


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


def merged(points: Sequence[FrontPoint]) -> list[MergedPoint]:
    """The points of one label, each the mean over seeds."""
    rows = []
    for number, same in grouped(points, lambda point: point.number).items():
        accuracies = [point.accuracy for point in same]
        mean, half = float(np.mean(accuracies)), half_width_of_mean(accuracies)
        interval, over = (
            wilson_interval(round(mean * same[0].problems), same[0].problems),
            f"{same[0].problems} problems",
        )
        if half is not None:
            interval, over = (max(0.0, mean - half), min(1.0, mean + half)), f"{len(same)} seeds"
        rows.append(MergedPoint(number, mean, float(np.mean([point.nfe for point in same])), interval, over))
    return rows


def table_of_points(points: Sequence[FrontPoint]) -> str:
    """Markdown table of accuracy and evaluations of every setting."""
    cells = []
    for block, of_block in grouped(points, lambda point: point.block).items():
        for label, of_label in _by_label(of_block).items():
            for one in merged(of_label):
                seeds = [f"{p.accuracy:.1%}" for p in of_label if p.number == one.number and p.seed is not None]
                interval = "–".join(f"{end:.1%}" for end in one.interval)
                shown = [f"{one.nfe:.1f}", f"{one.accuracy:.1%}", interval, one.over, ", ".join(seeds)]
                cells.append([_short_title(block), label, f"{one.number:g}", *shown])
    return markdown_table(["", "strategy", "number", "NFE", "accuracy", "95 % interval", "over", "of each seed"], cells)


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
