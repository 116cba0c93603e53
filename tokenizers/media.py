"""One tokenizer per modality, and the vocabulary that they form together.

Everything between media and a model is here: `encode` and `decode` convert between text, pictures or sound and codes,
and `vocabulary` assigns ids to the codes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from trimask.tokenizers import codec
from trimask.tokenizers.codec import MediaCodec
from trimask.tokenizers.text import TextTokenizer
from trimask.tokenizers.vocabulary import TEXT, Vocabulary


@dataclass(frozen=True)
class MediaTokenizers:
    """A text tokenizer, and one codec for each other modality, by name."""

    text: TextTokenizer
    codecs: Mapping[str, MediaCodec]

    @cached_property
    def vocabulary(self) -> Vocabulary:
        """The id space of all tokenizers; codecs are in alphabetical order."""
        sizes = {name: tuple(self.codecs[name].codebook_sizes) for name in sorted(self.codecs)}
        return Vocabulary(text_size=self.text.size, codebook_sizes=sizes)

    @property
    def fingerprints(self) -> dict[str, str]:
        """Fingerprint of every tokenizer, by modality."""
        return {TEXT: self.text.fingerprint, **{name: c.fingerprint for name, c in sorted(self.codecs.items())}}

    def codec(self, modality: str) -> MediaCodec:
        """The codec of a modality. Raises ValueError if there is none."""
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
        """Texts up to their first EOS, or pictures or waveforms of one shape. No code may be masked."""
        if modality == TEXT:
            return self.text.decode_batch([self.vocabulary.until_eos(row) for row in codes])
        return list(self.codec(modality).decode(np.stack(codes)))

    def save(self, folder: Path) -> None:
        """Saves each tokenizer in a folder named after its modality; folders of other modalities are removed."""
        for old in folder.iterdir() if folder.is_dir() else ():
            if old.is_dir() and old.name not in self.fingerprints:
                codec.remove_folder(old)
        self.text.save(folder / TEXT)
        for name, media_codec in self.codecs.items():
            media_codec.save(folder / name)


def load_tokenizers(folder: Path) -> MediaTokenizers:
    """Reads the folder that `MediaTokenizers.save` wrote. Raises ValueError if it holds no text tokenizer."""
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such tokenizers folder")
    stored = {path.name: codec.load_tokenizer(path) for path in sorted(folder.iterdir()) if path.is_dir()}
    text = stored.pop(TEXT, None)
    if not isinstance(text, TextTokenizer):
        raise ValueError(f"{folder}: holds no text tokenizer, only {', '.join(stored) or 'nothing'}")
    return MediaTokenizers(text, {name: value for name, value in stored.items() if isinstance(value, MediaCodec)})
