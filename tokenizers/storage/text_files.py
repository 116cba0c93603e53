"""The only text reader of the project: UTF-8 with lines that end in LF, CRLF or CR and nothing else.

A leading byte order mark is skipped. Only the line ending is removed from a line; blanks and the other separators of
Unicode (U+2028, form feed, …) are ordinary characters. Content with NUL bytes or that is not UTF-8 is not text.
"""

import codecs
import sys
from collections.abc import Iterator
from io import BufferedIOBase
from pathlib import Path
from typing import cast

MAX_LINE_BYTES = 1 << 24
"""Default limit on the length of a line, or of a record of several lines, in bytes."""
_CHUNK_BYTES = 1 << 20


def decode_text(content: bytes) -> str:
    """Decodes UTF-8 bytes and turns all line endings into LF. Raises ValueError if the bytes are not UTF-8 text."""
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 text: {error.reason} at byte {error.start}") from error
    if "\0" in text:
        raise ValueError("not UTF-8 text: it holds NUL bytes")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def is_blank(line: bytes) -> bool:
    """Whether a line holds only ASCII white space; a leading byte order mark does not count."""
    return not line.removeprefix(codecs.BOM_UTF8).strip()


def byte_lines(file: BufferedIOBase, most: int = MAX_LINE_BYTES) -> Iterator[tuple[bytes, int]]:
    """Yields each remaining line of a binary file, with its ending, and the line's length in bytes.

    A line longer than `most` bytes is cut to its first `most` + 1 bytes.
    """
    parts, kept, length = list[bytes](), 0, 0
    while chunk := file.read(_CHUNK_BYTES):
        while chunk.endswith(b"\r") and (more := file.read(1)):  # the LF of a CRLF, perhaps
            chunk += more
        for piece in chunk.splitlines(keepends=True):
            parts.append(piece[: max(0, most + 1 - kept)])
            kept, length = kept + len(parts[-1]), length + len(piece)
            if piece.endswith((b"\n", b"\r")):
                yield b"".join(parts), length
                parts, kept, length = [], 0, 0
    if length:
        yield b"".join(parts), length


def read_lines(source: str) -> list[tuple[int, str]]:
    """Line number and text of every non-blank line of a file; "-" reads standard input.

    Raises OSError if the file cannot be opened, ValueError that names the line if one is not text or too long.
    """
    if source == "-":
        return list(_numbered(cast(BufferedIOBase, sys.stdin.buffer), "standard input"))
    with Path(source).open("rb") as file:
        return list(_numbered(file, source))


def _numbered(file: BufferedIOBase, name: str) -> Iterator[tuple[int, str]]:
    for number, (content, length) in enumerate(byte_lines(file), 1):
        if length > MAX_LINE_BYTES:
            raise ValueError(
                f"{name}, line {number}: a line of {length:,} bytes; at most {MAX_LINE_BYTES:,} are allowed"
            )
        try:
            line = decode_text(content).removesuffix("\n")
        except ValueError as error:
            raise ValueError(f"{name}, line {number}: {error}") from error
        if not is_blank(content):
            yield number, line
