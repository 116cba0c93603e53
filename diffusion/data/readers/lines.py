"""Text files as runs of records that can be read from the middle.

A record is a line, a paragraph (lines between blank ones) or a whole document, and knows where it stands: the byte at
which it begins, and its line. A block is a run of records of one file; reading it needs nothing of what is before.
"""

import dataclasses
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from io import BufferedReader
from itertools import islice
from pathlib import Path

from trimask.diffusion.data.records import Block, Unit
from trimask.tokenizers.storage.files import require_regular_file
from trimask.tokenizers.storage.text_files import MAX_LINE_BYTES, byte_lines, decode_text, is_blank


@dataclass(frozen=True)
class TextRecord:
    """The bytes of a record, without blank lines around."""

    start: int
    line: int
    content: bytes
    num_bytes: int
    """Of the whole record; of one that has more than `most` the content is only the beginning."""
    most: int
    """Bytes that a record may have."""

    @property
    def text(self) -> str:
        """The content as text. Raises ValueError for a record that is too long, or no text."""
        if self.num_bytes > self.most:
            raise ValueError(f"a record of {self.num_bytes:,} bytes; --limits.record-bytes allows {self.most:,}")
        return decode_text(self.content)


def blocks_of(path: Path, unit: Unit, records: int, most: int = MAX_LINE_BYTES) -> list[Block]:
    """The file cut into blocks of so many records; the last may have fewer.

    A record of more than `most` bytes counts as any; it is refused where it is to be used.
    """
    blocks: list[Block] = []
    digest = hashlib.sha256()
    with _opened(path) as file:
        size = path.stat().st_size
        for number, record in enumerate(_records(file, unit, 1, most)):
            if number % records == 0:
                digest = hashlib.sha256()
                blocks.append(Block(file=str(path), start=record.start, line=record.line, count=0, file_bytes=size))
            digest.update(b"%d\n%b" % (record.num_bytes, record.content))
            blocks[-1] = dataclasses.replace(blocks[-1], count=number % records + 1, sha256=digest.hexdigest())
    return blocks


def blocks_of_split(split: str, count: int, records: int) -> list[Block]:
    """A split of something that is not a file, likewise."""
    return [
        Block(file=split, start=start, line=start + 1, count=min(records, count - start))
        for start in range(0, count, records)
    ]


def records_of(block: Block, unit: Unit, most: int = MAX_LINE_BYTES) -> Iterator[TextRecord]:
    """The records of a block."""
    with _opened(Path(block.file)) as file:
        file.seek(block.start)
        yield from islice(_records(file, unit, block.line, most), block.count)


def _opened(path: Path) -> BufferedReader:
    require_regular_file(path)
    return path.open("rb")


def _records(file: BufferedReader, unit: Unit, line: int, most: int) -> Iterator[TextRecord]:
    """Records from the file's place on, which is line `line`."""
    position, start, first, num_bytes = file.tell(), 0, 0, 0
    parts: list[bytes] = []
    for number, (content, length) in enumerate(byte_lines(file, most), line):
        is_empty = is_blank(content) and length == len(content)
        if not parts:
            start, first, num_bytes = position, number, 0
        if not is_empty or (parts and unit == "document"):
            parts.append(content if num_bytes <= most else b"")
            num_bytes += length
        position += length
        if parts and (unit == "line" or (unit == "paragraph" and is_empty)):
            yield TextRecord(start, first, b"".join(parts).strip(b"\r\n"), num_bytes, most)
            parts = []
    if parts:
        yield TextRecord(start, first, b"".join(parts).strip(b"\r\n"), num_bytes, most)
