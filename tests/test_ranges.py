"""Every number of every configuration declares its range; construction, files and the command line all enforce it."""

import dataclasses
import importlib
import math
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trimask.diffusion.data.modalities import MODALITIES
from trimask.scripts.benchmark import BENCHMARKS
from trimask.scripts.cli import COMMANDS
from trimask.scripts.console import parse
from trimask.scripts.study import STUDIES, Options
from trimask.tokenizers.storage import configuration
from trimask.tokenizers.storage.ranges import Checked, NonNegative, PositiveInt, Share, Size, range_spec, real, whole


def configurations(kind: Any, found: set[type]) -> set[type]:
    """All dataclasses that occur in a type, recursively."""
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        if kind not in found:
            found.add(kind)
            for hint in get_type_hints(kind, include_extras=True).values():
                configurations(hint, found)
    else:
        for part in get_args(kind):
            configurations(part, found)
    return found


def numbers(kind: Any) -> list[Any]:
    """All int and float types within a type, with their annotations."""
    if kind in (int, float) or (get_origin(kind) is Annotated and get_args(kind)[0] in (int, float)):
        return [kind]
    if get_origin(kind) is Literal:
        return []
    return [number for part in get_args(kind) if part is not ... for number in numbers(part)]


def roots() -> list[type]:
    """Everything that the command line sets: arguments of commands and benchmarks, studies, and codecs."""
    names = [COMMANDS[name].module for name in COMMANDS if name not in ("study", "benchmark")]
    modules = [importlib.import_module(name) for name in [*names, *BENCHMARKS.values()]]
    studies = [type(make()) for study in STUDIES.values() for make in study.presets.values()]
    codecs = [modality.codec_config for modality in MODALITIES.values()]
    return [*(module.Arguments for module in modules if hasattr(module, "Arguments")), Options, *studies, *codecs]


FOUND: set[type] = set()
for root in roots():
    configurations(root, FOUND)
LEAVES = [
    (f"{kind.__name__}.{name}", number)
    for kind in sorted(FOUND, key=lambda kind: (kind.__module__, kind.__name__))
    for name, hint in get_type_hints(kind, include_extras=True).items()
    for number in numbers(hint)
]


def test_every_number_that_can_be_set_declares_its_range():
    assert len(LEAVES) > 200
    assert [name for name, number in LEAVES if range_spec(number) is None] == []
    checked = {kind for kind in FOUND if any(numbers(h) for h in get_type_hints(kind, include_extras=True).values())}
    assert [kind.__name__ for kind in checked if not issubclass(kind, Checked)] == []


BAD = ["nan", "inf", "-inf", "-1e400", "1e400", "1" + 400 * "0", "", "x", "0x10", "1_", "None", "true", "١٢x"]


def test_a_range_refuses_what_is_no_number_of_it():
    for name, number in LEAVES:
        own = range_spec(number)
        least, most = own.range.least, own.range.most
        below = "-1" if least == 0 else str(least - 1) if own.range.is_whole else f"{least - abs(least):g}"
        above = str(most + 1) if own.range.is_whole else f"{2 * most:g}"
        for word in (*BAD, *([below] if math.isfinite(least) and float(below) < least else []), above):
            with pytest.raises(ValueError, match=r"^must (be|lie|not be negative)"):
                own.read(word)
                pytest.fail(f"{name} takes {word!r}")


@dataclass(frozen=True, kw_only=True)
class Small(Checked):
    n: Size = 4
    """Number."""
    maybe: PositiveInt | None = None
    """Number or none."""
    share: Share = 0.5
    """Share."""
    many: tuple[PositiveInt, ...] = (1, 2)
    """Numbers."""
    two: tuple[Share, Share] | None = None
    """Two numbers or none."""
    weights: dict[str, NonNegative] = field(default_factory=dict)
    """Numbers by name."""
    open_ends: Annotated[float, real(above=0, below=0.5)] = 0.1
    """Without its ends."""


@dataclass(frozen=True, kw_only=True)
class Outer:
    a: Small = Small()
    """Inner."""


CASES = [
    ("--a.n 0", {"n": 0}, "n must be at least 1, got 0"),
    ("--a.n 16777217", {"n": 16777217}, "n must be at most 16,777,216, got 16777217"),
    ("--a.maybe -1", {"maybe": -1}, "maybe must be at least 1, got -1"),
    ("--a.share 1.5", {"share": 1.5}, "share must lie in [0, 1], got 1.5"),
    ("--a.many 1 0", {"many": [1, 0]}, "many[1] must be at least 1, got 0"),
    ("--a.two 0.5 1.5", {"two": [0.5, 1.5]}, "two[1] must lie in [0, 1], got 1.5"),
    ("--a.weights text -1.0", {"weights": {"text": -1.0}}, "weights['text'] must not be negative, got -1.0"),
    ("--a.open-ends 0.0", {"open_ends": 0.0}, "open_ends must lie in (0, 0.5), got 0.0"),
    ("--a.open-ends 0.5", {"open_ends": 0.5}, "open_ends must lie in (0, 0.5), got 0.5"),
]


@pytest.mark.parametrize(("words", "content", "fault"), CASES)
def test_command_line_files_and_construction_refuse_alike(words, content, fault, capsys):
    place, _, reason = fault.partition(" ")
    with pytest.raises(SystemExit):
        parse(Outer, words.split(), "x", "")
    said = " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert f"Error parsing {words.split()[0]}: {reason}" in said
    with pytest.raises(ValueError) as refused:
        configuration.from_dict({"a": content}, Outer, "F")
    assert str(refused.value) == f"F: not a Outer: {reason} @ $.a.{place}"
    with pytest.raises(ValueError) as refused:
        Small(**{name: tuple(value) if isinstance(value, list) else value for name, value in content.items()})
    assert str(refused.value) == fault


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("--a.maybe 3 --a.share 1", Small(maybe=3, share=1.0)),
        ("--a.maybe None --a.two None", Small()),
        ("--a.many 3 --a.two 0 1", Small(many=(3,), two=(0.0, 1.0))),
        ("--a.weights a 1 b 2.5", Small(weights={"a": 1.0, "b": 2.5})),
    ],
)
def test_numbers_of_a_range_are_read(words, expected):
    assert parse(Outer, words.split(), "x", "").a == expected


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        ("--a.two 0.5", "--a.two: takes 2 numbers, got 1"),
        ("--a.weights a", "--a.weights: takes pairs of a name and a number, got 1 words"),
        ("--a.many 1 x", "--a.many: must be a whole number, got 'x'"),
        ("--a.maybe nan", "--a.maybe: must be a whole number, got 'nan'"),
        ("--a.share nan", "--a.share: must be finite, got nan"),
    ],
)
def test_words_that_are_no_numbers_are_refused_with_the_flag(words, reason, capsys):
    with pytest.raises(SystemExit):
        parse(Outer, words.split(), "x", "")
    assert f"Error parsing {reason}" in " ".join(capsys.readouterr().err.replace("│", " ").split())


def test_help_shows_the_range(capsys):
    with pytest.raises(SystemExit):
        parse(Outer, ["--help"], "x", "")
    shown = " ".join(capsys.readouterr().out.replace("│", " ").split())
    for expected in (
        "--a.n INT [1, 16,777,216]",
        "{None}|INT≥1",
        "--a.share FLOAT [0, 1]",
        "FLOAT (0, 0.5)",
        "STR FLOAT≥0",
    ):
        assert expected in shown


@given(st.integers() | st.floats(allow_nan=True), st.sampled_from([whole(1), whole(0, 9), real(), real(0), real(0, 1)]))
def test_a_number_is_in_its_range_exactly_if_it_lies_between_the_ends(value, own):
    is_kind = isinstance(value, int) or (not own.range.is_whole and math.isfinite(value))
    is_inside = is_kind and own.range.least <= value <= own.range.most
    assert (own.range.fault(value) is None) == is_inside
