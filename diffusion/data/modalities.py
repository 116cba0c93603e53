"""Table of the modalities beside text: how their files are read and shaped, and how their codec is fitted.

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
"""Array of one picture, waveform or other medium."""


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
    """Functions of one modality. They raise ValueError, with the reason, for a medium that cannot be used."""

    codec_config: type
    """Class of the codec's configuration, whose fields are flags of `trimask prepare`."""
    read: Callable[[Path, MediaConfig], Medium]
    """(file, configuration) → its medium."""
    dataset_shapes: Callable[[Mapping[str, Sequence[Medium]], MediaConfig, Any], dict[str, list[int]]]
    """(dataset → sample of its media, configuration, reused codec or None) → dataset → shape of all its media."""
    to_shape: Callable[[Medium, tuple[int, ...], MediaConfig], Medium]
    """(medium, its dataset's shape, configuration) → the medium at that shape."""
    fit_codec: Callable[[Sequence[Medium], Any], Any]
    """(a batch of training media of each dataset, configuration of the codec) → the fitted codec."""
    reduce_for_fitting: Callable[[Medium, Medium, MediaConfig], Medium] = _unchanged
    """(medium, first medium of its sample, configuration) → the medium as it is kept in memory until codecs are fitted.
    A smaller array saves memory."""
    with_media_shape: Callable[[MediaConfig, tuple[int, ...], Any], MediaConfig] = _as_it_is
    """(configuration, shape of media of a run or of prepared data, its codec) → the configuration with that shape,
    unless it names another."""
    faults: Callable[[Path], list[str]] = _none
    """(file) → defects of a file that can be read nevertheless. Training data with defects are refused; a prompt is
    used, with a warning."""
    conversion_notes: Callable[[Path, Medium, tuple[int, ...], MediaConfig], list[str]] = _none
    """(file, its medium, a model's shape, configuration) → what the user should know about the conversion to that
    shape."""
    discarded: Callable[[Medium, tuple[int, ...], MediaConfig], list[str]] = _none
    """(medium, its dataset's shape, configuration) → what the medium loses at that shape although the configuration
    does not ask for it, one word each."""
    describe_shape: Callable[[tuple[int, ...], MediaConfig], str] = _sizes
    """(shape of a dataset's media, configuration) → the shape in words."""


def _fit_pictures(samples: Sequence[UInt8[np.ndarray, "_ _ _ _"]], config: PatchConfig) -> PatchCodec:
    """Codec fitted on all pictures, which may differ in size between batches."""
    return PatchCodec.fit(np.concatenate([patches_as_images(batch, config.patch_side) for batch in samples]), config)


def _fit_sounds(samples: Sequence[Float32[np.ndarray, "_ _"]], config: MelConfig) -> MelCodec:
    """Codec fitted on all sounds; shorter ones are padded with silence."""
    longest = max(batch.shape[1] for batch in samples)
    return MelCodec.fit(np.concatenate([np.pad(b, ((0, 0), (0, longest - b.shape[1]))) for b in samples]), config)


MODALITIES: dict[str, Modality] = {
    "image": Modality(
        codec_config=PatchConfig,
        read=pictures.read_picture_as_configured,
        dataset_shapes=shaping.shapes_of_pictures,
        to_shape=shaping.shape_picture,
        fit_codec=_fit_pictures,
        reduce_for_fitting=shaping.reduce_picture_for_fitting,
        with_media_shape=shaping.with_picture_size,
        conversion_notes=shaping.notes_on_picture,
        discarded=shaping.discarded_of_picture,
        describe_shape=shaping.describe_picture_shape,
    ),
    "audio": Modality(
        codec_config=MelConfig,
        read=sounds.read_sound_as_configured,
        dataset_shapes=shaping.shapes_of_sounds,
        to_shape=shaping.shape_sound,
        fit_codec=_fit_sounds,
        with_media_shape=shaping.with_sound_length,
        faults=sounds.sound_faults,
        conversion_notes=shaping.notes_on_sound,
        describe_shape=shaping.describe_sound_length,
    ),
}


def modality(name: str) -> Modality:
    """Entry of a modality in `MODALITIES`. Raises ValueError if there is none."""
    if name not in MODALITIES:
        raise ValueError(f"no modality {name!r} in diffusion/data/modalities.py; there are {', '.join(MODALITIES)}")
    return MODALITIES[name]


def shape_example(
    example: RawExample, medium: str | None, shape: Sequence[int], config: MediaConfig
) -> tuple[RawExample, list[str]]:
    """The example with its medium at a dataset's shape, and the losses that the configuration does not ask for.

    Raises ValueError, with the id of the example, if the medium cannot be brought to the shape.
    """
    if medium is None:
        return example, []
    functions, content = modality(medium), example.media[medium]
    try:
        shaped = functions.to_shape(content, tuple(shape), config)
    except ValueError as error:
        raise ValueError(f"{example.id}: {error}") from error
    discarded = functions.discarded(content, tuple(shape), config)
    return RawExample(example.id, {**example.media, medium: shaped}, example.given_characters), discarded
