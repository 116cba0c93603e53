"""What to prepare: the sources, how they are read and split, and how they become tokens."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from trimask.diffusion.data.modalities import MODALITIES
from trimask.diffusion.data.reading_config import FieldConfig, LimitConfig, MediaConfig, OpenConfig, PictureConfig
from trimask.diffusion.data.records import Source
from trimask.diffusion.data.sources import SourceConfig, open_source
from trimask.diffusion.data.split_rules import SplitConfig
from trimask.tokenizers.storage import configuration
from trimask.tokenizers.storage.formats import added_field, suggestion
from trimask.tokenizers.storage.ranges import Checked, Size, real, whole


@dataclass(frozen=True, kw_only=True)
class PrepareConfig(Checked):
    """Which sources, and how they become tokens."""

    sources: dict[str, SourceConfig] = field(default_factory=dict)
    """Dataset name → source."""
    fields: FieldConfig = FieldConfig()
    """What is read of a record."""
    splits: SplitConfig = SplitConfig()
    """What is held out."""
    pictures: PictureConfig = PictureConfig()
    """To what pictures are resized."""
    seconds: Annotated[float, real(above=0, most=86_400)] | None = None
    """Length of all sounds: longer ones are cut, shorter ones end in silence. None: that of the longest seen when
    the tokenizers are fitted."""
    limits: LimitConfig = added_field(as_before=LimitConfig(), default=LimitConfig())
    """How large a file may be that is decoded."""
    tokenizers: str | None = None
    """Folder of a run or of prepared data whose tokenizers are used. None: they are fitted on the training splits."""
    text_tokenizer: str | None = None
    """A tokenizer.json to use for text."""
    text_vocabulary: Annotated[int, whole(256, 1 << 22)] = 320
    """Tokens of a fitted text tokenizer; 256 of them are the bytes."""
    max_text_tokens: Size = 254
    """Plain text is cut into pieces of so many tokens; captions, and prompts with their responses, must fit."""
    response_tokens: Size | None = None
    """Tokens to which responses are filled with EOS. None: one more than the longest."""
    codecs: Annotated[dict[str, Any], tyro.conf.arg(name="")] = field(default_factory=dict)
    """Modality → configuration of its codec, where it is fitted; the defaults where none is given."""
    fit_examples: Size = 8192
    """Training examples of each source on which tokenizers are fitted, drawn by id."""
    shard_records: Size = 1024
    """Records of a source that one block of shards holds."""
    on_error: Literal["stop", "skip"] = "stop"
    """What a record that cannot be used does: stop, or be written to rejects.jsonl."""
    workers: Annotated[int, whole(1, 4096)] | None = None
    """Processes that tokenise. None: one per core, or this one alone where there is little to do."""
    tfds_folder: str | None = None
    """Where TFDS keeps its datasets. None: TFDS's own choice."""
    download: bool = False
    """Lets TFDS download what is not there; nothing else uses the network."""

    def __post_init__(self):
        super().__post_init__()
        object.__setattr__(self, "codecs", _all_codecs(self.codecs))
        for name in self.sources:
            if not name.isidentifier():
                raise ValueError(f"a dataset's name must be a plain word, for it names a folder; got {name!r}")
        height, width = self.pictures.height, self.pictures.width
        if height is not None and width is not None and height * width > self.limits.pixels:
            raise ValueError(
                f"pictures of {height} × {width} pixels are more than the {self.limits.pixels:,} of limits.pixels"
            )
        rate_hz, frame = self.codecs["audio"].sample_rate_hz, self.codecs["audio"].samples_per_frame
        if frame > self.limits.samples:
            raise ValueError(
                f"frames of {frame:,} samples (audio.hop × audio.spectra-per-frame) are longer than the "
                f"{self.limits.samples:,} of limits.samples"
            )
        if self.seconds is not None and self.seconds * rate_hz > self.limits.samples:
            raise ValueError(
                f"{self.seconds:g} seconds at {rate_hz:,} Hz are more than the {self.limits.samples:,} samples of "
                "limits.samples"
            )
        if self.response_tokens is not None and self.response_tokens > self.max_text_tokens + 1:
            raise ValueError(
                f"response_tokens must be at most one more than max_text_tokens, {self.max_text_tokens + 1}; "
                f"got {self.response_tokens}"
            )

    @property
    def media(self) -> MediaConfig:
        """All that reading and shaping media depends on."""
        return MediaConfig(codecs=self.codecs, pictures=self.pictures, seconds=self.seconds, limits=self.limits)

    def open_source(self, name: str, folder: Path) -> Source:
        """A source by its dataset's name; it may keep what it builds in `folder`."""
        tfds_folder = None if self.tfds_folder is None else Path(self.tfds_folder)
        opened = OpenConfig(
            fields=self.fields,
            media=self.media,
            folder=folder,
            tfds_folder=tfds_folder,
            is_download=self.download,
        )
        return open_source(self.sources[name], opened)


def _all_codecs(given: dict[str, Any]) -> dict[str, Any]:
    """A configuration for the codec of every modality; what is given may be plain JSON types."""
    for name in given:
        if name not in MODALITIES:
            raise ValueError(f"codecs of an unknown modality {name!r}; {suggestion(name, MODALITIES)}")
    found = {}
    for name, entry in MODALITIES.items():
        config = given.get(name, {})
        found[name] = config
        if isinstance(config, dict):
            found[name] = configuration.from_dict(config, entry.codec_config, f"codec of {name}")
    return found
