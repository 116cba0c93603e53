"""trimask benchmark data: times the preparation of batches of each dataset, from shards to arrays for a training step.

in turn          each batch is prepared when it is requested
a thread         batches are prepared ahead in a thread beside the training loop, the default of `trimask train`
N processes      batches are prepared ahead in N processes (--loop.workers N)

Tokens are counted without padding; "filled" is the share of positions that are not padding. If several processes train
one model, each prepares only its own rows, so together they are as many times faster.
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
    """Data and batches that are timed."""

    out: tyro.conf.Positional[Path]
    """Folder for data.json and data.md."""
    data: Path
    """Folder of prepared data."""
    tokens: tuple[Size, ...] = (16_384,)
    """Batches to time, in positions."""
    packed_length: Size = 256
    """Row length to which examples of text alone are packed, in tokens."""
    workers: tuple[Workers, ...] = (0, 1, 2)
    """Numbers of worker processes to time; 0: a thread."""
    batches: Size = 20
    """Number of timed batches of each case, after an epoch, or at most 100 batches, that load examples into memory."""
    limits: WorkLimits = WorkLimits()
    """Limits of memory and computing time."""

    def __post_init__(self):
        super().__post_init__()
        if not self.tokens or not self.workers:
            raise ValueError(f"--tokens and --workers need at least one number; got {self.tokens} and {self.workers}")


@dataclass(frozen=True)
class Case:
    """Result of one case: a line of the table."""

    dataset: str
    tokens: int
    """Requested positions of a batch."""
    filled: float
    """Share of positions that are not padding."""
    way: str
    """How batches were prepared: in turn, by a thread, or by processes."""
    seconds: float
    """Mean time of a batch."""
    tokens_per_second: float


def run(arguments: Arguments) -> list[Case]:
    """Times all cases, writes and prints the results, and returns them."""
    prepared, cases = Prepared(arguments.data), list[Case]()
    pairs = list(product(prepared.manifest.datasets, arguments.tokens))
    for dataset, tokens in tracked(pairs, "datasets and batches"):
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
    """Runs `trimask benchmark data` with these arguments."""
    run(parse(Arguments, list(arguments), "benchmark data", __doc__ or ""))


if __name__ == "__main__":
    sys.exit(cli.main(["benchmark", "data", *sys.argv[1:]]))
