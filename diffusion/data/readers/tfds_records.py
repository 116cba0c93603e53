"""TFDS datasets as sources: the embedded digits, and any other by its name. TensorFlow is not needed.

A folder of TFDS says in features.json of which classes its features are, and TFDS imports the modules that it names.
Here only TFDS's own features are found, and nothing is imported because a file says so.
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
from trimask.diffusion.data.readers.pictures import in_bytes
from trimask.diffusion.data.readers.sounds import mixed, resampled
from trimask.diffusion.data.reading_config import OpenConfig
from trimask.diffusion.data.records import Block, Entry, RawExample, digest
from trimask.diffusion.data.splits import usual_split
from trimask.tokenizers.storage.files import printable
from trimask.tokenizers.vocabulary import TEXT

_FEATURES = "tensorflow_datasets.core.features"


@dataclass(frozen=True)
class EmbeddedDigits:
    """One config of digits.py; texts alone are questions up to their `=`."""

    name: str
    folder: Path
    """Where the dataset is built."""
    fill: Fill = "whole"

    def __post_init__(self):
        if self.name not in digits.CONFIGS:
            raise ValueError(f"unknown digits {self.name!r}; there are {', '.join(digits.CONFIGS)}")

    @property
    def medium(self) -> str | None:
        features = digits.CONFIGS[self.name].features()
        return next((name for name in ("image", "audio") if name in features), None)

    def blocks(self, records: int) -> list[Block]:
        splits = digits.CONFIGS[self.name].splits
        return [block for split in splits for block in blocks_of_split(split, len(self._records(split)), records)]

    def entries(self, block: Block) -> Iterator[Entry]:
        records = self._records(block.file)
        for number in range(block.start, block.start + block.count):
            record = records[number]
            load = partial(self._load, record)
            yield Entry(record["id"], f"{self.name} {block.file}", number + 1, load, block.file, Fields(record))

    def _records(self, split: str) -> Any:
        return digits.load(self.name, split, self.folder)

    def _load(self, record: dict[str, Any]) -> RawExample:
        media: dict[str, Any] = {TEXT: record["text"]}
        if "image" in record:
            media["image"] = np.asarray(record["image"], np.uint8)
        if "audio" in record:
            media["audio"] = np.asarray(record["audio"], np.float32) / 32768
        return RawExample(record["id"], media, given=record["text"].index("=") + 1 if self.medium is None else 0)


@dataclass(frozen=True)
class TfdsSource:
    """Any TFDS dataset with a text or a label, and perhaps a picture or a sound."""

    name: str
    config: OpenConfig

    def __post_init__(self):
        self._text_feature()  # opens the dataset, so that a wrong name is refused at once

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
            # How a dataset holds sound that is to be read without TensorFlow.
            ("audio", lambda f: type(f) is tfds.features.Tensor and f.shape == (None,) and f.np_dtype == np.int16),
        ]
        return [(kind, name) for kind, fits in kinds for name, f in self._features.items() if fits(f)]

    def blocks(self, records: int) -> list[Block]:
        if self.config.is_download:
            self._builder.download_and_prepare(file_format="array_record")
        splits = list(self._builder.info.splits) or ["train"]  # before it is prepared, TFDS may not know its splits
        return [block for split in splits for block in blocks_of_split(split, len(self._records(split)), records)]

    def entries(self, block: Block) -> Iterator[Entry]:
        records = self._records(block.file)
        for number in range(block.start, block.start + block.count):
            id = f"{block.file}-{number}"
            load = partial(self._load, id, records, number)
            # A dataset that is all one split is cut by id like any other source.
            split = usual_split(block.file) if len(self._builder.info.splits) > 1 else None
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
        """Name of the feature that is the text."""
        wanted = self.config.fields.text
        texts = [
            name for name, f in self._features.items() if isinstance(f, tfds.features.Text | tfds.features.ClassLabel)
        ]
        named = [name for name in (wanted, "text", "caption", "label") if name in texts]
        if not named:
            raise ValueError(
                f"TFDS dataset {self.name!r} has no text feature {wanted!r}; of text or label it has "
                f"{', '.join(texts) or 'none'}, and --fields.text chooses"
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
        return RawExample(id if self.medium else digest(text), media)

    def _sound(self, samples: np.ndarray, name: str) -> np.ndarray:
        if not len(samples):
            raise ValueError("holds no sound, its length is zero")
        content = samples.reshape(len(samples), -1).astype(np.float32)
        if np.issubdtype(samples.dtype, np.integer):
            content /= 2 ** (8 * min(samples.dtype.itemsize, 2) - 1)
        wanted = self.config.media.codecs["audio"].sample_rate_hz
        rate = getattr(self._features[name], "sample_rate", None) or wanted
        return resampled(mixed(content, rate), rate, wanted)


@contextmanager
def _own_features_only() -> Iterator[None]:
    """Lets TFDS find the classes of its own features by name, and import no module for another name."""

    def listed(cls: type, name: str) -> type:
        found = cls._registered_features.get(name)  # type: ignore[attr-defined]
        if found is None or not found.__module__.startswith(f"{_FEATURES}."):
            raise ValueError(f"its features.json names {printable(repr(name))}, which is no feature of TFDS itself")
        return found

    with patch.object(tfds.features.FeatureConnector, "cls_from_name", classmethod(listed)):
        yield


def _picture(pixels: np.ndarray, name: str) -> np.ndarray:
    if pixels.dtype == np.uint8:
        return pixels
    return in_bytes(pixels.astype(np.float32) if pixels.dtype == bool else pixels)


def _text_of(value: Any) -> str:
    return value.decode("utf-8") if isinstance(value, bytes) else str(value)


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]
