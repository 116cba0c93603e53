"""The only reader of text: UTF-8, whose lines end with LF, CRLF or CR and with nothing else.

A byte order mark at the beginning is skipped. A line loses its end and nothing more; blanks and the other separators of
Unicode (U+2028, form feed, …) are characters as any. What holds NUL bytes, or is not UTF-8, is no text.
"""

import codecs
import sys
from collections.abc import Iterator
from io import BufferedIOBase
from pathlib import Path
from typing import cast

MAX_LINE_BYTES = 1 << 24
"""Longest line, or record of lines, that is used, if nothing else is said."""
_CHUNK_BYTES = 1 << 20


def decoded(content: bytes) -> str:
    """Bytes as text with LF at the ends of lines. Raises ValueError for what is no text."""
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 text: {error.reason} at byte {error.start}") from error
    if "\0" in text:
        raise ValueError("not UTF-8 text: it holds NUL bytes")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def is_blank(line: bytes) -> bool:
    """Whether a line holds nothing but blanks, tabs and its end; other separators are characters, a mark is none."""
    return not line.removeprefix(codecs.BOM_UTF8).strip()


def byte_lines(file: BufferedIOBase, most: int = MAX_LINE_BYTES) -> Iterator[tuple[bytes, int]]:
    """Each line of a binary file from where it stands, with its end, and the number of its bytes.

    Of a line with more than `most` bytes only the beginning.
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
    """The lines of a file, or of standard input where it is called -, that are not blank, with their numbers.

    Raises OSError where it cannot be opened, ValueError, with the line, where one is no text or too long.
    """
    if source == "-":
        return list(_numbered(cast(BufferedIOBase, sys.stdin.buffer), "standard input"))
    with Path(source).open("rb") as file:
        return list(_numbered(file, source))


def _numbered(file: BufferedIOBase, name: str) -> Iterator[tuple[int, str]]:
    for number, (content, length) in enumerate(byte_lines(file), 1):
        if length > MAX_LINE_BYTES:
            raise ValueError(f"{name}, line {number}: a line of {length:,} bytes; {MAX_LINE_BYTES:,} are allowed")
        try:
            line = decoded(content).removesuffix("\n")
        except ValueError as error:
            raise ValueError(f"{name}, line {number}: {error}") from error
        if not is_blank(content):
            yield number, line
