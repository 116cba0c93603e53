"""Picture files → arrays of one shape, and what they say to the codec that is fitted on them."""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageOps

from trimask.diffusion.data.media_config import LimitConfig, MediaConfig
from trimask.tokenizers.files import reading, require_regular_file
from trimask.tokenizers.image import PatchCodec, PatchConfig, single_patches

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
"""Formats of picture files that are read, by Pillow's names."""


def read_picture(path: Path, max_pixels: int = LimitConfig().pixels) -> UInt8[np.ndarray, "height width channels"]:
    """A picture file, upright, on white, of one channel if it is grey and three if it is not.

    Raises ValueError if it cannot be read, or has more pixels than are allowed, which is seen before it is decoded.
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
    is_grey = picture.mode in ("1", "L", "LA", "La", "I", "F") or picture.mode.startswith("I;16")
    if picture.mode.startswith("I;16"):
        picture = Image.fromarray((np.asarray(picture) >> 8).astype(np.uint8))
    if picture.has_transparency_data:
        white = Image.new("RGBA", picture.size, "white")
        white.alpha_composite(picture.convert("RGBA"))
        picture = white
    pixels = np.asarray(picture.convert("L" if is_grey else "RGB"), np.uint8)
    return pixels.reshape(*pixels.shape[:2], -1)


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
