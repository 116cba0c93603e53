"""trimask benchmark data: how fast batches are prepared, from shards to arrays that a step can take.

in turn          a batch is asked for when the last one is there
a thread         batches are prepared ahead beside the training loop, as `trimask train` does unless told otherwise
N processes      the same in processes of their own (--loop.workers N)

Every process of a run prepares whole batches, and copies its rows to its devices: what is measured here is what each
of them has to keep up with.
"""

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import tyro

from trimask.diffusion.data.batches import BatchConfig, Batches
from trimask.diffusion.data.prepared import Prepared
from trimask.diffusion.loop import LoopConfig, prefetched
from trimask.scripts import cli
from trimask.scripts.benchmark import write
from trimask.scripts.console import parse, progress_report

_COLUMNS = ["batch", "way", "rows", "ms", "tokens/s"]


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """What is timed."""

    out: tyro.conf.Positional[Path]
    """Folder for data.json and data.md."""
    data: Path
    """Prepared data."""
    tokens: tuple[int, ...] = (1024, 16_384, 262_144)
    """Positions of a batch."""
    packed_length: int = 24
    """Row length to which examples of text alone are packed."""
    workers: tuple[int, ...] = (0, 1, 2)
    """Processes that prepare batches; 0: a thread."""
    batches: int = 20
    """Of each case, after as many as are prepared ahead."""

    def __post_init__(self):
        if not self.tokens or min(*self.tokens, self.packed_length, self.batches) < 1 or min(self.workers) < 0:
            raise ValueError(f"there must be batches, of at least 1 token, and no negative numbers; got {self}")


@dataclass(frozen=True)
class Case:
    """One line of the table."""

    tokens: int
    """Asked for."""
    way: str
    rows: float
    """Of the mean batch."""
    seconds: float
    """Of a batch, the mean of those timed."""
    tokens_per_second: float
    """Padding left out."""


def run(arguments: Arguments) -> list[Case]:
    """Times all cases, writes and prints them."""
    prepared = Prepared(arguments.data)
    ways = ["in turn", *arguments.workers]
    asked, cases = list(product(arguments.tokens, ways)), []
    with progress_report() as report:
        for done, (tokens, way) in enumerate(asked):
            report("batches and ways", done, len(asked))
            config = BatchConfig(tokens=tokens, packed_length=arguments.packed_length)
            cases.append(_case(Batches(prepared, config, seed=0), tokens, way, arguments.batches))
        report("batches and ways", len(asked), len(asked))
    cells = [
        [
            f"{case.tokens:,}",
            case.way,
            f"{case.rows:,.0f}",
            f"{1000 * case.seconds:,.2f}",
            f"{case.tokens_per_second:,.0f}",
        ]
        for case in cases
    ]
    write(arguments.out, "data", arguments, cases, _COLUMNS, cells)
    return cases


def _case(batches: Batches, tokens: int, way: str | int, number: int) -> Case:
    config = LoopConfig() if isinstance(way, str) else LoopConfig(workers=way)
    ahead = config.prefetch + config.workers
    total = ahead + number
    source = _in_turn(batches, total) if isinstance(way, str) else prefetched(batches, 0, total, config)
    for _ in range(ahead):
        next(source)
    begin = time.perf_counter()
    seen = [(len(batch.tokens), int(np.count_nonzero(~batch.is_padding))) for _, batch in source]
    seconds = time.perf_counter() - begin
    rows, counted = np.sum(seen, axis=0)
    name = way if isinstance(way, str) else f"{way} processes" if way else "a thread"
    return Case(tokens, name, rows / number, seconds / number, counted / seconds)


def _in_turn(batch: Callable[[int], Any], stop: int) -> Iterator[tuple[int, Any]]:
    return ((step, batch(step)) for step in range(stop))


def main(arguments: Sequence[str]) -> None:
    """Entry point of the command."""
    run(parse(Arguments, list(arguments), "benchmark data", __doc__ or ""))


if __name__ == "__main__":
    sys.exit(cli.main(["benchmark", "data", *sys.argv[1:]]))
