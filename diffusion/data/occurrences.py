"""What was seen where, in ten bytes each: ids by their lists, ids and contents by their splits."""

from array import array
from collections.abc import Iterable
from itertools import combinations

import numpy as np


class Occurrences:
    """Digests, each with the word that says where it was seen."""

    def __init__(self):
        self._digests = array("Q")
        self._places = array("H")
        self._words: dict[str, int] = {}

    def add(self, digest: str, word: str) -> None:
        """Notes that what has this digest (16 hexadecimal digits) was seen there."""
        self._digests.append(int(digest, 16))
        self._places.append(self._words.setdefault(word, len(self._words)))

    def in_several(self) -> dict[str, list[str]]:
        """Digest → the words, of all that were seen in several places."""
        digests, places = self._sorted()
        is_same = digests[1:] == digests[:-1]
        several = np.unique(digests[1:][is_same & (places[1:] != places[:-1])])
        words, found = list(self._words), dict[str, list[str]]()
        for digest in several:
            begin, end = np.searchsorted(digests, digest, "left"), np.searchsorted(digests, digest, "right")
            found[f"{int(digest):016x}"] = [words[place] for place in np.unique(places[begin:end])]
        return found

    def shared(self, words: Iterable[str]) -> dict[tuple[str, str], int]:
        """(earlier, later) → how many seen at the later word were seen at the earlier one, too; 0 is absent."""
        digests, places = self._sorted()
        own = {word: digests[places == self._words[word]] for word in words if word in self._words}
        counts = {(a, b): int(np.isin(own[b], own[a]).sum()) for a, b in combinations(own, 2)}
        return {pair: count for pair, count in counts.items() if count}

    def missing(self, digests: Iterable[str]) -> np.ndarray:
        """True for each digest that was not seen."""
        asked = np.fromiter((int(digest, 16) for digest in digests), np.uint64)
        return ~np.isin(asked, np.frombuffer(self._digests, np.uint64))

    def _sorted(self) -> tuple[np.ndarray, np.ndarray]:
        digests, places = np.frombuffer(self._digests, np.uint64), np.frombuffer(self._places, np.uint16)
        order = np.lexsort((places, digests))
        return digests[order], places[order]
