"""Reads files that may come from someone else, and replaces files atomically.

A file name read from another file must be plain: letters, digits, `_`, `.`, `-`, no leading dot, and the expected
ending. It can then neither leave its folder nor name a device. New content is written to a partial file in the same
folder, opened without following links, and then renamed: after a crash a reader finds either the old file or the new
one. A link at the target path is replaced; the file that it points to is left alone.
"""

import errno
import os
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

MAX_NAME = 200
"""Largest length of a plain name in bytes. File systems allow 255; the rest is left for endings that are added."""

_PARTIAL = ".partial"
_REASONS = tuple(
    os.strerror(number)
    for number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO)
)


def require_regular_file(path: Path) -> None:
    """Raises OSError unless the path is a regular file. A pipe, for example, would block its reader."""
    if path.is_dir():
        raise IsADirectoryError(f"{path}: a folder, not a file")
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file")
    if not path.is_file():
        raise OSError(f"{path}: not a regular file")


def require_plain_name(name: object, origin: str, *endings: str) -> str:
    """Returns the name if it is plain and has one of the `endings`, where any are given.

    Raises ValueError that names `origin`, the file in which the name was found.
    """
    if not isinstance(name, str) or not _is_plain(name):
        raise ValueError(
            f"{origin}: a file name must consist of letters, digits, _, . and -, got {printable(repr(name))}"
        )
    if len(name.encode()) > MAX_NAME:
        raise ValueError(
            f"{origin}: a file name of {len(name.encode())} bytes, at most {MAX_NAME} are allowed: {name[:50]}…"
        )
    if endings and not name.endswith(endings):
        raise ValueError(f"{origin}: a file name must end with {' or '.join(endings)}, got {name!r}")
    return name


def path_inside(folder: Path, name: str) -> Path:
    """Joins a folder and a relative path taken from a user's list.

    Raises ValueError for an absolute path, for `..`, and if a link leads out of the folder.
    """
    parts = Path(name).parts
    is_relative = bool(parts) and "\0" not in name and ".." not in parts and not Path(name).is_absolute()
    if not is_relative or not (folder / name).resolve().is_relative_to(folder.resolve()):
        raise ValueError(f"{printable(repr(name))} must be a path that stays inside the folder {folder}")
    return folder / name


def existing_path_inside(folder: Path, name: str) -> Path:
    """`path_inside`, with the name spelled as it is stored on disk (see `path_on_disk`)."""
    return path_inside(folder, str(path_on_disk(path_inside(folder, name)).relative_to(folder)))


def path_on_disk(path: Path) -> Path:
    """The path as it is stored on disk, where names may be in another Unicode normal form.

    Returns the path unchanged if no such file exists.
    """
    if str(path).isascii() or path.exists():
        return path
    found = Path(path.anchor)
    for part in path.relative_to(path.anchor).parts:
        changed_ns = found.stat().st_mtime_ns if found.is_dir() else 0
        found = found / _names_in(found, changed_ns).get(unicodedata.normalize("NFC", part), part)
    return found


@lru_cache(maxsize=64)
def _names_in(folder: Path, changed_ns: int) -> dict[str, str]:
    """NFC-normalised name → name of every entry of a folder; `changed_ns` is part of the cache key."""
    try:
        return {unicodedata.normalize("NFC", name): name for name in os.listdir(folder)}
    except OSError:
        return {}


def _is_plain(name: str) -> bool:
    """Whether a name has only letters (with marks), digits, `_`, `.` and `-`, and starts with no mark, `.` or `-`."""
    kinds = [unicodedata.category(c)[0] for c in name]
    return (
        bool(name)
        and all(c in "_.-" or kind in "LMN" for c, kind in zip(name, kinds, strict=True))
        and (name[0] == "_" or kinds[0] in "LN")
    )


def printable(text: str, keep: str = "") -> str:
    """Replaces characters that could control a terminal or reverse the text by �, except those in `keep`."""
    keep += _JOINERS
    return "".join("\ufffd" if c not in keep and unicodedata.category(c) in _UNPRINTABLE else c for c in text)


_UNPRINTABLE = ("Cc", "Cf", "Cs", "Co", "Zl", "Zp")
_JOINERS = "\u00ad\u200c\u200d"
"""Soft hyphen, and the zero-width joiners that some scripts and emoji are spelled with."""


def require_replaceable(path: Path) -> None:
    """Raises OSError if the path is something that a file must not replace: a device, a pipe or a folder."""
    if os.path.lexists(path) and not path.is_symlink():
        require_regular_file(path)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields the path of a new empty file next to `path`, and renames it to `path` when the block succeeds.

    If the block fails, the new file is removed. A left-over partial file of an earlier call is overwritten. Raises
    OSError if `path` exists and is neither a regular file nor a link, such as /dev/null.
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
    """Replaces a file by UTF-8 text, atomically."""
    write_bytes(path, text.encode())


def append_text(path: Path, text: str) -> None:
    """Appends UTF-8 text to a file, which is created if missing. Raises OSError if the path is a link or a pipe."""
    if path.exists():
        require_regular_file(path)
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0)
    with os.fdopen(os.open(path, flags, 0o666), "ab") as file:
        file.write(text.encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Replaces a file by bytes, atomically."""
    with replacing(path) as partial:
        partial.write_bytes(content)


@contextmanager
def reading(path: object, fault: str) -> Iterator[None]:
    """Turns any exception that a third-party reader raises for a damaged file into a ValueError that names the file."""
    try:
        yield
    except (MemoryError, PermissionError):
        raise
    except Exception as error:
        raise ValueError(f"{path}: {fault}: {printable(reason_of(error))}") from error


@contextmanager
def written_to(path: object) -> Iterator[None]:
    """Turns an exception of a third-party writer into an OSError that names the file and the reason."""
    try:
        yield
    except (OSError, RuntimeError, ValueError) as error:
        raise OSError(f"{path}: could not be written: {printable(reason_of(error))}") from error


def reason_of(error: Exception) -> str:
    """Why reading or writing failed; the operating system's message if it can be found in the exception's text."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror} ({error.filename})" if error.filename else error.strerror
    text = str(error) or type(error).__name__
    known = next((reason for reason in _REASONS if reason in text), None)
    return known or shortened(text)


def shortened(text: str) -> str:
    """First line of a text, cut to 200 characters."""
    line = text.partition("\n")[0]
    return line if len(line) <= 200 else f"{line[:199]}…"
