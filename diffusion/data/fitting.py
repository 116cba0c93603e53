"""Tokenizers and shapes of media for data to prepare: reused from another folder, or fitted on samples of the sources.

The samples are drawn by `survey.py`.
"""

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
    """Text tokenizer, and a codec of every modality of the sources; those that are not reused are fitted on `samples`.

    Raises ValueError if the text vocabulary is larger than the texts allow.
    """
    reused = (
        None if config.tokenizers is None else media_tokenizers.load_tokenizers(tokenizer_folder(config.tokenizers))
    )
    if config.text_tokenizer is not None:
        text = TextTokenizer.from_file(config.text_tokenizer)
    elif reused is not None:
        text = reused.text
    else:
        report("fitting the text tokenizer", 0, 1)
        text = _fit_text_tokenizer([e.media[TEXT] for sample in samples.values() for e in sample], config)
        report("fitting the text tokenizer", 1, 1)
    codecs = dict(reused.codecs) if reused is not None else {}
    for medium in dict.fromkeys(source.medium for source in sources.values()):
        if medium is not None and medium not in codecs:
            of_medium = {name: sample for name, sample in samples.items() if sources[name].medium == medium}
            report(f"fitting the {medium} tokenizer", 0, 1)
            codecs[medium] = _fit_codec(medium, of_medium, media_shapes, config)
            report(f"fitting the {medium} tokenizer", 1, 1)
    return MediaTokenizers(text, codecs)


def _fit_text_tokenizer(texts: list[str], config: PrepareConfig) -> TextTokenizer:
    """Text tokenizer fitted on these texts. Raises ValueError if its vocabulary is larger than they allow."""
    num_bytes = sum(len(text.encode()) for text in texts)
    largest = max(256 + num_bytes, PrepareConfig.text_vocabulary)  # the default is accepted for the shortest texts, too
    if config.text_vocabulary > largest:
        raise ValueError(
            f"text_vocabulary must be at most {largest:,} for {num_bytes:,} bytes of text to fit it on: 256 bytes, and "
            f"one token more for each; got {config.text_vocabulary:,}"
        )
    return TextTokenizer.fit(texts, config.text_vocabulary)


def tokenizer_folder(folder: str) -> Path:
    """Folder of tokenizers of a run or of prepared data; any other folder is taken for a folder of tokenizers."""
    inside = Path(folder) / "tokenizers"
    return inside if inside.is_dir() else Path(folder)


def reused_codecs(config: PrepareConfig) -> dict[str, Any]:
    """Modality → codec of the folder that `config.tokenizers` names; empty if it names none."""
    return (
        {}
        if config.tokenizers is None
        else dict(media_tokenizers.load_tokenizers(tokenizer_folder(config.tokenizers)).codecs)
    )


def digests_of_reused_tokenizers(config: PrepareConfig) -> dict[str, str]:
    """Field of the configuration that names tokenizers → digest of their content, as `Plan.given` records it."""
    digests: dict[str, str] = {}
    if config.text_tokenizer is not None:
        require_regular_file(Path(config.text_tokenizer))
        with Path(config.text_tokenizer).open("rb") as file:
            digests["text_tokenizer"] = hashlib.file_digest(file, "sha256").hexdigest()
    if config.tokenizers is not None:
        fingerprints = media_tokenizers.load_tokenizers(tokenizer_folder(config.tokenizers)).fingerprints
        digests["tokenizers"] = hashlib.sha256(repr(sorted(fingerprints.items())).encode()).hexdigest()
    return digests


def _fit_codec(
    medium: str, samples: dict[str, list[RawExample]], media_shapes: dict[str, list[int]], config: PrepareConfig
) -> MediaCodec:
    """Codec of a modality, fitted on one batch of media per dataset."""
    batches = []
    for name, sample in samples.items():
        shaped = [shape_example(example, medium, media_shapes[name], config.media)[0] for example in sample]
        batches.append(np.stack([example.media[medium] for example in shaped]))
    return modality(medium).fit_codec(batches, config.codecs[medium])


def shapes_of_media(
    config: PrepareConfig, sources: dict[str, Source], samples: dict[str, list[RawExample]]
) -> dict[str, list[int]]:
    """Dataset → shape that all its media are brought to; datasets of text alone are absent."""
    reused, shapes = reused_codecs(config), dict[str, list[int]]()
    for medium in dict.fromkeys(source.medium for source in sources.values() if source.medium is not None):
        of_medium = {
            name: [example.media[medium] for example in samples[name]]
            for name, source in sources.items()
            if source.medium == medium
        }
        shapes |= modality(medium).dataset_shapes(of_medium, config.media, reused.get(medium))
    return {name: shapes[name] for name in sources if name in shapes}


def with_reused_codecs(config: PrepareConfig) -> PrepareConfig:
    """The configuration, completed by the configurations of the codecs it reuses and the shape of the media they fit.

    A size of pictures or a length of sounds that it names stays. Raises ValueError if the folder of the tokenizers is
    an unfinished run or unfinished prepared data.
    """
    if config.tokenizers is None:
        return config
    codecs = reused_codecs(config)
    media = config.media
    for layout in _layouts_of(Path(config.tokenizers)):
        if layout.medium is not None:
            codec = codecs[layout.medium]
            shape = codec.media_shape(tuple(layout.shapes[layout.medium]))
            media = modality(layout.medium).with_media_shape(media, shape, codec)
    known = {name: codec.config for name, codec in codecs.items() if name in MODALITIES}
    return dataclasses.replace(config, codecs=config.codecs | known, pictures=media.pictures, seconds=media.seconds)


def _layouts_of(folder: Path) -> list[Layout]:
    """Layouts of the datasets of a run or of prepared data; empty for a folder that holds tokenizers alone."""
    if os.path.lexists(folder / "manifest.json"):
        datasets = read_json(folder / "manifest.json").get("datasets", {}).values()
        layouts = [dataset["layout"] for dataset in datasets]
    elif (folder / "tokenizers").is_dir():
        config = read_json(folder / "config.json") if os.path.lexists(folder / "config.json") else {}
        if "layouts" not in config:
            raise ValueError(
                f"{folder}: is neither a run nor prepared data that is finished; the `trimask prepare` that began it "
                f"completes it, and {folder / 'tokenizers'} names its tokenizers alone"
            )
        layouts = list(config["layouts"].values())
    else:
        return []
    return [configuration.from_dict(layout, Layout, str(folder)) for layout in layouts]
