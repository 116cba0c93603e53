"""Puzzles: every response is correct, splits are disjoint, and every process makes the same puzzles."""

import hashlib
import itertools
import os
import subprocess
import sys
from functools import cache

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trimask.diffusion.data.prepare import prepare
from trimask.diffusion.data.prepare_config import PrepareConfig
from trimask.diffusion.data.readers import puzzles
from trimask.diffusion.data.readers.puzzles import (
    PUZZLE_CONFIGS,
    Addition,
    Cups,
    PuzzleSource,
    Sudoku,
    column_sums,
    cups_after_swaps,
    sudoku_grids,
)
from trimask.diffusion.data.sources import SourceConfig
from trimask.diffusion.data.splits import SPLITS

SMALL = [
    Cups(train=9, validation=4, test=5),
    Addition(train=9, validation=4, test=5),
    Sudoku(train=1, validation=2, test=1, held_out=(3, 7)),
]


@cache
def found(name):
    """Split → puzzles of a config, made on first use and not in every process that collects the tests."""
    return PUZZLE_CONFIGS[name].puzzles()


def everything(name):
    return [puzzle for split in SPLITS for puzzle in found(name)[split]]


def operands(puzzle):
    a, b = puzzle.prompt.removesuffix("=").split("+")
    return int(a), int(b)


def solutions(cells):
    """All complete grids that agree with the known cells, found by search over the cells."""
    if "." not in cells:
        return [cells]
    blank = cells.index(".")
    row, column = divmod(blank, 4)
    seen = {
        cells[4 * r + c]
        for r, c in itertools.product(range(4), repeat=2)
        if r == row or c == column or (r // 2, c // 2) == (row // 2, column // 2)
    }
    return [
        full for digit in "1234" if digit not in seen for full in solutions(cells[:blank] + digit + cells[blank + 1 :])
    ]


# Addition


@given(st.integers(0, 10**6), st.integers(0, 10**6))
def test_a_column_sums_up_to_what_the_numbers_cut_there_carry_into_it(a, b):
    columns = range(max(len(str(a)), len(str(b))))
    assert column_sums(a, b) == [(a % 10 ** (i + 1) + b % 10 ** (i + 1)) // 10**i for i in columns]


def test_sums_are_worked_out_column_by_column():
    assert column_sums(347, 586) == [13, 13, 9]
    for puzzle in everything("addition"):
        a, b = operands(puzzle)
        *steps, total = puzzle.response.split(" ")
        assert [int(step) for step in steps] == column_sums(a, b) and {len(step) for step in steps} == {2}
        assert total == str(a + b)


def test_operands_are_equally_long_and_longer_ones_more_frequent():
    lengths = [[len(str(number)) for number in operands(puzzle)] for puzzle in everything("addition")]
    assert all(a == b for a, b in lengths)
    shares = np.bincount([a for a, _ in lengths]) / len(lengths)
    # Those of two digits are so few that one in four came twice, and is not counted again.
    np.testing.assert_allclose(shares[3:] / shares[3], [1, 4 / 3, 5 / 3], rtol=0.08)
    assert 0.1 < shares[2] < 2 / 14


def test_of_a_sum_and_its_mirror_image_only_one_is_a_puzzle():
    pairs = [frozenset(operands(puzzle)) for puzzle in everything("addition")]
    assert len(set(pairs)) == len(pairs)


@pytest.mark.parametrize("kind", [Addition, Cups])
def test_held_out_puzzles_do_not_depend_on_the_number_of_training_puzzles(kind):
    few, many = (kind(train=train, validation=5, test=7).puzzles() for train in (3, 30))
    assert (few["validation"], few["test"]) == (many["validation"], many["test"])
    assert {split: len(found) for split, found in few.items()} == {"train": 3, "validation": 5, "test": 7}


# The shell game


def test_the_ball_moves_with_its_cup():
    assert cups_after_swaps(2, "ccbde") == [2, 2, 3, 3, 3]
    assert cups_after_swaps(5, "eabcd") == [1, 2, 3, 4, 5]


def test_a_response_lists_some_intermediate_cups_and_then_the_last():
    counts = np.zeros(12)
    for puzzle in everything("cups"):
        places = "".join(map(str, cups_after_swaps(int(puzzle.prompt[0]), puzzle.prompt[1:-1])))
        way, _, end = f" {puzzle.response}".rpartition(" ")
        assert len(places) == 12 and places.startswith(way.strip()) and end == places[-1]
        counts[len(way.strip())] += 1
    np.testing.assert_allclose(counts / counts[0], 0.9 ** np.arange(12), rtol=0.08)


def test_no_shell_game_occurs_twice():
    assert len({puzzle.prompt for puzzle in everything("cups")}) == len(everything("cups")) == 61_500


# Sudoku


def test_the_grids_are_all_that_solve_an_empty_one():
    grids = ["".join(map(str, grid)) for grid in sudoku_grids()]
    assert sorted(grids) == sorted(solutions("." * 16))
    assert len(grids) == 288


def test_a_response_is_the_only_solution_of_its_prompt():
    for puzzle in everything("sudoku")[::12]:
        assert solutions(puzzle.prompt) == [puzzle.response]


def test_eight_to_eleven_cells_are_blank():
    blanks = [puzzle.prompt.count(".") for puzzle in everything("sudoku")]
    assert set(blanks) == {8, 9, 10, 11}


def test_no_sudoku_occurs_twice_and_no_solution_in_two_splits():
    prompts = [puzzle.prompt for puzzle in everything("sudoku")]
    assert len(set(prompts)) == len(prompts)
    grids = {split: {puzzle.response for puzzle in found("sudoku")[split]} for split in SPLITS}
    assert [len(grids[split]) for split in SPLITS] == [216, 24, 48]
    assert len(set().union(*grids.values())) == 288


# As a source


def test_another_process_makes_the_same():
    program = (
        "import hashlib\n"
        "from trimask.diffusion.data.readers.puzzles import Addition, Cups, Sudoku\n"
        f"for config in {SMALL}:\n"
        "    print(hashlib.sha256(str(config.puzzles()).encode()).hexdigest())\n"
    )
    environment = os.environ | {"PYTHONHASHSEED": "1"}
    result = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    ours = "".join(hashlib.sha256(str(config.puzzles()).encode()).hexdigest() + "\n" for config in SMALL)
    assert (result.stderr, result.stdout) == ("", ours)


@pytest.fixture
def small(monkeypatch):
    """Configs with few puzzles, instead of the usual ones."""
    configs = dict(zip(PUZZLE_CONFIGS, SMALL, strict=True))
    monkeypatch.setattr(puzzles, "PUZZLE_CONFIGS", configs)
    return configs


@pytest.mark.parametrize("name", PUZZLE_CONFIGS)
def test_blocks_hold_every_puzzle_of_every_split_once(name, small):
    source, puzzles_of = PuzzleSource(name), small[name].puzzles()
    for split in SPLITS:
        entries = [entry for block in source.blocks(4) if block.file == split for entry in source.entries(block)]
        assert [entry.split for entry in entries] == [split] * len(entries)
        examples = [entry.example() for entry in entries]
        texts = [
            (example.media["text"][: example.given_characters], example.media["text"][example.given_characters :])
            for example in examples
        ]
        assert texts == [(puzzle.prompt, puzzle.response) for puzzle in puzzles_of[split]]


def test_an_unknown_config_is_told_the_known_ones():
    with pytest.raises(ValueError, match="unknown puzzles 'chess'; there are cups, addition, sudoku"):
        PuzzleSource("chess")


def test_responses_of_prepared_puzzles_are_padded_with_eos(tmp_path, small):
    config = PrepareConfig(
        sources={name: SourceConfig(kind="puzzles", where=(name,)) for name in small},
        text_vocabulary=256,
        response_tokens=40,
        workers=1,
    )
    prepared = prepare(tmp_path, config)
    splits = {name: dataset.splits for name, dataset in prepared.manifest.datasets.items()}
    assert splits["addition"] == {"train": 9, "validation": 4, "test": 5}
    assert splits["sudoku"] == {"train": 278, "validation": 6, "test": 7}
    eos = prepared.tokenizers.vocabulary.eos_code
    for name, config in small.items():
        for record, puzzle in zip(prepared.examples(name, "test"), config.puzzles()["test"], strict=True):
            given, codes = record["num_given"], record["text"]
            assert given == len(puzzle.prompt) and len(codes) == given + 40
            assert np.all(codes[given + len(puzzle.response) :] == eos)
            assert prepared.tokenizers.decode("text", [codes]) == [puzzle.prompt + puzzle.response]
