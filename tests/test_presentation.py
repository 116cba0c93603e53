"""Presentation of each modality: files with several media, pictures of complete media, frames."""

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
from PIL import Image

from trimask.scripts.output import presentation
from trimask.scripts.output.media_files import enlarged, enlargement, image_grid, spectrogram_image
from trimask.scripts.output.presentation import PRESENTATIONS, ending_of, frame_of, presentation_of
from trimask.tokenizers.media import MediaTokenizers
from trimask.tokenizers.quality import log_mel_distance_db, psnr_db
from trimask.tokenizers.sequence import Example, Segment

AT_8_KHZ = SimpleNamespace(sample_rate_hz=8000)


def test_sounds_that_are_written_together_have_a_pause_after_each(tmp_path):
    first, second = np.full(700, 0.5, np.float32), np.full(300, -0.25, np.float32)
    presentation_of("audio").write_together(tmp_path / "both.wav", [first, second], ["one", "two"], AT_8_KHZ)
    samples, rate = soundfile.read(tmp_path / "both.wav")
    pause = np.zeros(2400)
    assert rate == 8000
    np.testing.assert_allclose(samples, np.concatenate([first, pause, second, pause]), atol=1e-4)


def test_pictures_that_are_written_together_are_five_in_a_row_with_captions(tmp_path):
    pictures = [np.full((4, 6, 1), 40 * number, np.uint8) for number in range(6)]
    captions = [f"caption {number}" for number in range(6)]
    presentation_of("image").write_together(tmp_path / "all.png", pictures, captions, None)
    expected = image_grid(pictures, captions, 5, enlargement(4, 6, wanted=80))
    assert np.array_equal(np.asarray(Image.open(tmp_path / "all.png")), np.asarray(expected))


def test_a_picture_of_a_whole_medium_is_itself_or_its_spectrogram_or_as_it_is_drawn(tmp_path):
    picture = np.random.default_rng(0).integers(0, 256, (4, 6, 3), np.uint8)
    seen = [presentation_of("image").picture_of(picture, None)]
    presentation_of("image").write(tmp_path / "one.png", picture, None)
    seen.append(Image.open(tmp_path / "one.png"))
    for one in seen:
        assert np.array_equal(np.asarray(one), np.asarray(enlarged(picture, enlargement(4, 6))))
    wave = np.sin(np.arange(4000) / 3).astype(np.float32)
    shown = presentation_of("audio").picture_of(wave, AT_8_KHZ)
    assert np.array_equal(np.asarray(shown), np.asarray(spectrogram_image(wave, 8000)))
    drawn = dataclasses.replace(PRESENTATIONS["audio"], picture=None, draw=lambda codes, codec: (codes.tolist(), codec))
    codec = SimpleNamespace(encode=lambda media: media[..., :2] * 10)
    assert drawn.picture_of(np.array([1, 2, 3]), codec) == ([10, 20], codec)


def test_quality_is_measured_by_what_suits_the_medium():
    rng = np.random.default_rng(0)
    pictures = rng.integers(0, 256, (2, 3, 4, 6, 1), np.uint8)
    sounds = rng.uniform(-1, 1, (2, 3, 4000)).astype(np.float32)
    of_pictures, of_sounds = presentation_of("image").quality, presentation_of("audio").quality
    assert (of_pictures.name, of_pictures.better) == ("PSNR", "higher")
    assert (of_sounds.name, of_sounds.better) == ("mel", "lower")
    np.testing.assert_array_equal(of_pictures.measure(*pictures, None), psnr_db(*pictures))
    np.testing.assert_array_equal(of_sounds.measure(*sounds, AT_8_KHZ), log_mel_distance_db(*sounds, 8000))


def test_endings_are_those_of_the_table_and_what_is_not_there_is_named():
    assert [ending_of(modality) for modality in ("text", "image", "audio")] == ["txt", "png", "wav"]
    with pytest.raises(
        ValueError, match=r"no modality 'smell' in scripts/output/presentation.py; there are image, audio"
    ):
        presentation_of("smell")


class Named(MediaTokenizers):
    """Fake tokenizers, whose codec of a modality is the modality's name."""

    def codec(self, modality):
        return modality


def test_in_a_frame_segments_stand_in_the_middle_one_under_another(monkeypatch):
    colours = {"text": ((30, 10), 50), "image": ((20, 40), 100), "audio": ((7, 5), 150)}
    blocks = {name: Image.new("RGB", size, (grey,) * 3) for name, (size, grey) in colours.items()}
    monkeypatch.setattr(presentation, "draw_text", lambda tokenizers, segment: blocks["text"])
    drawing = {
        name: dataclasses.replace(entry, draw=lambda codes, codec: blocks[codec])
        for name, entry in PRESENTATIONS.items()
    }
    monkeypatch.setattr(presentation, "PRESENTATIONS", drawing)
    segments = tuple(Segment(name, np.zeros(1, int)) for name in colours)
    frame = np.asarray(frame_of(object.__new__(Named), Example("t", segments)))
    assert frame.shape == (10 + 40 + 5 + 4 * 8, 30 + 2 * 8, 3)
    top = 8
    for (width, height), grey in colours.values():
        places = np.argwhere((frame == grey).all(axis=-1))
        left = (46 - width) // 2
        assert (*places.min(axis=0), *places.max(axis=0)) == (top, left, top + height - 1, left + width - 1)
        assert len(places) == width * height
        top += height + 8
