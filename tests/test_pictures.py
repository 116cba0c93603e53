"""Pictures equal the reviewed ones in `tests/pictures`.

After a change that is meant, to take its pictures over and look at them:

    python tests/test_pictures.py
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from trimask.scripts.output import media_files
from trimask.scripts.output.presentation import frame_of
from trimask.tokenizers.audio import MelCodec, MelConfig
from trimask.tokenizers.image import PatchCodec, PatchConfig
from trimask.tokenizers.media import MediaTokenizers
from trimask.tokenizers.sequence import Example, Segment
from trimask.tokenizers.text import TextTokenizer

FOLDER = Path(__file__).with_name("pictures")
NAMES = ("grid", "spectrogram", "frame")
CHIRP = (0.5 * np.sin(2 * np.pi * 800 * (1 + np.arange(2000) / 2000) * np.arange(2000) / 8000)).astype(np.float32)


class ChirpCodec(MelCodec):
    """Fake codec that decodes all codes as a chirp."""

    def decode(self, codes):
        return CHIRP[None, : codes.shape[1] * self.config.samples_per_frame]


class Blocks:
    """A font that is the same everywhere: a letter is a block, and a space is nothing."""

    def __init__(self, size: int = media_files._FONT_SIZE):
        self.size = size

    def getlength(self, text: str) -> float:
        return 0.6 * self.size * len(text)

    def getmask(self, text: str, *_, **__):
        mask = Image.new("L", (round(self.getlength(text)) + 1, self.size))
        for number, letter in enumerate(text):
            if letter != " ":
                left, right = (round(self.getlength(text[:end])) for end in (number, number + 1))
                mask.paste(255, (left, 2, right - 1, self.size))
        return mask.im


def pictures() -> Iterator[tuple[str, Image.Image]]:
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (5, 4, 6, 3), np.uint8)
    captions = ["", "one", "more than fits in a line", "w" * 30, "four lines and more of words that are not short"]
    sizes = [images[0], images[1][:2], images[2][:, :3], images[3], images[4]]
    yield "grid", media_files.image_grid(sizes, captions, columns=3, scale=9)
    yield "spectrogram", media_files.spectrogram_image(CHIRP, 8000)

    codecs = {
        "image": PatchCodec(PatchConfig(codebook_size=5), rng.integers(0, 256, (5, 2, 2, 3), np.uint8)),
        "audio": ChirpCodec(MelConfig(), (np.zeros((4, 1), np.float32),) * 2),
    }
    tokenizers = MediaTokenizers(TextTokenizer.fit(["one two"], 260), codecs)
    text = tokenizers.text.encode("a line,\nand one that is longer than a frame is wide").astype(np.int32)
    text[[2, 3, 20, 45]] = -1
    image, audio = np.array([[0, -1, 1], [4, 3, 2]]), np.array([[0, 0], [1, -1], [2, 1], [-1, -1], [3, 3]])
    segments = (Segment("text", text[:12], 12), Segment("image", image), Segment("audio", audio), Segment("text", text))
    yield "frame", frame_of(tokenizers, Example("text", segments))


@pytest.fixture(scope="module")
def drawn() -> dict[str, Image.Image]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(media_files, "_font", Blocks)
        return dict(pictures())


def test_every_picture_has_been_reviewed(drawn):
    assert sorted(drawn) == sorted(NAMES) == sorted(path.stem for path in FOLDER.glob("*.png"))


@pytest.mark.parametrize("name", NAMES)
def test_a_picture_is_as_it_was(drawn, name):
    """Values may differ by 3 of 255, one step of the colours of a spectrogram."""
    was, now = (np.asarray(picture).astype(int) for picture in (Image.open(FOLDER / f"{name}.png"), drawn[name]))
    assert was.shape == now.shape and np.abs(was - now).max() <= 3


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    media_files._font = Blocks
    for name, picture in pictures():
        picture.save(FOLDER / f"{name}.png", optimize=True)
