"""Survey of sources: rules without effect, equal contents, and lists that contradict each other."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
from own_files import config_of, make_files, photos_of
from PIL import Image

from trimask.diffusion.data.prepare import prepare
from trimask.diffusion.data.prepare_config import PrepareConfig
from trimask.diffusion.data.reading_config import FieldConfig
from trimask.diffusion.data.records import BadRecord
from trimask.diffusion.data.sources import SourceConfig
from trimask.diffusion.data.split_rules import SplitConfig


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return make_files(tmp_path_factory.mktemp("files"))


def test_a_rule_that_holds_nothing_out_is_refused(files, tmp_path):
    with pytest.raises(ValueError, match="whoo=anna holds no record out; no record has a field whoo"):
        prepare(tmp_path / "x", config_of(files, splits=SplitConfig(held_out=("whoo=anna",))))
    with pytest.raises(ValueError, match=r"who=ann holds no record out; who is ben \(36\), anna \(12\)"):
        prepare(tmp_path / "x", config_of(files, splits=SplitConfig(held_out=("who=ann",))))
    assert not (tmp_path / "x").exists()


def test_a_rule_whose_records_earlier_rules_hold_out_is_refused(files, tmp_path):
    rules = SplitConfig(held_out=("who=anna", "file_name=0.png"))
    with pytest.raises(ValueError, match=r"earlier rules hold out every record that file_name=0\.png holds out"):
        prepare(tmp_path / "x", config_of(files, splits=rules))


@pytest.fixture
def two_folders(tmp_path):
    """Two folders of the same 30 pictures under different names: all for training in x1, twenty for testing in x2."""
    rng = np.random.default_rng(0)
    for folder in ("x1", "x2"):
        (tmp_path / folder).mkdir()
    lines = {"x1": [], "x2": []}
    for number in range(30):
        pixels = Image.fromarray(rng.integers(0, 256, (4, 6, 3), np.uint8))
        for folder, name, split in (
            ("x1", f"a{number}.png", "train"),
            ("x2", f"b{number}.bmp", ("test", "train")[number > 19]),
        ):
            pixels.save(tmp_path / folder / name)
            lines[folder].append({"file_name": name, "text": "x", "split": split})
    for folder, own in lines.items():
        (tmp_path / folder / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in own))
    source = {folder: SourceConfig(kind="images", where=(str(tmp_path / folder),)) for folder in lines}
    return PrepareConfig(sources=source, shard_records=7, workers=1)


def test_equal_contents_are_counted_across_datasets(two_folders, tmp_path):
    manifest = prepare(tmp_path / "out", two_folders).manifest
    assert manifest.shared == {"x2/test": {"x1/train": 20}}
    assert [dataset.shared for dataset in manifest.datasets.values()] == [{}, {}]


def test_by_content_equal_pictures_of_two_datasets_are_in_one_split(two_folders, tmp_path):
    config = dataclasses.replace(two_folders, splits=SplitConfig(by="content"))
    manifest = prepare(tmp_path / "out", config).manifest
    assert manifest.shared == {}
    assert [dataset.splits for dataset in manifest.datasets.values()] == [{"train": 10, "test": 20}] * 2


def test_names_of_labels_without_a_number_to_name_are_refused(files, tmp_path):
    config = config_of(files, fields=FieldConfig(labels=("cat", "dog")))
    with pytest.raises(ValueError, match=r"fields\.labels: no caption .* is a number, so cat, dog name nothing"):
        prepare(tmp_path / "x", config)
    assert not (tmp_path / "x").exists()
    photos = shutil.copytree(files / "photos", tmp_path / "photos")
    lines = (photos / "metadata.jsonl").read_text().replace('"two"', "1")
    (photos / "metadata.jsonl").write_text(lines)
    prepared = prepare(tmp_path / "x", photos_of(photos, fields=config.fields))
    assert "dog" in {example.media["text"] for example in prepared.raw("photos", "train")}


@pytest.fixture
def twins(tmp_path):
    """Twelve pictures, each with two names and in two formats; some in folders of splits."""
    rng, lines = np.random.default_rng(0), []
    for number in range(12):
        pixels = rng.integers(0, 256, (4, 6, 3), np.uint8)
        folders = {0: ("train", "test"), 1: ("validation", "test"), 2: ("train", "validation")}.get(number, (".", "."))
        for folder, ending in zip(folders, ("png", "bmp"), strict=True):
            (tmp_path / "photos" / folder).mkdir(parents=True, exist_ok=True)
            name = f"{folder}/{number}.{ending}"
            Image.fromarray(pixels).save(tmp_path / "photos" / name)
            lines.append({"file_name": name, "text": "x", "picture": number})
    (tmp_path / "photos" / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return tmp_path / "photos"


def test_equal_contents_are_counted_across_splits(twins, tmp_path):
    prepared = prepare(tmp_path / "out", photos_of(twins, splits=SplitConfig(validation=0.3, test=0.3)))
    contents = {}
    for split in prepared.dataset("photos").splits:
        for example in prepared.raw("photos", split):
            contents.setdefault(split, []).append(example.media["image"].tobytes())
    order = ("train", "validation", "test")
    expected = {
        later: {
            earlier: count
            for earlier in order[:number]
            if (count := sum(content in contents[earlier] for content in contents[later]))
        }
        for number, later in enumerate(order)
        if number
    }
    assert prepared.dataset("photos").shared == expected and expected["test"]["train"] > 1


@pytest.mark.parametrize("workers", [1, 2])
def test_by_content_equal_pictures_are_in_one_split_the_most_held_out(twins, tmp_path, workers):
    splits = SplitConfig(validation=0.3, test=0.3, by="content")
    prepared = prepare(tmp_path / "out", photos_of(twins, splits=splits, workers=workers))
    assert prepared.dataset("photos").shared == {} and sum(prepared.dataset("photos").splits.values()) == 24
    split_of = {}
    for split in prepared.dataset("photos").splits:
        examples = list(prepared.raw("photos", split))
        assert [example.id for example in examples] == [e["id"] for e in prepared.examples("photos", split)]
        for example in examples:
            split_of.setdefault(int(example.id.rpartition("/")[2].partition(".")[0]), set()).add(split)
    assert [split_of[number] for number in range(3)] == [{"test"}, {"test"}, {"validation"}]
    assert all(len(splits) == 1 for splits in split_of.values())


@pytest.mark.parametrize("on_error", ["stop", "skip"])
def test_by_content_a_bad_record_stops_or_is_skipped(twins, tmp_path, on_error):
    (twins / "5.png").write_bytes(b"no picture")
    config = photos_of(twins, splits=SplitConfig(by="content"), on_error=on_error)
    if on_error == "stop":
        with pytest.raises(BadRecord, match=r"5\.png: not a readable picture"):
            prepare(tmp_path / "out", config)
    else:
        assert prepare(tmp_path / "out", config).dataset("photos").rejected == 1


def test_comparing_contents_reports_progress(twins, tmp_path):
    reports = []
    prepare(tmp_path / "out", photos_of(twins, splits=SplitConfig(by="content")), lambda *said: reports.append(said))
    compared = [said for said in reports if said[0] == "comparing contents"]
    assert compared == [("comparing contents", 0, 24), ("comparing contents", 24, 24)]


@pytest.mark.parametrize(
    ("extra", "reason"),
    [
        (
            {"photos/train/metadata.jsonl": {"file_name": "0.png", "text": "y"}},
            "train/0.png is in two lists: .* line 1",
        ),
        (
            {"photos/metadata.jsonl": {"file_name": "3.png", "text": "y", "split": "dev"}},
            "3.png is in two splits: .* 25",
        ),
    ],
)
def test_a_file_in_two_lists_or_two_splits_is_refused_with_both_lines(twins, tmp_path, extra, reason):
    for name, line in extra.items():
        with (tmp_path / name).open("a") as file:
            file.write(json.dumps(line) + "\n")
    with pytest.raises(ValueError, match=reason):
        prepare(tmp_path / "out", photos_of(twins))


def test_several_captions_of_a_file_are_examples_of_one_split(twins, tmp_path):
    with (twins / "metadata.jsonl").open("a") as file:
        file.write(json.dumps({"file_name": "3.png", "text": "another caption"}) + "\n")
    assert prepare(tmp_path / "out", photos_of(twins)).dataset("photos").records == 25


def test_files_that_nothing_names_are_counted(twins, tmp_path):
    for name in ("extra/1.png", "extra/2.png", "train/a/3.png", "4.txt"):
        (twins / name).parent.mkdir(parents=True, exist_ok=True)
        (twins / name).write_text("")
    assert prepare(tmp_path / "out", photos_of(twins)).dataset("photos").unread == {"./": 1, "extra/": 2, "train/": 1}
