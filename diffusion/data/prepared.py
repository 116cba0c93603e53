"""A prepared folder, opened for reading: its manifest, its tokenizers, and random access to its examples.

Where things lie in the folder is in `prepared_folder.py`, what a shard's records are in `shards.py`.
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
from trimask.diffusion.data.manifest import DatasetManifest, Manifest, require_counts
from trimask.diffusion.data.modalities import shape_example
from trimask.diffusion.data.plan import Job, Plan
from trimask.diffusion.data.prepared_folder import PreparedFolder
from trimask.diffusion.data.records import BadRecord, RawExample
from trimask.diffusion.data.shards import BlockReport
from trimask.diffusion.data.verification import Damaged, checked_report, is_verified, require_none, verify
from trimask.diffusion.run.progress import Report, silent
from trimask.tokenizers.sequence import pad_with_eos
from trimask.tokenizers.storage import configuration
from trimask.tokenizers.storage.files import reading
from trimask.tokenizers.storage.json_text import read_json
from trimask.tokenizers.vocabulary import TEXT, Vocabulary

_FIRST_VERSION = "0.1.0"

_CACHED_EXAMPLES = 200_000
"""Examples of a split that stay in memory once they were read."""


class Examples(Sequence[dict[str, Any]]):
    """The examples of a split: `id`, `num_given`, and codes by modality, the text filled as the layout says."""

    def __init__(self, files: list[str], layout: Layout, vocabulary: Vocabulary):
        self.layout, self.vocabulary = layout, vocabulary
        self._files, self._records = files, []
        if files:
            with reading(files[0], "this shard, or one beside it, cannot be read"):
                self._records = ArrayRecordDataSource(files)
        self._known: dict[int, dict[str, Any]] = {}
        self._sizes = {
            modality: np.array([r.stop - r.start for r in vocabulary.ranges if r.modality == modality])
            for modality in layout.shapes
        }

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index):
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        index = range(len(self))[index]  # the range raises IndexError, which ends a loop
        example = self._known.get(index)
        if example is None:
            with reading(Path(self._files[0]).parent, f"damaged: example {index} of this split cannot be read"):
                example = serialization.msgpack_restore(self._records[index])
                _require_example(example, self.layout, self._sizes)
            if self.layout.fill != "none":
                length = self.layout.text_length(example["num_given"])
                example[TEXT] = pad_with_eos(self.vocabulary, example[TEXT], length)
            if len(self._known) < _CACHED_EXAMPLES:
                self._known[index] = example
        return example


def _require_example(example: Any, layout: Layout, sizes: Mapping[str, Int[np.ndarray, " codebooks"]]) -> None:
    """Refuses a record whose codes are not those of its layout and of codebooks of these sizes."""
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
        raise ValueError(f"{example['num_given']} of its {example[TEXT].size} text tokens are given")


class Prepared:
    """A complete prepared folder."""

    def __init__(self, folder: Path):
        self.paths = PreparedFolder(folder)
        if not self.paths.manifest_file.is_file():
            raise FileNotFoundError(f"{folder}: no prepared data here; make it with `trimask prepare {folder}`")
        self.manifest = configuration.load(self.paths.manifest_file, Manifest)
        self.config, self.tokenizers = self.paths.config, self.paths.tokenizers
        if self.tokenizers.fingerprints != self.manifest.tokenizers:
            raise ValueError(
                f"{folder}: the tokenizers are not those the data was made with: "
                f"{self.tokenizers.fingerprints}, the manifest says {self.manifest.tokenizers}"
            )

    @property
    def folder(self) -> Path:
        """Path of the folder."""
        return self.paths.path

    @cached_property
    def fingerprint(self) -> str:
        """Identity of the data: of what manifest.json says, which has a digest of all examples.

        The version of trimask that wrote it does not count: it stands as the first one.
        """
        said = {**read_json(self.paths.manifest_file), "trimask": _FIRST_VERSION}
        return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()[:16]

    def dataset(self, name: str) -> DatasetManifest:
        """A dataset's manifest."""
        if name not in self.manifest.datasets:
            raise ValueError(f"{self.folder}: no dataset {name!r}, only {', '.join(self.manifest.datasets)}")
        return self.manifest.datasets[name]

    def examples(self, dataset: str, split: str) -> Examples:
        """All examples of a split."""
        files = [self.paths.shard(Job(dataset, number), split) for number, _ in self._reports(dataset, split)]
        examples = Examples(list(map(str, files)), self.dataset(dataset).layout, self.tokenizers.vocabulary)
        expected = self.dataset(dataset).splits[split]
        if len(examples) != expected:
            raise ValueError(
                f"{self.folder}: {dataset}/{split} holds {len(examples)} examples, the manifest says {expected}"
            )
        return examples

    def lengths(self, dataset: str, split: str) -> Int[np.ndarray, " examples"]:
        """Tokens of every example of a split, with its task and boundary tokens."""
        layout = self.dataset(dataset).layout
        if layout.is_uniform:
            return np.full(self.dataset(dataset).splits[split], layout.example_length(), np.int64)
        lengths = [
            layout.example_length(text if layout.fill == "none" else layout.text_length(given))
            for _, report in self._reports(dataset, split)
            for text, given in zip(report.shards[split].text_tokens, report.shards[split].given_tokens, strict=True)
        ]
        return np.array(lengths, np.int64)

    def raw(self, dataset: str, split: str) -> Iterator[RawExample]:
        """What the examples of a split were made of, in the same order, read again from the source."""
        source, shape = self.paths.open_source(dataset), self.plan.media_shapes.get(dataset, [])
        for _, report in self._reports(dataset, split):
            rejected = {reject.line for reject in report.rejects}
            for entry in source.entries(report.block):
                if isinstance(entry, BadRecord) or entry.line in rejected:
                    continue
                is_needed = self.config.splits.by == "content"
                content = entry.example().content(source.medium) if is_needed else None
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
        """The blocks that the data were cut into."""
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
        """Refuses a plan whose media are not those of which the codes of a dataset are."""
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
    def whole(self) -> dict[str, bool]:
        """Dataset → whether a record is one example; a long text is several."""
        return {name: dataset.layout.fill != "none" for name, dataset in self.manifest.datasets.items()}

    def verify(self, report: Report = silent) -> list[Damaged]:
        """Compares every shard with its SHA-256, and returns what is not as it was written."""
        return [fault for _, fault in verify(self.paths, self.whole, report)]

    @property
    def is_verified(self) -> bool:
        """Whether every shard was as it was written when its digest was computed last, and has not changed since."""
        return is_verified(self.paths, self.whole)

    def require_verified(self, report: Report = silent) -> None:
        """Raises Damaged if a shard is not as it was written; digests that were right before are not computed again."""
        if not self.is_verified:
            require_none(self.paths, self.verify(report))

    @cached_property
    def reports(self) -> dict[str, list[BlockReport]]:
        """Dataset → what became of its blocks."""
        reports: dict[str, list[BlockReport]] = {name: [] for name in self.plan.blocks}
        for job in self.plan.jobs:
            reports[job.dataset].append(checked_report(self.paths, job, self.whole[job.dataset]))
        for name, of_dataset in reports.items():
            require_counts(self.paths, name, self.dataset(name), of_dataset)
        return reports
