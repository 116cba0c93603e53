"""Folders of files of one modality with a list of them, as in Hugging Face's imagefolder and audiofolder.

    photos/metadata.jsonl       {"file_name": "sea/1.jpg", "text": "a grey sea"}, one such line for each file
    photos/sea/1.jpg

The list may also be metadata.csv or metadata.parquet, with columns of these names. `file_name` is relative to the
list's folder and must not lead out of it. A file below a folder train/, validation/ (val/, valid/, dev/) or test/ (or
test_…/) belongs to that split, whatever list names it, unless its line names another `split`; such a sub-folder may
have a list of its own. Two lists must not name one file, and lines that name one file must agree on its split.

A caption that is a whole number, such as 7, -1, "7" or 7.0, is replaced by the name of that label if names are known:
those of `--fields.labels`, or of the dataset (label_names.py).
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
from trimask.diffusion.data.readers.lines import TextRecord, blocks_of_text_file, records_of_block
from trimask.diffusion.data.readers.tables import TABLES, TableRow, blocks_of_table, rows_of_block
from trimask.diffusion.data.reading_config import OpenConfig
from trimask.diffusion.data.records import BadRecord, Block, Entry, RawExample
from trimask.diffusion.data.splits import sorted_splits, split_of_folder
from trimask.tokenizers.storage.files import existing_path_inside
from trimask.tokenizers.vocabulary import TEXT

_JSON_LIST = "metadata.jsonl"
_LISTS = (_JSON_LIST, *(f"metadata{ending}" for ending in TABLES))
"""File names of lists."""
_DOCUMENTATION = re.compile(r"(readme|licen[sc]e|citation|dataset_infos?)(\.(md|txt|rst|cff|bib|json|ya?ml))?", re.I)
"""Names of files that describe a dataset, and need not be named by a list."""
_WHOLE_NUMBER = re.compile(r"[+-]?\d+(\.0*)?")


@dataclass(frozen=True)
class MediaFolder:
    """Source of captioned files of one modality."""

    folder: Path
    medium: str
    """Modality of the files."""
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
        """Ids of all files that a record should name: possible media, and lists in folders whose lists are not read."""
        for folder, names, files in os.walk(self.folder):
            names[:] = sorted(name for name in names if not name.startswith("."))
            for name in sorted(files):
                is_list = name in _LISTS and Path(folder) in self._folders
                if not (is_list or name.startswith(".") or _DOCUMENTATION.fullmatch(name)):
                    yield _id_of(os.path.relpath(os.path.join(folder, name), self.folder))

    def _lists(self) -> list[Path]:
        """Lists of the folder and of its folders of splits. Raises an error if one has several, or none has any."""
        if not self.folder.is_dir():
            raise FileNotFoundError(f"{self.folder}: no such folder of {self.medium} files")
        lists = []
        for folder in self._folders:
            paths = [folder / name for name in _LISTS if os.path.lexists(folder / name)]
            if len(paths) > 1:
                raise ValueError(f"{folder}: has several lists, {', '.join(path.name for path in paths)}; keep one")
            lists += paths
        if not lists:
            raise FileNotFoundError(
                f"{self.folder}: no {_JSON_LIST} (nor .csv, nor .parquet) in it, nor in its train/, validation/ or "
                'test/; each line of it is like {"file_name": "1.png", "text": "a caption"}'
            )
        return lists

    @cached_property
    def _folders(self) -> list[Path]:
        """The folder, and its folders of splits in the order of the splits."""
        of_splits = sorted(path for path in self.folder.iterdir() if path.is_dir() and split_of_folder(path.name))
        order = sorted_splits({split_of_folder(path.name) or "" for path in of_splits})
        return [self.folder, *sorted(of_splits, key=lambda path: order.index(split_of_folder(path.name) or ""))]

    def _blocks_of(self, path: Path, records: int) -> list[Block]:
        """Blocks of a list."""
        if path.suffix in TABLES:
            return blocks_of_table(path, records)
        return blocks_of_text_file(path, "line", records, self._max_record_bytes)

    def _records(self, block: Block) -> Iterator[tuple[int, Callable[[], Fields]]]:
        """Line of every record of a block, and a function that reads its fields or raises ValueError."""
        if Path(block.file).suffix in TABLES:
            for row in rows_of_block(block):
                yield row.line, partial(_fields_of_row, row)
        else:
            for record in records_of_block(block, "line", self._max_record_bytes):
                yield record.line, partial(_fields_of_line, record)

    def _with_media(self, block: Block) -> Block:
        """The block with a digest of the media that it names: their ids, sizes and times of last change.

        Names that the dataset declares for labels count as well. Files that do not exist are left out.
        """
        digest = hashlib.sha256()
        for entry in self.entries(block):
            if not isinstance(entry, BadRecord) and entry.path is not None and entry.path.is_file():
                status = entry.path.stat()
                digest.update(f"{entry.id}\0{status.st_size}\0{status.st_mtime_ns}\0".encode())
                if self.has_label(entry) and not self.config.fields.labels and self._names_of_labels(Path(block.file)):
                    digest.update(f"{self._text(Path(block.file), entry.fields)}\0".encode())
        return replace(block, media_sha256=digest.hexdigest())

    @property
    def _max_record_bytes(self) -> int:
        return self.config.media.limits.record_bytes

    def _entry(self, metadata: Path, line: int, fields: Fields) -> Entry:
        """Entry of a record of the list `metadata`. Raises ValueError if the record cannot be used."""
        name = fields.get("file_name")
        if not isinstance(name, str) or not name:
            raise ValueError(
                f'needs a "file_name", which is a path in the folder, got {name!r}; its fields are '
                f"{', '.join(fields) or 'none'}"
            )
        text = self._text(metadata, fields)
        path = existing_path_inside(metadata.parent.resolve(), name)
        id = _id_of(os.path.join(os.path.relpath(metadata.parent, self.folder), name))
        split_of_folders = next(filter(None, map(split_of_folder, id.split("/")[:-1])), None)
        split = fields.split(default=split_of_folders)
        return Entry(id, str(metadata), line, partial(self._load, id, path, text), split, fields, path)

    def has_label(self, entry: Entry) -> bool:
        """Whether the caption of a record is a whole number, which is replaced by the label's name if it is known."""
        return _label_number(entry.fields.get(self.config.fields.text)) is not None

    def _text(self, metadata: Path, fields: Fields) -> str:
        """Caption of a record, or the name of the label whose number it is.

        Raises ValueError if there is no caption, or no label of that number.
        """
        name = self.config.fields.text
        value = fields.get(name)
        number = _label_number(value)
        if number is None:
            return fields.text(name)
        names = self.config.fields.labels or self._names_of_labels(metadata)
        if not names:
            return fields.text(name, "; --fields.labels names the numbers from 0 on")
        if not 0 <= number < len(names):
            raise ValueError(
                f'"{name}" is {value}, but only labels 0 to {len(names) - 1} have names: {", ".join(names)}'
            )
        return names[int(number)]

    def _names_of_labels(self, metadata: Path) -> tuple[str, ...]:
        """Names that the dataset declares for a list's labels, read once. Raises ValueError if they are invalid."""
        if metadata not in self._label_names:
            try:
                self._label_names[metadata] = label_names(metadata, self.folder, self.config.fields.text)
            except ValueError as error:
                self._label_names[metadata] = str(error)
        names = self._label_names[metadata]
        if isinstance(names, str):
            raise ValueError(names)
        return names

    @cached_property
    def _label_names(self) -> dict[Path, tuple[str, ...] | str]:
        """List → names of its labels, or the reason why they are invalid."""
        return {}

    def _load(self, id: str, path: Path, text: str) -> RawExample:
        """Example of a file. Raises ValueError if the file cannot be read, or has defects."""
        functions = modality(self.medium)
        example = RawExample(id, {TEXT: text, self.medium: functions.read(path, self.config.media)})
        for fault in functions.faults(path):
            raise ValueError(f"{path}: {fault}")
        return example


def _label_number(value: Any) -> int | float | None:
    """Number of a caption that is a whole number, as a number or as text; None for any other caption."""
    if isinstance(value, str) and _WHOLE_NUMBER.fullmatch(value.strip()):
        return float(value)
    return value if type(value) is int or (type(value) is float and value.is_integer()) else None


def _fields_of_line(record: TextRecord) -> Fields:
    """Fields of a line. Raises ValueError if it is not a JSON object."""
    return Fields.of_json(record.text)


def _fields_of_row(row: TableRow) -> Fields:
    """Fields of a row of a table. Raises ValueError if the row has the wrong number of cells."""
    if isinstance(row.fields, str):
        raise ValueError(row.fields)
    return Fields(row.fields)


def _id_of(name: str) -> str:
    """Id of a file: its normalised path in the folder, with slashes, in Unicode's normal form C."""
    return unicodedata.normalize("NFC", os.path.normpath(name)).replace(os.sep, "/")
