"""Spectra in JAX are those of librosa, and their inverse gives the waveform back."""

import jax.numpy as jnp
import librosa
import numpy as np
import pytest

from trimask.tokenizers.neural.spectra import hann, log_mels, mel_filters, overlap_add, spectra, waveforms

SHAPES = [(400, 100), (320, 80), (200, 80), (64, 16)]


@pytest.fixture
def sounds():
    return np.random.default_rng(0).normal(size=(2, 1600)).astype(np.float32)


@pytest.mark.parametrize(("window", "hop"), SHAPES)
def test_spectra_are_those_of_centred_windows(sounds, window, hop):
    side = (window - hop) // 2
    padded = np.pad(sounds, ((0, 0), (side, window - hop - side)))
    expected = librosa.stft(padded, n_fft=window, hop_length=hop, center=False, window="hann").swapaxes(1, 2)
    found = spectra(jnp.asarray(sounds), window, hop)
    assert found.shape == (2, 1600 // hop, window // 2 + 1)
    np.testing.assert_allclose(found, expected, atol=2e-4)


@pytest.mark.parametrize(("window", "hop"), SHAPES)
def test_the_inverse_gives_the_waveform_back(sounds, window, hop):
    found = waveforms(spectra(jnp.asarray(sounds), window, hop), window, hop)
    assert found.shape == sounds.shape
    inside = slice(window, -window)  # at the ends a single window covers the samples, near its zeros
    np.testing.assert_allclose(found[:, inside], sounds[:, inside], atol=1e-4)


def test_frames_are_added_where_they_overlap():
    frames = np.random.default_rng(1).normal(size=(2, 4, 5)).astype(np.float32)
    expected = np.zeros((2, 3 * 2 + 5))
    for number in range(4):
        expected[:, 2 * number : 2 * number + 5] += frames[:, number]
    np.testing.assert_allclose(overlap_add(jnp.asarray(frames), 2), expected, rtol=1e-6)


def test_the_window_is_periodic():
    np.testing.assert_allclose(hann(8), librosa.filters.get_window("hann", 8, fftbins=True), atol=1e-7)


def test_mels_are_logarithms_of_filtered_magnitudes(sounds):
    found = log_mels(jnp.asarray(0.01 * sounds), 8000, 400, 100, 80, 1e-3)
    magnitudes = np.abs(spectra(jnp.asarray(0.01 * sounds), 400, 100))
    expected = np.log(np.maximum(magnitudes @ mel_filters(8000, 400, 80).T, 1e-3))
    np.testing.assert_allclose(found, expected, atol=1e-3)
    np.testing.assert_allclose(log_mels(jnp.zeros((1, 800)), 8000, 400, 100, 80, 1e-3), np.log(1e-3), rtol=1e-6)
