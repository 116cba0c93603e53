"""The shapes of media, and the tokenizers: given, or fitted on samples of the sources (`survey.py`)."""

import dataclasses
import hashlib
import os
from pathlib import Path
from typing import Any

import numpy as np

from trimask.diffusion.data.layout import Layout
from trimask.diffusion.data.modalities import MODALITIES, modality, shape_example
from trimask.diffusion.data.prepare_config import PrepareConfig
from trimask.diffusion.data.records import RawExample, Source
from trimask.diffusion.run.progress import Report
from trimask.tokenizers import media as media_tokenizers
from trimask.tokenizers.codec import MediaCodec
from trimask.tokenizers.media import MediaTokenizers
from trimask.tokenizers.storage import configuration
from trimask.tokenizers.storage.files import require_regular_file
from trimask.tokenizers.storage.json_text import read_json
from trimask.tokenizers.text import TextTokenizer
from trimask.tokenizers.vocabulary import TEXT


def fit_tokenizers(
    config: PrepareConfig,
    sources: dict[str, Source],
    samples: dict[str, list[RawExample]],
    media_shapes: dict[str, list[int]],
    report: Report,
) -> MediaTokenizers:
    """Text tokenizer and codecs: those that are given, and the others fitted on training examples of all sources."""
    given = None if config.tokenizers is None else media_tokenizers.load_tokenizers(tokenizer_folder(config.tokenizers))
    if config.text_tokenizer is not None:
        text = TextTokenizer.from_file(config.text_tokenizer)
    elif given is not None:
        text = given.text
    else:
        texts = [example.media[TEXT] for sample in samples.values() for example in sample]
        report("fitting the text tokenizer", 0, 1)
        size = sum(len(text.encode()) for text in texts)
        most = max(256 + size, PrepareConfig.text_vocabulary)  # the default is for texts however short
        if config.text_vocabulary > most:
            raise ValueError(
                f"text_vocabulary must be at most {most:,} for {size:,} bytes of text to fit it on: 256 bytes, and one "
                f"token more for each; got {config.text_vocabulary:,}"
            )
        text = TextTokenizer.fit(texts, config.text_vocabulary)
        report("fitting the text tokenizer", 1, 1)
    codecs = dict(given.codecs) if given is not None else {}
    for medium in dict.fromkeys(source.medium for source in sources.values()):
        if medium is not None and medium not in codecs:
            of_medium = {name: sample for name, sample in samples.items() if sources[name].medium == medium}
            report(f"fitting the {medium} tokenizer", 0, 1)
            codecs[medium] = _fitted_codec(medium, of_medium, media_shapes, config)
            report(f"fitting the {medium} tokenizer", 1, 1)
    return MediaTokenizers(text, codecs)


def tokenizer_folder(folder: str) -> Path:
    """The tokenizers of a run, of prepared data, or the folder itself."""
    inside = Path(folder) / "tokenizers"
    return inside if inside.is_dir() else Path(folder)


def given_codecs(config: PrepareConfig) -> dict[str, Any]:
    """Modality → codec of the folder that the configuration names; none without one."""
    return (
        {}
        if config.tokenizers is None
        else dict(media_tokenizers.load_tokenizers(tokenizer_folder(config.tokenizers)).codecs)
    )


def digests_of_given(config: PrepareConfig) -> dict[str, str]:
    """What `Plan.given` says of the tokenizers that the configuration names."""
    found: dict[str, str] = {}
    if config.text_tokenizer is not None:
        require_regular_file(Path(config.text_tokenizer))
        with Path(config.text_tokenizer).open("rb") as file:
            found["text_tokenizer"] = hashlib.file_digest(file, "sha256").hexdigest()
    if config.tokenizers is not None:
        fingerprints = media_tokenizers.load_tokenizers(tokenizer_folder(config.tokenizers)).fingerprints
        found["tokenizers"] = hashlib.sha256(repr(sorted(fingerprints.items())).encode()).hexdigest()
    return found


def _fitted_codec(
    medium: str, samples: dict[str, list[RawExample]], media_shapes: dict[str, list[int]], config: PrepareConfig
) -> MediaCodec:
    """The codec fitted on a batch of media of each dataset."""
    batches = []
    for name, sample in samples.items():
        shaped = [shape_example(example, medium, media_shapes[name], config.media)[0] for example in sample]
        batches.append(np.stack([example.media[medium] for example in shaped]))
    return modality(medium).fit(batches, config.codecs[medium])


def shapes_of_media(
    config: PrepareConfig, sources: dict[str, Source], samples: dict[str, list[RawExample]]
) -> dict[str, list[int]]:
    """Dataset → shape of its media."""
    given, shapes = given_codecs(config), dict[str, list[int]]()
    for medium in dict.fromkeys(source.medium for source in sources.values() if source.medium is not None):
        of_medium = {
            name: [example.media[medium] for example in samples[name]]
            for name, source in sources.items()
            if source.medium == medium
        }
        shapes |= modality(medium).shapes(of_medium, config.media, given.get(medium))
    return {name: shapes[name] for name in sources if name in shapes}


def with_given_codecs(config: PrepareConfig) -> PrepareConfig:
    """The configuration with that of the codecs it takes from elsewhere, and the size of their media there."""
    if config.tokenizers is None:
        return config
    codecs = given_codecs(config)
    media = config.media
    for layout in _layouts_of(Path(config.tokenizers)):
        if layout.medium is not None:
            codec = codecs[layout.medium]
            shape = codec.media_shape(tuple(layout.shapes[layout.medium]))
            media = modality(layout.medium).as_given(media, shape, codec)
    known = {name: codec.config for name, codec in codecs.items() if name in MODALITIES}
    return dataclasses.replace(config, codecs=config.codecs | known, pictures=media.pictures, seconds=media.seconds)


def _layouts_of(folder: Path) -> list[Layout]:
    """Those of a run or of prepared data; none of a folder of tokenizers alone."""
    if os.path.lexists(folder / "manifest.json"):
        datasets = read_json(folder / "manifest.json").get("datasets", {}).values()
        found = [dataset["layout"] for dataset in datasets]
    elif (folder / "tokenizers").is_dir():
        config = read_json(folder / "config.json") if os.path.lexists(folder / "config.json") else {}
        if "layouts" not in config:
            raise ValueError(
                f"{folder}: is neither a run nor prepared data that is finished; the `trimask prepare` that began it "
                f"completes it, and {folder / 'tokenizers'} names its tokenizers alone"
            )
        found = list(config["layouts"].values())
    else:
        return []
    return [configuration.from_dict(layout, Layout, str(folder)) for layout in found]
