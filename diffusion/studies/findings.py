"""Output of studies: tables as CSV and Markdown, figures as PNG, and the statistics that both show."""

import csv
import io
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import matplotlib
import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from trimask.diffusion.evaluation.intervals import half_width_of_mean
from trimask.tokenizers.storage.files import replacing, write_text, written_to

_COLORS = matplotlib.color_sequences["tab10"]

_MIN_LOG_SPAN = 5.0
"""Smallest ratio of the ends of a logarithmic y axis, so that nearly constant values look flat."""

_MAX_LABELS_INSIDE = 5
"""Largest number of labels for which the legend is drawn inside the axes; longer legends stand below them."""

Curve = Sequence[tuple[float, float]]
"""Points (x, y) of a line."""


@dataclass(frozen=True, kw_only=True)
class Panel:
    """Contents of one set of axes of a figure."""

    title: str
    curves: Mapping[str, Curve]
    """Label → points joined by a line; points whose y is not finite are left out."""
    points: Mapping[str, Curve] = field(default_factory=dict)
    """Label → points that are not joined."""
    x: str
    """Label of the x axis."""
    y: str
    """Label of the y axis."""
    scales: tuple[str, str] = ("log", "linear")
    """Scales of the x and of the y axis: "log" or "linear"; a logarithmic x axis has base 2."""
    vertical_lines: Mapping[str, float] | None = None
    """Label → x of a dashed vertical line."""
    y_max: float | None = None
    """Upper limit of the y axis. None: chosen by Matplotlib."""
    markers: bool = True
    """Whether the points of curves are marked."""
    coincide: bool = False
    """Whether earlier curves are drawn wider, so that they stay visible under curves that coincide with them."""


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Writes rows as CSV; the header consists of the keys of the first row."""
    file = io.StringIO(newline="")
    writer = csv.DictWriter(file, fieldnames=list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, file.getvalue())


def draw_panels(path: Path, panels: Sequence[Panel], columns: int = 4) -> None:
    """Draws panels in a grid and writes them as PNG.

    A label has the same colour in all panels; if there are more labels than colours, only within its panel.
    """
    columns = min(columns, len(panels))
    rows = -(-len(panels) // columns)
    most_labels = max(len({**panel.points, **panel.curves}) for panel in panels)
    height = 3.1 + (0.16 * most_labels if most_labels > _MAX_LABELS_INSIDE else 0)
    figure = Figure(figsize=(3.6 * columns, height * rows), layout="constrained", dpi=110)
    grid = figure.subplots(rows, columns, squeeze=False).reshape(-1)
    labels = list(dict.fromkeys(label for panel in panels for label in [*panel.points, *panel.curves]))
    for axes, panel in zip(grid, panels, strict=False):
        _plot_series(axes, panel, labels)
        for label, x in (panel.vertical_lines or {}).items():
            axes.axvline(x, color="0.4", linestyle="--", linewidth=1, label=label)
        _set_axes(axes, panel)
    for axes in grid[len(panels) :]:
        axes.set_visible(False)
    save_figure(figure, path)


Interval = tuple[float, float, float]
"""A value and the ends of its interval."""


def draw_intervals(
    path: Path,
    panels: Mapping[str, Mapping[str, Mapping[str, Interval]]],
    x: str,
    vertical_lines: Mapping[str, float] | None = None,
    first_lines: Mapping[str, float] | None = None,
    columns: int = 3,
) -> None:
    """Draws values with their intervals, a row for each label, and writes them as PNG.

    `panels` maps a title to series, and a series to values by label; a series has a colour. Panels share their labels,
    which stand beside the first of a line, and `x` is what the values are. `first_lines` are in the first panel alone.
    """
    columns = min(columns, len(panels))
    rows_of_panels = -(-len(panels) // columns)
    labels = list(
        dict.fromkeys(label for of_panel in panels.values() for values in of_panel.values() for label in values)
    )
    names = list(dict.fromkeys(name for of_panel in panels.values() for name in of_panel))
    height = 1.3 + len(labels) * (0.16 + 0.09 * len(names))
    figure = Figure(figsize=(2.0 + 2.7 * columns, height * rows_of_panels), layout="constrained", dpi=110)
    grid = figure.subplots(rows_of_panels, columns, squeeze=False, sharey=True).reshape(-1)
    for axes, (title, of_panel) in zip(grid, panels.items(), strict=False):
        for name, values in of_panel.items():
            shift = 0.7 * ((names.index(name) + 0.5) / len(names) - 0.5)
            rows = [labels.index(label) + shift for label in values]
            value, low, high = np.array(list(values.values())).T
            bars = np.maximum(np.stack([value - low, high - value]), 0)
            color = _COLORS[names.index(name) % len(_COLORS)]
            axes.errorbar(value, rows, xerr=bars, fmt="o", markersize=3, linewidth=1.2, color=color, label=name or None)
        lines = {**(vertical_lines or {}), **((first_lines or {}) if axes is grid[0] else {})}
        for label, at in lines.items():
            axes.axvline(at, color="0.4", linestyle="--" if label else "-", linewidth=0.8, label=label or None)
        axes.set(yticks=range(len(labels)))
        axes.set_title(title, fontsize=9)
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.set_yticklabels(labels, fontsize=7)
        axes.spines[["top", "right"]].set_visible(False)
    figure.supxlabel(x, fontsize=9)
    grid[0].set_ylim(len(labels) - 0.5, -0.5)
    for axes in grid[len(panels) :]:
        axes.set_visible(False)
    shown: dict[Any, Any] = {}
    for axes in grid:
        shown |= dict(zip(*axes.get_legend_handles_labels()[::-1], strict=True))
    if shown:
        handles, texts = list(shown.values()), list(shown)
        figure.legend(handles, texts, fontsize=7, frameon=False, loc="outside upper center", ncols=len(texts))
    save_figure(figure, path)


def _plot_series(axes: Axes, panel: Panel, labels: list[str]) -> None:
    """Plots the points and curves of a panel; `labels` are those of all panels."""
    series = {**panel.points, **panel.curves}
    colored = labels if len(labels) <= len(_COLORS) else list(series)
    for number, (label, points) in enumerate(series.items()):
        finite = [(x, y) for x, y in points if np.isfinite(y)]
        if finite:
            color = _COLORS[colored.index(label) % len(_COLORS)]
            marker = "o" if panel.markers or label in panel.points else None
            width = 1.2 + (1.5 * (len(panel.curves) - 1 - number) if panel.coincide else 0)
            width = 0 if label in panel.points else width
            axes.plot(
                *zip(*finite, strict=True), color=color, marker=marker, markersize=3, linewidth=width, label=label
            )


def _set_axes(axes: Axes, panel: Panel) -> None:
    """Sets title, labels, scales, limits and legend."""
    axes.set(title=panel.title, xlabel=panel.x, ylabel=panel.y, yscale=panel.scales[1])
    if panel.scales[0] == "log":
        axes.set_xscale("log", base=2)  # sizes, batches and learning rates go in factors of two
    if panel.scales[1] == "log":
        low, high = axes.get_ylim()
        margin = max(1.0, (_MIN_LOG_SPAN / (high / low)) ** 0.5)
        axes.set_ylim(low / margin, high * margin)
    if panel.y_max is not None:
        axes.set_ylim(top=panel.y_max)
    axes.spines[["top", "right"]].set_visible(False)
    num_labels = len({**panel.points, **panel.curves})
    below: dict[str, Any] = (
        {"loc": "upper left", "bbox_to_anchor": (0, -0.16)} if num_labels > _MAX_LABELS_INSIDE else {}
    )
    axes.legend(fontsize=7, frameon=False, **below)


def save_figure(figure: Figure, path: Path) -> None:
    """Writes a figure as PNG."""
    with written_to(path), replacing(path) as partial:
        figure.savefig(partial, format="png")


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Formats a header and rows of cells as a Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


OVER_SEEDS = "± is half the width of the 95 % interval of the mean over {} seed(s), by Student's t."
"""Says in a report what ± is of; {} is the number of seeds."""

_Item = TypeVar("_Item")
_Group = TypeVar("_Group")


def grouped(items: Iterable[_Item], group_of: Callable[[_Item], _Group]) -> dict[_Group, list[_Item]]:
    """Group → its items; groups stand in the order of their first item, items in the order given."""
    groups: dict[_Group, list[_Item]] = {}
    for item in items:
        groups.setdefault(group_of(item), []).append(item)
    return groups


def standard_deviation(values: Sequence[float]) -> float:
    """Sample standard deviation, usually over seeds; 0 for a single value."""
    return float(np.std(values, ddof=1)) if len(values) > 1 else 0.0


def mean_and_interval(losses: Sequence[float]) -> str:
    """Formats losses of several seeds as their mean ± half the width of its 95 % interval (Student's t).

    Without ± for a single seed; "n of m diverged" if any is not finite.
    """
    diverged = sum(not np.isfinite(loss) for loss in losses)
    if diverged:
        return f"{diverged} of {len(losses)} diverged"
    half = half_width_of_mean(losses)
    return f"{np.mean(losses):.4f}" + ("" if half is None else f" ± {half:.4f}")


def power_law_exponent(x: Float[np.ndarray, " points"], y: Float[np.ndarray, " points"]) -> float:
    """Exponent a of y ∝ x^a: the least-squares slope of log y against log x."""
    return float(np.polyfit(np.log(x), np.log(y), 1)[0])
