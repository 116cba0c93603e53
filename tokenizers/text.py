"""Text ↔ token ids, on Hugging Face `tokenizers`.

`fit` trains a byte-level BPE: the 256 bytes are always in the alphabet, nothing is normalised and no space is added, so
decode(encode(text)) = text for every Unicode string. Digits are split before merging, so "47" is always the two tokens
"4", "7". Special tokens are never parsed from text: their names are encoded like any other characters.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from jaxtyping import Int

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers
from trimask.tokenizers.codec import Files, StoredTokenizer
from trimask.tokenizers.storage.files import printable, require_regular_file
from trimask.tokenizers.storage.json_text import MAX_JSON_BYTES

_LONG_WORD = re.compile(r"(\S{1000}|\s{1000})")
"""Where training texts are cut inside very long words or runs of blanks; training time is quadratic in a word's
length."""
MAX_TOKENS = 1 << 22
"""Largest number of ids that a tokenizer.json may have."""


@dataclass(frozen=True)
class TextConfig:
    """Empty: everything is stored in tokenizer.json."""


class TextTokenizer(StoredTokenizer):
    """A tokenizer from any `tokenizer.json`.

    One that was not trained by `fit` may not reproduce every text exactly; that depends on its own rules.
    """

    kind: ClassVar[str] = "text"
    config_type = TextConfig
    config = TextConfig()
    modality: ClassVar[str] = "text"

    def __init__(self, tokenizer_json: str):
        """Parses `tokenizer_json`, which `save` writes unchanged because library versions serialise differently.

        Raises ValueError if it is not a usable tokenizer.json.
        """
        self._json = tokenizer_json
        with _rust("not a tokenizer.json"):
            self._tokenizer = tokenizers.Tokenizer.from_str(tokenizer_json)
            self._tokenizer.no_padding()
            self._tokenizer.no_truncation()
            self._tokenizer.encode_special_tokens = True
            self._size = max(self._tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        if not 0 < self._size <= MAX_TOKENS:
            raise ValueError(f"not a tokenizer.json: ids up to {MAX_TOKENS - 1:,} are allowed, got {self._size - 1:,}")

    @classmethod
    def fit(cls, texts: Iterable[str], vocabulary_size: int) -> "TextTokenizer":
        """Trains BPE merges on the texts, up to `vocabulary_size` tokens or until nothing is left to merge."""
        if vocabulary_size < 256:
            raise ValueError(f"vocabulary_size must be at least 256, one token per byte, got {vocabulary_size}")
        tokenizer = tokenizers.Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocabulary_size,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        pieces = (piece for text in texts for piece in _LONG_WORD.split(_checked(text)) if piece)
        tokenizer.train_from_iterator(pieces, trainer)
        return cls(tokenizer.to_str())

    @classmethod
    def from_file(cls, path: str | Path) -> "TextTokenizer":
        """Reads a `tokenizer.json` of any origin, ignoring its padding and truncation."""
        require_regular_file(Path(path))
        if Path(path).stat().st_size > MAX_JSON_BYTES:
            raise ValueError(f"{path}: {Path(path).stat().st_size:,} bytes, at most {MAX_JSON_BYTES:,} are allowed")
        try:
            given = cls(Path(path).read_text(encoding="utf-8"))
            return cls(given._tokenizer.to_str())  # without padding and truncation
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error

    @property
    def size(self) -> int:
        """Number of ids; they run from 0 to size − 1."""
        return self._size

    @property
    def tokens(self) -> dict[int, str]:
        """Id → token, as spelled in tokenizer.json."""
        return {number: token for token, number in self._tokenizer.get_vocab(with_added_tokens=True).items()}

    def encode(self, text: str) -> Int[np.ndarray, " tokens"]:
        """Ids of a text, without EOS. Raises ValueError for text with lone surrogates."""
        with _rust("the tokenizer failed on this text"):
            encoding = self._tokenizer.encode(_checked(text), add_special_tokens=False)
        return np.array(encoding.ids, np.int32)

    def decode(self, ids: Int[np.ndarray, " tokens"]) -> str:
        """The text of these ids; bytes that are not UTF-8 become U+FFFD. Raises ValueError for unknown ids."""
        with _rust("the tokenizer failed on these ids"):
            return self._tokenizer.decode(self._checked_ids(ids), skip_special_tokens=False)

    def encode_batch(self, texts: Sequence[str]) -> list[Int[np.ndarray, "_"]]:
        """`encode` for each text, on all cores."""
        with _rust("the tokenizer failed on one of these texts"):
            encodings = self._tokenizer.encode_batch_fast([_checked(text) for text in texts], add_special_tokens=False)
        return [np.array(encoding.ids, np.int32) for encoding in encodings]

    def decode_batch(self, rows: Sequence[Int[np.ndarray, "_"]]) -> list[str]:
        """`decode` for each row."""
        with _rust("the tokenizer failed on these ids"):
            return self._tokenizer.decode_batch([self._checked_ids(ids) for ids in rows], skip_special_tokens=False)

    @classmethod
    def _files(cls, config: TextConfig) -> Files:
        return {"tokenizer.json": None}

    @classmethod
    def _from_files(cls, config: TextConfig, content: dict[str, Any]) -> "TextTokenizer":
        return cls(content["tokenizer.json"])

    @property
    def _content(self) -> dict[str, str]:
        return {"tokenizer.json": self._json}

    def _checked_ids(self, ids: Int[np.ndarray, " tokens"]) -> list[int]:
        if ids.size and (ids.min() < 0 or ids.max() >= self.size):
            raise ValueError(f"text ids must be from 0 to {self.size - 1}, got {ids.min()} to {ids.max()}")
        return ids.tolist()


@contextmanager
def _rust(fault: str) -> Iterator[None]:
    """Turns every error of Hugging Face's library, bare exceptions and Rust panics included, into a ValueError."""
    try:
        yield
    except (ValueError, KeyboardInterrupt, SystemExit, GeneratorExit, MemoryError):
        raise
    except BaseException as error:  # a Rust panic is not an Exception
        reason = printable(str(error).partition("\n")[0])
        raise ValueError(f"{fault}: {reason}") from error


def _checked(text: str) -> str:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(f"text is not valid Unicode: lone surrogate at position {error.start}") from error
    return text
