"""One tokenizer per modality, and the vocabulary they make together.

This is all that stands between media and a model: `encode` and `decode` go from text, pictures and sound to codes and
back, `vocabulary` gives the codes their ids.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from trimask.tokenizers import codec
from trimask.tokenizers.codec import MediaCodec
from trimask.tokenizers.sequence import until_eos
from trimask.tokenizers.text import TextTokenizer
from trimask.tokenizers.vocabulary import TEXT, Vocabulary


@dataclass(frozen=True)
class MediaTokenizers:
    """A text tokenizer, and a codec for every other modality by name."""

    text: TextTokenizer
    codecs: Mapping[str, MediaCodec]

    @cached_property
    def vocabulary(self) -> Vocabulary:
        """The id space; codecs in the order of their names."""
        sizes = {name: tuple(self.codecs[name].codebook_sizes) for name in sorted(self.codecs)}
        return Vocabulary(text_size=self.text.size, codebook_sizes=sizes)

    @property
    def fingerprints(self) -> dict[str, str]:
        """Identity of every tokenizer by modality."""
        return {TEXT: self.text.fingerprint, **{name: c.fingerprint for name, c in sorted(self.codecs.items())}}

    def codec(self, modality: str) -> MediaCodec:
        """The codec of a medium."""
        if modality not in self.codecs:
            raise ValueError(f"no codec for {modality!r}; there are {', '.join(sorted(self.codecs)) or 'none'}")
        return self.codecs[modality]

    def encode(self, modality: str, media: Sequence[Any]) -> list[np.ndarray]:
        """Codes of texts (without EOS), or of pictures or waveforms of one shape."""
        if modality == TEXT:
            return self.text.encode_batch(list(media))
        codes = self.codec(modality).encode(np.stack(media))
        if codes.ndim != 3:
            raise ValueError(
                f"the codec for {modality!r}, {self.codec(modality).kind}, gives codes of shape {codes.shape[1:]}; "
                "those of one medium must be 2-D, such as (rows, columns) or (time, codebooks)"
            )
        return list(codes)

    def decode(self, modality: str, codes: Sequence[np.ndarray]) -> list[Any]:
        """Texts up to their EOS, or pictures or waveforms of one shape; every code must be known."""
        if modality == TEXT:
            return self.text.decode_batch([until_eos(self.vocabulary, row) for row in codes])
        return list(self.codec(modality).decode(np.stack(codes)))

    def save(self, folder: Path) -> None:
        """One folder per modality; those of other modalities that were saved here before are removed."""
        for left in folder.iterdir() if folder.is_dir() else ():
            if left.is_dir() and left.name not in self.fingerprints:
                codec.remove_folder(left)
        self.text.save(folder / TEXT)
        for name, media_codec in self.codecs.items():
            media_codec.save(folder / name)


def load(folder: Path) -> MediaTokenizers:
    """Reads what `MediaTokenizers.save` wrote."""
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder of tokenizers")
    stored = {path.name: codec.load(path) for path in sorted(folder.iterdir()) if path.is_dir()}
    text = stored.pop(TEXT, None)
    if not isinstance(text, TextTokenizer):
        raise ValueError(f"{folder}: holds no text tokenizer, only {', '.join(stored) or 'nothing'}")
    return MediaTokenizers(text, {name: value for name, value in stored.items() if isinstance(value, MediaCodec)})
