"""Table of the kinds of sources. A source gives raw examples: text, alone or paired with one medium (see `records.py`).

kind      where                       records
digits    a config of digits.py       the embedded dataset of digits
images    a folder                    lines of metadata.jsonl (.csv, .parquet): file_name, text, any other fields
audio     a folder                    the same; the kind of every further modality is its name
text      files (globs are expanded)  paragraphs, lines or whole files; in .jsonl files, a field of each line
prompts   .jsonl files                two fields of each line: prompt and response
puzzles   a config of puzzles.py      embedded prompts, each with its only correct response
stream    CONFIG:RECORDS of stream.py digits warped or spoken anew, none of them twice
tfds      name of a TFDS dataset      records with a text or label, alone or beside an image or audio
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
    """Kind and location of one source."""

    kind: str
    """Kind of source: a name in `SOURCES`, or that of a modality, for a folder of its media."""
    where: tuple[str, ...]
    """Folder, files, or name of an embedded or TFDS dataset."""


def open_source(source: SourceConfig, config: OpenConfig) -> Source:
    """Opens a source. Raises ValueError for an unknown kind, or for a wrong number of names."""
    kinds = {name: partial(_folder, name) for name in MODALITIES} | SOURCES
    if source.kind not in kinds:
        raise ValueError(f"unknown kind of source {source.kind!r}; there are {', '.join(kinds)}")
    if not source.where:
        raise ValueError(f"a source of kind {source.kind} needs at least one folder, file or name, got none")
    return kinds[source.kind](source.where, config)


def uses_of_parts(source: SourceConfig, records: float) -> str:
    """How often the parts of an embedded source's training records are used by so many of them; empty if it has none.

    Records of other sources are not known to have parts in common.
    """
    if source.kind not in ("digits", "stream"):
        return ""
    from trimask.diffusion.data.readers import digits, stream

    configs = digits.DIGIT_CONFIGS if source.kind == "digits" else stream.STREAM_CONFIGS
    config = configs[source.where[0].partition(":")[0]]
    if not hasattr(config, "parts"):
        return ""
    parts = config.parts()
    return f"{parts.number:,} {parts.what}, {records * parts.per_record / parts.number:.1f} times each"


def folder_kind(medium: str) -> str:
    """Kind of source of a folder of media: the modality's name, but `images` for pictures."""
    return "images" if medium == "image" else medium


def _digits(where: tuple[str, ...], config: OpenConfig) -> Source:
    from trimask.diffusion.data.readers import tfds_records  # TFDS takes seconds to import

    return tfds_records.EmbeddedDigits(_only(where, "digits"), config.folder)


def _tfds(where: tuple[str, ...], config: OpenConfig) -> Source:
    from trimask.diffusion.data.readers import tfds_records

    return tfds_records.TfdsSource(_only(where, "tfds"), config)


def _folder(medium: str, where: tuple[str, ...], config: OpenConfig) -> Source:
    from trimask.diffusion.data.readers.folders import MediaFolder

    return MediaFolder(Path(_only(where, folder_kind(medium))), medium, config)


def _text(where: tuple[str, ...], config: OpenConfig) -> Source:
    from trimask.diffusion.data.readers.texts import TextFiles

    return TextFiles(where, config.fields, config.media.limits.record_bytes)


def _prompts(where: tuple[str, ...], config: OpenConfig) -> Source:
    from trimask.diffusion.data.readers.texts import PromptFiles

    return PromptFiles(where, config.fields, config.media.limits.record_bytes)


def _puzzles(where: tuple[str, ...], config: OpenConfig) -> Source:
    from trimask.diffusion.data.readers.puzzles import PuzzleSource

    return PuzzleSource(_only(where, "puzzles"))


def _stream(where: tuple[str, ...], config: OpenConfig) -> Source:
    from trimask.diffusion.data.readers.stream import StreamSource

    return StreamSource.of(_only(where, "stream"))


def _only(where: tuple[str, ...], kind: str) -> str:
    """The single entry of `where`. Raises ValueError if there are several."""
    if len(where) != 1:
        raise ValueError(f"a source of kind {kind} has one folder or name, got {', '.join(where)}")
    return where[0]


SOURCES: dict[str, Callable[[tuple[str, ...], OpenConfig], Source]] = {
    "digits": _digits,
    "images": partial(_folder, "image"),
    "audio": partial(_folder, "audio"),
    "text": _text,
    "prompts": _prompts,
    "puzzles": _puzzles,
    "stream": _stream,
    "tfds": _tfds,
}
"""Kind of source → function of (where, configuration) that opens it; `open_source` adds the kinds of `MODALITIES`."""
