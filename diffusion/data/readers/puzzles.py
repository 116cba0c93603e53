"""Embedded puzzles: prompts, each with its only correct response. They need no files and no network.

    config      prompt              response
    cups        2ccbdeebabdea=      22333 5              the shell game: the ball's cup after each of the first swaps
                                                         (a random number of them), then its cup at the end
    addition    347+586=            13 13 09 933         the sum of each column from the right, with the carry into it;
                                                         then the answer
    sudoku      .31.2..4.2.....1    4312213412433421     the cells of a 4×4 grid, row by row; . is blank

In the shell game the prompt does not determine the length of the response, and the final cup can only be found by
following the swaps. A model is confident of EOS long before it is confident of anything else, so a sampler that goes by
confidence writes the end of the answer first, and leaves no room to work it out.

The same config gives the same records in the same order on every machine. Held out, as `validation` and `test`, are:

    cups        prompts
    addition    operand pairs, unordered: a+b and b+a are never in two splits
    sudoku      solutions: no split has a puzzle whose grid solves one of another
"""

import functools
import itertools
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
from jaxtyping import Int

from trimask.diffusion.data.layout import Fill
from trimask.diffusion.data.readers.lines import blocks_of_split
from trimask.diffusion.data.records import Block, Entry, RawExample
from trimask.diffusion.data.splits import SPLITS, TEST, TRAIN, VALIDATION
from trimask.tokenizers.vocabulary import TEXT

SWAPS = {"a": (1, 2), "b": (2, 3), "c": (3, 4), "d": (4, 5), "e": (1, 5)}
"""Letter of a swap → the two cups that it exchanges."""


@dataclass(frozen=True)
class Puzzle:
    """A prompt and its only correct response."""

    prompt: str
    response: str

    def example(self) -> RawExample:
        """The puzzle as an example, whose id is its prompt."""
        return RawExample(self.prompt, {TEXT: self.prompt + self.response}, given_characters=len(self.prompt))


@dataclass(frozen=True, kw_only=True)
class Addition:
    """Sums of two numbers with equally many digits, worked out column by column."""

    train: int
    """Number of training puzzles."""
    validation: int
    """Number of validation puzzles."""
    test: int
    """Number of test puzzles."""
    digits: tuple[int, ...] = (2, 3, 4, 5)
    """Numbers of digits that the operands may have, drawn in proportion to these numbers."""
    judge = "final_answer"
    """Name of the judge in `judges.py` that tells whether a response is correct."""

    def puzzles(self) -> dict[str, list[Puzzle]]:
        """Split → its puzzles."""
        draw, pairs, puzzles = random.Random("addition"), set[frozenset[int]](), list[Puzzle]()
        count = self.train + self.validation + self.test
        while len(puzzles) < count:
            (n,) = draw.choices(self.digits, weights=self.digits)  # there are few different short sums
            a, b = (draw.randrange(10 ** (n - 1), 10**n) for _ in range(2))
            if frozenset({a, b}) not in pairs:
                pairs.add(frozenset({a, b}))
                steps = [f"{column:02}" for column in column_sums(a, b)]
                puzzles.append(Puzzle(f"{a}+{b}=", " ".join([*steps, str(a + b)])))
        return _divide(puzzles, self.validation, self.test)


@dataclass(frozen=True, kw_only=True)
class Sudoku:
    """4×4 grids with blanks that can be filled in one way only."""

    train: int
    """Number of puzzles of each training grid."""
    validation: int
    """Number of puzzles of each validation grid."""
    test: int
    """Number of puzzles of each test grid."""
    held_out: tuple[int, int] = (24, 48)
    """Number of the 288 grids that are held out for validation, and for test."""
    blanks: tuple[int, ...] = (8, 9, 10, 11)
    """Numbers of blanks that a puzzle may have, equally often before puzzles with several solutions are dropped."""
    judge = "exact_match"
    """Name of the judge in `judges.py` that tells whether a response is correct."""

    def puzzles(self) -> dict[str, list[Puzzle]]:
        """Split → its puzzles."""
        grids = sudoku_grids()
        order = random.Random("sudoku").sample(range(len(grids)), len(grids))
        validation, test = self.held_out
        numbers = {
            TEST: order[:test],
            VALIDATION: order[test : test + validation],
            TRAIN: order[test + validation :],
        }
        counts = {TRAIN: self.train, VALIDATION: self.validation, TEST: self.test}
        return {
            split: [puzzle for number in numbers[split] for puzzle in self._of_grid(grids, number, counts[split])]
            for split in SPLITS
        }

    def _of_grid(self, grids: Int[np.ndarray, "grids 16"], number: int, count: int) -> list[Puzzle]:
        """`count` different puzzles whose only solution is grid `number`."""
        draw, solution = random.Random(f"sudoku {number}"), grids[number]
        response, prompts = "".join(map(str, solution)), dict[str, None]()
        while len(prompts) < count:
            blank = set(draw.sample(range(16), draw.choice(self.blanks)))
            known = [cell for cell in range(16) if cell not in blank]
            if (grids[:, known] == solution[known]).all(axis=1).sum() == 1:
                prompts["".join("." if cell in blank else digit for cell, digit in enumerate(response))] = None
        return [Puzzle(prompt, response) for prompt in prompts]


@dataclass(frozen=True, kw_only=True)
class Cups:
    """The shell game: under which of five cups is the ball after `swaps` exchanges of two cups?"""

    train: int
    """Number of training puzzles."""
    validation: int
    """Number of validation puzzles."""
    test: int
    """Number of test puzzles."""
    swaps: int = 12
    """Number of swaps of a puzzle."""
    length_decay: float = 0.9
    """Ratio of the probabilities that a response lists n + 1 and n intermediate cups, for n < `swaps` − 1."""
    judge = "final_answer"
    """Name of the judge in `judges.py` that tells whether a response is correct."""

    def puzzles(self) -> dict[str, list[Puzzle]]:
        """Split → its puzzles."""
        draw, puzzles = random.Random("cups"), dict[str, Puzzle]()
        counts = range(self.swaps)
        while len(puzzles) < self.train + self.validation + self.test:
            start, swaps = draw.randint(1, 5), draw.choices(sorted(SWAPS), k=self.swaps)
            cups = cups_after_swaps(start, swaps)
            (count,) = draw.choices(counts, [self.length_decay**count for count in counts])
            prompt = f"{start}{''.join(swaps)}="
            intermediate = "".join(map(str, cups[:count]))
            puzzles.setdefault(prompt, Puzzle(prompt, f"{intermediate} {cups[-1]}".strip()))
        return _divide(list(puzzles.values()), self.validation, self.test)


PUZZLE_CONFIGS: Mapping[str, Cups | Addition | Sudoku] = MappingProxyType(
    {
        "cups": Cups(train=60_000, validation=500, test=1_000),
        "addition": Addition(train=15_000, validation=500, test=1_000),
        "sudoku": Sudoku(train=70, validation=20, test=20),
    }
)
"""Config of the puzzles, by name."""


@dataclass(frozen=True)
class PuzzleSource:
    """Source of the puzzles of one config."""

    name: str
    """Name of the config in `PUZZLE_CONFIGS`."""
    medium: None = None
    fill: Fill = "answer"

    def __post_init__(self):
        if self.name not in PUZZLE_CONFIGS:
            raise ValueError(f"unknown puzzles {self.name!r}; there are {', '.join(PUZZLE_CONFIGS)}")

    def blocks(self, records: int) -> list[Block]:
        puzzles = _puzzles(PUZZLE_CONFIGS[self.name])
        return [block for split in SPLITS for block in blocks_of_split(split, len(puzzles[split]), records)]

    def entries(self, block: Block) -> Iterator[Entry]:
        puzzles = _puzzles(PUZZLE_CONFIGS[self.name])[block.file]
        for number in range(block.start, block.start + block.count):
            puzzle = puzzles[number]
            yield Entry(puzzle.prompt, f"{self.name} {block.file}", number + 1, puzzle.example, block.file)


def _divide(puzzles: Sequence[Puzzle], validation: int, test: int) -> dict[str, list[Puzzle]]:
    """Split → its puzzles: first the test split, then validation, so that the number of training puzzles moves none."""
    held_out = test + validation
    return {TRAIN: list(puzzles[held_out:]), VALIDATION: list(puzzles[test:held_out]), TEST: list(puzzles[:test])}


def column_sums(a: int, b: int) -> list[int]:
    """Sum of the two digits and the carry of each column, from the right."""
    sums, carry = list[int](), 0
    for x, y in itertools.zip_longest(reversed(str(a)), reversed(str(b)), fillvalue="0"):
        sums.append(int(x) + int(y) + carry)
        carry = sums[-1] // 10
    return sums


def cups_after_swaps(start: int, swaps: Sequence[str]) -> list[int]:
    """Cup with the ball, 1 to 5, after each swap."""
    cups = [start]
    for letter in swaps:
        one, other = SWAPS[letter]
        cups.append({one: other, other: one}.get(cups[-1], cups[-1]))
    return cups[1:]


@functools.cache
def sudoku_grids() -> Int[np.ndarray, "grids 16"]:
    """All 288 complete 4×4 grids, row by row: each digit 1 to 4 is once in every row, column and quarter."""
    units = [*np.arange(16).reshape(4, 4), *np.arange(16).reshape(4, 4).T]
    units += list(np.arange(16).reshape(2, 2, 2, 2).transpose(0, 2, 1, 3).reshape(4, 4))
    rows = list(itertools.permutations(range(1, 5)))
    grids = np.array(list(itertools.product(rows, repeat=4)), np.int8).reshape(-1, 16)
    is_valid = np.all([np.sort(grids[:, unit], axis=1) == range(1, 5) for unit in units], axis=(0, 2))
    return grids[is_valid]


@functools.cache
def _puzzles(config: Cups | Addition | Sudoku) -> Mapping[str, list[Puzzle]]:
    return config.puzzles()
