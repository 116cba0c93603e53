"""Reads files that a user gives as media of the shape that a model reads, and prints what was changed in doing so.

Also reads lists of prompts.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool

from trimask.diffusion.data.modalities import modality
from trimask.diffusion.data.readers.pictures import read_picture
from trimask.diffusion.data.reading_config import MediaConfig, PictureConfig
from trimask.diffusion.data.shaping import resize_picture
from trimask.diffusion.sampling.prompts import Prompts
from trimask.scripts.console import say
from trimask.tokenizers.storage.files import path_on_disk
from trimask.tokenizers.storage.text_files import read_lines
from trimask.tokenizers.vocabulary import TEXT


def medium_reader(medium: str, prompts: Prompts) -> Callable[[Path], np.ndarray]:
    """Function that reads files of a modality as the model's training data were read, with `read_medium`."""
    codec, layout = prompts.tokenizers.codec(medium), prompts.layout(prompts.task(medium, TEXT))
    return partial(read_medium, medium, codec, prompts.media_shape(medium), layout.is_cropped)


def read_medium(medium: str, codec: Any, shape: tuple[int, ...], is_cropped: bool, path: Path) -> np.ndarray:
    """Reads a file of a modality for a codec, at a given shape, and prints what was changed.

    Raises ValueError if the file cannot be read.
    """
    kind, path = modality(medium), path_on_disk(path)
    as_trained = MediaConfig(codecs={medium: codec.config}, pictures=PictureConfig(crop=is_cropped))
    config = kind.with_media_shape(as_trained, shape, codec)
    content = kind.read(path, config)
    for note in [*kind.faults(path), *kind.conversion_notes(path, content, shape, config)]:
        say(f"{path}: {note}")
    return kind.to_shape(content, shape, config)


def read_mask(path: Path, picture: Path, shape: tuple[int, ...], is_cropped: bool) -> Bool[np.ndarray, "height width"]:
    """Mask from a picture file: True where it is bright (grey ≥ 128) and opaque.

    It is cropped and resized to this height and width like `picture`, the picture that it masks. Raises ValueError if
    the two files differ in size.
    """
    mask, masked = (read_picture(path_on_disk(file), background=b) for file, b in ((path, "black"), (picture, "white")))
    if mask.shape[:2] != masked.shape[:2]:
        sizes = [f"{width}×{height}" for height, width in (mask.shape[:2], masked.shape[:2])]
        raise ValueError(
            f"{path}: the mask is {sizes[0]} but the picture {picture} is {sizes[1]}; they must have the same size"
        )
    is_bright = (resize_picture(mask, (*mask.shape[:2], 1), is_cropped) >= 128).astype(np.uint8)
    # In a smaller picture a pixel is True if a bright pixel is part of it; in a larger one, if the nearest is bright.
    smaller = (min(mask.shape[0], shape[0]), min(mask.shape[1], shape[1]))
    if smaller == shape or not is_cropped:  # cropped, both sides shrink or none does
        is_bright = (resize_picture(255 * is_bright, (*smaller, 1), is_cropped) >= 1).astype(np.uint8)
    is_hole = resize_picture(255 * is_bright, (*shape, 1), is_cropped)[..., 0] >= 128
    if is_hole.all() or not is_hole.any():
        say(f"{path}: {'all' if is_hole.all() else 'nothing'} of {picture} is bright in the mask")
    return is_hole


def spliced(content: np.ndarray, is_hole: Bool[np.ndarray, "*where"], made: np.ndarray) -> np.ndarray:
    """The generated medium inside the hole and the given one outside; sounds are cross-faded over 101 samples."""
    if content.ndim > is_hole.ndim:
        return np.where(is_hole[..., None], made, content)
    size = min(101, len(is_hole))
    share = np.convolve(np.pad(is_hole.astype(np.float32), size // 2, mode="edge"), np.ones(size) / size, "valid")
    share = share[: len(content)].astype(np.float32)
    return share * made[: len(content)] + (1 - share) * content


def read_prompts(source: str) -> list[str]:
    """Non-blank lines of a file, or of standard input if `source` is "-". Raises ValueError if there are none."""
    prompts = [line for _, line in read_lines(source)]
    if not prompts:
        raise ValueError(f"{'standard input' if source == '-' else source}: contains no prompts")
    return prompts
