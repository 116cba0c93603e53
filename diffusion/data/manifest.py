"""Manifest of prepared data: manifest.json, made from the reports of all blocks."""

import hashlib
import importlib.metadata
from collections.abc import Collection, Iterable
from dataclasses import dataclass

from trimask.diffusion.data.layout import Layout
from trimask.diffusion.data.occurrences import Occurrences
from trimask.diffusion.data.prepared_folder import PreparedFolder
from trimask.diffusion.data.shards import BlockReport
from trimask.diffusion.data.sources import SourceConfig
from trimask.diffusion.data.splits import TRAIN, sorted_splits
from trimask.tokenizers.storage.formats import added_field
from trimask.tokenizers.vocabulary import TEXT, Task, Vocabulary

Reports = dict[str, list[BlockReport]]
"""Dataset → reports of its blocks, in order."""


@dataclass(frozen=True, kw_only=True)
class DatasetManifest:
    """Manifest of one dataset, whose examples have one layout."""

    source: SourceConfig
    """The source it was read from."""
    layout: Layout
    """Shapes and padding of its examples."""
    records: int
    """Number of records read."""
    rejected: int
    """Number of records that could not be used."""
    splits: dict[str, int]
    """Split → number of examples. A long text is several examples."""
    shared: dict[str, dict[str, int]] = added_field(as_before={}, default_factory=dict)
    """Split → earlier split → number of examples whose content occurs in the earlier split as well."""
    unread: dict[str, int] = added_field(as_before={}, default_factory=dict)
    """Folder of the source → number of its files that no record names."""

    @property
    def medium(self) -> str | None:
        """Modality that is paired with the text; None for text alone."""
        return self.layout.medium

    def tasks(self, vocabulary: Vocabulary) -> list[Task]:
        """The tasks that this dataset can teach."""
        return self.layout.tasks(vocabulary)


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """Content of manifest.json: everything that readers of prepared data need to know."""

    trimask: str
    """Version of trimask that wrote the folder."""
    tokenizers: dict[str, str]
    """Modality → fingerprint of its tokenizer."""
    vocabulary: Vocabulary
    """The id space of the examples."""
    datasets: dict[str, DatasetManifest]
    """Dataset → its manifest."""
    content: str
    """SHA-256 of the concatenated SHA-256 digests of all shards, in order."""
    shared: dict[str, dict[str, int]] = added_field(as_before={}, default_factory=dict)
    """Held-out split, as DATASET/SPLIT → training split of another dataset → number of held-out examples whose content
    occurs there."""

    def __post_init__(self):
        for name, dataset in self.datasets.items():
            for word in (name, *dataset.splits):
                if not word.isidentifier():
                    raise ValueError(f"datasets and splits must be plain words, for they name files; got {word!r}")


def manifest_of(folder: PreparedFolder, reports: Reports) -> Manifest:
    """Manifest of a folder whose blocks are all done. Raises ValueError for a dataset without examples."""
    return Manifest(
        shared=_shared_between_datasets(reports),
        trimask=importlib.metadata.version("trimask"),
        tokenizers=folder.tokenizers.fingerprints,
        vocabulary=folder.tokenizers.vocabulary,
        datasets={name: _dataset(folder, name, of_dataset) for name, of_dataset in reports.items()},
        content=digest_of_shards(block for blocks in reports.values() for block in blocks),
    )


def digest_of_shards(reports: Iterable[BlockReport]) -> str:
    """SHA-256 of the concatenated SHA-256 digests of all shards, in order."""
    digests = [shard.sha256 for block in reports for _, shard in sorted(block.shards.items())]
    return hashlib.sha256("".join(digests).encode()).hexdigest()


def require_consistent_counts(
    folder: PreparedFolder, name: str, dataset: DatasetManifest, reports: list[BlockReport]
) -> None:
    """Raises ValueError if the counts of a dataset's manifest differ from those of its reports."""
    counted = {
        "records": sum(report.block.count for report in reports),
        "rejected": sum(len(report.rejects) for report in reports),
        "splits": _examples_per_split(reports),
    }
    for what, number in counted.items():
        if getattr(dataset, what) != number:
            raise ValueError(
                f"{folder}: damaged: the manifest says {what} {getattr(dataset, what)} of {name}, the reports {number}"
            )


def _dataset(folder: PreparedFolder, name: str, reports: list[BlockReport]) -> DatasetManifest:
    """Manifest of one dataset. Raises ValueError if it has no examples."""
    splits = _examples_per_split(reports)
    if not splits:
        raise ValueError(f"{name}: none of its records could be used; {folder.rejects_file} says why")
    return DatasetManifest(
        source=folder.config.sources[name],
        layout=_layout(folder, name, reports),
        records=sum(report.block.count for report in reports),
        rejected=sum(len(report.rejects) for report in reports),
        splits={split: splits[split] for split in sorted_splits(splits)},
        shared=_shared_between_splits(reports, splits),
        unread=folder.plan.unread.get(name, {}),
    )


def _layout(folder: PreparedFolder, name: str, reports: list[BlockReport]) -> Layout:
    """Layout that every example of a dataset fits."""
    source = folder.sources[name]
    shards = [shard for report in reports for shard in report.shards.values()]
    text = [length for shard in shards for length in shard.text_tokens]
    given = [length for shard in shards for length in shard.given_tokens]
    answer_length, longest = None, max(text)
    if source.fill == "answer":
        answer_length = folder.config.response_tokens or 1 + max(t - g for t, g in zip(text, given, strict=True))
        longest = max(given) + answer_length
    elif source.fill == "whole":
        longest += 1
    shapes = {TEXT: [longest]}
    if source.medium is not None:
        codec = folder.tokenizers.codec(source.medium)
        shapes[source.medium] = list(codec.code_shape(tuple(folder.plan.media_shapes[name])))
    is_cropped = folder.config.pictures.crop
    return Layout(shapes=shapes, fill=source.fill, answer_length=answer_length, is_cropped=is_cropped)


def _examples_per_split(reports: list[BlockReport]) -> dict[str, int]:
    """Split → number of examples."""
    splits: dict[str, int] = {}
    for report in reports:
        for split, shard in report.shards.items():
            splits[split] = splits.get(split, 0) + len(shard.text_tokens)
    return splits


def _shared_between_datasets(reports: Reports) -> dict[str, dict[str, int]]:
    """Held-out DATASET/SPLIT → training split of another dataset → number of examples whose content occurs there."""
    occurrences, names = Occurrences(), set[str]()
    for dataset, of_dataset in reports.items():
        for report in of_dataset:
            for split, shard in report.shards.items():
                names.add(f"{dataset}/{split}")
                for content in shard.contents:
                    occurrences.add(content, f"{dataset}/{split}")
    training_first = sorted(names, key=lambda name: (not name.endswith(f"/{TRAIN}"), name))
    shared: dict[str, dict[str, int]] = {}
    for (earlier, later), count in occurrences.shared_counts(training_first).items():
        is_other = earlier.partition("/")[0] != later.partition("/")[0]
        if is_other and earlier.endswith(f"/{TRAIN}") and not later.endswith(f"/{TRAIN}"):
            shared.setdefault(later, {})[earlier] = count
    return shared


def _shared_between_splits(reports: list[BlockReport], splits: Collection[str]) -> dict[str, dict[str, int]]:
    """Split → earlier split → number of examples whose content occurs in both."""
    occurrences, shared = Occurrences(), dict[str, dict[str, int]]()
    for report in reports:
        for split, shard in report.shards.items():
            for content in shard.contents:
                occurrences.add(content, split)
    for (earlier, later), count in occurrences.shared_counts(sorted_splits(splits)).items():
        shared.setdefault(later, {})[earlier] = count
    return shared
