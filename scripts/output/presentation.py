"""How generated media are written, drawn while they are partly known, shown and measured, for each modality.

A new modality needs one entry in `PRESENTATIONS`, and one in `diffusion/data/modalities.py`. Only a file suffix, a
writer and a drawing are required.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int
from PIL import Image
from rich.text import Text

from trimask.scripts.output.media_files import (
    data_uri,
    draw_sound,
    draw_text,
    draw_unknown_picture,
    enlarged,
    enlargement,
    image_grid,
    spectrogram_image,
    wav_bytes,
    write_png,
    write_wav,
)
from trimask.scripts.output.terminal import live_grid, live_picture
from trimask.tokenizers.media import MediaTokenizers
from trimask.tokenizers.quality import log_mel_distance_db, psnr_db
from trimask.tokenizers.sequence import Example
from trimask.tokenizers.vocabulary import TEXT

_MARGIN = 8
_PAUSE_SECONDS = 0.3


@dataclass(frozen=True, kw_only=True)
class Quality:
    """Measure of how well a codec reconstructs media."""

    name: str
    measure: Callable[[np.ndarray, np.ndarray, Any], Float[np.ndarray, " batch"]]
    """Function (real media, reconstructed media, codec) → a number in dB for each."""
    better: str
    """Which values are better: "higher" or "lower"."""


@dataclass(frozen=True, kw_only=True)
class Presentation:
    """Presentation of one modality. Media are as the codec decodes them; unknown codes are −1."""

    ending: str
    """Suffix of files, without a dot."""
    write: Callable[[Path, Any, Any], None]
    """Writes a medium to a file: (path, medium, codec)."""
    draw: Callable[[Int[np.ndarray, "..."], Any], Image.Image]
    """Draws partly known codes, for animations: (codes, codec) → picture."""
    picture: Callable[[Any, Any], Image.Image] | None = None
    """Draws a complete medium, for pages: (medium, codec) → picture. None: its codes are drawn by `draw`."""
    write_together: Callable[[Path, Sequence[Any], Sequence[str], Any], None] | None = None
    """Writes several media to one file: (path, media, captions, codec). None: each has a file of its own."""
    live: Callable[[Int[np.ndarray, "..."], Float[np.ndarray, "..."], Any], Text] = live_grid
    """Shows partly known codes on a terminal: (codes, their confidence, codec) → text."""
    player: Callable[[Any, Any], str] | None = None
    """HTML that plays a medium: (medium, codec) → HTML. None: its picture is shown instead."""
    quality: Quality | None = None
    """Measure of reconstruction that `trimask inspect` shows. None: no measure."""

    def picture_of(self, medium: Any, codec: Any) -> Image.Image:
        """Picture of a complete medium."""
        return self.draw(codec.encode(medium[None])[0], codec) if self.picture is None else self.picture(medium, codec)


def _write_picture(path: Path, picture: np.ndarray, codec: Any) -> None:
    write_png(path, enlarged(picture, enlargement(*picture.shape[:2])))


def _write_pictures(path: Path, pictures: Sequence[np.ndarray], captions: Sequence[str], codec: Any) -> None:
    """Writes pictures as a grid with captions."""
    height, width, _ = pictures[0].shape
    write_png(path, image_grid(pictures, captions, columns=5, scale=enlargement(height, width, wanted=80)))


def _write_sound(path: Path, waveform: np.ndarray, codec: Any) -> None:
    write_wav(path, waveform, codec.sample_rate_hz)


def _write_sounds(path: Path, waveforms: Sequence[np.ndarray], captions: Sequence[str], codec: Any) -> None:
    """Writes sounds one after another, with a pause after each."""
    pause = np.zeros(round(_PAUSE_SECONDS * codec.sample_rate_hz), np.float32)
    write_wav(
        path, np.concatenate([part for waveform in waveforms for part in (waveform, pause)]), codec.sample_rate_hz
    )


def _sound_player(waveform: np.ndarray, codec: Any) -> str:
    sound = data_uri("audio/wav", wav_bytes(waveform, codec.sample_rate_hz))
    return f'<audio controls src="{sound}"></audio>'


PRESENTATIONS: dict[str, Presentation] = {
    "image": Presentation(
        ending="png",
        write=_write_picture,
        draw=draw_unknown_picture,
        picture=lambda picture, codec: enlarged(picture, enlargement(*picture.shape[:2])),
        write_together=_write_pictures,
        live=live_picture,
        quality=Quality(name="PSNR", measure=lambda real, ours, _: psnr_db(real, ours), better="higher"),
    ),
    "audio": Presentation(
        ending="wav",
        write=_write_sound,
        draw=draw_sound,
        picture=lambda waveform, codec: spectrogram_image(waveform, codec.sample_rate_hz),
        write_together=_write_sounds,
        player=_sound_player,
        quality=Quality(
            name="mel",
            measure=lambda real, ours, codec: log_mel_distance_db(real, ours, codec.sample_rate_hz),
            better="lower",
        ),
    ),
}


def presentation_of(modality: str) -> Presentation:
    """Entry of a modality in `PRESENTATIONS`. Raises ValueError if there is none."""
    if modality not in PRESENTATIONS:
        raise ValueError(
            f"no modality {modality!r} in scripts/output/presentation.py; there are {', '.join(PRESENTATIONS)}"
        )
    return PRESENTATIONS[modality]


def ending_of(modality: str) -> str:
    """Suffix of files of a modality, without a dot; "txt" for text."""
    return "txt" if modality == TEXT else presentation_of(modality).ending


def frame_of(tokenizers: MediaTokenizers, example: Example) -> Image.Image:
    """Picture of a partly known example: all its segments, one below another."""
    pictures = [
        draw_text(tokenizers, segment)
        if segment.modality == TEXT
        else presentation_of(segment.modality).draw(segment.codes, tokenizers.codec(segment.modality))
        for segment in example.segments
    ]
    width = max(picture.width for picture in pictures) + 2 * _MARGIN
    height = sum(picture.height + _MARGIN for picture in pictures) + _MARGIN
    frame = Image.new("RGB", (width, height), "white")
    top = _MARGIN
    for picture in pictures:
        frame.paste(picture, ((width - picture.width) // 2, top))
        top += picture.height + _MARGIN
    return frame
