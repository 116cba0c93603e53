"""Output of studies: tables, figures and formatted numbers."""

import math

import matplotlib.axes
import matplotlib.figure
import numpy as np
import pytest
from figure_text import described_figure

from trimask.diffusion.studies.findings import (
    Panel,
    draw_intervals,
    draw_panels,
    markdown_table,
    mean_and_interval,
    power_law_exponent,
    standard_deviation,
    write_csv,
)


def test_an_exponent_is_the_slope_in_logarithms():
    x = np.array([1.0, 2.0, 8.0])
    assert power_law_exponent(x, 3 * x**-0.5) == pytest.approx(-0.5)


def test_tables_are_markdown():
    assert markdown_table(["a", "b"], [["1", "2"]]) == "| a | b |\n| --- | --- |\n| 1 | 2 |"


def test_a_mean_comes_with_its_interval_over_seeds_or_with_how_many_diverged():
    assert mean_and_interval([1.0, 2.0, 6.0]) == "3.0000 ± 6.5724"  # 4.30265 · √((4 + 1 + 9) / 2) / √3
    assert mean_and_interval([1.5]) == "1.5000" and standard_deviation([1.5]) == 0.0
    assert mean_and_interval([1.0, math.inf, math.nan]) == "2 of 3 diverged"


def test_a_table_has_the_keys_of_its_first_row_as_header(tmp_path):
    write_csv(tmp_path / "a.csv", [{"β": 1, "b": "x, y"}, {"b": None, "β": 0.5}])
    assert (tmp_path / "a.csv").read_bytes().decode("utf-8") == 'β,b\r\n1,"x, y"\r\n0.5,\r\n'


@pytest.fixture
def axes_of(tmp_path, monkeypatch):
    """Draws panels, and returns the axes that were saved."""

    def drawn(panels, columns=4):
        saved = []
        monkeypatch.setattr(matplotlib.figure.Figure, "savefig", lambda figure, path, **_: saved.append((figure, path)))
        with matplotlib.rc_context(matplotlib.rcParamsDefault):
            draw_panels(tmp_path / "a.png", panels, columns)
        ((figure, path),) = saved
        assert path == tmp_path / "a.png.partial" and (tmp_path / "a.png").is_file()
        return figure.axes

    return drawn


def panel(**changes):
    return Panel(**{"title": "t", "curves": {"a": [(1.0, 2.0), (2.0, 3.0)]}, "x": "steps", "y": "loss"} | changes)


def test_a_figure_shows_all_of_its_panels(axes_of):
    """Points without lines, infinite values left out, a legend below the axes for many labels, and unused axes."""
    first = panel(
        curves={"a": [(1.0, 2.0), (2.0, math.inf), (4.0, 3.0)], "b": [(1.0, math.nan)]},
        points={"runs": [(3.0, 5.0), (1.0, 4.0)]},
        vertical_lines={"critical": 7.0},
        y_max=6.0,
        markers=False,
    )
    curves = {label: [(1.0, 2.0), (2.0, 2.02)] for label in "abcdef"}
    second = panel(title="u", curves=curves, x="width", y="rate", scales=("linear", "log"), coincide=True)
    axes = axes_of([first, second, panel(curves={"a": [(1.0, 1.0)]})], columns=2)
    assert described_figure(axes[0].figure).splitlines() == [
        "7.20 by 8.12 inches of 110 dots",
        "t | steps | loss: log 2 × linear, 0.907 to 7.72; 1.85 to 6, left bottom",
        "  runs: #1f77b4 - 0 o 3: (3, 5) (1, 4)",
        "  a: #ff7f0e - 1.2: (1, 2) (4, 3)",
        "  critical: #666666 -- 1: (7, 0) (7, 1)",
        "  legend no frame 7: runs, a, critical",
        "u | width | rate: linear × log 10, 0.95 to 2.05; 0.899 to 4.49, left bottom",
        "  a: #ff7f0e - 8.7 o 3: (1, 2) (2, 2.02)",
        "  b: #2ca02c - 7.2 o 3: (1, 2) (2, 2.02)",
        "  c: #d62728 - 5.7 o 3: (1, 2) (2, 2.02)",
        "  d: #9467bd - 4.2 o 3: (1, 2) (2, 2.02)",
        "  e: #8c564b - 2.7 o 3: (1, 2) (2, 2.02)",
        "  f: #e377c2 - 1.2 o 3: (1, 2) (2, 2.02)",
        "  legend no frame 7: a, b, c, d, e, f",
        "t | steps | loss: log 2 × linear, 0.467 to 2.14; 0.945 to 1.06, left bottom",
        "  a: #ff7f0e - 1.2 o 3: (1, 1)",
        "  legend no frame 7: a",
        "nothing",
    ]


def test_panels_are_in_rows_of_so_many_and_the_places_that_are_left_are_empty(axes_of):
    axes = axes_of([panel(title=str(number)) for number in range(3)], columns=2)
    assert [(one.get_title(), one.get_visible()) for one in axes] == [
        ("0", True),
        ("1", True),
        ("2", True),
        ("", False),
    ]
    assert axes[0].get_subplotspec().get_gridspec().ncols == 2
    assert len(axes_of([panel()], columns=2)) == 1


def test_a_label_has_one_colour_in_all_panels(axes_of):
    curve = [(1.0, 2.0)]
    first, second = axes_of([panel(curves={"a": curve, "b": curve}), panel(curves={"b": curve, "c": curve})])
    colours = {line.get_label(): line.get_color() for line in (*first.lines, *second.lines)}
    assert len(set(colours.values())) == 3 and first.lines[1].get_color() == second.lines[0].get_color()


def test_there_may_be_more_labels_than_colours(axes_of):
    labels = [f"{number}" for number in range(12)]
    panels = [panel(curves={label: [(1.0, 2.0)] for label in some}) for some in (labels, labels[:0:-1])]
    first, second = ([line.get_color() for line in axes.lines] for axes in axes_of(panels))
    assert len(set(first)) == len(set(second)) == 10 and first[10] == first[0]
    # By their place in a panel, where they are too many to have a colour each.
    assert second[0] == first[0]


def test_intervals_have_a_row_for_each_label_and_a_colour_for_each_series(tmp_path, monkeypatch):
    saved = []
    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", lambda figure, path, **_: saved.append(figure))
    panels = {
        "t": {"linear": {"a": (0.5, 0.25, 1.0), "b": (2.0, 1.5, 2.25)}, "cosine": {"b": (3.0, 3.0, 3.0)}},
        "u": {"linear": {"a": (0.25, 0.0, 0.5)}},
        "v": {"square": {"a": (0.25, 0.0, 0.5)}},
    }
    with matplotlib.rc_context(matplotlib.rcParamsDefault):
        draw_intervals(tmp_path / "a.png", panels, "lower by", {"": 0.0}, {"matters": 0.125}, columns=2)
    said = described_figure(saved[0]).splitlines()
    assert said[1].startswith("t: linear × linear") and "1.5 to -0.5" in said[1]
    assert said[2:10] == [
        "  #1f77b4 None 1.2 o 3: (0.5, -0.233333) (2, 0.766667)",
        "  #ff7f0e None 1.2 o 3: (3, 1)",
        "  #666666 - 0.8: (0, 0) (0, 1)",
        "  matters: #666666 -- 0.8: (0.125, 0) (0.125, 1)",
        "  lines #1f77b4: (0.25, -0.233333) (1, -0.233333) (1.5, 0.766667) (2.25, 0.766667)",
        "  lines #ff7f0e: (3, 1) (3, 1)",
        "  ticks of y: a, b",
        said[9],
    ]
    assert "".join(said).count("(0, 0) (0, 1)") == 3 and "".join(said).count("(0.125, 0) (0.125, 1)") == 1
    assert said[-2:] == ["nothing", "  legend no frame 7: matters, linear, cosine, square"]


def test_a_figure_is_a_picture(tmp_path):
    draw_panels(tmp_path / "a.png", [panel()])
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("labels, is_below", [(5, False), (6, True)])
def test_many_labels_stand_below_the_axes_and_few_within(axes_of, monkeypatch, labels, is_below):
    said = []
    monkeypatch.setattr(matplotlib.axes.Axes, "legend", lambda axes, **how: said.append(how))
    (axes,) = axes_of([panel(curves={str(number): [(1.0, 2.0)] for number in range(labels)})])
    assert [how.get("bbox_to_anchor") for how in said] == [(0, -0.16) if is_below else None]
    assert (axes.figure.get_figheight() == 3.1) is not is_below


def test_a_logarithmic_axis_of_what_hardly_changes_is_at_least_so_high(axes_of):
    (axes,) = axes_of([panel(curves={"a": [(1.0, 10.0), (2.0, 10.1)]}, scales=("linear", "log"))])
    low, high = axes.get_ylim()
    assert axes.get_xscale() == "linear" and axes.get_yscale() == "log"
    assert high / low == pytest.approx(5.0, rel=1e-3) and (high * low) ** 0.5 == pytest.approx(10.05, rel=1e-3)
    (axes,) = axes_of([panel(curves={"a": [(1.0, 1.0), (2.0, 100.0)]}, scales=("log", "log"))])
    low, high = axes.get_ylim()
    assert high / low == pytest.approx(100**1.1, rel=0.01)  # matplotlib's own margin of a twentieth on each side
