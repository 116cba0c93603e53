"""Judges of generated media that know nothing of the model.

A judge is a function (media, references) -> True where the medium is what the reference says. Classifiers are fitted on
*real* training media of the same source and their accuracy on held-out real media is what their verdicts are worth.
"""

from collections.abc import Callable
from collections.abc import Sequence as AnySequence
from typing import Any

import librosa
import numpy as np
from jaxtyping import Bool, Float, Float32, UInt8
from sklearn.svm import SVC

Judge = Callable[[AnySequence[Any], AnySequence[str]], Bool[np.ndarray, " items"]]


def exact_match(media: AnySequence[str], references: AnySequence[str]) -> Bool[np.ndarray, " items"]:
    """True where two texts are equal."""
    return np.array([text == reference for text, reference in zip(media, references, strict=True)])


def label_judge(modality: str, media: AnySequence[Any], labels: AnySequence[str], sample_rate_hz: int) -> Judge:
    """A support vector machine that tells which label a medium has, fitted on real ones of one shape."""
    features = FEATURES[modality]
    classifier = SVC(C=10.0, gamma="scale")
    classifier.fit(features(media, sample_rate_hz), labels)

    def judge(media: AnySequence[Any], references: AnySequence[str]) -> Bool[np.ndarray, " items"]:
        return classifier.predict(features(media, sample_rate_hz)) == np.array(references)

    return judge


def image_features(
    images: AnySequence[UInt8[np.ndarray, "height width channels"]], sample_rate_hz: int
) -> Float[np.ndarray, "items features"]:
    """Pixels."""
    return np.stack(images).reshape(len(images), -1) / 255


def audio_features(
    waveforms: AnySequence[Float32[np.ndarray, " samples"]], sample_rate_hz: int
) -> Float[np.ndarray, "items features"]:
    """Log-mel spectra, 40 bands of 32 ms every 10 ms, all frames side by side; waveforms are of one length."""
    mel = librosa.feature.melspectrogram(
        y=np.stack(waveforms),
        sr=sample_rate_hz,
        n_fft=round(0.032 * sample_rate_hz),
        hop_length=round(0.010 * sample_rate_hz),
        n_mels=40,
    )
    return np.log(mel + 1e-3).reshape(len(waveforms), -1)


FEATURES: dict[str, Callable[..., Float[np.ndarray, "items features"]]] = {
    "image": image_features,
    "audio": audio_features,
}
