"""Files that a user gives → media of the shape a model reads; what is changed on the way is said."""

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
from trimask.tokenizers.storage.files import on_disk
from trimask.tokenizers.storage.text_files import read_lines
from trimask.tokenizers.vocabulary import TEXT


def medium_reader(medium: str, prompts: Prompts) -> Callable[[Path], np.ndarray]:
    """Reads files as the model was trained on such media, and says what is changed on the way."""
    codec, layout = prompts.tokenizers.codec(medium), prompts.layout(prompts.task(medium, TEXT))
    return partial(read_medium, medium, codec, prompts.media_shape(medium), layout.is_cropped)


def read_medium(medium: str, codec: Any, shape: tuple[int, ...], is_cropped: bool, path: Path) -> np.ndarray:
    """A file of a modality, as its codec reads it and at this shape; what is changed on the way is said."""
    kind, path = modality(medium), on_disk(path)
    as_trained = MediaConfig(codecs={medium: codec.config}, pictures=PictureConfig(crop=is_cropped))
    config = kind.with_media_shape(as_trained, shape, codec)
    content = kind.read(path, config)
    for note in [*kind.faults(path), *kind.conversion_notes(path, content, shape, config)]:
        say(f"{path}: {note}")
    return kind.to_shape(content, shape, config)


def read_mask(path: Path, picture: Path, shape: tuple[int, ...], is_cropped: bool) -> Bool[np.ndarray, "height width"]:
    """True where a picture file is bright and opaque, brought to this height and width as the picture is that it masks.

    Raises ValueError if the two are not of one size.
    """
    mask, masked = (read_picture(on_disk(file), background=b) for file, b in ((path, "black"), (picture, "white")))
    if mask.shape[:2] != masked.shape[:2]:
        sizes = [f"{width}×{height}" for height, width in (mask.shape[:2], masked.shape[:2])]
        raise ValueError(
            f"{path}: the mask is {sizes[0]}, and the picture {picture} is {sizes[1]}; make them of one size"
        )
    is_bright = (resize_picture(mask, (*mask.shape[:2], 1), is_cropped) >= 128).astype(np.uint8)
    # Of a smaller picture whatever a bright pixel is part of; of a larger one what is nearest to one.
    smaller = (min(mask.shape[0], shape[0]), min(mask.shape[1], shape[1]))
    if smaller == shape or not is_cropped:  # cropped, both sides shrink or none does
        is_bright = (resize_picture(255 * is_bright, (*smaller, 1), is_cropped) >= 1).astype(np.uint8)
    is_hole = resize_picture(255 * is_bright, (*shape, 1), is_cropped)[..., 0] >= 128
    if is_hole.all() or not is_hole.any():
        say(f"{path}: {'all' if is_hole.all() else 'nothing'} of {picture} is bright in the mask")
    return is_hole


def spliced(content: np.ndarray, is_hole: Bool[np.ndarray, "*where"], made: np.ndarray) -> np.ndarray:
    """What was made inside the hole and what was given outside; in sound, with a hundred samples of transition."""
    if content.ndim > is_hole.ndim:
        return np.where(is_hole[..., None], made, content)
    size = min(101, len(is_hole))
    share = np.convolve(np.pad(is_hole.astype(np.float32), size // 2, mode="edge"), np.ones(size) / size, "valid")
    share = share[: len(content)].astype(np.float32)
    return share * made[: len(content)] + (1 - share) * content


def read_prompts(source: str) -> list[str]:
    """The lines of a file, or of standard input where it is called -, that are not blank."""
    prompts = [line for _, line in read_lines(source)]
    if not prompts:
        raise ValueError(f"{'standard input' if source == '-' else source}: holds no prompts")
    return prompts
