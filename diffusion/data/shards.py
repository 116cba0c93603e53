"""Tokenises one block of a source into shards of examples, and writes the report of the block.

A record of a shard is a msgpack map: the example's `id`, its codes by modality in their own shape, and `num_given`, the
number of text tokens of its prompt. Nothing in a shard depends on another block.
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
"""Number of records that are tokenised together."""


@dataclass(frozen=True, kw_only=True)
class Reject:
    """A record that could not be used."""

    file: str
    line: int
    """Line of the record, from 1."""
    reason: str


@dataclass(frozen=True, kw_only=True)
class ShardReport:
    """Numbers of one shard. Lists have an entry per example, in order, unless they say otherwise."""

    sha256: str
    """SHA-256 of the file."""
    num_bytes: int | None = added_field(as_before=None, default=None)
    """Size of the file in bytes; None in reports of the first versions."""
    text_tokens: list[int] = field(default_factory=list)
    """Number of text tokens, before padding with EOS."""
    given_tokens: list[int] = field(default_factory=list)
    """Number of text tokens of the prompt."""
    contents: list[str] = added_field(as_before=[], default_factory=list)
    """Digest of the content of each record; a long text is one record, but several examples."""


@dataclass(frozen=True, kw_only=True)
class BlockReport:
    """Result of tokenising a block."""

    block: Block
    rejects: list[Reject]
    """Records that could not be used."""
    shards: dict[str, ShardReport]
    """Split → its shard; splits without examples are absent."""
    lost: dict[str, int] = added_field(as_before={}, default_factory=dict)
    """Property that media lose at the dataset's shape although the configuration does not ask for it, such as colour →
    number of such media."""


class _LoadedRecord(NamedTuple):
    """A record whose medium was read."""

    entry: Entry
    example: RawExample
    """The example with its medium at the dataset's shape."""
    content: str
    """Digest of the content before the medium was brought to that shape."""


def encode_block(folder: PreparedFolder, job: Job) -> BlockReport:
    """Tokenises a block of the folder's plan and writes its shards and its report.

    Raises BadRecord at the first record that cannot be used, unless the folder's configuration says to skip it.
    """
    block = folder.plan.block(job)
    rejects: list[Reject] = []
    records: dict[str, list[dict[str, Any]]] = {}
    contents: dict[str, list[str]] = {}
    lost = Counter[str]()
    for chunk in _chunks(folder, job, rejects, lost):
        for split, content, examples in _encode_chunk(folder, job.dataset, chunk, rejects):
            records.setdefault(split, []).extend(examples)
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


def _chunks(
    folder: PreparedFolder, job: Job, rejects: list[Reject], lost: Counter[str]
) -> Iterator[list[_LoadedRecord]]:
    """Usable records of a block in chunks, with media of one shape.

    Adds the other records to `rejects`, and counts in `lost` what media lose at that shape.
    """
    config, source, shape = folder.config, folder.sources[job.dataset], folder.plan.media_shapes.get(job.dataset, [])
    chunk: list[_LoadedRecord] = []
    for entry in source.entries(folder.plan.block(job)):
        try:
            if isinstance(entry, BadRecord):
                raise entry
            try:
                decoded = entry.example()
                example, discarded = shape_example(decoded, source.medium, shape, config.media)
            except BadRecord:
                raise
            except ValueError as error:
                raise BadRecord(entry.file, entry.line, str(error)) from error
        except BadRecord as error:
            _reject(error, config, rejects)
            continue
        lost.update(discarded)
        chunk.append(_LoadedRecord(entry, example, decoded.content_digest(source.medium)))
        if len(chunk) == _CHUNK:
            yield chunk
            chunk = []
    if chunk:
        yield chunk


def _encode_chunk(
    folder: PreparedFolder, dataset: str, chunk: list[_LoadedRecord], rejects: list[Reject]
) -> Iterator[tuple[str, str, list[dict[str, Any]]]]:
    """Split, digest of the content, and examples of every record of a chunk whose text fits."""
    source, text = folder.sources[dataset], folder.tokenizers.text
    # Prompt and rest are tokenised separately, as a prompt without its response will be at generation.
    prompts = text.encode_batch([example.media[TEXT][: example.given_characters] for _, example, _ in chunk])
    rests = text.encode_batch([example.media[TEXT][example.given_characters :] for _, example, _ in chunk])
    codes: list[Any] = [None] * len(chunk)
    if source.medium is not None:
        codes = folder.tokenizers.encode(source.medium, [example.media[source.medium] for _, example, _ in chunk])
    for (entry, example, content), prompt, rest, medium_codes in zip(chunk, prompts, rests, codes, strict=True):
        try:
            texts = _texts_of_examples(folder, source, prompt, rest)
        except ValueError as error:
            _reject(BadRecord(entry.file, entry.line, str(error)), folder.config, rejects)
            continue
        records: list[dict[str, Any]] = []
        for number, tokens in enumerate(texts):
            id = example.id if len(texts) == 1 else f"{example.id}-{number}"
            records.append({"id": id, "num_given": len(prompt), TEXT: tokens})
            if source.medium is not None:
                records[-1][source.medium] = medium_codes
        yield folder.plan.split_of(dataset, entry, content, folder.config.splits), content, records


def _texts_of_examples(
    folder: PreparedFolder, source: Source, prompt: Int[np.ndarray, " n"], rest: Int[np.ndarray, " m"]
) -> list[Int[np.ndarray, "_"]]:
    """Text tokens of each example that a record becomes: one if it will be padded, else pieces, the last ending in EOS.

    Raises ValueError if a text that must stay whole is too long.
    """
    limit, response = folder.config.max_text_tokens, folder.config.response_tokens
    if source.fill == "none":
        ended = np.append(rest, folder.tokenizers.vocabulary.eos_code).astype(np.int32)
        return [ended[start : start + limit] for start in range(0, len(ended), limit)]
    if source.fill == "answer" and response is not None and len(rest) >= response:
        raise ValueError(f"the response has {len(rest)} tokens; --response-tokens {response} keeps one for EOS")
    if len(prompt) + len(rest) > limit:
        raise ValueError(f"the text has {len(prompt) + len(rest)} tokens; --max-text-tokens allows {limit}")
    return [np.concatenate([prompt, rest])]


def _reject(error: BadRecord, config: PrepareConfig, rejects: list[Reject]) -> None:
    """Adds a record to `rejects`, or raises its error if the configuration says to stop."""
    if config.on_error == "stop":
        raise error
    rejects.append(Reject(file=error.file, line=error.line, reason=error.reason))


def write_records(path: Path, records: list[dict[str, Any]]) -> str:
    """Writes a shard atomically and returns its SHA-256. Raises IsADirectoryError if there is a folder at its path."""
    if path.is_dir() and not path.is_symlink():
        require_regular_file(path)  # raises; files and links are replaced
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    partial.unlink(missing_ok=True)  # left by a process that had the same id, or a link
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
