"""Sources that change after preparing, or between two calls of it."""

import dataclasses
import os
import shutil

import pytest
from own_files import WORDS, bytes_of, config_of, make_files, photos_of
from test_label_names import card_of
from test_tables import write_parquet

from trimask.diffusion.data import prepare as preparing
from trimask.diffusion.data.prepare import prepare
from trimask.diffusion.data.prepare_config import PrepareConfig
from trimask.diffusion.data.reading_config import FieldConfig
from trimask.diffusion.data.records import BadRecord
from trimask.diffusion.data.sources import SourceConfig
from trimask.diffusion.data.split_rules import SplitConfig
from trimask.tokenizers.storage import configuration
from trimask.tokenizers.text import TextTokenizer


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return make_files(tmp_path_factory.mktemp("files"))


@pytest.fixture(scope="module")
def whole(files, tmp_path_factory):
    return prepare(tmp_path_factory.mktemp("whole"), config_of(files))


def test_sources_that_changed_since_preparing_are_refused(files, tmp_path):
    (tmp_path / "a.txt").write_text("one\n\ntwo\n\nthree")
    config = PrepareConfig(
        sources={"text": SourceConfig(kind="text", where=(str(tmp_path / "a.txt"),))}, splits=SplitConfig(test=0.0)
    )
    prepare(tmp_path / "x", config)
    (tmp_path / "a.txt").write_text("one\n\ntwo\n\nthree\n\nfour")
    with pytest.raises(ValueError, match="text has changed since"):
        prepare(tmp_path / "x", config)


def test_a_captions_file_that_changed_is_noticed_after_all_is_done(files, tmp_path):
    (tmp_path / "a.jsonl").write_text('{"prompt": "a", "response": "b", "split": "train"}\n')
    config = PrepareConfig(sources={"x": SourceConfig(kind="prompts", where=(str(tmp_path / "a.jsonl"),))})
    prepare(tmp_path / "out", config)
    (tmp_path / "a.jsonl").write_text('{"prompt": "a", "response": "bc", "split": "train"}\n')
    with pytest.raises(ValueError, match="x has changed since"):
        prepare(tmp_path / "out", config)


def test_a_caption_corrected_to_the_same_length_is_noticed(files, tmp_path):
    config = photos_of(shutil.copytree(files / "photos", tmp_path / "photos"))
    prepare(tmp_path / "out", config)
    lines = (tmp_path / "photos" / "metadata.jsonl").read_text()
    (tmp_path / "photos" / "metadata.jsonl").write_text(lines.replace("three", "seven"))
    with pytest.raises(ValueError, match=r"photos has changed .*: .*metadata\.jsonl differs from line 1 on"):
        prepare(tmp_path / "out", config)


def test_a_medium_of_another_time_or_size_is_noticed(files, tmp_path):
    config = photos_of(shutil.copytree(files / "photos", tmp_path / "photos"))
    prepare(tmp_path / "out", config)
    picture = tmp_path / "photos" / "9.png"
    about = picture.stat()
    os.utime(picture, ns=(about.st_atime_ns, about.st_mtime_ns + 1))
    with pytest.raises(ValueError, match=r"a file or a label that .*metadata\.jsonl names from line 8 on differs"):
        prepare(tmp_path / "out", config)
    os.utime(picture, ns=(about.st_atime_ns, about.st_mtime_ns))
    prepare(tmp_path / "out", config)


def test_a_text_tokenizer_that_changed_is_noticed(files, whole, tmp_path, monkeypatch):
    given = tmp_path / "tokenizer.json"
    shutil.copy(whole.folder / "tokenizers/text/tokenizer.json", given)
    config = config_of(files, text_tokenizer=str(given), splits=SplitConfig())
    prepare(tmp_path / "out", config)
    prepare(tmp_path / "half", config)
    TextTokenizer.fit(["abc abd"], 260).save(tmp_path / "other")
    shutil.copy(tmp_path / "other/tokenizer.json", given)
    with pytest.raises(ValueError, match="the tokenizers that text_tokenizer names have changed since"):
        prepare(tmp_path / "out", config)
    (tmp_path / "half/manifest.json").unlink()
    prepare(tmp_path / "half", config)
    prepare(tmp_path / "fresh", config)
    assert bytes_of(tmp_path / "half") == bytes_of(tmp_path / "fresh")


def test_tokenizers_of_a_folder_that_changed_are_noticed(files, tmp_path):
    sources = {"photos": config_of(files).sources["photos"]}
    first = config_of(files, sources=sources, splits=SplitConfig())
    prepare(tmp_path / "first", first)
    config = dataclasses.replace(first, tokenizers=str(tmp_path / "first"))
    prepare(tmp_path / "out", config)
    shutil.rmtree(tmp_path / "first")
    prepare(tmp_path / "first", dataclasses.replace(first, text_vocabulary=262))
    with pytest.raises(ValueError, match="the tokenizers that tokenizers names have changed since"):
        prepare(tmp_path / "out", config)


def test_on_error_may_change_until_the_data_are_finished(files, tmp_path, monkeypatch):
    photos = shutil.copytree(files / "photos", tmp_path / "photos")
    (photos / "20.png").write_bytes(b"no picture")
    (photos / "3.png").write_bytes(b"no picture")
    stop, skip = (photos_of(photos, on_error=way, tokenizers=None, fit_examples=1) for way in ("stop", "skip"))
    with pytest.raises(BadRecord, match=r"3\.png"):
        prepare(tmp_path / "out", stop)
    leave_at_the_third_block(monkeypatch, tmp_path / "out", skip)
    with pytest.raises(BadRecord, match=r"3\.png"):  # of a block that was finished without it
        prepare(tmp_path / "out", stop)
    prepare(tmp_path / "out", skip)
    prepare(tmp_path / "fresh", skip)
    assert bytes_of(tmp_path / "out") == bytes_of(tmp_path / "fresh")


def test_killed_while_a_second_plan_is_made_the_first_sources_give_the_first_bytes(files, tmp_path, monkeypatch):
    """Sources A, interrupted halfway; sources B, killed between tokenizers and plan; then sources A again."""
    folder = shutil.copytree(files / "photos", tmp_path / "photos")
    config, before = photos_of(folder), (folder / "metadata.jsonl").read_text()

    leave_at_the_third_block(monkeypatch, tmp_path / "out", config)
    (folder / "metadata.jsonl").write_text(before.replace("two", "another"))
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(configuration, "save", killed_at_plan)
        prepare(tmp_path / "out", config)
    (folder / "metadata.jsonl").write_text(before)
    prepare(tmp_path / "out", config)
    prepare(tmp_path / "fresh", config)
    assert bytes_of(tmp_path / "out") == bytes_of(tmp_path / "fresh")


def leave_at_the_third_block(monkeypatch, folder, config):
    """Prepares until the third block, where it is interrupted."""
    original = preparing.encode_block

    def encode_block(folder, job):
        if job.number == 2:
            raise KeyboardInterrupt
        return original(folder, job)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(preparing, "encode_block", encode_block)
        prepare(folder, config)


def killed_at_plan(path, content):
    if path.name == "plan.json":
        raise KeyboardInterrupt
    configuration.write_json(path, configuration.to_dict(content))


@pytest.mark.parametrize("what", ["a picture", "a caption", "a split", "fewer", "a bad picture"])
@pytest.mark.parametrize("is_given", [False, True], ids=["fitted", "given"])
def test_unfinished_data_are_continued_with_the_present_files(
    files, whole, tmp_path, monkeypatch, capsys, what, is_given
):
    photos, original, made = shutil.copytree(files / "photos", tmp_path / "photos"), preparing.encode_block, []
    config = photos_of(photos, tokenizers=str(whole.folder) if is_given else None)
    other = (photos / "20.png").read_bytes()

    if what == "a bad picture":
        (photos / "9.png").write_bytes(other[:50])
        with pytest.raises(BadRecord, match=r"9\.png"):
            prepare(tmp_path / "out", config)
    else:
        leave_at_the_third_block(monkeypatch, tmp_path / "out", config)
    lines = (photos / "metadata.jsonl").read_text().splitlines()
    if what in ("a picture", "a bad picture"):
        (photos / "9.png").write_bytes(other)
    elif what == "a caption":
        lines[8] = lines[8].replace(WORDS[2], WORDS[0])
    elif what == "a split":
        lines[8] = lines[8].replace("{", '{"split": "test", ')
    else:
        lines = lines[:10]
    (photos / "metadata.jsonl").write_text("".join(line + "\n" for line in lines))
    is_planned = (tmp_path / "out" / "plan.json").exists()
    monkeypatch.setattr(preparing, "encode_block", lambda folder, job: made.append(job.number) or original(folder, job))
    prepare(tmp_path / "out", config)
    assert ("photos has changed since: " in capsys.readouterr().err) == is_planned
    if is_given and what == "a picture":
        assert made == [1, 2, 3]  # not the first, which is what it was
    monkeypatch.undo()
    prepare(tmp_path / "fresh", config)
    assert bytes_of(tmp_path / "out") == bytes_of(tmp_path / "fresh")


def labelled(files, photos, kind):
    """Pictures whose captions are numbers, and a function that writes names for these numbers."""
    shutil.copytree(files / "photos", photos)
    (photos / "metadata.jsonl").unlink()
    rows = [{"file_name": f"{number}.png", "label": number % 2} for number in range(24)]
    if kind == "csv":
        lines = "".join(f"{row['file_name']},{row['label']}\n" for row in rows)
        (photos / "metadata.csv").write_text(f"file_name,label\n{lines}")

    def name(*names):
        if kind == "csv":
            (photos / "README.md").write_text(card_of("label", f"[{', '.join(names)}]"))
        else:
            write_parquet(photos / "metadata.parquet", rows, {"label": {"names": names}})

    return photos_of(photos, fields=FieldConfig(text="label")), name


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_names_of_labels_that_changed_to_the_same_length_are_noticed(files, tmp_path, kind):
    config, name = labelled(files, tmp_path / "photos", kind)
    name("cat", "dog")
    prepare(tmp_path / "out", config)
    if kind == "csv":
        name("cat", "dog", "owl")
        prepare(tmp_path / "out", config)  # no caption is the third
    name("cat", "cow")
    with pytest.raises(ValueError, match=r"a file or a label that .*metadata.* names from line \d on differs"):
        prepare(tmp_path / "out", config)


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_unfinished_data_are_continued_with_the_present_names_of_labels(files, tmp_path, monkeypatch, capsys, kind):
    config, name = labelled(files, tmp_path / "photos", kind)
    name("cat", "dog")
    leave_at_the_third_block(monkeypatch, tmp_path / "out", config)
    name("cat", "cow")
    prepare(tmp_path / "out", config)
    assert "photos has changed since: a file or a label that " in capsys.readouterr().err
    prepare(tmp_path / "fresh", config)
    assert bytes_of(tmp_path / "out") == bytes_of(tmp_path / "fresh")


def test_names_of_labels_that_no_caption_uses_do_not_affect_the_digest(files, tmp_path):
    config = photos_of(shutil.copytree(files / "photos", tmp_path / "photos"))
    prepared = prepare(tmp_path / "out", config)
    (tmp_path / "photos" / "README.md").write_text(card_of("text", "[cat, dog]"))
    assert prepare(tmp_path / "out", config).plan == prepared.plan


def test_names_of_the_dataset_are_not_read_if_names_are_configured(files, tmp_path):
    config, _ = labelled(files, tmp_path / "photos", "csv")
    config = dataclasses.replace(config, fields=FieldConfig(text="label", labels=("ape", "bee")))
    prepared = prepare(tmp_path / "out", config)
    for names in ("[cat, dog]", "5"):
        (tmp_path / "photos" / "README.md").write_text(card_of("label", names))
        assert prepare(tmp_path / "out", config).plan == prepared.plan
