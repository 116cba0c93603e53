"""Folders of captioned files: what is read, and what is refused with file, line and reason."""

import json
from pathlib import Path

import numpy as np
import pytest
import soundfile
from PIL import Image

from trimask.diffusion.data.folders import Folder
from trimask.diffusion.data.media_config import LimitConfig
from trimask.diffusion.data.plan import PrepareConfig
from trimask.diffusion.data.sources import BadRecord, FieldConfig, OpenConfig


def folder_of(path, medium="image", **changes):
    return Folder(path, medium, OpenConfig(fields=FieldConfig(), media=PrepareConfig(**changes).media, folder=path))


def write_lines(path: Path, *lines):
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))


def outcomes(folder):
    """Every record's example, or why there is none."""
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


def test_a_line_or_a_folder_says_the_split(tmp_path):
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
def test_a_bad_record_says_file_line_and_reason_and_the_others_are_read(tmp_path, line, reason):
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


def test_a_picture_that_would_take_too_much_is_a_bad_record_and_not_decoded(tmp_path, monkeypatch):
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
def test_a_sound_that_would_take_too_much_is_a_bad_record_and_not_decoded(
    tmp_path, monkeypatch, shape, rate_hz, samples, reason
):
    soundfile.write(tmp_path / "1.flac", np.zeros(shape), rate_hz)
    write_lines(tmp_path / "metadata.jsonl", {"file_name": "1.flac", "text": "x"})
    if reason is not None:
        monkeypatch.setattr(soundfile.SoundFile, "read", lambda *_, **__: pytest.fail("decoded"))
    (found,) = outcomes(folder_of(tmp_path, "audio", limits=LimitConfig(samples=samples)))
    assert isinstance(found, BadRecord) == (reason is not None) and (reason or "") in str(found)


def test_only_so_much_of_a_long_sound_counts_as_is_read(tmp_path):
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
def test_a_sound_that_is_none_is_a_bad_record(tmp_path, wave, reason):
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


def test_a_folder_without_metadata_is_told_the_format(tmp_path):
    with pytest.raises(FileNotFoundError, match=r'no metadata\.jsonl in it.*"file_name": "1\.png"'):
        folder_of(tmp_path).blocks(1)
    with pytest.raises(FileNotFoundError, match="no such folder"):
        folder_of(tmp_path / "x").blocks(1)
