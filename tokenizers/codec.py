"""The interface of all tokenizers, and the folder format in which they are stored.

A media codec turns a batch of pictures or sounds into a grid of codes and back. Codes are 0-based within their
codebook; `vocabulary.py` decides where a codebook lies in the model's id space.

A folder holds `config.json` (plain JSON: kind, configuration, list of files, fingerprint) and the listed files: arrays
as `.npy`, read without pickle, text, or weights of a network as `.safetensors`, of which `config.json` has the SHA-256,
so that they are read only when a medium is coded. The fingerprint is the first 16 hex digits of

    sha256(canonical JSON of {kind, config} ‖ name, dtype, shape and bytes of each file's content)

with the SHA-256 of weights in the place of their bytes,

where kind and config are as the file spells them, even if the code has renamed them since (`formats.py`). The
fingerprint is checked on loading, so a folder that is damaged or was edited by hand is refused. A folder with a correct
fingerprint may still come from someone else: its files must be those that its configuration requires, and the dtype and
shape of an array are checked before its content is read.
"""

import dataclasses
import hashlib
import importlib
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Protocol, TypeVar, runtime_checkable

import numpy as np
from jaxtyping import Int, Shaped

from trimask.tokenizers.storage import configuration
from trimask.tokenizers.storage.files import printable, replacing, require_plain_name, require_regular_file, write_text
from trimask.tokenizers.storage.formats import added_field, current_name, written_fields
from trimask.tokenizers.storage.json_text import MAX_JSON_BYTES
from trimask.tokenizers.storage.weights import WeightFile

Content = Mapping[str, np.ndarray | str | WeightFile]
"""File name → content: an array for `.npy`, weights for `.safetensors`, else text."""


class ArrayFile(NamedTuple):
    """Expected dtype and shape of a stored array; None is a length that the configuration does not fix."""

    dtype: str
    shape: tuple[int | None, ...]


Files = Mapping[str, ArrayFile | type[WeightFile] | None]
"""File name → expected array, `WeightFile` for weights, None for text."""

_T = TypeVar("_T", bound="StoredTokenizer")

CODECS = {
    "text": ("trimask.tokenizers.text", "TextTokenizer"),
    "patch": ("trimask.tokenizers.image", "PatchCodec"),
    "mel": ("trimask.tokenizers.audio", "MelCodec"),
    "neural_image": ("trimask.tokenizers.neural.neural_codec", "NeuralPictureCodec"),
    "neural_audio": ("trimask.tokenizers.neural.neural_codec", "NeuralSoundCodec"),
}
"""Codec kind → module and class name."""


@runtime_checkable
class Stored(Protocol):
    """What text tokenizers and media codecs have in common: a modality, a fingerprint and a folder."""

    kind: ClassVar[str]
    modality: ClassVar[str]

    @property
    def fingerprint(self) -> str:
        """Digest of everything that decides what a code means, 16 hex digits."""
        ...

    def save(self, folder: str | Path) -> None:
        """Writes the tokenizer to a folder."""
        ...


@runtime_checkable
class MediaCodec(Stored, Protocol):
    """Pictures or sound ↔ 2-D codes: [rows, columns], or [time, codebooks] with several codebooks.

    image: uint8 [batch, height, width, channels] ↔ int32 [batch, rows, columns]
    audio: float32 [batch, samples], mono, in [-1, 1] ↔ int32 [batch, frames, codebooks]
    """

    @property
    def codebook_sizes(self) -> tuple[int, ...]:
        """Number of codewords of each residual codebook, coarsest first."""
        ...

    def encode(self, media: Shaped[np.ndarray, "batch ..."]) -> Int[np.ndarray, "batch rows columns"]:
        """Codes of a batch of media of one shape. Raises ValueError for media that the codec cannot encode."""
        ...

    def decode(self, codes: Int[np.ndarray, "batch rows columns"]) -> Shaped[np.ndarray, "batch ..."]:
        """Media of a batch of codes of one shape. Raises ValueError for codes outside the codebooks."""
        ...

    def code_shape(self, media_shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of the codes (two numbers) of one medium of this shape, both without the batch axis.

        Raises ValueError for a shape that the codec cannot encode.
        """
        ...

    def media_shape(self, code_shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of the medium that `decode` makes from codes of this shape, both without the batch axis."""
        ...


@runtime_checkable
class SoundCodec(MediaCodec, Protocol):
    """A codec for waveforms of one sample rate."""

    @property
    def sample_rate_hz(self) -> int:
        """Sample rate of the waveforms in Hz."""
        ...


class StoredTokenizer(ABC):
    """Base of the tokenizers: saving, loading and fingerprint.

    A loaded tokenizer keeps describing itself as its file does, so renames in the code do not change its fingerprint.
    """

    kind: ClassVar[str]
    config_type: ClassVar[type]
    """Class of `config`, a frozen dataclass of plain values."""
    config: Any
    _stored_description: dict[str, Any] | None = None
    """Kind and configuration as spelled in the file that the tokenizer was loaded from; None if it was not loaded."""

    @property
    @abstractmethod
    def _content(self) -> Content:
        """Names and contents of the files besides config.json."""

    @classmethod
    def _files(cls, config: Any) -> Files:
        """Files that a folder with this configuration must have besides config.json."""
        return {}

    @classmethod
    @abstractmethod
    def _from_files(cls: type[_T], config: Any, content: dict[str, Any]) -> _T:
        """Builds the tokenizer from its configuration and the contents of its files."""

    @property
    def _description(self) -> dict[str, Any]:
        fields = written_fields(self.config_type, dataclasses.asdict(self.config))
        return self._stored_description or {"kind": self.kind, "config": fields}

    @property
    def fingerprint(self) -> str:
        """Digest of kind, configuration and files, 16 hex digits; the formula is at the top of the module."""
        return fingerprint(self._description, self._content)

    def save(self, folder: str | Path) -> None:
        """Writes the tokenizer to a folder, which `load` reads."""
        write_folder(folder, self._description, self._content)

    @classmethod
    def load(cls: type[_T], folder: str | Path) -> _T:
        """Reads a folder that `save` wrote. Raises ValueError for another kind, an unknown field or a damaged file."""
        folder = Path(folder)
        description = _read_description(folder)
        if current_name("codec", description.kind) != cls.kind:
            raise ValueError(f"{folder}: holds a tokenizer of kind {description.kind!r}, expected {cls.kind!r}")
        config: Any = configuration.from_dict(
            description.config, cls.config_type, f"{folder / 'config.json'}, $.config"
        )
        as_stored = {"kind": description.kind, "config": description.config}
        content = _read_content(folder, description, cls._files(config))
        digest = fingerprint(as_stored, content)
        if digest != description.fingerprint:
            raise ValueError(
                f"{folder}: damaged or edited: its fingerprint is {digest}, config.json says {description.fingerprint}"
            )
        try:
            tokenizer = cls._from_files(config, dict(content))
        except ValueError as error:
            raise ValueError(f"{folder}: {error}") from error
        tokenizer._stored_description = as_stored
        return tokenizer


@dataclass(frozen=True, kw_only=True)
class _Description:
    """Content of a tokenizer folder's config.json."""

    kind: str
    config: dict[str, Any]
    files: list[str]
    fingerprint: str
    sha256: dict[str, str] = added_field(as_before={}, default_factory=dict)
    """SHA-256 of every file of weights, by its name."""


def load_tokenizer(folder: str | Path) -> Stored:
    """Loads the tokenizer or codec that a folder holds. Raises ValueError if its kind is unknown."""
    kind = current_name("codec", _read_description(Path(folder)).kind)
    if kind not in CODECS:
        raise ValueError(f"{folder}: unknown tokenizer kind {kind!r}, known are {', '.join(CODECS)}")
    module, name = CODECS[kind]
    return getattr(importlib.import_module(module), name).load(folder)


def fingerprint(description: Mapping[str, Any], content: Content) -> str:
    """Digest (16 hex digits) of a tokenizer with this `kind` and `config`; the formula is at the top of the module."""
    digest = hashlib.sha256(
        json.dumps({name: description[name] for name in ("kind", "config")}, sort_keys=True).encode()
    )
    for name, value in sorted(content.items()):
        if isinstance(value, WeightFile):
            value = value.sha256
        array = np.frombuffer(value.encode(), np.uint8) if isinstance(value, str) else value
        digest.update(f"\0{name}\0{array.dtype.str}\0{array.shape}\0".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()[:16]


def write_folder(folder: str | Path, description: Mapping[str, Any], content: Content) -> None:
    """Writes a tokenizer folder. `config.json` is written last, so a folder that has it is complete."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for name, value in content.items():
        if isinstance(value, str):
            write_text(folder / name, value)
        elif isinstance(value, WeightFile):
            value.save(folder / name)
        else:
            with replacing(folder / name) as partial, partial.open("wb") as file:
                np.save(file, value, allow_pickle=False)
    complete = {**description, "files": sorted(content), "fingerprint": fingerprint(description, content)}
    digests = {name: value.sha256 for name, value in sorted(content.items()) if isinstance(value, WeightFile)}
    complete |= {"sha256": digests} if digests else {}
    write_text(folder / "config.json", json.dumps(complete, indent=2) + "\n")


def remove_folder(folder: Path) -> None:
    """Removes the files that `write_folder` wrote, and then the folder; raises OSError if it holds anything else."""
    for name in [*_read_description(folder).files, "config.json"]:
        (folder / name).unlink(missing_ok=True)
    folder.rmdir()


def _read_description(folder: Path) -> _Description:
    path = folder / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; {folder} is not a tokenizer folder")
    description = configuration.load(path, _Description)
    for name in description.files:
        require_plain_name(name, f"{path} @ $.files")
    for name, digest in description.sha256.items():
        if name not in description.files or not re.fullmatch("[0-9a-f]{64}", digest):
            raise ValueError(
                f"{path} @ $.sha256: must map names of files to 64 hex digits, got {printable(digest[:80])!r}"
            )
    return description


def _read_content(folder: Path, description: _Description, expected: Files) -> Content:
    if sorted(description.files) != sorted(expected):
        raise ValueError(
            f"{folder / 'config.json'} @ $.files: must be {', '.join(sorted(expected))}; "
            f"got {printable(', '.join(description.files)) or 'none'}"
        )
    content: dict[str, np.ndarray | str | WeightFile] = {}
    for name, kind in expected.items():
        if kind is None or isinstance(kind, ArrayFile):
            content[name] = _read_file(folder / name, kind)
        else:
            content[name] = _weights(folder / name, description)
    return content


def _weights(path: Path, description: _Description) -> WeightFile:
    """A file of weights, unread. Raises ValueError if config.json lacks its digest."""
    require_regular_file(path)
    if path.name not in description.sha256:
        raise ValueError(f"{path.with_name('config.json')} @ $.sha256: lacks the digest of {path.name}")
    return WeightFile(path, description.sha256[path.name])


def _read_file(path: Path, expected: ArrayFile | None) -> np.ndarray | str:
    """Reads a text, or an array after comparing its header with the expected dtype and shape."""
    require_regular_file(path)
    if path.stat().st_size > MAX_JSON_BYTES:
        raise ValueError(f"{path}: {path.stat().st_size:,} bytes, at most {MAX_JSON_BYTES:,} are allowed")
    try:
        if expected is None:
            return path.read_text(encoding="utf-8")
        array = np.load(path, mmap_mode="r", allow_pickle=False)
        data_bytes = path.stat().st_size - array.offset
    except Exception as error:  # a damaged header can make NumPy raise almost anything
        raise ValueError(f"{path}: not readable: {printable(str(error))}") from error
    has_shape = array.ndim == len(expected.shape) and all(
        wanted in (None, length) for wanted, length in zip(expected.shape, array.shape, strict=True)
    )
    if array.dtype != expected.dtype or not has_shape or not array.flags.c_contiguous or not array.size:
        shape = " × ".join("any" if length is None else str(length) for length in expected.shape)
        raise ValueError(
            f"{path}: must hold {expected.dtype} of shape {shape} in C order, got {array.dtype} of shape {array.shape}"
        )
    if data_bytes != array.nbytes:
        raise ValueError(f"{path}: holds {data_bytes:,} bytes of data, its header says {array.nbytes:,}")
    content = np.array(array)
    if not np.isfinite(content).all():
        raise ValueError(f"{path}: holds NaN or infinite numbers")
    return content
