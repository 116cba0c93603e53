"""Text files as runs of records that can be read from the middle.

A record is a line, a paragraph (lines between blank ones) or a whole document, and knows where it stands: the byte at
which it begins, and its line. A block is a run of records of one file; reading it needs nothing of what is before.
"""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import BinaryIO, Literal

from trimask.tokenizers.files import require_regular_file

MAX_RECORD_BYTES = 1 << 28
"""Longest record that is used; a longer one is read past, and refused where it is to be used."""

Unit = Literal["line", "paragraph", "document"]


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


@dataclass(frozen=True)
class Record:
    """The bytes of a record, without blank lines around."""

    start: int
    line: int
    content: bytes
    num_bytes: int
    """Of the whole record; of one that has more than `MAX_RECORD_BYTES` the content is only the beginning."""

    @property
    def text(self) -> str:
        """The content as text. Raises ValueError for a record that is too long, or no text."""
        if self.num_bytes > MAX_RECORD_BYTES:
            raise ValueError(f"a record of {self.num_bytes:,} bytes, {MAX_RECORD_BYTES:,} are allowed")
        return decoded(self.content)


def blocks_of(path: Path, unit: Unit, records: int) -> list[Block]:
    """The file cut into blocks of so many records; the last may have fewer."""
    blocks = []
    with _opened(path) as file:
        for number, record in enumerate(_records(file, unit, 1)):
            if number % records == 0:
                size = path.stat().st_size
                blocks.append(Block(file=str(path), start=record.start, line=record.line, count=0, file_bytes=size))
            blocks[-1] = dataclasses.replace(blocks[-1], count=number % records + 1)
    return blocks


def blocks_of_split(split: str, count: int, records: int) -> list[Block]:
    """A split of something that is not a file, likewise."""
    return [
        Block(file=split, start=start, line=start + 1, count=min(records, count - start))
        for start in range(0, count, records)
    ]


def records_of(block: Block, unit: Unit) -> Iterator[Record]:
    """The records of a block."""
    with _opened(Path(block.file)) as file:
        file.seek(block.start)
        yield from islice(_records(file, unit, block.line), block.count)


def decoded(content: bytes) -> str:
    """UTF-8 text with line ends as LF and without a byte order mark; what is no text is refused."""
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 text: {error.reason} at byte {error.start} of the record") from error
    if "\0" in text:
        raise ValueError("not UTF-8 text: it holds NUL bytes")
    return text.replace("\r\n", "\n")


def _opened(path: Path) -> BinaryIO:
    require_regular_file(path)
    return path.open("rb")


def _records(file: BinaryIO, unit: Unit, line: int) -> Iterator[Record]:
    """Records from the file's place on, which is line `line`."""
    position, start, first, num_bytes = file.tell(), 0, 0, 0
    parts: list[bytes] = []
    for number, (content, length) in enumerate(_lines(file), line):
        is_blank = not content.strip() and length == len(content)
        if not parts:
            start, first, num_bytes = position, number, 0
        if not is_blank or (parts and unit == "document"):
            parts.append(content if num_bytes <= MAX_RECORD_BYTES else b"")
            num_bytes += length
        position += length
        if parts and (unit == "line" or (unit == "paragraph" and is_blank)):
            yield Record(start, first, b"".join(parts).strip(b"\r\n"), num_bytes)
            parts = []
    if parts:
        yield Record(start, first, b"".join(parts).strip(b"\r\n"), num_bytes)


def _lines(file: BinaryIO) -> Iterator[tuple[bytes, int]]:
    """Each line, or the beginning of one that is too long, and the number of its bytes."""
    while content := file.readline(MAX_RECORD_BYTES + 1):
        length, rest = len(content), content
        while not rest.endswith(b"\n") and (rest := file.readline(1 << 20)):
            length += len(rest)
        yield content, length
