"""To what shape media are brought, and by which codecs they become tokens: what a user can say of each medium."""

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from trimask.tokenizers.formats import added
from trimask.tokenizers.ranges import Checked, PositiveInt, real, whole
from trimask.tokenizers.text_files import MAX_LINE_BYTES


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
    record_bytes: PositiveInt = added(as_before=MAX_LINE_BYTES, default=MAX_LINE_BYTES)
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
