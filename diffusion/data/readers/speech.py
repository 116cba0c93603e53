"""Speech by espeak-ng, synthesised in a process of its own: `speak(utterances)` yields int16 at 8 kHz.

espeak-ng is GPL-3 and trimask Apache-2.0. Hence its wheel is an extra, and only the process that this module starts
(`python -m trimask.diffusion.data.readers.speech`) loads it; that process returns nothing but plain bytes.

The process reads one JSON list `[text, voice, speed, pitch]` per line until end of file. It answers with its sample
rate and then, for every line, the number of bytes and the int16 samples; integers are little-endian, of 32 bits.
espeak-ng draws its noise from generators that keep their state, so the bytes of an utterance depend on the utterances
before it: the same list in a fresh process gives the same bytes, a part of the list does not.
"""

import contextlib
import ctypes
import importlib.util
import json
import os
import struct
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from typing import IO, NamedTuple

import numpy as np
import soxr
from jaxtyping import Float32, Int16

SAMPLE_RATE_HZ = 8_000
"""Sample rate of the speech that `speak` gives."""

_COMMAND = (sys.executable, "-P", "-m", "trimask.diffusion.data.readers.speech")
_PEAK = 0.95
"""Peak of an utterance, as a share of full scale."""
_SILENCE = 0.01
"""Share of the peak (−40 dB) up to which samples at either end are silence."""


class Utterance(NamedTuple):
    """Text to speak, and the voice that speaks it."""

    text: str
    voice: str
    """Language and variant by espeak-ng's names, such as "en-us+f1"; "en" alone is British."""
    speed: int
    """Words per minute, 80 to 450."""
    pitch: int
    """Pitch in espeak-ng's scale, 0 to 99."""


def speak(utterances: Sequence[Utterance]) -> Iterator[Int16[np.ndarray, " samples"]]:
    """Yields each utterance at 8 kHz mono, without silence at its ends, its peak at 95 % of full scale.

    Raises ModuleNotFoundError if espeak-ng is missing, RuntimeError if its process fails.
    """
    require_espeak()
    # The process reads everything before it answers, so writing first and reading after cannot deadlock. Its errors go
    # to a file, because a pipe that is not read meanwhile would fill up.
    with tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(_COMMAND, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors)
        assert process.stdin is not None and process.stdout is not None
        try:
            with contextlib.suppress(BrokenPipeError), process.stdin:
                process.stdin.write("".join(json.dumps(each) + "\n" for each in utterances).encode())
            done = 0
            for samples in _answers(process.stdout):
                done += 1
                yield samples
            if process.wait() != 0 or done != len(utterances):
                errors.seek(0)
                message = errors.read().decode(errors="replace").strip() or "(nothing)"
                raise RuntimeError(
                    f"espeak-ng stopped with exit status {process.returncode} after {done} of "
                    f"{len(utterances)} utterances; it said:\n{message}"
                )
        finally:
            process.kill()
            process.stdout.close()
            process.wait()


def require_espeak() -> None:
    """Raises ModuleNotFoundError, with the extra to install, if espeak-ng is missing."""
    if importlib.util.find_spec("espeakng_loader") is None:
        raise ModuleNotFoundError(
            'synthetic speech needs espeak-ng: pip install "trimask[speech]". It is an extra because '
            "espeak-ng is GPL-3 while trimask is Apache-2.0; trimask runs it in a process of its own."
        )


def trim_and_normalise(samples: Float32[np.ndarray, " samples"]) -> Int16[np.ndarray, " trimmed"]:
    """Samples without silence at both ends, scaled to a peak of 95 % of full scale. Raises ValueError if all are 0."""
    loudness = np.abs(samples)
    if not loudness.any():
        raise ValueError(f"all {len(samples)} samples are silent")
    heard = np.flatnonzero(loudness > _SILENCE * loudness.max())
    trimmed = samples[heard[0] : heard[-1] + 1]
    return np.round(trimmed * (_PEAK * np.iinfo(np.int16).max / loudness.max())).astype(np.int16)


def _answers(stream: IO[bytes]) -> Iterator[Int16[np.ndarray, " samples"]]:
    """Utterances that the process writes, until it stops; one that it did not write completely is left out."""
    if len(header := stream.read(4)) < 4:
        return
    (espeak_rate_hz,) = struct.unpack("<I", header)
    while len(header := stream.read(4)) == 4:
        (size,) = struct.unpack("<I", header)
        if len(payload := stream.read(size)) < size:
            return
        wave = np.frombuffer(payload, "<i2").astype(np.float32)
        yield trim_and_normalise(soxr.resample(wave, espeak_rate_hz, SAMPLE_RATE_HZ))


# The rest of the module runs in the process. Constants are those of espeak-ng's speak_lib.h.

_AUDIO_OUTPUT_SYNCHRONOUS = 2
_INITIALIZE_DONT_EXIT = 0x8000
_RATE, _PITCH = 1, 3
_POSITION_CHARACTER = 1
_CHARACTERS_UTF8 = 1

_Callback = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_int, ctypes.c_void_p)


def _serve(requests: IO[bytes], answers: IO[bytes]) -> None:
    """Speaks every request and writes the samples to `answers`, in the format of the module's docstring."""
    import espeakng_loader

    espeak = ctypes.CDLL(espeakng_loader.get_library_path())
    # espeak-ng truncates the path of its data at 160 characters, which a deep virtual environment exceeds.
    os.chdir(os.path.dirname(espeakng_loader.get_data_path()))
    espeak_rate_hz = espeak.espeak_Initialize(_AUDIO_OUTPUT_SYNCHRONOUS, 0, b".", _INITIALIZE_DONT_EXIT)
    if espeak_rate_hz <= 0:
        raise RuntimeError(f"espeak-ng did not start with the data in {os.getcwd()}")
    espeak.espeak_ng_SetRandSeed(ctypes.c_long(1))  # otherwise the time is the seed, which changes breathy voices
    pieces: list[bytes] = []

    @_Callback
    def collect(samples: int | None, num_samples: int, events: int | None) -> int:
        if samples:
            pieces.append(ctypes.string_at(samples, 2 * num_samples))
        return 0

    espeak.espeak_SetSynthCallback(collect)
    answers.write(struct.pack("<I", espeak_rate_hz))
    for text, voice, speed, pitch in map(json.loads, requests.readlines()):
        if espeak.espeak_SetVoiceByName(voice.encode()) != 0:
            raise ValueError(f"espeak-ng has no voice {voice!r}")
        espeak.espeak_SetParameter(_RATE, speed, 0)
        espeak.espeak_SetParameter(_PITCH, pitch, 0)
        pieces.clear()
        encoded = text.encode()
        size = ctypes.c_size_t(len(encoded) + 1)
        if espeak.espeak_Synth(encoded, size, 0, _POSITION_CHARACTER, 0, _CHARACTERS_UTF8, None, None) != 0:
            raise RuntimeError(f"espeak-ng could not say {text!r} with voice {voice}")
        spoken = b"".join(pieces)
        answers.write(struct.pack("<I", len(spoken)) + spoken)


if __name__ == "__main__":
    # Output that the library prints must not mix with the samples.
    with os.fdopen(os.dup(1), "wb") as answers:
        os.dup2(2, 1)
        _serve(sys.stdin.buffer, answers)
