"""File names stay in their folder; files are written without following links, completely or not at all."""

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trimask.tokenizers.storage.files import (
    MAX_NAME,
    path_inside,
    printable,
    reading,
    replacing,
    require_plain_name,
    require_regular_file,
    require_replaceable,
    write_text,
    written_to,
)


@given(st.text(max_size=300) | st.text("ab./\\-~\0\n", max_size=9))
def test_a_plain_name_is_a_file_of_its_folder(name):
    try:
        require_plain_name(name, "F")
    except ValueError as error:
        assert str(error).startswith("F: a file name") and not set(str(error)) & set("\0\n\r\x1b")
    else:
        assert os.path.dirname(os.path.normpath(f"/folder/{name}")) == "/folder" and len(name.encode()) <= MAX_NAME


@pytest.mark.parametrize(
    "name", ["", ".", "..", ".lock", "-a", "/tmp/x", "../x", "a/b", "a\\b", "a b", "a\n", "a\0", 5, None]
)
def test_all_else_is_refused(name):
    with pytest.raises(ValueError, match="index: a file name must consist of letters, digits, _"):
        require_plain_name(name, "index")


def test_a_name_has_one_of_its_endings_and_is_not_too_long():
    assert require_plain_name("a.png", "F", ".png", ".gif") == "a.png"
    with pytest.raises(ValueError, match=r"F: a file name must end with \.png or \.gif, got 'a\.py'"):
        require_plain_name("a.py", "F", ".png", ".gif")
    with pytest.raises(ValueError, match="F: a file name of 202 bytes, at most 200 are allowed: ä"):
        require_plain_name(101 * "ä", "F")


@pytest.mark.parametrize("name", ["", ".", "..", "../x", "a/../../x", "/etc/passwd", "link/x", "out", "a\0b"])
def test_a_path_that_leads_out_of_a_folder_is_refused(tmp_path, name):
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "link").symlink_to(tmp_path)
    (folder / "out").symlink_to(tmp_path / "secret")
    if name != ".":  # the folder itself
        with pytest.raises(ValueError, match="must be a path that stays inside the folder"):
            path_inside(folder, name)


def test_a_path_inside_a_folder_is_taken_whatever_the_folder_is_called(tmp_path):
    (tmp_path / "real" / "a").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "real")
    assert path_inside(tmp_path / "link", "a/b.png") == tmp_path / "link/a/b.png"


def test_a_link_in_the_place_is_replaced_and_what_it_leads_to_is_left_alone(tmp_path):
    victim = tmp_path / "victim"
    victim.write_text("mine")
    for name in ("a.txt", "a.txt.partial"):
        (tmp_path / name).symlink_to(victim)
    write_text(tmp_path / "a.txt", "ä\r\n")
    assert (tmp_path / "a.txt").read_bytes() == "ä\r\n".encode() and victim.read_text() == "mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.txt", "victim"]


def test_where_writing_fails_the_old_file_stands_and_nothing_is_left(tmp_path):
    write_text(tmp_path / "a", "old")
    with pytest.raises(ZeroDivisionError), replacing(tmp_path / "a") as partial:
        partial.write_text("new")
        raise ZeroDivisionError
    assert [path.name for path in tmp_path.iterdir()] == ["a"] and (tmp_path / "a").read_text() == "old"


def test_only_a_regular_file_is_one(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path, kind, words in (
        (tmp_path, IsADirectoryError, "a folder, not a file"),
        (tmp_path / "gone", FileNotFoundError, "no such file"),
        (tmp_path / "pipe", OSError, "not a regular file"),
    ):
        with pytest.raises(kind, match=words):
            require_regular_file(path)


def test_what_could_steer_a_terminal_is_shown_as_one_sign():
    assert printable("a\x1b[31m\x07\u202eb\u2028é漢") == "a�[31m��b�é漢"
    assert printable("می\u200cخواهم\n", keep="\n") == "می\u200cخواهم\n"


def test_whatever_a_third_party_raises_is_an_error_that_names_the_file():
    panic = RuntimeError("INTERNAL: \x1b[1mwrite failed [OS error 28: No space left on device]\nstack")
    with pytest.raises(ValueError, match=r"^a\.x: no picture: No space left on device$"), reading("a.x", "no picture"):
        raise panic
    with pytest.raises(OSError, match=r"^a\.x: could not be written: �x$"), written_to("a.x"):
        raise RuntimeError("\x1bx\nstack")
    for kind in (MemoryError, PermissionError):
        with pytest.raises(kind), reading("a.x", "no picture"):
            raise kind
    for kind in (MemoryError, ModuleNotFoundError, TypeError):
        with pytest.raises(kind), written_to("a.x"):
            raise kind


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
def test_what_is_no_file_is_not_replaced_by_one(tmp_path, make):
    make(tmp_path / "it")
    with pytest.raises(OSError, match=r"it: (a folder, not a file|not a regular file)"):
        write_text(tmp_path / "it", "text")
    with pytest.raises(OSError, match=r"null: not a regular file"):
        require_replaceable(Path(os.devnull))  # not written to: where this fails, it would be gone
    assert [path.name for path in tmp_path.iterdir()] == ["it"] and not (tmp_path / "it").is_file()
