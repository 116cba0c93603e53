"""The JSON reader agrees with Python's on strict JSON, and says where and why it refuses everything else."""

import json
import math

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from trimask.tokenizers.storage import json_text
from trimask.tokenizers.storage.json_text import MAX_DEPTH, parse_json, read_json, read_json_lines

KEYS = st.text(st.characters(exclude_categories=("Cs",)), max_size=3)
LEAVES = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | KEYS
VALUES = st.recursive(LEAVES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3))


@given(VALUES, st.booleans(), st.sampled_from([None, 1]))
def test_what_is_written_is_read(value, escapes, indent):
    text = json.dumps(value, ensure_ascii=escapes, indent=indent)
    assert parse_json(text, "F") == value
    assert parse_json(text.encode("utf-8-sig"), "F") == value


@given(VALUES, st.data())
def test_a_damaged_text_is_refused_or_is_json_and_nothing_else_is_raised(value, data):
    text = json.dumps(value)
    start, end = (data.draw(st.integers(0, len(text))) for _ in range(2))
    damaged = text[:start] + data.draw(st.text('{}[]",:\\u0d8NaInfty1e9.- \n', max_size=4)) + text[end:]
    try:
        found = parse_json(damaged, "F")
    except ValueError as error:
        assert str(error).startswith("F, line ")
    else:
        assert found == json.loads(damaged)


@given(st.text())
@example("\ufeff")
@example('"\ufeff"')
def test_any_text_is_refused_exactly_if_python_refuses_it_or_it_is_not_strict(text):
    def refuse(*_):
        raise ValueError

    try:
        expected = json.loads(text.removeprefix("\ufeff"), parse_constant=refuse)
        json.dumps(expected, ensure_ascii=False).encode()
    except ValueError:
        with pytest.raises(ValueError, match=r"^F, line \d+: "):
            parse_json(text, "F")
    else:
        assert parse_json(text, "F") == expected


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('{"a": {"b": 1,\n"c": 2, "b": 3}}', 'F, line 5: not strict JSON: duplicate key "b" @ $.a'),
        ('{"a": [1, NaN]}', "F, line 4: not strict JSON: expected a value, got 'NaN]}' @ $.a[1]"),
        ("[-Infinity]", "F, line 4: not strict JSON: expected a value, got '-Infinity]' @ $[0]"),
        ('{"x": 1e999}', "F, line 4: not strict JSON: the number 1e999 is too large, got '1e999}' @ $.x"),
        ("9" * 5000, f"not strict JSON: the number {'9' * 29}… is too large"),
        ('["\\ud800"]', "F, line 4: not strict JSON: a string with half of a surrogate pair @ $[0]"),
        ("[" * 100_000, f"more than {MAX_DEPTH} objects and lists inside one another"),
        ("[" * (MAX_DEPTH + 1) + "]" * (MAX_DEPTH + 1), f"more than {MAX_DEPTH} objects"),
        ('{"a": ' * (MAX_DEPTH + 1) + "1" + "}" * (MAX_DEPTH + 1), f"more than {MAX_DEPTH} objects"),
        ("[1, 2", "F, line 4: not strict JSON: expected , or ], got the end of the line @ $"),
        ('{"a" 1}', "expected : after a key, got '1}' @ $"),
        ("{a: 1}", "expected a key in \", got 'a: 1}' @ $"),
        ('"abc', "unterminated string, got '\"abc' @ $"),
        ("1 2", "more text after the value, got '2' @ $"),
        ("", "expected a value, got the end of the line @ $"),
        (b"[\n\xff", "F, line 5: not UTF-8 text: invalid start byte"),
    ],
)
def test_an_error_says_file_line_path_and_reason(text, reason):
    with pytest.raises(ValueError) as caught:
        parse_json(text, "F", 4)
    assert reason in str(caught.value) and len(str(caught.value)) < 250


def test_as_many_levels_as_are_allowed_are_read():
    text = "[" * MAX_DEPTH + "]" * MAX_DEPTH
    assert parse_json(text, "F") == json.loads(text)


def test_infinity_is_read_where_it_is_allowed_and_nan_never():
    assert parse_json("[Infinity, -Infinity]", None, allows_infinity=True) == [math.inf, -math.inf]
    with pytest.raises(ValueError, match="not strict JSON: expected a value, got 'NaN'"):
        parse_json("NaN", None, allows_infinity=True)


def test_a_file_that_is_too_large_or_no_file_is_not_opened(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    path.write_text("[1, 2, 3]")
    monkeypatch.setattr(json_text, "MAX_JSON_BYTES", 8)
    with pytest.raises(ValueError, match=r"a\.json: 9 bytes of JSON, at most 8 are allowed"):
        read_json(path)
    with pytest.raises(ValueError, match="F, line 1: longer than the 8 bytes"):
        parse_json("[1, 2, 3]", "F")
    with pytest.raises(FileNotFoundError, match=r"b\.json: no such file"):
        read_json(tmp_path / "b.json")


def test_lines_come_with_their_numbers_and_blank_ones_are_left_out(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('\ufeff{"a": 1}\r\n\n  \n[2]\n{', encoding="utf-8")
    lines = read_json_lines(path)
    assert [next(lines), next(lines)] == [(1, {"a": 1}), (4, [2])]
    with pytest.raises(ValueError, match=r"a\.jsonl, line 5: not strict JSON: expected a key"):
        next(lines)
