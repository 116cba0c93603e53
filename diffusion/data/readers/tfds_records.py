"""Sources of TFDS datasets: the embedded digits, and any other dataset by its name. TensorFlow is not needed.

The features.json of a TFDS dataset names the classes of its features, and TFDS would import the modules of these
classes. Here only TFDS's own features are accepted, so that no file can cause an import.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import tensorflow_datasets as tfds

from trimask.diffusion.data.fields import Fields
from trimask.diffusion.data.layout import Fill
from trimask.diffusion.data.readers import digits
from trimask.diffusion.data.readers.lines import blocks_of_split
from trimask.diffusion.data.readers.pictures import to_uint8
from trimask.diffusion.data.readers.sounds import mix_to_mono, resample_checked
from trimask.diffusion.data.reading_config import OpenConfig
from trimask.diffusion.data.records import Block, Entry, RawExample, text_digest
from trimask.diffusion.data.splits import TRAIN, canonical_split
from trimask.tokenizers.storage.files import printable
from trimask.tokenizers.vocabulary import TEXT

_FEATURES = "tensorflow_datasets.core.features"
"""Package of TFDS's own features."""


@dataclass(frozen=True)
class EmbeddedDigits:
    """Source of one config of digits.py; a text without a medium is a prompt up to its `=`."""

    name: str
    """Name of the config in `DIGIT_CONFIGS`."""
    folder: Path
    """Folder in which the dataset is built."""
    fill: Fill = "whole"

    def __post_init__(self):
        if self.name not in digits.DIGIT_CONFIGS:
            raise ValueError(f"unknown digits {self.name!r}; there are {', '.join(digits.DIGIT_CONFIGS)}")

    @property
    def medium(self) -> str | None:
        features = digits.DIGIT_CONFIGS[self.name].features()
        return next((name for name in ("image", "audio") if name in features), None)

    def blocks(self, records: int) -> list[Block]:
        splits = digits.DIGIT_CONFIGS[self.name].splits
        return [block for split in splits for block in blocks_of_split(split, len(self._records(split)), records)]

    def entries(self, block: Block) -> Iterator[Entry]:
        records = self._records(block.file)
        for number in range(block.start, block.start + block.count):
            record = records[number]
            load = partial(self._load, record)
            yield Entry(record["id"], f"{self.name} {block.file}", number + 1, load, block.file, Fields(record))

    def _records(self, split: str) -> Any:
        return digits.load_records(self.name, split, self.folder)

    def _load(self, record: dict[str, Any]) -> RawExample:
        media: dict[str, Any] = {TEXT: record["text"]}
        if "image" in record:
            media["image"] = np.asarray(record["image"], np.uint8)
        if "audio" in record:
            media["audio"] = np.asarray(record["audio"], np.float32) / 32768
        return RawExample(
            record["id"], media, given_characters=record["text"].index("=") + 1 if self.medium is None else 0
        )


@dataclass(frozen=True)
class TfdsSource:
    """Source of a TFDS dataset with a text or a label, alone or beside a picture or a sound."""

    name: str
    """Name of the dataset: NAME, NAME/CONFIG or NAME:1.0.0."""
    config: OpenConfig

    def __post_init__(self):
        self._text_feature()  # opens the dataset, so that a wrong name is an error at once

    @cached_property
    def _builder(self) -> tfds.core.DatasetBuilder:
        if not re.fullmatch(r"[A-Za-z]\w*(/[\w.+-]+)?(:\d+\.\d+\.\d+)?", self.name):
            raise ValueError(f"a dataset of TFDS is NAME, NAME/CONFIG or NAME:1.0.0, got {printable(repr(self.name))}")
        try:
            with _own_features_only():
                builder = tfds.builder(self.name, data_dir=self.config.tfds_folder)
                dict(builder.info.features or {})
                return builder
        except Exception as error:  # TFDS raises a family of its own, and what a dataset's code raises
            raise ValueError(f"TFDS has no dataset {self.name!r}: {str(error).partition(chr(10))[0]}") from error

    @cached_property
    def _features(self) -> dict[str, Any]:
        return dict(self._builder.info.features)

    @property
    def medium(self) -> str | None:
        kinds = [kind for kind, _ in self._media]
        return kinds[0] if kinds else None

    @property
    def fill(self) -> Fill:
        return "whole" if self.medium else "none"

    @property
    def _media(self) -> list[tuple[str, str]]:
        """Modality and feature name of every picture and sound."""
        kinds = [
            ("image", lambda f: isinstance(f, tfds.features.Image)),
            ("audio", lambda f: isinstance(f, tfds.features.Audio)),
            # Datasets that are read without TensorFlow hold their sounds like this.
            ("audio", lambda f: type(f) is tfds.features.Tensor and f.shape == (None,) and f.np_dtype == np.int16),
        ]
        return [(kind, name) for kind, is_kind in kinds for name, f in self._features.items() if is_kind(f)]

    def blocks(self, records: int) -> list[Block]:
        if self.config.is_download:
            self._builder.download_and_prepare(file_format="array_record")
        splits = list(self._builder.info.splits) or [TRAIN]  # TFDS may not know the splits of an unprepared dataset
        return [block for split in splits for block in blocks_of_split(split, len(self._records(split)), records)]

    def entries(self, block: Block) -> Iterator[Entry]:
        records = self._records(block.file)
        for number in range(block.start, block.start + block.count):
            id = f"{block.file}-{number}"
            load = partial(self._load, id, records, number)
            # A dataset with a single split is divided by id, like any other source.
            split = canonical_split(block.file) if len(self._builder.info.splits) > 1 else None
            yield Entry(id, f"{self.name} {block.file}", number + 1, load, split, Fields(tfds_split=block.file))

    def _records(self, split: str) -> Any:
        try:
            return self._builder.as_data_source(split=split)
        except Exception as error:
            raise ValueError(
                f"TFDS dataset {self.name!r} cannot be read in {self._builder.data_path}: {_first_line(error)}. "
                "It must be there as array_record; --download lets TFDS fetch and prepare it"
            ) from error

    def _text_feature(self) -> str:
        """Name of the feature that holds the text. Raises ValueError if there is none."""
        wanted = self.config.fields.text
        texts = [
            name for name, f in self._features.items() if isinstance(f, tfds.features.Text | tfds.features.ClassLabel)
        ]
        named = [name for name in (wanted, "text", "caption", "label") if name in texts]
        if not named:
            raise ValueError(
                f"TFDS dataset {self.name!r} has no text feature {wanted!r}; its features of text or labels are "
                f"{', '.join(texts) or 'none'}; choose one by --fields.text"
            )
        return named[0]

    def _load(self, id: str, records: Any, number: int) -> RawExample:
        record, name = records[number], self._text_feature()
        feature, value = self._features[name], record[name]
        text = feature.int2str(int(value)) if isinstance(feature, tfds.features.ClassLabel) else _text_of(value)
        if not text.strip():
            raise ValueError(f"its {name!r} is empty")
        media: dict[str, Any] = {TEXT: text}
        for modality, source in self._media[:1]:
            value = np.asarray(record[source])
            media[modality] = {"image": _picture, "audio": self._sound}[modality](value, source)
        return RawExample(id if self.medium else text_digest(text), media)

    def _sound(self, samples: np.ndarray, name: str) -> np.ndarray:
        """Waveform at the codec's sample rate, of the samples of the feature `name`."""
        if not len(samples):
            raise ValueError("holds no sound, its length is zero")
        content = samples.reshape(len(samples), -1).astype(np.float32)
        if np.issubdtype(samples.dtype, np.integer):
            content /= 2 ** (8 * min(samples.dtype.itemsize, 2) - 1)
        wanted = self.config.media.codecs["audio"].sample_rate_hz
        rate = getattr(self._features[name], "sample_rate", None) or wanted
        return resample_checked(mix_to_mono(content, rate), rate, wanted)


@contextmanager
def _own_features_only() -> Iterator[None]:
    """While it is active, TFDS finds the classes of its own features by name, and raises ValueError for other names."""

    def own_feature(cls: type, name: str) -> type:
        feature = cls._registered_features.get(name)  # type: ignore[attr-defined]
        if feature is None or not feature.__module__.startswith(f"{_FEATURES}."):
            raise ValueError(f"its features.json names {printable(repr(name))}, which is not a feature of TFDS itself")
        return feature

    with patch.object(tfds.features.FeatureConnector, "cls_from_name", classmethod(own_feature)):
        yield


def _picture(pixels: np.ndarray, name: str) -> np.ndarray:
    """Picture of uint8. `name`, which readers of other features need, is unused."""
    if pixels.dtype == np.uint8:
        return pixels
    return to_uint8(pixels.astype(np.float32) if pixels.dtype == bool else pixels)


def _text_of(value: Any) -> str:
    return value.decode("utf-8") if isinstance(value, bytes) else str(value)


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]
