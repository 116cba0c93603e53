"""Sound files → float32 waveforms [samples] of one channel at one sample rate."""

import re
from pathlib import Path

import librosa  # loads its parts on first use
import numpy as np
import soundfile
from jaxtyping import Float32

from trimask.diffusion.data.reading_config import LimitConfig, MediaConfig
from trimask.tokenizers.storage.files import reading, require_regular_file

_MAX_CLIPPED_SHARE = 0.01
"""Largest share of samples beyond ±1 that is clipped; decoders of lossy formats produce some for loud music."""
_MAX_PEAK = 4.0
"""Largest absolute value of a sample that is clipped."""
_CANCELLED = 0.01
"""Channels cancel each other if the energy of their sum is below this share of the sum of their energies: −20 dB."""
_MAX_CANCELLED_SHARE = 0.1
"""Largest share of the windows that are not silent in which channels may cancel each other."""
_SILENT = 1e-4
"""A window is silent if its energy is at most this share of the loudest window's: −40 dB."""
_WINDOWS_HZ = 10
"""Number of windows per second in which channels are compared."""
_UNKNOWN_BYTES = 0x7FFF0000
"""Smallest length in bytes in a header that stands for an unknown one, as programs write it to a pipe."""
_UNKNOWN_FRAMES = 0x7FFFFFFFFFFFFFFF
"""libsndfile's number of frames of a file of unknown length."""
_OGG_TAIL = 1 << 17
"""Number of bytes at the end of an OGG file that hold its last page, of at most 65,307, and what programs append."""
_PROMISED_BYTES = re.compile(r"(\d+) \(should be")
"""libsndfile's note on a header that promises more bytes than the file has."""
_XING = re.compile(rb"(?:Xing|Info)(?P<flags>.{4})(?P<numbers>.{8})", re.DOTALL)
"""In the first frame of an MP3 file: number of frames if flags & 1, then of bytes, from this frame on, if flags & 2."""
SOUND_FORMATS = ("WAV", "WAVEX", "RF64", "FLAC", "OGG", "MP3", "AIFF")
"""Formats of sound files that are read, by libsndfile's names."""


def read_sound(
    path: Path, sample_rate_hz: int, max_seconds: float | None = None, max_samples: int = LimitConfig().samples
) -> Float32[np.ndarray, " samples"]:
    """A sound file mixed to mono and resampled: the whole file, or a little more than its first `max_seconds`.

    Raises ValueError if the file cannot be read, if it has more than `max_samples` samples, which is checked before it
    is decoded, or if mixing its channels or clipping to [-1, 1] would alter the sound too much.
    """
    require_regular_file(path)
    with reading(path, "not a readable sound file"), _opened(path) as file:
        # A little more than is kept, so that the end does not affect the resampled sound.
        frames = file.frames if max_seconds is None else int((max_seconds + 0.1) * file.samplerate)
        frames = min(frames, file.frames)
        _require_bounded(file, frames, sample_rate_hz, max_samples)
        rate, content = file.samplerate, file.read(frames, "float32", always_2d=True)
    if not len(content):
        raise ValueError(f"{path}: holds no sound, its length is zero")
    if not np.isfinite(content).all():
        raise ValueError(f"{path}: holds NaN or infinite samples")
    try:
        return resample_checked(mix_to_mono(content, rate), rate, sample_rate_hz)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _opened(path: Path) -> soundfile.SoundFile:
    """A sound file, not yet decoded. Raises ValueError if its format is not recognised."""
    try:
        return soundfile.SoundFile(path)
    except (soundfile.LibsndfileError, TypeError) as error:
        # A file without a header raises TypeError; code 1 is that of a file which libsndfile does not recognise.
        if getattr(error, "code", 1) != 1:
            raise
        raise ValueError(f"not recognised as one of the formats that are read: {', '.join(SOUND_FORMATS)}") from error


def mix_to_mono(content: Float32[np.ndarray, "samples channels"], rate_hz: int) -> Float32[np.ndarray, " samples"]:
    """Mean of the channels. Raises ValueError if two of them, or all together, cancel each other too often."""
    channels = content.shape[1]
    if channels > 1:
        share = _cancelled_share(content, max(rate_hz // _WINDOWS_HZ, channels))
        if share > _MAX_CANCELLED_SHARE:
            raise ValueError(
                f"its {channels} channels cancel each other in {share:.0%} of the sound when they are mixed; "
                "give one of them"
            )
    return content.mean(axis=1)


def _cancelled_share(content: Float32[np.ndarray, "samples channels"], window: int) -> float:
    """Share of the windows that are not silent in which two channels, or all together, cancel each other.

    `window` is the length of a window in samples. The energy of a + b is ⟨a, a⟩ + ⟨b, b⟩ + 2 ⟨a, b⟩. A pair of
    channels that is silent compared with the loudest window does not count as cancelled.
    """
    count = max(1, len(content) // window)
    size = len(content) // count
    peak = max(content.max(), -content.min()) or 1  # squares of what float files may hold overflow
    windows = content[: count * size].reshape(count, size, -1) / peak
    products = windows.transpose(0, 2, 1) @ windows
    energies = np.diagonal(products, axis1=1, axis2=2)
    apart, total = energies[:, :, None] + energies[:, None, :], energies.sum(axis=1)
    silence = _SILENT * total.max()
    cancels = ((apart + 2 * products < _CANCELLED * apart) & (apart > silence)).any(axis=(1, 2))
    cancels |= products.sum(axis=(1, 2)) < _CANCELLED * total
    is_heard = total > silence
    return float(cancels[is_heard].mean()) if is_heard.any() else 0.0


def _require_bounded(file: soundfile.SoundFile, frames: int, sample_rate_hz: int, max_samples: int) -> None:
    """Raises ValueError for another format, an unknown length, or more than `max_samples` samples to read."""
    if file.format not in SOUND_FORMATS:
        raise ValueError(f"its format is {file.format}; {', '.join(SOUND_FORMATS)} are read")
    if file.frames == _UNKNOWN_FRAMES:
        raise ValueError("its header has no length, as if written to a pipe; convert it once more, into a file")
    samples = max(frames * file.channels, frames * sample_rate_hz // max(file.samplerate, 1))
    if samples > max_samples:
        raise ValueError(
            f"{frames / file.samplerate:,.1f} s of {file.channels} channels at {file.samplerate:,} Hz, read at "
            f"{sample_rate_hz:,} Hz, are {samples:,} samples, more than the {max_samples:,} of --limits.samples"
        )


def sound_faults(path: Path) -> list[str]:
    """A fault if a readable sound file has been cut short; else empty."""
    with reading(path, "not a readable sound file"):
        with _opened(path) as file:
            file_format, seconds = file.format, file.frames / file.samplerate
            promised = _PROMISED_BYTES.search(file.extra_info)
        if promised is not None and int(promised[1]) < _UNKNOWN_BYTES:
            return [f"the header promises more sound than the {seconds:.2f} s in the file"]
        if file_format == "OGG" and not _is_ogg_complete(path):
            return [f"the file is cut short: the end of the stream is missing after {seconds:.2f} s"]
        if file_format == "MP3" and (missing := _missing_bytes_of_mp3(path)) > 0:
            return [f"the file is cut short: the header promises {missing:,} bytes more"]
    return []


def _is_ogg_complete(path: Path) -> bool:
    """Whether the last page is complete and marked as the end of its stream (RFC 3533, section 6)."""
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - _OGG_TAIL))
        _, start, page = file.read().rpartition(b"OggS")
    if not start or len(page) < 23:
        return False
    flags, num_segments = page[1], page[22]
    return bool(flags & 4) and len(page) >= 23 + num_segments + sum(page[23 : 23 + num_segments])


def _missing_bytes_of_mp3(path: Path) -> int:
    """Number of bytes that a Xing or Info header promises beyond the end of the file; 0 without such a header."""
    with path.open("rb") as file:
        tag = file.read(10)  # an ID3v2 header holds the tag's size in four times seven bits
        start = 10 + sum(byte << 7 * n for n, byte in enumerate(reversed(tag[6:]))) if tag[:3] == b"ID3" else 0
        file.seek(start)
        found = _XING.search(file.read(64))
    if found is None or not found["flags"][3] & 2:
        return 0
    numbers = found["numbers"][4:] if found["flags"][3] & 1 else found["numbers"]
    return max(0, int.from_bytes(numbers[:4]) - (path.stat().st_size - start))


def resample_checked(mono: np.ndarray, rate_hz: int, sample_rate_hz: int) -> Float32[np.ndarray, " samples"]:
    """A waveform resampled from `rate_hz` to `sample_rate_hz`, clipped to [-1, 1].

    Raises ValueError if more than 1 % of the samples are outside [-1, 1], or one is outside [-4, 4].
    """
    outside, peak = int((np.abs(mono) > 1).sum()), float(np.abs(mono).max(initial=0))
    if outside > _MAX_CLIPPED_SHARE * len(mono) or peak > _MAX_PEAK:
        raise ValueError(
            f"{outside:,} of its {len(mono):,} samples are beyond ±1, up to {peak:,.5g}, and would be clipped; scale it"
        )
    mono = np.clip(mono, -1, 1).astype(np.float32)
    if rate_hz != sample_rate_hz:
        mono = librosa.resample(mono, orig_sr=rate_hz, target_sr=sample_rate_hz, res_type="soxr_hq")
    return np.clip(mono, -1, 1)


def read_sound_as_configured(path: Path, config: MediaConfig) -> Float32[np.ndarray, " samples"]:
    """A sound file at the codec's sample rate, cut to the configured length and within the configured limit."""
    return read_sound(path, config.codecs["audio"].sample_rate_hz, config.seconds, config.limits.samples)
