"""What was seen in several places."""

from collections import defaultdict

from hypothesis import given
from hypothesis import strategies as st

from trimask.diffusion.data.occurrences import Occurrences

WORDS = ("train", "validation", "test")
SIGHTINGS = st.lists(st.tuples(st.integers(0, 9), st.sampled_from(WORDS)), max_size=40)


@given(SIGHTINGS)
def test_it_remembers_as_a_dictionary_would(sightings):
    seen, places = Occurrences(), defaultdict(list)
    for number, word in sightings:
        seen.add(f"{number:016x}", word)
        places[f"{number:016x}"].append(word)
    several = {digest: set(words) for digest, words in places.items() if len(set(words)) > 1}
    assert {digest: set(words) for digest, words in seen.at_several_locations().items()} == several
    shared = seen.shared_counts(WORDS)
    for number, early in enumerate(WORDS):
        for late in WORDS[number + 1 :]:
            count = sum(words.count(late) for words in places.values() if early in words)
            assert shared.get((early, late), 0) == count
    asked = [f"{number:016x}" for number in range(12)]
    assert seen.is_unseen(asked).tolist() == [digest not in places for digest in asked]
