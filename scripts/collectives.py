"""Bytes that a device sends to others in a compiled program, read from the text of its XLA program.

On a ring of n devices, with B the bytes of an exchange's result on each device, every device sends

    all-gather           B (n - 1)/n
    all-reduce           B 2 (n - 1)/n
    reduce-scatter       B (n - 1)
    all-to-all           B (n - 1)/n
    collective-permute   B
"""

import re
from math import prod


def sent_bytes(program: str, num_devices: int) -> float:
    """Bytes that each of `num_devices` devices sends in one run of the program; exchanges must not be inside loops."""
    return sum(_sent(line, num_devices) for line in program.splitlines())


_EXCHANGE = re.compile(
    r" = (?P<arrays>.*?) (?P<kind>all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)"
    r"(?P<start>-start)?\((?P<operands>.*?)\)"
)
_ARRAY = re.compile(r"\b(?:pred|[a-z]+(\d+)\w*)\[([\d,]*)\]")
# Groups of devices that exchange: given by axes of a mesh, by lists, or by the shape of an array of all devices.
_AXES = re.compile(r"replica_groups=mesh\[(.*?)\](?:, device_ids=\(.*?\))? \{(.*?)\}")
_LISTS = re.compile(r"replica_groups=(?:\{\{([\d,]+)\}|\[\d+,(\d+)\])")


def _sent(line: str, num_devices: int) -> float:
    """Bytes that each device sends in one instruction; 0 if it is no exchange."""
    found = _EXCHANGE.search(line)
    if found is None:
        return 0.0
    sizes = [
        int(bits or 8) / 8 * prod(int(side) for side in shape.split(",") if side)
        for bits, shape in _ARRAY.findall(found["arrays"])
    ]
    if found["start"] and found["kind"] != "all-reduce":  # operands, results of the same number, then counters
        number = found["operands"].count(",") + 1
        sizes = sizes[number : 2 * number]
    n = _group_size(line, num_devices)
    share = {
        "all-gather": (n - 1) / n,
        "all-reduce": 2 * (n - 1) / n,
        "reduce-scatter": n - 1,
        "all-to-all": (n - 1) / n,
        "collective-permute": 1,
    }
    return sum(sizes) * share[found["kind"]]


def _group_size(line: str, num_devices: int) -> int:
    """Number of devices that exchange with each other; an axis may be used in part, as in 'axis':(2)4."""
    mesh, lists = _AXES.search(line), _LISTS.search(line)
    if mesh is not None:
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", mesh[1]))
        return prod(int(part or sizes[name]) for name, part in re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", mesh[2]))
    if lists is not None:
        return len(lists[1].split(",")) if lists[1] else int(lists[2])
    return num_devices  # replica_groups={}
