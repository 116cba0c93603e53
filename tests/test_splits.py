"""Split of a record: it depends on the record alone, not on others."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trimask.diffusion.data.fields import Fields
from trimask.diffusion.data.records import Entry
from trimask.diffusion.data.split_rules import SplitConfig
from trimask.diffusion.data.splits import (
    TRAIN,
    canonical_split,
    is_test,
    sorted_splits,
    split_of_folder,
    splits_of_files,
)

IDS = st.lists(st.text(max_size=12), min_size=1, max_size=60)
SHARES = st.tuples(st.floats(0, 0.999), st.floats(0, 0.999)).filter(lambda pair: sum(pair) < 1)
DRAWN = {TRAIN, "validation", "test"}


def entry(id, split=None, **fields):
    return Entry(id, "file", 1, lambda: None, split, Fields(fields))


def config(shares=(0.2, 0.3), seed=0, held_out=()):
    return SplitConfig(validation=float(shares[0]), test=float(shares[1]), seed=seed, held_out=held_out)


@given(IDS, SHARES, st.integers(0, 2**32 - 1))
def test_every_record_has_one_of_three_splits_and_keeps_it(ids, shares, seed):
    splits = [config(shares, seed).split_of(entry(id)) for id in ids]
    assert set(splits) <= DRAWN
    assert splits == [config(shares, seed).split_of(entry(id, other="field")) for id in ids]


@given(IDS, SHARES, st.integers(0, 2**32 - 1))
def test_a_share_of_nothing_holds_nothing_out(ids, shares, seed):
    assert {config((0, 0), seed).split_of(entry(id)) for id in ids} == {TRAIN}
    assert "validation" not in {config((0, shares[1]), seed).split_of(entry(id)) for id in ids}
    assert "test" not in {config((shares[0], 0), seed).split_of(entry(id)) for id in ids}


@given(IDS, SHARES, st.floats(0, 1), st.integers(0, 2**32 - 1))
def test_a_larger_test_share_keeps_all_records_of_a_smaller_one(ids, shares, part, seed):
    smaller, larger = config((0, shares[1] * part), seed), config((0, shares[1]), seed)
    for id in ids:
        assert smaller.split_of(entry(id)) != "test" or larger.split_of(entry(id)) == "test"


@given(st.text(max_size=12), st.text(min_size=1, max_size=12), SHARES)
def test_the_split_of_a_source_takes_precedence_except_over_rules(id, split, shares):
    assert config(shares).split_of(entry(id, split)) == split
    held = config(shares, held_out=("speaker=anna", "age=7"))
    assert held.split_of(entry(id, split, speaker="anna")) == "test_speaker"
    assert held.split_of(entry(id, split, age=7)) == "test_age"
    assert held.split_of(entry(id, split, speaker="anna", age=7)) == "test_speaker"
    assert held.split_of(entry(id, split, speaker="ben")) == split


@pytest.mark.parametrize(
    ("rule", "value", "is_held"),
    [
        ("a=true", True, True),
        ("a=True", True, False),
        ("a=true", "true", True),
        ("a=1", True, False),
        ("a=true", 1, False),
        ("a=7", 7, True),
        ("a=7", np.int64(7), True),
        ("a=7", "7", True),
        ("a=7.0", 7, True),
        ("a=null", None, True),
        ("a=[1, 2]", [1, 2], True),
        ('a={"b": 1}', {"b": 1}, True),
        ("a=b=c", "b=c", True),
        ("a=anna", "Anna", False),
    ],
)
def test_values_of_rules_compare_as_json_or_as_text(rule, value, is_held):
    assert (config(held_out=(rule,)).first_rule({"a": value}) == rule) == is_held


def test_a_draw_by_content_depends_on_the_content_alone():
    by_content = dataclasses.replace(config((0.3, 0.3)), by="content")
    drawn = [by_content.split_of(entry(id), content) for content in "abcdefghij" for id in ("1", "2")]
    assert drawn[::2] == drawn[1::2] and set(drawn) == DRAWN
    assert drawn[::2] == [config((0.3, 0.3)).split_of(entry(content)) for content in "abcdefghij"]


def test_common_names_mean_the_three_splits():
    assert [canonical_split(name) for name in ("val", "valid", "dev", "training", "extra")] == [
        *["validation"] * 3,
        "train",
        "extra",
    ]
    assert [split_of_folder(name) for name in ("Train", "DEV", "test", "extra")] == [
        "train",
        "validation",
        "test",
        None,
    ]
    assert sorted_splits(["test_b", "x", "test", "validation", "train"]) == [
        "train",
        "validation",
        "test",
        "test_b",
        "x",
    ]
    assert [is_test(split) for split in ("test", "test_who", "tests", "train")] == [True, True, False, False]


def test_shares_are_those_of_many_records():
    splits = [config((0.2, 0.3)).split_of(entry(f"{Path('folder')}/{number}")) for number in range(20_000)]
    # Five standard deviations are 0.014 and 0.016.
    assert abs(splits.count("validation") / 20_000 - 0.2) < 0.014
    assert abs(splits.count("test") / 20_000 - 0.3) < 0.016


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        (["q/train.jsonl", "q/test.jsonl"], ["train", "test"]),
        (["q/train-00000-of-00002.jsonl", "q/Dev_1.jsonl", "q/notes.txt"], ["train", "validation", None]),
        (["b/train/a.txt", "b/test/a.txt", "b/c.txt"], ["train", "test", None]),
        (["b/train/test.txt", "b/train/a.txt"], ["test", "train"]),
        (["test/a.txt", "test/b.txt", "c.txt"], [None, None, None]),  # where all are of one split it is a word as any
        (["trainer.txt", "testament.txt"], [None, None]),
    ],
)
def test_names_of_files_determine_their_splits_if_they_name_several(files, expected):
    found = splits_of_files([Path(file) for file in files])
    assert [found.get(Path(file)) for file in files] == expected


def test_rules_match_text_in_any_unicode_normal_form():
    for rule, value in (("who=Zo\u00eb", "Zoe\u0308"), ("who=Zoe\u0308", "Zo\u00eb")):
        assert config(held_out=(rule,)).split_of(entry("a", who=value)) == "test_who"
