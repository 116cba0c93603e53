"""Streams of digits that never repeat a picture or a recording, for studies that fresh data makes clean.

A record is a pure function of its config and its number:

drawn    one of scikit-learn's 8×8 digits, warped anew: rotated, sheared, scaled, shifted and with a stroke of another
         width, all drawn from continuous ranges. Most of the pictures that other presets train on are the originals,
         of which there are 1,239.
spoken   a digit, spoken by espeak-ng at a speed and pitch of its own, and then played at another rate, another loudness
         and with silence before it. The bytes of an utterance depend on the utterances before it in the same process,
         so each block of 256 records is spoken by a process of its own.

Splits differ in their numbers. `train`, `validation` and `test` have the same originals and voices; `test_original` has
originals that no other split has, and `test_voice` voices. scikit-learn does not say who wrote a digit, so a writer of
an original of `test_original` may have written others.
"""

import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType

import numpy as np
import soxr
from jaxtyping import UInt8
from scipy.ndimage import map_coordinates

from trimask.diffusion.data.layout import Fill
from trimask.diffusion.data.readers import digits, speech
from trimask.diffusion.data.readers.lines import blocks_of_split
from trimask.diffusion.data.records import Block, Entry, RawExample
from trimask.diffusion.data.splits import TEST, TRAIN, VALIDATION, held_out_split
from trimask.tokenizers.vocabulary import TEXT

TEST_ORIGINAL = held_out_split("original")
_BLOCK = 256
"""Number of utterances that one process of espeak-ng speaks."""
_FIRST = {TRAIN: 0, VALIDATION: 1 << 40, TEST: 2 << 40, TEST_ORIGINAL: 3 << 40, digits.TEST_VOICE: 4 << 40}
"""Split → number of its first record. All are multiples of the block's size."""


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """Digits warped anew: "a handwritten seven"."""

    medium = "image"
    held_out = TEST_ORIGINAL
    seed: int = 0
    degrees: float = 15.0
    """Largest rotation, to either side."""
    shear: float = 0.25
    """Largest shift of a row by its height, and of a column by its width."""
    scale: float = 1.15
    """Largest factor of height and of width, and of their inverses."""
    shift: float = 0.75
    """Largest shift in pixels of the original, to every side."""
    stroke: float = 1.6
    """Largest exponent of brightness, and of its inverse: above 1 strokes are thinner."""

    def parts(self) -> digits.Parts:
        return digits.Parts("originals, warped anew each time", len(_originals(False)[0]), 1)

    def load(self, split: str, number: int) -> RawExample:
        """The record of this number."""
        draw = np.random.default_rng([self.seed, 0, number])
        originals, labels = _originals(split == TEST_ORIGINAL)
        chosen = int(draw.integers(len(originals)))
        image = self.warped(originals[chosen], draw)
        text = f"a handwritten {digits.number_word(labels[chosen])}"
        return RawExample(f"drawn-{split}-{number}", {TEXT: text, "image": image[..., None]})

    def warped(
        self, original: UInt8[np.ndarray, "side side"], draw: np.random.Generator
    ) -> UInt8[np.ndarray, "side side"]:
        """A random warp of a picture with values 0 to 16, with values 0 to 255; every pixel is the mean of 9 points."""
        angle, shear_rows, shear_columns = draw.uniform(-1, 1, 3) * (np.deg2rad(self.degrees), self.shear, self.shear)
        scales, shifts = self.scale ** draw.uniform(-1, 1, 2), draw.uniform(-self.shift, self.shift, 2)
        exponent = self.stroke ** draw.uniform(-1, 1)
        rotation = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
        matrix = rotation @ np.array([[1, shear_rows], [shear_columns, 1]]) @ np.diag(1 / scales)
        side = len(original)
        points = (np.stack(np.meshgrid(*[np.arange(3 * side)] * 2, indexing="ij")).reshape(2, -1) + 0.5) / 3 - 0.5
        centre = (side - 1) / 2
        sources = matrix @ (points - centre - shifts[:, None]) + centre
        values = map_coordinates(original / 16.0, sources, order=1, cval=0.0)
        pixels = (values**exponent).reshape(side, 3, side, 3).mean(axis=(1, 3))
        return np.round(255 * pixels).astype(np.uint8)


@dataclass(frozen=True, kw_only=True)
class SpokenAnew:
    """Digits spoken anew: "seven"."""

    medium = "audio"
    held_out = digits.TEST_VOICE
    seed: int = 0
    speeds: tuple[int, int] = (160, 221)
    """Range of words per minute: the lowest, and one above the highest."""
    pitches: tuple[int, int] = (30, 70)
    """Range of espeak-ng's pitch: the lowest, and one above the highest."""
    rate: float = 1.08
    """Largest factor at which a recording is played faster, and slower."""
    decibels: float = 12.0
    """Largest loss of loudness."""
    silence: float = 0.05
    """Longest silence before the word, in seconds."""
    max_seconds: float = 0.6
    """Length at which a recording is cut off."""

    def parts(self) -> digits.Parts:
        return digits.Parts("pairs of a word and a voice, spoken anew each time", 10 * len(digits.VOICES), 1)

    def load(self, split: str, number: int) -> RawExample:
        """The record of this number."""
        draw = np.random.default_rng([self.seed, 1, number])
        block, place = divmod(number, _BLOCK)
        utterances, audio = _spoken_block(self, split == digits.TEST_VOICE, block)
        samples = audio[place].astype(np.float32) / 32768
        rate = self.rate ** draw.uniform(-1, 1)
        samples = soxr.resample(samples, speech.SAMPLE_RATE_HZ * rate, speech.SAMPLE_RATE_HZ)
        samples = samples * 10 ** (-self.decibels / 20 * draw.random())
        before = round(draw.random() * self.silence * speech.SAMPLE_RATE_HZ)
        most = round(self.max_seconds * speech.SAMPLE_RATE_HZ)
        padded = np.concatenate([np.zeros(before, np.float32), samples.astype(np.float32)])[:most]
        return RawExample(f"spoken-{split}-{number}", {TEXT: utterances[place].text, "audio": padded})

    def utterances(self, is_held_out: bool, block: int) -> list[speech.Utterance]:
        """Utterances of a block of records, which one process speaks."""
        draw = np.random.default_rng([self.seed, 2, block])
        voices = digits.HELD_OUT_VOICES[digits.TEST_VOICE] if is_held_out else digits.VOICES
        return [
            speech.Utterance(
                digits.number_word(int(draw.integers(10))),
                voices[int(draw.integers(len(voices)))],
                int(draw.integers(*self.speeds)),
                int(draw.integers(*self.pitches)),
            )
            for _ in range(_BLOCK)
        ]


@functools.lru_cache(maxsize=4)
def _spoken_block(config: SpokenAnew, is_held_out: bool, block: int) -> tuple[list[speech.Utterance], list[np.ndarray]]:
    utterances = config.utterances(is_held_out, block)
    return utterances, list(speech.speak(utterances))


@functools.cache
def _originals(is_held_out: bool) -> tuple[UInt8[np.ndarray, "picture 8 8"], list[int]]:
    """Originals of the split `test` of the embedded digits, or of its split `train`, and the digit of each."""
    images, labels = digits.handwritten_digits()
    chosen = digits.handwritten_split()[TEST if is_held_out else TRAIN]
    return images[chosen], [labels[index] for index in chosen]


STREAM_CONFIGS: Mapping[str, Drawn | SpokenAnew] = MappingProxyType({"drawn": Drawn(), "spoken": SpokenAnew()})
"""Config of a stream, by name."""
_HELD_OUT = {VALIDATION: 40_960, TEST: 4_096}
"""Split → number of its records; that of `test_original` and `test_voice` is that of `test`."""


@dataclass(frozen=True)
class StreamSource:
    """Source of the first records of a stream."""

    name: str
    """Name of the config in `STREAM_CONFIGS`."""
    size: int
    """Number of records of the split `train`."""
    fill: Fill = "whole"

    def __post_init__(self):
        if self.name not in STREAM_CONFIGS:
            raise ValueError(f"unknown stream {self.name!r}; there are {', '.join(STREAM_CONFIGS)}")
        if not 1 <= self.size < _FIRST[VALIDATION]:
            raise ValueError(f"a stream has 1 to {_FIRST[VALIDATION] - 1:,} training records, got {self.size}")

    @classmethod
    def of(cls, where: str) -> "StreamSource":
        """The source of a config's name and a number of training records, such as drawn:65536."""
        name, _, size = where.partition(":")
        if not size.isdecimal():
            raise ValueError(f"a stream is NAME:RECORDS, such as drawn:1000, got {where}")
        return cls(name, int(size))

    @property
    def medium(self) -> str:
        return STREAM_CONFIGS[self.name].medium

    def blocks(self, records: int) -> list[Block]:
        sizes = {TRAIN: self.size, **_HELD_OUT, STREAM_CONFIGS[self.name].held_out: _HELD_OUT[TEST]}
        return [block for split, size in sizes.items() for block in blocks_of_split(split, size, records)]

    def entries(self, block: Block) -> Iterator[Entry]:
        config, split = STREAM_CONFIGS[self.name], block.file
        for index in range(block.start, block.start + block.count):
            load = partial(config.load, split, _FIRST[split] + index)
            yield Entry(f"{self.name}-{split}-{index}", f"{self.name} {split}", index + 1, load, split)
