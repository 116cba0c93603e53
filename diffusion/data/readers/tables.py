"""metadata.csv and metadata.parquet: the rows of a table as the objects that lines of metadata.jsonl are.

A table is read whole, once in a process. Of a CSV file every value is text; a line of its header names a column, and a
row with more or fewer cells is refused. An empty cell of its column `split` gives no split.
"""

import csv
import hashlib
import json
import sys
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from trimask.diffusion.data.records import Block
from trimask.tokenizers.storage.files import reading, require_regular_file
from trimask.tokenizers.storage.text_files import decode_text

TABLES = (".csv", ".parquet")
"""Endings of tables."""
MAX_BYTES = 1 << 28
"""Of a table."""
_MAX_CELLS = 1 << 26
"""Of a Parquet file, which may be small on the disk."""


class TableRow(NamedTuple):
    """A row of a table."""

    line: int
    """Of a CSV file the line on which the row ends; of Parquet its number, from 1."""
    fields: dict[str, Any] | str
    """The cells by column; or in words, why there are none."""


def blocks_of_table(path: Path, records: int) -> list[Block]:
    """The table cut into blocks of so many rows."""
    rows, size, blocks = rows_of(path), path.stat().st_size, list[Block]()
    for start in range(0, len(rows), records):
        own = rows[start : start + records]
        digest = hashlib.sha256(json.dumps(own, sort_keys=True, default=str).encode()).hexdigest()
        blocks.append(
            Block(file=str(path), start=start, line=own[0].line, count=len(own), file_bytes=size, sha256=digest)
        )
    return blocks


def rows_of_block(block: Block) -> tuple[TableRow, ...]:
    """The rows of a block."""
    return rows_of(Path(block.file))[block.start : block.start + block.count]


def rows_of(path: Path) -> tuple[TableRow, ...]:
    """All rows. Raises OSError or ValueError where the file is no such table."""
    require_regular_file(path)
    about = path.stat()
    if about.st_size > MAX_BYTES:
        raise ValueError(f"{path}: {about.st_size:,} bytes, {MAX_BYTES:,} are allowed of a table; use metadata.jsonl")
    return _rows(path, about.st_mtime_ns, about.st_size)


@lru_cache(maxsize=4)
def _rows(path: Path, changed_ns: int, size: int) -> tuple[TableRow, ...]:
    return tuple(_parquet_rows(path) if path.suffix == ".parquet" else _csv_rows(path))


def _csv_rows(path: Path) -> Iterator[TableRow]:
    try:
        text = decode_text(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    csv.field_size_limit(min(sys.maxsize, MAX_BYTES))
    rows = csv.reader((f"{line}\n" for line in text.split("\n")), strict=True)
    try:
        names = next(rows, [])
        if len(set(names)) < len(names) or not all(names):
            raise ValueError(f"{path}, line 1: columns must have different names, got {', '.join(names) or 'none'}")
        for cells in rows:
            if len(cells) == len(names):
                fields = zip(names, cells, strict=True)
                yield TableRow(rows.line_num, {name: cell for name, cell in fields if name != "split" or cell.strip()})
            elif cells:
                yield TableRow(rows.line_num, f"a row of {len(cells)} cells under {len(names)} columns")
    except csv.Error as error:
        raise ValueError(f"{path}, line {rows.line_num}: not CSV: {error}") from error


def _parquet_rows(path: Path) -> Iterator[TableRow]:
    from pyarrow import parquet  # takes a third of a second to load

    with reading(path, "not a readable Parquet file"):
        about = parquet.read_metadata(path)
        unpacked = sum(about.row_group(number).total_byte_size for number in range(about.num_row_groups))
        if unpacked > MAX_BYTES or about.num_rows * about.num_columns > _MAX_CELLS:
            raise ValueError(
                f"{about.num_rows:,} rows of {about.num_columns:,} columns, {unpacked:,} bytes unpacked; of a table "
                f"{MAX_BYTES:,} bytes and {_MAX_CELLS:,} cells are allowed"
            )
        rows = parquet.read_table(path).to_pylist()
    for number, fields in enumerate(rows, 1):
        yield TableRow(number, {str(name): value for name, value in fields.items() if value is not None})
