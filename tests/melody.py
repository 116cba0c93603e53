"""A third modality for the tests: tunes, as lines of numbers, which a codec rounds to semitones.

It has the parts that every new modality needs: a codec, a reader, and an entry in each of two tables, which
tests/test_modalities.py adds while it runs.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from PIL import Image

from trimask.diffusion.data.modalities import Modality
from trimask.scripts.output.presentation import Presentation
from trimask.tokenizers.codec import StoredTokenizer


@dataclass(frozen=True, kw_only=True)
class MelodyConfig:
    """Configuration of the codec of tunes."""

    notes: int = 12
    """Number of different notes."""
    voices: int = 2
    """Number of notes that sound at the same time."""


class MelodyCodec(StoredTokenizer):
    """Notes in [0, 1) ↔ codes [steps, voices], each voice with a codebook."""

    kind: ClassVar[str] = "melody"
    modality: ClassVar[str] = "melody"
    config_type = MelodyConfig

    def __init__(self, config: MelodyConfig):
        self.config = config

    @property
    def codebook_sizes(self) -> tuple[int, ...]:
        return (self.config.notes,) * self.config.voices

    def encode(self, media: np.ndarray) -> np.ndarray:
        return np.minimum(media * self.config.notes, self.config.notes - 1).astype(np.int32)

    def decode(self, codes: np.ndarray) -> np.ndarray:
        return ((codes + 0.5) / self.config.notes).astype(np.float32)

    def code_shape(self, media_shape: tuple[int, ...]) -> tuple[int, ...]:
        return media_shape

    def media_shape(self, code_shape: tuple[int, ...]) -> tuple[int, ...]:
        return code_shape

    @classmethod
    def _from_files(cls, config: MelodyConfig, content: dict[str, Any]) -> "MelodyCodec":
        return cls(config)

    @property
    def _content(self) -> dict[str, np.ndarray | str]:
        return {}


def read(path: Path, config: Any) -> np.ndarray:
    """Tune of a file, whose lines have one number per voice. Raises ValueError for another number of voices."""
    rows = [list(map(float, line.split())) for line in path.read_text().splitlines()]
    tune = np.array(rows, np.float32).reshape(len(rows), -1)
    if tune.shape[1] != config.codecs["melody"].voices:
        raise ValueError(f"{path}: a line must have {config.codecs['melody'].voices} notes, got {tune.shape[1]}")
    return tune


def write(path: Path, tune: np.ndarray, codec: Any) -> None:
    path.write_text("".join(" ".join(f"{note:.3f}" for note in row) + "\n" for row in tune))


def draw(codes: np.ndarray, codec: Any) -> Image.Image:
    """Picture with a column per step and a row per voice; unknown notes are black."""
    return Image.fromarray(((codes.T + 1) * 15).astype(np.uint8)).convert("RGB").resize((8 * len(codes), 16))


def rises(tunes, references) -> list[bool]:
    """Judge: whether each tune rises or falls as its text says."""
    pairs = zip(tunes, references, strict=True)
    return [bool(tune[-1, 0] > tune[0, 0]) == (reference["text"] == "up") for tune, reference in pairs]


MODALITY = Modality(
    codec_config=MelodyConfig,
    read=read,
    dataset_shapes=lambda samples, config, reused: {name: list(sample[0].shape) for name, sample in samples.items()},
    to_shape=lambda tune, shape, config: np.resize(tune, shape),
    fit_codec=lambda batches, config: MelodyCodec(config),
)
OUTPUT = Presentation(ending="tune", write=write, draw=draw)
