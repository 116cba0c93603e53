"""Partly known codes shown on a terminal, character by character."""

from types import SimpleNamespace

import numpy as np
import pytest

from trimask.scripts.output.terminal import colour, live_grid, live_picture


def shown(text):
    """Each line as (characters, style) of its spans."""
    spans = [(str(text)[span.start : span.end], str(span.style)) for span in text.spans]
    return str(text).split("\n"), spans


def test_a_grid_has_a_column_for_each_step_and_a_row_for_each_code():
    codes = np.array([[[3, -1]], [[0, 2]], [[-1, -1]]])
    confidence = np.array([[[0.0, 0.5]], [[1.0, 0.25]], [[0.5, 0.5]]])
    lines, spans = shown(live_grid(codes, confidence, None))
    assert lines == ["██░", "░█░", ""]
    styles = ["rgb(250,50,60)", "rgb(30,220,60)", "grey50", "grey50", "rgb(195,92,60)", "grey50"]
    assert spans == list(zip("██░░█░", styles, strict=True))


@pytest.mark.parametrize("channels", [1, 3])
def test_a_picture_has_two_characters_for_a_pixel_and_shades_what_is_unknown(channels):
    pixels = np.arange(4 * 6 * channels, dtype=np.uint8).reshape(1, 4, 6, channels)
    decoded = []
    codec = SimpleNamespace(decode=lambda codes: decoded.append(codes.tolist()) or pixels)
    lines, spans = shown(live_picture(np.array([[5, -1, 7], [-1, 4, 0]]), np.zeros((2, 3)), codec))
    assert decoded == [[[[5, 0, 7], [0, 4, 0]]]], "what is unknown is decoded as the first code, and not shown"
    assert lines == ["    ░░░░    "] * 2 + ["░░░░        "] * 2 + [""]

    def style(y, x):
        return "on rgb({},{},{})".format(*(pixels[0, y, x, [0, 0, 0]] if channels == 1 else pixels[0, y, x]).tolist())

    first = [("  ", style(0, 0)), ("  ", style(0, 1)), ("░░", "grey50"), ("░░", "grey50"), ("  ", style(0, 4))]
    assert spans[:5] == first and spans[-1] == ("  ", style(3, 5)) and len(spans) == 24


@pytest.mark.parametrize(("side", "lines"), [(32, 32), (33, 17), (64, 32), (65, 22)])
def test_of_a_large_picture_every_second_or_third_pixel_is_shown(side, lines):
    pixels = np.zeros((1, side, 5, 3), np.uint8)
    text = live_picture(np.zeros((1, 1), int), np.zeros((1, 1)), SimpleNamespace(decode=lambda codes: pixels))
    rows = str(text).split("\n")[:-1]
    assert len(rows) == lines and {len(row) for row in rows} == {2 * -(-5 // -(-side // 32))}


@pytest.mark.parametrize(
    ("confidence", "expected"), [(-1.0, "250,50"), (0.0, "250,50"), (0.5, "140,135"), (1.0, "30,220"), (7.0, "30,220")]
)
def test_colours_go_from_red_to_green(confidence, expected):
    assert colour(confidence) == f"rgb({expected},60)"
