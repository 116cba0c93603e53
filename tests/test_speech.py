"""The espeak-ng process: utterances come in order, with the same bytes every time, and errors are reported."""

import ctypes
import importlib.util
import json
import os
import re
import struct
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from trimask.diffusion.data.readers import speech
from trimask.diffusion.data.readers.speech import Utterance, speak, trim_and_normalise

SIX = Utterance("six", "en-us", 175, 50)


def test_the_same_list_gives_the_same_bytes_at_another_time():
    """Breathy voices (f2) draw from a generator that espeak-ng would seed with the time in seconds."""
    utterances = [SIX, SIX._replace(voice="en+f2"), SIX, SIX._replace(text="seven")]
    first = [audio.tobytes() for audio in speak(utterances)]
    time.sleep(1.1)
    assert [audio.tobytes() for audio in speak(utterances)] == first
    assert len(first) == 4


def test_answers_come_in_the_order_of_the_requests():
    texts = ["seventy-seven", "two", "seventy-seven", "two", "two"]
    is_long = [len(audio) > 5000 for audio in speak([SIX._replace(text=text) for text in texts])]
    assert is_long == [True, False, True, False, False]


def _period(audio):
    """Period of a voice in samples: the lag at which the autocorrelation of the middle of a vowel peaks."""
    middle = audio[len(audio) // 2 - 400 : len(audio) // 2 + 400].astype(float)
    correlation = np.correlate(middle, middle, "full")[len(middle) - 1 :]
    return 20 + np.argmax(correlation[20:160])  # 50 to 400 Hz


def test_voice_speed_and_pitch_are_heard():
    one = SIX._replace(text="one")
    changes = [one, one._replace(voice="en-us+f1"), one._replace(speed=220), one._replace(pitch=90)]
    plain, woman, faster, higher = speak(changes)
    assert len(faster) < 0.9 * len(plain)
    assert len(higher) == pytest.approx(len(plain), rel=0.1)
    assert _period(woman) < 0.8 * _period(plain)
    assert _period(higher) < 0.8 * _period(plain)


def test_sound_lasts_as_long_as_at_the_rate_espeak_gave():
    """The word at 175 words a minute takes about 0.4 s: a wrong rate would make it 1.1 or 0.15."""
    (audio,) = speak([SIX._replace(text="seven")])
    assert audio.dtype == np.int16
    assert 0.3 < len(audio) / speech.SAMPLE_RATE_HZ < 0.55


def test_the_library_stays_out_of_our_process():
    list(speak([SIX]))
    assert "espeakng_loader" not in sys.modules


def test_an_unknown_voice_is_named():
    with pytest.raises(RuntimeError, match=r"(?s)after 1 of 2 utterances.*no voice 'en-nowhere'"):
        list(speak([SIX, SIX._replace(voice="en-nowhere")]))


@pytest.mark.parametrize(
    ("program", "complaint"),
    [
        ("import os, sys; print('boom', file=sys.stderr, flush=True); os.abort()", "status -6 .*boom"),
        ("import os; os.write(2, bytes([255, 66])); os._exit(3)", "status 3 .*\ufffdB"),
        ("pass", r"status 0 after 0 of 1 .*\(nothing\)"),
        ("import os; os.write(1, bytes([34, 86, 0, 0, 9, 0, 0, 0, 1]))", "status 0 after 0 of 1 "),
    ],
    ids=["aborts", "is no text", "says nothing", "stops amid a sample"],
)
def test_a_process_that_stops_early_is_an_error_with_its_last_words(monkeypatch, program, complaint):
    monkeypatch.setattr(speech, "_COMMAND", (sys.executable, "-c", program))
    with pytest.raises(RuntimeError, match=f"(?s){complaint}"):
        list(speak([SIX]))


class Silent:
    """A library that does not start, knows no voice or cannot say it, or says what it was told."""

    def __init__(self, rate=22050, voice=0, synth=0):
        self.rate, self.voice, self.synth, self.told = rate, voice, synth, []

    def espeak_Initialize(self, *how):
        self.told.append(how)
        return self.rate

    def espeak_ng_SetRandSeed(self, seed):
        self.told.append(seed.value)

    def espeak_SetSynthCallback(self, callback):
        self.callback = callback

    def espeak_SetVoiceByName(self, name):
        self.told.append(name)
        return self.voice

    def espeak_SetParameter(self, *what):
        self.told.append(what)

    def espeak_Synth(self, text, size, *how):
        self.told.append((text, size.value, *how))
        for part in (text, text[:2]):
            assert self.callback(ctypes.cast(ctypes.c_char_p(part), ctypes.c_void_p), len(part) // 2, None) == 0
        assert self.callback(None, 0, None) == 0
        return self.synth


def served(library, monkeypatch, tmp_path, *requests) -> bytes:
    """Answer of the espeak-ng process with this library in place of espeak-ng."""
    loader = SimpleNamespace(get_library_path=lambda: "lib", get_data_path=lambda: str(tmp_path / "espeak-ng-data"))
    monkeypatch.setitem(sys.modules, "espeakng_loader", loader)
    monkeypatch.setattr(ctypes, "CDLL", {"lib": library}.__getitem__)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "asked").write_text("".join(f"{json.dumps(request)}\n" for request in requests))
    with (tmp_path / "asked").open("rb") as asked, (tmp_path / "answers").open("wb") as answers:
        speech._serve(asked, answers)
    return (tmp_path / "answers").read_bytes()


def test_the_library_is_told_what_was_asked_and_its_samples_are_passed_on(monkeypatch, tmp_path):
    library = Silent(rate=16000)
    answer = served(library, monkeypatch, tmp_path, ("four", "en", 150, 40), ("é!", "de", 100, 10))
    assert answer == b"".join([struct.pack("<II", 16000, 6), b"fourfo", struct.pack("<I", 4), "é".encode() * 2])
    assert library.told == [
        (2, 0, b".", 0x8000), 1,
        b"en", (1, 150, 0), (3, 40, 0), (b"four", 5, 0, 1, 0, 1, None, None),
        b"de", (1, 100, 0), (3, 10, 0), ("é!".encode(), 4, 0, 1, 0, 1, None, None),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("library", "message"),
    [
        (Silent(rate=0), "espeak-ng did not start with the data in .*"),
        (Silent(voice=1), "espeak-ng has no voice 'en'"),
        (Silent(synth=2), "espeak-ng could not say 'four' with voice en"),
    ],
)
def test_what_the_library_cannot_do_is_said(monkeypatch, tmp_path, library, message):
    with pytest.raises((RuntimeError, ValueError), match=message):
        served(library, monkeypatch, tmp_path, ("four", "en", 150, 40))


def test_a_listener_who_leaves_ends_the_process(monkeypatch):
    started = []

    class Recorded(subprocess.Popen):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            started.append(self)

    monkeypatch.setattr(subprocess, "Popen", Recorded)
    sounds = speak([SIX] * 500)  # more than a pipe holds, so the process waits to be read
    next(sounds)
    assert started[0].poll() is None
    sounds.close()
    assert started[0].returncode is not None


def test_a_deep_virtual_environment_is_no_obstacle(monkeypatch, tmp_path):
    """espeak-ng truncates paths at 160 characters."""
    site = tmp_path / ("a" * 90) / ("b" * 90)
    site.mkdir(parents=True)
    package = Path(importlib.util.find_spec("espeakng_loader").origin).parent
    (site / package.name).symlink_to(package)
    monkeypatch.setenv("PYTHONPATH", str(site), prepend=os.pathsep)
    assert len(list(speak([SIX]))) == 1


def test_without_espeak_the_error_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "espeakng_loader", None)
    with pytest.raises(ModuleNotFoundError, match=re.escape('pip install "trimask[speech]"') + ".*GPL-3"):
        list(speak([SIX]))


def test_tidy_trims_what_is_under_one_percent_and_scales_the_peak():
    quiet, loud = 0.9, 100.0
    samples = np.array([0, quiet, -quiet, 1.1, 0, -loud, 50, quiet, -1.1, quiet, 0], np.float32)
    expected = np.round(np.array([1.1, 0, -loud, 50, quiet, -1.1]) * 0.95 * 32767 / loud)
    np.testing.assert_array_equal(trim_and_normalise(samples), expected)


def test_silence_is_refused():
    with pytest.raises(ValueError, match="all 3 samples are silent"):
        trim_and_normalise(np.zeros(3, np.float32))
