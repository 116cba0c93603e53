"""trimask benchmark attention: attention and its gradients, by plain products of matrices and by the device's kernel.

Rows are packed with examples that do not see each other. What counts as needed is every pair of positions of a row,
as in diffusion/cost.py. On a device without a kernel, such as a CPU, there is the plain line alone.
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
    """What is timed."""

    out: tyro.conf.Positional[Path]
    """Folder for attention.json and attention.md."""
    lengths: tuple[Size, ...] = (256, 1024, 2048)
    """Positions of a row."""
    examples: tuple[Size, ...] = (1, 8)
    """Examples that share a row."""
    tokens: Size = 4096
    """Positions of all rows."""
    heads: Size = 4
    """Query heads."""
    kv_heads: Size = 4
    """Heads of keys and values."""
    head_size: Size = 64
    """Width of a head."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of queries, keys and values."""
    repeats: Size = 10
    """Timed calls of each case, after a first one; the median counts."""
    limits: WorkLimits = WorkLimits()
    """What it may take."""

    def __post_init__(self):
        super().__post_init__()
        if not self.lengths or not self.examples or self.heads % self.kv_heads:
            raise ValueError(f"there must be lengths, examples, and heads for each of --kv-heads; got {self}")


@dataclass(frozen=True)
class Case:
    """One line of the table."""

    length: int
    examples: int
    code: str
    timing: Timing
    flops_per_second: float


def run(arguments: Arguments) -> list[Case]:
    """Times all cases, writes and prints them."""
    cases: list[Case] = []
    asked = list(product(arguments.lengths, arguments.examples))
    for length in arguments.lengths:
        rows = max(1, arguments.tokens // length)
        # Scores and their gradient; queries, keys and values with theirs.
        heads = 2 * arguments.heads * length + 2 * (arguments.heads + 2 * arguments.kv_heads) * arguments.head_size
        what = f"attention of {rows:,} rows of {length:,} positions"
        arguments.limits.require_memory(4 * rows * length * heads, what, jax.local_devices()[:1])
    for length, examples in tracked(asked, "lengths and examples"):
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
    given = tuple(
        jnp.asarray(rng.normal(size=(rows, length, number, arguments.head_size)), arguments.dtype) for number in heads
    )
    segment = jnp.broadcast_to(jnp.arange(length) * examples // length, (rows, length))

    def loss(attention, query, key, value):
        return jnp.sum(attend(query, key, value, segment, segment, attention).astype(jnp.float32) ** 2)

    kernel = kernel_for(jax.default_backend(), arguments.dtype, length, length, arguments.head_size)
    ways = {"plain": "plain"} if kernel == "plain" else {"plain": "plain", kernel: "kernel"}
    functions = {code: (jax.jit(jax.grad(partial(loss, way), argnums=(0, 1, 2))), given) for code, way in ways.items()}
    flops = 3 * 4 * rows * length**2 * arguments.heads * arguments.head_size
    return [
        Case(length, examples, code, timing, flops / timing.seconds)
        for code, timing in timed(functions, arguments.repeats).items()
    ]


def main(arguments: Sequence[str]) -> None:
    """Entry point of the command."""
    run(parse(Arguments, list(arguments), "benchmark attention", __doc__ or ""))


if __name__ == "__main__":
    sys.exit(cli.main(["benchmark", "attention", *sys.argv[1:]]))
