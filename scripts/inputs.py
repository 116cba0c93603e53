"""Files that a user gives → media of the shape a model reads; what is changed on the way is said."""

import sys
import warnings
from pathlib import Path

import librosa  # loads its parts on first use
import numpy as np
import soundfile
from jaxtyping import Float32, UInt8
from PIL import Image, ImageOps

from trimask.scripts.console import console


def read_image(path: Path, shape: tuple[int, ...]) -> UInt8[np.ndarray, "height width channels"]:
    """A picture file at this height, width and number of channels; what is transparent becomes white."""
    height, width, channels = shape
    if channels not in (1, 3):
        raise ValueError(f"{path}: this model's pictures have {channels} channels; files have 1 or 3")
    mode = "L" if channels == 1 else "RGB"
    picture = _opened(path)
    if picture.size != (width, height):
        came = f"{picture.width}×{picture.height}"
        console.print(f"{path}: {came} pixels become {width}×{height}", markup=False, highlight=False, soft_wrap=True)
    picture = picture.convert(mode)
    shrinks = picture.width >= width and picture.height >= height
    method = Image.Resampling.BOX if shrinks else Image.Resampling.BICUBIC
    return np.asarray(picture.resize((width, height), method), np.uint8).reshape(shape)


def read_audio(path: Path, sample_rate_hz: int, samples: int) -> Float32[np.ndarray, " samples"]:
    """The beginning of a sound file, mixed to mono, at this rate; silence fills what is missing."""
    _require_file(path)
    try:
        with soundfile.SoundFile(path) as file:
            rate, seconds = file.samplerate, file.frames / file.samplerate
            # A little more than is kept, so that the resampler does not see the end.
            content = file.read(int((samples / sample_rate_hz + 0.1) * rate), "float32", always_2d=True)
            is_cut_short = "(should be" in file.extra_info  # libsndfile's words where a header promises more
    except soundfile.LibsndfileError as error:
        raise ValueError(f"{path}: not a readable sound file: {error}") from error
    if not len(content):
        raise ValueError(f"{path}: holds no sound, its length is zero")
    if not np.isfinite(content).all():
        raise ValueError(f"{path}: holds NaN or infinite samples")
    mono = np.clip(content.mean(axis=1), -1, 1)
    if rate != sample_rate_hz:
        mono = librosa.resample(mono, orig_sr=rate, target_sr=sample_rate_hz, res_type="soxr_hq")
    if is_cut_short:
        held = f"the header promises more sound than the {seconds:.2f} s in the file"
        console.print(f"{path}: {held}", markup=False, highlight=False, soft_wrap=True)
    if round(seconds * sample_rate_hz) > samples:
        kept = f"only the first {samples / sample_rate_hz:.2f} of {seconds:.2f} s are heard"
        console.print(f"{path}: {kept}", markup=False, highlight=False, soft_wrap=True)
    return np.pad(mono, (0, max(0, samples - len(mono))))[:samples].astype(np.float32)


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


def _require_file(path: Path) -> None:
    if path.is_dir():
        raise IsADirectoryError(f"{path}: a folder, not a file")
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")


def _opened(path: Path) -> Image.Image:
    """A picture file in memory, upright, 8 bits deep, on white."""
    _require_file(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path) as file:
                picture: Image.Image = ImageOps.exif_transpose(file)
                picture.load()
    except Exception as error:  # a damaged file can make Pillow's readers raise almost anything
        raise ValueError(f"{path}: not a readable picture: {error}") from error
    if picture.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(picture) >> 8).astype(np.uint8))
    if not picture.has_transparency_data:
        return picture
    white = Image.new("RGBA", picture.size, "white")
    white.alpha_composite(picture.convert("RGBA"))
    return white.convert("RGB")
