"""Text ↔ ids, on Hugging Face `tokenizers`.

What `fit` makes is byte-level BPE: the 256 bytes are always in the alphabet, nothing is normalised and no
space is added, so decode(encode(text)) = text for every Unicode string. Each digit stands alone before
pairs are merged, so "47" is always the two tokens "4", "7". Text is only ever text: the name of a special
token in it is spelled out.
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
"""Where text without blanks, or of blanks alone, is cut for fitting: its time grows with the square of a word."""
MAX_TOKENS = 1 << 22
"""Most ids of a text tokenizer that is read."""


@dataclass(frozen=True)
class TextConfig:
    """Nothing: all there is to say is in the tokenizer.json."""


class TextTokenizer(StoredTokenizer):
    """Any `tokenizer.json`. One that was not made by `fit` round-trips as well as its own rules allow."""

    kind: ClassVar[str] = "text"
    config_type = TextConfig
    config = TextConfig()
    modality: ClassVar[str] = "text"

    def __init__(self, tokenizer_json: str):
        """`tokenizer_json` stays what is saved: another version of the library may write the same otherwise."""
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
        """Learns merges from the texts up to `vocabulary_size` tokens, or until nothing is left to merge."""
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
        """Reads a `tokenizer.json` of any origin."""
        require_regular_file(Path(path))
        if Path(path).stat().st_size > MAX_JSON_BYTES:
            raise ValueError(f"{path}: {Path(path).stat().st_size:,} bytes, {MAX_JSON_BYTES:,} are allowed")
        try:
            given = cls(Path(path).read_text(encoding="utf-8"))
            return cls(given._tokenizer.to_str())  # without padding and truncation
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error

    @property
    def size(self) -> int:
        """Number of ids, 0 to size − 1."""
        return self._size

    @property
    def tokens(self) -> dict[int, str]:
        """Id → token, as tokenizer.json spells it."""
        return {number: token for token, number in self._tokenizer.get_vocab(with_added_tokens=True).items()}

    def encode(self, text: str) -> Int[np.ndarray, " tokens"]:
        with _rust("the tokenizer fails at this text"):
            encoding = self._tokenizer.encode(_checked(text), add_special_tokens=False)
        return np.array(encoding.ids, np.int32)

    def decode(self, ids: Int[np.ndarray, " tokens"]) -> str:
        """The text of these ids; bytes that are not UTF-8 become U+FFFD."""
        with _rust("the tokenizer fails at these ids"):
            return self._tokenizer.decode(self._checked_ids(ids), skip_special_tokens=False)

    def encode_batch(self, texts: Sequence[str]) -> list[Int[np.ndarray, "_"]]:
        """As `encode`, each text by itself, on all cores."""
        with _rust("the tokenizer fails at one of these texts"):
            encodings = self._tokenizer.encode_batch_fast([_checked(text) for text in texts], add_special_tokens=False)
        return [np.array(encoding.ids, np.int32) for encoding in encodings]

    def decode_batch(self, rows: Sequence[Int[np.ndarray, "_"]]) -> list[str]:
        """As `decode`, each row by itself."""
        with _rust("the tokenizer fails at these ids"):
            return self._tokenizer.decode_batch([self._checked_ids(ids) for ids in rows], skip_special_tokens=False)

    @classmethod
    def _files(cls, config: TextConfig) -> Files:
        return {"tokenizer.json": None}

    @classmethod
    def _of(cls, config: TextConfig, content: dict[str, Any]) -> "TextTokenizer":
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
    """Turns what Hugging Face's library raises, bare exceptions and panics of Rust, into a ValueError."""
    try:
        yield
    except (ValueError, KeyboardInterrupt, SystemExit, GeneratorExit, MemoryError):
        raise
    except BaseException as error:  # a panic of Rust is no Exception
        reason = printable(str(error).partition("\n")[0])
        raise ValueError(f"{fault}: {reason}") from error


def _checked(text: str) -> str:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(f"text is not valid Unicode: lone surrogate at position {error.start}") from error
    return text
