"""Rows of metadata.csv and metadata.parquet."""

import json

import pyarrow as pa
import pytest
from pyarrow import parquet

from trimask.diffusion.data.readers import tables
from trimask.diffusion.data.readers.tables import blocks_of_table, rows_of_block, table_rows

CSV = 'file_name,text\n1.png,"a ""small"", grey\nsea"\n\n2.png,z\u2028w\n3.png\n'


def write_parquet(path, rows, features=None):
    table = pa.Table.from_pylist(rows)
    if features is not None:
        table = table.replace_schema_metadata({b"huggingface": json.dumps({"info": {"features": features}}).encode()})
    parquet.write_table(table, path)


def test_a_cell_may_be_as_long_as_the_table(tmp_path):
    (tmp_path / "metadata.csv").write_text(f"file_name,text\n1.png,{'x' * 200_000}\n")
    (row,) = table_rows(tmp_path / "metadata.csv")
    assert row.fields == {"file_name": "1.png", "text": "x" * 200_000}


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_rows_of_csv_have_quotes_and_the_same_ends_of_lines_as_all_text(tmp_path, end):
    (tmp_path / "metadata.csv").write_bytes(("\ufeff" + CSV.replace("\n", end)).encode())
    first, second, short = table_rows(tmp_path / "metadata.csv")
    assert first == (3, {"file_name": "1.png", "text": 'a "small", grey\nsea'})
    assert second == (5, {"file_name": "2.png", "text": "z\u2028w"})
    assert short == (6, "a row of 1 cells under 2 columns")


def test_an_empty_cell_of_split_names_no_split_and_other_empty_cells_stay(tmp_path):
    (tmp_path / "metadata.csv").write_text("file_name,split,who\n1.png,,\n2.png, ,b\n3.png,test,c\n")
    assert [row.fields for row in table_rows(tmp_path / "metadata.csv")] == [
        {"file_name": "1.png", "who": ""},
        {"file_name": "2.png", "who": "b"},
        {"file_name": "3.png", "split": "test", "who": "c"},
    ]


def test_rows_of_parquet_keep_their_types(tmp_path):
    write_parquet(tmp_path / "metadata.parquet", [{"file_name": "a", "label": 3}, {"file_name": "b", "label": None}])
    assert table_rows(tmp_path / "metadata.parquet") == ((1, {"file_name": "a", "label": 3}), (2, {"file_name": "b"}))


def test_blocks_hold_every_row_and_notice_a_change_of_one(tmp_path):
    path = tmp_path / "metadata.csv"
    path.write_text(CSV)
    before = blocks_of_table(path, 2)
    assert [row for block in before for row in rows_of_block(block)] == list(table_rows(path))
    path.write_text(CSV.replace("2.png,z", "2.png,x"))
    assert [a == b for a, b in zip(before, blocks_of_table(path, 2), strict=True)] == [False, True]


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("metadata.csv", b"a,a\n1,2\n", "line 1: columns must have different names, got a, a"),
        ("metadata.csv", b'a,b\n1,"2\n', "line 3: not CSV: unexpected end of data"),
        ("metadata.csv", b"a\n\xff\n", "not UTF-8 text"),
        ("metadata.parquet", b"PAR1 and no more", "not a readable Parquet file"),
    ],
)
def test_a_file_that_is_not_a_table_is_refused_by_name(tmp_path, name, content, reason):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"{name}.*{reason}"):
        table_rows(tmp_path / name)


def test_a_table_that_is_too_large_is_not_read(tmp_path, monkeypatch):
    write_parquet(tmp_path / "metadata.parquet", [{"file_name": "a"}] * 100)
    monkeypatch.setattr(tables, "_MAX_CELLS", 99)
    with pytest.raises(ValueError, match="100 rows of 1 columns"):
        table_rows(tmp_path / "metadata.parquet")
    monkeypatch.setattr(tables, "MAX_TABLE_BYTES", 10)
    with pytest.raises(ValueError, match=r"bytes, 10 are allowed of a table; use metadata\.jsonl"):
        table_rows(tmp_path / "metadata.parquet")
