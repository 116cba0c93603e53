"""The embedded dataset of digits: its splits are disjoint as documented, captions are right, and builds agree."""

import collections
import hashlib
import itertools
import os
import re
import socket
import subprocess
import sys
from functools import cache

import numpy as np
import pytest
import tensorflow_datasets as tfds
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from trimask.diffusion.data.readers import digits, speech
from trimask.diffusion.data.readers.digits import DIGIT_CONFIGS, load_records, number_word
from trimask.diffusion.data.splits import SPLITS

PIXELS = load_digits().images
LABELS = load_digits().target.tolist()
PICTURES = ("handwritten", "handwritten_numbers")


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    return tmp_path_factory.mktemp("digits")


@pytest.fixture(scope="module")
def records(data_dir):
    """Function of a config and a split that gives their records, read once."""
    return cache(lambda config, split: list(load_records(config, split, data_dir)))


@pytest.fixture(scope="module")
def spoken(records):
    return {split: records("spoken", split) for split in DIGIT_CONFIGS["spoken"].splits}


def _content(record):
    return hashlib.sha256(record.get("image", record.get("audio")).tobytes()).hexdigest()


def _index(record_id):
    """Number at the end of a record's id: handwritten-0042 → 42."""
    return int(record_id.rpartition("-")[2])


# Handwritten


@pytest.mark.parametrize("split", SPLITS)
def test_handwritten_pictures_and_captions_are_those_of_scikit_learn(records, split):
    names = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
    for record in records("handwritten", split):
        index = _index(record["id"])
        assert record["image"].dtype == np.uint8
        assert np.array_equal(record["image"], np.round(PIXELS[index] * 255 / 16)[..., None])
        assert record["text"] == f"a handwritten {names[LABELS[index]]}"


def test_handwritten_splits_are_disjoint_and_stratified(records):
    indices = {split: [_index(r["id"]) for r in records("handwritten", split)] for split in SPLITS}
    everything = list(itertools.chain(*indices.values()))
    assert len(everything) == len(set(everything))
    for split, share in {"train": 0.7, "validation": 0.1, "test": 0.2}.items():
        counts = np.bincount([LABELS[index] for index in indices[split]]) / np.bincount(LABELS)
        # Classes hold about 180 pictures, and a few near-duplicates are dropped: up to nine of a class.
        np.testing.assert_allclose(counts, share, rtol=0, atol=0.06 if split == "train" else 0.015)


def test_near_duplicates_are_dropped_from_the_earlier_split(records):
    """A tenth and a fifth of the 1,797 pictures, of each digit, are held out."""
    assert [len(list(records("handwritten", split))) for split in SPLITS] == [1239, 176, 359]


def test_no_handwritten_picture_is_a_near_duplicate_of_one_in_another_split(records):
    flat = {
        split: np.stack([record["image"].ravel() for record in records("handwritten", split)]) * (16 / 255)
        for split in SPLITS
    }
    for a, b in itertools.combinations(SPLITS, 2):
        nearest = min(np.linalg.norm(flat[b] - picture, axis=1).min() for picture in flat[a])
        assert nearest >= digits.NEAR_DUPLICATE_DISTANCE - 0.1  # pictures are rounded to 255 levels


def test_only_near_duplicates_of_a_later_split_are_dropped(records):
    kept = {split: {_index(r["id"]) for r in records("handwritten", split)} for split in SPLITS}
    dropped = set(range(len(PIXELS))) - set.union(*kept.values())
    assert 5 < len(dropped) < 50
    held_out = sorted(kept["validation"] | kept["test"])
    for index in dropped:
        distances = np.sqrt(((PIXELS[held_out] - PIXELS[index]) ** 2).sum(axis=(1, 2)))
        assert distances.min() < digits.NEAR_DUPLICATE_DISTANCE


@pytest.mark.parametrize("split", SPLITS)
def test_handwritten_numbers_are_two_digits_of_the_same_split(records, split):
    of_split = {_index(record["id"]) for record in records("handwritten", split)}
    numbers = collections.Counter()
    for record in records("handwritten_numbers", split):
        _, left, right = record["id"].split("-")
        expected, number = np.zeros((8, 16)), LABELS[int(right)]
        expected[:, 8:] = PIXELS[int(right)]
        assert int(right) in of_split
        if left != "blank":
            assert int(left) in of_split
            expected[:, :8], number = PIXELS[int(left)], 10 * LABELS[int(left)] + number
            assert number >= 10
        assert np.array_equal(record["image"][..., 0], np.round(expected * 255 / 16))
        assert record["text"] == f"a handwritten {number_word(number)}"
        numbers[number] += 1
    assert numbers == dict.fromkeys(range(100), DIGIT_CONFIGS["handwritten_numbers"].copies[split])


@pytest.mark.parametrize("config", PICTURES)
def test_no_picture_occurs_twice(records, config):
    contents = [_content(record) for split in SPLITS for record in records(config, split)]
    assert len(contents) == len(set(contents))


# Spoken


@pytest.mark.parametrize("config", ["spoken", "spoken_numbers"])
def test_combinations_of_voice_and_speed_in_held_out_splits_are_not_in_train(config):
    combinations, voices, speeds = {}, {}, {}
    for split in DIGIT_CONFIGS[config].splits:
        utterances = DIGIT_CONFIGS[config].utterances(split)
        combinations[split] = {(utterance.voice, utterance.speed) for utterance in utterances}
        voices[split] = {utterance.voice for utterance in utterances}
        speeds[split] = {utterance.speed for utterance in utterances}
    assert {split: len(of) for split, of in combinations.items()} == {
        "train": 64,
        "validation": 4,
        "test": 12,
        "test_voice": 10,
    }
    for a, b in itertools.combinations(combinations, 2):
        assert not combinations[a] & combinations[b]
    for split in ("validation", "test"):
        assert voices[split] <= voices["train"]
    assert all(speeds[split] <= speeds["train"] for split in speeds)
    fresh = {utterance.voice for utterance in DIGIT_CONFIGS["fresh_voices"].utterances("test_fresh_voice")}
    held_out = voices["test_voice"] | fresh
    assert len(held_out) == 4 and not held_out & (voices["train"] | voices["validation"] | voices["test"])
    assert len(combinations["train"]) == 64 and len(combinations["test"]) == 12


@pytest.mark.parametrize("config", ["spoken", "spoken_numbers"])
def test_every_combination_of_voice_and_speed_has_every_word_at_different_pitches(config):
    for split in DIGIT_CONFIGS[config].splits:
        pitches = collections.defaultdict(set)
        for utterance in DIGIT_CONFIGS[config].utterances(split):
            pitches[utterance.voice, utterance.speed, utterance.text].add(utterance.pitch)
        assert all(len(of_word) == DIGIT_CONFIGS[config].takes for of_word in pitches.values())
        words = {number_word(number) for number in DIGIT_CONFIGS[config].numbers}
        heard = {(voice, speed) for voice, speed, _ in pitches}
        assert set(pitches) == {(*pair, word) for pair in heard for word in words}


def test_spoken_records_are_the_utterances_of_their_split(spoken):
    for split, records in spoken.items():
        planned = [utterance._asdict() for utterance in DIGIT_CONFIGS["spoken"].utterances(split)]
        assert [{name: record[name] for name in planned[0]} for record in records] == planned
    audios = speech.speak(DIGIT_CONFIGS["spoken"].utterances("validation"))
    for record, audio in zip(spoken["validation"], audios, strict=True):
        assert np.array_equal(record["audio"], audio)


def test_no_sound_occurs_twice(spoken):
    contents = [_content(record) for records in spoken.values() for record in records]
    assert len(contents) == len(set(contents)) == 1800


def test_spoken_words_are_loud_trimmed_and_short(spoken):
    for record in itertools.chain(*spoken.values()):
        loudness = np.abs(record["audio"].astype(np.int32))
        assert record["audio"].dtype == np.int16
        assert loudness.max() == 31129  # 95 % of 32767
        assert min(loudness[0], loudness[-1]) > 0.01 * 31129 - 1
        assert 0.15 < len(loudness) / 8000 < 0.6


def test_spoken_words_can_be_understood(spoken):
    """They are classified by a linear model of spectrograms, which is independent of every codec and model."""

    def spectrogram(audio):
        starts = np.linspace(0, len(audio) - 256, 24).astype(int)
        frames = np.stack([audio[start : start + 256] for start in starts]) / 32768 * np.hanning(256)
        energy = np.abs(np.fft.rfft(frames))[:, :128].reshape(24, 32, 4).mean(axis=2)
        return np.append(np.log(energy + 0.01), len(audio) / 8000)

    inputs = {split: np.stack([spectrogram(r["audio"]) for r in spoken[split]]) for split in spoken}
    words = {split: [record["text"] for record in spoken[split]] for split in spoken}
    judge = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=300))
    judge.fit(inputs["train"], words["train"])
    assert judge.score(inputs["test"], words["test"]) >= 0.99
    assert judge.score(inputs["test_voice"], words["test_voice"]) >= 0.95


def test_a_word_longer_than_allowed_is_refused():
    with pytest.raises(ValueError, match=r"seventy-seven.* lasts .* allowed are 0.1 s"):
        list(digits.Spoken(numbers=[77], takes=1, max_seconds=0.1).examples("validation"))


def test_without_espeak_the_error_names_the_extra(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "espeakng_loader", None)
    with pytest.raises(ModuleNotFoundError, match=re.escape('pip install "trimask[speech]"')):
        load_records("spoken", "train", tmp_path)


# Sums


@pytest.mark.parametrize(("config", "numbers"), [("sums", range(10, 100)), ("all_sums", range(100))])
def test_every_sum_occurs_once_and_is_right(config, numbers, records):
    seen = []
    for split in SPLITS:
        for record in records(config, split):
            a, b, total = map(int, re.fullmatch(r"(\d+)\+(\d+)=(\d+)", record["text"]).groups())
            assert a + b == total
            seen.append((a, b))
    assert sorted(seen) == list(itertools.product(numbers, repeat=2))


def test_a_sum_and_its_mirror_image_are_in_one_split(records):
    pairs = {
        split: {frozenset(re.split(r"[+=]", record["text"])[:2]) for record in records("sums", split)}
        for split in SPLITS
    }
    for a, b in itertools.combinations(SPLITS, 2):
        assert not pairs[a] & pairs[b]
    for split, share in {"train": 0.8, "validation": 0.05, "test": 0.15}.items():
        assert len(pairs[split]) == pytest.approx(share * 4095, abs=1)


# Building and reading


def test_a_fresh_process_builds_the_same_quietly_and_without_tensorflow(data_dir, tmp_path):
    """It builds handwritten digits and plans utterances; test_speech checks that it speaks a plan the same."""
    program = (
        "import pathlib, sys\n"
        "from trimask.diffusion.data.readers.digits import DIGIT_CONFIGS, load_records\n"
        "load_records('handwritten', 'train', pathlib.Path(sys.argv[1]))[0]\n"
        "assert 'tensorflow' not in sys.modules\n"
        "print(*DIGIT_CONFIGS['spoken'].utterances('test'), sep='\\n')\n"
    )
    environment = os.environ | {"PYTHONHASHSEED": "1"}
    command = [sys.executable, "-c", program, str(tmp_path)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    planned = "".join(f"{utterance}\n" for utterance in DIGIT_CONFIGS["spoken"].utterances("test"))
    assert (result.stderr, result.stdout) == ("", planned)
    for split in SPLITS:
        theirs = load_records("handwritten", split, tmp_path)
        for ours, other in zip(load_records("handwritten", split, data_dir), theirs, strict=True):
            assert ours.keys() == other.keys()
            assert all(np.array_equal(ours[name], other[name]) for name in ours)


def test_building_touches_no_network(monkeypatch, tmp_path):
    def refuse(*args):
        raise AssertionError(f"connects to {args[1:]}")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    quiet = []
    monkeypatch.setattr(digits.tfds, "disable_progress_bar", lambda: quiet.append(True))
    assert len(load_records("sums", "train", tmp_path)) == 6476 and quiet == [True]


def test_tfds_reads_the_same_records(data_dir):
    ours = load_records("handwritten", "test", data_dir)
    theirs = tfds.data_source("digits/handwritten", split="test", data_dir=data_dir)
    assert len(ours) == len(theirs)
    assert theirs[3]["text"].decode() == ours[3]["text"]
    np.testing.assert_array_equal(theirs[3]["image"], ours[3]["image"])
    descriptions = {config.name: config.description for config in tfds.builder_cls("digits").BUILDER_CONFIGS}
    assert descriptions == {name: config.__doc__ for name, config in DIGIT_CONFIGS.items()}


def test_records_are_a_sequence(data_dir):
    records = load_records("sums", "validation", data_dir)
    texts = [record["text"] for record in records]
    assert len(texts) == len(records)
    assert records[-1]["text"] == texts[-1] != texts[0] == records[0]["text"]
    with pytest.raises(IndexError):
        records[len(records)]


def test_an_interrupted_build_is_not_read_later(monkeypatch, tmp_path):
    def interrupted(self, split):
        yield {"id": "sum-0-0", "text": "0+0=0"}
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(digits.Sums, "examples", interrupted)
        with pytest.raises(KeyboardInterrupt):
            load_records("sums", "train", tmp_path)
    assert len(load_records("sums", "train", tmp_path)) == 6476


def test_a_build_that_fails_says_why(monkeypatch, tmp_path):
    def full(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr(digits.Sums, "examples", full)
    with pytest.raises(OSError, match="no space left"):
        load_records("sums", "train", tmp_path)


def test_of_two_builds_at_once_both_succeed(monkeypatch, tmp_path):
    original = digits.Sums.examples

    def overtaken(self, split):
        monkeypatch.setattr(digits.Sums, "examples", original)
        load_records("sums", split, tmp_path)
        return original(self, split)

    monkeypatch.setattr(digits.Sums, "examples", overtaken)
    assert len(load_records("sums", "train", tmp_path)) == 6476
    assert [path.name for path in tmp_path.glob("digits/sums/*")] == ["1.0.0"]


def test_unknown_configs_and_splits_are_told_the_known_ones(tmp_path):
    with pytest.raises(ValueError, match=r"no config 'letters', only handwritten, .*sums"):
        load_records("letters", "train", tmp_path)
    with pytest.raises(ValueError, match="no split 'test_voice', only train, validation, test"):
        load_records("sums", "test_voice", tmp_path)


@pytest.mark.parametrize(
    ("number", "word"),
    [
        *((0, "zero"), (7, "seven"), (10, "ten"), (13, "thirteen"), (19, "nineteen"), (20, "twenty")),
        *((21, "twenty-one"), (40, "forty"), (42, "forty-two"), (85, "eighty-five"), (99, "ninety-nine")),
    ],
)
def test_number_words_are_english(number, word):
    assert number_word(number) == word


def test_number_words_are_distinct_and_end_at_ninety_nine():
    assert len({number_word(number) for number in range(100)}) == 100
    for number in (-1, 100):
        with pytest.raises(ValueError, match=f"0 to 99, got {number}"):
            number_word(number)
