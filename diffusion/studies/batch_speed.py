"""How fast the data pipeline is alone, and how full its rows are.

    python -m trimask.diffusion.studies.batch_speed DATA [--tokens 4096] [--packed-length 256]

For every dataset: non-padding tokens per second of `Batches` in one thread, once its examples are in memory, and the
share of its rows that is not padding.
"""

import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro

from trimask.diffusion.data.batches import BatchConfig, Batches
from trimask.diffusion.data.prepared import Prepared


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """What to measure."""

    data: tyro.conf.Positional[Path]
    """Folder that `trimask prepare` wrote."""
    tokens: int = 4096
    """Positions of a batch."""
    packed_length: int = 256
    """Row length of text."""
    seconds: float = 3.0
    """Time per dataset."""


@dataclass(frozen=True)
class Speed:
    """One dataset's measurement."""

    dataset: str
    tokens_per_second: float
    filled: float
    """Share of row positions that are not padding."""


def measure(arguments: Arguments) -> list[Speed]:
    """Every dataset alone."""
    prepared, speeds = Prepared(arguments.data), []
    for name in prepared.manifest.datasets:
        weights = {other: float(other == name) for other in prepared.manifest.datasets}
        config = BatchConfig(tokens=arguments.tokens, packed_length=arguments.packed_length, weights=weights)
        batches = Batches(prepared, config, seed=0)
        (dataset,) = batches.datasets
        epoch = -(-len(dataset.rows) // dataset.num_rows)
        for step in range(min(epoch, 2000)):
            batches(step)
        step, tokens, start = 0, 0, time.perf_counter()
        while time.perf_counter() - start < arguments.seconds:
            tokens += int(np.count_nonzero(~batches(step % epoch).is_padding))
            step += 1
        rate = tokens / (time.perf_counter() - start)
        speeds.append(Speed(name, rate, float(dataset.lengths.sum() / len(dataset.rows) / dataset.row_length)))
    return speeds


def main(arguments: list[str]) -> None:
    """Prints a line per dataset."""
    for speed in measure(tyro.cli(Arguments, args=arguments, description=__doc__)):
        print(f"{speed.dataset}: {speed.tokens_per_second:,.0f} tokens/s, rows {speed.filled:.2%} full")


if __name__ == "__main__":
    main(sys.argv[1:])
