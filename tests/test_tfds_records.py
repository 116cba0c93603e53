"""TFDS datasets as sources, with fake records by TFDS's own generator, without download or TensorFlow."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tensorflow_datasets as tfds

from trimask.diffusion.data.prepare import prepare
from trimask.diffusion.data.prepare_config import PrepareConfig
from trimask.diffusion.data.readers import digits, tfds_records
from trimask.diffusion.data.readers.tfds_records import EmbeddedDigits
from trimask.diffusion.data.reading_config import FieldConfig
from trimask.diffusion.data.sources import SourceConfig
from trimask.tokenizers.audio import MelConfig


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


class MadeUp(SimpleNamespace):
    """Stand-in for a TFDS builder."""

    __class__ = tfds.core.DatasetBuilder


def test_a_record_is_a_text_and_the_mean_of_its_channels_and_what_has_neither_is_refused(monkeypatch):
    """With a stand-in for the builder, because TFDS needs TensorFlow to write sounds."""
    sound = tfds.features.Tensor(shape=(None,), dtype=np.int16)
    sound.sample_rate = 16_000
    features = {
        "caption": tfds.features.Text(),
        "label": tfds.features.ClassLabel(names=["low", "high"]),
        "sound": sound,
    }
    records = [
        {"caption": caption, "label": number % 2, "sound": np.full((samples, 2), (8192, 16384), np.int16)}
        for number, (caption, samples) in enumerate([("a", 3200), ("b", 0), (" ", 3200)])
    ]
    records.append({"caption": "c", "label": 1, "sound": np.full((3200, 2), (8192, -8192), np.int16)})
    info = SimpleNamespace(features=features, splits={"train": 4})
    builder = MadeUp(info=info, as_data_source=lambda split: records)
    monkeypatch.setattr(tfds, "builder", lambda *_, **__: builder)

    def entries(text):
        config = config_of("labels", fields=FieldConfig(text=text))
        source = config.open_source("some", Path())
        return list(source.entries(source.blocks(10)[0]))

    first, without_sound, without_text, without_mean = entries("caption")
    media = first.example().media
    assert media["text"] == "a"
    assert len(media["audio"]) == pytest.approx(3200 * MelConfig().sample_rate_hz / 16_000, abs=1)
    assert media["audio"][len(media["audio"]) // 2] == pytest.approx((0.25 + 0.5) / 2, abs=0.02)
    with pytest.raises(ValueError, match="holds no sound, its length is zero"):
        without_sound.example()
    with pytest.raises(ValueError, match="its 'caption' is empty"):
        without_text.example()
    with pytest.raises(ValueError, match="its 2 channels cancel each other in 100% of the sound"):
        without_mean.example()
    assert [entry.example().media["text"] for entry in entries("label")[:3:2]] == ["low", "low"]
    info.features = {"sound": sound}
    with pytest.raises(
        ValueError, match="dataset 'labels' has no text feature 'name'; its features of text or labels are none"
    ):
        entries("name")
    info.features = {"other": features["caption"], "sound": sound}
    with pytest.raises(
        ValueError, match=r"no text feature 'name'; its features of text or labels are other; choose one"
    ):
        entries("name")


def test_a_dataset_is_downloaded_only_if_that_is_configured(monkeypatch, tmp_path):
    fetched: list[str] = []
    info = SimpleNamespace(features={"text": tfds.features.Text()}, splits={"train": 3})
    builder = MadeUp(
        info=info,
        as_data_source=lambda split: [{"text": "a"}] * 3,
        download_and_prepare=lambda file_format: fetched.append(file_format),
    )
    opened: list[tuple[str, Path | None]] = []
    monkeypatch.setattr(tfds, "builder", lambda name, data_dir: opened.append((name, data_dir)) or builder)
    for download, formats in ((False, []), (True, ["array_record"])):
        config = config_of("texts", download=download, tfds_folder="somewhere")
        assert [block.count for block in config.open_source("some", tmp_path).blocks(10)] == [3]
        assert fetched == formats
    assert opened == [("texts", Path("somewhere"))] * 2


@pytest.mark.parametrize(("name", "medium"), [("handwritten", "image"), ("spoken", "audio"), ("sums", None)])
def test_digits_are_pictures_sounds_or_sums_with_a_prompt_up_to_the_equals_sign(monkeypatch, tmp_path, name, medium):
    text = "3+4=7" if medium is None else "seven"
    content = {"image": np.full((2, 3, 1), 200), "audio": np.array([-32768, 16384])}.get(medium)
    record = {"id": "a", "text": text} | ({} if medium is None else {medium: content})
    monkeypatch.setattr(digits, "load_records", lambda *_: [record])
    source = EmbeddedDigits(name, tmp_path)
    (entry,) = source.entries(source.blocks(10)[0])
    example = entry.example()
    assert (entry.file, entry.line, entry.split) == (f"{name} train", 1, "train")
    assert (source.medium, example.id, example.media["text"], example.given_characters) == (
        medium,
        "a",
        text,
        0 if medium else 4,
    )
    if medium is not None:
        scale = {"image": 1, "audio": 32768}[medium]
        np.testing.assert_array_equal(example.media[medium], content / scale)
        assert example.media[medium].dtype == {"image": np.uint8, "audio": np.float32}[medium]


@pytest.mark.parametrize("inner", [False, True])
def test_a_folder_from_others_causes_no_import(tmp_path, monkeypatch, inner):
    (tmp_path / "evil.py").write_text("import pathlib; pathlib.Path('ran').touch()")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    evil = {"pythonClassName": "evil.Feature", "tensor": {"shape": {}, "dtype": "int64"}}
    own = {"pythonClassName": "tensorflow_datasets.core.features.features_dict.FeaturesDict"}
    features = {**own, "featuresDict": {"features": {"text": evil}}} if inner else evil
    folder = tmp_path / "sent/1.0.0"
    folder.mkdir(parents=True)
    (folder / "features.json").write_text(json.dumps(features))
    about = {"name": "sent", "version": "1.0.0", "splits": [], "fileFormat": "array_record"}
    (folder / "dataset_info.json").write_text(json.dumps(about))
    with pytest.raises(
        ValueError, match=r"features\.json names 'evil\.Feature', which is not a feature of TFDS itself"
    ):
        prepare(tmp_path / "out", config_of("sent", tfds_folder=str(tmp_path)))
    assert not (tmp_path / "ran").exists() and "evil" not in sys.modules


def test_a_feature_that_another_module_has_registered_is_refused_too(monkeypatch):
    other = type("Feature", (tfds.features.Text,), {"__module__": "evil"})
    known = tfds.features.FeatureConnector._registered_features
    monkeypatch.setitem(known, "evil.Feature", other)
    with tfds_records._own_features_only():
        with pytest.raises(
            ValueError, match=r"features\.json names 'evil\.Feature', which is not a feature of TFDS itself"
        ):
            tfds.features.FeatureConnector.cls_from_name("evil.Feature")
        name = "tensorflow_datasets.core.features.text_feature.Text"
        assert tfds.features.FeatureConnector.cls_from_name(name) is tfds.features.Text


@pytest.mark.parametrize("name", ["huggingface:x", "../x", "mnist/a=True,b=3", "x.py", ""])
def test_a_name_of_a_dataset_with_a_path_or_options_is_refused(tmp_path, name):
    with pytest.raises(ValueError, match="a dataset of TFDS is NAME, NAME/CONFIG or"):
        prepare(tmp_path, config_of(name))


@pytest.mark.parametrize(
    ("pixels", "expected"),
    [
        (np.arange(256, dtype=np.uint8), np.arange(256)),
        (np.arange(256, dtype=np.uint16) * 257, np.arange(256)),
        (np.linspace(0, 1, 256, dtype=np.float32), np.arange(256)),
        (np.array([False, True] * 128), [0, 255] * 128),
        (np.full(256, -1, np.int16), None),
        (np.linspace(0, 1.5, 256, dtype=np.float32), None),
    ],
)
def test_pictures_of_other_types_are_converted_to_uint8_or_refused(pixels, expected):
    if expected is None:
        with pytest.raises(ValueError, match="its values are"):
            tfds_records._picture(pixels.reshape(16, 16, 1), "image")
    else:
        assert tfds_records._picture(pixels.reshape(16, 16, 1), "image").reshape(-1).tolist() == list(expected)
