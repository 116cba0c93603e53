"""Folders of files of one modality with a list of them, as in Hugging Face's imagefolder and audiofolder.

    photos/metadata.jsonl       {"file_name": "sea/1.jpg", "text": "a grey sea"}, one such line for each file
    photos/sea/1.jpg

The list may also be metadata.csv or metadata.parquet, with these names for columns. `file_name` is relative to the
list's folder and must not lead out of it. A file below a folder train/, validation/ (val/, valid/, dev/) or test/ (or
test_…/) is of that split, whatever list names it, unless its line says another `split`; such a sub-folder may have a
list of its own. No file is named by two lists, and lines that name the same file say the same split.

A caption that is a whole number, as 7, -1, "7" or 7.0, stands for a name where names of labels are known: those of
`--fields.labels`, or of the dataset (label_names.py).
"""

import hashlib
import os
import re
import unicodedata
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from trimask.diffusion.data.fields import Fields
from trimask.diffusion.data.layout import Fill
from trimask.diffusion.data.modalities import modality
from trimask.diffusion.data.readers.label_names import label_names
from trimask.diffusion.data.readers.lines import TextRecord, blocks_of, records_of
from trimask.diffusion.data.readers.tables import TABLES, blocks_of_table, rows_of_block
from trimask.diffusion.data.reading_config import OpenConfig
from trimask.diffusion.data.records import BadRecord, Block, Entry, RawExample
from trimask.diffusion.data.splits import in_order, split_of_folder
from trimask.tokenizers.storage.files import existing_path_inside
from trimask.tokenizers.vocabulary import TEXT

METADATA = "metadata.jsonl"
_LISTS = (METADATA, *(f"metadata{ending}" for ending in TABLES))
_NOT_MEDIA = re.compile(r"(readme|licen[sc]e|citation|dataset_infos?)(\.(md|txt|rst|cff|bib|json|ya?ml))?", re.I)
"""Names of files that say something of a dataset."""
_WHOLE_NUMBER = re.compile(r"[+-]?\d+(\.0*)?")


@dataclass(frozen=True)
class Folder:
    """Captioned files of one medium."""

    folder: Path
    medium: str
    config: OpenConfig
    fill: Fill = "whole"

    def blocks(self, records: int) -> list[Block]:
        return [self._with_media(block) for path in self._lists() for block in self._blocks_of(path, records)]

    def entries(self, block: Block) -> Iterator[Entry | BadRecord]:
        for line, read in self._records(block):
            try:
                yield self._entry(Path(block.file), line, read())
            except ValueError as error:
                yield BadRecord(block.file, line, str(error))

    def unread(self) -> Iterator[str]:
        """Ids of all files that may be media, and lists that are not read: what no record names is used by nothing."""
        for folder, names, files in os.walk(self.folder):
            names[:] = sorted(name for name in names if not name.startswith("."))
            for name in sorted(files):
                is_read = name in _LISTS and Path(folder) in self._folders
                if not (is_read or name.startswith(".") or _NOT_MEDIA.fullmatch(name)):
                    yield _id_of(os.path.relpath(os.path.join(folder, name), self.folder))

    def _lists(self) -> list[Path]:
        if not self.folder.is_dir():
            raise FileNotFoundError(f"{self.folder}: no such folder of {self.medium} files")
        found = []
        for folder in self._folders:
            own = [folder / name for name in _LISTS if os.path.lexists(folder / name)]
            if len(own) > 1:
                raise ValueError(f"{folder}: has several lists, {', '.join(path.name for path in own)}; keep one")
            found += own
        if not found:
            raise FileNotFoundError(
                f"{self.folder}: no {METADATA} (nor .csv, nor .parquet) in it, nor in train/, validation/ or test/ of "
                'it; each of its lines is like {"file_name": "1.png", "text": "a caption"}'
            )
        return found

    @cached_property
    def _folders(self) -> list[Path]:
        """The folder, and those in it that are a split's."""
        own = sorted(path for path in self.folder.iterdir() if path.is_dir() and split_of_folder(path.name))
        order = in_order({split_of_folder(path.name) or "" for path in own})
        return [self.folder, *sorted(own, key=lambda path: order.index(split_of_folder(path.name) or ""))]

    def _blocks_of(self, path: Path, records: int) -> list[Block]:
        if path.suffix in TABLES:
            return blocks_of_table(path, records)
        return blocks_of(path, "line", records, self._most)

    def _records(self, block: Block) -> Iterator[tuple[int, Callable[[], Fields]]]:
        """Line of every record of a block, and what reads its fields."""
        if Path(block.file).suffix in TABLES:
            for row in rows_of_block(block):
                yield row.line, partial(_cells, row.fields)
        else:
            for record in records_of(block, "line", self._most):
                yield record.line, partial(_object_of, record)

    def _with_media(self, block: Block) -> Block:
        """The block with a digest of its media, where they can be looked at, and of the dataset's names for labels.

        Of media it has the names, sizes and times; of labels those names that captions have.
        """
        digest = hashlib.sha256()
        for entry in self.entries(block):
            if not isinstance(entry, BadRecord) and entry.path is not None and entry.path.is_file():
                about = entry.path.stat()
                digest.update(f"{entry.id}\0{about.st_size}\0{about.st_mtime_ns}\0".encode())
                if self.has_label(entry) and not self.config.fields.labels and self._names_of_labels(Path(block.file)):
                    digest.update(f"{self._text(Path(block.file), entry.fields)}\0".encode())
        return replace(block, media_sha256=digest.hexdigest())

    @property
    def _most(self) -> int:
        return self.config.media.limits.record_bytes

    def _entry(self, metadata: Path, line: int, fields: Fields) -> Entry:
        name = fields.get("file_name")
        if not isinstance(name, str) or not name:
            raise ValueError(
                f'needs a "file_name", which is a path in the folder, got {name!r}; its fields are '
                f"{', '.join(fields) or 'none'}"
            )
        text = self._text(metadata, fields)
        path = existing_path_inside(metadata.parent.resolve(), name)
        id = _id_of(os.path.join(os.path.relpath(metadata.parent, self.folder), name))
        named = next(filter(None, map(split_of_folder, id.split("/")[:-1])), None)
        split = fields.split(default=named)
        return Entry(id, str(metadata), line, partial(self._load, id, path, text), split, fields, path)

    def has_label(self, entry: Entry) -> bool:
        """Whether the caption of a record is a number, which stands for a name if names are known."""
        return _number(entry.fields.get(self.config.fields.text)) is not None

    def _text(self, metadata: Path, fields: Fields) -> str:
        """The caption; of a number the name that is known for it."""
        name = self.config.fields.text
        value = fields.get(name)
        number = _number(value)
        if number is None:
            return fields.text(name)
        names = self.config.fields.labels or self._names_of_labels(metadata)
        if not names:
            return fields.text(name, "; --fields.labels names the numbers from 0 on")
        if not 0 <= number < len(names):
            raise ValueError(f'"{name}" is {value}, and names are known of 0 to {len(names) - 1}: {", ".join(names)}')
        return names[int(number)]

    def _names_of_labels(self, metadata: Path) -> tuple[str, ...]:
        """Names that the dataset has for a list's labels. They are read once, also where they are refused."""
        if metadata not in self._known_labels:
            try:
                self._known_labels[metadata] = label_names(metadata, self.folder, self.config.fields.text)
            except ValueError as error:
                self._known_labels[metadata] = str(error)
        known = self._known_labels[metadata]
        if isinstance(known, str):
            raise ValueError(known)
        return known

    @cached_property
    def _known_labels(self) -> dict[Path, tuple[str, ...] | str]:
        """List → names for its labels, or in words why they are refused."""
        return {}

    def _load(self, id: str, path: Path, text: str) -> RawExample:
        kind = modality(self.medium)
        example = RawExample(id, {TEXT: text, self.medium: kind.read(path, self.config.media)})
        for fault in kind.faults(path):
            raise ValueError(f"{path}: {fault}")
        return example


def _number(value: Any) -> int | float | None:
    """The whole number that a caption is, also as text or as a fraction with .0; None for any other caption."""
    if isinstance(value, str) and _WHOLE_NUMBER.fullmatch(value.strip()):
        return float(value)
    return value if type(value) is int or (type(value) is float and value.is_integer()) else None


def _object_of(record: TextRecord) -> Fields:
    return Fields.of_json(record.text)


def _cells(fields: dict[str, Any] | str) -> Fields:
    if isinstance(fields, str):
        raise ValueError(fields)
    return Fields(fields)


def _id_of(name: str) -> str:
    """The id of a file: its path in the folder, written in one way."""
    return unicodedata.normalize("NFC", os.path.normpath(name)).replace(os.sep, "/")
