"""trimask benchmark data: how fast batches of each dataset are prepared, from shards to arrays that a step can take.

in turn          a batch is asked for when the last one is there
a thread         batches are prepared ahead beside the training loop, as `trimask train` does unless told otherwise
N processes      the same in processes of their own (--loop.workers N)

Padding is not counted; "filled" is the share of rows that is not padding. Of several processes that train one model
each prepares its own rows alone, so that together they are as many times as fast.
"""

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import tyro

from trimask.diffusion.data.batches import BatchConfig, Batches
from trimask.diffusion.data.prepared import Prepared
from trimask.diffusion.run.limits import WorkLimits, require_room_for_workers
from trimask.diffusion.run.step_loop import LoopConfig, prefetched
from trimask.scripts import cli
from trimask.scripts.benchmark import write_results
from trimask.scripts.console import parse, tracked
from trimask.tokenizers.storage.ranges import Checked, Size, Workers

_COLUMNS = ["dataset", "batch", "filled", "way", "ms", "tokens/s"]


@dataclass(frozen=True, kw_only=True)
class Arguments(Checked):
    """What is timed."""

    out: tyro.conf.Positional[Path]
    """Folder for data.json and data.md."""
    data: Path
    """Folder of prepared data."""
    tokens: tuple[Size, ...] = (16_384,)
    """Positions of a batch."""
    packed_length: Size = 256
    """Row length to which examples of text alone are packed."""
    workers: tuple[Workers, ...] = (0, 1, 2)
    """Processes that prepare batches; 0: a thread."""
    batches: Size = 20
    """Batches of each case, after an epoch that brings the examples into memory, or 100 batches of it."""
    limits: WorkLimits = WorkLimits()
    """What it may take."""

    def __post_init__(self):
        super().__post_init__()
        if not self.tokens or not self.workers:
            raise ValueError(f"--tokens and --workers take at least one number; got {self.tokens} and {self.workers}")


@dataclass(frozen=True)
class Case:
    """One line of the table."""

    dataset: str
    tokens: int
    """Positions asked for."""
    filled: float
    """Share of row positions that are not padding."""
    way: str
    seconds: float
    """Of a batch, the mean of those timed."""
    tokens_per_second: float


def run(arguments: Arguments) -> list[Case]:
    """Times all cases, writes and prints them."""
    prepared, cases = Prepared(arguments.data), list[Case]()
    asked = list(product(prepared.manifest.datasets, arguments.tokens))
    for dataset, tokens in tracked(asked, "datasets and batches"):
        cases += _cases(arguments, prepared, dataset, tokens)
    cells = [
        [
            case.dataset,
            f"{case.tokens:,}",
            f"{case.filled:.1%}",
            case.way,
            f"{1000 * case.seconds:,.2f}",
            f"{case.tokens_per_second:,.0f}",
        ]
        for case in cases
    ]
    write_results(arguments.out, "data", arguments, cases, _COLUMNS, cells)
    return cases


def _cases(arguments: Arguments, prepared: Prepared, name: str, tokens: int) -> list[Case]:
    weights = {other: float(other == name) for other in prepared.manifest.datasets}
    config = BatchConfig(tokens=tokens, packed_length=arguments.packed_length, weights=weights)
    batches = Batches(prepared, config, seed=0, limits=arguments.limits)
    (dataset,) = batches.datasets
    filled = float(dataset.row_tokens.sum() / len(dataset.rows) / dataset.row_length)
    for step in range(min(-(-len(dataset.rows) // dataset.num_rows), 100)):
        batches(step)
    require_room_for_workers(max(arguments.workers), "--workers")
    ahead = LoopConfig().prefetch + max(arguments.workers)
    stop = ahead + arguments.batches
    ways = {"in turn": partial(_in_turn, batches, stop)}
    for workers in arguments.workers:
        way = f"{workers} process{'es' if workers > 1 else ''}" if workers else "a thread"
        ways[way] = partial(prefetched, batches, 0, stop, LoopConfig(workers=workers))
    counted = sum(map(batches.num_tokens, range(ahead, stop)))
    cases = []
    for way, start in ways.items():
        source = start()
        for _ in range(ahead):
            next(source)
        begin = time.perf_counter()
        for _ in source:
            pass
        seconds = time.perf_counter() - begin
        cases.append(Case(name, tokens, filled, way, seconds / arguments.batches, counted / seconds))
    return cases


def _in_turn(batch: Callable[[int], Any], stop: int) -> Iterator[tuple[int, Any]]:
    return ((step, batch(step)) for step in range(stop))


def main(arguments: Sequence[str]) -> None:
    """Entry point of the command."""
    run(parse(Arguments, list(arguments), "benchmark data", __doc__ or ""))


if __name__ == "__main__":
    sys.exit(cli.main(["benchmark", "data", *sys.argv[1:]]))
