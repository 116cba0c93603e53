"""Configuration of reading: shapes and codecs of media, limits of files, and the fields of records."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from trimask.diffusion.data.records import TextUnit
from trimask.tokenizers.storage.formats import added_field
from trimask.tokenizers.storage.ranges import Checked, PositiveInt, real, whole
from trimask.tokenizers.storage.text_files import MAX_LINE_BYTES


@dataclass(frozen=True, kw_only=True)
class PictureConfig(Checked):
    """Shape that all pictures are brought to."""

    height: Annotated[int, whole(1, 1 << 16)] | None = None
    """Height of all pictures in pixels, given together with the width. None: all pictures of a dataset must have one
    size, and keep it."""
    width: Annotated[int, whole(1, 1 << 16)] | None = None
    """Width of all pictures in pixels, given together with the height."""
    channels: Literal[1, 3] | None = None
    """Number of channels of all pictures: 1 for grey, 3 for colour. None: colour if any picture that tokenizers are
    fitted on has colour."""
    crop: bool = True
    """Crops pictures of other proportions; otherwise they are stretched."""

    def __post_init__(self):
        super().__post_init__()
        if (self.height is None) != (self.width is None):
            raise ValueError(f"height and width are given together or not at all, got {self.height} and {self.width}")


@dataclass(frozen=True, kw_only=True)
class LimitConfig(Checked):
    """Limits of files and records that are decoded; larger ones are refused before memory is allocated for them."""

    pixels: PositiveInt = 1 << 26
    """Largest number of pixels of a picture file: height × width."""
    samples: PositiveInt = 1 << 26
    """Largest number of samples that are read from a sound file, over all channels; also the largest number that it may
    have after resampling."""
    record_bytes: PositiveInt = added_field(as_before=MAX_LINE_BYTES, default=MAX_LINE_BYTES)
    """Largest size of a record of a text file or of a line of a list, in bytes."""


@dataclass(frozen=True, kw_only=True)
class MediaConfig(Checked):
    """Everything that reading and shaping media depends on."""

    codecs: dict[str, Any] = field(default_factory=dict)
    """Modality → configuration of its codec."""
    pictures: PictureConfig = PictureConfig()
    """Shape that all pictures are brought to."""
    seconds: Annotated[float, real(above=0, most=86_400)] | None = None
    """Length of all sounds in seconds. None: sounds are read whole."""
    limits: LimitConfig = LimitConfig()
    """Largest files that are decoded."""


@dataclass(frozen=True, kw_only=True)
class FieldConfig:
    """Fields of records that are read, and what one record is."""

    text: str = "text"
    """Field that holds the text, in lists of pictures or sounds, .jsonl text files and TFDS records."""
    prompt: str = "prompt"
    """Field that holds the prompt, in .jsonl files of prompts and responses."""
    response: str = "response"
    """Field that holds the response, in .jsonl files of prompts and responses."""
    labels: tuple[str, ...] = added_field(as_before=(), default=())
    """Names of the labels 0, 1, …, which replace captions that are numbers. If empty, the names that a Hugging Face
    dataset declares are used."""
    text_unit: TextUnit = "paragraph"
    """Part of a plain text file that is one record."""

    def __post_init__(self):
        if not all(name.strip() for name in self.labels):
            raise ValueError(f"names of labels must not be empty, got {', '.join(map(repr, self.labels))}")


@dataclass(frozen=True, kw_only=True)
class OpenConfig:
    """How any source is opened; `SourceConfig` says which one."""

    fields: FieldConfig
    """Fields of records that are read."""
    media: MediaConfig
    """How media are read."""
    folder: Path
    """Folder in which a source may keep files that it builds."""
    tfds_folder: Path | None = None
    """Folder in which TFDS keeps its datasets. None: TFDS's own default."""
    is_download: bool = False
    """True if TFDS may download datasets that are missing."""
