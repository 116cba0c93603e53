"""Embedded puzzles: prompts, and the one response that is right. No file and no network is touched.

    config      prompt              response
    cups        2ccbdeebabdea=      22333 5              the shell game: where the ball is after each of the first swaps
                                                         (as many as somebody cared to write down), and at the end
    addition    347+586=            13 13 09 933         of each column from the right, its sum with the carry that
                                                         comes into it; then the answer
    sudoku      .31.2..4.2.....1    4312213412433421     the cells of a 4×4 grid, row by row; . is blank

In the shell game the prompt does not tell how long its response is, and whoever wants the end must follow the way.
There a model is sure of EOS long before it is sure of anything else, and a sampler that goes by confidence writes the
end of an answer first, and leaves no room to find it.

The same config gives the same records in the same order on every machine. What is held out, as `validation` and `test`:

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
from trimask.tokenizers.vocabulary import TEXT

SPLITS = ("train", "validation", "test")

SWAPS = {"a": (1, 2), "b": (2, 3), "c": (3, 4), "d": (4, 5), "e": (1, 5)}
"""Cups that change places, by the name of the swap."""


@dataclass(frozen=True)
class Puzzle:
    """A question and its answer."""

    prompt: str
    response: str

    def example(self) -> RawExample:
        """Named by its question, which is given."""
        return RawExample(self.prompt, {TEXT: self.prompt + self.response}, given=len(self.prompt))


@dataclass(frozen=True, kw_only=True)
class Addition:
    """Sums of two numbers of the same number of digits, worked out column by column."""

    train: int
    """Puzzles of a split."""
    validation: int
    test: int
    digits: tuple[int, ...] = (2, 3, 4, 5)
    """How many the operands may have; longer ones are as many times more frequent as they are longer."""
    judge = "final_answer"
    """By which a response is right; a name of `judges.py`."""

    def puzzles(self) -> dict[str, list[Puzzle]]:
        """All of them by split."""
        draw, seen, found = random.Random("addition"), set[frozenset[int]](), list[Puzzle]()
        count = self.train + self.validation + self.test
        while len(found) < count:
            (n,) = draw.choices(self.digits, weights=self.digits)  # there are few short ones
            a, b = (draw.randrange(10 ** (n - 1), 10**n) for _ in range(2))
            if frozenset({a, b}) not in seen:
                seen.add(frozenset({a, b}))
                steps = [f"{column:02}" for column in column_sums(a, b)]
                found.append(Puzzle(f"{a}+{b}=", " ".join([*steps, str(a + b)])))
        return _held_out_first(found, self.validation, self.test)


@dataclass(frozen=True, kw_only=True)
class Sudoku:
    """4×4 grids with blanks that can be filled in one way only."""

    train: int
    """Puzzles of each grid of a split."""
    validation: int
    test: int
    held_out: tuple[int, int] = (24, 48)
    """Of the 288 grids, those for validation and for test."""
    blanks: tuple[int, ...] = (8, 9, 10, 11)
    """How many a puzzle may have, equally often before those with several solutions are dropped."""
    judge = "exact_match"
    """As of `Addition`."""

    def puzzles(self) -> dict[str, list[Puzzle]]:
        """All of them by split."""
        grids = sudoku_grids()
        order = random.Random("sudoku").sample(range(len(grids)), len(grids))
        validation, test = self.held_out
        parts = {
            "test": order[:test],
            "validation": order[test : test + validation],
            "train": order[test + validation :],
        }
        return {
            split: [puzzle for number in parts[split] for puzzle in self._of_grid(grids, number, getattr(self, split))]
            for split in SPLITS
        }

    def _of_grid(self, grids: Int[np.ndarray, "grids 16"], number: int, count: int) -> list[Puzzle]:
        """Different puzzles that this grid alone solves."""
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
    """The shell game: under which of five cups is the ball, after so many swaps of two of them?"""

    train: int
    """Puzzles of a split."""
    validation: int
    test: int
    swaps: int = 12
    """How many, one after another."""
    patience: float = 0.9
    """To write down where the ball is after one swap more is so many times as likely."""
    judge = "final_answer"
    """As of `Addition`."""

    def puzzles(self) -> dict[str, list[Puzzle]]:
        """All of them by split."""
        draw, found = random.Random("cups"), dict[str, Puzzle]()
        counts = range(self.swaps)
        while len(found) < self.train + self.validation + self.test:
            start, swaps = draw.randint(1, 5), draw.choices(sorted(SWAPS), k=self.swaps)
            places = cups_places(start, swaps)
            (count,) = draw.choices(counts, [self.patience**count for count in counts])
            prompt = f"{start}{''.join(swaps)}="
            way = "".join(map(str, places[:count]))
            found.setdefault(prompt, Puzzle(prompt, f"{way} {places[-1]}".strip()))
        return _held_out_first(list(found.values()), self.validation, self.test)


CONFIGS: Mapping[str, Cups | Addition | Sudoku] = MappingProxyType(
    {
        "cups": Cups(train=60_000, validation=500, test=1_000),
        "addition": Addition(train=15_000, validation=500, test=1_000),
        "sudoku": Sudoku(train=70, validation=20, test=20),
    }
)


@dataclass(frozen=True)
class Puzzles:
    """One of `CONFIGS` as a source."""

    name: str
    medium: None = None
    fill: Fill = "answer"

    def __post_init__(self):
        if self.name not in CONFIGS:
            raise ValueError(f"unknown puzzles {self.name!r}; there are {', '.join(CONFIGS)}")

    def blocks(self, records: int) -> list[Block]:
        found = _puzzles(CONFIGS[self.name])
        return [block for split in SPLITS for block in blocks_of_split(split, len(found[split]), records)]

    def entries(self, block: Block) -> Iterator[Entry]:
        found = _puzzles(CONFIGS[self.name])[block.file]
        for number in range(block.start, block.start + block.count):
            puzzle = found[number]
            yield Entry(puzzle.prompt, f"{self.name} {block.file}", number + 1, puzzle.example, block.file)


def _held_out_first(found: Sequence[Puzzle], validation: int, test: int) -> dict[str, list[Puzzle]]:
    """By split; a longer training split leaves the others as they are."""
    cut = test + validation
    return {"train": list(found[cut:]), "validation": list(found[test:cut]), "test": list(found[:test])}


def column_sums(a: int, b: int) -> list[int]:
    """Sums of the digits of each column from the right, with the carry from the column before."""
    sums, carry = list[int](), 0
    for x, y in itertools.zip_longest(reversed(str(a)), reversed(str(b)), fillvalue="0"):
        sums.append(int(x) + int(y) + carry)
        carry = sums[-1] // 10
    return sums


def cups_places(start: int, swaps: Sequence[str]) -> list[int]:
    """The cup with the ball after each swap."""
    places = [start]
    for name in swaps:
        one, other = SWAPS[name]
        places.append({one: other, other: one}.get(places[-1], places[-1]))
    return places[1:]


@functools.cache
def sudoku_grids() -> Int[np.ndarray, "grids 16"]:
    """All 288 full grids of digits 1 to 4: each once in every row, column and quarter."""
    units = [*np.arange(16).reshape(4, 4), *np.arange(16).reshape(4, 4).T]
    units += list(np.arange(16).reshape(2, 2, 2, 2).transpose(0, 2, 1, 3).reshape(4, 4))
    rows = list(itertools.permutations(range(1, 5)))
    grids = np.array(list(itertools.product(rows, repeat=4)), np.int8).reshape(-1, 16)
    is_valid = np.all([np.sort(grids[:, unit], axis=1) == range(1, 5) for unit in units], axis=(0, 2))
    return grids[is_valid]


@functools.cache
def _puzzles(config: Cups | Addition | Sudoku) -> Mapping[str, list[Puzzle]]:
    return config.puzzles()
