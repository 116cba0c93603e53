"""Held-out examples to evaluate on, and training examples to fit judges on, each as codes and as raw media."""

from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any, TypeVar

from trimask.diffusion.data.prepared import Examples, Prepared
from trimask.diffusion.data.records import RawExample
from trimask.diffusion.data.splits import TRAIN
from trimask.diffusion.evaluation.judges import TrainingMedia
from trimask.tokenizers.vocabulary import TEXT

_T = TypeVar("_T")


class HeldOutExamples:
    """At most `limit` examples of a split, evenly spaced over it; codes and media are read when first used."""

    def __init__(self, prepared: Prepared, dataset: str, split: str, limit: int | None):
        self.prepared, self.dataset, self.split = prepared, dataset, split
        total = prepared.dataset(dataset).splits[split]
        self.indices = evenly_spaced(total, limit)

    @cached_property
    def records(self) -> list[dict[str, Any]]:
        """Codes of the examples, as prepared."""
        examples = self.prepared.examples(self.dataset, self.split)
        return [examples[index] for index in self.indices]

    @cached_property
    def raw(self) -> list[RawExample]:
        """Raw media of the examples."""
        return _select(self.prepared.raw(self.dataset, self.split), self.indices)


class TrainingExamples:
    """Training examples of a dataset, read when first used; of the media at most `limit`, evenly spaced."""

    def __init__(self, prepared: Prepared, dataset: str, limit: int):
        self.prepared, self.dataset, self.limit = prepared, dataset, limit

    @property
    def exists(self) -> bool:
        """Whether the dataset has a training split."""
        return TRAIN in self.prepared.dataset(self.dataset).splits

    @cached_property
    def raw(self) -> list[RawExample]:
        """Raw media of at most `limit` examples; raises ValueError if there is no training split."""
        splits = self.prepared.dataset(self.dataset).splits
        if not self.exists:
            raise ValueError(
                f"{self.prepared.folder}: {self.dataset} has no split {TRAIN!r} to fit a judge on, only "
                f"{', '.join(splits)}"
            )
        return _select(self.prepared.raw(self.dataset, TRAIN), evenly_spaced(splits[TRAIN], self.limit))

    def training_media(self, modality: str) -> TrainingMedia:
        """Media of one modality, on which a judge is fitted."""
        codec = None if modality == TEXT else self.prepared.tokenizers.codec(modality)
        media = [example.media[modality] for example in self.raw]
        return TrainingMedia(self.dataset, modality, media, [example.media for example in self.raw], codec)

    @cached_property
    def records(self) -> Examples | list[dict[str, Any]]:
        """Codes of all training examples, as prepared; empty if there is no training split."""
        return self.prepared.examples(self.dataset, TRAIN) if self.exists else []


def evenly_spaced(total: int, limit: int | None) -> list[int]:
    """At most `limit` indices of 0 … total − 1, evenly spaced, since files are often sorted by what they show."""
    if limit is None or total <= limit:
        return list(range(total))
    return [index * total // limit for index in range(limit)]


def _select(items: Iterator[_T], indices: Sequence[int]) -> list[_T]:
    """The items at these indices, in order."""
    wanted = set(indices)
    return [item for index, item in enumerate(items) if index in wanted]
