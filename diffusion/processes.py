"""Several processes that train one model: how they find each other, agree, and let the first of them speak.

A process joins before JAX is asked for its devices. The others are found

    by JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID, if these are set
    by JAX itself under SLURM (srun), Open MPI, and on TPU VMs

and without any of these the process is the only one. All processes take the same steps in the same order; the first
alone writes, but for checkpoints, of which each writes its part.
"""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils

_GIVEN = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
_HEARTBEAT_S, _SHUTDOWN_S = 60, 30


def join() -> None:
    """Finds the other processes of this run, if there are any; nothing may have asked JAX for a device before.

    Raises ValueError where the environment names some of them and does not say enough.
    """
    if jax.distributed.is_initialized():
        return
    given = {name: os.environ.get(name, "") for name in _GIVEN}
    missing = [name for name, value in given.items() if not value]
    if len(missing) == len(_GIVEN):
        if _is_one_of_several():
            jax.distributed.initialize(heartbeat_timeout_seconds=_HEARTBEAT_S, shutdown_timeout_seconds=_SHUTDOWN_S)
        return
    address, *numbers = given.values()
    if missing or not all(number.isdecimal() for number in numbers) or int(numbers[1]) >= int(numbers[0]):
        said = " ".join(f"{name}={value!r}" for name, value in given.items())
        raise ValueError(f"host:port, number of processes and number of this one, from 0, are all needed; got {said}")
    jax.distributed.initialize(
        address,
        int(numbers[0]),
        int(numbers[1]),
        cluster_detection_method="deactivate",
        heartbeat_timeout_seconds=_HEARTBEAT_S,
        shutdown_timeout_seconds=_SHUTDOWN_S,
    )


def _is_one_of_several() -> bool:
    """Whether a launcher that JAX knows started this process beside others, or may have."""
    counts = (os.environ.get("SLURM_STEP_NUM_TASKS", "1"), os.environ.get("OMPI_COMM_WORLD_SIZE", "1"))
    is_tpu_vm = Path("/dev/accel0").exists() or Path("/dev/vfio").exists()
    return max(map(int, counts)) > 1 or (is_tpu_vm and find_spec("libtpu") is not None)


def _are_several() -> bool:
    return jax.distributed.is_initialized() and jax.process_count() > 1


def is_first() -> bool:
    """Whether this process is the one that writes and speaks."""
    return not jax.distributed.is_initialized() or jax.process_index() == 0


def any_process(flag: bool) -> bool:
    """Whether it is true in any of them; all must ask."""
    return bool(multihost_utils.process_allgather(np.array(flag)).any()) if _are_several() else flag


def summed(values: np.ndarray) -> np.ndarray:
    """Unsigned integers, summed over the processes modulo their range; all must ask."""
    if not _are_several():
        return values
    everyone = multihost_utils.process_allgather(values.view(np.uint32))  # JAX has no 64 bits by default
    return everyone.view(values.dtype).sum(axis=0, dtype=values.dtype)


def wait_for_all(reason: str) -> None:
    """Until every process is here."""
    if _are_several():
        multihost_utils.sync_global_devices(reason)


@contextmanager
def losing_none() -> Iterator[None]:
    """Ends this process, with a line that says so, as soon as another one of the run turns out to be gone.

    At once: Python's own end would wait for the other one to say good-bye. The kernel frees what it held.
    """
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if not _are_several() or "RESOURCE_EXHAUSTED" in str(error):
            raise
        line = str(error).partition("\n")[0]
        print(
            f"process {jax.process_index()} of {jax.process_count()}: another process is gone, or does not answer "
            f"({line}); the same command on all of them resumes from the newest checkpoint",
            file=sys.stderr,
            flush=True,
        )
        os._exit(1)
