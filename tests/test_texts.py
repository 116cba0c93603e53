"""Sources of plain text, JSON lines, and prompts with responses."""

import json
from pathlib import Path

import pytest

from trimask.diffusion.data.readers.texts import PromptFiles, TextFiles, files_in_other_case, matching_files
from trimask.diffusion.data.reading_config import FieldConfig
from trimask.diffusion.data.records import BadRecord


def entries(source):
    return [entry for block in source.blocks(2) for entry in source.entries(block)]


def texts(source):
    return [entry.example().media["text"] for entry in entries(source)]


def test_paragraphs_lines_and_documents(tmp_path):
    (tmp_path / "a.txt").write_text("one\ntwo\n\n\nthree\n")
    (tmp_path / "b.txt").write_text("four")
    files = (str(tmp_path / "*.txt"),)
    assert texts(TextFiles(files, FieldConfig())) == ["one\ntwo", "three", "four"]
    assert texts(TextFiles(files, FieldConfig(text_unit="line"))) == ["one", "two", "three", "four"]
    assert texts(TextFiles(files, FieldConfig(text_unit="document"))) == ["one\ntwo\n\n\nthree", "four"]


def test_a_field_of_json_lines_is_text(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"story": "x\\ny"}\n\n{"story": "z", "split": "test"}\n')
    found = entries(TextFiles((str(tmp_path / "a.jsonl"),), FieldConfig(text="story")))
    assert [(e.example().media["text"], e.split, e.line) for e in found] == [("x\ny", None, 1), ("z", "test", 3)]


def test_a_prompt_and_its_response_are_one_text(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"question": "1+1=", "answer": "2"}\n')
    fields = FieldConfig(prompt="question", response="answer")
    (entry,) = entries(PromptFiles((str(tmp_path / "a.jsonl"),), fields))
    example = entry.example()
    assert (example.media["text"], example.given_characters) == ("1+1=2", 4)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ('{"prompt": "a"}', 'needs a "response", which is text, got None; its fields are prompt'),
        ('{"prompt": "a", "response": ""}', '"response" is empty'),
        ('{"prompt": "a", "response": "\\ud800"}', "half of a surrogate pair"),
        ("nonsense", "not strict JSON: expected a value"),
        ("[" * 100_000, "more than 64 objects and lists inside one another"),
    ],
)
def test_a_bad_line_names_the_reason(tmp_path, line, reason):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"prompt": "p", "response": "r"}) + "\n" + line + "\n")
    good, bad = entries(PromptFiles((str(path),), FieldConfig()))
    assert good.example().given_characters == 1
    assert isinstance(bad, BadRecord) and (bad.file, bad.line) == (str(path), 2) and reason in bad.reason


def test_a_paragraph_in_another_encoding_is_bad_and_the_others_are_not(tmp_path):
    (tmp_path / "a.txt").write_bytes("grün\n\n".encode("latin-1") + "grün".encode())
    bad, good = entries(TextFiles((str(tmp_path / "a.txt"),), FieldConfig()))
    assert isinstance(bad, BadRecord) and "not UTF-8" in bad.reason
    assert good.example().media["text"] == "grün" and good.line == 3


def test_equal_texts_have_equal_ids(tmp_path):
    (tmp_path / "a.txt").write_text("x\n\ny\n\nx")
    a, b, c = entries(TextFiles((str(tmp_path / "a.txt"),), FieldConfig()))
    assert a.id == c.id != b.id


def test_a_pattern_that_matches_no_file_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"\*\.txt: no such file"):
        matching_files((str(tmp_path / "*.txt"),))


def test_files_that_a_pattern_misses_by_the_case_of_letters_are_found(tmp_path):
    for name in ("a.txt", "B.TXT", "c.md", "[d].Txt"):
        (tmp_path / name).write_text("x")
    assert files_in_other_case((str(tmp_path / "*.txt"),)) == [tmp_path / "B.TXT", tmp_path / "[d].Txt"]
    assert files_in_other_case((str(tmp_path / "*.txt"), str(tmp_path / "*.T*"))) == []
    assert files_in_other_case((str(tmp_path / "a.txt"),)) == []
    assert files_in_other_case((str(tmp_path / "[ab].*"),)) == [tmp_path / "B.TXT"]


@pytest.mark.parametrize("kind", [TextFiles, PromptFiles])
def test_files_named_like_splits_belong_to_them(tmp_path, kind):
    for split in ("train", "test"):
        (tmp_path / f"{split}.jsonl").write_text(json.dumps({"text": split, "prompt": split, "response": "x"}) + "\n")
    found = entries(kind((str(tmp_path / "*.jsonl"),), FieldConfig()))
    assert [(Path(entry.file).stem, entry.split) for entry in found] == [("test", "test"), ("train", "train")]
