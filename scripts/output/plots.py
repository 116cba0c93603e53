"""Plots of a run: curves of its training metrics, and bars of its accuracies."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from trimask.diffusion.evaluation.results import Score
from trimask.diffusion.studies.findings import save_figure

Metrics = list[dict[str, Any]]
"""Lines of metrics.jsonl, as dictionaries."""

_COLORS = matplotlib.color_sequences["tab10"]
_TASK_BITS = "bits/task/"


def training_seconds(metrics: Metrics) -> float:
    """Time of training, samples and checkpoints over all parts of a resumed run: sum of tokens / (tokens/s)."""
    seconds, step, tokens = 0.0, 0, 0.0
    for line in metrics:
        # `tokens` is the mean over the line's steps of the tokens seen after each; extrapolate it to the last step.
        steps = line["step"] - step
        seen = tokens + (line["tokens"] - tokens) * 2 * steps / (steps + 1)
        seconds += (seen - tokens) / line["tokens_per_second"]
        step, tokens = line["step"], seen
    return seconds


def plot_loss(path: Path, metrics: Metrics) -> None:
    """Plots the loss, and bits per token of each task, against the tokens seen."""
    figure = Figure(figsize=(8, 3.4), layout="constrained", dpi=110)
    left, right = figure.subplots(1, 2)
    tokens = [line["tokens"] for line in metrics]
    left.plot(tokens, [line["loss"] for line in metrics], color=_COLORS[0])
    left.set_title("loss")
    names = sorted({name for line in metrics for name in line if name.startswith(_TASK_BITS)})
    for name, color in zip(names, _COLORS, strict=False):
        points = [(line["tokens"], line[name]) for line in metrics if name in line]
        label = name.removeprefix(_TASK_BITS).replace("_", " ")
        right.plot(*zip(*points, strict=True), color=color, label=label)
    right.set_title("bits per token: training estimates")
    if names:
        right.legend(fontsize=8, frameon=False)
    for axes in (left, right):
        axes.set_xlabel("tokens")
        axes.ticklabel_format(axis="x", style="sci", scilimits=(0, 0))
        axes.set_ylim(bottom=0)
        _tidy(axes)
    save_figure(figure, path)


def plot_accuracy(path: Path, scores: Sequence[Score]) -> None:
    """Plots a bar per task and split with its 95 % interval, and a tick at the judge's accuracy on real media.

    Only scores that are shares of right answers are shown; others have no common scale.
    """
    accuracies = [score for score in scores if score.is_share]
    figure = Figure(figsize=(8, 0.9 + 0.42 * len(accuracies)), layout="constrained", dpi=110)
    axes = figure.subplots()
    for row, a in enumerate(accuracies):
        low, high = a.interval or (a.value, a.value)
        errors = [[max(0.0, a.value - low)], [max(0.0, high - a.value)]]
        axes.barh(row, a.value, 0.6, xerr=errors, color=_COLORS[0], ecolor="#333", capsize=3)
        axes.annotate(f"{a.value:.1%}", (0.012, row), va="center", fontsize=9, color="white", weight="bold")
        if a.on_real is not None:
            axes.plot([a.on_real] * 2, [row - 0.38, row + 0.38], color=_COLORS[1], linewidth=2.5)
    axes.plot([], [], color=_COLORS[1], linewidth=2.5, label="the judge on real media")
    if any(a.on_real is not None for a in accuracies):
        figure.legend(loc="outside lower right", fontsize=8, frameon=False)
    axes.set_yticks(range(len(accuracies)), [f"{a.task.replace('_', ' ')} · {a.split}" for a in accuracies])
    axes.set_xlim(0, 1.02)
    axes.set_xlabel("share of right answers; lines are 95 % intervals over the examples")
    axes.xaxis.set_major_formatter(lambda share, _: f"{share:.0%}")
    axes.invert_yaxis()
    _tidy(axes)
    axes.grid(axis="y", visible=False)
    save_figure(figure, path)


def _tidy(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#e5e5e5")
    axes.set_axisbelow(True)
