"""Estimates whether work fits this machine's memory and a time limit, before anything is written.

Only what cannot be intended is refused. Memory estimates are those of `cost.py`; times assume processors faster than
any that exist, so only work that would take too long everywhere is refused.
"""

import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trimask.tokenizers.storage.ranges import Checked, Positive

_FASTEST = {"cpu": 1e14, "gpu": 5e15, "tpu": 5e15}
"""Upper bound on floating-point operations per second: of a CPU host, or of one accelerator."""
_BYTES_OF_WORKER = 250e6
"""Memory of a worker process that prepares or tokenises data, after its imports, in bytes."""
_CONTROL_GROUPS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


@dataclass(frozen=True, kw_only=True)
class WorkLimits(Checked):
    """Estimated memory and time above which work is refused before it begins."""

    memory_gb: Positive | None = None
    """Memory of each device, and of the host, in 10⁹ bytes. None: all that exists."""
    days: Positive = 365.0
    """Longest training time in days, estimated for processors faster than any that exist."""

    def require_memory(self, needed: float | int, what: str, devices: Sequence[Any] = ()) -> None:
        """Raises ValueError if the work needs more bytes than allowed: on each device or, without devices, on the host.

        `what` names the work in the error.
        """
        if devices and devices[0].platform != "cpu":
            available = (devices[0].memory_stats() or {}).get("bytes_limit")
        else:
            available = memory_of_host()
            needed *= max(1, len(devices))  # CPU devices share the host's memory
        allowed = available if self.memory_gb is None else self.memory_gb * 1e9
        if allowed is not None and needed > allowed:
            whose = "this machine has" if self.memory_gb is None else "limits.memory-gb allows"
            raise ValueError(
                f"{what} takes about {_shown(needed / 1e9)} GB of memory, and {whose} {_shown(allowed / 1e9)}; make it "
                "smaller, or allow more with limits.memory-gb"
            )

    def require_time(self, flops: float | int, what: str, devices: Sequence[Any]) -> None:
        """Raises ValueError if this many floating-point operations would take all devices longer than `days`.

        `what` names the work in the error.
        """
        fastest = _FASTEST.get(devices[0].platform, max(_FASTEST.values()))
        count = len(devices) if devices[0].platform != "cpu" else len({device.process_index for device in devices})
        days = flops / (fastest * count) / 86_400
        if days > self.days:
            raise ValueError(
                f"{what} takes {_shown(days)} days at least, even at {fastest * count:.3g} operations per second; "
                f"limits.days allows {_shown(self.days)}"
            )


def _shown(number: float) -> str:
    return f"{number:,.0f}" if number >= 100 else f"{number:.3g}"


def memory_of_host() -> int | None:
    """Memory of this machine or of its control group, whichever is less, in bytes; None if unknown."""
    limits = []
    with suppress(AttributeError, OSError, ValueError):
        limits.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    for name in _CONTROL_GROUPS:
        try:
            text = Path(name).read_text(encoding="ascii").strip()
        except OSError:
            continue
        limits += [int(text)] if text.isdecimal() else []
    return min(limits, default=None)


def require_room_for_workers(number: int, what: str) -> None:
    """Raises ValueError if the host has too little memory for this number of worker processes."""
    available, needed = memory_of_host(), number * _BYTES_OF_WORKER
    if available is not None and needed > available:
        raise ValueError(
            f"{what} {number} takes about {_shown(needed / 1e9)} GB of memory, and this machine has "
            f"{_shown(available / 1e9)}; at most {int(available / _BYTES_OF_WORKER)} fit"
        )
