"""Compilation in tests: with little optimisation, because it takes longer than running, and once for all processes."""

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
"""XLA flag that generates loops by LLVM without MLIR, which halves the time of compiling."""


def settle(at_end: Callable[[Callable[[], Any]], Any]) -> None:
    """Sets JAX's environment variables, which commands inherit; must be called before JAX is imported.

    Compiled programs are kept in the folder that JAX_COMPILATION_CACHE_DIR names; without it, in a temporary folder,
    whose removal is passed to `at_end`.
    """
    os.environ["XLA_FLAGS"] = _understood(f"{os.environ.get('XLA_FLAGS', '')} {_QUICK}".strip())
    if CACHE not in os.environ:
        os.environ[CACHE] = tempfile.mkdtemp(prefix="trimask-tests-compiled-")
        at_end(partial(shutil.rmtree, os.environ[CACHE], ignore_errors=True))
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"
    os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"


def _understood(flags: str) -> str:
    """The flags if this XLA knows all of them, else the present ones: an unknown flag ends the process."""
    command = [sys.executable, "-c", "import jax; jax.devices()"]
    known = subprocess.run(command, env={**os.environ, "XLA_FLAGS": flags}, capture_output=True, check=False)
    return flags if known.returncode == 0 else os.environ.get("XLA_FLAGS", "")
