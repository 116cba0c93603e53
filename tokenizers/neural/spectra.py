"""Short-time spectra of waveforms in JAX, and back.

Spectrum i is that of the window around samples i·hop … (i+1)·hop, so a waveform of T·hop samples has T spectra. The
inverse adds windowed frames and divides by the sum of squared windows (Griffin & Lim 1984, equation 6).
"""

from functools import cache

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Complex, Float, Float32


def spectra(
    waveforms: Float[Array, "batch samples"], window: int, hop: int
) -> Complex[Array, "batch spectra frequencies"]:
    """Spectra of waveforms whose length is a multiple of `hop`, with a Hann window; silence lies around them."""
    side = (window - hop) // 2
    padded = jnp.pad(waveforms, ((0, 0), (side, window - hop - side)))
    return jnp.fft.rfft(_frames(padded, window, hop) * hann(window))


def waveforms(
    spectra: Complex[Array, "batch spectra frequencies"], window: int, hop: int
) -> Float[Array, "batch samples"]:
    """Waveforms that have these spectra, or come nearest to them."""
    number = spectra.shape[1]
    frames = jnp.fft.irfft(spectra, n=window) * hann(window)
    total = overlap_add(frames, hop)
    weight = overlap_add(jnp.broadcast_to(hann(window) ** 2, (1, number, window)), hop)
    side = (window - hop) // 2
    inside = slice(side, side + number * hop)
    return total[:, inside] / jnp.maximum(weight[:, inside], 1e-6)


def overlap_add(frames: Float[Array, "batch number window"], hop: int) -> Float[Array, "batch samples"]:
    """Sum of frames that begin `hop` samples after one another."""
    batch, number, window = frames.shape
    hops = -(-window // hop)
    parts = jnp.pad(frames, ((0, 0), (0, 0), (0, hops * hop - window))).reshape(batch, number, hops, hop)
    shifted = (jnp.pad(parts[:, :, k], ((0, 0), (k, hops - 1 - k), (0, 0))) for k in range(hops))
    total = sum(shifted, start=jnp.zeros(()))
    return total.reshape(batch, -1)[:, : (number - 1) * hop + window]


def _frames(padded: Float[Array, "batch samples"], window: int, hop: int) -> Float[Array, "batch number window"]:
    """Windows of samples that begin `hop` after one another; slices, since a gather is slow on CPUs."""
    batch, samples = padded.shape
    number, hops = (samples - window) // hop + 1, -(-window // hop)
    total = (number + hops - 1) * hop
    rows = jnp.pad(padded, ((0, 0), (0, max(0, total - samples))))[:, :total].reshape(batch, -1, hop)
    return jnp.concatenate([rows[:, k : k + number] for k in range(hops)], axis=-1)[..., :window]


@cache
def hann(window: int) -> Float32[np.ndarray, " window"]:
    """Periodic Hann window."""
    return (0.5 - 0.5 * np.cos(2 * np.pi * np.arange(window) / window)).astype(np.float32)


@cache
def mel_filters(sample_rate_hz: int, window: int, num_mels: int) -> Float32[np.ndarray, "mels frequencies"]:
    """Triangular filters of height 1 between 0 Hz and half the sample rate."""
    import librosa  # takes a second to load, and only mels need it

    return librosa.filters.mel(sr=sample_rate_hz, n_fft=window, n_mels=num_mels, norm=None)


def log_mels(
    waveforms: Float[Array, "batch samples"], sample_rate_hz: int, window: int, hop: int, num_mels: int, floor: float
) -> Float[Array, "batch spectra mels"]:
    """log(max(mel magnitude, floor)) of waveforms."""
    magnitudes = jnp.abs(spectra(waveforms, window, hop))
    return jnp.log(jnp.maximum(magnitudes @ mel_filters(sample_rate_hz, window, num_mels).T, floor))
