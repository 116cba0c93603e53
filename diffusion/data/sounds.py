"""Sound files → waveforms of one rate and length, and what they say to the codec that is fitted on them."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import librosa  # loads its parts on first use
import numpy as np
import soundfile
from jaxtyping import Float32

from trimask.diffusion.data.media_config import LimitConfig, MediaConfig
from trimask.tokenizers.audio import MelCodec, MelConfig
from trimask.tokenizers.files import reading, require_regular_file

_MOST_CLIPPED = 0.01
"""Share of samples beyond ±1 that are clipped: decoders of lossy formats make some of loud music."""
_MOST_CANCELLED = 0.03
"""Loudness of the mean of channels, of theirs: −30 dB."""
_LEFT_OPEN = 0x7FFF0000
"""Bytes from here on are what programs write to a pipe where they cannot know the length."""
FORMATS = ("WAV", "WAVEX", "RF64", "FLAC", "OGG", "MP3", "AIFF")
"""Formats of sound files that are read, by libsndfile's names."""


def read_sound(
    path: Path, sample_rate_hz: int, max_seconds: float | None = None, max_samples: int = LimitConfig().samples
) -> Float32[np.ndarray, " samples"]:
    """A sound file, or its beginning, mixed to mono and resampled.

    Raises ValueError if it cannot be read, or has more samples than are allowed, which is seen before it is decoded;
    and if mixing or the limits of [-1, 1] would leave another sound.
    """
    require_regular_file(path)
    with reading(path, "not a readable sound file"), soundfile.SoundFile(path) as file:
        # A little more than is kept, so that the resampler does not see the end.
        frames = file.frames if max_seconds is None else int((max_seconds + 0.1) * file.samplerate)
        frames = min(frames, file.frames)
        _require_bounded(file, frames, sample_rate_hz, max_samples)
        rate, content = file.samplerate, file.read(frames, "float32", always_2d=True)
    if not len(content):
        raise ValueError(f"{path}: holds no sound, its length is zero")
    if not np.isfinite(content).all():
        raise ValueError(f"{path}: holds NaN or infinite samples")
    try:
        return resampled(_mixed(content), rate, sample_rate_hz)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _mixed(content: Float32[np.ndarray, "samples channels"]) -> Float32[np.ndarray, " samples"]:
    """The mean of the channels. Raises ValueError where they cancel each other."""
    mono = content.mean(axis=1)
    if np.sqrt(np.mean(mono**2)) < _MOST_CANCELLED * np.sqrt(np.mean(content**2)):
        raise ValueError(f"its {content.shape[1]} channels cancel each other when they are mixed; give one of them")
    return mono


def _require_bounded(file: soundfile.SoundFile, frames: int, sample_rate_hz: int, max_samples: int) -> None:
    if file.format not in FORMATS:
        raise ValueError(f"its format is {file.format}; {', '.join(FORMATS)} are read")
    samples = max(frames * file.channels, frames * sample_rate_hz // max(file.samplerate, 1))
    if samples > max_samples:
        raise ValueError(
            f"{frames / file.samplerate:,.1f} s of {file.channels} channels at {file.samplerate:,} Hz, read at "
            f"{sample_rate_hz:,} Hz, are {samples:,} samples, more than the {max_samples:,} of --limits.samples"
        )


def faults(path: Path) -> list[str]:
    """What is wrong with a sound file that can be read: its header may promise more than it has."""
    with reading(path, "not a readable sound file"), soundfile.SoundFile(path) as file:
        promised = re.search(r"(\d+) \(should be", file.extra_info)  # libsndfile's words
        if promised is not None and int(promised[1]) < _LEFT_OPEN:
            return [f"the header promises more sound than the {file.frames / file.samplerate:.2f} s in the file"]
    return []


def resampled(mono: np.ndarray, rate_hz: int, sample_rate_hz: int) -> Float32[np.ndarray, " samples"]:
    """A waveform at another rate, kept in [-1, 1]. Raises ValueError where more than a few samples lie outside."""
    outside = float(np.mean(np.abs(mono) > 1)) if len(mono) else 0.0
    if outside > _MOST_CLIPPED:
        raise ValueError(
            f"{outside:.0%} of its samples are beyond ±1, up to {np.abs(mono).max():,.4g}, and clipped; scale it"
        )
    mono = np.clip(mono, -1, 1).astype(np.float32)
    if rate_hz != sample_rate_hz:
        mono = librosa.resample(mono, orig_sr=rate_hz, target_sr=sample_rate_hz, res_type="soxr_hq")
    return np.clip(mono, -1, 1)


def fit_sound(waveform: Float32[np.ndarray, " _"], samples: int) -> Float32[np.ndarray, " samples"]:
    """The beginning of a waveform; silence fills what is missing."""
    return np.pad(waveform, (0, max(0, samples - len(waveform))))[:samples].astype(np.float32)


def read(path: Path, config: MediaConfig) -> Float32[np.ndarray, " samples"]:
    """A sound file at the codec's rate, as long as all sounds are to be."""
    return read_sound(path, config.codecs["audio"].sample_rate_hz, config.seconds, config.limits.samples)


def at_shape(waveform: Float32[np.ndarray, " _"], shape: tuple[int, ...], config: MediaConfig) -> np.ndarray:
    """The waveform at a dataset's length."""
    return fit_sound(waveform, shape[0])


def shapes(
    samples: Mapping[str, Sequence[np.ndarray]], config: MediaConfig, given: MelCodec | None
) -> dict[str, list[int]]:
    """Samples of each dataset's sounds: as configured, else of its longest, in whole frames of the codec."""
    codec = config.codecs["audio"]
    frame, found = codec.samples_per_frame, {}
    for name, sample in samples.items():
        samples_each = max(map(len, sample))
        if config.seconds is not None:
            samples_each = round(config.seconds * codec.sample_rate_hz)
        found[name] = [max(1, -(-samples_each // frame)) * frame]
    return found


def fit(samples: Sequence[Float32[np.ndarray, "_ _"]], config: MelConfig) -> MelCodec:
    """The codec fitted on all sounds, of which the shorter ones end in silence."""
    longest = max(batch.shape[1] for batch in samples)
    return MelCodec.fit(np.concatenate([np.pad(b, ((0, 0), (0, longest - b.shape[1]))) for b in samples]), config)


def as_given(config: MediaConfig, shape: tuple[int, ...], codec: Any) -> MediaConfig:
    """The configuration with the length that sounds have elsewhere, where it says none."""
    return config if config.seconds is not None else replace(config, seconds=shape[0] / codec.sample_rate_hz)


def notes(path: Path, waveform: np.ndarray, shape: tuple[int, ...], config: MediaConfig) -> list[str]:
    """What is left out when a user's sound is brought to a model's length."""
    rate, seconds = config.codecs["audio"].sample_rate_hz, soundfile.info(path).duration
    if round(seconds * rate) <= shape[0]:
        return []
    return [f"only the first {shape[0] / rate:.2f} of {seconds:.2f} s are heard"]


def shown(shape: tuple[int, ...], config: MediaConfig) -> str:
    """A length in words."""
    return f"{shape[0] / config.codecs['audio'].sample_rate_hz:.2f} s"
