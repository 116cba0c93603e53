"""Picture files → arrays of one shape, and what they say to the codec that is fitted on them."""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Num, UInt8
from PIL import ExifTags, Image, ImageFile, ImageOps, UnidentifiedImageError
from PIL.PngImagePlugin import PngImageFile
from PIL.TiffImagePlugin import TiffImageFile

from trimask.diffusion.data.reading_config import LimitConfig, MediaConfig
from trimask.tokenizers.image import PatchCodec, PatchConfig, patches_as_images
from trimask.tokenizers.storage.files import reading, require_regular_file

_FEWEST_GREYS = 32
"""Number of greys that 8 bits must keep of a picture with at least as many; of one with fewer they must keep all."""
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
"""Formats of picture files that are read, by Pillow's names."""


def read_picture(
    path: Path, max_pixels: int = LimitConfig().pixels, background: str = "white"
) -> UInt8[np.ndarray, "height width channels"]:
    """A picture file, upright, what is transparent on the background; of one channel if it is all grey, else of three.

    Of several frames it is the first. Values of 16 bits, and of 32 where they exceed 255, lose their lower bits;
    fractions in [0, 1] become 0 to 255. Raises ValueError if it cannot be read, has more pixels than are allowed, which
    is seen before it is decoded, or values that no conversion keeps.
    """
    require_regular_file(path)
    with reading(path, "not a readable picture"), warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # our own limit may be another
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
            return in_bytes(0xFFFF - values if is_inverted else values)[..., None]
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
    """The picture file, not yet decoded. Raises ValueError if it is of none of the formats."""
    try:
        return Image.open(path, formats=FORMATS)
    except UnidentifiedImageError as error:
        raise ValueError(f"not recognised as one of the formats that are read: {', '.join(FORMATS)}") from error


def _is_white_zero(file: ImageFile.ImageFile) -> bool:
    return isinstance(file, TiffImageFile) and file.tag_v2.get(ExifTags.Base.PhotometricInterpretation, 0) == 0


def _require_decodable(file: ImageFile.ImageFile) -> None:
    """Raises ValueError for what Pillow decodes to other values than the file's, and says nothing."""
    if isinstance(file, TiffImageFile) and file.mode == "L" and file.tag_v2.get(ExifTags.Base.SampleFormat) == (2,):
        raise ValueError("its values are signed, of 8 bits; unsigned ones are read")
    if file.mode == "F" and _is_white_zero(file):
        raise ValueError("its values are fractions of which 0 is white; those of which 0 is black are read")
    if isinstance(file, PngImageFile) and "transparency" in file.info and file.mode != "P":
        raw_mode = str(file.tile[0].args)
        if ";" in raw_mode:
            raise ValueError(
                f"one of its values is transparent, and they have {raw_mode.partition(';')[2].strip('B')} bits; "
                "this is read of 8 bits, and a channel for transparency of any"
            )


def _require_bright(high_bytes: UInt8[np.ndarray, "height width 3"]) -> None:
    """Raises ValueError for colours of 16 bits that are too small for their high bytes to tell them apart."""
    if high_bytes.size and (highest := int(high_bytes.max())) < _FEWEST_GREYS:
        raise ValueError(
            f"its values of 16 bits are 0 to {256 * highest + 255} at most, of which 8 bits keep {highest + 1} steps; "
            "scale them to 65535 first"
        )


def in_bytes(values: Num[np.ndarray, "*shape"]) -> UInt8[np.ndarray, "*shape"]:
    """Values of more than 8 bits, or fractions, as bytes. Raises ValueError where they would not be kept."""
    low, high = (float(values.min()), float(values.max())) if values.size else (0.0, 0.0)
    if not (np.isfinite(values).all() and low >= 0 and high < 1 << 16):
        raise ValueError(f"its values are {low:g} to {high:g}; 0 to 1, to 255 or to 65535 are read")
    if high > 1 and (values != np.floor(values)).any():
        raise ValueError(f"its values are fractions up to {high:g}; 0 to 1 are read")
    if values.dtype.kind == "f" and high <= 1:
        made = np.round(255 * values).astype(np.uint8)
    else:
        has_16_bits = high > 255 or values.dtype.kind == "u"  # in whichever order of bytes
        made = (values // 256 if has_16_bits else values).astype(np.uint8)
    greys = len(np.unique(made))
    if greys < _FEWEST_GREYS and greys < len(np.unique(values)):
        raise ValueError(
            f"its values are {low:g} to {high:g}, of which 8 bits keep {greys} different ones; scale them first"
        )
    return made


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


def read(path: Path, config: MediaConfig) -> UInt8[np.ndarray, "height width channels"]:
    """A picture file, as `read_picture` reads it."""
    return read_picture(path, config.limits.pixels)


def at_shape(picture: UInt8[np.ndarray, "_ _ _"], shape: tuple[int, ...], config: MediaConfig) -> np.ndarray:
    """The picture at a dataset's shape. Raises ValueError for another size where none was configured."""
    if config.pictures.height is None and picture.shape[:2] != shape[:2]:
        raise ValueError(
            f"the picture is {picture.shape[1]}×{picture.shape[0]}, the first one is {shape[1]}×{shape[0]}; "
            "give --pictures.height and --pictures.width to bring all to one size"
        )
    return fit_picture(picture, shape, config.pictures.crop)


def sampled(picture: UInt8[np.ndarray, "_ _ _"], first: UInt8[np.ndarray, "_ _ _"], config: MediaConfig) -> np.ndarray:
    """The picture at the configured size, or at that of the first of its sample, with its own channels."""
    height, width = config.pictures.height, config.pictures.width
    size = first.shape[:2] if height is None or width is None else (height, width)
    return at_shape(picture, (*size, picture.shape[2]), config)


def shapes(
    samples: Mapping[str, Sequence[np.ndarray]], config: MediaConfig, given: PatchCodec | None
) -> dict[str, list[int]]:
    """Height, width and channels of each dataset; all have the channels of one codec."""
    channels = max(picture.shape[-1] for sample in samples.values() for picture in sample)
    if given is not None:
        channels = given.media_shape((1, 1))[-1]
    channels = config.pictures.channels or channels
    return {name: [*sample[0].shape[:2], channels] for name, sample in samples.items()}


def fit(samples: Sequence[UInt8[np.ndarray, "_ _ _ _"]], config: PatchConfig) -> PatchCodec:
    """The codec fitted on all pictures of several sizes."""
    return PatchCodec.fit(np.concatenate([patches_as_images(batch, config.patch_side) for batch in samples]), config)


def as_given(config: MediaConfig, shape: tuple[int, ...], codec: Any) -> MediaConfig:
    """The configuration with the size that pictures have elsewhere, where it says none."""
    if config.pictures.height is not None:
        return config
    return replace(config, pictures=replace(config.pictures, height=shape[0], width=shape[1]))


def notes(path: Path, picture: np.ndarray, shape: tuple[int, ...], config: MediaConfig) -> list[str]:
    """What is changed when a user's picture is brought to a model's shape."""
    (height, width), (came_height, came_width) = shape[:2], picture.shape[:2]
    said = ["colour becomes grey"] if picture.shape[2] > shape[2] else []
    if (height, width) == (came_height, came_width):
        return said
    loses = config.pictures.crop and height * came_width != width * came_height
    return [*said, f"{came_width}×{came_height} pixels become {width}×{height}{', cropped' if loses else ''}"]


def shown(shape: tuple[int, ...], config: MediaConfig) -> str:
    """Height, width and channels in words."""
    return f"{shape[0]}×{shape[1]} {'grey' if shape[2] == 1 else 'colour'}"


def lost(picture: np.ndarray, shape: tuple[int, ...], config: MediaConfig) -> list[str]:
    """Colour, where the model's pictures are grey and no one asked for that."""
    return ["colour"] if picture.shape[2] > shape[2] and config.pictures.channels is None else []
