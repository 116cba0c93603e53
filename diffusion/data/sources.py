"""Where raw examples come from: text, alone or paired with one medium, read block by block.

    kind      where                       records
    digits    a config of digits.py       the embedded dataset
    images    a folder                    lines of metadata.jsonl (.csv, .parquet): file_name, text, what else you like
    audio     a folder                    the same; the kind of every further modality is its name
    text      files (globs are expanded)  paragraphs, lines or whole files; of .jsonl, a field of each line
    prompts   .jsonl files                two fields of each line: what is asked, and the answer
    puzzles   a config of puzzles.py      embedded prompts, and the responses that are right
    tfds      names of TFDS               records with a text or label, alone or beside an image or audio

A source lists its blocks without reading media; a block is a list of entries; an entry knows its id, its origin and
its split, and loads its media when told to. A record that cannot be used is a `BadRecord`, which says why.
"""

import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np

from trimask.diffusion.data.lines import Block, Unit
from trimask.diffusion.data.media_config import MediaConfig
from trimask.diffusion.data.modalities import MODALITIES
from trimask.diffusion.layout import Fill
from trimask.tokenizers.formats import added
from trimask.tokenizers.vocabulary import TEXT


@dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """One kind of source and where it is."""

    kind: str
    """A kind of the table at the head of this file."""
    where: tuple[str, ...]
    """Folder, files or names."""


@dataclass(frozen=True, kw_only=True)
class FieldConfig:
    """Names of the fields that are read, and what a record is."""

    text: str = "text"
    """Field of metadata.jsonl, of .jsonl text files, and of TFDS records."""
    prompt: str = "prompt"
    """Field of .jsonl files of prompts that is given."""
    response: str = "response"
    """Field of .jsonl files of prompts that is asked for."""
    labels: tuple[str, ...] = added(as_before=(), default=())
    """Names of the numbers 0, 1, … where the text of a picture or a sound is a number. None given: those that a dataset
    of Hugging Face says."""
    text_unit: Unit = "paragraph"
    """What one example of a plain text file is."""

    def __post_init__(self):
        if not all(name.strip() for name in self.labels):
            raise ValueError(f"names of labels must not be empty, got {', '.join(map(repr, self.labels))}")


@dataclass(frozen=True, kw_only=True)
class OpenConfig:
    """What opening a source takes, beside what it is."""

    fields: FieldConfig
    media: MediaConfig
    """To what media are brought as they are read."""
    folder: Path
    """Where a source may keep what it builds."""
    tfds_folder: Path | None = None
    """Where TFDS keeps its datasets. None: TFDS's own choice."""
    is_download: bool = False
    """True where TFDS may download what is not there."""


@dataclass(frozen=True)
class RawExample:
    """An example before tokenisation.

    Media by modality: text is a str, image uint8 [height, width, channels], audio float32 [samples] in [-1, 1], any
    other an array.
    """

    id: str
    media: dict[str, Any]
    given: int = 0
    """Characters of the text that are given when the example is asked as a question."""

    def content(self, medium: str | None) -> str:
        """Digest by which examples of equal content are known: of the medium; of text alone what is given, or all."""
        if medium is None:
            text = self.media[TEXT]
            return digest(text[: self.given] or text)
        array = np.ascontiguousarray(self.media[medium])
        return hashlib.sha256(f"{array.shape} {array.dtype}\0".encode() + array.tobytes()).hexdigest()[:16]


def digest(text: str) -> str:
    """Names a text by its content, so that equal texts are in one split."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


class BadRecord(ValueError):
    """A record that cannot be used."""

    def __init__(self, file: str, line: int, reason: str):
        super().__init__(file, line, reason)
        self.file, self.line, self.reason = file, line, reason

    def __str__(self) -> str:
        return f"{self.file}, line {self.line}: {self.reason}"


@dataclass(frozen=True)
class Entry:
    """A record before its media are read."""

    id: str
    file: str
    line: int
    load: Callable[[], RawExample]
    """Raises ValueError or OSError where a medium cannot be read."""
    split: str | None = None
    """Where the source says it; None: drawn by id."""
    fields: Mapping[str, Any] = field(default_factory=dict)
    """What else the source says of it."""
    path: Path | None = None
    """File of its medium, where it has one."""

    def example(self) -> RawExample:
        """The loaded example; a BadRecord where that fails."""
        try:
            return self.load()
        except (ValueError, OSError) as error:
            raise BadRecord(self.file, self.line, str(error)) from error


@runtime_checkable
class Source(Protocol):
    """Raw examples of one kind."""

    @property
    def medium(self) -> str | None:
        """What is paired with the text; None: text alone."""
        ...

    @property
    def fill(self) -> Fill:
        """What of an example's text is filled with EOS."""
        ...

    def blocks(self, records: int) -> list[Block]:
        """All records, in blocks of so many; always the same for the same files."""
        ...

    def entries(self, block: Block) -> Iterator[Entry | BadRecord]:
        """The records of a block, in order."""
        ...


def open_source(source: SourceConfig, config: OpenConfig) -> Source:
    """The source of this kind."""
    kinds = {name: partial(_folder, name) for name in MODALITIES} | KINDS
    if source.kind not in kinds:
        raise ValueError(f"unknown kind of source {source.kind!r}; there are {', '.join(kinds)}")
    if not source.where:
        raise ValueError(f"a source of {source.kind} needs at least one name, got none")
    return kinds[source.kind](source.where, config)


def folder_kind(medium: str) -> str:
    """The kind of source that is a folder of this medium; `images` are called as they always were."""
    return "images" if medium == "image" else medium


def _digits(where: tuple[str, ...], config: OpenConfig) -> Source:
    from trimask.diffusion.data import tfds_records  # TFDS takes seconds to import

    return tfds_records.EmbeddedDigits(_only(where, "digits"), config.folder)


def _tfds(where: tuple[str, ...], config: OpenConfig) -> Source:
    from trimask.diffusion.data import tfds_records

    return tfds_records.TfdsSource(_only(where, "tfds"), config)


def _folder(medium: str, where: tuple[str, ...], config: OpenConfig) -> Source:
    from trimask.diffusion.data.folders import Folder

    return Folder(Path(_only(where, folder_kind(medium))), medium, config)


def _text(where: tuple[str, ...], config: OpenConfig) -> Source:
    from trimask.diffusion.data.texts import Texts

    return Texts(where, config.fields, config.media.limits.record_bytes)


def _prompts(where: tuple[str, ...], config: OpenConfig) -> Source:
    from trimask.diffusion.data.texts import Prompted

    return Prompted(where, config.fields, config.media.limits.record_bytes)


def _puzzles(where: tuple[str, ...], config: OpenConfig) -> Source:
    from trimask.diffusion.data.puzzles import Puzzles

    return Puzzles(_only(where, "puzzles"))


def _only(where: tuple[str, ...], kind: str) -> str:
    if len(where) != 1:
        raise ValueError(f"a source of {kind} is one name, got {', '.join(where)}")
    return where[0]


KINDS: dict[str, Callable[[tuple[str, ...], OpenConfig], Source]] = {
    "digits": _digits,
    "images": partial(_folder, "image"),
    "audio": partial(_folder, "audio"),
    "text": _text,
    "prompts": _prompts,
    "puzzles": _puzzles,
    "tfds": _tfds,
}
