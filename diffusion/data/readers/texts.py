"""Text files: plain text, JSON lines, and JSON lines of prompts with their responses."""

import fnmatch
import glob
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path

from trimask.diffusion.data.fields import Fields
from trimask.diffusion.data.layout import Fill
from trimask.diffusion.data.readers.lines import blocks_of, records_of
from trimask.diffusion.data.reading_config import FieldConfig
from trimask.diffusion.data.records import BadRecord, Block, Entry, RawExample, Unit, digest
from trimask.diffusion.data.splits import splits_of_files
from trimask.tokenizers.storage.json_text import parse_json
from trimask.tokenizers.storage.text_files import MAX_LINE_BYTES, byte_lines, is_blank
from trimask.tokenizers.vocabulary import TEXT

_LOOKED_AT = 16
"""Lines of a file by which it is judged."""


@dataclass(frozen=True)
class Texts:
    """Plain text, and a field of JSON lines; an example each, however long."""

    where: tuple[str, ...]
    fields: FieldConfig
    most: int = MAX_LINE_BYTES
    """Bytes that a record may have."""
    medium: None = None
    fill: Fill = "none"

    def blocks(self, records: int) -> list[Block]:
        return [
            block for path in files_of(self.where) for block in blocks_of(path, self._unit(path), records, self.most)
        ]

    def entries(self, block: Block) -> Iterator[Entry | BadRecord]:
        is_json = _is_json(Path(block.file))
        for record in records_of(block, self._unit(Path(block.file)), self.most):
            try:
                text, fields = record.text, Fields()
                if is_json:
                    fields = Fields.of_json(text)
                    text = fields.text(self.fields.text)
                example = RawExample(digest(text), {TEXT: text})
                yield _entry(block, record.line, text, example, fields, self._splits.get(Path(block.file)))
            except ValueError as error:
                yield BadRecord(block.file, record.line, str(error))

    @cached_property
    def _splits(self) -> dict[Path, str]:
        return splits_of_files(files_of(self.where))

    def _unit(self, path: Path) -> Unit:
        return "line" if _is_json(path) else self.fields.text_unit


@dataclass(frozen=True)
class Prompted:
    """Prompts that are only ever given, and responses that are asked for."""

    where: tuple[str, ...]
    fields: FieldConfig
    most: int = MAX_LINE_BYTES
    """Bytes that a record may have."""
    medium: None = None
    fill: Fill = "answer"

    def blocks(self, records: int) -> list[Block]:
        return [block for path in files_of(self.where) for block in blocks_of(path, "line", records, self.most)]

    def entries(self, block: Block) -> Iterator[Entry | BadRecord]:
        for record in records_of(block, "line", self.most):
            try:
                fields = Fields.of_json(record.text)
                prompt, response = (fields.text(name) for name in (self.fields.prompt, self.fields.response))
                example = RawExample(digest(prompt), {TEXT: prompt + response}, given=len(prompt))
                yield _entry(block, record.line, prompt, example, fields, self._splits.get(Path(block.file)))
            except ValueError as error:
                yield BadRecord(block.file, record.line, str(error))

    @cached_property
    def _splits(self) -> dict[Path, str]:
        return splits_of_files(files_of(self.where))


def files_of(patterns: tuple[str, ...]) -> list[Path]:
    """The files that the patterns name, each pattern's in the order of their names."""
    files: list[Path] = []
    for pattern in patterns:
        found = (
            [Path(pattern)]
            if Path(pattern).exists()
            else [Path(name) for name in sorted(glob.glob(pattern, recursive=True))]
        )
        if not found:
            raise FileNotFoundError(f"{pattern}: no such file")
        files += [path for path in found if path not in files]
    return files


def other_cases(patterns: tuple[str, ...]) -> list[Path]:
    """Files that the patterns would name, were small and large letters the same."""
    found = set[Path]()
    for pattern in (Path(pattern) for pattern in patterns if not Path(pattern).exists()):
        is_alike = re.compile(fnmatch.translate(pattern.name), re.IGNORECASE).match
        beside = map(Path, glob.glob(str(pattern.with_name("*")), recursive=True))
        found |= {path for path in beside if path.is_file() and is_alike(path.name)}
    return sorted(found - set(files_of(patterns)))


def look_like_json(patterns: tuple[str, ...]) -> list[Path]:
    """Those of the files that are read as plain text, though each of their first lines is a JSON object."""
    return [path for path in files_of(patterns) if not _is_json(path) and _is_all_json(path)]


def _is_all_json(path: Path) -> bool:
    with path.open("rb") as file:
        lines = [line for line, _ in islice(byte_lines(file), _LOOKED_AT) if not is_blank(line)]
    try:
        return bool(lines) and all(isinstance(parse_json(line, None), dict) for line in lines)
    except ValueError:
        return False


def _entry(block: Block, line: int, key: str, example: RawExample, fields: Fields, split: str | None) -> Entry:
    return Entry(digest(key), block.file, line, lambda: example, fields.split(split), fields)


def _is_json(path: Path) -> bool:
    return path.suffix.lower() in (".jsonl", ".json", ".ndjson")
