"""Rows of metadata.csv and metadata.parquet, as the objects that metadata.jsonl has on its lines.

A table is read as a whole, once per process. In a CSV file every value is text, the first line names the columns, and a
row with more or fewer cells cannot be used. An empty cell in its column `split` names no split.
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
"""Endings of the files of tables."""
MAX_TABLE_BYTES = 1 << 28
"""Largest size of a table in bytes; of a Parquet file also when it is decompressed."""
_MAX_CELLS = 1 << 26
"""Largest number of cells of a Parquet file, which may have many in few bytes."""


class TableRow(NamedTuple):
    """A row of a table."""

    line: int
    """Line on which the row ends, in a CSV file; number of the row, in a Parquet file. Both count from 1."""
    fields: dict[str, Any] | str
    """Column → its cell; or a message that says why the row cannot be used."""


def blocks_of_table(path: Path, records: int) -> list[Block]:
    """Blocks of a table, of at most `records` rows each."""
    rows, size, blocks = table_rows(path), path.stat().st_size, list[Block]()
    for start in range(0, len(rows), records):
        of_block = rows[start : start + records]
        digest = hashlib.sha256(json.dumps(of_block, sort_keys=True, default=str).encode()).hexdigest()
        line, count = of_block[0].line, len(of_block)
        blocks.append(Block(file=str(path), start=start, line=line, count=count, file_bytes=size, sha256=digest))
    return blocks


def rows_of_block(block: Block) -> tuple[TableRow, ...]:
    """Rows of a block of a table, in order."""
    return table_rows(Path(block.file))[block.start : block.start + block.count]


def table_rows(path: Path) -> tuple[TableRow, ...]:
    """All rows of a table. Raises OSError or ValueError if the file is not a valid table, or too large."""
    require_regular_file(path)
    status = path.stat()
    if status.st_size > MAX_TABLE_BYTES:
        raise ValueError(
            f"{path}: {status.st_size:,} bytes, {MAX_TABLE_BYTES:,} are allowed of a table; use metadata.jsonl"
        )
    return _rows(path, status.st_mtime_ns, status.st_size)


@lru_cache(maxsize=4)
def _rows(path: Path, changed_ns: int, size: int) -> tuple[TableRow, ...]:
    """All rows of a table. Size and time of last change are part of the cache key, so a changed file is read again."""
    return tuple(_parquet_rows(path) if path.suffix == ".parquet" else _csv_rows(path))


def _csv_rows(path: Path) -> Iterator[TableRow]:
    """Rows of a CSV file. Raises ValueError if it is not CSV with different names of columns."""
    try:
        text = decode_text(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    csv.field_size_limit(min(sys.maxsize, MAX_TABLE_BYTES))
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
    """Rows of a Parquet file, without null cells. Raises ValueError if it is unreadable, or too large decompressed."""
    from pyarrow import parquet  # takes a third of a second to load

    with reading(path, "not a readable Parquet file"):
        metadata = parquet.read_metadata(path)
        unpacked = sum(metadata.row_group(number).total_byte_size for number in range(metadata.num_row_groups))
        if unpacked > MAX_TABLE_BYTES or metadata.num_rows * metadata.num_columns > _MAX_CELLS:
            raise ValueError(
                f"{metadata.num_rows:,} rows of {metadata.num_columns:,} columns, {unpacked:,} bytes decompressed; "
                f"{MAX_TABLE_BYTES:,} bytes and {_MAX_CELLS:,} cells are allowed of a table"
            )
        rows = parquet.read_table(path).to_pylist()
    for number, fields in enumerate(rows, 1):
        yield TableRow(number, {str(name): value for name, value in fields.items() if value is not None})
