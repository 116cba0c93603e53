"""What holds for every test: shapes are checked; and a small prepared dataset that needs no download.

jaxtyping's hook (`--jaxtyping-packages` in pyproject.toml) lets beartype check every annotation at every
call; it costs nothing that can be measured. It leaves out the commands themselves, whose required
arguments tyro fills with a marker first. Tests run on one device, as a newcomer's machine does; a test that
needs several starts a process of its own with XLA_FLAGS=--xla_force_host_platform_device_count=8.
"""

from pathlib import Path

import numpy as np
import pytest

from trimask.diffusion.data import sources
from trimask.diffusion.data.prepare import PrepareConfig, Prepared, prepare
from trimask.diffusion.data.sources import RawExample, Source
from trimask.tokenizers.audio import MelConfig
from trimask.tokenizers.image import PatchConfig


def _raw_example(kind: str, number: int) -> RawExample:
    """Noise with a label, or a sum."""
    rng = np.random.default_rng(number)
    word = ("one", "two", "three")[number % 3]
    if kind == "drawn":
        return RawExample(f"{number}", {"text": word, "image": rng.integers(0, 256, (4, 6, 1), np.uint8)})
    if kind == "spoken":
        return RawExample(f"{number}", {"text": word, "audio": rng.uniform(-1, 1, 1200).astype(np.float32)})
    return RawExample(f"{number}", {"text": f"{number:02d}+{number:02d}={2 * number}"}, given=6)


def _synthetic(kind: str, _: Path) -> Source:
    """20 training and 12 held-out examples of a kind, without any dataset."""
    medium = {"drawn": "image", "spoken": "audio", "sums": None}[kind]
    splits = {"train": range(20), "validation": range(20, 32), "test": range(32, 44)}
    return Source(f"synthetic/{kind}", medium, tuple(splits), lambda s: [_raw_example(kind, n) for n in splits[s]])


@pytest.fixture(scope="session", autouse=True)
def synthetic_source():
    """Sources synthetic/drawn (image), synthetic/spoken (audio) and synthetic/sums (text) for every test."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sources._KINDS, "synthetic", _synthetic)
        yield


@pytest.fixture(scope="session")
def prepared(tmp_path_factory, synthetic_source) -> Prepared:
    """The synthetic sources, prepared."""
    config = PrepareConfig(
        sources={kind: f"synthetic/{kind}" for kind in ("drawn", "spoken", "sums")},
        text_vocabulary=262,
        image=PatchConfig(codebook_size=12),
        audio=MelConfig(codebook_size=9),
    )
    return prepare(tmp_path_factory.mktemp("prepared"), config)
