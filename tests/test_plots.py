"""Figures of a report: numbers, positions and labels."""

import matplotlib
import pytest
from figure_text import described_figure
from matplotlib.figure import Figure

from trimask.diffusion.evaluation.results import Score
from trimask.scripts.output import plots


@pytest.fixture
def drawn(monkeypatch, tmp_path):
    """Calls a plotting function and returns the figure that it saved."""
    kept = []

    class Kept(Figure):
        def savefig(self, path, **options):
            kept.append(path)
            super().savefig(path, **options)
            kept.append(self)

    def call(plot, content) -> Figure:
        with matplotlib.rc_context(matplotlib.rcParamsDefault):
            plot(tmp_path / "figure.png", content)
        path, figure = kept
        assert path == tmp_path / "figure.png.partial" and (tmp_path / "figure.png").stat().st_size
        return figure

    monkeypatch.setattr(plots, "Figure", Kept)
    return call


METRICS = [
    {"step": 1, "tokens": 10, "loss": 3.0, "bits/task/text_to_image": 2.0},
    {"step": 3, "tokens": 40, "loss": 1.0, "bits/task/text_to_image": 1.5, "bits/task/text": 4.0, "bits/text": 9.0},
    {"step": 4, "tokens": 50, "loss": 0.5, "bits/task/text": 3.0},
]


def test_the_loss_and_the_bits_of_each_direction_are_drawn_against_tokens(drawn):
    assert described_figure(drawn(plots.plot_loss, METRICS)).splitlines() == [
        "8.00 by 3.40 inches of 110 dots",
        "loss | tokens: linear × linear, 8 to 52; 0 to 3.12, left bottom, grid x #e5e5e5 y #e5e5e5 below",
        "  #1f77b4 - 1.5: (10, 3) (40, 1) (50, 0.5)",
        "bits per token: training estimates | tokens: linear × linear, 8 to 52; 0 to 4.12, left bottom, "
        "grid x #e5e5e5 y #e5e5e5 below",
        "  text: #1f77b4 - 1.5: (40, 4) (50, 3)",
        "  text to image: #ff7f0e - 1.5: (10, 2) (40, 1.5)",
        "  legend no frame 8: text, text to image",
    ]


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
    assert described_figure(figure).splitlines() == [
        "8.00 by 1.74 inches of 110 dots",
        "share of right answers; lines are 95 % intervals over the examples: linear × linear, "
        "0 to 1.02; 1.38 to -0.464, left bottom, grid x #e5e5e5 below",
        "  #1f77b4 None 1.5 | 6: (0.25, 0)",  # ends of the first interval
        "  #1f77b4 None 1.5 | 6: (0.875, 0)",
        "  #ff7f0e - 2.5: (0.75, -0.38) (0.75, 0.38)",
        "  #1f77b4 None 1.5 | 6: (0.125, 1)",  # of the second, which has none
        "  #1f77b4 None 1.5 | 6: (0.125, 1)",
        "  the judge on real media: #ff7f0e - 2.5: ",
        "  bar #1f77b4 from (0, -0.3), 0.5 by 0.6",
        "  bar #1f77b4 from (0, 0.7), 0.125 by 0.6",
        "  lines #333333: (0.25, 0) (0.875, 0)",
        "  lines #333333: (0.125, 1) (0.125, 1)",
        "  '50.0%' #ffffff 9 bold center at (0.012, 0)",
        "  '12.5%' #ffffff 9 bold center at (0.012, 1)",
        "  ticks of y: text to image · test, image to text · test",
        "  legend no frame 8: the judge on real media",
    ]
    (axes,) = figure.axes
    assert axes.xaxis.get_major_formatter()(0.5, 0) == "50%"


def test_where_no_judge_saw_real_media_there_is_no_legend(drawn):
    assert not drawn(plots.plot_accuracy, [score("text", 0.5)]).legends
