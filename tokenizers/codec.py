"""What every tokenizer promises, and the folder it is stored in.

A media codec turns pictures or sound into a grid of codes and back, always a batch at a time. Codes are
0-based within their codebook; where a codebook lies in the model's id space is the vocabulary's business.

A folder holds `config.json` (plain JSON: kind, configuration, list of files, fingerprint) and the listed
files: arrays as `.npy`, read without pickle, or text. The fingerprint is the first 16 hex digits of

    sha256(canonical JSON of {kind, config} ‖ name, dtype, shape and bytes of each file's content)

of what the files say, whatever the code calls it by now (`formats.py`). It is checked on loading, so a folder that was
damaged, or edited by hand, is refused. A folder of the right fingerprint may still come from someone else: its files
must be those of its configuration, and an array's dtype and shape are compared before it is read.
"""

import dataclasses
import hashlib
import importlib
import json
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Protocol, TypeVar, runtime_checkable

import numpy as np
from jaxtyping import Int, Shaped

from trimask.tokenizers.storage import configuration
from trimask.tokenizers.storage.files import printable, replacing, require_plain_name, require_regular_file, write_text
from trimask.tokenizers.storage.formats import current_name, written_fields
from trimask.tokenizers.storage.json_text import MAX_JSON_BYTES

Content = Mapping[str, np.ndarray | str]
"""File name → what it holds: an array for `.npy`, else text."""


class ArrayFile(NamedTuple):
    """Dtype and shape of an array that is stored; None is a length that the configuration does not say."""

    dtype: str
    shape: tuple[int | None, ...]


Files = Mapping[str, ArrayFile | None]
"""File name → the array that it must hold; None for text."""

_T = TypeVar("_T", bound="StoredTokenizer")

CODECS = {
    "text": ("trimask.tokenizers.text", "TextTokenizer"),
    "patch": ("trimask.tokenizers.image", "PatchCodec"),
    "mel": ("trimask.tokenizers.audio", "MelCodec"),
}
"""Kind → module and name of its class."""


@runtime_checkable
class Stored(Protocol):
    """What text tokenizers and media codecs share: a folder and an identity."""

    kind: ClassVar[str]
    modality: ClassVar[str]

    @property
    def fingerprint(self) -> str:
        """Identity of everything that decides what a code means."""
        ...

    def save(self, folder: str | Path) -> None: ...


@runtime_checkable
class MediaCodec(Stored, Protocol):
    """Pictures or sound ↔ codes, which are 2-D: [rows, columns], or [time, codebooks] for several codebooks.

    image: uint8 [batch, height, width, channels] ↔ int32 [batch, rows, columns]
    audio: float32 [batch, samples], mono, in [-1, 1] ↔ int32 [batch, frames, codebooks]
    """

    @property
    def codebook_sizes(self) -> tuple[int, ...]:
        """Codewords of each residual codebook, coarsest first."""
        ...

    def encode(self, media: Shaped[np.ndarray, "batch ..."]) -> Int[np.ndarray, "batch rows columns"]: ...

    def decode(self, codes: Int[np.ndarray, "batch rows columns"]) -> Shaped[np.ndarray, "batch ..."]: ...

    def code_shape(self, media_shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of the codes of one medium of this shape, two numbers; both without the batch axis."""
        ...

    def media_shape(self, code_shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of what `decode` makes of codes of this shape, both without the batch axis."""
        ...


@runtime_checkable
class SoundCodec(MediaCodec, Protocol):
    """A codec of waveforms, all of one rate."""

    @property
    def sample_rate_hz(self) -> int: ...


class StoredTokenizer(ABC):
    """How a tokenizer is saved, loaded and recognised. One that was loaded still says of itself what its file says."""

    kind: ClassVar[str]
    config_type: ClassVar[type]
    """Class of `config`, a frozen dataclass of plain values."""
    config: Any
    _said: dict[str, Any] | None = None
    """Kind and configuration as the file says them from which it was loaded."""

    @property
    @abstractmethod
    def _content(self) -> Content:
        """The files beside config.json."""

    @classmethod
    def _files(cls, config: Any) -> Files:
        """The files that a folder of this configuration must have beside config.json."""
        return {}

    @classmethod
    @abstractmethod
    def _of(cls: type[_T], config: Any, content: dict[str, Any]) -> _T:
        """The tokenizer of this configuration and these files."""

    @property
    def _description(self) -> dict[str, Any]:
        fields = written_fields(self.config_type, dataclasses.asdict(self.config))
        return self._said or {"kind": self.kind, "config": fields}

    @property
    def fingerprint(self) -> str:
        return fingerprint(self._description, self._content)

    def save(self, folder: str | Path) -> None:
        write_folder(folder, self._description, self._content)

    @classmethod
    def load(cls: type[_T], folder: str | Path) -> _T:
        """Reads what `save` wrote. Raises ValueError for another kind, an unknown field or a damaged file."""
        folder = Path(folder)
        about = _read_description(folder)
        if current_name("codec", about.kind) != cls.kind:
            raise ValueError(f"{folder}: holds a tokenizer of kind {about.kind!r}, expected {cls.kind!r}")
        config: Any = configuration.from_dict(about.config, cls.config_type, f"{folder / 'config.json'}, $.config")
        said = {"kind": about.kind, "config": about.config}
        content = _read_content(folder, about, cls._files(config))
        found = fingerprint(said, content)
        if found != about.fingerprint:
            raise ValueError(
                f"{folder}: damaged or edited: its fingerprint is {found}, config.json says {about.fingerprint}"
            )
        try:
            tokenizer = cls._of(config, dict(content))
        except ValueError as error:
            raise ValueError(f"{folder}: {error}") from error
        tokenizer._said = said
        return tokenizer


@dataclass(frozen=True, kw_only=True)
class _Description:
    """What config.json of a tokenizer's folder says."""

    kind: str
    config: dict[str, Any]
    files: list[str]
    fingerprint: str


def load(folder: str | Path) -> Stored:
    """Loads whichever tokenizer or codec the folder holds."""
    kind = current_name("codec", _read_description(Path(folder)).kind)
    if kind not in CODECS:
        raise ValueError(f"{folder}: unknown kind of tokenizer {kind!r}, known are {', '.join(CODECS)}")
    module, name = CODECS[kind]
    return getattr(importlib.import_module(module), name).load(folder)


def fingerprint(said: Mapping[str, Any], content: Content) -> str:
    """Short digest of a tokenizer whose file says this `kind` and `config`; the equation stands at the head."""
    digest = hashlib.sha256(json.dumps({"kind": said["kind"], "config": said["config"]}, sort_keys=True).encode())
    for name, value in sorted(content.items()):
        array = np.frombuffer(value.encode(), np.uint8) if isinstance(value, str) else value
        digest.update(f"\0{name}\0{array.dtype.str}\0{array.shape}\0".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()[:16]


def write_folder(folder: str | Path, said: Mapping[str, Any], content: Content) -> None:
    """Stores one tokenizer; `config.json` comes last, so a folder that has it is complete."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for name, value in content.items():
        if isinstance(value, str):
            write_text(folder / name, value)
        else:
            with replacing(folder / name) as partial, partial.open("wb") as file:
                np.save(file, value, allow_pickle=False)
    description = {**said, "files": sorted(content), "fingerprint": fingerprint(said, content)}
    write_text(folder / "config.json", json.dumps(description, indent=2) + "\n")


def remove_folder(folder: Path) -> None:
    """Removes a folder that `write_folder` wrote, and nothing that it did not write."""
    for name in [*_read_description(folder).files, "config.json"]:
        (folder / name).unlink(missing_ok=True)
    folder.rmdir()


def _read_description(folder: Path) -> _Description:
    path = folder / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; {folder} is not the folder of a tokenizer")
    about = configuration.load(path, _Description)
    for name in about.files:
        require_plain_name(name, f"{path} @ $.files")
    return about


def _read_content(folder: Path, about: _Description, expected: Files) -> Content:
    if sorted(about.files) != sorted(expected):
        raise ValueError(
            f"{folder / 'config.json'} @ $.files: must be {', '.join(sorted(expected))}; "
            f"got {printable(', '.join(about.files)) or 'none'}"
        )
    return {name: _read_file(folder / name, array) for name, array in expected.items()}


def _read_file(path: Path, expected: ArrayFile | None) -> np.ndarray | str:
    """Text, or an array whose header is compared with what is expected before its content is read."""
    require_regular_file(path)
    if path.stat().st_size > MAX_JSON_BYTES:
        raise ValueError(f"{path}: {path.stat().st_size:,} bytes, {MAX_JSON_BYTES:,} are allowed")
    try:
        if expected is None:
            return path.read_text(encoding="utf-8")
        array = np.load(path, mmap_mode="r", allow_pickle=False)
        data_bytes = path.stat().st_size - array.offset
    except Exception as error:  # a damaged header can make NumPy raise almost anything
        raise ValueError(f"{path}: not readable: {printable(str(error))}") from error
    is_of_shape = array.ndim == len(expected.shape) and all(
        wanted in (None, length) for wanted, length in zip(expected.shape, array.shape, strict=True)
    )
    if array.dtype != expected.dtype or not is_of_shape or not array.flags.c_contiguous or not array.size:
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
