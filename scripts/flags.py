"""Rules of tyro for reading numbers with a range, paths, and tuples and mappings of them from the command line.

Errors name the flag, the value that came and what is allowed.
"""

from collections.abc import Callable
from itertools import cycle
from pathlib import Path
from types import UnionType
from typing import Any, Union, get_args, get_origin

import tyro
from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

from trimask.tokenizers.storage.ranges import range_spec

FLAGS = ConstructorRegistry()
ESCAPE = "\ue000"
"""A private-use character that precedes values of lists which would be taken for flags; see `escaped`."""


@FLAGS.primitive_rule
def _numbers(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[Any] | None:
    """Reads optional values, tuples and mappings as one unit, so that errors state the reason; None for other types."""
    origin, kinds = info.type_origin, get_args(info.type)
    present = [kind for kind in kinds if kind is not type(None)]
    if origin in (Union, UnionType) and len(present) == 1:
        inner = _spec_of(present[0])
        if inner is None or len(kinds) == 1:
            return None
        return _spec(
            inner.nargs if inner.nargs == 1 else "*",
            f"{{None}}|{inner.metavar}",
            lambda words: None if words == ["None"] else inner.instance_from_str(words),
            lambda value: ["None"] if value is None else inner.str_from_instance(value),
            is_optional=True,
        )
    if tyro.conf.UseAppendAction in info.markers:  # which takes a value at a time
        return None
    return _spec_of(info.type)


def _spec_of(kind: Any) -> PrimitiveConstructorSpec[Any] | None:
    """How a path, a number with a range, or a tuple or mapping of such values is read; None for other types."""
    origin, kinds = get_origin(kind), get_args(kind)
    spec = range_spec(kind)
    if spec is not None:
        return spec
    if kind is Path:
        return _spec(1, "PATH", lambda words: _path(words[0]), lambda value: [str(value)])
    if origin is tuple and kinds in ((str, ...), (Path, ...)):
        read = str if kinds[0] is str else _path
        metavar = f"[{'STR' if kinds[0] is str else 'PATH'} ...]"
        return _spec(
            "*", metavar, lambda words: tuple(read(unescaped(word)) for word in words), lambda v: [*map(str, v)]
        )
    parts = [range_spec(part) for part in kinds if part is not ...]
    if origin is tuple and all(parts):
        each = [part for part in parts if part is not None]
        is_any = kinds[-1] is ...
        metavar = f"[{each[0].metavar} ...]" if is_any else " ".join(part.metavar for part in each)

        def items(words: list[str]) -> tuple[Any, ...]:
            if not is_any and len(words) != len(each):
                raise ValueError(f"takes {len(each)} numbers, got {len(words)}")
            return tuple(part.read(word) for part, word in zip(cycle(each), words, strict=False))

        return _spec("*" if is_any else len(each), metavar, items, lambda value: [*map(str, value)])
    if origin is dict and kinds[0] is str and parts[1] is not None:
        number = parts[1]

        def entries(words: list[str]) -> dict[str, Any]:
            if len(words) % 2:
                raise ValueError(f"takes pairs of a name and a number, got {len(words)} words")
            return {name: number.read(word) for name, word in zip(words[::2], words[1::2], strict=True)}

        return _spec(
            "*", f"[STR {number.metavar} ...]", entries, lambda v: [str(w) for pair in v.items() for w in pair]
        )
    return None


def escaped(word: str) -> str:
    """A value of a list in a form that the parser does not take for a flag, even if it begins with a dash."""
    return ESCAPE + word if word.startswith(("-", ESCAPE)) else word


def unescaped(word: str) -> str:
    """The value before `escaped`."""
    return word.removeprefix(ESCAPE)


def _path(word: str) -> Path:
    if not word:
        raise ValueError("must be a path, got an empty string")
    return Path(word)


def _spec(
    nargs: Any,
    metavar: str,
    read: Callable[[list[str]], Any],
    write: Callable[[Any], list[str]],
    is_optional: bool = False,
) -> PrimitiveConstructorSpec[Any]:
    return PrimitiveConstructorSpec(
        nargs=nargs,
        metavar=metavar,
        instance_from_str=read,
        is_instance=lambda value: is_optional or value is not None,
        str_from_instance=write,
    )
