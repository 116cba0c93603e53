"""Records of text files, with random access to blocks of them.

A record is a line, a paragraph (lines between blank ones) or a whole document, with the byte and the line at which it
begins. A block is a run of records of one file; it is read without reading what comes before it in the file.
"""

import dataclasses
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from io import BufferedReader
from itertools import islice
from pathlib import Path

from trimask.diffusion.data.records import Block, TextUnit
from trimask.tokenizers.storage.files import require_regular_file
from trimask.tokenizers.storage.text_files import MAX_LINE_BYTES, byte_lines, decode_text, is_blank


@dataclass(frozen=True)
class TextRecord:
    """One record of a text file."""

    start: int
    """Byte of the file at which the record begins."""
    line: int
    """Line of the file at which the record begins, from 1."""
    content: bytes
    """Bytes of the record, without blank lines around; only the beginning if there are more than `max_bytes`."""
    num_bytes: int
    """Size of the whole record in bytes."""
    max_bytes: int
    """Largest size that a record may have, in bytes."""

    @property
    def text(self) -> str:
        """The content as text. Raises ValueError if it is too long, or not valid UTF-8."""
        if self.num_bytes > self.max_bytes:
            raise ValueError(f"a record of {self.num_bytes:,} bytes; --limits.record-bytes allows {self.max_bytes:,}")
        return decode_text(self.content)


def blocks_of_text_file(path: Path, unit: TextUnit, records: int, max_bytes: int = MAX_LINE_BYTES) -> list[Block]:
    """Blocks of a text file, of at most `records` records each.

    A record of more than `max_bytes` counts like any other; its `TextRecord.text` raises the error.
    """
    blocks: list[Block] = []
    digest = hashlib.sha256()
    with _opened(path) as file:
        size = path.stat().st_size
        for number, record in enumerate(_records(file, unit, 1, max_bytes)):
            if number % records == 0:
                digest = hashlib.sha256()
                blocks.append(Block(file=str(path), start=record.start, line=record.line, count=0, file_bytes=size))
            digest.update(b"%d\n%b" % (record.num_bytes, record.content))
            blocks[-1] = dataclasses.replace(blocks[-1], count=number % records + 1, sha256=digest.hexdigest())
    return blocks


def blocks_of_split(split: str, count: int, records: int) -> list[Block]:
    """Blocks of a split of `count` records without a file, of at most `records` records each."""
    return [
        Block(file=split, start=start, line=start + 1, count=min(records, count - start))
        for start in range(0, count, records)
    ]


def records_of_block(block: Block, unit: TextUnit, max_bytes: int = MAX_LINE_BYTES) -> Iterator[TextRecord]:
    """Records of a block of a text file, in order."""
    with _opened(Path(block.file)) as file:
        file.seek(block.start)
        yield from islice(_records(file, unit, block.line, max_bytes), block.count)


def _opened(path: Path) -> BufferedReader:
    require_regular_file(path)
    return path.open("rb")


def _records(file: BufferedReader, unit: TextUnit, line: int, max_bytes: int) -> Iterator[TextRecord]:
    """Records from the present position of the file on, at which line number `line` begins."""
    position, start, first, num_bytes = file.tell(), 0, 0, 0
    parts: list[bytes] = []
    for number, (content, length) in enumerate(byte_lines(file, max_bytes), line):
        is_empty = is_blank(content) and length == len(content)
        if not parts:
            start, first, num_bytes = position, number, 0
        if not is_empty or (parts and unit == "document"):
            parts.append(content if num_bytes <= max_bytes else b"")
            num_bytes += length
        position += length
        if parts and (unit == "line" or (unit == "paragraph" and is_empty)):
            yield TextRecord(start, first, b"".join(parts).strip(b"\r\n"), num_bytes, max_bytes)
            parts = []
    if parts:
        yield TextRecord(start, first, b"".join(parts).strip(b"\r\n"), num_bytes, max_bytes)
