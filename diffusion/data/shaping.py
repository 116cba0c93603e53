"""Brings pictures and sounds to the one shape that all media of a dataset have.

Pictures are resized, and cropped or stretched; sounds are cut, or padded with silence.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
from jaxtyping import Float32, UInt8
from PIL import Image, ImageOps

from trimask.diffusion.data.reading_config import MediaConfig
from trimask.tokenizers.audio import MelCodec
from trimask.tokenizers.image import PatchCodec


def resize_picture(
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


def shape_picture(picture: UInt8[np.ndarray, "_ _ _"], shape: tuple[int, ...], config: MediaConfig) -> np.ndarray:
    """The picture at a dataset's shape. Raises ValueError for another size where none was configured."""
    if config.pictures.height is None and picture.shape[:2] != shape[:2]:
        raise ValueError(
            f"the picture is {picture.shape[1]}×{picture.shape[0]}, the first one is {shape[1]}×{shape[0]}; "
            "give --pictures.height and --pictures.width to bring all to one size"
        )
    return resize_picture(picture, shape, config.pictures.crop)


def picture_for_fitting(
    picture: UInt8[np.ndarray, "_ _ _"], first: UInt8[np.ndarray, "_ _ _"], config: MediaConfig
) -> np.ndarray:
    """The picture at the configured size, or at that of the first of its sample, with its own channels."""
    height, width = config.pictures.height, config.pictures.width
    size = first.shape[:2] if height is None or width is None else (height, width)
    return shape_picture(picture, (*size, picture.shape[2]), config)


def shapes_of_pictures(
    samples: Mapping[str, Sequence[np.ndarray]], config: MediaConfig, given: PatchCodec | None
) -> dict[str, list[int]]:
    """Height, width and channels of each dataset; all have the channels of one codec."""
    channels = max(picture.shape[-1] for sample in samples.values() for picture in sample)
    if given is not None:
        channels = given.media_shape((1, 1))[-1]
    channels = config.pictures.channels or channels
    return {name: [*sample[0].shape[:2], channels] for name, sample in samples.items()}


def with_given_picture_size(config: MediaConfig, shape: tuple[int, ...], codec: Any) -> MediaConfig:
    """The configuration with the size that pictures have elsewhere, where it says none."""
    if config.pictures.height is not None:
        return config
    return replace(config, pictures=replace(config.pictures, height=shape[0], width=shape[1]))


def notes_on_picture(path: Path, picture: np.ndarray, shape: tuple[int, ...], config: MediaConfig) -> list[str]:
    """What is changed when a user's picture is brought to a model's shape."""
    (height, width), (came_height, came_width) = shape[:2], picture.shape[:2]
    said = ["colour becomes grey"] if picture.shape[2] > shape[2] else []
    if (height, width) == (came_height, came_width):
        return said
    loses = config.pictures.crop and height * came_width != width * came_height
    return [*said, f"{came_width}×{came_height} pixels become {width}×{height}{', cropped' if loses else ''}"]


def picture_shape_in_words(shape: tuple[int, ...], config: MediaConfig) -> str:
    """Height, width and channels in words."""
    return f"{shape[0]}×{shape[1]} {'grey' if shape[2] == 1 else 'colour'}"


def lost_of_picture(picture: np.ndarray, shape: tuple[int, ...], config: MediaConfig) -> list[str]:
    """Colour, where the model's pictures are grey and no one asked for that."""
    return ["colour"] if picture.shape[2] > shape[2] and config.pictures.channels is None else []


def cut_or_pad(waveform: Float32[np.ndarray, " _"], samples: int) -> Float32[np.ndarray, " samples"]:
    """The beginning of a waveform; silence fills what is missing."""
    return np.pad(waveform, (0, max(0, samples - len(waveform))))[:samples].astype(np.float32)


def shape_sound(waveform: Float32[np.ndarray, " _"], shape: tuple[int, ...], config: MediaConfig) -> np.ndarray:
    """The waveform at a dataset's length."""
    return cut_or_pad(waveform, shape[0])


def shapes_of_sounds(
    samples: Mapping[str, Sequence[np.ndarray]], config: MediaConfig, given: MelCodec | None
) -> dict[str, list[int]]:
    """Samples of each dataset's sounds: as configured, else of its longest, in whole frames of the codec."""
    codec = config.codecs["audio"]
    frame, found = codec.samples_per_frame, {}
    for name, sample in samples.items():
        samples_each = max(map(len, sample))
        if config.seconds is not None:
            samples_each = round(config.seconds * codec.sample_rate_hz)
        found[name] = [max(1, -(-samples_each // frame)) * frame]
    return found


def with_given_sound_length(config: MediaConfig, shape: tuple[int, ...], codec: Any) -> MediaConfig:
    """The configuration with the length that sounds have elsewhere, where it says none."""
    return config if config.seconds is not None else replace(config, seconds=shape[0] / codec.sample_rate_hz)


def notes_on_sound(path: Path, waveform: np.ndarray, shape: tuple[int, ...], config: MediaConfig) -> list[str]:
    """What is left out when a user's sound is brought to a model's length."""
    rate, seconds = config.codecs["audio"].sample_rate_hz, soundfile.info(path).duration
    if round(seconds * rate) <= shape[0]:
        return []
    return [f"only the first {shape[0] / rate:.2f} of {seconds:.2f} s are heard"]


def sound_length_in_words(shape: tuple[int, ...], config: MediaConfig) -> str:
    """A length in words."""
    return f"{shape[0] / config.codecs['audio'].sample_rate_hz:.2f} s"
