"""What the figures of a report show: the numbers, where they stand and what they are called."""

import matplotlib
import numpy as np
import pytest
from matplotlib.figure import Figure

from trimask.diffusion.results import Score
from trimask.scripts import plots

BLUE, ORANGE = (matplotlib.colors.to_rgba(colour) for colour in matplotlib.color_sequences["tab10"][:2])


@pytest.fixture
def drawn(monkeypatch, tmp_path):
    """Draws, and gives the figure back that was saved."""
    kept = []

    class Kept(Figure):
        def savefig(self, path):
            kept.append(path)
            super().savefig(path)
            kept.append(self)

    def call(plot, content) -> Figure:
        plot(tmp_path / "figure.png", content)
        path, figure = kept
        assert path == tmp_path / "figure.png" and path.stat().st_size
        return figure

    monkeypatch.setattr(plots, "Figure", Kept)
    return call


def texts(legend):
    return [text.get_text() for text in legend.get_texts()]


METRICS = [
    {"step": 1, "tokens": 10, "loss": 3.0, "bits/task/text_to_image": 2.0},
    {"step": 3, "tokens": 40, "loss": 1.0, "bits/task/text_to_image": 1.5, "bits/task/text": 4.0, "bits/text": 9.0},
    {"step": 4, "tokens": 50, "loss": 0.5, "bits/task/text": 3.0},
]


def test_the_loss_and_the_bits_of_each_direction_are_drawn_against_tokens(drawn):
    left, right = drawn(plots.plot_loss, METRICS).axes
    assert (left.get_title(), right.get_title()) == ("loss", "bits per token, in training")
    assert [line.get_xydata().tolist() for line in left.lines] == [[[10, 3], [40, 1], [50, 0.5]]]
    assert {line.get_label(): line.get_xydata().tolist() for line in right.lines} == {
        "text": [[40, 4], [50, 3]],
        "text to image": [[10, 2], [40, 1.5]],
    }
    assert [matplotlib.colors.to_rgba(line.get_color()) for line in right.lines] == [BLUE, ORANGE]
    assert texts(right.get_legend()) == ["text", "text to image"] and left.get_legend() is None
    for axes in (left, right):
        assert axes.get_xlabel() == "tokens" and axes.get_ylim()[0] == 0
        assert [axes.spines[side].get_visible() for side in ("top", "right", "left")] == [False, False, True]


def test_without_directions_there_is_no_legend(drawn):
    _, right = drawn(plots.plot_loss, [{"step": 1, "tokens": 10, "loss": 3.0}]).axes
    assert right.get_legend() is None and not right.lines


def score(task, value, interval=None, on_real=None, is_share=True):
    about = {
        "dataset": "d",
        "split": "test",
        "judge": "label",
        "examples": 9,
        "higher_is_better": True,
        "mean_nfe": 1.0,
    }
    return Score(**about, task=task, value=value, interval=interval, on_real=on_real, is_share=is_share)


def test_accuracies_are_bars_with_their_intervals_and_ticks_at_that_of_real_media(drawn):
    scores = [
        score("text_to_image", 0.5, (0.25, 0.875), on_real=0.75),
        score("text_to_audio", 40.0, is_share=False),
        score("image_to_text", 0.125),
    ]
    figure = drawn(plots.plot_accuracy, scores)
    (axes,) = figure.axes
    assert [(bar.get_width(), bar.get_y() + bar.get_height() / 2) for bar in axes.patches] == [(0.5, 0.0), (0.125, 1.0)]
    (first,), (second,) = (container.errorbar[2][0].get_segments() for container in axes.containers[1::2])
    np.testing.assert_allclose(first, [[0.25, 0.0], [0.875, 0.0]])
    np.testing.assert_allclose(second, [[0.125, 1.0], [0.125, 1.0]])
    assert [(text.get_text(), text.xy) for text in axes.texts] == [("50.0%", (0.012, 0)), ("12.5%", (0.012, 1))]
    drawn_lines = [line for line in axes.lines if len(line.get_xydata())]
    ticks = [line.get_xydata().tolist() for line in drawn_lines if line.get_linewidth() == 2.5]
    assert ticks == [[[0.75, -0.38], [0.75, 0.38]]]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["text to image · test", "image to text · test"]
    assert axes.get_xlim() == (0, 1.02) and axes.get_ylim()[0] > axes.get_ylim()[1]
    assert axes.xaxis.get_major_formatter()(0.5, 0) == "50%"
    (legend,) = figure.legends
    assert texts(legend) == ["the judge on real media"]


def test_where_no_judge_saw_real_media_there_is_no_legend(drawn):
    assert not drawn(plots.plot_accuracy, [score("text", 0.5)]).legends
