"""Shows partly known codes on a terminal: known ones coloured by confidence, unknown ones shaded."""

from typing import Any

import numpy as np
from jaxtyping import Float, Int
from rich.text import Text

_SHADE = "grey50"


def live_grid(codes: Int[np.ndarray, "..."], confidence: Float[np.ndarray, "..."], codec: Any) -> Text:
    """Grid with a column per index of the first axis and a row per index of the others, coloured by confidence."""
    grid, confidences = codes.reshape(len(codes), -1).T, confidence.reshape(len(codes), -1).T
    text = Text()
    for row, row_confidences in zip(grid, confidences, strict=True):
        for code, value in zip(row, row_confidences, strict=True):
            text.append("░" if code < 0 else "█", style=_SHADE if code < 0 else colour(value))
        text.append("\n")
    return text


def live_picture(codes: Int[np.ndarray, "rows columns"], confidence: Float[np.ndarray, "..."], codec: Any) -> Text:
    """The decoded picture at up to 32 pixels a side, two characters per pixel; unknown patches are shaded."""
    pixels = codec.decode(np.maximum(codes, 0)[None])[0]
    known = codes >= 0
    height, width = pixels.shape[:2]
    stride = max(1, -(-max(height, width) // 32))
    text = Text()
    for y in range(0, height, stride):
        for x in range(0, width, stride):
            if known[y * known.shape[0] // height, x * known.shape[1] // width]:
                red, green, blue = (pixels[y, x][[0, 0, 0]] if pixels.shape[-1] == 1 else pixels[y, x][:3]).tolist()
                text.append("  ", style=f"on rgb({red},{green},{blue})")
            else:
                text.append("░░", style=_SHADE)
        text.append("\n")
    return text


def colour(confidence: float) -> str:
    """Colour in Rich's notation, from red for confidence 0 to green for 1."""
    share = min(max(float(confidence), 0.0), 1.0)
    return f"rgb({round(220 * (1 - share)) + 30},{round(170 * share) + 50},60)"
