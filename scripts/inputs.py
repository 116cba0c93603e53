"""Files that a user gives → media of the shape a model reads; what is changed on the way is said."""

import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Float32, UInt8

from trimask.diffusion.data.files import fit_picture, fit_sound, read_picture, read_sound
from trimask.diffusion.sampling.prompts import Prompts
from trimask.scripts.console import console
from trimask.tokenizers.vocabulary import TEXT


def read_image(path: Path, shape: tuple[int, ...], is_cropped: bool) -> UInt8[np.ndarray, "height width channels"]:
    """A picture file at this height, width and number of channels."""
    picture = read_picture(path)
    (height, width), (came_height, came_width) = shape[:2], picture.shape[:2]
    if (height, width) != (came_height, came_width):
        loses = is_cropped and height * came_width != width * came_height
        _say(path, f"{came_width}×{came_height} pixels become {width}×{height}{', cropped' if loses else ''}")
    return fit_picture(picture, shape, is_cropped)


def read_audio(path: Path, sample_rate_hz: int, samples: int) -> Float32[np.ndarray, " samples"]:
    """The beginning of a sound file, mixed to mono, at this rate; silence fills what is missing."""
    sound = read_sound(path, sample_rate_hz, samples / sample_rate_hz)
    if sound.is_cut_short:
        _say(path, f"the header promises more sound than the {sound.seconds:.2f} s in the file")
    if round(sound.seconds * sample_rate_hz) > samples:
        _say(path, f"only the first {samples / sample_rate_hz:.2f} of {sound.seconds:.2f} s are heard")
    return fit_sound(sound.waveform, samples)


def medium_reader(medium: str, prompts: Prompts) -> Callable[[Path], np.ndarray]:
    """Reads files as the model was trained on such media."""
    shape = prompts.media_shape(medium)
    if medium == "image":
        is_cropped = prompts.layout(prompts.task(medium, TEXT)).is_cropped
        return lambda path: read_image(path, shape, is_cropped)
    return lambda path: read_audio(path, prompts.tokenizers.sample_rate_hz, shape[0])


def read_mask(path: Path, shape: tuple[int, ...]) -> Bool[np.ndarray, "height width"]:
    """True where a picture file is bright, at this height and width."""
    picture = fit_picture(read_picture(path), (*shape, 1), False)
    return picture[..., 0] >= 128


def spliced(content: np.ndarray, is_hole: Bool[np.ndarray, "*where"], made: np.ndarray) -> np.ndarray:
    """What was made inside the hole and what was given outside; in sound, with a hundred samples of transition."""
    if content.ndim > is_hole.ndim:
        return np.where(is_hole[..., None], made, content)
    size = min(101, len(is_hole))
    share = np.convolve(np.pad(is_hole.astype(np.float32), size // 2, mode="edge"), np.ones(size) / size, "valid")
    share = share[: len(content)].astype(np.float32)
    return share * made[: len(content)] + (1 - share) * content


def read_lines(source: str) -> list[str]:
    """The prompts of a file or of standard input."""
    try:
        text = sys.stdin.read() if source == "-" else Path(source).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{source}: not UTF-8 text: {error}") from error
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if not lines:
        raise ValueError(f"{'standard input' if source == '-' else source}: holds no prompts")
    return lines


def _say(path: Path, what: str) -> None:
    console.print(f"{path}: {what}", markup=False, highlight=False, soft_wrap=True)
