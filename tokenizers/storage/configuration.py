"""Reads and writes configuration dataclasses as JSON files.

Files of any age are read: under the former names listed in `formats.py`, and with the value `as_before` for fields that
did not exist yet. A file that does not match its dataclass (an unknown field, a value of another type, a value that the
checks refuse) is an error that names the file, the field as a path such as $.train.model.width, the value and the
reason. Types are strict: `true` is not a number, 1.0 is not a whole number, and 5 is not text.
"""

import dataclasses
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

import cattrs
from cattrs.gen import make_dict_structure_fn, make_dict_unstructure_fn
from cattrs.preconf.json import make_converter

from trimask.tokenizers.storage.files import write_text
from trimask.tokenizers.storage.formats import current_fields, suggestion, written_fields
from trimask.tokenizers.storage.json_text import read_json
from trimask.tokenizers.storage.ranges import range_of

_T = TypeVar("_T")
_Hook = Callable[[Any, Any], Any]

_converter = make_converter(forbid_extra_keys=True)
_converter.register_unstructure_hook(Path, str)


def _strictly(kind: type, name: str, also: tuple[type, ...] = ()) -> None:
    """Registers a reader that accepts only JSON values of exactly this type: true is no number, 1.0 no whole number."""

    def read(value: Any, _: Any) -> Any:
        if type(value) is not kind and type(value) not in also:
            raise ValueError(f"must be {name}, got {short_json(value)}")
        return kind(value)

    _converter.register_structure_hook(kind, read)


_strictly(bool, "true or false")
_strictly(int, "a whole number")
_strictly(float, "a number", also=(int,))
_strictly(str, "text")


@_converter.register_structure_hook_factory(lambda kind: get_origin(kind) is Annotated)
def _number_in_range(kind: Any) -> _Hook:
    plain, allowed = get_args(kind)[0], range_of(kind)
    hook = _converter.get_structure_hook(plain)

    def read(value: Any, _: Any) -> Any:
        number = hook(value, plain)
        fault = None if allowed is None else allowed.fault(number)
        if fault is not None:
            raise ValueError(fault)
        return number

    return read


@_converter.register_structure_hook
def _path(value: Any, _: Any) -> Path:
    if not isinstance(value, str | Path):
        raise ValueError(f"must be a path, got {short_json(value)}")
    return Path(value)


@_converter.register_structure_hook_factory(lambda kind: get_origin(kind) is Literal)
def _one_of(kind: Any) -> _Hook:
    allowed = get_args(kind)

    def read(value: Any, _: Any) -> Any:
        if not any(type(value) is type(known) and value == known for known in allowed):
            raise ValueError(f"must be one of {', '.join(map(str, allowed))}; got {short_json(value)}")
        return value

    return read


@_converter.register_structure_hook_factory(lambda kind: get_origin(kind) in (Union, UnionType))
def _optional(kind: Any) -> _Hook:
    present, *others = (part for part in get_args(kind) if part is not type(None))
    if others:
        raise TypeError(f"cannot read {kind}: a union may only join one type and None")
    hook = _converter.get_structure_hook(present)
    return lambda value, _: None if value is None else hook(value, present)


@_converter.register_structure_hook_factory(lambda kind: get_origin(kind) in (list, tuple))
def _sequence(kind: Any) -> _Hook:
    origin, kinds = get_origin(kind), get_args(kind)
    length = None if origin is list or kinds[-1] is ... else len(kinds)

    def read(value: Any, _: Any) -> Any:
        if not isinstance(value, list | tuple):
            raise ValueError(f"must be a list, got {short_json(value)}")
        if length is not None and len(value) != length:
            raise ValueError(f"must be a list of {length}, got {short_json(value)}")
        if length is None and kinds[0] in (int, str) and all(type(part) is kinds[0] for part in value):
            return origin(value)  # a quick path: reports of prepared data hold thousands of numbers
        each = kinds if length is not None else (kinds[0],) * len(value)
        return origin(part for _, part in _structured(zip(range(len(value)), value, each, strict=True)))

    return read


@_converter.register_structure_hook_factory(lambda kind: get_origin(kind) is dict)
def _mapping(kind: Any) -> _Hook:
    key_kind, value_kind = get_args(kind)

    def read(value: Any, _: Any) -> Any:
        if not isinstance(value, dict):
            raise ValueError(f"must be an object, got {short_json(value)}")
        content = dict(_structured((key, part, value_kind) for key, part in value.items()))
        return content if key_kind is str else {key_kind(key): part for key, part in content.items()}

    return read


def _structured(parts: Iterable[tuple[Any, Any, Any]]) -> Iterator[tuple[Any, Any]]:
    """Yields index or key and structured value of every part; the faults of all parts are raised together."""
    faults = []
    for key, value, kind in parts:
        try:
            yield key, _converter.get_structure_hook(kind)(value, kind)
        except Exception as fault:  # cattrs groups whatever its hooks raise
            note = cattrs.IterableValidationNote(f"at {key!r}", key, kind)
            fault.__notes__ = [*getattr(fault, "__notes__", []), note]
            faults.append(fault)
    if faults:
        raise cattrs.IterableValidationError("parts", faults, list)


@_converter.register_structure_hook_factory(dataclasses.is_dataclass)
def _reader(kind: type) -> _Hook:
    structure: _Hook = make_dict_structure_fn(kind, _converter, _cattrs_forbid_extra_keys=True)

    def read(content: Any, _: Any) -> Any:
        if not isinstance(content, dict):
            raise ValueError(f"must be an object, got {short_json(content)}")
        return structure(current_fields(kind, content, _converter.unstructure), kind)

    return read


@_converter.register_unstructure_hook_factory(dataclasses.is_dataclass)
def _writer(kind: type) -> Callable[[Any], dict[str, Any]]:
    unstructure: Callable[[Any], dict[str, Any]] = make_dict_unstructure_fn(kind, _converter)
    return lambda config: written_fields(kind, unstructure(config), _converter.unstructure)


def to_dict(config: Any) -> dict[str, Any]:
    """Converts a configuration to plain JSON types, as its file holds it."""
    return _converter.unstructure(config)


def from_dict(content: Any, kind: type[_T], origin: str) -> _T:
    """Builds a configuration of type `kind` from plain JSON types.

    Raises ValueError that names `origin` (usually the file) and every field that is unknown, missing or refused.
    """
    try:
        return _converter.structure(content, kind)
    except (cattrs.BaseValidationError, ValueError) as error:
        faults = "; ".join(cattrs.transform_error(error, format_exception=_in_words))
        raise ValueError(f"{origin}: not a {kind.__name__}: {faults}") from error


def _in_words(error: BaseException, kind: Any) -> str:
    if isinstance(error, KeyError):
        return "required field is missing"
    if isinstance(error, cattrs.ForbiddenExtraKeysError):
        known = [field.name for field in dataclasses.fields(error.cl)]
        unknown = sorted(error.extra_fields)
        return "; ".join(f"unknown field {name!r}, {suggestion(name, known)}" for name in unknown)
    return str(error)


def short_json(value: Any) -> str:
    """JSON text of a value for error messages, cut to 60 characters."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else f"{text[:59]}…"


def write_json(path: Path, content: Any) -> None:
    """Writes strict JSON atomically. Raises ValueError for NaN and infinite numbers."""
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def save(path: Path, config: Any) -> None:
    """Writes a configuration to a JSON file."""
    write_json(path, to_dict(config))


def load(path: Path, kind: type[_T]) -> _T:
    """Reads a configuration of type `kind` from a JSON file.

    Raises OSError if the file cannot be opened, ValueError if it is not strict JSON or does not match the dataclass.
    """
    return from_dict(read_json(path), kind, str(path))


def changed_fields(old: Any, new: Any, prefix: str = "") -> list[str]:
    """Lists `field: old → new` for every field in which two configurations of one type differ."""
    lines = []
    names = [field.name for field in dataclasses.fields(old)]
    for name, a, b in ((name, getattr(old, name), getattr(new, name)) for name in names):
        lines += _changed(a, b, f"{prefix}{name}")
    return lines


def _changed(a: Any, b: Any, name: str) -> list[str]:
    if dataclasses.is_dataclass(a) and type(a) is type(b):
        return changed_fields(a, b, f"{name}.")
    holds_configs = isinstance(a, dict) and any(map(dataclasses.is_dataclass, a.values()))
    if holds_configs and isinstance(b, dict) and a.keys() == b.keys():
        return [line for key in a for line in _changed(a[key], b[key], f"{name}.{key}")]
    return [] if a == b else [f"{name}: {a} → {b}"]
