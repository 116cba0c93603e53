"""What studies leave behind: a table as CSV, figures as PNG, and a short text in Markdown."""

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from jaxtyping import Float
from matplotlib.figure import Figure

from trimask.tokenizers.storage.files import replacing, write_text, written_to

_COLORS = matplotlib.color_sequences["tab10"]

_FLAT = 5.0
"""A logarithmic axis spans at least this factor, so that what hardly changes looks flat."""

_INSIDE = 5
"""So many labels have room within the axes."""

Curve = Sequence[tuple[float, float]]
"""Points (x, y)."""


@dataclass(frozen=True, kw_only=True)
class Panel:
    """One set of axes."""

    title: str
    curves: Mapping[str, Curve]
    """Label → points of a line; infinite ones are left out."""
    points: Mapping[str, Curve] = field(default_factory=dict)
    """Label → points that no line joins."""
    x: str
    y: str
    scales: tuple[str, str] = ("log", "linear")
    lines: Mapping[str, float] | None = None
    """Label → x of a vertical line."""
    highest: float | None = None
    """Upper limit of y."""
    markers: bool = True
    """Whether lines show their points."""
    coincide: bool = False
    """Earlier lines are drawn wider, so that those that lie under others are seen."""


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """A table with the keys of the first row as its header."""
    file = io.StringIO(newline="")
    writer = csv.DictWriter(file, fieldnames=list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, file.getvalue())


def draw(path: Path, panels: Sequence[Panel], columns: int = 4) -> None:
    """Panels side by side, one colour per label; where there are too many labels for that, per label of a panel."""
    columns = min(columns, len(panels))
    lines = -(-len(panels) // columns)
    most = max(len({**panel.points, **panel.curves}) for panel in panels)
    height = 3.1 + (0.16 * most if most > _INSIDE else 0)
    figure = Figure(figsize=(3.6 * columns, height * lines), layout="constrained", dpi=110)
    grid = figure.subplots(lines, columns, squeeze=False).reshape(-1)
    labels = list(dict.fromkeys(label for panel in panels for label in [*panel.points, *panel.curves]))
    for axes, panel in zip(grid, panels, strict=False):
        own = {**panel.points, **panel.curves}
        colored = labels if len(labels) <= len(_COLORS) else list(own)
        for number, (label, points) in enumerate(own.items()):
            finite = [(x, y) for x, y in points if np.isfinite(y)]
            if finite:
                color = _COLORS[colored.index(label) % len(_COLORS)]
                marker = "o" if panel.markers or label in panel.points else None
                width = 1.2 + (1.5 * (len(panel.curves) - 1 - number) if panel.coincide else 0)
                width = 0 if label in panel.points else width
                axes.plot(
                    *zip(*finite, strict=True), color=color, marker=marker, markersize=3, linewidth=width, label=label
                )
        for label, x in (panel.lines or {}).items():
            axes.axvline(x, color="0.4", linestyle="--", linewidth=1, label=label)
        axes.set(title=panel.title, xlabel=panel.x, ylabel=panel.y, yscale=panel.scales[1])
        if panel.scales[0] == "log":
            axes.set_xscale("log", base=2)  # sizes, batches and learning rates go in factors of two
        if panel.scales[1] == "log":
            low, high = axes.get_ylim()
            margin = max(1.0, (_FLAT / (high / low)) ** 0.5)
            axes.set_ylim(low / margin, high * margin)
        if panel.highest is not None:
            axes.set_ylim(top=panel.highest)
        axes.spines[["top", "right"]].set_visible(False)
        below = {"loc": "upper left", "bbox_to_anchor": (0, -0.16)} if len(own) > _INSIDE else {}
        axes.legend(fontsize=7, frameon=False, **below)
    for axes in grid[len(panels) :]:
        axes.set_visible(False)
    save_figure(figure, path)


def save_figure(figure: Figure, path: Path) -> None:
    """Writes a figure as PNG."""
    with written_to(path), replacing(path) as partial:
        figure.savefig(partial, format="png")


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def deviation(values: Sequence[float]) -> float:
    """The standard deviation of the seeds; 0 of a single one."""
    return float(np.std(values, ddof=1)) if len(values) > 1 else 0.0


def mean_and_deviation(losses: Sequence[float]) -> str:
    """mean ± standard deviation of seeds; or how many of them diverged."""
    diverged = sum(not np.isfinite(loss) for loss in losses)
    if diverged:
        return f"{diverged} of {len(losses)} diverged"
    return f"{np.mean(losses):.4f} ± {deviation(losses):.4f}"


def exponent(x: Float[np.ndarray, " points"], y: Float[np.ndarray, " points"]) -> float:
    """The slope of log y over log x by least squares: a of y ∝ x^a."""
    return float(np.polyfit(np.log(x), np.log(y), 1)[0])
