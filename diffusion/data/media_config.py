"""To what shape media are brought, and by which codecs they become tokens: what a user can say of each medium."""

from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(frozen=True, kw_only=True)
class PictureConfig:
    """The shape of all pictures."""

    height: int | None = None
    """Pixels. None: as the pictures are, which must then all be alike."""
    width: int | None = None
    """Pixels, given together with the height."""
    channels: Literal[1, 3] | None = None
    """1: grey. 3: colour. None: colour if any picture is that tokenizers are fitted on."""
    crop: bool = True
    """Pictures of other proportions lose what sticks out; else they are stretched."""

    def __post_init__(self):
        if (self.height is None) != (self.width is None):
            raise ValueError(f"height and width are given together or not at all, got {self.height} and {self.width}")
        for side in (self.height, self.width):
            if side is not None and side < 1:
                raise ValueError(f"height and width must be at least 1, got {self.height} and {self.width}")


@dataclass(frozen=True, kw_only=True)
class LimitConfig:
    """How large a file may be that is decoded; a larger one is refused before any memory is taken for it."""

    pixels: int = 1 << 26
    """Most pixels of a picture file: height × width."""
    samples: int = 1 << 26
    """Most samples that are read of a sound file, all channels together, and most that it has after resampling."""

    def __post_init__(self):
        if min(self.pixels, self.samples) < 1:
            raise ValueError(f"limits must be at least 1, got {self.pixels} pixels and {self.samples} samples")


@dataclass(frozen=True, kw_only=True)
class MediaConfig:
    """All that reading and shaping media depends on."""

    codecs: dict[str, Any] = field(default_factory=dict)
    """Modality → configuration of its codec."""
    pictures: PictureConfig = PictureConfig()
    """The shape of all pictures."""
    seconds: float | None = None
    """Length of all sounds. None: as they are."""
    limits: LimitConfig = LimitConfig()
    """How large a file may be."""
