"""trimask benchmark attention: times attention and its gradients, by matrix products and by the device's kernel.

Rows are packed with examples that do not attend to each other. FLOPs are counted for every pair of positions of a row,
as in diffusion/cost.py. On a device without a kernel, such as a CPU, only the matrix products are timed.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from trimask.diffusion.attention import attend, kernel_for
from trimask.diffusion.run.limits import WorkLimits
from trimask.scripts import cli
from trimask.scripts.benchmark import write_results
from trimask.scripts.benchmarks.timing import Timing, timed
from trimask.scripts.console import parse, tracked
from trimask.tokenizers.storage.ranges import Checked, Size

_COLUMNS = ["length", "examples", "code", "ms", "GFLOP/s", "MiB beside", "s to compile"]


@dataclass(frozen=True, kw_only=True)
class Arguments(Checked):
    """Sizes for which attention is timed."""

    out: tyro.conf.Positional[Path]
    """Folder for attention.json and attention.md."""
    lengths: tuple[Size, ...] = (256, 1024, 2048)
    """Row lengths to time, in positions."""
    examples: tuple[Size, ...] = (1, 8)
    """Numbers of examples per row to time."""
    tokens: Size = 4096
    """Number of positions of all rows together."""
    heads: Size = 4
    """Number of query heads."""
    kv_heads: Size = 4
    """Number of key and value heads; must divide the number of query heads."""
    head_size: Size = 64
    """Width of a head."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of queries, keys and values."""
    repeats: Size = 10
    """Number of timed calls of each case, after one that is not timed; their median is reported."""
    limits: WorkLimits = WorkLimits()
    """Limits of memory and computing time."""

    def __post_init__(self):
        super().__post_init__()
        if not self.lengths or not self.examples or self.heads % self.kv_heads:
            raise ValueError(f"there must be lengths and examples, and --kv-heads must divide --heads; got {self}")


@dataclass(frozen=True)
class Case:
    """Result of one case: a line of the table."""

    length: int
    examples: int
    code: str
    timing: Timing
    flops_per_second: float


def run(arguments: Arguments) -> list[Case]:
    """Times all cases, writes and prints the results, and returns them. Raises an error if the memory is too small."""
    cases: list[Case] = []
    shapes = list(product(arguments.lengths, arguments.examples))
    for length in arguments.lengths:
        rows = max(1, arguments.tokens // length)
        # Scores and their gradient; queries, keys and values with theirs.
        heads = 2 * arguments.heads * length + 2 * (arguments.heads + 2 * arguments.kv_heads) * arguments.head_size
        what = f"attention of {rows:,} rows of {length:,} positions"
        arguments.limits.require_memory(4 * rows * length * heads, what, jax.local_devices()[:1])
    for length, examples in tracked(shapes, "lengths and examples"):
        cases += _cases(arguments, length, examples)
    cells = []
    for case in cases:
        memory = case.timing.temporary_bytes
        cells.append(
            [
                f"{case.length:,}",
                str(case.examples),
                case.code,
                f"{1000 * case.timing.seconds:,.1f}",
                f"{case.flops_per_second / 1e9:,.0f}",
                "" if memory is None else f"{memory / 2**20:,.0f}",
                f"{case.timing.compile_seconds:.1f}",
            ]
        )
    write_results(arguments.out, "attention", arguments, cases, _COLUMNS, cells)
    return cases


def _cases(arguments: Arguments, length: int, examples: int) -> list[Case]:
    rng, rows = np.random.default_rng(0), max(1, arguments.tokens // length)
    heads = (arguments.heads, arguments.kv_heads, arguments.kv_heads)
    inputs = tuple(
        jnp.asarray(rng.normal(size=(rows, length, number, arguments.head_size)), arguments.dtype) for number in heads
    )
    segment = jnp.broadcast_to(jnp.arange(length) * examples // length, (rows, length))

    def loss(attention, query, key, value):
        return jnp.sum(attend(query, key, value, segment, segment, attention).astype(jnp.float32) ** 2)

    kernel = kernel_for(jax.default_backend(), arguments.dtype, length, length, arguments.head_size)
    kinds = {"plain": "plain"} if kernel == "plain" else {"plain": "plain", kernel: "kernel"}
    functions = {
        code: (jax.jit(jax.grad(partial(loss, kind), argnums=(0, 1, 2))), inputs) for code, kind in kinds.items()
    }
    flops = 3 * 4 * rows * length**2 * arguments.heads * arguments.head_size
    return [
        Case(length, examples, code, timing, flops / timing.seconds)
        for code, timing in timed(functions, arguments.repeats).items()
    ]


def main(arguments: Sequence[str]) -> None:
    """Runs `trimask benchmark attention` with these arguments."""
    run(parse(Arguments, list(arguments), "benchmark attention", __doc__ or ""))


if __name__ == "__main__":
    sys.exit(cli.main(["benchmark", "attention", *sys.argv[1:]]))
