"""Whether work fits the memory and the clock of this machine: asked in closed form, before anything is written.

What is refused here cannot be meant, or would end as the system decides. Estimates of memory are those of `cost.py`;
times are those of processors faster than any there is, so that only what takes too long everywhere is refused.
"""

import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trimask.tokenizers.storage.ranges import Checked, Positive

_FASTEST = {"cpu": 1e14, "gpu": 5e15, "tpu": 5e15}
"""Floating-point operations per second that no host, or no accelerator, reaches."""
_BYTES_OF_WORKER = 250e6
"""Memory of a process that prepares or tokenises, once it has imported what it needs."""
_CONTROL_GROUPS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


@dataclass(frozen=True, kw_only=True)
class WorkLimits(Checked):
    """How much work may need by an estimate, before it begins."""

    memory_gb: Positive | None = None
    """Memory of each device, and of the host, in 10⁹ bytes. None: all there is."""
    days: Positive = 365.0
    """Days on processors faster than any there is."""

    def require_memory(self, needed: float | int, what: str, devices: Sequence[Any] = ()) -> None:
        """Refuses what needs more bytes than there are: on each of these devices or, without any, on the host."""
        if devices and devices[0].platform != "cpu":
            there = (devices[0].memory_stats() or {}).get("bytes_limit")
        else:
            there = memory_of_host()
            needed *= max(1, len(devices))  # which all lie in the memory of the host
        allowed = there if self.memory_gb is None else self.memory_gb * 1e9
        if allowed is not None and needed > allowed:
            whose = "this machine has" if self.memory_gb is None else "limits.memory-gb allows"
            raise ValueError(
                f"{what} takes about {_shown(needed / 1e9)} GB of memory, and {whose} {_shown(allowed / 1e9)}; make it "
                "smaller, or allow more with limits.memory-gb"
            )

    def require_time(self, flops: float | int, what: str, devices: Sequence[Any]) -> None:
        """Refuses so many floating-point operations if all devices of all processes take too long."""
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
    """Bytes of memory that this machine, or its control group, has; None where the system does not say."""
    found = []
    with suppress(AttributeError, OSError, ValueError):
        found.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    for name in _CONTROL_GROUPS:
        try:
            text = Path(name).read_text(encoding="ascii").strip()
        except OSError:
            continue
        found += [int(text)] if text.isdecimal() else []
    return min(found, default=None)


def require_room_for_workers(number: int, what: str) -> None:
    """Refuses so many processes beside this one that do not fit the host's memory."""
    there, needed = memory_of_host(), number * _BYTES_OF_WORKER
    if there is not None and needed > there:
        raise ValueError(
            f"{what} {number} takes about {_shown(needed / 1e9)} GB of memory, and this machine has "
            f"{_shown(there / 1e9)}; at most {int(there / _BYTES_OF_WORKER)} fit"
        )
