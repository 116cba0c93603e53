"""Text description of a figure: its axes, lines, bars, texts and legends, to compare with a literal text."""

from collections.abc import Iterator

from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.legend import Legend
from matplotlib.text import Text


def described_figure(figure: Figure) -> str:
    """Lines of text: one for the figure, one for each axes, and one for everything drawn in them."""
    width, height = figure.get_size_inches()
    lines = [f"{width:.2f} by {height:.2f} inches of {figure.dpi:g} dots"]
    for axes in figure.axes:
        lines += _axes(axes)
    return "\n".join([*lines, *(_legend(legend) for legend in figure.legends)])


def _axes(axes: Axes) -> Iterator[str]:
    if not axes.get_visible():
        yield "nothing"
        return
    sides = [side for side, spine in axes.spines.items() if spine.get_visible()]
    limits = "; ".join(" to ".join(f"{x:.3g}" for x in of) for of in (axes.get_xlim(), axes.get_ylim()))
    scales = f"{_scale(axes.xaxis)} × {_scale(axes.yaxis)}"
    names = " | ".join(filter(None, (axes.get_title(), axes.get_xlabel(), axes.get_ylabel())))
    yield f"{names}: {scales}, {limits}, {' '.join(sides)}{_grid(axes)}"
    for line in axes.lines:
        points = " ".join(f"({x:g}, {y:g})" for x, y in line.get_xydata())
        how = f"{to_hex(line.get_color())} {line.get_linestyle()} {line.get_linewidth():g}"
        marker = f" {line.get_marker()} {line.get_markersize():g}" if line.get_marker() not in ("None", None) else ""
        label = "" if line.get_label().startswith("_") else f"{line.get_label()}: "  # such labels are matplotlib's own
        yield f"  {label}{how}{marker}: {points}"
    for bar in axes.patches:
        corner = f"({bar.get_x():g}, {bar.get_y():g})"
        yield f"  bar {to_hex(bar.get_facecolor())} from {corner}, {bar.get_width():g} by {bar.get_height():g}"
    for lines in axes.collections:
        ends = " ".join(f"({x:g}, {y:g})" for path in lines.get_segments() for x, y in path)
        yield f"  lines {to_hex(lines.get_color()[0])}: {ends}"
    yield from (f"  {_text(text)} at {text.xy}" for text in axes.texts)
    ticks = [label.get_text() for label in axes.get_yticklabels()]
    if any(tick[:1].isalpha() for tick in ticks):
        yield f"  ticks of y: {', '.join(ticks)}"
    if axes.get_legend() is not None:
        yield _legend(axes.get_legend())


def _scale(axis) -> str:
    base = getattr(axis.get_transform(), "base", None)
    return axis.get_scale() + (f" {base:g}" if base else "")


def _grid(axes: Axes) -> str:
    lines = {name: axis.get_gridlines()[0] for name, axis in (("x", axes.xaxis), ("y", axes.yaxis))}
    shown = [f"{name} {to_hex(line.get_color())}" for name, line in lines.items() if line.get_visible()]
    return f", grid {' '.join(shown)}{' below' if axes.get_axisbelow() is True else ''}" if shown else ""


def _text(text: Text) -> str:
    how = f"{to_hex(text.get_color())} {text.get_fontsize():g} {text.get_fontweight()} {text.get_verticalalignment()}"
    return f"{text.get_text()!r} {how}"


def _legend(legend: Legend) -> str:
    texts = legend.get_texts()
    frame = "" if legend.get_frame_on() else " no frame"
    return f"  legend{frame} {texts[0].get_fontsize():g}: {', '.join(text.get_text() for text in texts)}"
