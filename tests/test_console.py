"""What commands share on the terminal."""

from contextlib import nullcontext

import pytest

from trimask.scripts import console
from trimask.scripts.console import joined, option, tracked


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
    assert joined(given, "--a", "--b") == expected


def test_an_option_is_found_ahead_of_parsing():
    assert option(["RUN", "--preset", "tiny", "--x", "1"], "--preset") == "tiny"
    assert option(["--preset=tiny"], "--preset") == "tiny"
    assert option(["RUN"], "--preset") is None
    assert option(["--preset"], "--preset") is None


def test_an_item_counts_as_done_when_the_next_is_asked_for(monkeypatch):
    reports = []
    monkeypatch.setattr(console, "progress_report", lambda: nullcontext(lambda *report: reports.append(report)))
    for item in tracked(("x", "y"), "letters"):
        reports.append(item)
    assert reports == [("letters", 0, 2), "x", ("letters", 1, 2), "y", ("letters", 2, 2)]
