"""Picture and sound files → arrays, and arrays → the one shape that a model reads."""

import warnings
from dataclasses import dataclass
from pathlib import Path

import librosa  # loads its parts on first use
import numpy as np
import soundfile
from jaxtyping import Float32, UInt8
from PIL import Image, ImageOps


@dataclass(frozen=True)
class Sound:
    """What a sound file holds."""

    waveform: Float32[np.ndarray, " samples"]
    """Mono, at the rate that was asked for."""
    seconds: float
    """Length of the whole file, of which `waveform` may be the beginning."""
    is_cut_short: bool
    """True where the header promises more sound than the file has."""


def read_picture(path: Path) -> UInt8[np.ndarray, "height width channels"]:
    """A picture file, upright, on white, of one channel if it is grey and three if it is not."""
    _require_file(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path, formats=("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")) as file:
                picture: Image.Image = ImageOps.exif_transpose(file)
                picture.load()
    except Exception as error:  # a damaged file can make Pillow's readers raise almost anything
        raise ValueError(f"{path}: not a readable picture: {error}") from error
    is_grey = picture.mode in ("1", "L", "LA", "La", "I", "F") or picture.mode.startswith("I;16")
    if picture.mode.startswith("I;16"):
        picture = Image.fromarray((np.asarray(picture) >> 8).astype(np.uint8))
    if picture.has_transparency_data:
        white = Image.new("RGBA", picture.size, "white")
        white.alpha_composite(picture.convert("RGBA"))
        picture = white
    pixels = np.asarray(picture.convert("L" if is_grey else "RGB"), np.uint8)
    return pixels.reshape(*pixels.shape[:2], -1)


def read_sound(path: Path, sample_rate_hz: int, max_seconds: float | None = None) -> Sound:
    """A sound file, or its beginning, mixed to mono and resampled."""
    _require_file(path)
    try:
        with soundfile.SoundFile(path) as file:
            rate, seconds = file.samplerate, file.frames / file.samplerate
            # A little more than is kept, so that the resampler does not see the end.
            wanted = -1 if max_seconds is None else int((max_seconds + 0.1) * rate)
            content = file.read(wanted, "float32", always_2d=True)
            is_cut_short = "(should be" in file.extra_info  # libsndfile's words where a header promises more
    except soundfile.LibsndfileError as error:
        raise ValueError(f"{path}: not a readable sound file: {error}") from error
    if not len(content):
        raise ValueError(f"{path}: holds no sound, its length is zero")
    if not np.isfinite(content).all():
        raise ValueError(f"{path}: holds NaN or infinite samples")
    return Sound(resampled(content.mean(axis=1), rate, sample_rate_hz), seconds, is_cut_short)


def resampled(mono: np.ndarray, rate_hz: int, sample_rate_hz: int) -> Float32[np.ndarray, " samples"]:
    """A waveform at another rate, kept in [-1, 1]."""
    mono = np.clip(mono, -1, 1).astype(np.float32)
    if rate_hz != sample_rate_hz:
        mono = librosa.resample(mono, orig_sr=rate_hz, target_sr=sample_rate_hz, res_type="soxr_hq")
    return np.clip(mono, -1, 1)


def fit_picture(
    picture: UInt8[np.ndarray, "_ _ _"], shape: tuple[int, ...], is_cropped: bool
) -> UInt8[np.ndarray, "height width channels"]:
    """The picture at this height, width and number of channels.

    Cropped, it keeps its proportions and loses what sticks out on two sides; else it is stretched.
    """
    if picture.shape == shape:
        return picture
    height, width, channels = shape
    if channels not in (1, 3):
        raise ValueError(f"this model's pictures have {channels} channels; files have 1 or 3")
    image = Image.fromarray(picture[..., 0] if picture.shape[-1] == 1 else picture)
    image = image.convert("L" if channels == 1 else "RGB")
    shrinks = image.width >= width and image.height >= height
    method = Image.Resampling.BOX if shrinks else Image.Resampling.BICUBIC
    image = ImageOps.fit(image, (width, height), method) if is_cropped else image.resize((width, height), method)
    return np.asarray(image, np.uint8).reshape(shape)


def fit_sound(waveform: Float32[np.ndarray, " _"], samples: int) -> Float32[np.ndarray, " samples"]:
    """The beginning of a waveform; silence fills what is missing."""
    return np.pad(waveform, (0, max(0, samples - len(waveform))))[:samples].astype(np.float32)


def _require_file(path: Path) -> None:
    if path.is_dir():
        raise IsADirectoryError(f"{path}: a folder, not a file")
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
