"""Records of sources, before they become tokens, and what a source is.

A source lists its blocks without reading media; a block is a list of entries; an entry knows its id, its origin and
its split, and loads its media when told to. A record that cannot be used is a `BadRecord`, which says why.
"""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np

from trimask.diffusion.data.fields import Fields
from trimask.diffusion.data.layout import Fill
from trimask.tokenizers.storage.formats import added_field
from trimask.tokenizers.vocabulary import TEXT

Unit = Literal["line", "paragraph", "document"]
"""What one record of a text file is."""


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
    """Digest that names a text by its content, so that equal texts are in one split."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def draw_of(name: str, stream: str) -> float:
    """A number in [0, 1) that belongs to a name, uniform over names and independent between streams."""
    return int.from_bytes(hashlib.sha256(f"{stream}\0{name}".encode()).digest()[:7], "big") / 2**56


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
    fields: Fields = field(default_factory=Fields)
    """What else the source says of it."""
    path: Path | None = None
    """File of its medium, where it has one."""

    @property
    def digest(self) -> str:
        """Digest of the id."""
        return digest(self.id)

    def draw(self, stream: str) -> float:
        """A number in [0, 1) that belongs to the record, independent between streams."""
        return draw_of(self.id, stream)

    def example(self) -> RawExample:
        """The loaded example. Raises BadRecord if a medium cannot be read."""
        try:
            return self.load()
        except (ValueError, OSError) as error:
            raise BadRecord(self.file, self.line, str(error)) from error


@dataclass(frozen=True, kw_only=True)
class Block:
    """Consecutive records of one file, or of one split of something that is not a file."""

    file: str
    start: int
    """Byte at which the first record begins; of a split, the first record's number."""
    line: int
    """Line of the first record, from 1; of a split, its number."""
    count: int
    """Records."""
    file_bytes: int = 0
    """Size of the whole file, by which a change of it is noticed."""
    sha256: str = added_field(as_before="", default="")
    """Of the records, by which a change of them is noticed. Empty: of what is no file."""
    media_sha256: str = added_field(as_before="", default="")
    """Of the names, sizes and times of last change of the files of media that the records name, and of the names that
    the dataset has for their labels."""


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
