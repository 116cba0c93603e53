"""Sources of text files: plain text, JSON lines, and JSON lines of prompts with their responses."""

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
from trimask.diffusion.data.readers.lines import blocks_of_text_file, records_of_block
from trimask.diffusion.data.reading_config import FieldConfig
from trimask.diffusion.data.records import BadRecord, Block, Entry, RawExample, TextUnit, text_digest
from trimask.diffusion.data.splits import splits_of_files
from trimask.tokenizers.storage.json_text import parse_json
from trimask.tokenizers.storage.text_files import MAX_LINE_BYTES, byte_lines, is_blank
from trimask.tokenizers.vocabulary import TEXT

_NUM_JUDGED_LINES = 16
"""Number of first lines that decide whether a file is JSON lines."""


@dataclass(frozen=True)
class TextFiles:
    """Source of plain text files and of one field of JSON lines, whose examples are not padded."""

    where: tuple[str, ...]
    """File names and glob patterns."""
    fields: FieldConfig
    max_record_bytes: int = MAX_LINE_BYTES
    """Largest size of a record in bytes."""
    medium: None = None
    fill: Fill = "none"

    def blocks(self, records: int) -> list[Block]:
        return [
            block
            for path in matching_files(self.where)
            for block in blocks_of_text_file(path, self._unit(path), records, self.max_record_bytes)
        ]

    def entries(self, block: Block) -> Iterator[Entry | BadRecord]:
        is_json = _is_json(Path(block.file))
        for record in records_of_block(block, self._unit(Path(block.file)), self.max_record_bytes):
            try:
                text, fields = record.text, Fields()
                if is_json:
                    fields = Fields.of_json(text)
                    text = fields.text(self.fields.text)
                example = RawExample(text_digest(text), {TEXT: text})
                yield _entry(block, record.line, text, example, fields, self._splits.get(Path(block.file)))
            except ValueError as error:
                yield BadRecord(block.file, record.line, str(error))

    @cached_property
    def _splits(self) -> dict[Path, str]:
        return splits_of_files(matching_files(self.where))

    def _unit(self, path: Path) -> TextUnit:
        return "line" if _is_json(path) else self.fields.text_unit


@dataclass(frozen=True)
class PromptFiles:
    """Source of JSON lines with a prompt, which is never masked, and a response."""

    where: tuple[str, ...]
    """File names and glob patterns."""
    fields: FieldConfig
    max_record_bytes: int = MAX_LINE_BYTES
    """Largest size of a record in bytes."""
    medium: None = None
    fill: Fill = "answer"

    def blocks(self, records: int) -> list[Block]:
        return [
            block
            for path in matching_files(self.where)
            for block in blocks_of_text_file(path, "line", records, self.max_record_bytes)
        ]

    def entries(self, block: Block) -> Iterator[Entry | BadRecord]:
        for record in records_of_block(block, "line", self.max_record_bytes):
            try:
                fields = Fields.of_json(record.text)
                prompt, response = (fields.text(name) for name in (self.fields.prompt, self.fields.response))
                example = RawExample(text_digest(prompt), {TEXT: prompt + response}, given_characters=len(prompt))
                yield _entry(block, record.line, prompt, example, fields, self._splits.get(Path(block.file)))
            except ValueError as error:
                yield BadRecord(block.file, record.line, str(error))

    @cached_property
    def _splits(self) -> dict[Path, str]:
        return splits_of_files(matching_files(self.where))


def matching_files(patterns: tuple[str, ...]) -> list[Path]:
    """Files that match the patterns, those of each pattern by name. Raises FileNotFoundError if one matches none."""
    files: list[Path] = []
    for pattern in patterns:
        is_file = Path(pattern).exists()
        matches = [Path(pattern)] if is_file else [Path(name) for name in sorted(glob.glob(pattern, recursive=True))]
        if not matches:
            raise FileNotFoundError(f"{pattern}: no such file")
        files += [path for path in matches if path not in files]
    return files


def files_in_other_case(patterns: tuple[str, ...]) -> list[Path]:
    """Files that would match the patterns if upper and lower case were the same, but do not."""
    alike = set[Path]()
    for pattern in (Path(pattern) for pattern in patterns if not Path(pattern).exists()):
        matches = re.compile(fnmatch.translate(pattern.name), re.IGNORECASE).match
        beside = map(Path, glob.glob(str(pattern.with_name("*")), recursive=True))
        alike |= {path for path in beside if path.is_file() and matches(path.name)}
    return sorted(alike - set(matching_files(patterns)))


def json_like_files(patterns: tuple[str, ...]) -> list[Path]:
    """Files that are read as plain text because of their ending, although their first lines are JSON objects."""
    return [path for path in matching_files(patterns) if not _is_json(path) and _begins_with_json(path)]


def _begins_with_json(path: Path) -> bool:
    """Whether each of the first lines that is not blank is a JSON object."""
    with path.open("rb") as file:
        lines = [line for line, _ in islice(byte_lines(file), _NUM_JUDGED_LINES) if not is_blank(line)]
    try:
        return bool(lines) and all(isinstance(parse_json(line, None), dict) for line in lines)
    except ValueError:
        return False


def _entry(block: Block, line: int, key: str, example: RawExample, fields: Fields, split: str | None) -> Entry:
    """Entry whose id is the digest of `key`; `split` is that of its file, unless its fields name another."""
    return Entry(text_digest(key), block.file, line, lambda: example, fields.split(split), fields)


def _is_json(path: Path) -> bool:
    """Whether a file is read as JSON lines, by its ending."""
    return path.suffix.lower() in (".jsonl", ".json", ".ndjson")
