"""Configuration dataclasses ↔ JSON files.

Files of any age are read: by the names that `tokenizers/formats.py` lists, and with the values that mean "as before".
A file that does not fit its dataclass (an unknown field, a wrong type, a value its checks refuse) is an error that
names the field and, of an unknown one, the nearest that is known.
"""

import dataclasses
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import cattrs
from cattrs.gen import make_dict_structure_fn, make_dict_unstructure_fn
from cattrs.preconf.json import make_converter

from trimask.tokenizers.formats import nearest, present_fields, written_fields

_T = TypeVar("_T")

_converter = make_converter(forbid_extra_keys=True)
_converter.register_unstructure_hook(Path, str)
_converter.register_structure_hook(Path, lambda value, _: Path(value))


@_converter.register_structure_hook_factory(dataclasses.is_dataclass)
def _reader(kind: type) -> Callable[[Any, type], Any]:
    structure: Callable[[Any, type], Any] = make_dict_structure_fn(kind, _converter, _cattrs_forbid_extra_keys=True)

    def read(content: Any, _: type) -> Any:
        return structure(
            present_fields(kind, content, _converter.unstructure) if isinstance(content, dict) else content, kind
        )

    return read


@_converter.register_unstructure_hook_factory(dataclasses.is_dataclass)
def _writer(kind: type) -> Callable[[Any], dict[str, Any]]:
    unstructure: Callable[[Any], dict[str, Any]] = make_dict_unstructure_fn(kind, _converter)
    return lambda config: written_fields(kind, unstructure(config), _converter.unstructure)


def to_dict(config: Any) -> dict[str, Any]:
    """A configuration as plain JSON types: what its file says."""
    return _converter.unstructure(config)


def from_dict(content: Any, kind: type[_T], origin: str) -> _T:
    """The configuration of type `kind` held by plain JSON types; `origin` is named in errors."""
    if not isinstance(content, dict):
        raise ValueError(f"{origin}: not a {kind.__name__}, which is a JSON object; got {type(content).__name__}")
    try:
        return _converter.structure(content, kind)
    except cattrs.BaseValidationError as error:
        faults = "; ".join(cattrs.transform_error(error, format_exception=_in_words))
        raise ValueError(f"{origin}: not a {kind.__name__}: {faults}") from error


def _in_words(error: BaseException, kind: Any) -> str:
    if isinstance(error, cattrs.ForbiddenExtraKeysError):
        known = [field.name for field in dataclasses.fields(error.cl)]
        unknown = sorted(error.extra_fields)
        return "; ".join(f"unknown field {name!r}, {nearest(name, known)}" for name in unknown)
    return cattrs.v.format_exception(error, kind)


def write_text(path: Path, text: str) -> None:
    """Writes atomically: a reader, or whoever comes after a crash, sees the old file or the new one."""
    partial = path.with_name(path.name + ".partial")
    with partial.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def write_json(path: Path, content: Any) -> None:
    """Writes JSON atomically."""
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def read_json(path: Path) -> Any:
    """The content of a JSON file."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not readable as JSON: {error}") from error


def save(path: Path, config: Any) -> None:
    """Writes a configuration."""
    write_json(path, to_dict(config))


def load(path: Path, kind: type[_T]) -> _T:
    """Reads a configuration of type `kind`."""
    return from_dict(read_json(path), kind, str(path))


def differences(old: Any, new: Any, prefix: str = "") -> list[str]:
    """Lines `field: old → new` for every field in which two configurations of one type differ."""
    lines = []
    names = [field.name for field in dataclasses.fields(old)]
    for name, a, b in ((name, getattr(old, name), getattr(new, name)) for name in names):
        lines += _differences(a, b, f"{prefix}{name}")
    return lines


def _differences(a: Any, b: Any, name: str) -> list[str]:
    if dataclasses.is_dataclass(a) and type(a) is type(b):
        return differences(a, b, f"{name}.")
    holds_configs = isinstance(a, dict) and any(map(dataclasses.is_dataclass, a.values()))
    if holds_configs and isinstance(b, dict) and a.keys() == b.keys():
        return [line for key in a for line in _differences(a[key], b[key], f"{name}.{key}")]
    return [] if a == b else [f"{name}: {a} → {b}"]
