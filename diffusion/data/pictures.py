"""Picture files → arrays of one shape, and what they say to the codec that is fitted on them."""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Num, UInt8
from PIL import Image, ImageOps

from trimask.diffusion.data.media_config import LimitConfig, MediaConfig
from trimask.tokenizers.files import reading, require_regular_file
from trimask.tokenizers.image import PatchCodec, PatchConfig, single_patches

_FEWEST_STEPS = 8
"""Of grey that has at least as many, if it is to be told from one grey."""
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
"""Formats of picture files that are read, by Pillow's names."""


def read_picture(
    path: Path, max_pixels: int = LimitConfig().pixels, background: str = "white"
) -> UInt8[np.ndarray, "height width channels"]:
    """A picture file, upright, what is transparent on the background; of one channel if it is all grey, else of three.

    Of several frames it is the first. Grey values of 16 bits, and of 32 where they exceed 255, lose their lower bits;
    fractions in [0, 1] become 0 to 255. Raises ValueError if it cannot be read, has more pixels than are allowed, which
    is seen before it is decoded, or values that no conversion keeps.
    """
    require_regular_file(path)
    with reading(path, "not a readable picture"), warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # our own limit may be another
        with Image.open(path, formats=FORMATS) as file:
            if file.width * file.height > max_pixels:
                raise ValueError(
                    f"{file.width}×{file.height} pixels are more than the {max_pixels:,} of --limits.pixels"
                )
            picture: Image.Image = ImageOps.exif_transpose(file)
            picture.load()
    if picture.mode in ("I", "F") or picture.mode.startswith("I;16"):
        try:
            return _in_bytes(np.asarray(picture))[..., None]
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


def _in_bytes(values: Num[np.ndarray, "height width"]) -> UInt8[np.ndarray, "height width"]:
    """Grey values of more than 8 bits, or fractions, as bytes."""
    low, high = (float(values.min()), float(values.max())) if values.size else (0.0, 0.0)
    if not (np.isfinite(values).all() and low >= 0 and high < 1 << 16):
        raise ValueError(f"its values are {low:g} to {high:g}; 0 to 1, to 255 or to 65535 are read")
    if values.dtype.kind == "f" and high <= 1:
        made = np.round(255 * values)
    else:
        made = np.floor(values / 256) if high > 255 or values.dtype == np.uint16 else values
    steps = int(np.ptp(made)) if made.size else 0
    if steps < _FEWEST_STEPS <= high - low:
        raise ValueError(f"its values are {low:g} to {high:g}, of which 8 bits keep {steps} steps; scale them first")
    return made.astype(np.uint8)


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
    return PatchCodec.fit(np.concatenate([single_patches(batch, config.patch_side) for batch in samples]), config)


def as_given(config: MediaConfig, shape: tuple[int, ...], codec: Any) -> MediaConfig:
    """The configuration with the size that pictures have elsewhere, where it says none."""
    if config.pictures.height is not None:
        return config
    return replace(config, pictures=replace(config.pictures, height=shape[0], width=shape[1]))


def notes(path: Path, picture: np.ndarray, shape: tuple[int, ...], config: MediaConfig) -> list[str]:
    """What is changed when a user's picture is brought to a model's shape."""
    (height, width), (came_height, came_width) = shape[:2], picture.shape[:2]
    if (height, width) == (came_height, came_width):
        return []
    loses = config.pictures.crop and height * came_width != width * came_height
    return [f"{came_width}×{came_height} pixels become {width}×{height}{', cropped' if loses else ''}"]


def shown(shape: tuple[int, ...], config: MediaConfig) -> str:
    """Height, width and channels in words."""
    return f"{shape[0]}×{shape[1]} {'grey' if shape[2] == 1 else 'colour'}"


def lost(picture: np.ndarray, shape: tuple[int, ...], config: MediaConfig) -> list[str]:
    """Colour, where the model's pictures are grey and no one asked for that."""
    return ["colour"] if picture.shape[2] > shape[2] and config.pictures.channels is None else []
