"""Where raw examples come from: named sources with splits, each a sequence of texts paired with at most one medium.

A source is found by name in one literal table; the embedded dataset is the only kind so far.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np


@dataclass(frozen=True)
class RawExample:
    """An example before tokenisation.

    Media by modality: text is a str, image uint8 [height, width, channels], audio float32 [samples] in [-1, 1].
    """

    id: str
    media: dict[str, Any]
    given: int = 0
    """Characters of the text that are given when the example is asked as a question."""


@dataclass(frozen=True)
class Source:
    """Raw examples of one kind, by split."""

    name: str
    medium: str | None
    """What is paired with the text; None: text alone."""
    splits: tuple[str, ...]
    read: Callable[[str], Sequence[RawExample]]
    """Split → its examples."""


def open_source(name: str, folder: Path) -> Source:
    """The source called `kind/config`; `folder` is where it may keep what it builds or downloads."""
    kind, _, config = name.partition("/")
    if kind not in _KINDS:
        raise ValueError(f"unknown source {name!r}; it must start with one of {', '.join(f'{k}/' for k in _KINDS)}")
    return _KINDS[kind](config, folder)


def _digits(config: str, folder: Path) -> Source:
    """The embedded dataset."""
    from trimask.diffusion.data import digits  # TFDS takes seconds to import

    if config not in digits.CONFIGS:
        raise ValueError(f"unknown source digits/{config}; digits has {', '.join(digits.CONFIGS)}")
    features = digits.CONFIGS[config].features()
    medium = next((name for name in ("image", "audio") if name in features), None)

    def read(split: str) -> list[RawExample]:
        return [_from_record(record, medium) for record in digits.load(config, split, folder)]

    return Source(f"digits/{config}", medium, tuple(digits.CONFIGS[config].splits), read)


def _from_record(record: dict[str, Any], medium: str | None) -> RawExample:
    media: dict[str, Any] = {"text": record["text"]}
    given = record["text"].index("=") + 1 if medium is None else 0
    if medium == "image":
        media[medium] = np.asarray(record[medium], np.uint8)
    elif medium == "audio":
        media[medium] = np.asarray(record[medium], np.float32) / 32768
    return RawExample(record["id"], media, given)


_KINDS: dict[str, Callable[[str, Path], Source]] = {"digits": _digits}
