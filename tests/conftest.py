"""What holds for every test: shapes are checked, and programs are compiled once.

jaxtyping's hook (`--jaxtyping-packages` in pyproject.toml) lets beartype check every annotation at every
call; it costs nothing that can be measured. It leaves out the commands themselves, whose required
arguments tyro fills with a marker first. Tests run on one device, as a newcomer's machine does; a test that
needs several starts a process of its own with XLA_FLAGS=--xla_force_host_platform_device_count=8.
"""

import gc
import os
import shutil
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path

import pytest

pytest_plugins = ["cpu_budget"]

_COMPILED = "JAX_COMPILATION_CACHE_DIR"
_QUICK = "--xla_cpu_use_fusion_emitters=false"
"""Loops by LLVM alone, without a pass through MLIR: half of the time to compile."""


def pytest_configure(config):
    """Compiling is most of the tests' time: in a quarter of it with little optimisation, and once for all processes.

    Programs stay for the next run if JAX_COMPILATION_CACHE_DIR names a folder. JAX takes this from the environment, so
    nothing may have imported it before; the commands that tests start inherit it. Tracing makes so many objects that
    are there to stay that to look for garbage after each 700 of them, as Python does, takes an eighth of what is left.
    A process that only hands tests to others does without the fixtures, whose imports these would wait for.
    """
    gc.freeze()
    gc.set_threshold(10_000, 10, 10)
    if not hasattr(config, "workerinput"):
        os.environ["XLA_FLAGS"] = _understood(f"{os.environ.get('XLA_FLAGS', '')} {_QUICK}".strip())
        if _COMPILED not in os.environ:
            os.environ[_COMPILED] = tempfile.mkdtemp(prefix="trimask-tests-compiled-")
            config.add_cleanup(partial(shutil.rmtree, os.environ[_COMPILED], ignore_errors=True))
        os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"
        os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
    if config.getoption("dist", "no") == "no":
        config.pluginmanager.import_plugin("synthetic")


def _understood(flags: str) -> str:
    """The flags, if this XLA knows them all: one that it does not know ends the process."""
    command = [sys.executable, "-c", "import jax; jax.devices()"]
    known = subprocess.run(command, env={**os.environ, "XLA_FLAGS": flags}, capture_output=True, check=False)
    return flags if known.returncode == 0 else os.environ.get("XLA_FLAGS", "")


@pytest.fixture(scope="module", autouse=True)
def room_for_programs():
    """Lets go of what was compiled when it is much: a process may map 65,530 pieces of memory, and programs do."""
    yield
    import jax  # not before it is settled what it compiles how

    maps = Path("/proc/self/maps")
    if maps.exists() and len(maps.read_bytes().splitlines()) > 25_000:
        jax.clear_caches()
