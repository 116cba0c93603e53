"""Reconstruction quality and codebook use."""

import numpy as np
import pytest

from trimask.tokenizers.quality import codebook_use, log_mel_distance_db, psnr_db


def test_psnr_is_the_formula_picture_by_picture():
    originals = np.full((3, 2, 5, 1), 100, np.uint8)
    reconstructions = originals.copy()
    reconstructions[0] += 10
    reconstructions[1, 0, 0, 0] -= 50
    expected = [10 * np.log10(255**2 / 100), 10 * np.log10(255**2 / (2500 / 10)), np.inf]
    np.testing.assert_allclose(psnr_db(originals, reconstructions), expected)


@pytest.mark.parametrize("gain_db", [-20.0, -6.0])
def test_a_change_of_loudness_is_that_many_db(gain_db):
    noise = np.random.default_rng(0).uniform(-1, 1, (2, 4000)).astype(np.float32)
    quieter = (noise * 10 ** (gain_db / 20)).astype(np.float32)
    np.testing.assert_allclose(log_mel_distance_db(noise, quieter, 8000), -gain_db, rtol=1e-3)
    np.testing.assert_array_equal(log_mel_distance_db(noise, noise, 8000), 0)


def test_what_is_quieter_than_the_floor_is_silence():
    whisper = np.random.default_rng(0).uniform(-1e-5, 1e-5, (2, 4000)).astype(np.float32)
    np.testing.assert_array_equal(log_mel_distance_db(whisper, np.zeros_like(whisper), 8000), 0)


def test_lowering_the_floor_by_20_db_takes_silence_that_much_further_from_sound():
    noise = np.random.default_rng(0).uniform(-1, 1, (2, 4000)).astype(np.float32)
    distances = [log_mel_distance_db(noise, np.zeros_like(noise), 8000, floor) for floor in (-40.0, -60.0)]
    # Not quite 20: it is a root mean square over bands that differ by some dB.
    np.testing.assert_allclose(distances[1] - distances[0], 20, atol=1)


def test_codebook_use_counts_codewords_and_their_perplexity():
    use = codebook_use(np.array([[0, 0, 1], [1, 4, 4]]), size=8)
    assert (use.size, use.used, use.share) == (8, 3, 3 / 8)
    assert use.perplexity == pytest.approx(3)
    skewed = codebook_use(np.array([2, 2, 2, 0]), size=3)
    assert skewed.perplexity == pytest.approx(0.75**-0.75 * 0.25**-0.25)
