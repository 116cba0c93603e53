"""Digests that occur at several locations."""

from collections import defaultdict

from hypothesis import given
from hypothesis import strategies as st

from trimask.diffusion.data.occurrences import Occurrences

LOCATIONS = ("train", "validation", "test")
OCCURRENCES = st.lists(st.tuples(st.integers(0, 9), st.sampled_from(LOCATIONS)), max_size=40)


@given(OCCURRENCES)
def test_occurrences_agree_with_a_dictionary(pairs):
    occurrences, locations_of = Occurrences(), defaultdict(list)
    for number, location in pairs:
        occurrences.add(f"{number:016x}", location)
        locations_of[f"{number:016x}"].append(location)
    several = {digest: set(locations) for digest, locations in locations_of.items() if len(set(locations)) > 1}
    found = occurrences.at_several_locations()
    assert {digest: set(locations) for digest, locations in found.items()} == several
    shared = occurrences.shared_counts(LOCATIONS)
    for number, earlier in enumerate(LOCATIONS):
        for later in LOCATIONS[number + 1 :]:
            count = sum(locations.count(later) for locations in locations_of.values() if earlier in locations)
            assert shared.get((earlier, later), 0) == count
    digests = [f"{number:016x}" for number in range(12)]
    assert occurrences.is_unseen(digests).tolist() == [digest not in locations_of for digest in digests]
