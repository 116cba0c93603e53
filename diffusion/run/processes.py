"""Several processes that train one model: how they find each other, agree, and let only the first one write.

A process joins the run before JAX initialises its devices. The other processes are found

    through JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID, if these are set
    by JAX itself under SLURM (srun), Open MPI, and on TPU VMs

and otherwise the process is the only one. All processes take the same steps in the same order. Only the first one
writes, except for checkpoints, of which each writes its part.
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
# Longer than the links wait: these should notice a missing process first, since JAX aborts without a clear message.
_HEARTBEAT_S, _SHUTDOWN_S, _START_S = 3 * int(SILENCE_S), 30, 300
_FLUSH_S = 2.0
# Matches the errors, of several types, that JAX raises when an exchange with another process fails.
_LOST = re.compile(
    "Gloo|NCCL|UNAVAILABLE|DEADLINE_EXCEEDED|heartbeat|[Cc]oordination service|Connection (reset|closed)"
)
_links: Links | None = None
"""Links to the other processes; None if this process is the only one."""
_speaks = threading.Lock()
"""Held by the thread that ends the process, so that only one line gives the reason."""


def join() -> None:
    """Connects to the other processes of this run, if any; must be called before JAX initialises its devices.

    Raises ValueError if the environment variables are incomplete, if the port is taken, or if the first process cannot
    be reached.
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
            raise ValueError(
                "a launcher started this process but does not give its number, the number of processes and the address"
            )
    else:
        address, *numbers = given.values()
        port = address.rpartition(":")[2]
        numeric = all(text.isdecimal() for text in (*numbers, port)) and 0 < int(port) < 1 << 16
        if missing or not numeric or ":" not in address or int(numbers[1]) >= int(numbers[0]):
            said = " ".join(f"{name}={value!r}" for name, value in given.items())
            raise ValueError(
                f"host:port, number of processes and number of this one (from 0) must all be set; got {said}"
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
    """Address, number of processes, number of this one and its devices, as JAX finds them under a known launcher.

    This uses a private JAX function, which exists in 0.10 to 0.12.
    """
    return clusters.ClusterEnv.auto_detect_unset_distributed_params(None, None, None, None, None, _START_S)


def _linked(links: Links, address: str) -> tuple[str, str | None]:
    """Address at which JAX's client reaches its service, and on process 0 the address to which the service binds."""
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
        raise ValueError(f"process 0 waited at {address} without success: {error}") from error
    bind = "{}:{}".format(*service)
    return bind, bind


def _listening(host: str, port: int) -> socket.socket:
    """A server socket on which the first process accepts the others. Raises ValueError if the port is taken."""
    everywhere = host in ("", "::") and socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if everywhere or ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, dualstack_ipv6=everywhere)
    except OSError as error:
        raise ValueError(f"process 0 cannot listen at port {port} of JAX_COORDINATOR_ADDRESS: {error}") from error


def _is_one_of_several() -> bool:
    """Whether a launcher known to JAX started, or may have started, several processes."""
    counts = (os.environ.get("SLURM_STEP_NUM_TASKS", "1"), os.environ.get("OMPI_COMM_WORLD_SIZE", "1"))
    is_tpu_vm = Path("/dev/accel0").exists() or Path("/dev/vfio").exists()
    return max(map(int, counts)) > 1 or (is_tpu_vm and find_spec("libtpu") is not None)


def _are_several() -> bool:
    return _links is not None


def is_first() -> bool:
    """Whether this process is the one that writes files and prints."""
    return _links is None or _links.number == 0


def any_process(flag: bool) -> bool:
    """Whether the flag is true on any process; all processes must call this together."""
    return bool(multihost_utils.process_allgather(np.array(flag)).any()) if _are_several() else flag


def sum_over_processes(values: np.ndarray) -> np.ndarray:
    """Sum of unsigned integers over the processes, modulo their range; all processes must call this together."""
    if not _are_several():
        return values
    everyone = multihost_utils.process_allgather(values.view(np.uint32))  # JAX has no 64-bit types by default
    return everyone.view(values.dtype).sum(axis=0, dtype=values.dtype)


def wait_for_all(reason: str) -> None:
    """Waits until every process has called this."""
    if _are_several():
        multihost_utils.sync_global_devices(reason)


def require_agreement(values: Mapping[str, str]) -> None:
    """Raises ValueError unless all processes have the same named values; all processes must call this together."""
    if not _are_several():
        return
    ours = np.array([zlib.crc32(value.encode()) for value in values.values()], np.uint32)
    everyone = multihost_utils.process_allgather(ours)
    differing = [name for name, same in zip(values, (everyone == everyone[0]).all(axis=0), strict=True) if not same]
    if differing:
        here = "; ".join(f"{name}: {values[name]}" for name in differing)
        raise ValueError(
            f"all processes must get the same arguments and share their folders; this one differs in {here}"
        )


@contextmanager
def ending_together() -> Iterator[None]:
    """Ends one of several processes at once, with its reason, when the block fails; the others end when they miss it.

    It ends at once because Python's normal shutdown would wait for the others to leave, while they wait for an exchange
    with this one. The kernel releases what the process held.
    """
    try:
        yield
    except Exception as error:
        if _links is None:
            raise
        _end(_links, error)


def _end(links: Links, error: Exception) -> None:
    """Ends the process: status 2 after a refusal; status 1 after losing a peer, or after a bug, with its traceback."""
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
    """Ends the process because another one is gone, as noticed by a link or by a failed exchange."""
    _speaks.acquire()
    if sys.exc_info()[0] is not None and os.environ.get("TRIMASK_DEBUG", "0") != "0":
        traceback.print_exc()
    _leave(
        f"another process has ended or does not answer ({reason}); its own output may say why. The same command on all "
        "processes resumes from the newest checkpoint",
        1,
    )


def _leave(line: str, status: int) -> None:
    """Flushes stdout for at most `_FLUSH_S` seconds, prints one line and exits with this status."""
    assert _links is not None
    # In a thread, because it may block: another thread may be writing to a pipe that nobody reads.
    flush = threading.Thread(target=sys.stdout.flush, daemon=True)
    flush.start()
    flush.join(_FLUSH_S)
    print(f"process {_links.number} of {_links.count}: {line}", file=sys.stderr, flush=True)
    os._exit(status)
