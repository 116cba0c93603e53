"""Several processes that train one model: how they find each other, agree, and let the first of them speak.

A process joins before JAX is asked for its devices. The others are found

    by JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID, if these are set
    by JAX itself under SLURM (srun), Open MPI, and on TPU VMs

and without any of these the process is the only one. All processes take the same steps in the same order; the first
alone writes, but for checkpoints, of which each writes its part.
"""

import os
import re
import socket
import sys
import traceback
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils

_GIVEN = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
_HEARTBEAT_S, _SHUTDOWN_S = 60, 30
# In what JAX raises, as one kind of error or another, where an exchange with another process fails.
_LOST = re.compile(
    "Gloo|NCCL|UNAVAILABLE|DEADLINE_EXCEEDED|heartbeat|[Cc]oordination service|Connection (reset|closed)"
)


def join() -> None:
    """Finds the other processes of this run, if there are any; nothing may have asked JAX for a device before.

    Raises ValueError where the environment names some of them and does not say enough, or a port that is taken.
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
    port = address.rpartition(":")[2]
    numeric = all(number.isdecimal() for number in (*numbers, port)) and 0 < int(port) < 1 << 16
    if missing or not numeric or ":" not in address or int(numbers[1]) >= int(numbers[0]):
        said = " ".join(f"{name}={value!r}" for name, value in given.items())
        raise ValueError(f"host:port, number of processes and number of this one, from 0, are all needed; got {said}")
    if int(numbers[1]) == 0:
        _require_free(int(port))
    print(f"process {numbers[1]} of {numbers[0]} waits for the others at {address}", file=sys.stderr, flush=True)
    jax.distributed.initialize(
        address,
        int(numbers[0]),
        int(numbers[1]),
        cluster_detection_method="deactivate",
        heartbeat_timeout_seconds=_HEARTBEAT_S,
        shutdown_timeout_seconds=_SHUTDOWN_S,
    )


def _require_free(port: int) -> None:
    """Refuses a port of this host at which the others could not find the first process."""
    both = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if both else socket.AF_INET
    try:
        socket.create_server(("", port), family=family, dualstack_ipv6=both).close()
    except OSError as error:
        raise ValueError(f"process 0 cannot listen at port {port} of JAX_COORDINATOR_ADDRESS: {error}") from error


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


def require_agreement(seen: Mapping[str, str]) -> None:
    """Refuses to go on where what this process sees, by its name, is not what the first one sees; all must ask."""
    if not _are_several():
        return
    ours = np.array([zlib.crc32(value.encode()) for value in seen.values()], np.uint32)
    everyone = multihost_utils.process_allgather(ours)
    differing = [name for name, same in zip(seen, (everyone == everyone[0]).all(axis=0), strict=True) if not same]
    if differing:
        here = "; ".join(f"{name}: {seen[name]}" for name in differing)
        raise ValueError(f"all processes must be given the same, and share their folders; this one has {here}")


@contextmanager
def ending_together() -> Iterator[None]:
    """Where one of several processes fails, it says why and ends at once, and the others when they miss it.

    At once: Python's own end would wait for the others to say good-bye, and they for an exchange with this one. The
    kernel frees what it held.
    """
    try:
        yield
    except Exception as error:
        if not _are_several():
            raise
        _end(error)


def _end(error: Exception) -> None:
    """Ends the process: status 2 for what was refused, 1 for a lost peer, or for a bug, which shows its traceback."""
    line = str(error).partition("\n")[0]
    is_lost = _LOST.search(line) is not None
    is_refused = isinstance(error, ValueError | OSError) and not is_lost
    if is_lost:
        line = (
            f"another process is gone, or does not answer ({line}); it may have said why, and the same command on all "
            "of them resumes from the newest checkpoint"
        )
    elif is_refused:
        line = f"error: {error}"
    if not (is_lost or is_refused) or os.environ.get("TRIMASK_DEBUG", "0") != "0":
        traceback.print_exc()
    print(f"process {jax.process_index()} of {jax.process_count()}: {line}", file=sys.stderr, flush=True)
    os._exit(2 if is_refused else 1)
