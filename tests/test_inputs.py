"""Pictures, sounds and lists of prompts given as files."""

import io
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
from PIL import Image

from trimask.diffusion.data.lines import blocks_of, records_of
from trimask.diffusion.data.pictures import fit_picture, read_picture
from trimask.scripts.inputs import read_mask, read_medium, read_prompts
from trimask.scripts.render import enlarged
from trimask.tokenizers.audio import MelConfig
from trimask.tokenizers.image import PatchCodec, PatchConfig

RNG = np.random.default_rng(0)


def read_image(path, shape, is_cropped=False):
    return read_medium("image", SimpleNamespace(config=None), shape, is_cropped, path)


def read_audio(path, sample_rate_hz, samples):
    config = MelConfig(sample_rate_hz=sample_rate_hz)
    codec = SimpleNamespace(config=config, sample_rate_hz=sample_rate_hz)
    return read_medium("audio", codec, (samples,), False, path)


@pytest.mark.parametrize("channels", [1, 3])
def test_an_enlarged_picture_is_read_back_exactly(tmp_path, channels):
    image = RNG.integers(0, 256, (4, 6, channels), np.uint8)
    enlarged(image, 9).save(tmp_path / "x.png")
    np.testing.assert_array_equal(read_image(tmp_path / "x.png", image.shape), image)


def test_resizing_is_said(tmp_path, capsys):
    Image.new("L", (30, 20)).save(tmp_path / "x.png")
    read_image(tmp_path / "x.png", (8, 6, 1))
    assert "30×20 pixels become 6×8" in capsys.readouterr().out
    Image.new("L", (30, 20)).save(tmp_path / "[b]x.png")
    read_image(tmp_path / "[b]x.png", (8, 6, 1))
    assert f"{tmp_path}/[b]x.png: " in capsys.readouterr().out


def test_a_16_bit_picture_keeps_its_greys(tmp_path):
    Image.fromarray(np.array([[0, 0x8000, 0xFFFF]], np.uint16)).save(tmp_path / "x.png")
    assert read_image(tmp_path / "x.png", (1, 3, 1)).ravel().tolist() == [0, 128, 255]


def test_what_is_transparent_becomes_white(tmp_path):
    Image.fromarray(np.array([[[0, 0, 0, 0], [9, 9, 9, 255]]], np.uint8), "RGBA").save(tmp_path / "x.png")
    assert read_image(tmp_path / "x.png", (1, 2, 1)).ravel().tolist() == [255, 9]


def test_a_photograph_is_turned_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera lay on its side
    Image.fromarray(np.array([[0, 255]], np.uint8)).save(tmp_path / "x.png", exif=exif)
    assert read_image(tmp_path / "x.png", (2, 1, 1)).ravel().tolist() == [0, 255]


def mask_of(tmp_path, mask, shape, is_cropped=True, mode=None):
    Image.fromarray(mask, mode).save(tmp_path / "mask.png")
    Image.new("L", mask.shape[1::-1]).save(tmp_path / "picture.png")
    return read_mask(tmp_path / "mask.png", tmp_path / "picture.png", shape, is_cropped)


@pytest.mark.parametrize("is_cropped", [False, True])
@pytest.mark.parametrize("shape", [(16, 16), (32, 32), (8, 16)])
def test_a_mask_goes_the_way_of_its_picture(tmp_path, is_cropped, shape):
    """A white bar is the hole, whatever becomes of the picture that it stands in."""
    bar = np.zeros((32, 64), np.uint8)
    bar[8:24, 20:28] = 255
    hole = mask_of(tmp_path, bar, shape, is_cropped)
    assert (hole == (fit_picture(bar[..., None], (*shape, 1), is_cropped)[..., 0] > 0)).all() and 0 < hole.mean() < 1


def test_a_thin_line_stays_in_a_smaller_mask_and_does_not_grow_in_a_larger_one(tmp_path):
    line = np.zeros((32, 32), np.uint8)
    line[5] = 200
    assert np.flatnonzero(mask_of(tmp_path, line, (8, 8)).all(axis=1)).tolist() == [1]
    assert mask_of(tmp_path, line, (64, 64)).sum() == 2 * 64


@pytest.mark.parametrize(
    ("colour", "is_hole"),
    [((255, 255, 255, 255), True), ((255, 255, 255, 0), False), ((0, 0, 0, 0), False), ((0, 0, 0, 255), False)],
)
def test_what_is_transparent_in_a_mask_stays(tmp_path, colour, is_hole):
    mask = np.full((4, 6, 4), colour, np.uint8)
    assert (mask_of(tmp_path, mask, (4, 6)) == is_hole).all()


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (np.array([[0, 0x8000, 0xFFFF]], np.uint16), [0, 128, 255]),
        (np.array([[0, 100, 255]], np.int32), [0, 100, 255]),
        (np.array([[0, 256, 65535]], np.int32), [0, 1, 255]),
        (np.array([[0, 0.5, 1]], np.float32), [0, 128, 255]),
        (np.array([[0, 0.5, 200]], np.float32), [0, 0, 200]),
        (np.array([[0, 512, 65535]], np.float32), [0, 2, 255]),
        (np.zeros((1, 3), np.uint16), [0, 0, 0]),
        (
            np.array([[0, 100, 255]], np.uint16),
            "its values are 0 to 255, of which 8 bits keep 0 steps",
        ),
        (np.array([[0, 9, 70000]], np.int32), "its values are 0 to 70000; 0 to 1, to 255 or to 65535 are read"),
        (np.array([[-1, 0, 1]], np.float32), "its values are -1 to 1"),
        (np.array([[0, 1, np.nan]], np.float32), "its values are nan to nan"),
    ],
)
def test_grey_of_many_bits_is_scaled_or_refused_and_never_clipped(tmp_path, values, expected):
    Image.fromarray(values).save(tmp_path / "x.tiff")
    if isinstance(expected, str):
        with pytest.raises(ValueError, match=f"x.tiff: {expected}"):
            read_picture(tmp_path / "x.tiff")
    else:
        assert read_picture(tmp_path / "x.tiff").ravel().tolist() == expected


@pytest.mark.parametrize("mode", ["L", "P", "RGB", "RGBA", "LA", "1", "CMYK"])
@pytest.mark.parametrize("is_grey", [True, False])
def test_a_picture_is_grey_if_all_of_it_is_whatever_its_mode(tmp_path, mode, is_grey):
    if not is_grey and mode in ("L", "LA", "1"):
        return
    pixels = np.zeros((4, 6, 3), np.uint8)
    pixels[1:] = 255 if is_grey else (255, 0, 0)
    Image.fromarray(pixels).convert(mode).save(tmp_path / "x.tiff")
    read = read_picture(tmp_path / "x.tiff")
    assert read.shape == (4, 6, 1 if is_grey else 3)
    np.testing.assert_array_equal(read, pixels[..., : read.shape[-1]])


def test_a_decompression_bomb_is_refused(tmp_path):
    Image.new("1", (8193, 8192)).save(tmp_path / "x.png")
    with pytest.raises(ValueError, match=r"x\.png: not a readable picture: 8193×8192 pixels are more than"):
        read_image(tmp_path / "x.png", (2, 2, 1))


def damaged(kind):
    content = io.BytesIO()
    Image.fromarray(RNG.integers(0, 256, (40, 40), np.uint8)).save(content, kind)
    return content.getvalue()[:700]


@pytest.mark.parametrize("content", [b"", b"GIF89a", b"no picture", damaged("PNG"), damaged("BMP")])
def test_an_unreadable_picture_is_refused_by_name(tmp_path, content):
    (tmp_path / "x.png").write_bytes(content)
    with pytest.raises(ValueError, match=r"x\.png: not a readable picture"):
        read_image(tmp_path / "x.png", (2, 2, 1))


@pytest.mark.parametrize("read", [lambda p: read_image(p, (2, 2, 1)), lambda p: read_audio(p, 8000, 9)])
def test_a_missing_file_is_named(tmp_path, read):
    with pytest.raises(FileNotFoundError, match="nothing-here: no such file"):
        read(tmp_path / "nothing-here")


def tone(rate, seconds, hertz=440.0):
    return 0.4 * np.sin(2 * np.pi * hertz * np.arange(round(rate * seconds)) / rate)


@pytest.mark.parametrize("rate", [8000, 11025, 44100])
def test_sound_of_any_rate_becomes_the_same_wave(tmp_path, rate):
    soundfile.write(tmp_path / "x.wav", tone(rate, 0.5), rate)
    waveform = read_audio(tmp_path / "x.wav", 8000, 4000)
    # Away from the ends, where a resampler rings.
    np.testing.assert_allclose(waveform[200:-200], tone(8000, 0.5)[200:-200], atol=2e-3)


def test_channels_are_mixed_and_silence_fills_the_rest(tmp_path):
    soundfile.write(tmp_path / "x.wav", np.array([[0.5, 0.0], [0.25, 0.25]]), 8000, subtype="FLOAT")
    assert read_audio(tmp_path / "x.wav", 8000, 5).tolist() == [0.25, 0.25, 0, 0, 0]


def test_a_long_sound_is_cut_and_that_is_said(tmp_path, capsys):
    soundfile.write(tmp_path / "x.wav", tone(16000, 3.0), 16000)
    assert read_audio(tmp_path / "x.wav", 8000, 4000).shape == (4000,)
    assert "only the first 0.50 of 3.00 s" in capsys.readouterr().out


def test_a_sound_that_fits_is_read_without_a_word(tmp_path, capsys):
    soundfile.write(tmp_path / "x.wav", tone(8000, 0.5), 8000)
    read_audio(tmp_path / "x.wav", 8000, 4000)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(("samples", "reason"), [([], "length is zero"), ([0.0, np.nan], "NaN")])
def test_a_sound_of_nothing_or_of_nan_is_refused(tmp_path, samples, reason):
    soundfile.write(tmp_path / "x.wav", np.array(samples, np.float32), 8000, subtype="FLOAT")
    with pytest.raises(ValueError, match=reason):
        read_audio(tmp_path / "x.wav", 8000, 9)


@pytest.mark.parametrize(
    ("samples", "reason"),
    [
        (12_000 * tone(8000, 0.5), r"\d+% of its samples are beyond ±1, up to 4,800, and clipped"),
        (np.stack([tone(8000, 0.5), -tone(8000, 0.5)], axis=1), "its 2 channels cancel each other when they are mixed"),
        (np.where(np.arange(4000) < 39, 1.5, tone(8000, 0.5)), None),
        (np.where(np.arange(4000) < 41, 1.5, tone(8000, 0.5)), "1% of its samples are beyond ±1, up to 1.5"),
        (np.stack([tone(8000, 0.5), np.zeros(4000)], axis=1), None),
        (np.zeros((4000, 2)), None),
    ],
)
@pytest.mark.parametrize("rate", [8000, 11025])
def test_a_sound_that_would_become_another_is_refused(tmp_path, samples, reason, rate):
    soundfile.write(tmp_path / "x.wav", samples, rate, subtype="FLOAT")
    if reason is None:
        assert len(read_audio(tmp_path / "x.wav", 8000, 4000)) == 4000
    else:
        with pytest.raises(ValueError, match=f"x.wav: {reason}"):
            read_audio(tmp_path / "x.wav", 8000, 4000)


@pytest.mark.parametrize("length", [0xFFFFFFFF, 0x7FFFFFFF, 0x7FFFF000])
def test_a_length_that_a_pipe_left_open_is_that_of_the_file(tmp_path, capsys, length):
    soundfile.write(tmp_path / "x.wav", tone(8000, 0.5), 8000)
    content = bytearray((tmp_path / "x.wav").read_bytes())
    start = content.index(b"data") + 4
    content[4:8] = content[start : start + 4] = length.to_bytes(4, "little")
    (tmp_path / "x.wav").write_bytes(content)
    np.testing.assert_allclose(read_audio(tmp_path / "x.wav", 8000, 4000), tone(8000, 0.5), atol=1e-4)
    assert capsys.readouterr().out == ""


def test_a_sound_that_is_cut_short_is_heard_and_that_is_said(tmp_path, capsys):
    soundfile.write(tmp_path / "whole.wav", np.zeros(800), 8000)
    (tmp_path / "cut.wav").write_bytes((tmp_path / "whole.wav").read_bytes()[:844])
    read_audio(tmp_path / "cut.wav", 8000, 800)
    assert "cut.wav: the header promises more sound than the 0.05 s in the file" in capsys.readouterr().out


@pytest.mark.parametrize("read", [lambda path: read_image(path, (8, 8, 1)), lambda path: read_audio(path, 8000, 80)])
def test_a_folder_is_refused_as_one(tmp_path, read):
    with pytest.raises(IsADirectoryError, match="a folder, not a file"):
        read(tmp_path)


def test_an_unreadable_sound_is_refused_by_name(tmp_path):
    (tmp_path / "x.wav").write_bytes(b"RIFF and no more")
    with pytest.raises(ValueError, match=r"x\.wav: not a readable sound file"):
        read_audio(tmp_path / "x.wav", 8000, 9)


@pytest.mark.parametrize("from_pipe", [False, True])
def test_prompts_are_the_lines_that_prepare_sees(tmp_path, monkeypatch, from_pipe):
    content = "\ufeffone\r\n\n  zwölf \n1+1=\u20282\x0c\rlast".encode()
    (tmp_path / "x").write_bytes(content)
    monkeypatch.setattr("sys.stdin", SimpleNamespace(buffer=io.BytesIO(content)))
    seen = ["one", "  zwölf ", "1+1=\u20282\x0c", "last"]
    assert read_prompts("-" if from_pipe else str(tmp_path / "x")) == seen
    (block,) = blocks_of(tmp_path / "x", "line", 9)
    assert [record.text for record in records_of(block, "line")] == seen


@pytest.mark.parametrize(("content", "reason"), [(b"\n \n", "holds no prompts"), (b"\xff\xfe", "not UTF-8")])
def test_a_file_without_prompts_is_refused(tmp_path, content, reason):
    (tmp_path / "x").write_bytes(content)
    with pytest.raises(ValueError, match=reason):
        read_prompts(str(tmp_path / "x"))


@pytest.mark.parametrize(
    ("size", "bars"), [((64, 8), [(30, 32)]), ((200, 15), [(90, 95)]), ((64, 8), [(4, 16), (40, 42)])]
)
def test_a_thin_bar_stays_where_one_side_shrinks_and_the_other_grows(tmp_path, size, bars):
    width, height = size
    content = np.zeros((height, width), np.uint8)
    for start, stop in bars:
        content[:, start:stop] = 255
    Image.fromarray(content).save(tmp_path / "mask.png")
    Image.new("L", size).save(tmp_path / "picture.png")
    is_hole = read_mask(tmp_path / "mask.png", tmp_path / "picture.png", (16, 16), False)
    expected = np.zeros(16, bool)
    for start, stop in bars:
        expected[start * 16 // width : -(-stop * 16 // width)] = True
    assert (is_hole == expected).all()


def test_a_file_is_found_in_whatever_normal_form_the_disk_has_it(tmp_path):
    Image.new("L", (4, 4), 7).save(tmp_path / "e\u0301.png")
    Image.new("L", (4, 4), 255).save(tmp_path / "a\u0308.png")
    named = tmp_path / "\u00e9.png"
    if named.exists():
        pytest.skip("this disk does not tell normal forms apart")
    codec = PatchCodec.fit(np.zeros((1, 4, 4, 1), np.uint8), PatchConfig(patch_side=2, codebook_size=4))
    assert (read_medium("image", codec, (4, 4, 1), False, named) == 7).all()
    assert read_mask(tmp_path / "\u00e4.png", named, (4, 4), False).all()
