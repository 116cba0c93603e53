"""On what tokenizers are fitted, the shapes of media, and the tokenizers themselves: given, or fitted.

A sample of each source's training split is drawn by id, so it is the same whatever else there is.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from trimask.diffusion import configuration
from trimask.diffusion.data.lines import Block
from trimask.diffusion.data.plan import PrepareConfig, fitted, id_draw, stacked
from trimask.diffusion.data.sources import BadRecord, Entry, RawExample, Source
from trimask.diffusion.layout import Layout
from trimask.diffusion.progress import Report
from trimask.tokenizers import media as media_tokenizers
from trimask.tokenizers.audio import MelCodec
from trimask.tokenizers.codec import MediaCodec
from trimask.tokenizers.image import PatchCodec, single_patches
from trimask.tokenizers.media import MediaTokenizers
from trimask.tokenizers.text import TextTokenizer
from trimask.tokenizers.vocabulary import TEXT

_FIT_BYTES = 512 << 20
"""Of media, on which tokenizers are fitted."""


def fit_tokenizers(
    config: PrepareConfig,
    sources: dict[str, Source],
    samples: dict[str, list[RawExample]],
    media_shapes: dict[str, list[int]],
    report: Report,
) -> MediaTokenizers:
    """Text tokenizer and codecs: those that are given, and the others fitted on training examples of all sources."""
    given = None if config.tokenizers is None else media_tokenizers.load(tokenizer_folder(config.tokenizers))
    if config.text_tokenizer is not None:
        text = TextTokenizer.from_file(config.text_tokenizer)
    elif given is not None:
        text = given.text
    else:
        texts = [example.media[TEXT] for sample in samples.values() for example in sample]
        report("fitting the text tokenizer", 0, 1)
        text = TextTokenizer.fit(texts, config.text_vocabulary)
        report("fitting the text tokenizer", 1, 1)
    codecs = dict(given.codecs) if given is not None else {}
    for medium, fit in _FIT.items():
        of_medium = {name: sample for name, sample in samples.items() if sources[name].medium == medium}
        if of_medium and medium not in codecs:
            report(f"fitting the {medium} tokenizer", 0, 1)
            codecs[medium] = fit(of_medium, media_shapes, config)
            report(f"fitting the {medium} tokenizer", 1, 1)
    return MediaTokenizers(text, codecs)


def tokenizer_folder(folder: str) -> Path:
    """The tokenizers of a run, of prepared data, or the folder itself."""
    inside = Path(folder) / "tokenizers"
    return inside if inside.is_dir() else Path(folder)


def given_codecs(config: PrepareConfig) -> dict[str, Any]:
    """Modality → codec of the folder that the configuration names; none without one."""
    return {} if config.tokenizers is None else dict(media_tokenizers.load(tokenizer_folder(config.tokenizers)).codecs)


def _fit_image(
    samples: dict[str, list[RawExample]], media_shapes: dict[str, list[int]], config: PrepareConfig
) -> MediaCodec:
    patches = []
    for name, sample in samples.items():
        pictures = [fitted(example, "image", media_shapes[name], config) for example in sample]
        patches.append(single_patches(stacked(pictures, "image"), config.image.patch_side))
    return PatchCodec.fit(np.concatenate(patches), config.image)


def _fit_audio(
    samples: dict[str, list[RawExample]], media_shapes: dict[str, list[int]], config: PrepareConfig
) -> MediaCodec:
    longest = max((media_shapes[name] for name in samples), key=lambda shape: shape[0])
    sounds = [fitted(example, "audio", longest, config) for sample in samples.values() for example in sample]
    return MelCodec.fit(stacked(sounds, "audio"), config.audio)


_FIT: dict[str, Callable[..., MediaCodec]] = {"image": _fit_image, "audio": _fit_audio}


def fit_sample(source: Source, blocks: list[Block], config: PrepareConfig, split: str | None) -> list[RawExample]:
    """Some examples of a split (None: of any), the same whatever else there is; bad ones are passed over, or stop.

    Pictures are of one size already, and all media together at most `_FIT_BYTES`.
    """
    share = config.fit_examples / max(1, sum(block.count for block in blocks))
    sample: list[RawExample] = []
    size = 0
    for entry in (entry for block in blocks for entry in source.entries(block)):
        try:
            if isinstance(entry, BadRecord):
                raise entry
            if split not in (None, config.splits.of(entry)) or id_draw(entry.id, "fit") >= share:
                continue
            example = _sized(entry, sample, source.medium, config)
        except BadRecord:
            if config.on_error == "stop":
                raise
            continue
        sample.append(example)
        size += 0 if source.medium is None else example.media[source.medium].nbytes
        if size > _FIT_BYTES:
            break
    return sample


def _sized(entry: Entry, sample: list[RawExample], medium: str | None, config: PrepareConfig) -> RawExample:
    """The example, a picture at the configured size or that of the sample's first."""
    example = entry.example()
    if medium != "image":
        return example
    content = example.media[medium]
    first = sample[0].media[medium] if sample else content
    height, width = config.pictures.height, config.pictures.width
    size = first.shape[:2] if height is None or width is None else (height, width)
    try:
        return fitted(example, medium, [*size, content.shape[2]], config)
    except ValueError as error:
        raise BadRecord(entry.file, entry.line, str(error)) from error


def shapes_of_media(
    config: PrepareConfig, sources: dict[str, Source], samples: dict[str, list[RawExample]]
) -> dict[str, list[int]]:
    """Dataset → shape of its media; all pictures have the channels of one codec."""
    of_pictures = [samples[name] for name, source in sources.items() if source.medium == "image"]
    channels = max((example.media["image"].shape[-1] for sample in of_pictures for example in sample), default=None)
    given = given_codecs(config).get("image")
    if given is not None:
        channels = given.media_shape((1, 1))[-1]
    return {
        name: _shape_of_medium(samples[name], source.medium, config, channels)
        for name, source in sources.items()
        if source.medium is not None
    }


def _shape_of_medium(sample: list[RawExample], medium: str, config: PrepareConfig, channels: int | None) -> list[int]:
    """The shape of a dataset's media: as configured, or as those of its sample."""
    if medium == "image":
        return [*sample[0].media["image"].shape[:2], config.pictures.channels or channels]
    samples = max(len(example.media["audio"]) for example in sample)
    if config.seconds is not None:
        samples = max(1, round(config.seconds * config.audio.sample_rate_hz))
    frame = config.audio.samples_per_frame
    return [-(-samples // frame) * frame]


def with_given_codecs(config: PrepareConfig) -> PrepareConfig:
    """The configuration with that of the codecs it takes from elsewhere, and the size of their media there."""
    if config.tokenizers is None:
        return config
    codecs = given_codecs(config)
    changes: dict[str, Any] = {name: codec.config for name, codec in codecs.items() if name in ("image", "audio")}
    for layout in _layouts_of(Path(config.tokenizers)):
        if layout.medium == "image" and config.pictures.height is None:
            height, width, _ = codecs["image"].media_shape(tuple(layout.shapes["image"]))
            changes["pictures"] = dataclasses.replace(config.pictures, height=height, width=width)
        if layout.medium == "audio" and config.seconds is None:
            (samples,) = codecs["audio"].media_shape(tuple(layout.shapes["audio"]))
            changes["seconds"] = samples / codecs["audio"].sample_rate_hz
    return dataclasses.replace(config, **changes)


def _layouts_of(folder: Path) -> list[Layout]:
    """Those of a run or of prepared data, the first of each medium last; none of a folder of tokenizers alone."""
    if (folder / "manifest.json").is_file():
        datasets = configuration.read_json(folder / "manifest.json").get("datasets", {}).values()
        found = [dataset["layout"] for dataset in datasets]
    elif (folder / "tokenizers").is_dir() and (folder / "config.json").is_file():
        found = list(configuration.read_json(folder / "config.json").get("layouts", {}).values())
    else:
        return []
    return [configuration.from_dict(layout, Layout, str(folder)) for layout in reversed(found)]
