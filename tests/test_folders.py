"""Folders of captioned files: what is read, and errors with file, line and reason."""

import json
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import soundfile
from PIL import Image
from test_label_names import card_of
from test_tables import write_parquet

from trimask.diffusion.data.prepare_config import PrepareConfig
from trimask.diffusion.data.readers import folders
from trimask.diffusion.data.readers.folders import MediaFolder
from trimask.diffusion.data.readers.label_names import label_names
from trimask.diffusion.data.reading_config import FieldConfig, LimitConfig, OpenConfig
from trimask.diffusion.data.records import BadRecord


def folder_of(path, medium="image", **changes):
    return MediaFolder(
        path, medium, OpenConfig(fields=FieldConfig(), media=PrepareConfig(**changes).media, folder=path)
    )


def write_lines(path: Path, *lines):
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))


def outcomes(folder):
    """Example of every record, or the error if it has none."""
    for block in folder.blocks(2):
        for entry in folder.entries(block):
            try:
                yield entry if isinstance(entry, BadRecord) else entry.example()
            except BadRecord as error:
                yield error


def picture(path, size=(6, 4)):
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), np.uint8)).save(path)


def test_pictures_come_with_their_captions_in_the_order_of_the_lines(tmp_path):
    for name in ("a.png", "b.jpg", "c.webp"):
        picture(tmp_path / name)
    names = ("c.webp", "a.png", "b.jpg")
    write_lines(tmp_path / "metadata.jsonl", *({"file_name": name, "text": name[0]} for name in names))
    examples = list(outcomes(folder_of(tmp_path)))
    assert [example.id for example in examples] == list(names)
    assert [example.media["text"] for example in examples] == ["c", "a", "b"]
    assert {example.media["image"].shape for example in examples} == {(4, 6, 3)}


@pytest.mark.parametrize("name", ["a.wav", "b.flac", "c.ogg"])
def test_sounds_are_mixed_down_and_resampled(tmp_path, name):
    seconds = np.arange(16000) / 16000
    tone = 0.5 * np.sin(2 * np.pi * 440 * seconds)
    soundfile.write(tmp_path / name, np.stack([tone, tone], axis=1), 16000)
    write_lines(tmp_path / "metadata.jsonl", {"file_name": name, "text": "a tone"})
    (example,) = outcomes(folder_of(tmp_path, "audio"))
    wave = example.media["audio"]
    assert wave.dtype == np.float32 and len(wave) == 8000
    spectrum = np.abs(np.fft.rfft(wave))
    assert spectrum.argmax() == 440 and 0.3 < np.abs(wave[1000:7000]).max() < 0.6


def test_a_line_or_a_folder_names_the_split(tmp_path):
    for split in ("train", "test"):
        (tmp_path / split).mkdir()
        picture(tmp_path / split / "1.png")
        write_lines(tmp_path / split / "metadata.jsonl", {"file_name": "1.png", "text": "x"})
    folder = folder_of(tmp_path)
    entries = [entry for block in folder.blocks(9) for entry in folder.entries(block)]
    assert [(entry.id, entry.split) for entry in entries] == [("train/1.png", "train"), ("test/1.png", "test")]
    write_lines(tmp_path / "metadata.jsonl", {"file_name": "train/1.png", "text": "x", "split": "mine", "who": "b"})
    entry = next(iter(folder.entries(folder.blocks(9)[0])))
    assert entry.split == "mine" and entry.fields["who"] == "b"


def damaged(path, content=b"\x89PNG\r\n\x1a\n not really"):
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{", "not strict JSON: expected a key"),
        ("[1]", "must be a JSON object, got list"),
        ({"text": "x"}, 'needs a "file_name"'),
        ({"file_name": "1.png"}, 'needs a "text", which is text, got None; its fields are file_name'),
        ({"file_name": "1.png", "text": "  "}, '"text" is empty'),
        ({"file_name": "1.png", "text": 3}, 'needs a "text"'),
        ({"file_name": "gone.png", "text": "x"}, r"gone\.png: no such file"),
        ({"file_name": "../secret.png", "text": "x"}, "stays inside the folder"),
        ({"file_name": "/etc/passwd", "text": "x"}, "stays inside the folder"),
        ({"file_name": "link.png", "text": "x"}, "stays inside the folder"),
        ({"file_name": "bad.png", "text": "x"}, r"bad\.png: not a readable picture"),
        ({"file_name": "cut.jpg", "text": "x"}, r"cut\.jpg: not a readable picture"),
        ({"file_name": "1.png", "text": "x", "split": "../a"}, "a split must be a plain word"),
    ],
)
def test_a_bad_record_names_file_line_and_reason_and_the_others_are_read(tmp_path, line, reason):
    folder = tmp_path / "data"
    folder.mkdir()
    picture(folder / "1.png")
    picture(tmp_path / "secret.png")
    (folder / "link.png").symlink_to(tmp_path / "secret.png")
    damaged(folder / "bad.png")
    picture(folder / "whole.jpg", size=(80, 60))
    damaged(folder / "cut.jpg", (folder / "whole.jpg").read_bytes()[:900])
    good = {"file_name": "1.png", "text": "x"}
    write_lines(folder / "metadata.jsonl", good, "", line, good)
    first, bad, last = outcomes(folder_of(folder))
    assert first.id == last.id == "1.png"
    assert isinstance(bad, BadRecord) and bad.line == 3 and bad.file.endswith("metadata.jsonl")
    with pytest.raises(BadRecord, match=f"metadata.jsonl, line 3: .*{reason}"):
        raise bad


def test_a_picture_with_too_many_pixels_is_a_bad_record_and_not_decoded(tmp_path, monkeypatch):
    Image.new("1", (100, 60)).save(tmp_path / "1.png")
    write_lines(tmp_path / "metadata.jsonl", {"file_name": "1.png", "text": "x"})
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 5000)  # beyond it Pillow warns, beyond twice as many it refuses
    (good,) = outcomes(folder_of(tmp_path, limits=LimitConfig(pixels=6000)))
    assert good.media["image"].shape == (60, 100, 1)
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda _: pytest.fail("decoded"))
    (bad,) = outcomes(folder_of(tmp_path, limits=LimitConfig(pixels=5999)))
    assert "100×60 pixels are more than the 5,999 of --limits.pixels" in str(bad)


@pytest.mark.parametrize(
    ("shape", "rate_hz", "samples", "reason"),
    [
        ((300, 8), 8000, 2400, None),
        ((300, 8), 8000, 2399, "8 channels at 8,000 Hz, read at 8,000 Hz, are 2,400 samples, more than the 2,399"),
        ((3000,), 1, 1 << 20, "3,000.0 s of 1 channels at 1 Hz, read at 8,000 Hz, are 24,000,000 samples"),
    ],
)
def test_a_sound_with_too_many_samples_is_a_bad_record_and_not_decoded(
    tmp_path, monkeypatch, shape, rate_hz, samples, reason
):
    soundfile.write(tmp_path / "1.flac", np.zeros(shape), rate_hz)
    write_lines(tmp_path / "metadata.jsonl", {"file_name": "1.flac", "text": "x"})
    if reason is not None:
        monkeypatch.setattr(soundfile.SoundFile, "read", lambda *_, **__: pytest.fail("decoded"))
    (found,) = outcomes(folder_of(tmp_path, "audio", limits=LimitConfig(samples=samples)))
    assert isinstance(found, BadRecord) == (reason is not None) and (reason or "") in str(found)


def test_only_the_part_of_a_long_sound_that_is_read_counts_against_the_limit(tmp_path):
    soundfile.write(tmp_path / "1.wav", np.zeros(8000), 8000)
    write_lines(tmp_path / "metadata.jsonl", {"file_name": "1.wav", "text": "x"})
    folder = folder_of(tmp_path, "audio", limits=LimitConfig(samples=2000), seconds=0.1)
    (found,) = outcomes(folder)
    assert not isinstance(found, BadRecord)


def test_a_format_of_sounds_that_is_not_listed_is_a_bad_record(tmp_path):
    soundfile.write(tmp_path / "1.wav", np.zeros(800), 8000, format="AU")
    write_lines(tmp_path / "metadata.jsonl", {"file_name": "1.wav", "text": "x"})
    (bad,) = outcomes(folder_of(tmp_path, "audio"))
    assert "its format is AU; WAV, WAVEX, RF64, FLAC" in str(bad)


@pytest.mark.parametrize(
    ("wave", "reason"),
    [(np.zeros(0), "its length is zero"), (np.array([0.1, np.nan]), "NaN"), (None, "not a readable sound")],
)
def test_an_empty_or_invalid_sound_is_a_bad_record(tmp_path, wave, reason):
    if wave is None:
        damaged(tmp_path / "1.wav", b"RIFF")
    else:
        soundfile.write(tmp_path / "1.wav", wave, 8000, subtype="FLOAT")
    write_lines(tmp_path / "metadata.jsonl", {"file_name": "1.wav", "text": "x"})
    (bad,) = outcomes(folder_of(tmp_path, "audio"))
    assert isinstance(bad, BadRecord) and reason in str(bad)


def test_a_truncated_recording_is_a_bad_record(tmp_path):
    soundfile.write(tmp_path / "1.wav", np.random.default_rng(0).uniform(-1, 1, 4000), 8000)
    content = (tmp_path / "1.wav").read_bytes()
    (tmp_path / "1.wav").write_bytes(content[: len(content) // 2])
    write_lines(tmp_path / "metadata.jsonl", {"file_name": "1.wav", "text": "x"})
    (bad,) = outcomes(folder_of(tmp_path, "audio"))
    assert isinstance(bad, BadRecord) and "promises more sound" in str(bad)


def test_the_error_of_a_folder_without_a_list_shows_the_format(tmp_path):
    with pytest.raises(FileNotFoundError, match=r'no metadata\.jsonl .*in it.*"file_name": "1\.png"'):
        folder_of(tmp_path).blocks(1)
    with pytest.raises(FileNotFoundError, match="no such folder"):
        folder_of(tmp_path / "x").blocks(1)


def entries_of(folder):
    return [entry for block in folder.blocks(9) for entry in folder.entries(block)]


def test_a_file_in_the_folder_of_a_split_belongs_to_that_split_whatever_list_names_it(tmp_path):
    folders = {"train": "train", "Valid": "validation", "dev": "validation", "test": "test", "testing": "test"}
    for name in (*folders, "contest", "test1"):
        (tmp_path / name).mkdir()
        picture(tmp_path / name / "1.png")
    picture(tmp_path / "test.png")
    names = [*(f"{name}/1.png" for name in folders), "contest/1.png", "test1/1.png", "test.png", "./train//1.png"]
    write_lines(tmp_path / "metadata.jsonl", *({"file_name": name, "text": "x"} for name in names))
    found = [(entry.id, entry.split) for entry in entries_of(folder_of(tmp_path))]
    assert found[:5] == [(f"{name}/1.png", split) for name, split in folders.items()]
    assert found[5:] == [("contest/1.png", None), ("test1/1.png", None), ("test.png", None), ("train/1.png", "train")]


def test_the_folder_of_a_split_may_lie_below_another(tmp_path):
    names = {"images/train/1.png": "train", "a/b/val/c/1.png": "validation", "test_anna/1.png": "test_anna"}
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True)
        picture(tmp_path / name)
    write_lines(tmp_path / "metadata.jsonl", *({"file_name": name, "text": "x", "split": None} for name in names))
    assert {entry.id: entry.split for entry in entries_of(folder_of(tmp_path))} == names
    (tmp_path / "metadata.jsonl").rename(tmp_path / "test_anna/metadata.jsonl")
    write_lines(tmp_path / "test_anna/metadata.jsonl", {"file_name": "1.png", "text": "x"})
    assert [(entry.id, entry.split) for entry in entries_of(folder_of(tmp_path))] == [("test_anna/1.png", "test_anna")]


def test_folders_of_splits_by_other_names_may_have_lists_of_their_own(tmp_path):
    for name in ("val", "train", "other"):
        (tmp_path / name).mkdir()
        write_lines(tmp_path / name / "metadata.jsonl", {"file_name": "1.png", "text": "x", "split": "dev"})
    found = [(entry.id, entry.split) for entry in entries_of(folder_of(tmp_path))]
    assert found == [("train/1.png", "validation"), ("val/1.png", "validation")]


@pytest.mark.parametrize("name", ["metadata.csv", "metadata.parquet"])
def test_a_list_may_be_a_table(tmp_path, name):
    rows = [{"file_name": "1.png", "text": "one"}, {"file_name": "2.png", "text": "2"}]
    if name.endswith(".csv"):
        (tmp_path / name).write_text("file_name,text\n" + "".join(f"{r['file_name']},{r['text']}\n" for r in rows))
    else:
        write_parquet(tmp_path / name, rows)
    picture(tmp_path / "1.png")
    good, bad = outcomes(folder_of(tmp_path))
    assert (good.id, good.media["text"]) == ("1.png", "one")
    assert isinstance(bad, BadRecord) and "2.png: no such file" in bad.reason and bad.line == 2 + name.endswith(".csv")
    write_lines(tmp_path / "metadata.jsonl", *rows)
    with pytest.raises(ValueError, match=rf"has several lists, metadata\.jsonl, {name}; keep one"):
        folder_of(tmp_path).blocks(1)


def captions(folder, *labels, names=(), list="metadata.jsonl"):
    """Captions of records with these labels, or the reasons if they have none."""
    picture(folder / "1.png")
    rows = [{"file_name": "1.png", "label": label} for label in labels]
    if list == "metadata.csv":
        (folder / list).write_text("file_name,label\n" + "".join(f"1.png,{label}\n" for label in labels))
    elif list == "metadata.parquet":
        write_parquet(folder / list, rows, {"label": {"names": ["cat", "dog"]}})
    else:
        write_lines(folder / list, *rows)
    config = OpenConfig(fields=FieldConfig(text="label", labels=names), media=PrepareConfig().media, folder=folder)
    found = outcomes(MediaFolder(folder, "image", config))
    found = [entry.reason if isinstance(entry, BadRecord) else entry.media["text"] for entry in found]
    (folder / list).unlink()
    return found


def beyond(value):
    return f'"label" is {value}, but only labels 0 to 1 have names: cat, dog'


def test_numbers_of_labels_become_their_names(tmp_path):
    (unnamed,) = captions(tmp_path, 1)
    assert 'needs a "label", which is text, got 1; its fields are file_name, label; --fields.labels names' in unnamed
    named = ("cat", "dog")
    assert captions(tmp_path, 1, 0, 2, "frog", names=named) == ["dog", "cat", beyond(2), "frog"]
    assert captions(tmp_path, 1, "frog", names=named, list="metadata.csv") == ["dog", "frog"]
    (tmp_path / "README.md").write_text(card_of("label", "{'0': ape, '1': bee}"))
    assert captions(tmp_path, 1) == ["bee"]


WHOLE = ["0", "1.0", "+1", " 1", "-0", "-1", "2.0", "1.5", "1 dog", "9" * 5000]
NAMED = ["cat", "dog", "dog", "dog", "cat", beyond("-1"), beyond("2.0"), "1.5", "1 dog", beyond("9" * 5000)]


@pytest.mark.parametrize("list", ["metadata.csv", "metadata.jsonl"])
@pytest.mark.parametrize("by", ["flag", "card"])
def test_text_that_is_a_whole_number_is_a_label_where_names_are_known(tmp_path, list, by):
    assert captions(tmp_path, *WHOLE, list=list) == WHOLE
    if by == "card":
        (tmp_path / "README.md").write_text(card_of("label", "[cat, dog]"))
    assert captions(tmp_path, *WHOLE, names=("cat", "dog") * (by == "flag"), list=list) == NAMED


def test_labels_that_are_floats_because_of_a_missing_value_are_labels(tmp_path):
    found = captions(tmp_path, 0.0, 1.0, -1.0, None, 1.5, list="metadata.parquet")
    assert found[:3] == ["cat", "dog", beyond("-1.0")]
    assert [text.partition(";")[0] for text in found[3:]] == [
        f'needs a "label", which is text, got {value}' for value in (None, 1.5)
    ]


def test_true_is_no_label(tmp_path):
    (reason,) = captions(tmp_path, True, names=("cat", "dog"))
    assert 'needs a "label", which is text, got True' in reason


def test_names_of_labels_are_not_empty():
    with pytest.raises(ValueError, match="names of labels must not be empty, got 'cat', ' '"):
        FieldConfig(labels=("cat", " "))


def test_an_invalid_card_is_read_once_and_every_label_names_its_error(tmp_path, monkeypatch):
    (tmp_path / "README.md").write_text(card_of("label", "[]"))
    read = []
    monkeypatch.setattr(folders, "label_names", lambda *asked: read.append(asked) or label_names(*asked))
    found = captions(tmp_path, 0, 1, "frog", 0)
    assert found == [*2 * [f"{tmp_path}/README.md: names of 'label' are empty"], "frog", found[0]] and len(read) == 1


def test_a_card_beside_a_list_takes_precedence_over_the_one_at_the_root(tmp_path):
    for name in ("train", "test"):
        (tmp_path / name).mkdir()
        picture(tmp_path / name / "1.png")
        (tmp_path / name / "metadata.csv").write_text("file_name,label,split\n1.png,1,\n")
    (tmp_path / "README.md").write_text(card_of("label", "[cat, dog]"))
    (tmp_path / "test" / "README.md").write_text(card_of("label", "[ape, bee]"))
    config = OpenConfig(fields=FieldConfig(text="label"), media=PrepareConfig().media, folder=tmp_path)
    folder = MediaFolder(tmp_path, "image", config)
    assert [example.media["text"] for example in outcomes(folder)] == ["dog", "bee"]
    assert [entry.split for entry in entries_of(folder)] == ["train", "test"]  # the empty cells say none


@pytest.mark.parametrize("listed", ["NFC", "NFD"])
def test_a_file_is_found_whatever_unicode_normal_form_its_name_has(tmp_path, listed):
    on_disk = unicodedata.normalize("NFD" if listed == "NFC" else "NFC", "Ä/grün.png")
    (tmp_path / on_disk).parent.mkdir()
    picture(tmp_path / on_disk)
    name = unicodedata.normalize(listed, "Ä/grün.png")
    write_lines(tmp_path / "metadata.jsonl", {"file_name": name, "text": "x"})
    folder = folder_of(tmp_path)
    (example,) = outcomes(folder)
    assert example.id == unicodedata.normalize("NFC", name) and list(folder.unread()) == [example.id]


def test_a_name_found_by_its_normal_form_must_not_lead_out_of_the_folder(tmp_path):
    (tmp_path / "in").mkdir()
    picture(tmp_path / "secret.png")
    (tmp_path / "in" / unicodedata.normalize("NFD", "grün.png")).symlink_to(tmp_path / "secret.png")
    write_lines(
        tmp_path / "in" / "metadata.jsonl", {"file_name": unicodedata.normalize("NFC", "grün.png"), "text": "x"}
    )
    (bad,) = outcomes(folder_of(tmp_path / "in"))
    assert isinstance(bad, BadRecord) and "stays inside the folder" in bad.reason


def test_files_that_no_list_names_are_found_except_documentation(tmp_path):
    for name in ("a", "train", ".hidden"):
        (tmp_path / name).mkdir()
    names = ("1.png", "a/2.txt", "a/metadata.jsonl", "train/metadata.jsonl", "train/3.png")
    for name in (
        *names,
        "README.md",
        "LICENSE",
        "Licence.TXT",
        ".DS_Store",
        ".hidden/4.png",
        "metadata.jsonl",
        "license.png",
    ):
        (tmp_path / name).write_text("")
    assert set(folder_of(tmp_path).unread()) == {*names, "license.png"} - {"train/metadata.jsonl"}
