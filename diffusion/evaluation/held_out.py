"""Examples to evaluate on, and real training examples for judges: some of a split, codes and raw media side by side."""

from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any, TypeVar

from trimask.diffusion.data.prepared import Examples, Prepared
from trimask.diffusion.data.records import RawExample
from trimask.diffusion.data.splits import TRAIN
from trimask.diffusion.evaluation.judges import TrainingMedia
from trimask.tokenizers.vocabulary import TEXT

_T = TypeVar("_T")


class HeldOut:
    """Some of a split's examples, and what they were made of, read when it is needed."""

    def __init__(self, prepared: Prepared, dataset: str, split: str, limit: int | None):
        self.prepared, self.dataset, self.split = prepared, dataset, split
        total = prepared.dataset(dataset).splits[split]
        self.numbers = spread(total, limit)

    @cached_property
    def records(self) -> list[dict[str, Any]]:
        """Codes."""
        examples = self.prepared.examples(self.dataset, self.split)
        return [examples[number] for number in self.numbers]

    @cached_property
    def raw(self) -> list[RawExample]:
        """Media."""
        return _picked(self.prepared.raw(self.dataset, self.split), self.numbers)


class TrainingExamples:
    """A dataset's training examples, read when they are needed."""

    def __init__(self, prepared: Prepared, dataset: str, limit: int):
        self.prepared, self.dataset, self.limit = prepared, dataset, limit

    @property
    def exists(self) -> bool:
        """False where the data have no training split."""
        return TRAIN in self.prepared.dataset(self.dataset).splits

    @cached_property
    def raw(self) -> list[RawExample]:
        """Some of them."""
        splits = self.prepared.dataset(self.dataset).splits
        if not self.exists:
            raise ValueError(
                f"{self.prepared.folder}: {self.dataset} has no split {TRAIN!r} to fit a judge on, only "
                f"{', '.join(splits)}"
            )
        return _picked(self.prepared.raw(self.dataset, TRAIN), spread(splits[TRAIN], self.limit))

    def training(self, modality: str) -> TrainingMedia:
        """What a judge of this modality is fitted on."""
        codec = None if modality == TEXT else self.prepared.tokenizers.codec(modality)
        media = [example.media[modality] for example in self.raw]
        return TrainingMedia(self.dataset, modality, media, [example.media for example in self.raw], codec)

    @cached_property
    def codes(self) -> Examples | list[dict[str, Any]]:
        """Codes of all; none where there is no training split."""
        return self.prepared.examples(self.dataset, TRAIN) if self.exists else []


def spread(total: int, limit: int | None) -> list[int]:
    """At most `limit` of 0 … total − 1, evenly spread: files are often sorted by what they show."""
    if limit is None or total <= limit:
        return list(range(total))
    return [number * total // limit for number in range(limit)]


def _picked(items: Iterator[_T], numbers: Sequence[int]) -> list[_T]:
    wanted = set(numbers)
    return [item for number, item in enumerate(items) if number in wanted]
