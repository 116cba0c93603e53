"""Times compiled functions, called in turn, and reads the memory that XLA plans for them."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import median
from typing import Any

import jax


@dataclass(frozen=True)
class Timing:
    """Time and memory of one compiled function."""

    seconds: float
    """Median time of a call."""
    compile_seconds: float
    """Time of lowering and compiling."""
    temporary_bytes: int | None
    """Memory that XLA allocates beside arguments and results. None: not known."""


def timed(functions: Mapping[str, tuple[Callable[..., Any], tuple[Any, ...]]], repeats: int) -> dict[str, Timing]:
    """Compiles jitted functions for their arguments, and times `repeats` calls of each after one that is not timed.

    The functions are called in turn, so that disturbances of the machine affect all of them.
    """
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
    """Memory that a compiled program allocates beside arguments and results, by XLA's analysis. None: not known."""
    analysis = compiled.memory_analysis()
    return None if analysis is None else int(analysis.temp_size_in_bytes)
