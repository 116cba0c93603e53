"""trimask benchmark loss: measures time and memory of the loss and its gradients, with and without an array of logits.

The same hidden states, unembedding matrix, masks and weights go through

    tiles              our loss: logits of masked positions and of the ids that each may take, one tile at a time
    masked logits      all logits of the masked positions, whose number is known in advance
    all logits         all logits of all positions

A third of the ids are text, a third pictures and a third sounds, and so are the positions. Memory is what XLA allocates
beside arguments and results. "ours faster ×2" means that the other code takes twice the time of ours, and "ours smaller
×2" that it takes twice the memory.
"""

import dataclasses
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from trimask.diffusion.cross_entropy import cross_entropy, masked_cross_entropy, restrict
from trimask.diffusion.loss import LossConfig
from trimask.diffusion.run.limits import WorkLimits
from trimask.scripts import cli
from trimask.scripts.benchmark import write_results
from trimask.scripts.benchmarks.timing import Timing, timed
from trimask.scripts.console import parse, tracked
from trimask.tokenizers.storage.ranges import Checked, Size, real, whole

_COLUMNS = ["ids", "code", "ms", "ours faster", "MiB beside", "ours smaller", "s to compile"]


@dataclass(frozen=True, kw_only=True)
class Arguments(Checked):
    """Sizes for which the loss is timed."""

    out: tyro.conf.Positional[Path]
    """Folder for loss.json and loss.md."""
    vocabularies: tuple[Annotated[int, whole(3, 1 << 24)], ...] = (1024, 16_384, 65_536)
    """Sizes of the vocabulary to time: numbers of ids of all modalities together."""
    tokens: Size = 2048
    """Number of positions of the batch."""
    masked: Annotated[float, real(above=0, most=1)] = 0.5
    """Share of the positions that are masked, in (0, 1]."""
    width: Size = 128
    """Width of the hidden states."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the operands of matrix products."""
    tile_positions: Size = LossConfig.tile_positions
    """Number of masked positions of a tile."""
    tile_ids: Size = LossConfig.tile_ids
    """Largest number of ids of a tile."""
    repeats: Size = 10
    """Number of timed calls of each case, after one that is not timed; their median is reported."""
    limits: WorkLimits = WorkLimits()
    """Limits of memory and computing time."""

    def __post_init__(self):
        super().__post_init__()
        if not self.vocabularies:
            raise ValueError("--vocabularies needs at least one number of ids")
        if self.num_masked < 1:
            raise ValueError(f"--masked {self.masked} masks none of the {self.tokens} positions; choose a larger share")

    @property
    def num_masked(self) -> int:
        """Number of masked positions."""
        return round(self.masked * self.tokens)


@dataclass(frozen=True)
class Case:
    """Result of one case: a line of the table."""

    vocabulary: int
    code: str
    timing: Timing
    speedup: float | None = None
    """Time of this code over that of ours; None for ours."""
    memory_ratio: float | None = None
    """Memory of this code over that of ours; None for ours, or if it is not known."""


def run(arguments: Arguments) -> list[Case]:
    """Times all cases, writes and prints the results, and returns them. Raises an error if the memory is too small."""
    cases: list[Case] = []
    for vocabulary in arguments.vocabularies:
        # Logits and their gradient, and the hidden states and the matrix with theirs.
        numbers = 2 * (arguments.tokens * vocabulary + arguments.width * (arguments.tokens + vocabulary))
        what = f"logits of {arguments.tokens:,} tokens and {vocabulary:,} ids"
        arguments.limits.require_memory(4 * numbers, what, jax.local_devices()[:1])
    for vocabulary in tracked(arguments.vocabularies, "vocabularies"):
        cases += _cases(arguments, vocabulary)
    cells = []
    for case in cases:
        memory = "" if case.timing.temporary_bytes is None else f"{case.timing.temporary_bytes / 2**20:,.1f}"
        ratios = ["" if ratio is None else f"×{ratio:.2f}" for ratio in (case.speedup, case.memory_ratio)]
        milliseconds = f"{1000 * case.timing.seconds:,.1f}"
        row = [f"{case.vocabulary:,}", case.code, milliseconds, ratios[0], memory, ratios[1]]
        cells.append([*row, f"{case.timing.compile_seconds:.1f}"])
    write_results(arguments.out, "loss", arguments, cases, _COLUMNS, cells)
    return cases


def _cases(arguments: Arguments, vocabulary: int) -> list[Case]:
    rng, tokens = np.random.default_rng(0), arguments.tokens
    hidden = rng.normal(size=(tokens, arguments.width)).astype(np.float32)
    matrix = (rng.normal(size=(arguments.width, vocabulary)) / arguments.width**0.5).astype(np.float32)
    third = vocabulary // 3
    start = np.arange(tokens) * 3 // tokens * third
    bounds = np.stack([start, start + third], axis=1).astype(np.int32)
    clean = (start + rng.integers(0, third, tokens)).astype(np.int32)
    is_masked = np.isin(np.arange(tokens), rng.permutation(tokens)[: arguments.num_masked])
    weight = rng.uniform(0.5, 2.0, tokens).astype(np.float32) / tokens
    inputs = tuple(map(jnp.asarray, (hidden, matrix, clean, bounds, is_masked, weight)))
    functions = {
        "tiles": partial(_tiles, arguments.tile_positions, arguments.tile_ids, arguments.dtype),
        "masked logits": partial(_masked_logits, arguments.num_masked, arguments.dtype),
        "all logits": partial(_all_logits, arguments.dtype),
    }
    measured = timed(
        {name: (jax.jit(jax.value_and_grad(f, argnums=(0, 1))), inputs) for name, f in functions.items()},
        arguments.repeats,
    )
    ours, *others = [Case(vocabulary, name, timing) for name, timing in measured.items()]
    return [ours, *(_compared(ours.timing, other) for other in others)]


def _compared(ours: Timing, other: Case) -> Case:
    memory = other.timing.temporary_bytes
    ratio = memory / ours.temporary_bytes if memory is not None and ours.temporary_bytes else None
    return dataclasses.replace(other, speedup=other.timing.seconds / ours.seconds, memory_ratio=ratio)


def _tiles(positions: int, ids: int, dtype: str, hidden, matrix, clean, bounds, is_masked, weight):
    of_tokens = (clean, bounds, is_masked, weight, jnp.zeros_like(weight))
    return masked_cross_entropy(hidden, matrix, *of_tokens, positions, ids, dtype)[0]


def _masked_logits(number: int, dtype: str, hidden, matrix, clean, bounds, is_masked, weight):
    masked = jnp.nonzero(is_masked, size=number)[0]
    inputs = (clean[masked], bounds[masked], is_masked[masked], weight[masked])
    return _all_logits(dtype, hidden[masked], matrix, *inputs)


def _all_logits(dtype: str, hidden, matrix, clean, bounds, is_masked, weight):
    logits = jnp.matmul(hidden.astype(dtype), matrix.astype(dtype), preferred_element_type=jnp.float32)
    ids = jnp.arange(matrix.shape[1])
    nll, _ = cross_entropy(restrict(logits, (ids >= bounds[:, :1]) & (ids < bounds[:, 1:]))[None], clean[None])
    return jnp.sum(jnp.where(is_masked, weight * nll[0], 0.0))


def main(arguments: Sequence[str]) -> None:
    """Runs `trimask benchmark loss` with these arguments."""
    run(parse(Arguments, list(arguments), "benchmark loss", __doc__ or ""))


if __name__ == "__main__":
    sys.exit(cli.main(["benchmark", "loss", *sys.argv[1:]]))
