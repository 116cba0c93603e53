"""Writes media as files, and draws media whose tokens are only partly known.

An unknown token, code −1, is drawn as a hatched grey tile: over patches of a picture, over moments of a sound, and in
place of a token of a text. The same media give the same bytes; MP4 files may rarely differ.
"""

import base64
import importlib.util
import io
from collections.abc import Iterator, Sequence
from fractions import Fraction
from functools import cache
from pathlib import Path

import librosa  # loads its parts on first use
import numpy as np
import soundfile
from jaxtyping import Bool, Float32, Int, UInt8
from PIL import Image, ImageDraw, ImageFont

from trimask.tokenizers.codec import MediaCodec, SoundCodec
from trimask.tokenizers.media import MediaTokenizers
from trimask.tokenizers.sequence import Segment
from trimask.tokenizers.storage.files import replacing, written_to

_MARGIN = 8
_FONT_SIZE = 14
_FRAME_WIDTH = 320
_LAST_FRAME = 10
"""Ratio of the duration of an animation's last frame to that of the others."""


def enlargement(height: int, width: int, wanted: int = 160) -> int:
    """Whole factor, at least 1, that enlarges the longer side of a picture to at most `wanted` pixels."""
    return max(1, wanted // max(height, width))


def enlarged(image: UInt8[np.ndarray, "height width channels"], scale: int) -> Image.Image:
    """The picture in RGB with every pixel enlarged to a square of `scale` × `scale` pixels."""
    pixels = image[..., 0] if image.shape[-1] == 1 else image[..., :3]
    picture = Image.fromarray(np.ascontiguousarray(pixels)).convert("RGB")
    return picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.NEAREST)


def image_grid(
    images: Sequence[UInt8[np.ndarray, "_ _ channels"]],
    captions: Sequence[str],
    columns: int,
    scale: int,
) -> Image.Image:
    """Grid of enlarged pictures, row by row, each with its caption below it in at most three lines.

    Raises ValueError if there are no pictures, or not as many captions.
    """
    if len(images) != len(captions) or not images or columns < 1 or scale < 1:
        raise ValueError(
            "a grid needs pictures, a caption for each, and columns and scale of at least 1; got "
            f"{len(images)} pictures, {len(captions)} captions, {columns} columns, scale {scale}"
        )
    pictures = [enlarged(image, scale) for image in images]
    width = max(100, *(picture.width for picture in pictures))
    lines = [_wrapped(caption, width, 3) for caption in captions]
    text_height = max(map(len, lines)) * _line_height()
    picture_height = max(picture.height for picture in pictures)
    cell_width, cell_height = width + _MARGIN, picture_height + text_height + 2 * _MARGIN
    columns = min(columns, len(pictures))
    rows = -(-len(pictures) // columns)
    sheet = Image.new("RGB", (columns * cell_width + _MARGIN, rows * cell_height + _MARGIN), "white")
    draw = ImageDraw.Draw(sheet)
    for number, (picture, caption) in enumerate(zip(pictures, lines, strict=True)):
        left = _MARGIN + number % columns * cell_width
        top = _MARGIN + number // columns * cell_height
        sheet.paste(picture, (left + (width - picture.width) // 2, top + picture_height - picture.height))
        for row, line in enumerate(caption):
            x = left + (width - _font().getlength(line)) / 2
            draw.text((x, top + picture_height + 4 + row * _line_height()), line, "black", _font())
    return sheet


def spectrogram_image(waveform: Float32[np.ndarray, " samples"], sample_rate_hz: int) -> Image.Image:
    """Log-mel spectrogram with a column per 10 ms, low frequencies at the bottom, and a range of 80 dB."""
    import matplotlib  # takes a twentieth of a second to load, and most answers need none of it

    window = round(0.032 * sample_rate_hz)
    padded = np.pad(waveform, (0, max(0, window - len(waveform))))
    mels = librosa.feature.melspectrogram(
        y=padded,
        sr=sample_rate_hz,
        n_fft=window,
        hop_length=round(0.010 * sample_rate_hz),
        n_mels=40,
        norm=None,
    )
    full_scale = (window / 4) ** 2  # power of a sine of amplitude 1 under a Hann window
    decibels = librosa.power_to_db(mels, ref=full_scale, amin=1e-8 * full_scale, top_db=None)
    brightness = np.clip((decibels[::-1] + 80) / 80, 0, 1)
    return enlarged((matplotlib.colormaps["magma"](brightness)[..., :3] * 255).round().astype(np.uint8), 4)


def write_png(path: Path, image: Image.Image) -> None:
    """Writes a PNG file; the same picture always gives the same bytes."""
    with written_to(path), replacing(path) as partial:
        image.save(partial, "PNG")


def png_bytes(image: Image.Image) -> bytes:
    """Content of a PNG file, as `write_png` writes it."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def write_wav(path: Path, waveform: Float32[np.ndarray, " samples"], sample_rate_hz: int) -> None:
    """Writes a WAV file with 16-bit PCM; samples outside [−1, 1] are clipped."""
    with written_to(path), replacing(path) as partial:
        _write_wav(partial, waveform, sample_rate_hz)


def wav_bytes(waveform: Float32[np.ndarray, " samples"], sample_rate_hz: int) -> bytes:
    """Content of a WAV file, as `write_wav` writes it."""
    buffer = io.BytesIO()
    _write_wav(buffer, waveform, sample_rate_hz)
    return buffer.getvalue()


def _write_wav(file: Path | io.BytesIO, waveform: Float32[np.ndarray, " samples"], sample_rate_hz: int) -> None:
    soundfile.write(file, np.clip(waveform, -1, 1), sample_rate_hz, subtype="PCM_16", format="WAV")


def data_uri(kind: str, content: bytes) -> str:
    """Data URI with the content of a file, of a media type such as image/png."""
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def write_animation(path: Path, frames: Sequence[Image.Image], milliseconds: int) -> None:
    """Writes a looping GIF or an MP4 (H.264), by the suffix of the path; the last frame stays ten times as long.

    `milliseconds` is the duration of a frame, at least 10. Raises ValueError if there are no frames, and for MP4 if
    PyAV is not installed.
    """
    if not frames or milliseconds < 10:
        raise ValueError(f"an animation needs frames of at least 10 ms, got {len(frames)} of {milliseconds} ms")
    is_mp4 = path.suffix == ".mp4"
    pages = _pages(frames, multiple=2 if is_mp4 else 1)  # H.264 stores colours for blocks of 2 × 2 pixels
    if is_mp4:
        require_mp4()
        with written_to(path), replacing(path) as partial:
            _write_mp4(partial, [*pages, *pages[-1:] * (_LAST_FRAME - 1)], milliseconds)
        return
    durations = [milliseconds] * (len(pages) - 1) + [_LAST_FRAME * milliseconds]
    first, *rest = [page.quantize(256, dither=Image.Dither.NONE) for page in pages]
    with written_to(path), replacing(path) as partial:
        first.save(partial, "GIF", save_all=True, append_images=rest, duration=durations, loop=0)


def require_mp4() -> None:
    """Raises ValueError if PyAV is not installed."""
    if importlib.util.find_spec("av") is None:
        raise ValueError("MP4 needs the extra `video`: pip install 'trimask[video]'; GIF needs no extra")


def _pages(frames: Sequence[Image.Image], multiple: int) -> list[Image.Image]:
    """Frames padded to a common size, whose sides are multiples of a number."""
    width, height = (
        -(-max(sides) // multiple) * multiple for sides in zip(*(frame.size for frame in frames), strict=True)
    )
    pages = []
    for frame in frames:
        page = Image.new("RGB", (width, height), "white")
        page.paste(frame)
        pages.append(page)
    return pages


def _write_mp4(partial: Path, pages: Sequence[Image.Image], milliseconds: int) -> None:
    import av

    with av.open(str(partial), "w", format="mp4") as container:
        # With one thread the same frames nearly always give the same bytes.
        stream = container.add_stream("libx264", rate=Fraction(1000, milliseconds), options={"threads": "1"})
        stream.width, stream.height = pages[0].size
        stream.pix_fmt = "yuv420p"
        for page in pages:
            container.mux(stream.encode(av.VideoFrame.from_image(page)))
        container.mux(stream.encode())


def draw_unknown_picture(codes: Int[np.ndarray, "rows columns"], codec: MediaCodec) -> Image.Image:
    """The decoded picture, hatched where its codes are unknown."""
    pixels = codec.decode(np.maximum(codes, 0)[None])[0]
    return _hatched(enlarged(pixels, enlargement(*pixels.shape[:2])), codes < 0)


def draw_sound(codes: Int[np.ndarray, "frames codebooks"], codec: SoundCodec) -> Image.Image:
    """Spectrogram above a row per codebook; hatched where the codebook, for the spectrogram the first, is unknown."""
    waveform = codec.decode(np.maximum(codes, 0)[None])[0]
    is_unknown = codes.T < 0
    spectrogram = _hatched(spectrogram_image(waveform, codec.sample_rate_hz), is_unknown[:1])
    rows = Image.new("RGB", (spectrogram.width, 12 * len(is_unknown)), "lightsteelblue")
    picture = Image.new("RGB", (spectrogram.width, spectrogram.height + 4 + rows.height), "white")
    picture.paste(spectrogram)
    picture.paste(_hatched(rows, is_unknown), (0, spectrogram.height + 4))
    return picture


def draw_text(tokenizers: MediaTokenizers, segment: Segment) -> Image.Image:
    """Known tokens as text and each unknown one as a tile of the size of a letter, with lines broken at the margin."""
    font, height = _font(20), _line_height(20)
    placed: list[tuple[float, int, str | None]] = []  # x in pixels, row, character
    x, row = 0.0, 0
    for character in _characters(tokenizers, segment.codes):
        if character == "\n":  # some builds of Pillow fail to measure a line end
            x, row = 0.0, row + 1
            continue
        advance = 16.0 if character is None else font.getlength(character)
        if x + advance > _FRAME_WIDTH:
            x, row = 0.0, row + 1
        placed.append((x, row, character))
        x += advance
    right = max((x for x, _, _ in placed), default=0.0) + 20
    # A text that is being generated has a fixed width, so that it does not move from frame to frame.
    width = round(right) if segment.is_condition else _FRAME_WIDTH
    picture = Image.new("RGB", (width, (row + 1) * height), "white")
    draw, tile = ImageDraw.Draw(picture), _hatched(Image.new("RGB", (14, 18)), np.ones((1, 1), bool))
    for x, row, character in placed:
        if character is None:
            picture.paste(tile, (round(x) + 1, row * height + 3))
        else:
            draw.text((x, row * height), character, "black", font)
    return picture


def _characters(tokenizers: MediaTokenizers, codes: Int[np.ndarray, " n"]) -> Iterator[str | None]:
    """Printable characters and line ends of a text in order, and None for every unknown token."""
    codes = codes[codes != tokenizers.vocabulary.eos_code]
    for run in np.split(codes, np.flatnonzero(np.diff(codes < 0)) + 1):
        if run.size and run[0] < 0:
            yield from [None] * len(run)
        else:
            yield from (c for c in tokenizers.text.decode(run) if c.isprintable() or c == "\n")


def _hatched(picture: Image.Image, is_unknown: Bool[np.ndarray, "rows columns"]) -> Image.Image:
    """The picture, divided into an even grid, with hatching over the cells that are unknown."""
    pixels = np.array(picture)
    height, width, _ = pixels.shape
    y, x = np.arange(height)[:, None], np.arange(width)[None, :]
    rows, columns = is_unknown.shape
    cover = is_unknown[y * rows // height, x * columns // width]
    hatch = np.where((x + y) % 8 < 2, 110, 190).astype(np.uint8)
    return Image.fromarray(np.where(cover[..., None], hatch[..., None], pixels))


@cache
def _font(size: int = _FONT_SIZE) -> ImageFont.FreeTypeFont:
    import matplotlib

    # Pillow's default font has no accents and no Greek or Cyrillic letters.
    return ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts/ttf/DejaVuSans.ttf", size)


def _line_height(size: int = _FONT_SIZE) -> int:
    return round(1.3 * size)


def _wrapped(text: str, width: int, max_lines: int) -> list[str]:
    """Lines of at most `width` pixels, broken at spaces if possible; a final … marks that text is left out."""
    lines = [""]
    for word in text.split():
        if lines[-1] and _fits(f"{lines[-1]} {word}", width):
            lines[-1] += f" {word}"
            continue
        if lines[-1]:
            lines.append("")
        for character in word:
            if lines[-1] and not _fits(lines[-1] + character, width):
                lines.append("")
            lines[-1] += character
    if len(lines) > max_lines:
        last = lines[max_lines - 1]
        while not _fits(f"{last}…", width):
            last = last[:-1]
        lines = [*lines[: max_lines - 1], f"{last}…"]
    return lines


def _fits(line: str, width: int) -> bool:
    return _font().getlength(line) <= width
