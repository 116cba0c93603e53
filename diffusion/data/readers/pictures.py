"""Picture files → uint8 arrays [height, width, channels]."""

import warnings
from pathlib import Path

import numpy as np
from jaxtyping import Num, UInt8
from PIL import ExifTags, Image, ImageFile, ImageOps, UnidentifiedImageError
from PIL.PngImagePlugin import PngImageFile
from PIL.TiffImagePlugin import TiffImageFile

from trimask.diffusion.data.reading_config import LimitConfig, MediaConfig
from trimask.tokenizers.storage.files import reading, require_regular_file

_FEWEST_GREYS = 32
"""Number of different values that must remain after the conversion to 8 bits, unless the picture has fewer."""
PICTURE_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
"""Formats of picture files that are read, by Pillow's names."""


def read_picture(
    path: Path, max_pixels: int = LimitConfig().pixels, background: str = "white"
) -> UInt8[np.ndarray, "height width channels"]:
    """A picture file with one channel if all its pixels are grey, else with three (RGB).

    It is turned upright by its EXIF orientation, and transparent pixels are blended with the background. Of several
    frames the first is read. Values of 16 bits, and of 32 bits above 255, lose their lower bits; fractions in [0, 1]
    become 0 to 255. Raises ValueError if the file cannot be read, if it has more than `max_pixels` pixels, which is
    checked before it is decoded, or if 8 bits cannot represent its values.
    """
    require_regular_file(path)
    with reading(path, "not a readable picture"), warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # max_pixels is checked instead
        with _opened(path) as file:
            if file.width * file.height > max_pixels:
                raise ValueError(
                    f"{file.width}×{file.height} pixels are more than the {max_pixels:,} of --limits.pixels"
                )
            _require_decodable(file)
            has_16_bits, is_inverted = ";16" in str(file.tile[:1]), _is_white_zero(file)
            picture: Image.Image = ImageOps.exif_transpose(file)
            picture.load()
    try:
        if picture.mode in ("I", "F") or picture.mode.startswith("I;16"):
            values = np.asarray(picture)
            return to_uint8(0xFFFF - values if is_inverted else values)[..., None]
        if has_16_bits and picture.mode in ("RGB", "RGBA"):
            _require_bright(np.asarray(picture)[..., :3])
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    if picture.has_transparency_data:
        behind = Image.new("RGBA", picture.size, background)
        behind.alpha_composite(picture.convert("RGBA"))
        picture = behind
    with reading(path, "not a readable picture"):
        pixels = np.asarray(picture.convert("RGB"), np.uint8)
    is_grey = (pixels[..., :1] == pixels).all()
    return np.ascontiguousarray(pixels[..., :1]) if is_grey else pixels


def _opened(path: Path) -> ImageFile.ImageFile:
    """A picture file, not yet decoded. Raises ValueError if its format is none of `PICTURE_FORMATS`."""
    try:
        return Image.open(path, formats=PICTURE_FORMATS)
    except UnidentifiedImageError as error:
        raise ValueError(f"not recognised as one of the formats that are read: {', '.join(PICTURE_FORMATS)}") from error


def _is_white_zero(file: ImageFile.ImageFile) -> bool:
    """Whether the file is a TIFF whose value 0 is white."""
    return isinstance(file, TiffImageFile) and file.tag_v2.get(ExifTags.Base.PhotometricInterpretation, 0) == 0


def _require_decodable(file: ImageFile.ImageFile) -> None:
    """Raises ValueError for files that Pillow decodes to wrong values without an error."""
    if isinstance(file, TiffImageFile) and file.mode == "L" and file.tag_v2.get(ExifTags.Base.SampleFormat) == (2,):
        raise ValueError("its values are signed, of 8 bits; unsigned ones are read")
    if file.mode == "F" and _is_white_zero(file):
        raise ValueError("its values are fractions of which 0 is white; those of which 0 is black are read")
    if isinstance(file, PngImageFile) and "transparency" in file.info and file.mode != "P":
        raw_mode = str(file.tile[0].args)
        if ";" in raw_mode:
            raise ValueError(
                f"one of its values is transparent, and they have {raw_mode.partition(';')[2].strip('B')} bits; "
                "convert it to 8 bits, or give it an alpha channel"
            )


def _require_bright(high_bytes: UInt8[np.ndarray, "height width 3"]) -> None:
    """Raises ValueError if colours of 16 bits are so dark that too few different high bytes remain."""
    if high_bytes.size and (highest := int(high_bytes.max())) < _FEWEST_GREYS:
        raise ValueError(
            f"its values of 16 bits are 0 to {256 * highest + 255} at most, of which 8 bits keep {highest + 1} steps; "
            "scale them to 65535 first"
        )


def to_uint8(values: Num[np.ndarray, "*shape"]) -> UInt8[np.ndarray, "*shape"]:
    """Values of more than 8 bits, or fractions in [0, 1], scaled to 0 to 255. Raises ValueError if they do not fit."""
    low, high = (float(values.min()), float(values.max())) if values.size else (0.0, 0.0)
    if not (np.isfinite(values).all() and low >= 0 and high < 1 << 16):
        raise ValueError(f"its values are {low:g} to {high:g}; 0 to 1, to 255 or to 65535 are read")
    if high > 1 and (values != np.floor(values)).any():
        raise ValueError(f"its values are fractions up to {high:g}; 0 to 1 are read")
    if values.dtype.kind == "f" and high <= 1:
        converted = np.round(255 * values).astype(np.uint8)
    else:
        has_16_bits = high > 255 or values.dtype.kind == "u"  # in either byte order
        converted = (values // 256 if has_16_bits else values).astype(np.uint8)
    greys = len(np.unique(converted))
    if greys < _FEWEST_GREYS and greys < len(np.unique(values)):
        raise ValueError(
            f"its values are {low:g} to {high:g}, of which 8 bits keep {greys} different ones; scale them first"
        )
    return converted


def read_picture_as_configured(path: Path, config: MediaConfig) -> UInt8[np.ndarray, "height width channels"]:
    """A picture file, read by `read_picture` within the configured limit of pixels."""
    return read_picture(path, config.limits.pixels)
