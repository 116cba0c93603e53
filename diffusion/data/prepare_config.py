"""Configuration of preparing data: the sources, how they are read and split, and how they become tokens."""

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
    """Sources to prepare, and how they become tokens."""

    sources: dict[str, SourceConfig] = field(default_factory=dict)
    """Dataset name → source."""
    fields: FieldConfig = FieldConfig()
    """Fields of records that are read, and what one record is."""
    splits: SplitConfig = SplitConfig()
    """How records are divided into splits."""
    pictures: PictureConfig = PictureConfig()
    """Shape that all pictures are brought to."""
    seconds: Annotated[float, real(above=0, most=86_400)] | None = None
    """Length of all sounds in seconds: longer ones are cut, shorter ones are padded with silence. None: for each
    dataset, the length of its longest sound that tokenizers are fitted on."""
    limits: LimitConfig = added_field(as_before=LimitConfig(), default=LimitConfig())
    """Largest files and records that are decoded."""
    tokenizers: str | None = None
    """Folder of a run or of prepared data whose tokenizers are reused. None: tokenizers are fitted on the training
    splits."""
    text_tokenizer: str | None = None
    """File tokenizer.json (Hugging Face) of the text tokenizer. None: that of --tokenizers, or a fitted one."""
    text_vocabulary: Annotated[int, whole(256, 1 << 22)] = 320
    """Number of tokens of a fitted text tokenizer; 256 of them are the bytes."""
    max_text_tokens: Size = 254
    """Largest number of text tokens of an example: plain text is cut into pieces of this length; a longer caption, or
    prompt with its response, cannot be used."""
    response_tokens: Size | None = None
    """Number of tokens to which responses are padded with EOS. None: one more than the longest response."""
    codecs: Annotated[dict[str, Any], tyro.conf.arg(name="")] = field(default_factory=dict)
    """Modality → configuration of its codec if it is fitted. Modalities that are not named have the defaults."""
    fit_examples: Size = 8192
    """Expected number of records of each source that are drawn, by id, to fit tokenizers on; of these the training
    examples are used."""
    shard_records: Size = 1024
    """Number of records of a block; each block is tokenised by itself, into one shard per split."""
    on_error: Literal["stop", "skip"] = "stop"
    """What to do with a record that cannot be used: stop, or skip it and list it in rejects.jsonl."""
    workers: Annotated[int, whole(1, 4096)] | None = None
    """Number of processes that tokenise. None: one per core, or this process alone for few records."""
    tfds_folder: str | None = None
    """Folder in which TFDS keeps its datasets. None: TFDS's own default."""
    download: bool = False
    """Lets TFDS download datasets that are missing; nothing else uses the network."""

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
        """Everything that reading and shaping media depends on."""
        return MediaConfig(codecs=self.codecs, pictures=self.pictures, seconds=self.seconds, limits=self.limits)

    def open_source(self, name: str, folder: Path) -> Source:
        """Opens the source of a dataset, which may keep files that it builds in `folder`."""
        tfds_folder = None if self.tfds_folder is None else Path(self.tfds_folder)
        config = OpenConfig(
            fields=self.fields,
            media=self.media,
            folder=folder,
            tfds_folder=tfds_folder,
            is_download=self.download,
        )
        return open_source(self.sources[name], config)


def _all_codecs(given: dict[str, Any]) -> dict[str, Any]:
    """Modality → configuration of its codec, for all modalities; those in `given` may be plain JSON types."""
    for name in given:
        if name not in MODALITIES:
            raise ValueError(f"codecs of an unknown modality {name!r}; {suggestion(name, MODALITIES)}")
    codecs = {}
    for name, entry in MODALITIES.items():
        config = given.get(name, {})
        codecs[name] = config
        if isinstance(config, dict):
            codecs[name] = configuration.from_dict(config, entry.codec_config, f"codec of {name}")
    return codecs
