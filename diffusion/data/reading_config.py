"""To what shape media are brought, and by which codecs they become tokens: what a user can say of each medium."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from trimask.diffusion.data.records import Unit
from trimask.tokenizers.storage.formats import added_field
from trimask.tokenizers.storage.ranges import Checked, PositiveInt, real, whole
from trimask.tokenizers.storage.text_files import MAX_LINE_BYTES


@dataclass(frozen=True, kw_only=True)
class PictureConfig(Checked):
    """The shape of all pictures."""

    height: Annotated[int, whole(1, 1 << 16)] | None = None
    """Pixels. None: as the pictures are, which must then all be alike."""
    width: Annotated[int, whole(1, 1 << 16)] | None = None
    """Pixels, given together with the height."""
    channels: Literal[1, 3] | None = None
    """1: grey. 3: colour. None: colour if any picture is that tokenizers are fitted on."""
    crop: bool = True
    """Pictures of other proportions lose what sticks out; else they are stretched."""

    def __post_init__(self):
        super().__post_init__()
        if (self.height is None) != (self.width is None):
            raise ValueError(f"height and width are given together or not at all, got {self.height} and {self.width}")


@dataclass(frozen=True, kw_only=True)
class LimitConfig(Checked):
    """How large a file may be that is decoded; a larger one is refused before any memory is taken for it."""

    pixels: PositiveInt = 1 << 26
    """Most pixels of a picture file: height × width."""
    samples: PositiveInt = 1 << 26
    """Most samples that are read of a sound file, all channels together, and most that it has after resampling."""
    record_bytes: PositiveInt = added_field(as_before=MAX_LINE_BYTES, default=MAX_LINE_BYTES)
    """Most bytes of a record of a text file or a list."""


@dataclass(frozen=True, kw_only=True)
class MediaConfig(Checked):
    """All that reading and shaping media depends on."""

    codecs: dict[str, Any] = field(default_factory=dict)
    """Modality → configuration of its codec."""
    pictures: PictureConfig = PictureConfig()
    """The shape of all pictures."""
    seconds: Annotated[float, real(above=0, most=86_400)] | None = None
    """Length of all sounds. None: as they are."""
    limits: LimitConfig = LimitConfig()
    """How large a file may be."""


@dataclass(frozen=True, kw_only=True)
class FieldConfig:
    """Names of the fields that are read, and what a record is."""

    text: str = "text"
    """Field of metadata.jsonl, of .jsonl text files, and of TFDS records."""
    prompt: str = "prompt"
    """Field of .jsonl files of prompts that is given."""
    response: str = "response"
    """Field of .jsonl files of prompts that is asked for."""
    labels: tuple[str, ...] = added_field(as_before=(), default=())
    """Names of the numbers 0, 1, … where the text of a picture or a sound is a number. None given: those that a dataset
    of Hugging Face says."""
    text_unit: Unit = "paragraph"
    """What one example of a plain text file is."""

    def __post_init__(self):
        if not all(name.strip() for name in self.labels):
            raise ValueError(f"names of labels must not be empty, got {', '.join(map(repr, self.labels))}")


@dataclass(frozen=True, kw_only=True)
class OpenConfig:
    """What opening a source takes, beside what it is."""

    fields: FieldConfig
    media: MediaConfig
    """To what media are brought as they are read."""
    folder: Path
    """Where a source may keep what it builds."""
    tfds_folder: Path | None = None
    """Where TFDS keeps its datasets. None: TFDS's own choice."""
    is_download: bool = False
    """True where TFDS may download what is not there."""
