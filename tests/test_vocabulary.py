"""The id space: ranges do not overlap, and only the vocabulary knows where they start."""

import jax.numpy as jnp
import numpy as np
import pytest

from trimask.tokenizers.vocabulary import Vocabulary

VOCABULARY = Vocabulary(text_size=7, codebook_sizes={"image": (5,), "audio": (3, 4)})


def test_ranges_cover_all_ids_without_overlap():
    assert [r.start for r in VOCABULARY.ranges] == [0, *(r.stop for r in VOCABULARY.ranges[:-1])]
    assert [r.stop - r.start for r in VOCABULARY.ranges[1:]] == [8, 5, 3, 4]  # text has EOS too
    assert VOCABULARY.size == VOCABULARY.ranges[-1].stop == len(VOCABULARY.special_tokens) + 20
    assert len(set(VOCABULARY.special_tokens)) == len(VOCABULARY.special_tokens)


def test_codes_round_trip_through_ids_and_minus_one_is_the_mask():
    codes = {
        "text": np.array([0, 6, -1, 7]),
        "image": np.array([[4, -1], [0, 2]]),
        "audio": np.array([[2, 3], [-1, 0]]),
    }
    for modality, grid in codes.items():
        ids = VOCABULARY.to_ids(modality, grid)
        np.testing.assert_array_equal(ids == VOCABULARY.mask_id, grid == -1)
        np.testing.assert_array_equal(VOCABULARY.to_codes(modality, ids), grid)
        known = ids[grid >= 0]
        ranges = [r for r in VOCABULARY.ranges if r.modality == modality]
        assert ranges[0].start <= known.min() and known.max() < ranges[-1].stop


def test_eos_is_the_last_code_of_text():
    assert VOCABULARY.to_ids("text", np.array([VOCABULARY.eos_code]))[0] == VOCABULARY.eos_id


def test_a_position_may_take_exactly_the_ids_of_its_modality_and_codebook():
    modality = jnp.array([VOCABULARY.number_of(m) for m in ("text", "image", "image", "audio", "audio", "audio")])
    coordinates = jnp.array([[9, 0], [0, 0], [3, 3], [5, 0], [0, 1], [5, 1]])
    allowed = np.asarray(VOCABULARY.allowed_ids(modality, coordinates))
    for row, number in zip(allowed, [1, 2, 2, 3, 4, 4], strict=True):
        expected = VOCABULARY.ranges[number]
        np.testing.assert_array_equal(np.flatnonzero(row), np.arange(expected.start, expected.stop))
    assert not allowed[:, VOCABULARY.mask_id].any() and not allowed[:, VOCABULARY.padding_id].any()


def test_every_medium_brings_both_directions():
    assert list(VOCABULARY.tasks) == ["text", "text_to_image", "image_to_text", "text_to_audio", "audio_to_text"]
    assert VOCABULARY.tasks["audio_to_text"].modalities == ("audio", "text")


def test_the_fingerprint_changes_with_any_size():
    same = Vocabulary(text_size=7, codebook_sizes={"image": (5,), "audio": (3, 4)})
    others = [
        Vocabulary(text_size=8, codebook_sizes={"image": (5,), "audio": (3, 4)}),
        Vocabulary(text_size=7, codebook_sizes={"image": (5,), "audio": (4, 3)}),
        Vocabulary(text_size=7, codebook_sizes={"audio": (3, 4), "image": (5,)}),
    ]
    assert same.fingerprint == VOCABULARY.fingerprint
    assert len({VOCABULARY.fingerprint, *(v.fingerprint for v in others)}) == 4


@pytest.mark.parametrize(
    ("modality", "codes", "message"),
    [("image", [5], r"\[-1, 5\)"), ("audio", [[0, 0], [3, 0]], r"\[-1"), ("text", [-2], "-2")],
)
def test_codes_outside_their_codebook_are_refused(modality, codes, message):
    with pytest.raises(ValueError, match=message):
        VOCABULARY.to_ids(modality, np.array(codes))


def test_an_unknown_modality_is_refused_by_name():
    with pytest.raises(ValueError, match=r"'video'.*special, text, image, audio"):
        VOCABULARY.number_of("video")
