"""Reconstruction quality of codecs, and use of their codebooks.

    PSNR = 10 log₁₀(255² / mean squared error)
    log-mel distance = root mean square over bands and time of the two spectrograms' difference in dB
    perplexity = exp(−Σ p log p)

where p are the relative frequencies of a codebook's codewords.
"""

from dataclasses import dataclass

import librosa  # loads its parts on first use
import numpy as np
from jaxtyping import Float, Float32, Int, UInt8


@dataclass(frozen=True, kw_only=True)
class CodebookUse:
    """How many codewords of a codebook a set of codes uses."""

    size: int
    """Number of codewords in the codebook."""
    used: int
    """Number of codewords that occur at least once."""
    perplexity: float
    """Number of codewords that, if used equally often, would carry as much information."""

    @property
    def share(self) -> float:
        """Fraction of the codewords that occur."""
        return self.used / self.size


def psnr_db(
    originals: UInt8[np.ndarray, "batch height width channels"],
    reconstructions: UInt8[np.ndarray, "batch height width channels"],
) -> Float[np.ndarray, " batch"]:
    """Peak signal-to-noise ratio of each picture in dB; infinite for an exact reconstruction."""
    pairs = zip(originals, reconstructions, strict=True)
    errors = np.array([np.square(original.astype(np.float64) - copy).mean() for original, copy in pairs])
    with np.errstate(divide="ignore"):
        return 10 * np.log10(255**2 / errors)


def log_mel_distance_db(
    originals: Float32[np.ndarray, "batch samples"],
    reconstructions: Float32[np.ndarray, "batch samples"],
    sample_rate_hz: int,
    floor_db: float = -60.0,
) -> Float[np.ndarray, " batch"]:
    """Log-mel distance of each pair of clips in dB. Levels below `floor_db` count as `floor_db`: silences are equal."""
    first, second = (_mel_db(clips, sample_rate_hz, floor_db) for clips in (originals, reconstructions))
    return np.sqrt(np.square(first - second).mean(axis=(1, 2)))


def codebook_use(codes: Int[np.ndarray, "..."], size: int) -> CodebookUse:
    """Use of one codebook of this size; for residual codes pass one codebook's codes, `codes[..., stage]`."""
    counts = np.bincount(codes.ravel(), minlength=size)
    frequencies = counts[counts > 0] / counts.sum()
    entropy = -np.sum(frequencies * np.log(frequencies))
    return CodebookUse(size=size, used=len(frequencies), perplexity=float(np.exp(entropy)))


def _mel_db(
    clips: Float32[np.ndarray, "batch samples"], sample_rate_hz: int, floor_db: float
) -> Float[np.ndarray, "batch mels spectra"]:
    """Log-mel spectrogram in dB: 32 bands, 40 ms windows every 20 ms.

    These are not any codec's own spectra, so that no codec is judged by its own features.
    """
    window = sample_rate_hz // 25
    mels = librosa.feature.melspectrogram(y=clips, sr=sample_rate_hz, n_fft=window, hop_length=window // 2, n_mels=32)
    return librosa.power_to_db(mels, ref=1.0, amin=10 ** (floor_db / 10), top_db=None)
