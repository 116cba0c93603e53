"""What a compiled function takes: seconds, median of calls in turn with others; memory and exchanges by XLA's plan."""

import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from statistics import median
from typing import Any

import jax


@dataclass(frozen=True)
class Timing:
    """Of one function."""

    seconds: float
    """Of a call; the median."""
    compile_seconds: float
    """Lowering and compiling."""
    temporary_bytes: int | None
    """What XLA allocates beside arguments and results; None where it does not say."""


def timed(functions: Mapping[str, tuple[Callable[..., Any], tuple[Any, ...]]], repeats: int) -> dict[str, Timing]:
    """Compiles jitted functions for their arguments, then calls them in turn: what disturbs one disturbs all."""
    compiled, compile_seconds = {}, {}
    for name, (function, arguments) in functions.items():
        begin = time.perf_counter()
        compiled[name] = function.lower(*arguments).compile()  # type: ignore[attr-defined]
        compile_seconds[name] = time.perf_counter() - begin
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for repeat in range(1 + repeats):
        for name, (_, arguments) in functions.items():
            begin = time.perf_counter()
            jax.block_until_ready(compiled[name](*arguments))
            if repeat:
                seconds[name].append(time.perf_counter() - begin)
    return {
        name: Timing(median(seconds[name]), compile_seconds[name], temporary_bytes(compiled[name]))
        for name in functions
    }


def temporary_bytes(compiled: Any) -> int | None:
    """What XLA's plan of a compiled program allocates beside arguments and results."""
    analysis = compiled.memory_analysis()
    return None if analysis is None else int(analysis.temp_size_in_bytes)


def sent_bytes(compiled: Any) -> float:
    """What a device sends to others in one run of a program without loops around exchanges, on a ring."""
    return sum(_sent(line) for line in compiled.as_text().splitlines() if " = " in line)


_EXCHANGE = re.compile(
    r" = (?P<arrays>.*?) (?P<kind>all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)(-start)?\("
)
_ARRAY = re.compile(r"\b(pred|[a-z]+?)(\d*)\[([\d,]*)\]")
# Devices that exchange: the named axes of a mesh, or lists, or the lists that a shape gives.
_AXES = re.compile(r"replica_groups=mesh\[(.*?)\](?:, device_ids=\(.*?\))? \{(.*?)\}")
_LISTS = re.compile(r"replica_groups=(?:\{\{([\d,]+)\}|\[\d+,(\d+)\])")


def _sent(line: str) -> float:
    found = _EXCHANGE.search(line)
    if found is None:
        return 0.0
    size = sum(
        (1 if kind == "pred" else int(bits) / 8) * prod(int(side) for side in shape.split(",") if side)
        for kind, bits, shape in _ARRAY.findall(found["arrays"])
    )
    parts = _parts(line)
    share = {
        "all-gather": (parts - 1) / parts,
        "all-reduce": 2 * (parts - 1) / parts,
        "reduce-scatter": parts - 1,  # of what is left of the array
        "all-to-all": (parts - 1) / parts,
        "collective-permute": 1,
    }
    return size * share[found["kind"]]


def _parts(line: str) -> int:
    """Devices of a group that exchanges; an axis may be taken in part, as in 'axis':(2)4."""
    mesh, lists = _AXES.search(line), _LISTS.search(line)
    if mesh is not None:
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", mesh[1]))
        return prod(int(part or sizes[name]) for name, part in re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", mesh[2]))
    if lists is not None:
        return len(lists[1].split(",")) if lists[1] else int(lists[2])
    return 1
