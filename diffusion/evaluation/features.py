"""Features of media for judges: vectors that depend on what is shown or said, and little on how.

Pictures become histograms of the directions of their edges, cell by cell (Dalal & Triggs 2005). Sounds become cepstra
of the part between leading and trailing silence, relative to its loudest moment and stretched to a fixed length: so it
matters little when a word begins, how long it lasts and how loud it is. Both were chosen by the accuracy of a
classifier on real pictures and recordings, never by its results on a model's.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import librosa
import numpy as np
from jaxtyping import Float, Float32, UInt8

_CELLS = 7
"""Number of cells along the shorter side of a picture, unless cells would be smaller than 2 pixels."""
_DIRECTIONS = 8
"""Number of directions in a cell's histogram."""
_QUIET = 10**-2.5
"""Share of the loudest frame's energy (−25 dB) below which a frame is silence."""
_CEPSTRA = 13
"""Number of mel cepstra per moment."""
_FRAMES = 24
"""Number of moments to which a sound is stretched."""
_CHUNK = 256
"""Number of sounds whose spectra are in memory at once."""
_PIXELS = 1 << 22
"""Number of pixels, of all pictures together, whose edges are in memory at once."""


def image_features(
    images: Sequence[UInt8[np.ndarray, "height width channels"]],
) -> Float[np.ndarray, "items features"]:
    """Square root of the share that each of 8 directions in each cell has in all edges of the picture."""
    height, width, _ = images[0].shape
    chunk = max(1, _PIXELS // (height * width))
    return np.concatenate([_edges(np.stack(images[first : first + chunk])) for first in range(0, len(images), chunk)])


def _edges(images: UInt8[np.ndarray, "items height width channels"]) -> Float[np.ndarray, "items features"]:
    grey = images.mean(axis=-1) / 255
    padded = np.pad(grey, ((0, 0), (1, 1), (1, 1)), mode="edge")
    down = padded[:, 2:, 1:-1] - padded[:, :-2, 1:-1]
    right = padded[:, 1:-1, 2:] - padded[:, 1:-1, :-2]
    turn = np.arctan2(down, right) / (2 * np.pi) * _DIRECTIONS
    # Every edge counts for the two directions that it lies between.
    half = _DIRECTIONS / 2
    distance = np.abs((turn[..., None] - np.arange(_DIRECTIONS) + half) % _DIRECTIONS - half)
    counts = np.hypot(down, right)[..., None] * np.maximum(0, 1 - distance)
    side = max(1, min(max(2, min(grey.shape[1:]) // _CELLS), *grey.shape[1:]))
    for axis in (1, 2):
        pixels = counts.shape[axis]
        cells = max(1, pixels // side)
        counts = np.add.reduceat(counts, np.arange(cells) * pixels // cells, axis=axis)
    flat = counts.reshape(len(images), -1)
    return np.sqrt(flat / (flat.sum(axis=1, keepdims=True) + 1e-6))


def audio_features(
    waveforms: Sequence[Float32[np.ndarray, " samples"]], sample_rate_hz: int
) -> Float[np.ndarray, "items features"]:
    """13 mel cepstra at 24 moments between the silences, and the log of the number of 10 ms frames between them."""
    features = []
    for first in range(0, len(waveforms), _CHUNK):
        mels = librosa.feature.melspectrogram(
            y=np.stack(waveforms[first : first + _CHUNK]),
            sr=sample_rate_hz,
            n_fft=round(0.032 * sample_rate_hz),
            hop_length=round(0.010 * sample_rate_hz),
            n_mels=40,
        )
        features += [_cepstra(mel) for mel in mels]
    return np.stack(features)


def _cepstra(mel: Float[np.ndarray, "bands frames"]) -> Float[np.ndarray, " features"]:
    energy = mel.sum(axis=0)
    loud = np.flatnonzero(energy >= _QUIET * energy.max())
    frames = slice(loud[0], loud[-1] + 1)
    spectrum = np.log(mel[:, frames] / max(float(mel.max()), 1e-10) + 1e-4)
    cepstra = librosa.feature.mfcc(S=spectrum, n_mfcc=_CEPSTRA)
    moments = np.linspace(0, cepstra.shape[1] - 1, _FRAMES)
    stretched = [np.interp(moments, np.arange(cepstra.shape[1]), row) for row in cepstra]
    return np.append(np.concatenate(stretched), np.log(cepstra.shape[1]))


class Features(NamedTuple):
    """How a modality becomes features."""

    extract: Callable[[Sequence[Any], Any], Float[np.ndarray, "items features"]]
    """`extract(media, codec)`, with the codec of the modality."""
    is_scaled: bool
    """Whether each feature is divided by its standard deviation over the training media before it is compared."""


FEATURES: dict[str, Features] = {
    "image": Features(lambda media, _: image_features(media), is_scaled=False),
    "audio": Features(lambda media, codec: audio_features(media, codec.sample_rate_hz), is_scaled=True),
}
"""Features that the judges label and frechet compare, by modality; they cannot judge a modality without an entry."""


def frechet_distance(ours: Float[np.ndarray, "n features"], theirs: Float[np.ndarray, "m features"]) -> float:
    """|μ₁ − μ₂|² + tr(Σ₁ + Σ₂ − 2 (Σ₁Σ₂)^½), with means and covariances of two sets (Heusel et al. 2017).

    See arXiv 1706.08500. With Σ₁ = AᵀA and Σ₂ = BᵀB the last trace is the sum of the singular values of ABᵀ, which
    needs no root of a matrix that may be singular or, by rounding, have negative eigenvalues.
    """
    if min(len(ours), len(theirs)) < 2:
        raise ValueError(f"a Fréchet distance needs at least 2 items of each set, got {len(ours)} and {len(theirs)}")
    centred = [(set_ - set_.mean(axis=0)) / (len(set_) - 1) ** 0.5 for set_ in (ours, theirs)]
    traces = sum(float((part**2).sum()) for part in centred)
    # R of A = QR has the same AᵀA, and at most as many rows as there are features.
    small = [np.linalg.qr(part).R for part in centred]
    cross = float(np.linalg.svdvals(small[0] @ small[1].T).sum())
    between = float(((ours.mean(axis=0) - theirs.mean(axis=0)) ** 2).sum())
    return max(0.0, between + traces - 2 * cross)
