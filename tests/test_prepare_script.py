"""trimask prepare: sources by flag, and what is printed."""

import json

import pytest
from rich.console import Console

from trimask.diffusion.data.plan import PrepareConfig
from trimask.scripts import prepare
from trimask.scripts.prepare import Arguments, main


def where(**given):
    config = Arguments(folder="unused", config=PrepareConfig(), **given).resolved()
    return {name: (source.kind, source.where) for name, source in config.sources.items()}


def test_a_source_is_called_after_its_folder_or_as_it_is_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert where(images=("my photos/sea", "land=x/y"), audio=("2voices",)) == {
        "sea": ("images", (f"{tmp_path}/my photos/sea",)),
        "land": ("images", (f"{tmp_path}/x/y",)),
        "data_2voices": ("audio", (f"{tmp_path}/2voices",)),
    }


def test_text_files_are_one_dataset_unless_they_are_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert where(text=("a.txt", "b.txt", "tales=c.txt", "tales=d.txt"), tfds=("mnist:3.0.1",)) == {
        "text": ("text", (f"{tmp_path}/a.txt", f"{tmp_path}/b.txt")),
        "tales": ("text", (f"{tmp_path}/c.txt", f"{tmp_path}/d.txt")),
        "mnist": ("tfds", ("mnist:3.0.1",)),
    }


def test_a_path_with_an_equals_sign_is_a_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (name,) = where(images=("a/b=c",))
    assert name == "b_c"


def test_two_sources_of_one_name_are_refused_with_the_way_out():
    with pytest.raises(ValueError, match="two sources are called sea; name one with --audio NAME="):
        where(images=("a/sea",), audio=("b/sea",))
    with pytest.raises(ValueError, match="two sources are called sea; name one with --images NAME="):
        where(images=("a/sea", "b/sea"))


def test_the_table_adds_up_and_names_the_rejects(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(prepare, "console", Console(width=200))
    lines = [{"prompt": f"{n}", "response": "" if n == 3 else "x"} for n in range(30)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(ValueError, match=r'line 4: "response" is empty\n.*--on-error skip'):
        main([str(tmp_path / "out"), "--prompts", str(tmp_path / "a.jsonl")])
    capsys.readouterr()
    main([str(tmp_path / "out"), "--prompts", str(tmp_path / "a.jsonl"), "--on-error", "skip"])
    out = " ".join(capsys.readouterr().out.split())
    assert "30 = 29 + 1" in out and "rejects.jsonl" in out


def test_an_unknown_preset_is_refused_with_the_known_ones(tmp_path):
    with pytest.raises(ValueError, match="no preset 'tyni'; there are tiny, small"):
        main([str(tmp_path), "--preset", "tyni"])


@pytest.mark.parametrize("word", ["", "prose="])
def test_a_source_that_is_nowhere_is_refused(word, tmp_path):
    with pytest.raises(ValueError, match=f"--text must say where the data are, got '{word}'"):
        main([str(tmp_path / "new"), "--text", word])
    assert not (tmp_path / "new").exists()
