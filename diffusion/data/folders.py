"""Folders of files of one modality with a metadata.jsonl beside them, as in Hugging Face's imagefolder and audiofolder.

    photos/metadata.jsonl       {"file_name": "sea/1.jpg", "text": "a grey sea"}, one such line for each file
    photos/sea/1.jpg

`file_name` is relative to the folder and must not lead out of it. A line may say its `split`; a folder may instead have
sub-folders train/, validation/ and test/, each with a metadata.jsonl of its own.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from trimask.diffusion.data.lines import Block, blocks_of, records_of
from trimask.diffusion.data.modalities import modality
from trimask.diffusion.data.sources import BadRecord, Entry, OpenConfig, RawExample
from trimask.diffusion.data.texts import json_object, split_field, text_field
from trimask.diffusion.layout import Fill
from trimask.tokenizers.files import inside
from trimask.tokenizers.vocabulary import TEXT

METADATA = "metadata.jsonl"
SPLIT_FOLDERS = ("train", "validation", "test")


@dataclass(frozen=True)
class Folder:
    """Captioned files of one medium."""

    folder: Path
    medium: str
    config: OpenConfig
    fill: Fill = "whole"

    def blocks(self, records: int) -> list[Block]:
        return [block for path in self._metadata_files() for block in blocks_of(path, "line", records)]

    def entries(self, block: Block) -> Iterator[Entry | BadRecord]:
        for record in records_of(block, "line"):
            try:
                yield self._entry(Path(block.file), record.line, json_object(record.text))
            except ValueError as error:
                yield BadRecord(block.file, record.line, str(error))

    def _metadata_files(self) -> list[Path]:
        if not self.folder.is_dir():
            raise FileNotFoundError(f"{self.folder}: no such folder of {self.medium} files")
        candidates = [self.folder / METADATA, *(self.folder / split / METADATA for split in SPLIT_FOLDERS)]
        found = [path for path in candidates if os.path.lexists(path)]
        if not found:
            raise FileNotFoundError(
                f"{self.folder}: no {METADATA} in it, nor in train/, validation/ or test/ of it; each of its lines is "
                f'like {{"file_name": "1.png", "text": "a caption"}}'
            )
        return found

    def _entry(self, metadata: Path, line: int, fields: dict[str, Any]) -> Entry:
        name = fields.get("file_name")
        if not isinstance(name, str) or not name:
            raise ValueError(f'needs a "file_name", which is a path in the folder, got {name!r}')
        text = text_field(fields, self.config.fields.text)
        path = inside(metadata.parent.resolve(), name)
        in_split_folder = metadata.parent.name if metadata.parent != self.folder else None
        split = split_field(fields, default=in_split_folder)
        prefix = f"{in_split_folder}/" if in_split_folder else ""
        load = partial(self._load, f"{prefix}{name}", path, text)
        return Entry(f"{prefix}{name}", str(metadata), line, load, split, fields)

    def _load(self, id: str, path: Path, text: str) -> RawExample:
        kind = modality(self.medium)
        example = RawExample(id, {TEXT: text, self.medium: kind.read(path, self.config.media)})
        for fault in kind.faults(path):
            raise ValueError(f"{path}: {fault}")
        return example
