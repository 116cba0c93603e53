"""One block of a source → shards of tokenised examples, and a report that says what became of its records.

    folder/<dataset>/<split>-00007.array_record    the block's examples of a split
    folder/<dataset>/block-00007.json              written last: a block that has it is done

A shard's record is a msgpack map: the example's id, its codes by modality in their natural shape, and `num_given`, how
many text tokens are a question that is only ever given. Nothing in a shard depends on another block.
"""

import hashlib
import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter
from flax import serialization
from jaxtyping import Int

from trimask.diffusion.data.modalities import modality
from trimask.diffusion.data.plan import Plan, fitted, split_of, stacked
from trimask.diffusion.data.prepare_config import PrepareConfig
from trimask.diffusion.data.records import BadRecord, Block, Entry, RawExample, Source
from trimask.tokenizers import media as media_tokenizers
from trimask.tokenizers.media import MediaTokenizers
from trimask.tokenizers.storage import configuration
from trimask.tokenizers.storage.files import require_regular_file, written_to
from trimask.tokenizers.storage.formats import added_field
from trimask.tokenizers.vocabulary import TEXT

_CHUNK = 256
"""Examples that are tokenised together."""


@dataclass(frozen=True, kw_only=True)
class Reject:
    """A record that was not used."""

    file: str
    line: int
    reason: str


@dataclass(frozen=True, kw_only=True)
class ShardReport:
    """The examples of one shard, in order."""

    sha256: str
    """Of the file."""
    num_bytes: int | None = added_field(as_before=None, default=None)
    """Size of the file; None in reports of the first versions."""
    text_tokens: list[int] = field(default_factory=list)
    """Text tokens of each, before anything is filled with EOS."""
    given_tokens: list[int] = field(default_factory=list)
    """How many of them are given."""
    contents: list[str] = added_field(as_before=[], default_factory=list)
    """Digest of the content of each record, in order; a long text is one."""


@dataclass(frozen=True, kw_only=True)
class BlockReport:
    """What became of a block."""

    block: Block
    rejects: list[Reject]
    shards: dict[str, ShardReport]
    """Split → its shard; a split without examples is absent."""
    lost: dict[str, int] = added_field(as_before={}, default_factory=dict)
    """What media lost at the dataset's shape → how many."""


def encode_block(folder: Path, dataset: str, number: int) -> BlockReport:
    """Tokenises a block of the folder's plan and writes its shards; a BadRecord stops it if the config says so."""
    workshop = _block_encoder(folder)
    block = workshop.plan.blocks[dataset][number]
    rejects: list[Reject] = []
    records: dict[str, list[dict[str, Any]]] = {}
    contents: dict[str, list[str]] = {}
    lost = Counter[str]()
    for chunk in _chunks(workshop, dataset, block, rejects, lost):
        for split, content, pieces in workshop.encoded(dataset, chunk, rejects):
            records.setdefault(split, []).extend(pieces)
            contents.setdefault(split, []).append(content)
    rejects.sort(key=lambda reject: reject.line)
    shards = {}
    for split, of_split in records.items():
        path = shard_path(folder, dataset, split, number)
        shards[split] = ShardReport(
            sha256=write_records(path, of_split),
            num_bytes=path.stat().st_size,
            text_tokens=[len(record[TEXT]) for record in of_split],
            given_tokens=[record["num_given"] for record in of_split],
            contents=contents[split],
        )
    report = BlockReport(block=block, rejects=rejects, shards=shards, lost=dict(lost))
    path = report_path(folder, dataset, number)
    path.parent.mkdir(parents=True, exist_ok=True)
    configuration.save(path, report)
    return report


def shard_path(folder: Path, dataset: str, split: str, number: int) -> Path:
    """The shard of a block's examples of one split."""
    return folder / dataset / f"{split}-{number:05}.array_record"


def report_path(folder: Path, dataset: str, number: int) -> Path:
    """The report of a block."""
    return folder / dataset / f"block-{number:05}.json"


def write_records(path: Path, records: list[dict[str, Any]]) -> str:
    """One shard, visible only when whole; returns its SHA-256."""
    if path.is_dir() and not path.is_symlink():
        require_regular_file(path)  # which it is not; anything else is replaced
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    partial.unlink(missing_ok=True)  # of a process that had this number, or a link
    try:
        with written_to(path):
            writer = ArrayRecordWriter(str(partial), "group_size:1")
            for record in records:
                writer.write(serialization.msgpack_serialize(record))
            writer.close()
        with partial.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    return digest


def remove_partials(folder: Path, blocks: Mapping[str, int]) -> None:
    """Removes what killed processes left of the shards of so many blocks of each dataset, and nothing else."""
    for name, count in blocks.items():
        for path in (folder / name).glob("*.array_record.*.partial"):
            found = re.fullmatch(r"\w+-(\d{5,})\.array_record\.\d+\.partial", path.name)
            if found is not None and int(found[1]) < count and not path.is_dir():
                path.unlink()


def remove_block(folder: Path, dataset: str, number: int) -> None:
    """Removes what was made of a block: its report, then its shards."""
    shards = (folder / dataset).glob(f"*-{number:05}.array_record")
    for path in (report_path(folder, dataset, number), *shards):
        if not path.is_dir() or path.is_symlink():
            path.unlink(missing_ok=True)


def raw_folder(folder: Path) -> Path:
    """Where sources keep what they build."""
    return folder / "raw"


class _LoadedRecord(NamedTuple):
    """A record that was read."""

    entry: Entry
    example: RawExample
    """With its medium at the dataset's shape."""
    content: str
    """Digest of what was decoded."""


@dataclass(frozen=True)
class _BlockEncoder:
    """A folder that is being prepared, as one process sees it."""

    config: PrepareConfig
    plan: Plan
    tokenizers: MediaTokenizers
    sources: dict[str, Source]

    def encoded(
        self, dataset: str, chunk: list[_LoadedRecord], rejects: list[Reject]
    ) -> Iterator[tuple[str, str, list[dict[str, Any]]]]:
        """Split, digest of the content, and examples of every record of a chunk that fits."""
        source, text = self.sources[dataset], self.tokenizers.text
        # What is given and what is asked for are tokenised apart, as a question without its answer will be.
        given = text.encode_batch([example.media[TEXT][: example.given] for _, example, _ in chunk])
        asked = text.encode_batch([example.media[TEXT][example.given :] for _, example, _ in chunk])
        codes: list[Any] = [None] * len(chunk)
        if source.medium is not None:
            codes = self.tokenizers.encode(source.medium, list(stacked([e for _, e, _ in chunk], source.medium)))
        for (entry, example, content), head, tail, medium_codes in zip(chunk, given, asked, codes, strict=True):
            try:
                pieces = self._pieces(source, head, tail)
            except ValueError as error:
                self.reject(BadRecord(entry.file, entry.line, str(error)), rejects)
                continue
            records: list[dict[str, Any]] = []
            for number, piece in enumerate(pieces):
                id = example.id if len(pieces) == 1 else f"{example.id}-{number}"
                records.append({"id": id, "num_given": len(head), TEXT: piece})
                if source.medium is not None:
                    records[-1][source.medium] = medium_codes
            yield split_of(dataset, entry, content, self.config, self.plan), content, records

    def _pieces(
        self, source: Source, given: Int[np.ndarray, " n"], asked: Int[np.ndarray, " m"]
    ) -> list[Int[np.ndarray, "_"]]:
        """The text as examples: one where EOS will fill it, else pieces whose last ends with EOS."""
        limit = self.config.max_text_tokens
        if source.fill == "none":
            ended = np.append(asked, self.tokenizers.vocabulary.eos_code).astype(np.int32)
            return [ended[start : start + limit] for start in range(0, len(ended), limit)]
        response = self.config.response_tokens
        if source.fill == "answer" and response is not None and len(asked) >= response:
            raise ValueError(f"the response has {len(asked)} tokens; --response-tokens {response} keeps one for EOS")
        if len(given) + len(asked) > limit:
            raise ValueError(f"the text has {len(given) + len(asked)} tokens; --max-text-tokens allows {limit}")
        return [np.concatenate([given, asked])]

    def reject(self, error: BadRecord, rejects: list[Reject]) -> None:
        """Notes a record that cannot be used, or stops."""
        if self.config.on_error == "stop":
            raise error
        rejects.append(Reject(file=error.file, line=error.line, reason=error.reason))


def _chunks(
    workshop: _BlockEncoder, dataset: str, block: Block, rejects: list[Reject], lost: Counter[str]
) -> Iterator[list[_LoadedRecord]]:
    """The usable records of a block, some at a time, with media of one shape; `lost` counts what they lose by that."""
    source, shape = workshop.sources[dataset], workshop.plan.media_shapes.get(dataset, [])
    chunk: list[_LoadedRecord] = []
    for entry in source.entries(block):
        try:
            if isinstance(entry, BadRecord):
                raise entry
            try:
                decoded = entry.example()
                example = fitted(decoded, source.medium, shape, workshop.config)
            except BadRecord:
                raise
            except ValueError as error:
                raise BadRecord(entry.file, entry.line, str(error)) from error
        except BadRecord as error:
            workshop.reject(error, rejects)
            continue
        if source.medium is not None:
            lost.update(modality(source.medium).lost(decoded.media[source.medium], tuple(shape), workshop.config.media))
        chunk.append(_LoadedRecord(entry, example, decoded.content(source.medium)))
        if len(chunk) == _CHUNK:
            yield chunk
            chunk = []
    if chunk:
        yield chunk


def forget_encoders() -> None:
    """Lets this process read a folder's configuration and tokenizers anew."""
    _block_encoder.cache_clear()


@lru_cache(maxsize=1)
def _block_encoder(folder: Path) -> _BlockEncoder:
    config = configuration.load(folder / "config.json", PrepareConfig)
    sources = {name: config.open_source(name, raw_folder(folder)) for name in config.sources}
    plan = configuration.load(folder / "plan.json", Plan)
    return _BlockEncoder(config, plan, media_tokenizers.load_tokenizers(folder / "tokenizers"), sources)
