"""Files that may come from someone else, and files that take their place.

A name that a file says is plain: letters, digits, `_`, `.`, `-`, not led by a dot, and it ends as its kind does. It
can then neither leave its folder nor name a device. What is written is written beside its place, by a handle that
follows no link, and renamed: a reader, or whoever comes after a crash, sees the old file or the new one. A link in
the place is replaced; what it leads to is left alone.
"""

import errno
import os
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

MAX_NAME = 200
"""Longest plain name in bytes; file systems allow 255, and endings are added."""

_PARTIAL = ".partial"
_REASONS = tuple(
    os.strerror(number)
    for number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO)
)


def require_regular_file(path: Path) -> None:
    """Raises OSError unless the path is a regular file; a pipe would block whoever reads it."""
    if path.is_dir():
        raise IsADirectoryError(f"{path}: a folder, not a file")
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file")
    if not path.is_file():
        raise OSError(f"{path}: not a regular file")


def require_plain_name(name: object, origin: str, *endings: str) -> str:
    """Returns the name. Raises ValueError, naming the origin, unless it is plain and has one of the endings, if any."""
    if not isinstance(name, str) or not _is_plain(name):
        raise ValueError(f"{origin}: a name of a file must be letters, digits, _, . and -, got {printable(repr(name))}")
    if len(name.encode()) > MAX_NAME:
        raise ValueError(f"{origin}: a name of {len(name.encode())} bytes, {MAX_NAME} are allowed: {name[:50]}…")
    if endings and not name.endswith(endings):
        raise ValueError(f"{origin}: a name that ends with {' or '.join(endings)} is expected, got {name!r}")
    return name


def inside(folder: Path, name: str) -> Path:
    """Path of a file in a folder or its sub-folders, as a user's list names it.

    Raises ValueError for an absolute path, for `..`, and where a link leads out of the folder.
    """
    parts = Path(name).parts
    is_relative = bool(parts) and "\0" not in name and ".." not in parts and not Path(name).is_absolute()
    if not is_relative or not (folder / name).resolve().is_relative_to(folder.resolve()):
        raise ValueError(f"{printable(repr(name))} must be a path that stays inside the folder {folder}")
    return folder / name


def found_inside(folder: Path, name: str) -> Path:
    """The path that `inside` gives, as `on_disk` finds it."""
    return inside(folder, str(on_disk(inside(folder, name)).relative_to(folder)))


def on_disk(path: Path) -> Path:
    """The path as the disk has it, perhaps in another normal form of Unicode; as it is if nothing is there."""
    if str(path).isascii() or path.exists():
        return path
    found = Path(path.anchor)
    for part in path.relative_to(path.anchor).parts:
        changed_ns = found.stat().st_mtime_ns if found.is_dir() else 0
        found = found / _names_in(found, changed_ns).get(unicodedata.normalize("NFC", part), part)
    return found


@lru_cache(maxsize=64)
def _names_in(folder: Path, changed_ns: int) -> dict[str, str]:
    """Normal form → name of everything in a folder."""
    try:
        return {unicodedata.normalize("NFC", name): name for name in os.listdir(folder)}
    except OSError:
        return {}


def _is_plain(name: str) -> bool:
    """Whether it has letters of any script, with their marks, digits, and _ . - but at the beginning no . - or mark."""
    kinds = [unicodedata.category(c)[0] for c in name]
    return (
        bool(name)
        and all(c in "_.-" or kind in "LMN" for c, kind in zip(name, kinds, strict=True))
        and (name[0] == "_" or kinds[0] in "LN")
    )


def printable(text: str, keep: str = "") -> str:
    """The text with � for characters that could steer a terminal or turn text around, other than those to keep."""
    keep += _JOINERS
    return "".join("\ufffd" if c not in keep and unicodedata.category(c) in _UNPRINTABLE else c for c in text)


_UNPRINTABLE = ("Cc", "Cf", "Cs", "Co", "Zl", "Zp")
_JOINERS = "\u00ad\u200c\u200d"
"""Soft hyphen, and what some scripts and emoji are spelled with."""


def require_replaceable(path: Path) -> None:
    """Raises OSError where something is that a file may not take the place of: a device, a pipe, a folder."""
    if os.path.lexists(path) and not path.is_symlink():
        require_regular_file(path)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A new file beside `path` to write to, that takes its place; where writing fails it is removed.

    The file exists, is empty and no link, and belongs to this call: what stood under its name was a left-over. Raises
    OSError where the path is neither a file nor a link: /dev/null is no place for one.
    """
    require_replaceable(path)
    partial = path.with_name(path.name + _PARTIAL)
    partial.unlink(missing_ok=True)
    os.close(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_NOFOLLOW", 0), 0o666))
    try:
        yield partial
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Writes UTF-8 text in the place of whatever was there."""
    write_bytes(path, text.encode())


def append_text(path: Path, text: str) -> None:
    """Adds UTF-8 text at the end of a file, which is made if need be. Raises OSError if it is a link, or a pipe."""
    if path.exists():
        require_regular_file(path)
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0)
    with os.fdopen(os.open(path, flags, 0o666), "ab") as file:
        file.write(text.encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Writes bytes in the place of whatever was there."""
    with replacing(path) as partial:
        partial.write_bytes(content)


@contextmanager
def reading(path: object, fault: str) -> Iterator[None]:
    """Turns whatever a third party's reader raises at a damaged file into a ValueError that names the file."""
    try:
        yield
    except (MemoryError, PermissionError):
        raise
    except Exception as error:
        raise ValueError(f"{path}: {fault}: {printable(reason_of(error))}") from error


@contextmanager
def written_to(path: object) -> Iterator[None]:
    """Turns what a third party's writer raises into an OSError that names the file and the reason."""
    try:
        yield
    except (OSError, RuntimeError, ValueError) as error:
        raise OSError(f"{path}: could not be written: {printable(reason_of(error))}") from error


def reason_of(error: Exception) -> str:
    """Why reading or writing failed, in the system's words where they can be found among a third party's own."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror} ({error.filename})" if error.filename else error.strerror
    text = str(error) or type(error).__name__
    known = next((reason for reason in _REASONS if reason in text), None)
    return known or shortened(text)


def shortened(text: str) -> str:
    """The first line, or as much of it as can be read at a glance."""
    line = text.partition("\n")[0]
    return line if len(line) <= 200 else f"{line[:199]}…"
