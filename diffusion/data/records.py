"""Records of sources before they become tokens, and the protocol of a source.

A source lists its blocks without reading media. A block is a run of records, which are read as entries. An entry knows
its id, its file and line, and its split, and loads its media on demand. A record that cannot be used is a `BadRecord`,
which says why.
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

TextUnit = Literal["line", "paragraph", "document"]
"""Part of a text file that is one record."""


@dataclass(frozen=True)
class RawExample:
    """An example before tokenisation."""

    id: str
    media: dict[str, Any]
    """Modality → its medium: text is a str, image uint8 [height, width, channels], audio float32 [samples] in [-1, 1],
    any other modality an array."""
    given_characters: int = 0
    """Number of characters of the prompt, with which the text begins; 0 if it has none."""

    def content_digest(self, medium: str | None) -> str:
        """Digest that equal examples share: of the medium; for text alone, of the prompt, or of the whole text.

        The caption of a medium does not count.
        """
        if medium is None:
            text = self.media[TEXT]
            return text_digest(text[: self.given_characters] or text)
        array = np.ascontiguousarray(self.media[medium])
        return hashlib.sha256(f"{array.shape} {array.dtype}\0".encode() + array.tobytes()).hexdigest()[:16]


def text_digest(text: str) -> str:
    """First 16 hexadecimal digits of a text's SHA-256: an id under which equal texts are drawn into one split."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def uniform_draw(name: str, stream: str) -> float:
    """Number in [0, 1) that is fixed by a name, uniform over names, and independent between streams."""
    return int.from_bytes(hashlib.sha256(f"{stream}\0{name}".encode()).digest()[:7], "big") / 2**56


class BadRecord(ValueError):
    """A record that cannot be used, with its file, its line (from 1) and the reason."""

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
    """File, or split, that the record comes from."""
    line: int
    """Line of the record in its file, from 1; in a split, its number, from 1."""
    load: Callable[[], RawExample]
    """Reads the example. Raises ValueError or OSError if a medium cannot be read."""
    split: str | None = None
    """Split that the source names. None: the split is drawn."""
    fields: Fields = field(default_factory=Fields)
    """All named values of the record, which rules of held-out records compare."""
    path: Path | None = None
    """File of its medium, if it has one."""

    @property
    def digest(self) -> str:
        """Digest of the id."""
        return text_digest(self.id)

    def draw(self, stream: str) -> float:
        """Number in [0, 1) that is fixed by the id, and independent between streams."""
        return uniform_draw(self.id, stream)

    def example(self) -> RawExample:
        """Loads the example. Raises BadRecord if a medium cannot be read."""
        try:
            return self.load()
        except (ValueError, OSError) as error:
            raise BadRecord(self.file, self.line, str(error)) from error


@dataclass(frozen=True, kw_only=True)
class Block:
    """Consecutive records of one file, or of one split of a source without files."""

    file: str
    """Path of the file, or name of the split."""
    start: int
    """Byte at which the first record begins; in a table or a split, the number of the first record, from 0."""
    line: int
    """Line of the first record, from 1; in a split, its number, from 1."""
    count: int
    """Number of records."""
    file_bytes: int = 0
    """Size of the whole file in bytes, to notice changes; 0 for a split."""
    sha256: str = added_field(as_before="", default="")
    """SHA-256 of the records, to notice changes; empty for a split."""
    media_sha256: str = added_field(as_before="", default="")
    """SHA-256 of the names, sizes and times of last change of the media files that the records name, and of the names
    that the dataset declares for their labels."""


@runtime_checkable
class Source(Protocol):
    """Raw examples of one dataset."""

    @property
    def medium(self) -> str | None:
        """Modality that is paired with the text; None for text alone."""
        ...

    @property
    def fill(self) -> Fill:
        """Part of an example's text that is padded with EOS."""
        ...

    def blocks(self, records: int) -> list[Block]:
        """All records in blocks of at most `records`; the same for the same files."""
        ...

    def entries(self, block: Block) -> Iterator[Entry | BadRecord]:
        """Records of a block, in order."""
        ...
