"""Tokenises one block of a source into shards of examples, and writes a report of what became of its records.

A shard's record is a msgpack map: the example's id, its codes by modality in their natural shape, and `num_given`, how
many text tokens are a question that is only ever given. Nothing in a shard depends on another block.
"""

import hashlib
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter
from flax import serialization
from jaxtyping import Int

from trimask.diffusion.data.modalities import shape_example
from trimask.diffusion.data.plan import Job
from trimask.diffusion.data.prepare_config import PrepareConfig
from trimask.diffusion.data.prepared_folder import PreparedFolder
from trimask.diffusion.data.records import BadRecord, Block, Entry, RawExample, Source
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


class _Loaded(NamedTuple):
    """A record whose medium was read."""

    entry: Entry
    example: RawExample
    """With its medium at the dataset's shape."""
    content: str
    """Digest of the content before it was brought to that shape."""


def encode_block(folder: PreparedFolder, job: Job) -> BlockReport:
    """Tokenises a block of the folder's plan and writes its shards and its report.

    Raises BadRecord at the first record that cannot be used, if the folder's configuration says so.
    """
    block = folder.plan.block(job)
    rejects: list[Reject] = []
    records: dict[str, list[dict[str, Any]]] = {}
    contents: dict[str, list[str]] = {}
    lost = Counter[str]()
    for chunk in _chunks(folder, job, rejects, lost):
        for split, content, pieces in _encoded(folder, job.dataset, chunk, rejects):
            records.setdefault(split, []).extend(pieces)
            contents.setdefault(split, []).append(content)
    rejects.sort(key=lambda reject: reject.line)
    shards = {}
    for split, of_split in records.items():
        path = folder.shard(job, split)
        shards[split] = ShardReport(
            sha256=write_records(path, of_split),
            num_bytes=path.stat().st_size,
            text_tokens=[len(record[TEXT]) for record in of_split],
            given_tokens=[record["num_given"] for record in of_split],
            contents=contents[split],
        )
    report = BlockReport(block=block, rejects=rejects, shards=shards, lost=dict(lost))
    path = folder.report(job)
    path.parent.mkdir(parents=True, exist_ok=True)
    configuration.save(path, report)
    return report


def _chunks(folder: PreparedFolder, job: Job, rejects: list[Reject], lost: Counter[str]) -> Iterator[list[_Loaded]]:
    """The usable records of a block, some at a time, with media of one shape; `lost` counts what they lose by that."""
    config, source, shape = folder.config, folder.sources[job.dataset], folder.plan.media_shapes.get(job.dataset, [])
    chunk: list[_Loaded] = []
    for entry in source.entries(folder.plan.block(job)):
        try:
            if isinstance(entry, BadRecord):
                raise entry
            try:
                decoded = entry.example()
                example, what_is_lost = shape_example(decoded, source.medium, shape, config.media)
            except BadRecord:
                raise
            except ValueError as error:
                raise BadRecord(entry.file, entry.line, str(error)) from error
        except BadRecord as error:
            _reject(error, config, rejects)
            continue
        lost.update(what_is_lost)
        chunk.append(_Loaded(entry, example, decoded.content(source.medium)))
        if len(chunk) == _CHUNK:
            yield chunk
            chunk = []
    if chunk:
        yield chunk


def _encoded(
    folder: PreparedFolder, dataset: str, chunk: list[_Loaded], rejects: list[Reject]
) -> Iterator[tuple[str, str, list[dict[str, Any]]]]:
    """Split, digest of the content, and examples of every record of a chunk that fits."""
    source, text = folder.sources[dataset], folder.tokenizers.text
    # What is given and what is asked for are tokenised apart, as a question without its answer will be.
    given = text.encode_batch([example.media[TEXT][: example.given] for _, example, _ in chunk])
    asked = text.encode_batch([example.media[TEXT][example.given :] for _, example, _ in chunk])
    codes: list[Any] = [None] * len(chunk)
    if source.medium is not None:
        codes = folder.tokenizers.encode(source.medium, [example.media[source.medium] for _, example, _ in chunk])
    for (entry, example, content), head, tail, medium_codes in zip(chunk, given, asked, codes, strict=True):
        try:
            pieces = _pieces(folder, source, head, tail)
        except ValueError as error:
            _reject(BadRecord(entry.file, entry.line, str(error)), folder.config, rejects)
            continue
        records: list[dict[str, Any]] = []
        for number, piece in enumerate(pieces):
            id = example.id if len(pieces) == 1 else f"{example.id}-{number}"
            records.append({"id": id, "num_given": len(head), TEXT: piece})
            if source.medium is not None:
                records[-1][source.medium] = medium_codes
        yield folder.plan.split_of(dataset, entry, content, folder.config.splits), content, records


def _pieces(
    folder: PreparedFolder, source: Source, given: Int[np.ndarray, " n"], asked: Int[np.ndarray, " m"]
) -> list[Int[np.ndarray, "_"]]:
    """The text as examples: one where EOS will fill it, else pieces whose last ends with EOS."""
    limit, response = folder.config.max_text_tokens, folder.config.response_tokens
    if source.fill == "none":
        ended = np.append(asked, folder.tokenizers.vocabulary.eos_code).astype(np.int32)
        return [ended[start : start + limit] for start in range(0, len(ended), limit)]
    if source.fill == "answer" and response is not None and len(asked) >= response:
        raise ValueError(f"the response has {len(asked)} tokens; --response-tokens {response} keeps one for EOS")
    if len(given) + len(asked) > limit:
        raise ValueError(f"the text has {len(given) + len(asked)} tokens; --max-text-tokens allows {limit}")
    return [np.concatenate([given, asked])]


def _reject(error: BadRecord, config: PrepareConfig, rejects: list[Reject]) -> None:
    """Notes a record that cannot be used, or stops."""
    if config.on_error == "stop":
        raise error
    rejects.append(Reject(file=error.file, line=error.line, reason=error.reason))


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
