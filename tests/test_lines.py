"""Text files as blocks of records."""

import io
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trimask.diffusion.data.readers.lines import blocks_of_text_file, records_of_block
from trimask.tokenizers.storage import text_files
from trimask.tokenizers.storage.text_files import byte_lines, decode_text, read_lines

LINES = st.lists(st.sampled_from([b"", b" ", b"a", b"bc\t", "é…".encode(), b"\r"]), max_size=30)


def expected(content, unit):
    """Records of a whole file, split by a simple oracle."""
    lines = re.split(rb"\r\n|\r|\n", content)
    records, run = [], []
    for line in [*lines, b""]:
        if line.strip() and unit != "line":
            run.append(line)
        elif line.strip():
            records.append(line)
        elif unit == "paragraph" and run:
            records.append(b"\n".join(run))
            run = []
    return records


@given(LINES, st.sampled_from(["line", "paragraph"]), st.integers(1, 4), st.booleans())
def test_blocks_hold_every_record_once_and_in_order(tmp_path_factory, lines, unit, size, ends):
    content = b"\n".join(lines) + (b"\n" if ends else b"")
    path = tmp_path_factory.mktemp("lines") / "x.txt"
    path.write_bytes(content)
    blocks = blocks_of_text_file(path, unit, size)
    assert all(block.count == size for block in blocks[:-1])
    records = [record for block in blocks for record in records_of_block(block, unit)]
    assert [re.sub(rb"\r\n?", b"\n", record.content) for record in records] == expected(content, unit)
    for record in records:
        assert content[record.start :].startswith(record.content)
        assert len(re.findall(rb"\r\n|\r|\n", content[: record.start])) == record.line - 1


def test_a_document_is_one_record(tmp_path):
    (tmp_path / "x.txt").write_bytes(b"\na\n\nb\n")
    (block,) = blocks_of_text_file(tmp_path / "x.txt", "document", 5)
    (record,) = records_of_block(block, "document")
    assert (record.content, record.line) == (b"a\n\nb", 2)


def test_an_empty_file_has_no_blocks(tmp_path):
    (tmp_path / "x.txt").write_bytes(b"\n\n")
    assert blocks_of_text_file(tmp_path / "x.txt", "paragraph", 5) == []


def test_text_loses_its_byte_order_mark_and_carriage_returns():
    assert decode_text("\ufeffa\r\nb\rc\u2028d".encode()) == "a\nb\nc\u2028d"


def test_lines_are_the_same_wherever_the_file_is_cut_for_reading(monkeypatch):
    content = b"a\r\n\r\r\r\nbc\n\n\rd"
    for size in range(1, 12):
        monkeypatch.setattr(text_files, "_CHUNK_BYTES", size)
        found = list(byte_lines(io.BytesIO(content)))
        assert [line for line, _ in found] == [b"a\r\n", b"\r", b"\r", b"\r\n", b"bc\n", b"\n", b"\r", b"d"]
        assert all(length == len(line) for line, length in found)


@pytest.mark.parametrize("content", [b"\xff\xfea\0", "ü".encode("latin-1"), b"a\0b"])
def test_bytes_that_are_not_utf8_are_refused(content):
    with pytest.raises(ValueError, match="not UTF-8 text"):
        decode_text(content)


def test_a_path_that_is_not_a_file_is_refused_by_name(tmp_path):
    with pytest.raises(IsADirectoryError, match="a folder, not a file"):
        blocks_of_text_file(tmp_path, "line", 1)
    with pytest.raises(FileNotFoundError, match=r"y\.txt: no such file"):
        blocks_of_text_file(tmp_path / "y.txt", "line", 1)


@pytest.mark.parametrize("unit", ["line", "paragraph", "document"])
def test_a_record_that_is_too_long_is_skipped_and_refused_when_its_text_is_read(tmp_path, unit):
    (tmp_path / "x.txt").write_bytes(b"1234567\n")
    (block,) = blocks_of_text_file(tmp_path / "x.txt", unit, 5, 8)
    assert [record.text for record in records_of_block(block, unit, 8)] == ["1234567"]
    (tmp_path / "x.txt").write_bytes(b"a\n\n" + 100 * b"x" + b"\n\nb" + (b"" if unit != "document" else b"\n"))
    (block,) = blocks_of_text_file(tmp_path / "x.txt", unit, 5, 8)
    found = list(records_of_block(block, unit, 8))
    assert len(found) == (1 if unit == "document" else 3) and all(len(record.content) < 20 for record in found)
    with pytest.raises(ValueError, match=r"a record of 10\d bytes; --limits.record-bytes allows 8"):
        _ = found[len(found) // 2].text
    if unit != "document":
        assert [found[0].text, found[2].text, found[2].line] == ["a", "b", 5]


def test_lines_are_numbered_from_one_and_a_bad_one_is_named(tmp_path):
    (tmp_path / "a.txt").write_bytes("\ufeffa\n\n b \r\nc\u2028d".encode())
    assert read_lines(str(tmp_path / "a.txt")) == [(1, "a"), (3, " b "), (4, "c\u2028d")]
    (tmp_path / "b.txt").write_bytes(b"a\nb\xff\n")
    with pytest.raises(ValueError, match=r"b\.txt, line 2: not UTF-8 text"):
        read_lines(str(tmp_path / "b.txt"))


def test_blank_is_the_same_line_for_every_reader(tmp_path):
    """A no-break space and a separator count as characters; a byte order mark does not."""
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbf\na\n\xc2\xa0\n \t\nb\n\x1c\n")
    (block,) = blocks_of_text_file(tmp_path / "a.txt", "line", 9)
    found = [(record.line, record.text) for record in records_of_block(block, "line")]
    assert found == read_lines(str(tmp_path / "a.txt")) == [(2, "a"), (3, "\xa0"), (5, "b"), (6, "\x1c")]
    (block,) = blocks_of_text_file(tmp_path / "a.txt", "paragraph", 9)
    assert [record.text for record in records_of_block(block, "paragraph")] == ["a\n\xa0", "b\n\x1c"]
