"""Pictures and sounds, brought to the one shape that all media of a dataset have.

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
    """The picture at `shape` (height, width, channels): scaled and cropped around its centre, or stretched.

    If neither side grows, pixels are averaged (box filter); else they are interpolated (bicubic). Raises ValueError for
    a number of channels other than 1 or 3.
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
    """The picture at its dataset's shape. Raises ValueError if it has another size and none is configured."""
    if config.pictures.height is None and picture.shape[:2] != shape[:2]:
        raise ValueError(
            f"the picture is {picture.shape[1]}×{picture.shape[0]}, the first one is {shape[1]}×{shape[0]}; "
            "give --pictures.height and --pictures.width to bring all to one size"
        )
    return resize_picture(picture, shape, config.pictures.crop)


def reduce_picture_for_fitting(
    picture: UInt8[np.ndarray, "_ _ _"], first: UInt8[np.ndarray, "_ _ _"], config: MediaConfig
) -> np.ndarray:
    """The picture at the configured size, or at the size of the first of its sample, with its own channels."""
    height, width = config.pictures.height, config.pictures.width
    size = first.shape[:2] if height is None or width is None else (height, width)
    return shape_picture(picture, (*size, picture.shape[2]), config)


def shapes_of_pictures(
    samples: Mapping[str, Sequence[np.ndarray]], config: MediaConfig, reused: PatchCodec | None
) -> dict[str, list[int]]:
    """Height, width and channels of the pictures of each dataset; all have the channels of one codec."""
    channels = max(picture.shape[-1] for sample in samples.values() for picture in sample)
    if reused is not None:
        channels = reused.media_shape((1, 1))[-1]
    channels = config.pictures.channels or channels
    return {name: [*sample[0].shape[:2], channels] for name, sample in samples.items()}


def with_picture_size(config: MediaConfig, shape: tuple[int, ...], codec: Any) -> MediaConfig:
    """The configuration with the height and width of `shape`, unless it names a size."""
    if config.pictures.height is not None:
        return config
    return replace(config, pictures=replace(config.pictures, height=shape[0], width=shape[1]))


def notes_on_picture(path: Path, picture: np.ndarray, shape: tuple[int, ...], config: MediaConfig) -> list[str]:
    """Changes of colour, size and proportions when a user's picture is brought to a model's shape, in words."""
    (height, width), (old_height, old_width) = shape[:2], picture.shape[:2]
    notes = ["colour becomes grey"] if picture.shape[2] > shape[2] else []
    if (height, width) == (old_height, old_width):
        return notes
    is_cropped = config.pictures.crop and height * old_width != width * old_height
    return [*notes, f"{old_width}×{old_height} pixels become {width}×{height}{', cropped' if is_cropped else ''}"]


def describe_picture_shape(shape: tuple[int, ...], config: MediaConfig) -> str:
    """Height, width and colour of pictures in words."""
    return f"{shape[0]}×{shape[1]} {'grey' if shape[2] == 1 else 'colour'}"


def discarded_of_picture(picture: np.ndarray, shape: tuple[int, ...], config: MediaConfig) -> list[str]:
    """`["colour"]` if a picture loses its colour although the configuration does not ask for grey; else empty."""
    return ["colour"] if picture.shape[2] > shape[2] and config.pictures.channels is None else []


def cut_or_pad(waveform: Float32[np.ndarray, " _"], samples: int) -> Float32[np.ndarray, " samples"]:
    """The first `samples` samples of a waveform, padded with silence if it is shorter."""
    return np.pad(waveform, (0, max(0, samples - len(waveform))))[:samples].astype(np.float32)


def shape_sound(waveform: Float32[np.ndarray, " _"], shape: tuple[int, ...], config: MediaConfig) -> np.ndarray:
    """The waveform cut or padded to its dataset's length."""
    return cut_or_pad(waveform, shape[0])


def shapes_of_sounds(
    samples: Mapping[str, Sequence[np.ndarray]], config: MediaConfig, reused: MelCodec | None
) -> dict[str, list[int]]:
    """Number of samples of the sounds of each dataset, rounded up to whole frames of the codec.

    It is the configured length, or that of the longest sound in the dataset's sample.
    """
    codec = config.codecs["audio"]
    frame, shapes = codec.samples_per_frame, {}
    for name, sample in samples.items():
        length = max(map(len, sample))
        if config.seconds is not None:
            length = round(config.seconds * codec.sample_rate_hz)
        shapes[name] = [max(1, -(-length // frame)) * frame]
    return shapes


def with_sound_length(config: MediaConfig, shape: tuple[int, ...], codec: Any) -> MediaConfig:
    """The configuration with the length of `shape`, in seconds, unless it names a length."""
    return config if config.seconds is not None else replace(config, seconds=shape[0] / codec.sample_rate_hz)


def notes_on_sound(path: Path, waveform: np.ndarray, shape: tuple[int, ...], config: MediaConfig) -> list[str]:
    """A note on the cut part if a user's sound is longer than a model's sounds; else empty."""
    rate, seconds = config.codecs["audio"].sample_rate_hz, soundfile.info(path).duration
    if round(seconds * rate) <= shape[0]:
        return []
    return [f"only the first {shape[0] / rate:.2f} of {seconds:.2f} s are heard"]


def describe_sound_length(shape: tuple[int, ...], config: MediaConfig) -> str:
    """Length of sounds in seconds, in words."""
    return f"{shape[0] / config.codecs['audio'].sample_rate_hz:.2f} s"
