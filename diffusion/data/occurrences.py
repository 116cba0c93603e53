"""Where digests occur, in ten bytes per occurrence: ids of files by their lists, ids and contents by their splits."""

from array import array
from collections.abc import Iterable
from itertools import combinations

import numpy as np


class Occurrences:
    """Digests, each with the name of a location at which it occurs: a list of files, or a split."""

    def __init__(self):
        self._digests = array("Q")
        self._location_numbers = array("H")
        self._numbers: dict[str, int] = {}

    def add(self, digest: str, location: str) -> None:
        """Records that a digest of 16 hexadecimal digits occurs at a location."""
        self._digests.append(int(digest, 16))
        self._location_numbers.append(self._numbers.setdefault(location, len(self._numbers)))

    def at_several_locations(self) -> dict[str, list[str]]:
        """Digest → its locations, for every digest that occurs at more than one."""
        digests, numbers = self._sorted()
        is_same = digests[1:] == digests[:-1]
        several = np.unique(digests[1:][is_same & (numbers[1:] != numbers[:-1])])
        names, locations = list(self._numbers), dict[str, list[str]]()
        for digest in several:
            begin, end = np.searchsorted(digests, digest, "left"), np.searchsorted(digests, digest, "right")
            locations[f"{int(digest):016x}"] = [names[number] for number in np.unique(numbers[begin:end])]
        return locations

    def shared_counts(self, locations: Iterable[str]) -> dict[tuple[str, str], int]:
        """(earlier, later) location → number of occurrences at the later whose digest also occurs at the earlier.

        Pairs without such an occurrence are absent.
        """
        digests, numbers = self._sorted()
        at = {name: digests[numbers == self._numbers[name]] for name in locations if name in self._numbers}
        counts = {(a, b): int(np.isin(at[b], at[a]).sum()) for a, b in combinations(at, 2)}
        return {pair: count for pair, count in counts.items() if count}

    def is_unseen(self, digests: Iterable[str]) -> np.ndarray:
        """Boolean array with an entry per digest: True if it occurs nowhere."""
        wanted = np.fromiter((int(digest, 16) for digest in digests), np.uint64)
        return ~np.isin(wanted, np.frombuffer(self._digests, np.uint64))

    def _sorted(self) -> tuple[np.ndarray, np.ndarray]:
        """Digests and location numbers of all occurrences, sorted by digest, then by location."""
        digests, numbers = np.frombuffer(self._digests, np.uint64), np.frombuffer(self._location_numbers, np.uint16)
        order = np.lexsort((numbers, digests))
        return digests[order], numbers[order]
