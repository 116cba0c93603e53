"""Settings of all tests: shapes are checked, and programs are compiled once.

jaxtyping's hook (`--jaxtyping-packages` in pyproject.toml) lets beartype check every annotation at every
call; it costs nothing that can be measured. It leaves out the commands themselves, whose required
arguments tyro fills with a marker first. Tests run on one device, as a newcomer's machine does; a test that
needs several starts a process of its own with XLA_FLAGS=--xla_force_host_platform_device_count=8.
"""

import gc
from pathlib import Path

import compiling
import pytest

pytest_plugins = ["cpu_budget"]


def pytest_configure(config):
    """Sets JAX to compile with little optimisation (`compiling.py`), in a quarter of the time; collects garbage rarely.

    Tracing makes many objects that are never freed. Python's default, a search for garbage after every 700 new objects,
    takes an eighth of the remaining time. The process that only distributes tests over others does not import the
    shared fixtures, because the others would have to wait for it.
    """
    gc.freeze()
    gc.set_threshold(10_000, 10, 10)
    if not hasattr(config, "workerinput"):
        compiling.settle(config.add_cleanup)
    if config.getoption("dist", "no") == "no":
        config.pluginmanager.import_plugin("synthetic")


@pytest.fixture(scope="module", autouse=True)
def room_for_programs():
    """Clears JAX's caches after many programs: each takes memory maps, of which a process has at most 65,530."""
    yield
    import jax  # only after `compiling.settle`

    maps = Path("/proc/self/maps")
    if maps.exists() and len(maps.read_bytes().splitlines()) > 40_000:
        jax.clear_caches()
