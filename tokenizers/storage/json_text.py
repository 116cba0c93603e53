"""The only JSON reader of the project: strict and bounded, with errors that say where the fault is.

It refuses duplicate keys, NaN, infinite numbers, strings that are not valid Unicode, more than `MAX_DEPTH` levels, more
than `MAX_JSON_BYTES`, and bytes that are not UTF-8. A byte order mark is skipped. An error reads

    FILE, line 3: duplicate key "width" @ $.train.model

where the path after @ names the object or list that contains the fault, as in JSONPath.
"""

import json
import math
import re
from collections.abc import Iterator
from json.decoder import scanstring  # type: ignore[attr-defined]
from json.scanner import NUMBER_RE
from pathlib import Path
from typing import Any, NoReturn

from trimask.tokenizers.storage.files import require_regular_file

MAX_JSON_BYTES = 1 << 28
"""Largest file, or line of a JSON-lines file, that is read, in bytes."""
MAX_DEPTH = 64
"""Largest nesting depth of objects and lists."""

_NAMES = {"true": True, "false": False, "null": None}
_SPACE = " \t\r\n"
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


def parse_json(content: str | bytes, origin: str | None, line: int = 1, *, allows_infinity: bool = False) -> Any:
    """Parses one strict JSON value.

    Raises ValueError that names `origin` and the line, counted from `line`; with `origin` None it names neither.
    `allows_infinity` also accepts Infinity, as Python's json module writes it.
    """
    text = _decoded(content, origin, line)
    try:
        value = json.loads(
            text,
            object_pairs_hook=_without_duplicates,
            parse_constant=_infinity if allows_infinity else _refuse_constant,
            parse_float=_finite,
        )
        _require_depth(value)
        if _SURROGATE.search(text):
            json.dumps(value, ensure_ascii=False).encode()
    except (ValueError, RecursionError):
        _Reader(text, origin, line).refuse()
    return value


def read_json(path: Path) -> Any:
    """Reads a JSON file. Raises OSError if it cannot be opened, ValueError if it is not strict JSON."""
    return parse_json(_bytes_of(path), str(path))


def read_json_lines(path: Path) -> Iterator[tuple[int, Any]]:
    """Yields line number and value of every non-blank line of a JSON-lines file.

    Raises OSError if the file cannot be opened, ValueError for a line that is not strict JSON.
    """
    for number, line in enumerate(_bytes_of(path).splitlines(), 1):
        if line.strip():
            yield number, parse_json(line, str(path), number)


def _bytes_of(path: Path) -> bytes:
    require_regular_file(path)
    size = path.stat().st_size
    if size > MAX_JSON_BYTES:
        raise ValueError(f"{path}: {size:,} bytes of JSON, at most {MAX_JSON_BYTES:,} are allowed")
    return path.read_bytes()


def _decoded(content: str | bytes, origin: str | None, line: int) -> str:
    if len(content) > MAX_JSON_BYTES:
        raise ValueError(f"{_where(origin, line)}longer than the {MAX_JSON_BYTES:,} bytes that are allowed")
    if isinstance(content, str):
        return content.removeprefix("\ufeff")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line += content.count(b"\n", 0, error.start)
        raise ValueError(f"{_where(origin, line)}not UTF-8 text: {error.reason}") from error


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError
    return found


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError


def _infinity(name: str) -> float:
    if name == "NaN":
        raise ValueError
    return float(name)


def _finite(number: str) -> float:
    value = float(number)
    if not math.isfinite(value):
        raise ValueError
    return value


def _require_depth(value: Any) -> None:
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [
            part
            for parts in level
            if isinstance(parts, dict | list)
            for part in (parts.values() if isinstance(parts, dict) else parts)
            if isinstance(part, dict | list)
        ]
        if not level:
            return
    raise ValueError


class _Reader:
    """A slow second reader of a refused text, which finds where and why it is not strict JSON."""

    def __init__(self, text: str, origin: str | None, line: int):
        self.text, self.origin, self.line = text, origin, line
        self.position = 0
        self.path: list[str] = []

    def refuse(self) -> NoReturn:
        """Raises the ValueError that says what is wrong with the text."""
        self._space()
        self._value()
        self._space()
        if self.position < len(self.text):
            self._fault("more text after the value")
        raise AssertionError(f"{self.origin}: the two readers of JSON disagree")

    def _value(self) -> None:
        character = self.text[self.position : self.position + 1]
        if character == '"':
            self._string()
        elif character in ("{", "["):
            self._container("}" if character == "{" else "]")
        elif name := next((name for name in _NAMES if self.text.startswith(name, self.position)), None):
            self.position += len(name)
        else:
            self._number()

    def _container(self, end: str) -> None:
        if len(self.path) >= MAX_DEPTH:
            self._fault(f"more than {MAX_DEPTH} objects and lists inside one another")
        keys: set[str] = set()
        self.position += 1
        self._space()
        number = 0
        while not self._skipped(end):
            if number and not self._skipped(","):
                self._fault(f"expected , or {end}")
            self._space()
            key = f"[{number}]"
            if end == "}":
                name = self._key()
                if name in keys:
                    self._fault(f"duplicate key {_shortened(json.dumps(name, ensure_ascii=False))}", "")
                keys.add(name)
                key = f".{name[:100]}"
            self.path.append(key)
            self._value()
            self.path.pop()
            self._space()
            number += 1

    def _key(self) -> str:
        if not self.text.startswith('"', self.position):
            self._fault('expected a key in "')
        name = self._string()
        self._space()
        if not self._skipped(":"):
            self._fault("expected : after a key")
        self._space()
        return name

    def _string(self) -> str:
        try:
            text, self.position = scanstring(self.text, self.position + 1, True)
        except json.JSONDecodeError as error:
            self.position = error.pos
            self._fault(error.msg[:1].lower() + error.msg[1:].removesuffix(" at").removesuffix(" starting"))
        try:
            text.encode()
        except UnicodeEncodeError:
            self._fault("a string with half of a surrogate pair", "")
        return text

    def _number(self) -> None:
        found = NUMBER_RE.match(self.text, self.position)
        if found is None:
            self._fault("expected a value")
        is_whole = found[2] is None and found[3] is None
        try:
            is_readable = bool(int(found[0]) or True) if is_whole else math.isfinite(float(found[0]))
        except ValueError:  # more digits than Python reads
            is_readable = False
        if not is_readable:
            self._fault(f"the number {_shortened(found[0])} is too large")
        self.position = found.end()

    def _skipped(self, character: str) -> bool:
        is_there = self.text.startswith(character, self.position)
        self.position += is_there
        return is_there

    def _space(self) -> None:
        while self.text[self.position : self.position + 1] in tuple(_SPACE):
            self.position += 1

    def _fault(self, reason: str, got: str | None = None) -> NoReturn:
        line = self.line + self.text.count("\n", 0, self.position)
        if got is None:
            rest = self.text[self.position : self.position + 30].partition("\n")[0]
            got = f", got {rest!r}" if rest else ", got the end of the line"
        path = "".join(self.path)
        path = path if len(path) <= 100 else f"{path[:60]}…{path[-30:]}"
        raise ValueError(f"{_where(self.origin, line)}not strict JSON: {reason}{got} @ ${path}")


def _where(origin: str | None, line: int) -> str:
    return "" if origin is None else f"{origin}, line {line}: "


def _shortened(text: str) -> str:
    return text if len(text) <= 30 else f"{text[:29]}…"
