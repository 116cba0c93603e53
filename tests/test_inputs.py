"""Pictures, sounds and lists of prompts given as files."""

import io
import re
import struct
import zlib
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
from PIL import Image

from trimask.diffusion.data.readers.lines import blocks_of_text_file, records_of_block
from trimask.diffusion.data.readers.pictures import read_picture
from trimask.diffusion.data.readers.sounds import read_sound, sound_faults
from trimask.diffusion.data.shaping import resize_picture
from trimask.scripts.inputs import read_mask, read_medium, read_prompts
from trimask.scripts.output.media_files import enlarged
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
    """The hole is the white bar of the mask, however the picture is cropped and resized."""
    bar = np.zeros((32, 64), np.uint8)
    bar[8:24, 20:28] = 255
    hole = mask_of(tmp_path, bar, shape, is_cropped)
    assert (hole == (resize_picture(bar[..., None], (*shape, 1), is_cropped)[..., 0] > 0)).all() and 0 < hole.mean() < 1


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
        (np.array([[0, 1, 200]], np.float32), [0, 1, 200]),
        (np.array([[0, 1, 1]], np.float32), [0, 255, 255]),
        (np.array([[0, 256, 65535]], ">u2"), [0, 1, 255]),
        (np.array([[0, 512, 65535]], np.float32), [0, 2, 255]),
        (np.zeros((1, 3), np.uint16), [0, 0, 0]),
        (np.full((1, 3), 0.003, np.float32), [1, 1, 1]),
        (np.arange(1 << 16, dtype=np.uint16)[None], [n // 256 for n in range(1 << 16)]),
        (np.arange(32 * 256, dtype=np.uint16)[None], [n // 256 for n in range(32 * 256)]),
        (np.arange(31 * 256, dtype=np.uint16)[None], "its values are 0 to 7935, of which 8 bits keep 31 different"),
        (np.array([[0, 100, 255]], np.uint16), "its values are 0 to 255, of which 8 bits keep 1 different"),
        (np.array([[0, 100, 255]], ">u2"), "its values are 0 to 255, of which 8 bits keep 1 different"),
        (np.array([[0, 1, 6]], np.uint16), "its values are 0 to 6, of which 8 bits keep 1 different"),
        (np.array([[0, 1, 1]], np.uint16), "its values are 0 to 1, of which 8 bits keep 1 different"),
        (np.arange(4096, dtype=np.uint16)[None], "its values are 0 to 4095, of which 8 bits keep 16 different"),
        (np.arange(4096, dtype=np.int32)[None], "its values are 0 to 4095, of which 8 bits keep 16 different"),
        (
            np.linspace(0, 0.01, 40, dtype=np.float32)[None],
            "its values are 0 to 0.01, of which 8 bits keep 4 different",
        ),
        (np.array([[0, 0.5, 1.02]], np.float32), r"its values are fractions up to 1\.02; 0 to 1 are read"),
        (np.array([[0, 2.5, 5]], np.float32), "its values are fractions up to 5; 0 to 1 are read"),
        (np.linspace(0, 8.5, 99, dtype=np.float32)[None], r"its values are fractions up to 8\.5; 0 to 1 are read"),
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


@pytest.mark.parametrize(
    ("values", "tags", "expected"),
    [
        (np.array([[0, 0x8000, 0xFFFF]], np.uint16), {262: 0}, [255, 127, 0]),
        (np.array([[0, 0x8000, 0xFFFF]], np.uint16), {262: 1}, [0, 128, 255]),
        (np.array([[0, 100, 255]], np.uint8), {262: 0}, [0, 100, 255]),  # Pillow inverts what it writes
        (np.array([[0, 0.5, 1]], np.float32), {262: 0}, "its values are fractions of which 0 is white"),
        (np.array([[0, 1, 200]], np.uint8), {339: 2}, "its values are signed, of 8 bits; unsigned ones are read"),
        (np.array([[0, 1, 200]], np.uint8), {339: 1}, [0, 1, 200]),
    ],
)
def test_a_tiff_says_what_its_values_mean(tmp_path, values, tags, expected):
    Image.fromarray(values).save(tmp_path / "x.tiff", tiffinfo=tags)
    if isinstance(expected, str):
        with pytest.raises(ValueError, match=f"x.tiff: not a readable picture: {expected}"):
            read_picture(tmp_path / "x.tiff")
    else:
        assert read_picture(tmp_path / "x.tiff").ravel().tolist() == expected


def png(row, width, depth, colour, *, transparent=None):
    """A PNG of one row: of grey (colour 0) or of three colours (2)."""
    header = struct.pack(">IIBBBBB", width, 1, depth, colour, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"tRNS", transparent), (b"IDAT", zlib.compress(b"\0" + row)), (b"IEND", b"")]
    written = [
        struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))
        for name, content in chunks
        if content is not None
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(written)


@pytest.mark.parametrize(
    ("row", "width", "depth", "colour", "transparent", "expected"),
    [
        (struct.pack(">3H", 0, 300, 65535), 3, 16, 0, None, [0, 1, 255]),
        (struct.pack(">3H", 0, 300, 65535), 3, 16, 0, struct.pack(">H", 300), "have 16 bits"),
        (struct.pack(">6H", 300, 300, 300, 0, 0, 65535), 2, 16, 2, struct.pack(">3H", 300, 300, 300), "have 16 bits"),
        (bytes([0x07, 0xF0]), 4, 4, 0, None, [0, 119, 255, 0]),
        (bytes([0x07, 0xF0]), 4, 4, 0, struct.pack(">H", 7), "have 4 bits"),
        (bytes([0, 7, 9]), 3, 8, 0, struct.pack(">H", 7), [0, 255, 9]),
    ],
)
def test_the_transparent_value_of_a_png_is_seen_or_refused(tmp_path, row, width, depth, colour, transparent, expected):
    (tmp_path / "x.png").write_bytes(png(row, width, depth, colour, transparent=transparent))
    if isinstance(expected, str):
        with pytest.raises(ValueError, match=rf"x\.png: .* one of its values is transparent, and they {expected}"):
            read_picture(tmp_path / "x.png")
    else:
        assert read_picture(tmp_path / "x.png").ravel().tolist() == expected


def test_a_colour_of_a_small_palette_may_be_transparent(tmp_path):
    picture = Image.fromarray(np.array([[0, 1, 2]], np.uint8), "P")
    picture.putpalette([0, 0, 0, 7, 7, 7, 9, 9, 9])
    picture.save(tmp_path / "x.png", transparency=1, bits=2)
    assert read_picture(tmp_path / "x.png").ravel().tolist() == [0, 255, 9]


@pytest.mark.parametrize("highest", [255, 4095, 32 * 256 - 1, 32 * 256])
def test_colours_of_16_bits_are_refused_where_8_bits_cannot_tell_them_apart(tmp_path, highest):
    (tmp_path / "x.png").write_bytes(png(struct.pack(">6H", 0, 1, 2, 3, highest // 2, highest), 2, 16, 2))
    if highest >= 32 * 256:
        assert read_picture(tmp_path / "x.png").max() == 32
    else:
        with pytest.raises(
            ValueError, match=f"0 to {highest} at most, of which 8 bits keep {highest // 256 + 1} steps"
        ):
            read_picture(tmp_path / "x.png")


@pytest.mark.parametrize("content", [b"P6\n1 1\n255\n\0\0\0", b"\0\0\0 ftypavif" + bytes(24)])
def test_a_picture_of_another_format_is_told_which_are_read(tmp_path, content):
    (tmp_path / "x.png").write_bytes(content)
    with pytest.raises(ValueError, match=r"x\.png: not a readable picture: .* PNG, JPEG, WEBP, GIF, BMP, TIFF$"):
        read_picture(tmp_path / "x.png")


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
        (12_000 * tone(8000, 0.5), r"[\d,]+ of its 4,000 samples are beyond ±1, up to 4,800, and would be clipped"),
        (
            np.where(np.arange(4000) < 35, 12_000, tone(8000, 0.5)),
            "35 of its 4,000 samples are beyond ±1, up to 12,000",
        ),
        (np.where(np.arange(4000) < 1, -4.1, tone(8000, 0.5)), "1 of its 4,000 samples are beyond ±1, up to 4.1"),
        (np.where(np.arange(4000) < 1, 4.0, tone(8000, 0.5)), None),
        (np.where(np.arange(4000) < 39, 1.5, tone(8000, 0.5)), None),
        (np.where(np.arange(4000) < 41, 1.5, tone(8000, 0.5)), "41 of its 4,000 samples are beyond ±1, up to 1.5"),
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


NOISE = np.random.default_rng(1).normal(0, 0.1, (3, 16000))
TONE, OTHER, THIRD = NOISE
BURST = TONE * (np.arange(16000) < 8000)  # and silence


@pytest.mark.parametrize(
    ("channels", "share"),
    [
        ([TONE, -TONE], "100%"),
        ([TONE, -0.9 * TONE], "100%"),
        ([1e30 * TONE, -1e30 * TONE], "100%"),
        ([TONE, -0.8 * TONE], None),  # 0.04 / 1.64 of the energies is −16 dB
        ([TONE, -TONE, OTHER], "100%"),
        ([TONE, OTHER, -TONE - OTHER], "100%"),
        ([TONE, np.where(np.arange(16000) < 12800, -TONE, TONE)], "80%"),
        ([TONE, np.where(np.arange(16000) < 3200, -TONE, OTHER)], "20%"),
        ([BURST, np.where(np.arange(16000) < 1600, -BURST, BURST)], "20%"),  # of the half that is not silent
        ([TONE, np.where(np.arange(16000) < 1600, -TONE, OTHER)], None),
        ([OTHER, 0.005 * TONE, -0.005 * TONE], None),  # inaudible beside the first
        ([TONE, TONE], None),
        ([TONE, 0 * TONE], None),
        ([TONE, OTHER], None),
        ([TONE, OTHER, THIRD], None),
        ([TONE, 0.75**0.5 * OTHER - 0.5 * TONE], None),  # wide: their correlation is −0.5
        ([0 * TONE, 0 * TONE], None),
        ([TONE[:2], OTHER[:2]], None),
    ],
)
def test_channels_that_cancel_in_part_of_the_sound_are_refused(tmp_path, channels, share):
    content = np.stack(channels, axis=1)
    soundfile.write(tmp_path / "x.wav", content, 8000, subtype="FLOAT")
    if share is None:
        np.testing.assert_allclose(read_sound(tmp_path / "x.wav", 8000), content.mean(axis=1), atol=1e-6)
    else:
        reason = f"its {len(channels)} channels cancel each other in {share} of the sound when they are mixed; give one"
        with pytest.raises(ValueError, match=f"x.wav: {reason}"):
            read_sound(tmp_path / "x.wav", 8000)


@pytest.mark.parametrize(("kind", "subtype"), [("OGG", "VORBIS"), ("OGG", "OPUS"), ("MP3", None)])
@pytest.mark.parametrize("seconds", [0.01, 1.0, 12.0])
@pytest.mark.parametrize("around", [(b"", b""), (b"", b"TAG" + bytes(125)), (b"ID3\4\0\0\0\0\1\2" + bytes(130), b"")])
def test_a_compressed_sound_is_whole(tmp_path, kind, subtype, seconds, around):
    before, after = around if kind == "MP3" else (b"", around[1])
    soundfile.write(tmp_path / "x", np.resize(TONE, round(8000 * seconds)), 8000, format=kind, subtype=subtype)
    (tmp_path / "x").write_bytes(before + (tmp_path / "x").read_bytes() + after)
    assert sound_faults(tmp_path / "x") == []


@pytest.mark.parametrize(
    ("kind", "subtype", "reason"),
    [
        ("OGG", "VORBIS", r"the end of the stream is missing after \d+\.\d\d s"),
        ("OGG", "OPUS", r"the end of the stream is missing after \d+\.\d\d s"),
        ("MP3", None, r"the header promises [\d,]+ bytes more"),
    ],
)
@pytest.mark.parametrize("kept", [0.6, 0.9, -1])
def test_a_compressed_sound_that_is_cut_short_is_not_whole(tmp_path, kind, subtype, reason, kept):
    soundfile.write(tmp_path / "x", np.resize(TONE, 96000), 8000, format=kind, subtype=subtype)
    content = (tmp_path / "x").read_bytes()
    (tmp_path / "x").write_bytes(content[: kept if kept < 0 else round(kept * len(content))])
    (fault,) = sound_faults(tmp_path / "x")
    assert re.fullmatch(f"the file is cut short: {reason}", fault)


@pytest.mark.parametrize("subtype", ["VORBIS", "OPUS"])
def test_an_ogg_that_ends_between_two_pages_is_not_whole(tmp_path, subtype):
    soundfile.write(tmp_path / "x", np.resize(TONE, 96000), 8000, format="OGG", subtype=subtype)
    content = (tmp_path / "x").read_bytes()
    (tmp_path / "x").write_bytes(content[: content.rindex(b"OggS")])
    assert len(sound_faults(tmp_path / "x")) == 1


@pytest.mark.parametrize(("before", "missing"), [(b"", 5), (b"", 0), (b"ID3\4\0\0\0\0\1\2" + bytes(130), 5)])
@pytest.mark.parametrize("flags", [0, 1, 2, 3])
def test_an_mp3_is_as_long_as_its_header_promises_if_it_does(tmp_path, before, missing, flags):
    soundfile.write(tmp_path / "x", TONE, 8000, format="MP3")
    content = (tmp_path / "x").read_bytes()
    start = content.index(b"Xing") + 4
    numbers = [80, len(content) + missing]  # of frames and of bytes
    header = struct.pack(">3I", flags, *numbers[:: -1 if flags == 2 else 1])
    (tmp_path / "x").write_bytes(before + content[:start] + header + content[start + 12 :])
    promised = [f"the file is cut short: the header promises {missing} bytes more"]
    assert sound_faults(tmp_path / "x") == (promised if missing and flags & 2 else [])


def test_a_flac_without_a_length_is_refused_for_that(tmp_path):
    soundfile.write(tmp_path / "x.flac", TONE, 8000)
    content = bytearray((tmp_path / "x.flac").read_bytes())
    content[21] &= 0xF0
    content[22:26] = bytes(4)
    (tmp_path / "x.flac").write_bytes(content)
    for seconds in (None, 0.5):
        with pytest.raises(ValueError, match=r"x\.flac: .* its header has no length, as if written to a pipe"):
            read_sound(tmp_path / "x.flac", 8000, seconds)


@pytest.mark.parametrize("name", ["x.m4a", "x.raw"])
def test_a_sound_of_another_format_is_told_which_are_read(tmp_path, name):
    (tmp_path / name).write_bytes(b"\0\0\0 ftypM4A " + bytes(100))
    for read in (lambda path: read_sound(path, 8000), sound_faults):
        with pytest.raises(ValueError, match=rf"{name}: not a readable sound file: .* WAV, .*, FLAC, OGG, MP3, AIFF$"):
            read(tmp_path / name)


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
    (block,) = blocks_of_text_file(tmp_path / "x", "line", 9)
    assert [record.text for record in records_of_block(block, "line")] == seen


@pytest.mark.parametrize(("content", "reason"), [(b"\n \n", "contains no prompts"), (b"\xff\xfe", "not UTF-8")])
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


def test_a_model_of_grey_pictures_says_that_it_sees_no_colour(tmp_path, capsys):
    Image.new("RGB", (4, 4), "red").save(tmp_path / "a.png")
    codec = PatchCodec.fit(np.zeros((1, 4, 4, 1), np.uint8), PatchConfig(patch_side=2, codebook_size=4))
    assert read_medium("image", codec, (4, 4, 1), False, tmp_path / "a.png").shape == (4, 4, 1)
    assert "a.png: colour becomes grey" in capsys.readouterr().out
