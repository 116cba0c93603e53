"""The embedded dataset `digits`: real handwritten digits, synthetic speech and sums, for TFDS.

`load_records(config, split, data_dir)` gives random access to the records of one config of `DIGIT_CONFIGS`, and builds
it on first use, without the network. Every record has an `id` and a `text`; pictures have an `image` (uint8, height ×
width × 1) as well, sounds an `audio` (int16, 8 kHz mono). The same VERSION gives the same records in the same order,
bit for bit; the files may differ, because protobuf does not fix the order of a record's fields.

Held-out records, in the splits `validation` and `test`:

    handwritten, handwritten_numbers   pictures: 10 % and 20 % of each class. A picture whose distance from one of a
                                       later split (train < validation < test) is less than
                                       `NEAR_DUPLICATE_DISTANCE` is dropped.
    spoken, spoken_numbers             combinations of voice and speed: each voice lacks one speed in train.
                                       `test_voice` holds voices that no other split has.
    fresh_voices                       all, in the split `test_fresh_voice`: two further voices.
    sums, all_sums                     operand pairs, 5 % and 15 %, unordered: a+b and b+a are in one split.
"""

import functools
import io
import itertools
import logging
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple, TypeVar

import numpy as np
import PIL.Image
import tensorflow_datasets as tfds
from jaxtyping import UInt8
from sklearn.datasets import load_digits
from sklearn.metrics.pairwise import euclidean_distances

from trimask.diffusion.data.readers import speech
from trimask.diffusion.data.splits import SPLITS, TEST, TRAIN, VALIDATION, held_out_split
from trimask.tokenizers.storage.files import written_to

# Pillow decodes these pictures well enough; TFDS would recommend OpenCV in the middle of a progress bar.
logging.getLogger("absl").addFilter(lambda record: "OpenCV" not in record.getMessage())

_Item = TypeVar("_Item")


class Parts(NamedTuple):
    """What training records are made of, if several have some in common."""

    what: str
    number: int
    """Number of different ones."""
    per_record: float
    """Mean number in a record."""


DigitRecord = dict[str, Any]
"""Field → its value: str, int, or a NumPy array."""

NEAR_DUPLICATE_DISTANCE = 11.0
"""Euclidean distance below which two 8×8 pictures with values 0 to 16 count as duplicates: 1.4 grey levels per pixel,
two thirds of the median distance from a picture to its nearest neighbour."""

VOICES = (
    *("en-us", "en", "en-gb-scotland", "en-029", "en-us+m1", "en+m2", "en-gb-scotland+m3", "en-us-nyc+m5"),
    *("en-gb-x-rp+m6", "en-us+m7", "en+m8", "en-gb-x-gbclan+m4", "en-us+f1", "en+f2", "en-gb-scotland+f3"),
    "en-gb-x-rp+f5",
)
"""Voices of the splits train, validation and test, by espeak-ng's names."""
TEST_VOICE, TEST_FRESH_VOICE = held_out_split("voice"), held_out_split("fresh_voice")
HELD_OUT_VOICES = {TEST_VOICE: ("en-us+Annie", "en+edward"), TEST_FRESH_VOICE: ("en-us+robert", "en+steph")}
"""Split → voices that no other split has. Those of the second split are for evidence that no choice has been made by:
they were drawn at random among 48 variants with the names of people, until two spoke fast enough."""
SPEEDS = (160, 175, 190, 205, 220)
"""Speeds of speech in words per minute."""


@dataclass(frozen=True, kw_only=True)
class Handwritten:
    """scikit-learn's 8×8 digits, written by 43 people: "a handwritten seven"."""

    splits = SPLITS

    def features(self) -> dict[str, Any]:
        return {"image": tfds.features.Image(shape=(8, 8, 1))}

    def examples(self, split: str) -> Iterator[DigitRecord]:
        images, labels = handwritten_digits()
        for index in handwritten_split()[split]:
            yield {
                "id": f"handwritten-{index:04d}",
                "image": _png(images[index]),
                "text": f"a handwritten {number_word(labels[index])}",
            }


@dataclass(frozen=True, kw_only=True)
class HandwrittenNumbers:
    """Two digits of one split side by side, 8×16: "a handwritten forty-two".

    All numbers from zero to ninety-nine, equally often; below ten the left half is blank. No picture occurs twice.
    """

    copies: Mapping[str, int]
    """Split → number of pictures of each number."""
    splits = SPLITS

    def parts(self) -> Parts:
        return Parts("pictures of one digit", len(handwritten_split()[TRAIN]), 1.9)

    def features(self) -> dict[str, Any]:
        return {"image": tfds.features.Image(shape=(8, 16, 1))}

    def examples(self, split: str) -> Iterator[DigitRecord]:
        images, labels = handwritten_digits()
        indices = handwritten_split()[split]
        of_digit = [[index for index in indices if labels[index] == digit] for digit in range(10)]
        for number in range(100):
            tens, ones = divmod(number, 10)
            pairs = list(itertools.product(of_digit[tens] if tens else [None], of_digit[ones]))
            for left, right in random.Random(f"{split} {number}").sample(pairs, self.copies[split]):
                blank_or_left = np.zeros_like(images[right]) if left is None else images[left]
                yield {
                    "id": f"handwritten-{'blank' if left is None else f'{left:04d}'}-{right:04d}",
                    "image": _png(np.concatenate([blank_or_left, images[right]], axis=1)),
                    "text": f"a handwritten {number_word(number)}",
                }


@dataclass(frozen=True, kw_only=True)
class Spoken:
    """Number words spoken by espeak-ng, `takes` times for every combination of voice and speed: "seven"."""

    numbers: Sequence[int]
    """Numbers that are spoken."""
    takes: int
    """Number of utterances of each word per combination, each with a pitch from its own part of the range."""
    max_seconds: float
    """Largest length of an utterance in seconds; a longer one is an error, since models of this data rely on it."""
    pitches: tuple[int, int] = (30, 70)
    """Range of espeak-ng's pitch: the lowest, and one above the highest."""
    splits: Sequence[str] = (*SPLITS, TEST_VOICE)

    def features(self) -> dict[str, Any]:
        return {
            # Not features.Audio, which needs TensorFlow.
            "audio": tfds.features.Tensor(shape=(None,), dtype=np.int16),
            "voice": tfds.features.Text(),
            "speed": tfds.features.Scalar(np.int32),
            "pitch": tfds.features.Scalar(np.int32),
        }

    def examples(self, split: str) -> Iterator[DigitRecord]:
        utterances = self.utterances(split)
        for utterance, audio in zip(utterances, speech.speak(utterances), strict=True):
            if len(audio) > self.max_seconds * speech.SAMPLE_RATE_HZ:
                seconds = len(audio) / speech.SAMPLE_RATE_HZ
                raise ValueError(f"{utterance} lasts {seconds:.2f} s, allowed are {self.max_seconds} s")
            yield {"id": "-".join(map(str, utterance)), "audio": audio, **utterance._asdict()}

    def utterances(self, split: str) -> list[speech.Utterance]:
        """Utterances of a split in order, with pitches drawn by voice, speed, word and take."""
        low, high = self.pitches
        width = (high - low) // self.takes
        return [
            speech.Utterance(word, voice, speed, low + take * width + random.Random(key).randrange(width))
            for voice, speed in voices_and_speeds(split)
            for word in map(number_word, self.numbers)
            for take in range(self.takes)
            for key in [f"{voice} {speed} {word} {take}"]
        ]


@dataclass(frozen=True, kw_only=True)
class Sums:
    """All sums of two numbers: "47+38=85"."""

    numbers: Sequence[int]
    """Numbers that are added."""
    splits = SPLITS

    def features(self) -> dict[str, Any]:
        return {}

    def examples(self, split: str) -> Iterator[DigitRecord]:
        pairs = list(itertools.combinations_with_replacement(self.numbers, 2))
        for pair in _divide(pairs, "sums", validation=0.05, test=0.15)[split]:
            for a, b in sorted({pair, pair[::-1]}):
                yield {"id": f"sum-{a}-{b}", "text": f"{a}+{b}={a + b}"}


DIGIT_CONFIGS: Mapping[str, Handwritten | HandwrittenNumbers | Spoken | Sums] = MappingProxyType(
    {
        "handwritten": Handwritten(),
        "handwritten_numbers": HandwrittenNumbers(copies={TRAIN: 40, VALIDATION: 5, TEST: 10}),
        "spoken": Spoken(numbers=range(10), takes=2, max_seconds=0.6),
        "fresh_voices": Spoken(numbers=range(10), takes=2, max_seconds=0.6, splits=(TEST_FRESH_VOICE,)),
        "spoken_numbers": Spoken(numbers=range(100), takes=1, max_seconds=1.2),
        # Two-digit numbers only: one-digit numbers shift every digit to another position, which makes sums much harder.
        "sums": Sums(numbers=range(10, 100)),
        "all_sums": Sums(numbers=range(100)),
    }
)
"""Config of the dataset, by name."""


class Digits(tfds.core.GeneratorBasedBuilder):
    """TFDS builder of the dataset; the module's docstring describes it."""

    VERSION = tfds.core.Version("1.0.0")
    # Nothing is downloaded, and TFDS would not find the checksums of a package without __init__.
    url_infos = None
    BUILDER_CONFIGS = [  # noqa: RUF012 (as TFDS declares it)
        tfds.core.BuilderConfig(name=name, description=config.__doc__) for name, config in DIGIT_CONFIGS.items()
    ]

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description=__doc__,
            features=tfds.features.FeaturesDict(
                {"id": tfds.features.Text(), "text": tfds.features.Text(), **self._config.features()}
            ),
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Any]:
        return {split: self._generate_examples(split) for split in self._config.splits}

    def _generate_examples(self, split: str) -> Iterator[tuple[int, DigitRecord]]:
        return enumerate(self._config.examples(split))

    @property
    def _config(self) -> Handwritten | HandwrittenNumbers | Spoken | Sums:
        return DIGIT_CONFIGS[self.builder_config.name]

    def _log_download_bytes(self) -> None:
        """Prints nothing, where TFDS would announce a download of 0 bytes amid the caller's progress bar."""

    def _log_download_done(self) -> None:
        """Prints nothing, where TFDS would announce the end of the download."""


@dataclass(frozen=True)
class _Records(Sequence[DigitRecord]):
    """A TFDS data source whose strings are str, where TFDS gives bytes."""

    source: Sequence[DigitRecord]

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> DigitRecord:  # type: ignore[override]
        record = self.source[range(len(self.source))[index]]  # the range raises IndexError, which ends a loop
        return {name: value.decode() if isinstance(value, bytes) else value for name, value in record.items()}


def load_records(config: str, split: str, data_dir: Path) -> Sequence[DigitRecord]:
    """Random access to the records of a split; builds the config under `data_dir` if it is missing.

    It is built in a folder beside the final one, which is renamed when complete, so an interrupted build is never read.
    Raises ValueError for an unknown config or split.
    """
    if config not in DIGIT_CONFIGS:
        raise ValueError(f"digits has no config {config!r}, only {', '.join(DIGIT_CONFIGS)}")
    if split not in DIGIT_CONFIGS[config].splits:
        raise ValueError(f"digits/{config} has no split {split!r}, only {', '.join(DIGIT_CONFIGS[config].splits)}")
    builder = Digits(config=config, data_dir=data_dir, file_format="array_record")
    if not builder.data_path.exists():
        tfds.disable_progress_bar()  # would garble the caller's
        try:
            with written_to(builder.data_path):
                builder.download_and_prepare()
        except OSError:
            # Another process has built the same meanwhile; its folder cannot be replaced by a rename, and is as good.
            if not builder.data_path.exists():
                raise
            return load_records(config, split, data_dir)
    return _Records(builder.as_data_source(split=split))


def number_word(number: int) -> str:
    """English word of a number from 0 to 99: "zero", "forty-two". Raises ValueError for any other number."""
    if not 0 <= number < 100:
        raise ValueError(f"number must be 0 to 99, got {number}")
    if number < 20:
        return _BELOW_TWENTY[number]
    tens, ones = divmod(number, 10)
    return _TENS[tens - 2] + (f"-{_BELOW_TWENTY[ones]}" if ones else "")


_BELOW_TWENTY = (
    *("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"),
    *("ten", "eleven", "twelve", "thirteen", "fourteen"),
    *("fifteen", "sixteen", "seventeen", "eighteen", "nineteen"),
)
_TENS = ("twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")


def voices_and_speeds(split: str) -> list[tuple[str, int]]:
    """Combinations of voice and speed in a split.

    Voice number i is held out at speed number i mod 5: every fourth for `validation`, the others for `test`. That makes
    64, 4 and 12 combinations, and leaves every voice and every speed in train.
    """
    if split in HELD_OUT_VOICES:
        return list(itertools.product(HELD_OUT_VOICES[split], SPEEDS))
    held_out = {
        (voice, SPEEDS[index % len(SPEEDS)]): VALIDATION if index % 4 == 3 else TEST
        for index, voice in enumerate(VOICES)
    }
    return [pair for pair in itertools.product(VOICES, SPEEDS) if held_out.get(pair, TRAIN) == split]


@functools.cache
def handwritten_digits() -> tuple[UInt8[np.ndarray, "picture 8 8"], list[int]]:
    """scikit-learn's 1,797 pictures, with values 0 to 16, and the digit of each."""
    digits = load_digits()
    return digits.images.astype(np.uint8), digits.target.tolist()


@functools.cache
def handwritten_split() -> dict[str, list[int]]:
    """Split → indices of its pictures, without near-duplicates of pictures in a later split."""
    images, labels = handwritten_digits()
    splits: dict[str, list[int]] = {split: [] for split in SPLITS}
    for digit in range(10):
        of_digit = [index for index, label in enumerate(labels) if label == digit]
        for split, indices in _divide(of_digit, f"handwritten {digit}", validation=0.1, test=0.2).items():
            splits[split] += indices
    flat = images.reshape(len(images), -1).astype(np.float64)
    later: list[int] = []
    for split in reversed(SPLITS):
        if later:
            nearest = euclidean_distances(flat[splits[split]], flat[later]).min(axis=1)
            splits[split] = [
                index for index, near in zip(splits[split], nearest, strict=True) if near >= NEAR_DUPLICATE_DISTANCE
            ]
        later += splits[split]
    return {split: sorted(indices) for split, indices in splits.items()}


def _divide(items: Sequence[_Item], seed: str, *, validation: float, test: float) -> dict[str, list[_Item]]:
    """Split → its share of the shuffled items; the rest is the training split."""
    shuffled = random.Random(seed).sample(items, len(items))
    a = round(validation * len(items))
    b = a + round(test * len(items))
    return {TRAIN: shuffled[b:], VALIDATION: shuffled[:a], TEST: shuffled[a:b]}


def _png(picture: UInt8[np.ndarray, "height width"]) -> io.BytesIO:
    """PNG file of a picture with values 0 to 16, scaled to 0 to 255; TFDS would need TensorFlow to write it."""
    file = io.BytesIO()
    PIL.Image.fromarray(np.round(picture * (255 / 16)).astype(np.uint8)).save(file, "PNG")
    file.seek(0)
    return file
