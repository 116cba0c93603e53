"""Parsing and printing that all commands share."""

import ast
import io
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest
from rich.console import Console
from rich.progress import Progress

from trimask.scripts import console
from trimask.scripts.console import joined, option, parse, tracked
from trimask.scripts.flags import unescaped
from trimask.tokenizers.storage.ranges import Size


@dataclass(frozen=True, kw_only=True)
class Words:
    n: Size = 1
    """Number."""
    word: str = ""
    """Word."""
    kind: Literal["a", "b"] = "a"
    """Kind."""
    path: Path = Path("here")
    """Path."""
    maybe: Path | None = None
    """Path or none."""


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (["RUN", "--a", "1", "--a", "2"], ["RUN", "--a", "1", "2"]),
        (["RUN", "--a", "1", "2", "--n", "3", "--a=x=y"], ["RUN", "--n", "3", "--a", "1", "2", "x=y"]),
        (["--a", "1", "--b", "2", "--a", "3"], ["--a", "1", "3", "--b", "2"]),
        (["--n", "--a", "47+__=85", "-"], ["--n", "--a", "47+__=85", "-"]),
        (["RUN", "--a"], ["RUN", "--a"]),
    ],
)
def test_values_of_a_flag_that_is_given_twice_are_all_kept(given, expected):
    assert [unescaped(word) for word in joined(given, "--a", "--b")] == expected


@dataclass(frozen=True, kw_only=True)
class Lists:
    """Lists of words and paths."""

    words: tuple[str, ...] = ()
    """Words."""
    files: tuple[Path, ...] = ()
    """Paths."""


@pytest.mark.parametrize("word", ["--x", "-", "-5", "--words", "\ue000x", "a=b", "--"])
def test_a_value_after_the_equals_sign_may_begin_with_anything(word):
    given = joined([f"--words={word}", "--words", "b", f"--files={word}"], "--words", "--files")
    parsed = parse(Lists, given, "test", "")
    assert parsed == Lists(words=(word, "b"), files=(Path(word),))


def test_an_option_is_found_ahead_of_parsing():
    assert option(["RUN", "--preset", "tiny", "--x", "1"], "--preset") == "tiny"
    assert option(["--preset=tiny"], "--preset") == "tiny"
    assert option(["RUN"], "--preset") is None
    assert option(["--preset"], "--preset") is None
    assert option(["--pre", "tiny"], "--preset") is None  # tyro knows no abbreviations


def test_an_item_counts_as_done_when_the_next_is_asked_for(monkeypatch):
    reports = []
    monkeypatch.setattr(console, "progress_report", lambda: nullcontext(lambda *report: reports.append(report)))
    for item in tracked(("x", "y"), "letters"):
        reports.append(item)
    assert reports == [("letters", 0, 2), "x", ("letters", 1, 2), "y", ("letters", 2, 2)]


@pytest.mark.parametrize(
    ("total", "speed", "said"), [(10, 1234.6, "1,235/s"), (9, 1234.6, ""), (None, 5.0, ""), (10, None, "")]
)
def test_the_rate_of_ten_items_and_more_is_shown(total, speed, said):
    bar = Progress(console=Console(file=io.StringIO()))
    bar.add_task("letters", total=total)
    (task,) = bar.tasks
    task.finished_speed = speed
    assert console._Rate().render(task).plain == said


def test_a_bar_for_each_thing_shows_how_much_is_done(monkeypatch):
    screen = io.StringIO()
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(console, "console", Console(file=screen, force_terminal=True, width=100, color_system=None))
    with console.progress_report() as report:
        for progress in (("letters", 0, 2), ("letters", 1, 2), ("words", 0, 5), ("letters", 2, 2), ("words", 4, 8)):
            report(*progress)
    lines = screen.getvalue().splitlines()
    letters, words = ([line for line in lines if what in line][-1] for what in ("letters", "words"))
    assert "2/2" in letters and "4/8" in words and " left " in words


def test_a_table_shows_words_as_they_are_and_numbers_to_the_right():
    table = console.table("what", ["name", "much"], [["[b]x[/b]", "1.5"], ["y", "10"]])
    screen = io.StringIO()
    Console(file=screen, width=40, force_terminal=False, color_system=None).print(table)
    title, _, header, _, first, second, _ = screen.getvalue().splitlines()
    assert title.strip() == "what" and title.startswith("what")
    assert [line.strip("┃│").split() for line in (header, first, second)] == [
        ["name", "┃", "much"],
        ["[b]x[/b]", "│", "1.5"],
        ["y", "│", "10"],
    ]
    assert first.index("[") == second.index("y") and first.index("5 ") == second.index("0 ")


def test_a_cell_that_is_too_wide_is_folded_and_not_cut():
    screen = io.StringIO()
    Console(file=screen, width=12, force_terminal=False).print(console.table("", ["name"], [["x" * 30]]))
    assert screen.getvalue().count("x") == 30


def test_what_is_said_is_neither_markup_nor_steers_the_terminal(capsys):
    console.say("[red]a[/red] :smile: \x1b[31mb\x07\nc" + 200 * "d")
    assert capsys.readouterr().out == f"[red]a[/red] :smile: �[31mb�\nc{200 * 'd'}\n"
    console.console.print(console.table("[b]t\x1b", ["[i]x\r"], [["[u]y\x9b"]]))
    shown = capsys.readouterr().out
    assert "[b]t�" in shown and "[i]x�" in shown and "[u]y�" in shown and not set(shown) & set("\x1b\x9b\r")


def test_all_text_on_the_terminal_is_said():
    """console.print is for tables and the like, which are made of Text."""
    calls = [
        (path.name, ast.unparse(node.args[0]))
        for path in Path(console.__file__).parent.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "console.print" and path.name != "console.py"
    ]
    assert len(calls) > 10
    assert [call for call in calls if not call[1].startswith(("table(", "_left(table(", "Markdown(", "clock."))] == []


@pytest.mark.parametrize("words", [["--n", "\x1b[31mred\x07"], ["\x1b[31mred\x07"], ["--kind", "\x1b[31mred\x07"]])
def test_an_error_about_a_word_that_steers_the_terminal_does_not_steer_it(words, capsys):
    with pytest.raises(SystemExit):
        console.parse(Words, words, "x", "")
    said = capsys.readouterr()
    assert "[31mred" in said.err
    assert not any(ord(letter) < 32 and letter != "\n" for letter in said.err + said.out)
    assert console.parse(Words, ["--word", "\x1bx"], "x", "").word == "\x1bx"


def test_an_empty_word_is_no_path(capsys):
    assert console.parse(Words, ["--path", "a", "--maybe", "None"], "x", "") == Words(path=Path("a"))
    for flag in ("--path", "--maybe"):
        with pytest.raises(SystemExit):
            console.parse(Words, [flag, ""], "x", "")
        assert f"Error parsing {flag}: must be a path, got an empty string" in capsys.readouterr().err
