"""Streams of digits: a record is a function of its number, and none is like another."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from trimask.diffusion.data.prepare_config import PrepareConfig
from trimask.diffusion.data.readers import digits, speech, stream
from trimask.diffusion.data.readers.stream import STREAM_CONFIGS, Drawn, StreamSource
from trimask.diffusion.data.reading_config import FieldConfig, OpenConfig
from trimask.diffusion.data.sources import SourceConfig, open_source
from trimask.tokenizers.vocabulary import TEXT

CONFIG = OpenConfig(fields=FieldConfig(), media=PrepareConfig().media, folder=Path("nowhere"))


@pytest.fixture(autouse=True)
def spoken(monkeypatch):
    """In place of espeak-ng a tone of the utterance's pitch, which depends on the utterances before it."""

    def speak(utterances):
        asked.append(len(utterances))
        for place, utterance in enumerate(utterances):
            wave = np.sin(np.arange(18 * utterance.speed) * 2 * np.pi * (utterance.pitch + place) / 800)
            yield np.round(30_000 * wave).astype(np.int16)

    asked = []
    stream._spoken_block.cache_clear()
    monkeypatch.setattr(speech, "speak", speak)
    yield asked
    stream._spoken_block.cache_clear()


def records(name, splits=None, size=300):
    source = StreamSource.of(f"{name}:{size}")
    return [
        (block.file, entry.example())
        for block in source.blocks(100)
        if block.file in (splits or block.file) and block.start < size
        for entry in source.entries(block)
    ]


@pytest.mark.parametrize("name", STREAM_CONFIGS)
def test_a_record_is_a_function_of_its_number_whatever_was_read_before(name, spoken):
    every = {example.id: example for _, example in records(name, ["train"])}
    stream._spoken_block.cache_clear()
    source = StreamSource.of(f"{name}:300")
    medium = source.medium
    for block in reversed(source.blocks(100)[:3]):
        for entry in reversed(list(source.entries(block))):
            example = entry.example()
            np.testing.assert_array_equal(example.media[medium], every[example.id].media[medium])
            assert example.media[TEXT] == every[example.id].media[TEXT]
    assert set(spoken) <= {256} and len(every) == 300
    # A longer stream begins with the same records.
    longer = open_source(SourceConfig(kind="stream", where=(f"{name}:900",)), CONFIG)
    (entry, *_) = longer.entries(longer.blocks(900)[0])
    np.testing.assert_array_equal(entry.example().media[medium], every[f"{name}-train-0"].media[medium])


@pytest.mark.parametrize("name", STREAM_CONFIGS)
def test_no_medium_comes_twice_and_none_is_in_two_splits(name):
    seen = [example.content_digest(StreamSource.of(f"{name}:300").medium) for _, example in records(name)]
    assert len(seen) == 1200 and len(set(seen)) == len(seen)
    held_out = STREAM_CONFIGS[name].held_out
    assert {split for split, _ in records(name)} == {"train", "validation", "test", held_out}


def test_pictures_are_warps_of_their_digit_and_differ_from_it():
    config, draw = Drawn(), np.random.default_rng(0)
    images, _ = digits.handwritten_digits()
    as_they_are = Drawn(degrees=0.0, shear=0.0, scale=1.0, shift=0.0, stroke=1.0)
    for original in images[:20]:
        same, warped = as_they_are.warped(original, draw), config.warped(original, draw)
        # Each pixel is the mean of 9 points of a linear interpolation, so even this is smoother.
        assert np.corrcoef(same.reshape(-1), original.reshape(-1))[0, 1] > 0.95
        assert 0.2 < np.corrcoef(warped.reshape(-1), original.reshape(-1))[0, 1] < 0.995
        assert warped.dtype == np.uint8 and warped.shape == original.shape
    strokes = [
        dataclasses.replace(as_they_are, stroke=3.0).warped(images[0], np.random.default_rng(n)) for n in range(9)
    ]
    assert max(image.mean() for image in strokes) > 1.5 * min(image.mean() for image in strokes)


def test_originals_and_voices_of_the_last_split_are_in_no_other():
    train, held_out = stream._originals(False)[0], stream._originals(True)[0]
    assert not {image.tobytes() for image in train} & {image.tobytes() for image in held_out}
    config = STREAM_CONFIGS["spoken"]
    voices = [{u.voice for block in range(4) for u in config.utterances(which, block)} for which in (False, True)]
    assert voices[0] == set(digits.VOICES) and voices[1] == set(digits.HELD_OUT_VOICES[digits.TEST_VOICE])


def test_recordings_begin_and_last_and_sound_differently():
    audio = [example.media["audio"] for _, example in records("spoken", ["train"])]
    starts = [int(np.flatnonzero(np.abs(wave) > 1e-3)[0]) for wave in audio]
    peaks = [float(np.abs(wave).max()) for wave in audio]
    assert len(set(starts)) > 100 and min(starts) >= 0 and max(starts) <= 0.06 * 8000
    assert len({len(wave) for wave in audio}) > 150 and max(map(len, audio)) <= 0.6 * 8000
    assert 0.2 < min(peaks) < 0.3 and 0.85 < max(peaks) < 1.05
    assert all(wave.dtype == np.float32 for wave in audio)


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("drawn", "a stream is NAME:RECORDS, such as drawn:1000, got drawn"),
        ("drawn:many", "got drawn:many"),
        ("painted:10", "unknown stream 'painted'; there are drawn, spoken"),
        ("drawn:0", "a stream has 1 to 1,099,511,627,775 training records, got 0"),
    ],
)
def test_a_wrong_name_or_size_is_refused(where, message):
    with pytest.raises(ValueError, match=message):
        open_source(SourceConfig(kind="stream", where=(where,)), CONFIG)
