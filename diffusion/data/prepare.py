"""Raw examples → tokenizers and tokenised ArrayRecord shards, with a manifest that describes them.

    folder/manifest.json            everything a reader needs; written last, so a folder that has it is complete
    folder/config.json              what was asked for
    folder/tokenizers/<modality>/   fitted on the training splits
    folder/<dataset>/<split>-00000.array_record

A record is a msgpack map: the example's id, its codes by modality in their natural shape, and `num_given`, how many
text tokens are a question that is only ever given. Texts are filled with EOS to one buffer length per dataset, sounds
with silence to one number of frames, so that all examples of a dataset have one layout.
"""

import hashlib
import importlib.metadata
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter
from flax import serialization

from trimask.diffusion import configuration
from trimask.diffusion.data.sources import RawExample, Source, open_source
from trimask.tokenizers import media as media_tokenizers
from trimask.tokenizers.audio import MelCodec, MelConfig
from trimask.tokenizers.codec import MediaCodec
from trimask.tokenizers.image import PatchCodec, PatchConfig
from trimask.tokenizers.media import MediaTokenizers
from trimask.tokenizers.sequence import fill_text
from trimask.tokenizers.text import TextTokenizer
from trimask.tokenizers.vocabulary import TEXT, Task, Vocabulary

TRAIN = "train"


@dataclass(frozen=True, kw_only=True)
class PrepareConfig:
    """Which sources, and the tokenizers fitted on their training splits."""

    sources: dict[str, str] = field(default_factory=dict)
    """Dataset name → source, as in digits/handwritten."""
    text_vocabulary: int = 320
    """Tokens of the text tokenizer; 256 of them are the bytes."""
    image: PatchConfig = PatchConfig()
    """Codec for pictures."""
    audio: MelConfig = MelConfig()
    """Codec for sound."""

    def __post_init__(self):
        for name in self.sources:
            if not name.isidentifier():
                raise ValueError(f"a dataset's name must be a plain word, for it names a folder; got {name!r}")


@dataclass(frozen=True, kw_only=True)
class SplitManifest:
    """One split of a dataset."""

    files: list[str]
    """Shards, relative to the folder."""
    examples: int
    """Records in all of them."""


@dataclass(frozen=True, kw_only=True)
class DatasetManifest:
    """One dataset: examples of one layout."""

    source: str
    medium: str | None
    shapes: dict[str, list[int]]
    """Shape of an example's codes by modality."""
    splits: dict[str, SplitManifest]

    def tasks(self, vocabulary: Vocabulary) -> list[Task]:
        """The directions this dataset can teach."""
        return [task for task in vocabulary.tasks.values() if set(task.modalities) == set(self.shapes)]

    @property
    def example_length(self) -> int:
        """Tokens of an example, with its task and boundary tokens."""
        return 1 + sum(1 + int(np.prod(shape)) for shape in self.shapes.values())


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a prepared folder holds."""

    trimask: str
    """Version that wrote it."""
    tokenizers: dict[str, str]
    """Fingerprint of each modality's tokenizer."""
    vocabulary: Vocabulary
    datasets: dict[str, DatasetManifest]


class Prepared:
    """A prepared folder, opened for reading."""

    def __init__(self, folder: Path):
        if not (folder / "manifest.json").is_file():
            raise FileNotFoundError(f"{folder}: no prepared data here; make it with `trimask prepare {folder}`")
        self.folder = folder
        self.manifest = configuration.load(folder / "manifest.json", Manifest)
        self.config = configuration.load(folder / "config.json", PrepareConfig)
        self.tokenizers = media_tokenizers.load(folder / "tokenizers")
        if self.tokenizers.fingerprints != self.manifest.tokenizers:
            raise ValueError(
                f"{folder}: the tokenizers are not those the data was made with: "
                f"{self.tokenizers.fingerprints}, the manifest says {self.manifest.tokenizers}"
            )

    @property
    def fingerprint(self) -> str:
        """Changes with anything the manifest says."""
        content = json.dumps(configuration.to_dict(self.manifest), sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()[:16]

    def dataset(self, name: str) -> DatasetManifest:
        """A dataset's manifest."""
        if name not in self.manifest.datasets:
            raise ValueError(f"{self.folder}: no dataset {name!r}, only {', '.join(self.manifest.datasets)}")
        return self.manifest.datasets[name]

    def examples(self, dataset: str, split: str) -> list[dict[str, Any]]:
        """All records of a split: `id`, `num_given` and codes by modality."""
        splits = self.dataset(dataset).splits
        if split not in splits:
            raise ValueError(f"{self.folder}: {dataset} has no split {split!r}, only {', '.join(splits)}")
        records = [r for file in splits[split].files for r in _read_records(self.folder / file)]
        if len(records) != splits[split].examples:
            raise ValueError(
                f"{self.folder}: {dataset}/{split} holds {len(records)} records, "
                f"the manifest says {splits[split].examples}"
            )
        return records

    @property
    def sample_rate_hz(self) -> int:
        """Of all sounds."""
        return self.config.audio.sample_rate_hz

    def source(self, dataset: str) -> Source:
        """The raw examples a dataset was made of, in the same order."""
        return open_source(self.dataset(dataset).source, _raw_folder(self.folder))


def prepare(folder: Path, config: PrepareConfig, report: Callable[[str, int, int], None] = lambda *_: None) -> Prepared:
    """Makes or opens the prepared folder; `report(what, done, total)` is called as the work goes on.

    A complete folder made with the same configuration is opened as it is; another configuration's is refused.
    """
    if (folder / "manifest.json").exists():
        _require_same_config(folder, config)
        return Prepared(folder)
    if not config.sources:
        raise ValueError("nothing to prepare: no sources given")
    folder.mkdir(parents=True, exist_ok=True)
    sources = {name: open_source(source, _raw_folder(folder)) for name, source in config.sources.items()}
    raw = {}
    for number, (name, source) in enumerate(sources.items()):
        report("reading sources", number, len(sources))
        raw[name] = {split: source.read(split) for split in source.splits}
    report("fitting tokenizers", 0, 1)
    tokenizers = fit_tokenizers([(sources[name], raw[name][TRAIN]) for name in sources], config)
    tokenizers.save(folder / "tokenizers")
    configuration.save(folder / "config.json", config)
    datasets = {}
    for number, (name, source) in enumerate(sources.items()):
        report("tokenising", number, len(sources))
        datasets[name] = _write_dataset(folder, name, source, raw[name], tokenizers)
    report("tokenising", len(sources), len(sources))
    manifest = Manifest(
        trimask=importlib.metadata.version("trimask"),
        tokenizers=tokenizers.fingerprints,
        vocabulary=tokenizers.vocabulary,
        datasets=datasets,
    )
    configuration.save(folder / "manifest.json", manifest)
    return Prepared(folder)


def fit_tokenizers(training: Sequence[tuple[Source, Sequence[RawExample]]], config: PrepareConfig) -> MediaTokenizers:
    """Text tokenizer and codecs fitted on training examples of all sources."""
    texts = [example.media[TEXT] for _, examples in training for example in examples]
    of_medium: dict[str, list[RawExample]] = {}
    for source, examples in training:
        if source.medium is not None:
            of_medium.setdefault(source.medium, []).extend(examples)
    codecs = {medium: _FIT[medium](examples, config) for medium, examples in of_medium.items()}
    return MediaTokenizers(TextTokenizer.fit(texts, config.text_vocabulary), codecs)


def pad_waveforms(waveforms: Sequence[np.ndarray], samples: int) -> np.ndarray:
    """Waveforms of one length: silence after each."""
    if max(map(len, waveforms)) > samples:
        raise ValueError(f"a sound of {max(map(len, waveforms))} samples does not fit {samples}")
    return np.stack([np.pad(waveform, (0, samples - len(waveform))) for waveform in waveforms])


def _fit_image(examples: Sequence[RawExample], config: PrepareConfig) -> MediaCodec:
    return PatchCodec.fit(np.stack([example.media["image"] for example in examples]), config.image)


def _fit_audio(examples: Sequence[RawExample], config: PrepareConfig) -> MediaCodec:
    waveforms = [example.media["audio"] for example in examples]
    return MelCodec.fit(pad_waveforms(waveforms, max(map(len, waveforms))), config.audio)


_FIT = {"image": _fit_image, "audio": _fit_audio}


def _write_dataset(
    folder: Path, name: str, source: Source, raw: dict[str, Sequence[RawExample]], tokenizers: MediaTokenizers
) -> DatasetManifest:
    """Tokenises all splits to one layout."""
    everything = [example for examples in raw.values() for example in examples]
    # Question and answer are tokenised apart, as a question without its answer will be.
    given = tokenizers.encode(TEXT, [example.media[TEXT][: example.given] for example in everything])
    asked = tokenizers.encode(TEXT, [example.media[TEXT][example.given :] for example in everything])
    texts = [np.concatenate(parts) for parts in zip(given, asked, strict=True)]
    text_length = max(map(len, texts)) + 1
    codes = {TEXT: [fill_text(tokenizers.vocabulary, text, text_length) for text in texts]}
    if source.medium is not None:
        media = [example.media[source.medium] for example in everything]
        if source.medium == "audio":
            media = list(pad_waveforms(media, max(map(len, media))))
        codes[source.medium] = tokenizers.encode(source.medium, media)
    splits, start = {}, 0
    for split, examples in raw.items():
        rows = range(start, start + len(examples))
        file = f"{name}/{split}-00000.array_record"
        _write_records(folder / file, _records(examples, codes, [len(given[row]) for row in rows], rows))
        splits[split] = SplitManifest(files=[file], examples=len(examples))
        start = rows.stop
    shapes = {modality: list(values[0].shape) for modality, values in codes.items()}
    return DatasetManifest(source=source.name, medium=source.medium, shapes=shapes, splits=splits)


def _records(
    examples: Sequence[RawExample], codes: dict[str, list[np.ndarray]], num_given: list[int], rows: range
) -> Iterator[dict]:
    for example, given, row in zip(examples, num_given, rows, strict=True):
        yield {"id": example.id, "num_given": given, **{modality: values[row] for modality, values in codes.items()}}


def _write_records(path: Path, records: Iterator[dict]) -> None:
    """One shard, visible only when whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    writer = ArrayRecordWriter(str(partial), "group_size:1")
    for record in records:
        writer.write(serialization.msgpack_serialize(record))
    writer.close()
    partial.replace(path)


def _read_records(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such shard, though the manifest lists it")
    reader = ArrayRecordReader(str(path))
    try:
        return [serialization.msgpack_restore(record) for record in reader.read_all()]
    finally:
        reader.close()


def _require_same_config(folder: Path, config: PrepareConfig) -> None:
    changed = configuration.differences(configuration.load(folder / "config.json", PrepareConfig), config)
    if changed:
        raise ValueError(
            f"{folder} was prepared with another configuration; remove it or choose another folder. "
            f"There → asked for: {'; '.join(changed)}"
        )


def _raw_folder(folder: Path) -> Path:
    return folder / "raw"
