"""How programs are compiled where that is most of the time: with little optimisation, once for all processes."""

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from typing import Any

CACHE = "JAX_COMPILATION_CACHE_DIR"
_QUICK = "--xla_cpu_use_fusion_emitters=false"
"""Loops by LLVM alone, without a pass through MLIR: half of the time to compile."""


def settle(at_end: Callable[[Callable[[], Any]], Any]) -> None:
    """Sets what JAX takes from the environment, so nothing may have imported it before; commands inherit it.

    Programs stay for the next run if JAX_COMPILATION_CACHE_DIR names a folder; else they are kept in one that goes
    with what `at_end` is given.
    """
    os.environ["XLA_FLAGS"] = _understood(f"{os.environ.get('XLA_FLAGS', '')} {_QUICK}".strip())
    if CACHE not in os.environ:
        os.environ[CACHE] = tempfile.mkdtemp(prefix="trimask-tests-compiled-")
        at_end(partial(shutil.rmtree, os.environ[CACHE], ignore_errors=True))
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"
    os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"


def _understood(flags: str) -> str:
    """The flags, if this XLA knows them all: one that it does not know ends the process."""
    command = [sys.executable, "-c", "import jax; jax.devices()"]
    known = subprocess.run(command, env={**os.environ, "XLA_FLAGS": flags}, capture_output=True, check=False)
    return flags if known.returncode == 0 else os.environ.get("XLA_FLAGS", "")
