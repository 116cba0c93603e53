"""What every tokenizer promises, and the folder it is stored in.

A media codec turns pictures or sound into a grid of codes and back, always a batch at a time. Codes are
0-based within their codebook; where a codebook lies in the model's id space is the vocabulary's business.

A folder holds `config.json` (plain JSON: kind, configuration, list of files, fingerprint) and the listed
files: arrays as `.npy`, read without pickle, or text. The fingerprint is the first 16 hex digits of

    sha256(canonical JSON of {kind, config} ‖ name, dtype, shape and bytes of each file's content)

of what the files say, whatever the code calls it by now (`formats.py`). It is checked on loading, so a folder that was
damaged, or edited by hand, is refused.
"""

import dataclasses
import hashlib
import importlib
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Protocol, TypeVar, runtime_checkable

import numpy as np
from jaxtyping import Int, Shaped

from trimask.tokenizers.formats import present_name, structured, written_fields

Content = Mapping[str, np.ndarray | str]
"""File name → what it holds: an array for `.npy`, else text."""

_T = TypeVar("_T", bound="StoredTokenizer")

KINDS = {
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
        said, content = read_folder(folder, cls.kind)
        config = structured(cls.config_type, said["config"], f"{Path(folder) / 'config.json'}")
        tokenizer = cls._of(config, content)
        tokenizer._said = said
        return tokenizer


def load(folder: str | Path) -> Stored:
    """Loads whichever tokenizer or codec the folder holds."""
    kind = present_name("codec", _read_description(Path(folder))["kind"])
    if kind not in KINDS:
        raise ValueError(f"{folder}: unknown kind of tokenizer {kind!r}, known are {', '.join(KINDS)}")
    module, name = KINDS[kind]
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
            (folder / name).write_text(value, encoding="utf-8", newline="\n")
        else:
            np.save(folder / name, value, allow_pickle=False)
    description = {**said, "files": sorted(content), "fingerprint": fingerprint(said, content)}
    (folder / "config.json").write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")


def read_folder(folder: str | Path, kind: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """What a folder says (kind, config) and what it holds, checked against its fingerprint and the kind expected."""
    folder = Path(folder)
    description = _read_description(folder)
    if present_name("codec", description["kind"]) != kind:
        raise ValueError(f"{folder}: holds a tokenizer of kind {description['kind']!r}, expected {kind!r}")
    said = {"kind": description["kind"], "config": description["config"]}
    content = {name: _read_file(folder / name) for name in description["files"]}
    found = fingerprint(said, content)
    if found != description["fingerprint"]:
        raise ValueError(
            f"{folder}: damaged or edited: its fingerprint is {found}, config.json says {description['fingerprint']}"
        )
    return said, content


def _read_description(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; {folder} is not the folder of a tokenizer")
    try:
        description = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not readable as JSON: {error}") from error
    expected = {"kind": str, "config": dict, "files": list, "fingerprint": str}
    for field, field_type in expected.items():
        if not isinstance(description, dict) or not isinstance(description.get(field), field_type):
            raise ValueError(f"{path}: not the description of a tokenizer, {field!r} is missing or malformed")
    for name in description["files"]:
        if not isinstance(name, str) or not re.fullmatch(r"\w[\w.-]*", name):
            raise ValueError(f"{path}: files must be plain names inside the folder, got {name!r}")
    return description


def _read_file(path: Path) -> np.ndarray | str:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file, though config.json lists it")
    try:
        return np.load(path, allow_pickle=False) if path.suffix == ".npy" else path.read_text(encoding="utf-8")
    except (ValueError, EOFError) as error:
        raise ValueError(f"{path}: not readable: {error}") from error
