"""A prepared folder, opened for reading: its manifest, its tokenizers, and random access to its examples.

`prepared_folder.py` has the paths in the folder, `shards.py` the format of the shards.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from array_record.python.array_record_data_source import ArrayRecordDataSource
from flax import serialization
from jaxtyping import Int

from trimask.diffusion.data.layout import Layout
from trimask.diffusion.data.manifest import DatasetManifest, Manifest, require_consistent_counts
from trimask.diffusion.data.modalities import shape_example
from trimask.diffusion.data.plan import Job, Plan
from trimask.diffusion.data.prepared_folder import PreparedFolder
from trimask.diffusion.data.records import BadRecord, RawExample
from trimask.diffusion.data.shards import BlockReport
from trimask.diffusion.data.verification import Damaged, checked_report, is_verified, require_undamaged, verify
from trimask.diffusion.run.progress import Report, silent
from trimask.tokenizers.storage import configuration
from trimask.tokenizers.storage.files import reading
from trimask.tokenizers.storage.json_text import read_json
from trimask.tokenizers.vocabulary import TEXT, Vocabulary

_FIRST_VERSION = "0.1.0"
"""Version of trimask that stands for all versions in fingerprints."""
_CACHED_EXAMPLES = 200_000
"""Largest number of examples of a split that stay in memory after they were read."""


class Examples(Sequence[dict[str, Any]]):
    """Examples of a split: `id`, `num_given` (prompt tokens), and codes by modality, the text padded as laid out."""

    def __init__(self, files: list[str], layout: Layout, vocabulary: Vocabulary):
        """`files` are the split's shards, in order."""
        self.layout, self.vocabulary = layout, vocabulary
        self._files, self._records = files, []
        if files:
            with reading(files[0], "this shard, or one beside it, cannot be read"):
                self._records = ArrayRecordDataSource(files)
        self._cache: dict[int, dict[str, Any]] = {}
        self._codebook_sizes = {
            modality: np.array([r.stop - r.start for r in vocabulary.ranges if r.modality == modality])
            for modality in layout.shapes
        }

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index):
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        index = range(len(self))[index]  # the range raises IndexError, which ends a loop
        example = self._cache.get(index)
        if example is None:
            with reading(Path(self._files[0]).parent, f"damaged: example {index} of this split cannot be read"):
                example = serialization.msgpack_restore(self._records[index])
                _require_example(example, self.layout, self._codebook_sizes)
            if self.layout.fill != "none":
                length = self.layout.text_length(example["num_given"])
                example[TEXT] = self.vocabulary.pad_with_eos(example[TEXT], length)
            if len(self._cache) < _CACHED_EXAMPLES:
                self._cache[index] = example
        return example


def _require_example(example: Any, layout: Layout, sizes: Mapping[str, Int[np.ndarray, " codebooks"]]) -> None:
    """Raises ValueError if a shard's record does not fit the layout, or codebooks of these sizes."""
    if not isinstance(example, dict) or example.keys() != {"id", "num_given", *layout.shapes}:
        raise ValueError(f"its fields must be id, num_given, {', '.join(layout.shapes)}")
    if not isinstance(example["id"], str) or type(example["num_given"]) is not int:
        raise ValueError("its id must be text, and num_given a whole number")
    for modality, shape in layout.shapes.items():
        codes = example[modality]
        if not isinstance(codes, np.ndarray) or codes.dtype.kind not in "iu" or codes.ndim != len(shape):
            raise ValueError(f"its {modality} must be whole numbers on {len(shape)} axes")
        if codes.shape != tuple(shape) if modality != TEXT else codes.size > shape[0]:
            raise ValueError(f"its {modality} has the shape {codes.shape}, {tuple(shape)} is allowed")
        if codes.size and (codes.min() < 0 or (codes >= sizes[modality]).any()):
            raise ValueError(f"its {modality} has codes that its codebook does not have")
    if not 0 <= example["num_given"] <= example[TEXT].size:
        raise ValueError(f"its prompt has {example['num_given']} tokens, its text {example[TEXT].size}")


class Prepared:
    """A complete prepared folder, opened for reading."""

    def __init__(self, folder: Path):
        """Raises FileNotFoundError if the folder has no manifest, ValueError if its tokenizers are other ones."""
        self.paths = PreparedFolder(folder)
        if not self.paths.manifest_file.is_file():
            raise FileNotFoundError(f"{folder}: no prepared data here; make it with `trimask prepare {folder}`")
        self.manifest = configuration.load(self.paths.manifest_file, Manifest)
        self.config, self.tokenizers = self.paths.config, self.paths.tokenizers
        if self.tokenizers.fingerprints != self.manifest.tokenizers:
            raise ValueError(
                f"{folder}: the tokenizers are not those that the data were made with: their fingerprints are "
                f"{self.tokenizers.fingerprints}, the manifest says {self.manifest.tokenizers}"
            )

    @property
    def folder(self) -> Path:
        """Path of the folder."""
        return self.paths.path

    @cached_property
    def fingerprint(self) -> str:
        """Identity of the data: digest of manifest.json, which contains a digest of all examples.

        It does not depend on the version of trimask that wrote the manifest.
        """
        content = {**read_json(self.paths.manifest_file), "trimask": _FIRST_VERSION}
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]

    def dataset(self, name: str) -> DatasetManifest:
        """Manifest of a dataset. Raises ValueError if there is no such dataset."""
        if name not in self.manifest.datasets:
            raise ValueError(f"{self.folder}: no dataset {name!r}, only {', '.join(self.manifest.datasets)}")
        return self.manifest.datasets[name]

    def examples(self, dataset: str, split: str) -> Examples:
        """All examples of a split. Raises ValueError if the split does not exist, or if examples are missing."""
        files = [self.paths.shard(Job(dataset, number), split) for number, _ in self._reports(dataset, split)]
        examples = Examples(list(map(str, files)), self.dataset(dataset).layout, self.tokenizers.vocabulary)
        expected = self.dataset(dataset).splits[split]
        if len(examples) != expected:
            raise ValueError(
                f"{self.folder}: {dataset}/{split} holds {len(examples)} examples, the manifest says {expected}"
            )
        return examples

    def lengths(self, dataset: str, split: str) -> Int[np.ndarray, " examples"]:
        """Number of tokens of every example of a split, task and boundary tokens included."""
        layout = self.dataset(dataset).layout
        if layout.is_uniform:
            return np.full(self.dataset(dataset).splits[split], layout.example_length(), np.int64)
        lengths = [
            layout.example_length(text if layout.fill == "none" else layout.text_length(given))
            for _, report in self._reports(dataset, split)
            for text, given in zip(report.shards[split].text_tokens, report.shards[split].given_tokens, strict=True)
        ]
        return np.array(lengths, np.int64)

    def num_given(self, dataset: str, split: str) -> Int[np.ndarray, " examples"]:
        """Number of prompt tokens of every example of a split."""
        given = [n for _, report in self._reports(dataset, split) for n in report.shards[split].given_tokens]
        return np.array(given, np.int64)

    def raw(self, dataset: str, split: str) -> Iterator[RawExample]:
        """Raw examples of a split in the order of its examples, read again from the source, with media of one shape.

        A long text is one raw example, though it is several examples of the split.
        """
        source, shape = self.paths.open_source(dataset), self.plan.media_shapes.get(dataset, [])
        for _, report in self._reports(dataset, split):
            rejected = {reject.line for reject in report.rejects}
            for entry in source.entries(report.block):
                if isinstance(entry, BadRecord) or entry.line in rejected:
                    continue
                is_needed = self.config.splits.by == "content"
                content = entry.example().content_digest(source.medium) if is_needed else None
                if self.plan.split_of(dataset, entry, content, self.config.splits) == split:
                    yield shape_example(entry.example(), source.medium, shape, self.config.media)[0]

    def _reports(self, dataset: str, split: str) -> list[tuple[int, BlockReport]]:
        """Number and report of every block that has examples of a split."""
        splits = self.dataset(dataset).splits
        if split not in splits:
            raise ValueError(f"{self.folder}: {dataset} has no split {split!r}, only {', '.join(splits)}")
        return [(number, report) for number, report in enumerate(self.reports[dataset]) if split in report.shards]

    @cached_property
    def plan(self) -> Plan:
        """Plan of the blocks. Raises ValueError if it contradicts the manifest."""
        plan = self.paths.plan
        if plan.blocks.keys() != self.manifest.datasets.keys():
            raise ValueError(
                f"{self.folder}: plan.json is of datasets {', '.join(plan.blocks)}, the manifest of "
                f"{', '.join(self.manifest.datasets)}"
            )
        for name, dataset in self.manifest.datasets.items():
            if dataset.medium is not None:
                self._require_shape(plan, name, dataset.medium)
        return plan

    def _require_shape(self, plan: Plan, name: str, medium: str) -> None:
        """Raises ValueError if a dataset's media of the planned shape do not have codes of its layout's shape."""
        codec, codes = self.tokenizers.codec(medium), tuple(self.dataset(name).layout.shapes[medium])
        shape = tuple(plan.media_shapes.get(name, ()))
        try:
            is_right = len(shape) == len(codec.media_shape(codes)) and codec.code_shape(shape) == codes
        except ValueError:
            is_right = False
        if not is_right:
            raise ValueError(
                f"{self.paths.plan_file}: damaged: {medium} of shape {shape} of {name} have no codes of shape {codes}"
            )

    @property
    def is_one_to_one(self) -> dict[str, bool]:
        """Dataset → whether each record is exactly one example; False for plain text, which is cut into pieces."""
        return {name: dataset.layout.fill != "none" for name, dataset in self.manifest.datasets.items()}

    def verify(self, report: Report = silent) -> list[Damaged]:
        """Compares every shard with its SHA-256, and returns the faults of all damaged blocks."""
        return [fault for _, fault in verify(self.paths, self.is_one_to_one, report)]

    @property
    def is_verified(self) -> bool:
        """Whether every shard had the right digest at the last verification, and has not changed since."""
        return is_verified(self.paths, self.is_one_to_one)

    def require_verified(self, report: Report = silent) -> None:
        """Raises Damaged if a shard is damaged; digests are computed only if a shard is new or has changed."""
        if not self.is_verified:
            require_undamaged(self.paths, self.verify(report))

    @cached_property
    def reports(self) -> dict[str, list[BlockReport]]:
        """Dataset → reports of its blocks. Raises Damaged or ValueError if they contradict the plan or the manifest."""
        reports: dict[str, list[BlockReport]] = {name: [] for name in self.plan.blocks}
        for job in self.plan.jobs:
            reports[job.dataset].append(checked_report(self.paths, job, self.is_one_to_one[job.dataset]))
        for name, of_dataset in reports.items():
            require_consistent_counts(self.paths, name, self.dataset(name), of_dataset)
        return reports
