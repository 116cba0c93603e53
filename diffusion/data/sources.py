"""Where raw examples come from: text, alone or paired with one medium, read block by block.

    kind      where                       records
    digits    a config of digits.py       the embedded dataset
    images    a folder                    lines of metadata.jsonl (.csv, .parquet): file_name, text, what else you like
    audio     a folder                    the same; the kind of every further modality is its name
    text      files (globs are expanded)  paragraphs, lines or whole files; of .jsonl, a field of each line
    prompts   .jsonl files                two fields of each line: what is asked, and the answer
    puzzles   a config of puzzles.py      embedded prompts, and the responses that are right
    tfds      names of TFDS               records with a text or label, alone or beside an image or audio

A source lists its blocks without reading media; a block is a list of entries; an entry knows its id, its origin and
its split, and loads its media when told to. A record that cannot be used is a `BadRecord`, which says why.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from trimask.diffusion.data.modalities import MODALITIES
from trimask.diffusion.data.reading_config import OpenConfig
from trimask.diffusion.data.records import Source


@dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """One kind of source and where it is."""

    kind: str
    """A kind of the table at the head of this file."""
    where: tuple[str, ...]
    """Folder, files or names."""


def open_source(source: SourceConfig, config: OpenConfig) -> Source:
    """The source of this kind."""
    kinds = {name: partial(_folder, name) for name in MODALITIES} | SOURCES
    if source.kind not in kinds:
        raise ValueError(f"unknown kind of source {source.kind!r}; there are {', '.join(kinds)}")
    if not source.where:
        raise ValueError(f"a source of {source.kind} needs at least one name, got none")
    return kinds[source.kind](source.where, config)


def folder_kind(medium: str) -> str:
    """The kind of source that is a folder of this medium; `images` are called as they always were."""
    return "images" if medium == "image" else medium


def _digits(where: tuple[str, ...], config: OpenConfig) -> Source:
    from trimask.diffusion.data.readers import tfds_records  # TFDS takes seconds to import

    return tfds_records.EmbeddedDigits(_only(where, "digits"), config.folder)


def _tfds(where: tuple[str, ...], config: OpenConfig) -> Source:
    from trimask.diffusion.data.readers import tfds_records

    return tfds_records.TfdsSource(_only(where, "tfds"), config)


def _folder(medium: str, where: tuple[str, ...], config: OpenConfig) -> Source:
    from trimask.diffusion.data.readers.folders import Folder

    return Folder(Path(_only(where, folder_kind(medium))), medium, config)


def _text(where: tuple[str, ...], config: OpenConfig) -> Source:
    from trimask.diffusion.data.readers.texts import Texts

    return Texts(where, config.fields, config.media.limits.record_bytes)


def _prompts(where: tuple[str, ...], config: OpenConfig) -> Source:
    from trimask.diffusion.data.readers.texts import Prompted

    return Prompted(where, config.fields, config.media.limits.record_bytes)


def _puzzles(where: tuple[str, ...], config: OpenConfig) -> Source:
    from trimask.diffusion.data.readers.puzzles import Puzzles

    return Puzzles(_only(where, "puzzles"))


def _only(where: tuple[str, ...], kind: str) -> str:
    if len(where) != 1:
        raise ValueError(f"a source of {kind} is one name, got {', '.join(where)}")
    return where[0]


SOURCES: dict[str, Callable[[tuple[str, ...], OpenConfig], Source]] = {
    "digits": _digits,
    "images": partial(_folder, "image"),
    "audio": partial(_folder, "audio"),
    "text": _text,
    "prompts": _prompts,
    "puzzles": _puzzles,
    "tfds": _tfds,
}
