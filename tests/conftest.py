"""What holds for every test: shapes are checked, and programs are compiled once.

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
    """Compiling is most of the tests' time: in a quarter of it with little optimisation (`compiling.py`).

    Tracing makes so many objects that are there to stay that to look for garbage after each 700 of them, as Python
    does, takes an eighth of what is left. A process that only hands tests to others does without the fixtures, whose
    imports these would wait for.
    """
    gc.freeze()
    gc.set_threshold(10_000, 10, 10)
    if not hasattr(config, "workerinput"):
        compiling.settle(config.add_cleanup)
    if config.getoption("dist", "no") == "no":
        config.pluginmanager.import_plugin("synthetic")


@pytest.fixture(scope="module", autouse=True)
def room_for_programs():
    """Lets go of what was compiled when it is much: a process may map 65,530 pieces of memory, and programs do."""
    yield
    import jax  # not before it is settled what it compiles how

    maps = Path("/proc/self/maps")
    if maps.exists() and len(maps.read_bytes().splitlines()) > 25_000:
        jax.clear_caches()
