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
import threading
import traceback
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import jax
import numpy as np
from jax._src import clusters
from jax.experimental import multihost_utils

from trimask.diffusion.run.links import SILENCE_S, Links

_GIVEN = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
# JAX ends its processes less kindly than links do, which are to be first to miss one.
_HEARTBEAT_S, _SHUTDOWN_S, _START_S = 3 * int(SILENCE_S), 30, 300
_FLUSH_S = 2.0
# In what JAX raises, as one kind of error or another, where an exchange with another process fails.
_LOST = re.compile(
    "Gloo|NCCL|UNAVAILABLE|DEADLINE_EXCEEDED|heartbeat|[Cc]oordination service|Connection (reset|closed)"
)
_links: Links | None = None
"""Of a process that is one of several."""
_speaks = threading.Lock()
"""Held by the thread that ends the process, so that one line says why."""


def join() -> None:
    """Finds the other processes of this run, if there are any; nothing may have asked JAX for a device before.

    Raises ValueError where the environment names some of them and does not say enough, or a port that is taken, and
    where the first process cannot be reached.
    """
    global _links
    if jax.distributed.is_initialized():
        return
    given = {name: os.environ.get(name, "") for name in _GIVEN}
    missing = [name for name, value in given.items() if not value]
    if len(missing) == len(_GIVEN):
        if not _is_one_of_several():
            return
        address, count, number, devices = _detected()
        if address is None or count is None or number is None:
            raise ValueError("a launcher started this process, but does not say which of how many it is, and where")
    else:
        address, *numbers = given.values()
        port = address.rpartition(":")[2]
        numeric = all(text.isdecimal() for text in (*numbers, port)) and 0 < int(port) < 1 << 16
        if missing or not numeric or ":" not in address or int(numbers[1]) >= int(numbers[0]):
            said = " ".join(f"{name}={value!r}" for name, value in given.items())
            raise ValueError(
                f"host:port, number of processes and number of this one, from 0, are all needed; got {said}"
            )
        (count, number), devices = map(int, numbers), None
        print(f"process {number} of {count} waits for the others at {address}", file=sys.stderr, flush=True)
    if count == 1:
        return
    _links = Links(count, number, _end_without)
    ours, service = _linked(_links, address)
    jax.distributed.initialize(
        ours,
        count,
        number,
        devices,
        cluster_detection_method="deactivate",
        coordinator_bind_address=service,
        initialization_timeout=_START_S,
        heartbeat_timeout_seconds=_HEARTBEAT_S,
        shutdown_timeout_seconds=_SHUTDOWN_S,
    )


def _detected() -> tuple[str | None, int | None, int | None, Sequence[int] | None]:
    """Address, number of processes, number of this one, and its devices, as JAX finds them under a launcher it knows.

    JAX has no public name for this; 0.10 to 0.12 have this one.
    """
    return clusters.ClusterEnv.auto_detect_unset_distributed_params(None, None, None, None, None, _START_S)


def _linked(links: Links, address: str) -> tuple[str, str | None]:
    """Where JAX's client finds its service once this process has its links; by process 0, where the service binds."""
    host, _, port = address.rpartition(":")
    if links.number:
        try:
            return "{}:{}".format(*links.dial((host.strip("[]"), int(port)), float(_START_S))), None
        except OSError as error:
            raise ValueError(f"process {links.number} cannot reach process 0 at {address}: {error}") from error
    bound = os.environ.get("JAX_COORDINATOR_BIND_ADDRESS", f":{port}").rpartition(":")
    server = _listening(bound[0].strip("[]"), int(bound[2]))
    with socket.create_server(("127.0.0.1", 0)) as free:
        service = free.getsockname()
    try:
        links.serve(server, service, float(_START_S))
    except TimeoutError as error:
        raise ValueError(f"process 0 waited at {address} in vain: {error}") from error
    bind = "{}:{}".format(*service)
    return bind, bind


def _listening(host: str, port: int) -> socket.socket:
    """A socket at which the others find the first process."""
    everywhere = host in ("", "::") and socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if everywhere or ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, dualstack_ipv6=everywhere)
    except OSError as error:
        raise ValueError(f"process 0 cannot listen at port {port} of JAX_COORDINATOR_ADDRESS: {error}") from error


def _is_one_of_several() -> bool:
    """Whether a launcher that JAX knows started this process beside others, or may have."""
    counts = (os.environ.get("SLURM_STEP_NUM_TASKS", "1"), os.environ.get("OMPI_COMM_WORLD_SIZE", "1"))
    is_tpu_vm = Path("/dev/accel0").exists() or Path("/dev/vfio").exists()
    return max(map(int, counts)) > 1 or (is_tpu_vm and find_spec("libtpu") is not None)


def _are_several() -> bool:
    return _links is not None


def is_first() -> bool:
    """Whether this process is the one that writes and speaks."""
    return _links is None or _links.number == 0


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
        if _links is None:
            raise
        _end(_links, error)


def _end(links: Links, error: Exception) -> None:
    """Ends the process: status 2 for what was refused, 1 for a lost peer, or for a bug, which shows its traceback."""
    line = str(error).partition("\n")[0]
    if _LOST.search(line):
        _end_without(line)
    _speaks.acquire()
    links.fail()
    is_refused = isinstance(error, ValueError | OSError)
    if not is_refused or os.environ.get("TRIMASK_DEBUG", "0") != "0":
        traceback.print_exc()
    _leave(f"error: {error}" if is_refused else line, 2 if is_refused else 1)


def _end_without(reason: str) -> None:
    """Ends the process as another one is gone: its links notice that, or the exchange that it was in."""
    _speaks.acquire()
    if sys.exc_info()[0] is not None and os.environ.get("TRIMASK_DEBUG", "0") != "0":
        traceback.print_exc()
    _leave(
        f"another process is gone, or does not answer ({reason}); it may have said why, and the same command on all of "
        "them resumes from the newest checkpoint",
        1,
    )


def _leave(line: str, status: int) -> None:
    assert _links is not None
    flush = threading.Thread(
        target=sys.stdout.flush, daemon=True
    )  # another thread may be writing, to who does not read
    flush.start()
    flush.join(_FLUSH_S)
    print(f"process {_links.number} of {_links.count}: {line}", file=sys.stderr, flush=True)
    os._exit(status)
