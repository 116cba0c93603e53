"""trimask benchmark checkpoint: times saving and restoring a checkpoint, and how long training is blocked.

held up     time until training goes on: the state is copied and its checksums are computed
written     time until the checkpoint is on disk, written in the background
restored    time until the state is on the device again, with its checksums compared
"""

import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import jax
import tyro

from trimask.diffusion.cost import count_parameters
from trimask.diffusion.pretraining.description import TrainConfig
from trimask.diffusion.pretraining.training_step import Pretraining, TrainState
from trimask.diffusion.run.checkpoint import Checkpoints, Retention
from trimask.diffusion.run.folder import writing
from trimask.diffusion.run.limits import WorkLimits
from trimask.diffusion.transformer import TransformerConfig
from trimask.scripts import cli
from trimask.scripts.benchmark import parse_size, write_results
from trimask.scripts.console import parse, tracked
from trimask.tokenizers.storage.ranges import Checked, Size
from trimask.tokenizers.vocabulary import Vocabulary

_COLUMNS = ["size", "parameters", "state MiB", "on disk MiB", "held up s", "written s", "restored s"]


@dataclass(frozen=True, kw_only=True)
class Arguments(Checked):
    """Networks whose checkpoints are timed."""

    out: tyro.conf.Positional[Path]
    """Folder for checkpoint.json and checkpoint.md; checkpoints are written there too, and removed."""
    sizes: tuple[str, ...] = ("128x4", "384x6", "768x12")
    """Sizes of networks, WIDTHxLAYERS, with heads of width 64."""
    vocabulary: Size = 16_384
    """Number of text tokens of the vocabulary."""
    repeats: Size = 3
    """Number of saves and restores of each network; their median is reported."""
    limits: WorkLimits = WorkLimits()
    """Limits of memory and computing time."""

    def __post_init__(self):
        super().__post_init__()
        if not self.sizes:
            raise ValueError("--sizes needs at least one size")
        for size in self.sizes:
            parse_size(size)


@dataclass(frozen=True)
class Case:
    """Result of one case: a line of the table."""

    size: str
    parameters: int
    state_bytes: int
    disk_bytes: int
    held_seconds: float
    """Time for which training is blocked."""
    written_seconds: float
    """Time from the beginning of saving until the checkpoint is on disk."""
    restored_seconds: float


def run(arguments: Arguments) -> list[Case]:
    """Times all cases, writes and prints the results, and returns them. Raises an error if the memory is too small."""
    for size in arguments.sizes:
        count = count_parameters(_network(size), _vocabulary(arguments)).total
        needed = 2 * 16 * count  # float32 parameters, average and two moments; saved and restored
        arguments.limits.require_memory(needed, f"a state of {count:,} parameters, twice,", jax.local_devices()[:1])
    cases = [_case(arguments, size) for size in tracked(arguments.sizes, "sizes")]
    cells = [
        [
            case.size,
            f"{case.parameters / 1e6:.1f}M",
            *(f"{size / 2**20:,.0f}" for size in (case.state_bytes, case.disk_bytes)),
            *(f"{s:,.2f}" for s in (case.held_seconds, case.written_seconds, case.restored_seconds)),
        ]
        for case in cases
    ]
    write_results(arguments.out, "checkpoint", arguments, cases, _COLUMNS, cells)
    return cases


def _case(arguments: Arguments, size: str) -> Case:
    pretraining = Pretraining(TrainConfig(model=_network(size)), _vocabulary(arguments))
    state = jax.block_until_ready(pretraining.init())
    with writing(arguments.out):
        arguments.out.mkdir(parents=True, exist_ok=True)
        times, disk = [], 0
        for _ in range(arguments.repeats):
            with tempfile.TemporaryDirectory(dir=arguments.out) as folder:
                times.append(_seconds(Path(folder), state))
                disk = sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())
    leaves = jax.tree.leaves(state)
    count = sum(leaf.size for leaf in jax.tree.leaves(state.parameters))
    return Case(size, count, sum(leaf.nbytes for leaf in leaves), disk, *(median(t) for t in zip(*times, strict=True)))


def _network(size: str) -> TransformerConfig:
    width, layers = parse_size(size)
    return TransformerConfig(width=width, num_layers=layers, num_heads=width // 64)


def _vocabulary(arguments: Arguments) -> Vocabulary:
    return Vocabulary(text_size=arguments.vocabulary, codebook_sizes={})


def _seconds(run: Path, state: TrainState) -> tuple[float, float, float]:
    """Times of one save and restore: held up, written and restored."""
    with Checkpoints(run, Retention()) as checkpoints:
        begin = time.perf_counter()
        checkpoints.save(1, state, notes={}, metrics={})
        held = time.perf_counter() - begin
        checkpoints.wait()
        written = time.perf_counter() - begin
        begin = time.perf_counter()
        restored = checkpoints.restore(1, state)
        jax.block_until_ready(restored.tree)
        return held, written, time.perf_counter() - begin


def main(arguments: Sequence[str]) -> None:
    """Runs `trimask benchmark checkpoint` with these arguments."""
    run(parse(Arguments, list(arguments), "benchmark checkpoint", __doc__ or ""))


if __name__ == "__main__":
    sys.exit(cli.main(["benchmark", "checkpoint", *sys.argv[1:]]))
