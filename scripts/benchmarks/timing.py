"""What a compiled function takes: seconds, the median of calls in turn with others, and memory by XLA's plan."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
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
