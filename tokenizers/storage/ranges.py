"""Number types that carry their range, so that it is stated once for construction, command line, files and tests.

    width: Size = 128        where        Size = Annotated[int, whole(1, 1 << 24)]

The command line names the flag of a number out of range and shows the range in `--help`; a file is refused with the
path of the field; a dataclass derived from `Checked` refuses the number on construction. NaN and infinity are in no
range.
"""

import dataclasses
import math
import numbers
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import cache
from typing import Annotated, Any, get_args, get_origin, get_type_hints

from tyro.constructors import PrimitiveConstructorSpec

_MOST = 10**15
"""Largest whole number where none is stated; the longest training has about a hundredth of that many tokens."""


def _is_finite(value: Any) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # a whole number beyond all floats
        return False


def _shown(end: float | int) -> str:
    return f"{end:g}" if isinstance(end, float) else f"{end:,}"


def _shortened(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 30 else f"{text[:29]}…"


@dataclasses.dataclass(frozen=True)
class Range:
    """An interval of whole or real numbers. Each end belongs to it unless it is open."""

    is_whole: bool
    least: float | int
    most: float | int
    is_open_below: bool = False
    is_open_above: bool = False

    def fault(self, value: Any) -> str | None:
        """Says why a value is not in the range, as the end of a sentence; None if it is in the range."""
        kind = numbers.Integral if self.is_whole else numbers.Real
        if not isinstance(value, kind) or isinstance(value, bool):
            return f"must be {'a whole number' if self.is_whole else 'a number'}, got {value!r}"
        if not self.is_whole and not _is_finite(value):
            return f"must be finite, got {value}"
        number: Any = value
        is_below = number <= self.least if self.is_open_below else number < self.least
        is_above = number >= self.most if self.is_open_above else number > self.most
        if not is_below and not is_above:
            return None
        if not self.is_whole and math.isfinite(self.most):
            return f"must lie in {self}, got {_shortened(value)}"
        if is_above:
            return f"must be at most {_shown(self.most)}, got {_shortened(value)}"
        if self.least:
            return f"must be at least {_shown(self.least)}, got {_shortened(value)}"
        return f"must {'be positive' if self.is_open_below else 'not be negative'}, got {_shortened(value)}"

    @property
    def _usual_most(self) -> float | int:
        return _MOST if self.is_whole else math.inf

    def __str__(self) -> str:
        ends = "(" if self.is_open_below else "[", ")" if self.is_open_above else "]"
        return f"{ends[0]}{_shown(self.least)}, {_shown(self.most)}{ends[1]}"

    @property
    def metavar(self) -> str:
        """Kind of number and range, as `--help` shows them."""
        kind = "INT" if self.is_whole else "FLOAT"
        if self.most < self._usual_most:
            return f"{kind} {self}"
        if self.least == -math.inf:
            return kind
        return f"{kind}{'>' if self.is_open_below else '≥'}{_shown(self.least)}"


class RangeSpec(PrimitiveConstructorSpec[Any]):
    """Annotation of a number type: its range, and how tyro parses a number of that range."""

    range: Range

    def __init__(self, range: Range):
        object.__setattr__(self, "range", range)
        super().__init__(
            nargs=1,
            metavar=range.metavar,
            instance_from_str=lambda words: self.read(words[0]),
            is_instance=lambda value: isinstance(value, int if range.is_whole else int | float),
            str_from_instance=lambda value: [str(value)],
        )

    def read(self, word: str) -> Any:
        """Parses a word of the command line. Raises ValueError if it is not a number of the range."""
        value: Any = word
        with suppress(ValueError):  # the range refuses a word that is no number
            value = int(word) if self.range.is_whole else float(word)
        fault = self.range.fault(value)
        if fault is not None:
            raise ValueError(fault)
        return value

    def __repr__(self) -> str:
        return self.metavar


def whole(least: int, most: int = _MOST) -> RangeSpec:
    """Annotation for whole numbers from `least` to `most`, both included."""
    return RangeSpec(Range(True, least, most))


def real(
    least: float | int = -math.inf,
    most: float | int = math.inf,
    *,
    above: float | int | None = None,
    below: float | int | None = None,
) -> RangeSpec:
    """Annotation for finite numbers from `least` to `most`, both included; `above` and `below` exclude their end."""
    return RangeSpec(
        Range(
            False,
            least if above is None else above,
            most if below is None else below,
            is_open_below=above is not None,
            is_open_above=below is not None,
        )
    )


PositiveInt = Annotated[int, whole(1)]
NonNegativeInt = Annotated[int, whole(0)]
Size = Annotated[int, whole(1, 1 << 24)]
"""Length of an array axis, or number of things held in memory at a time."""
Workers = Annotated[int, whole(0, 4096)]
"""Number of processes besides this one."""
Seed = Annotated[int, whole(0, 2**32 - 1)]
"""Seed of a random number generator, 32 bits."""
Finite = Annotated[float, real()]
Positive = Annotated[float, real(above=0)]
NonNegative = Annotated[float, real(0)]
Share = Annotated[float, real(0, 1)]
"""Fraction or probability, from 0 to 1."""
Log2 = Annotated[float, real(-100, 100)]
"""Logarithm to base 2 of a learning rate."""


class Checked:
    """Base of dataclasses that compare their numbers with the ranges of their types on construction.

    Raises ValueError that names the field and the allowed range.
    """

    def __post_init__(self) -> None:
        kind: Any = type(self)
        for name, check in _checks(kind):
            for path, fault in check(getattr(self, name)):
                raise ValueError(f"{name}{path} {fault}")


_Check = Callable[[Any], Iterator[tuple[str, str]]]
"""Yields, for each fault in a value, the path of the faulty part within the value and the reason."""


@cache
def _checks(kind: Any) -> list[tuple[str, _Check]]:
    """Name and check of every field of a dataclass whose type has a range."""
    hints = get_type_hints(kind, include_extras=True)
    checks = ((field.name, _check_of(hints[field.name])) for field in dataclasses.fields(kind))
    return [(name, check) for name, check in checks if check is not None]


def range_spec(kind: Any) -> RangeSpec | None:
    """The `RangeSpec` of an annotated type; None if it has none."""
    parts = get_args(kind)[1:] if get_origin(kind) is Annotated else ()
    return next((part for part in parts if isinstance(part, RangeSpec)), None)


def range_of(kind: Any) -> Range | None:
    """The range that an annotated type states itself; None if it states none."""
    spec = range_spec(kind)
    return None if spec is None else spec.range


def _check_of(kind: Any) -> _Check | None:
    allowed = range_of(kind)
    if allowed is not None:

        def check(value: Any) -> Iterator[tuple[str, str]]:
            fault = allowed.fault(value)
            if fault is not None:
                yield "", fault

        return check
    parts = [_check_of(part) for part in get_args(kind) if part is not ...]
    if not any(parts):
        return None
    if get_origin(kind) in (tuple, list):
        return lambda value: _check_items(value, parts)
    if get_origin(kind) is dict:
        return lambda value: _check_entries(value, parts[1])
    return lambda value: iter(()) if value is None or isinstance(value, str) else _first(parts)(value)


def _first(parts: list[_Check | None]) -> _Check:
    return next(part for part in parts if part is not None)


def _check_items(value: Any, parts: list[_Check | None]) -> Iterator[tuple[str, str]]:
    for index, item in enumerate(value):
        check = parts[min(index, len(parts) - 1)]
        for path, fault in check(item) if check is not None else ():
            yield f"[{index}]{path}", fault


def _check_entries(value: Any, check: _Check | None) -> Iterator[tuple[str, str]]:
    for key, item in value.items():
        for path, fault in check(item) if check is not None else ():
            yield f"[{key!r}]{path}", fault
