"""Table of modalities beside text: how the files of each are read, brought to one shape, and fitted with a codec.

A new modality is a codec and a reader, a line in the table of kinds of `tokenizers/codec.py`, an entry here, and an
entry in `scripts/output/presentation.py`, which says how it is written and drawn. All other code looks modalities up in
these tables, and its errors name the table that lacks an entry.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float32, UInt8

from trimask.diffusion.data import shaping
from trimask.diffusion.data.readers import pictures, sounds
from trimask.diffusion.data.reading_config import MediaConfig
from trimask.diffusion.data.records import RawExample
from trimask.tokenizers.audio import MelCodec, MelConfig
from trimask.tokenizers.image import PatchCodec, PatchConfig, patches_as_images

Medium = np.ndarray
"""A picture, a waveform, …"""


def _unchanged(medium: Medium, first: Medium, config: MediaConfig) -> Medium:
    return medium


def _none(*_: Any) -> list[str]:
    return []


def _sizes(shape: tuple[int, ...], config: MediaConfig) -> str:
    return "×".join(map(str, shape))


def _as_it_is(config: MediaConfig, shape: tuple[int, ...], codec: Any) -> MediaConfig:
    return config


@dataclass(frozen=True, kw_only=True)
class Modality:
    """One modality. Functions raise ValueError, in words, where a medium cannot be used."""

    codec_config: type
    """Class of the configuration with which its codec is fitted; its values are flags of `trimask prepare`."""
    read: Callable[[Path, MediaConfig], Medium]
    """A file as an array."""
    shapes: Callable[[Mapping[str, Sequence[Medium]], MediaConfig, Any], dict[str, list[int]]]
    """Shape of all media of each dataset, from samples of them, and the codec if one is given: else None."""
    at_shape: Callable[[Medium, tuple[int, ...], MediaConfig], Medium]
    """A medium at its dataset's shape."""
    fit: Callable[[Sequence[Medium], Any], Any]
    """The codec, from a batch of training media of each dataset and the codec's configuration."""
    sampled: Callable[[Medium, Medium, MediaConfig], Medium] = _unchanged
    """A medium as it is kept for fitting, given the first of its sample: smaller ones take less memory."""
    as_given: Callable[[MediaConfig, tuple[int, ...], Any], MediaConfig] = _as_it_is
    """The configuration with the shape that media have in a run or in data whose tokenizers are taken over."""
    faults: Callable[[Path], list[str]] = _none
    """What is wrong with a file that can be read. As training data it is refused; as a prompt it is used."""
    notes: Callable[[Path, Medium, tuple[int, ...], MediaConfig], list[str]] = _none
    """What is changed when a user's file is brought to a model's shape."""
    lost: Callable[[Medium, tuple[int, ...], MediaConfig], list[str]] = _none
    """What a medium loses at its dataset's shape though nobody asked for it, in a word each."""
    shown: Callable[[tuple[int, ...], MediaConfig], str] = _sizes
    """The shape of a dataset's media in words."""


def _fit_pictures(samples: Sequence[UInt8[np.ndarray, "_ _ _ _"]], config: PatchConfig) -> PatchCodec:
    """The codec fitted on all pictures of several sizes."""
    return PatchCodec.fit(np.concatenate([patches_as_images(batch, config.patch_side) for batch in samples]), config)


def _fit_sounds(samples: Sequence[Float32[np.ndarray, "_ _"]], config: MelConfig) -> MelCodec:
    """The codec fitted on all sounds, of which the shorter ones end in silence."""
    longest = max(batch.shape[1] for batch in samples)
    return MelCodec.fit(np.concatenate([np.pad(b, ((0, 0), (0, longest - b.shape[1]))) for b in samples]), config)


MODALITIES: dict[str, Modality] = {
    "image": Modality(
        codec_config=PatchConfig,
        read=pictures.read,
        shapes=shaping.shapes_of_pictures,
        at_shape=shaping.shape_picture,
        fit=_fit_pictures,
        sampled=shaping.picture_for_fitting,
        as_given=shaping.with_given_picture_size,
        notes=shaping.notes_on_picture,
        lost=shaping.lost_of_picture,
        shown=shaping.picture_shape_in_words,
    ),
    "audio": Modality(
        codec_config=MelConfig,
        read=sounds.read,
        shapes=shaping.shapes_of_sounds,
        at_shape=shaping.shape_sound,
        fit=_fit_sounds,
        as_given=shaping.with_given_sound_length,
        faults=sounds.faults,
        notes=shaping.notes_on_sound,
        shown=shaping.sound_length_in_words,
    ),
}


def modality(name: str) -> Modality:
    """The entry of a modality. Raises ValueError if there is none."""
    if name not in MODALITIES:
        raise ValueError(f"no modality {name!r} in diffusion/data/modalities.py; there are {', '.join(MODALITIES)}")
    return MODALITIES[name]


def shape_example(
    example: RawExample, medium: str | None, shape: Sequence[int], config: MediaConfig
) -> tuple[RawExample, list[str]]:
    """The example with its medium at a dataset's shape, and what the medium loses by that though nobody asked for it.

    Raises ValueError, with the id of the example, if the medium cannot be brought to the shape.
    """
    if medium is None:
        return example, []
    own, content = modality(medium), example.media[medium]
    try:
        shaped = own.at_shape(content, tuple(shape), config)
    except ValueError as error:
        raise ValueError(f"{example.id}: {error}") from error
    lost = own.lost(content, tuple(shape), config)
    return RawExample(example.id, {**example.media, medium: shaped}, example.given), lost
