"""A small prepared dataset that needs no download, and a model that could be trained on it."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from trimask.diffusion.data import sources
from trimask.diffusion.data.layout import Fill
from trimask.diffusion.data.prepare import prepare
from trimask.diffusion.data.prepare_config import PrepareConfig
from trimask.diffusion.data.prepared import Prepared
from trimask.diffusion.data.records import Block, Entry, RawExample
from trimask.diffusion.data.sources import SourceConfig
from trimask.diffusion.pretraining.description import RunDescription, TrainConfig
from trimask.diffusion.pretraining.trained_model import LoadedRun
from trimask.diffusion.pretraining.training_step import Pretraining
from trimask.diffusion.sampling.generation_config import GenerationConfig
from trimask.diffusion.transformer import TransformerConfig
from trimask.tokenizers.audio import MelConfig
from trimask.tokenizers.image import PatchConfig


@dataclass(frozen=True)
class Synthetic:
    """20 training and 12 held-out examples of a kind, without any dataset."""

    kind: str
    fill: Fill = "whole"

    @property
    def medium(self) -> str | None:
        return {"drawn": "image", "spoken": "audio", "sums": None}[self.kind]

    def blocks(self, records: int) -> list[Block]:
        splits = {"train": range(20), "validation": range(20, 32), "test": range(32, 44)}
        return [Block(file=name, start=n.start, line=n.start + 1, count=len(n)) for name, n in splits.items()]

    def entries(self, block: Block) -> Iterator[Entry]:
        for number in range(block.start, block.start + block.count):
            load = partial(self._example, number)
            yield Entry(f"{number}", f"{self.kind} {block.file}", number + 1, load, block.file)

    def _example(self, number: int) -> RawExample:
        """Noise with a label, or a sum."""
        rng = np.random.default_rng(number)
        word = ("one", "two", "three")[number % 3]
        if self.kind == "drawn":
            return RawExample(f"{number}", {"text": word, "image": rng.integers(0, 256, (4, 6, 1), np.uint8)})
        if self.kind == "spoken":
            return RawExample(f"{number}", {"text": word, "audio": rng.uniform(-1, 1, 1200).astype(np.float32)})
        return RawExample(f"{number}", {"text": f"{number:02d}+{number:02d}={2 * number}"}, given_characters=6)


@pytest.fixture(scope="session", autouse=True)
def synthetic_source():
    """Sources of kind synthetic called drawn (image), spoken (audio) and sums (text) for every test."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sources.SOURCES, "synthetic", lambda where, _: Synthetic(where[0]))
        yield


@pytest.fixture(scope="session")
def prepared(tmp_path_factory, synthetic_source) -> Prepared:
    """The synthetic sources, prepared."""
    return prepare_all(tmp_path_factory.mktemp("prepared"))


def prepare_all(folder: Path) -> Prepared:
    """Prepares the synthetic sources."""
    config = PrepareConfig(
        sources={kind: SourceConfig(kind="synthetic", where=(kind,)) for kind in ("drawn", "spoken", "sums")},
        text_vocabulary=262,
        codecs={"image": PatchConfig(codebook_size=12), "audio": MelConfig(codebook_size=9)},
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sources.SOURCES, "synthetic", lambda where, _: Synthetic(where[0]))
        return prepare(folder, config)


@pytest.fixture(scope="session")
def loaded(prepared, tmp_path_factory):
    """An untrained model, whose temperature-1 answers are all but random, and data it could be trained on."""
    return untrained(prepared, tmp_path_factory.mktemp("run"))


def untrained(prepared: Prepared, folder: Path) -> LoadedRun:
    """An untrained model of prepared data."""
    train = TrainConfig(
        model=TransformerConfig(num_layers=1, width=16, num_heads=2, mlp_width=16),
        generation={name: GenerationConfig(steps=3) for name in ("text", "image", "audio")},
    )
    description = RunDescription(
        train=train,
        vocabulary=prepared.tokenizers.vocabulary,
        layouts={name: dataset.layout for name, dataset in prepared.manifest.datasets.items()},
        data=str(prepared.folder),
        data_fingerprint=prepared.fingerprint,
        num_steps=7,
        batch_tokens=1.0,
        kappa=1.0,
        optimizer=train.optimizer,
        epochs={},
        trimask="0",
        git_commit=None,
    )
    pretraining = Pretraining(train, description.vocabulary)
    parameters = pretraining.init().parameters
    return LoadedRun(folder, description, prepared.tokenizers, pretraining, parameters, 7)
