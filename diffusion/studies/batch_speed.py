"""How fast the data pipeline is alone, and how full its rows are.

For every dataset: non-padding tokens per second of `Batches` in one thread, once its examples are in memory, and the
share of its rows that is not padding.
"""

import time
from dataclasses import asdict, dataclass

import numpy as np

from trimask.diffusion.data.batches import BatchConfig, Batches
from trimask.diffusion.data.prepared import Prepared
from trimask.diffusion.studies.findings import markdown_table, write_csv
from trimask.diffusion.studies.trials import Trials


@dataclass(frozen=True, kw_only=True)
class BatchSpeed:
    """What to measure."""

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


def measure(config: BatchSpeed, prepared: Prepared, dataset_name: str) -> Speed:
    """A dataset alone."""
    weights = {other: float(other == dataset_name) for other in prepared.manifest.datasets}
    batch = BatchConfig(tokens=config.tokens, packed_length=config.packed_length, weights=weights)
    batches = Batches(prepared, batch, seed=0)
    (dataset,) = batches.datasets
    epoch = -(-len(dataset.rows) // dataset.num_rows)
    for step in range(min(epoch, 2000)):
        batches(step)
    step, tokens, start = 0, 0, time.perf_counter()
    while time.perf_counter() - start < config.seconds:
        tokens += int(np.count_nonzero(~batches(step % epoch).is_padding))
        step += 1
    rate = tokens / (time.perf_counter() - start)
    return Speed(dataset_name, rate, float(dataset.lengths.sum() / len(dataset.rows) / dataset.row_length))


def study(config: BatchSpeed, trials: Trials) -> str:
    """Measures every dataset, writes speeds.csv; returns the text."""
    prepared, speeds = Prepared(trials.data), list[Speed]()
    names = list(prepared.manifest.datasets)
    for number, name in enumerate(names):
        trials.report("datasets", number, len(names))
        speeds.append(measure(config, prepared, name))
    trials.report("datasets", len(names), len(names))
    write_csv(trials.folder / "speeds.csv", [asdict(speed) for speed in speeds])
    rows = [[speed.dataset, f"{speed.tokens_per_second:,.0f}", f"{speed.filled:.2%}"] for speed in speeds]
    return (
        f"Batches of {config.tokens:,} positions, text packed to {config.packed_length}; one thread.\n\n"
        + markdown_table(["dataset", "non-padding tokens/s", "rows filled"], rows)
    )
