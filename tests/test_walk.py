"""Walks of `walk.py` are short, and returns to a module are recognised."""

import sys
from pathlib import Path

import pytest
import walk

from trimask.diffusion.data import survey


def test_a_record_reaches_its_shard_in_few_stays_and_never_comes_back(tmp_path):
    stays, returns = walk.counts(walk.walk_of_record(tmp_path))
    assert stays <= 18 and returns == 0


def test_a_prompt_is_answered_in_few_stays(loaded, tmp_path):
    stays, returns = walk.counts(walk.walk_of_prompt(loaded, tmp_path))
    assert stays <= 12 and returns <= 2


def test_a_module_that_is_entered_again_is_a_return(tmp_path, monkeypatch):
    """A survey that calls the module which read a record's line, for each record."""
    from trimask.diffusion.data.readers import lines

    original = survey._entries

    def entries(*arguments):
        for entry in original(*arguments):
            lines.blocks_of_split(entry.id, 1, 1)
            yield entry

    monkeypatch.setattr(survey, "_entries", entries)
    found = walk.walk_of_record(tmp_path)
    assert [stay.module for stay in found if stay.is_return] == ["diffusion/data/readers/lines.py"]
    assert sys.getprofile() is None


@pytest.mark.parametrize("words", [[], ["shard"], ["record", "prompt"]])
def test_an_unknown_walk_is_refused_with_the_known_ones(words):
    with pytest.raises(SystemExit, match=r"usage: python tests/walk.py record\|prompt"):
        walk.main(words)


def test_a_walk_is_shown_with_its_functions():
    stays = [walk.Stay("a.py", ["f", "g"], False), walk.Stay("b.py", ["h"], False), walk.Stay("a.py", ["i"], True)]
    assert walk.show(stays).splitlines() == [
        "  1         a.py: f, g",
        "  2         b.py: h",
        "  3  return a.py: i",
        "3 stays, 1 returns",
    ]
    assert Path(__file__).parents[1] == walk.ROOT
