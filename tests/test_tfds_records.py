"""Any TFDS dataset as a source, with TFDS's own generator of fake records; no download, no TensorFlow."""

import numpy as np
import pytest
import tensorflow_datasets as tfds

from trimask.diffusion.data.plan import PrepareConfig
from trimask.diffusion.data.prepare import prepare
from trimask.diffusion.data.sources import SourceConfig


def config_of(name, **changes):
    return PrepareConfig(sources={"some": SourceConfig(kind="tfds", where=(name,))}, workers=1, **changes)


def test_a_dataset_of_pictures_and_labels_is_prepared(tmp_path):
    with tfds.testing.mock_data(num_examples=30):
        prepared = prepare(tmp_path, config_of("mnist"))
        raw = list(prepared.raw("some", "train"))
    dataset = prepared.dataset("some")
    assert dataset.medium == "image" and dataset.layout.shapes["image"] == [14, 14]
    assert raw[0].media["image"].shape == (28, 28, 1)
    assert {example.media["text"] for example in raw} <= {str(digit) for digit in range(10)}
    texts = prepared.tokenizers.decode("text", [e["text"] for e in prepared.examples("some", "train")])
    assert texts == [example.media["text"] for example in raw]


def test_a_dataset_of_text_alone_is_prepared(tmp_path):
    with tfds.testing.mock_data(num_examples=40):
        prepared = prepare(tmp_path, config_of("imdb_reviews", text_vocabulary=258))
    dataset = prepared.dataset("some")
    assert dataset.medium is None and dataset.layout.fill == "none"
    assert dataset.records % 40 == 0 and np.all(prepared.lengths("some", "train") <= 256)


def test_an_unknown_dataset_and_one_that_is_not_there_are_refused(tmp_path):
    with pytest.raises(ValueError, match="TFDS has no dataset 'mnits'"):
        prepare(tmp_path / "x", config_of("mnits"))
    with pytest.raises(ValueError, match="--download lets TFDS fetch"):
        prepare(tmp_path / "y", config_of("mnist", tfds_folder=str(tmp_path)))
