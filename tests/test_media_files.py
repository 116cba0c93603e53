"""Pictures of media: unknown tokens are hatched, and the same media give the same bytes."""

import io
import re
import sys

import av
import numpy as np
import pytest
import soundfile
from PIL import Image

from trimask.scripts.output.media_files import (
    enlarged,
    enlargement,
    image_grid,
    spectrogram_image,
    write_animation,
    write_png,
    write_wav,
)
from trimask.scripts.output.presentation import frame_of
from trimask.tokenizers.audio import MelCodec, MelConfig
from trimask.tokenizers.image import PatchCodec, PatchConfig
from trimask.tokenizers.media import MediaTokenizers
from trimask.tokenizers.sequence import Example, Segment
from trimask.tokenizers.text import TextTokenizer

RNG = np.random.default_rng(0)


@pytest.fixture(scope="module")
def tokenizers():
    images = RNG.integers(0, 256, (5, 4, 6, 1), np.uint8)
    # Loud, so that no moment of it looks like silence.
    waveforms = RNG.uniform(-1, 1, (6, 1600)).astype(np.float32)
    codecs = {
        "image": PatchCodec.fit(images, PatchConfig(codebook_size=5)),
        "audio": MelCodec.fit(waveforms, MelConfig(codebook_size=4)),
    }
    return MediaTokenizers(TextTokenizer.fit(["one two"], 260), codecs)


def frame(tokenizers, modality, codes, num_given=0):
    segment = Segment(modality, np.asarray(codes, np.int32), num_given)
    return np.asarray(frame_of(tokenizers, Example("text", (segment,)))).astype(int)


def stripes(pixels):
    """Share of pixels that have one of the two greys of the hatch pattern."""
    return np.isin(pixels, (110, 190)).all(axis=-1).mean()


def test_enlarging_turns_each_pixel_into_a_square():
    image = RNG.integers(0, 256, (2, 3, 3), np.uint8)
    expected = np.array([[image[y // 4, x // 4] for x in range(12)] for y in range(8)])
    np.testing.assert_array_equal(np.asarray(enlarged(image, 4)), expected)


@pytest.mark.parametrize(("height", "width", "factor"), [(8, 8, 20), (10, 40, 4), (300, 20, 1)])
def test_only_tiny_pictures_are_enlarged(height, width, factor):
    assert enlargement(height, width) == factor


def test_a_grid_shows_every_picture_in_reading_order():
    greys = [10, 60, 120, 180, 240]
    images = [np.full((3, 2, 1), grey, np.uint8) for grey in greys]
    sheet = np.asarray(image_grid(images, [""] * 5, columns=2, scale=7))
    seen = {grey: np.argwhere((sheet == grey).all(axis=-1)) for grey in greys}
    assert [len(seen[grey]) for grey in greys] == [3 * 7 * 2 * 7] * 5
    tops = [seen[grey].min(axis=0) for grey in greys]
    assert tops[0][0] == tops[1][0] < tops[2][0] == tops[3][0] < tops[4][0]
    assert tops[0][1] == tops[2][1] == tops[4][1] < tops[1][1] == tops[3][1]
    ends = [sheet.shape[1] - 1 - seen[grey].max(axis=0)[1] for grey in greys]
    assert tops[0][1] == ends[1], "each stands in the middle of its cell"


def test_a_grid_writes_each_caption_under_its_picture():
    images = [np.full((4, 4, 1), 255, np.uint8)] * 2
    sheet = np.asarray(image_grid(images, ["", "seven"], columns=2, scale=5)).min(axis=-1)
    left, right = sheet[:, : sheet.shape[1] // 2], sheet[:, sheet.shape[1] // 2 :]
    assert (left == 255).all()
    rows = np.flatnonzero((right < 128).any(axis=1))
    assert rows[0] >= 8 + 20 and len(rows) >= 8  # below the picture, and tall enough to read


def test_a_long_caption_keeps_to_three_lines_within_its_cell():
    white = np.full((4, 4, 1), 255, np.uint8)
    short, long = (image_grid([white], [text], 1, 5) for text in ("a\nb c", "w" * 500))
    assert long.size[0] == short.size[0]
    dark = np.asarray(long).min(axis=(1, 2)) < 128
    assert np.count_nonzero(np.diff(dark.astype(int)) == 1) == 3


def test_a_grid_without_pictures_is_refused():
    with pytest.raises(ValueError, match="0 pictures"):
        image_grid([], [], 2, 1)


def test_a_high_tone_is_drawn_above_a_low_one():
    time = np.arange(4000) / 8000
    rows = []
    for hertz in (300, 2500):
        pixels = np.asarray(spectrogram_image(0.5 * np.sin(2 * np.pi * hertz * time, dtype=np.float32), 8000))
        rows.append(int(pixels.sum(axis=(1, 2)).argmax()))
    assert rows[1] < rows[0] - 20


def test_silence_is_black_and_a_click_is_not():
    silence = np.zeros(100, np.float32)
    click = silence.copy()
    click[50] = 1
    assert np.asarray(spectrogram_image(silence, 8000)).max() < 10
    assert np.asarray(spectrogram_image(click, 8000)).max() > 100


def test_unknown_patches_are_hatched_and_known_ones_are_as_decoded(tokenizers):
    codes = np.array([[0, 1, 2], [3, 4, 0]])
    whole = np.asarray(enlarged(tokenizers.decode("image", [codes])[0], 26))
    codes[1, 2] = -1
    drawn = frame(tokenizers, "image", codes)[8:-8, 8:-8]
    assert drawn.shape == whole.shape == (4 * 26, 6 * 26, 3)
    np.testing.assert_array_equal(drawn[:52], whole[:52])
    np.testing.assert_array_equal(drawn[52:, :104], whole[52:, :104])
    assert stripes(drawn[52:, 104:]) == 1


def test_unknown_moments_of_sound_are_hatched_where_they_are(tokenizers):
    codes = np.ones((4, 2), np.int32)
    codes[2] = -1
    drawn = frame(tokenizers, "audio", codes)[8 : 8 + 160, 8:-8]
    quarters = np.split(drawn[:, : drawn.shape[1] // 4 * 4], 4, axis=1)
    assert stripes(quarters[2]) > 0.9  # the columns are not an exact multiple of the frames
    assert max(stripes(quarters[0]), stripes(quarters[1][:, :-4]), stripes(quarters[3][:, 4:])) < 0.1


def test_an_unknown_fine_code_shows_in_its_row_alone(tokenizers):
    codes = np.ones((4, 2), np.int32)
    codes[1, 1] = -1
    drawn = frame(tokenizers, "audio", codes)[8:-8, 8:-8]
    assert stripes(drawn[:160]) < 0.01
    coarse, fine = drawn[-24:-12], drawn[-12:]
    assert stripes(coarse) == 0 and 0.2 < stripes(fine) < 0.3


def test_unknown_tokens_stand_in_the_text_as_tiles(tokenizers):
    codes = tokenizers.text.encode("12+3").astype(np.int32)
    codes[[1, 3]] = -1
    drawn = frame(tokenizers, "text", codes)
    columns = np.isin(drawn, (110, 190)).all(axis=-1).sum(axis=0) >= 18
    assert np.count_nonzero(np.diff(columns.astype(int)) == 1) == 2


def test_text_that_is_being_written_does_not_move(tokenizers):
    codes = tokenizers.text.encode("12+34").astype(np.int32)
    whole = frame(tokenizers, "text", codes)
    codes[3:] = -1
    assert frame(tokenizers, "text", codes).shape == whole.shape
    np.testing.assert_array_equal(frame(tokenizers, "text", codes)[:, :40], whole[:, :40])


def test_a_text_goes_on_in_the_next_row_at_a_line_break_and_where_the_frame_ends(tokenizers):
    heights = {}
    for text in ("12", "1\n2", "1\n\n2", "12 " * 60):
        heights[text] = frame(tokenizers, "text", tokenizers.text.encode(text).astype(np.int32)).shape[0]
    line = heights["1\n2"] - heights["12"]
    assert line > 10 and heights["1\n\n2"] == heights["12"] + 2 * line
    assert heights["12 " * 60] > heights["1\n\n2"]


def test_eos_shows_as_nothing(tokenizers):
    codes = tokenizers.text.encode("12").astype(np.int32)
    filled = np.append(codes, [tokenizers.vocabulary.eos_code] * 3)
    np.testing.assert_array_equal(frame(tokenizers, "text", filled), frame(tokenizers, "text", codes))


def test_a_frame_shows_all_segments_one_under_another(tokenizers):
    text = Segment("text", tokenizers.text.encode("one").astype(np.int32), 1)
    image = Segment("image", np.zeros((2, 3), np.int32))
    heights = [frame_of(tokenizers, Example("text", part)).height for part in ((text,), (image,), (text, image))]
    assert heights[2] == heights[0] + heights[1] - 8


def test_png_bytes_are_the_same_every_time(tmp_path, tokenizers):
    picture = frame_of(tokenizers, Example("text", (Segment("image", np.zeros((2, 3), np.int32)),)))
    for name in ("a.png", "b.png"):
        write_png(tmp_path / name, picture)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_wav_is_16_bit_at_its_rate_and_clips_what_is_too_loud(tmp_path):
    write_wav(tmp_path / "x.wav", np.array([0, 0.5, -2, 2], np.float32), 11025)
    assert soundfile.info(tmp_path / "x.wav").subtype == "PCM_16"
    samples, rate = soundfile.read(tmp_path / "x.wav", dtype="int16")
    assert rate == 11025
    assert samples.tolist() == [0, 16384, -32768, 32767]


def test_a_gif_keeps_its_frames_in_order_loops_and_dwells_on_the_last(tmp_path):
    frames = [Image.new("RGB", (3 + n, 5), (80 * n, 0, 0)) for n in range(3)]
    write_animation(tmp_path / "x.gif", frames, 50)
    gif = Image.open(io.BytesIO((tmp_path / "x.gif").read_bytes()))
    assert gif.n_frames == 3 and gif.size == (5, 5) and gif.info["loop"] == 0
    seen = []
    for number in range(3):
        gif.seek(number)
        seen.append((gif.convert("RGB").getpixel((0, 0))[0], gif.info["duration"]))
    assert seen == [(0, 50), (80, 50), (160, 500)]


def test_an_mp4_has_the_frames_in_order_and_even_sides(tmp_path):
    frames = [Image.new("RGB", (63 + n, 33), (80 * n, 0, 0)) for n in range(3)]
    write_animation(tmp_path / "x.mp4", frames, 50)
    with av.open(str(tmp_path / "x.mp4")) as container:
        stream = container.streams.video[0]
        pictures = [frame.to_ndarray(format="rgb24") for frame in container.decode(stream)]
        assert stream.codec.name == "h264" and stream.average_rate == 20
    assert [picture.shape for picture in pictures] == [(34, 66, 3)] * 12
    reds = [int(picture[16, 16, 0]) for picture in pictures]
    np.testing.assert_allclose(reds, [0, 80] + [160] * 10, atol=6)


def test_without_its_library_an_mp4_is_refused_with_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(ValueError, match=re.escape("pip install 'trimask[video]'")):
        write_animation(tmp_path / "x.mp4", [Image.new("RGB", (2, 2))], 50)


@pytest.mark.parametrize("frames, milliseconds", [(1, 9), (0, 10)])
def test_an_animation_without_frames_or_of_shorter_ones_is_refused(tmp_path, frames, milliseconds):
    picture = Image.new("L", (2, 2))
    write_animation(tmp_path / "a.gif", [picture], 10)
    message = f"needs frames of at least 10 ms, got {frames} of {milliseconds} ms"
    with pytest.raises(ValueError, match=message):
        write_animation(tmp_path / "b.gif", [picture] * frames, milliseconds)
    assert not (tmp_path / "b.gif").exists()
