"""`trimask prepare`: sources given by flags, and printed output."""

import json

import pytest
from PIL import Image
from rich.console import Console

from trimask.diffusion.data.prepare_config import PrepareConfig
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


def test_what_is_there_under_the_whole_word_is_no_name_and_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a=b").mkdir()
    assert where(images=("a=b",)) == {"a_b": ("images", (f"{tmp_path}/a=b",))}


def test_a_pattern_with_an_equals_sign_that_names_files_is_a_pattern(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "lang=en").mkdir()
    (tmp_path / "lang=en/a.txt").write_text("a")
    assert where(text=("lang=en/*.txt",)) == {"text": ("text", (f"{tmp_path}/lang=en/*.txt",))}


@pytest.mark.parametrize("name", ["train", "Test", "dev"])
def test_a_dataset_is_not_called_like_a_split_by_its_folder(name):
    with pytest.raises(ValueError, match=rf"--images a/{name}: {name} is the name of a split. Give the parent folder"):
        where(images=(f"a/{name}",))
    assert where(images=(f"pets=a/{name}",))["pets"][0] == "images"


def test_two_sources_of_one_name_are_refused_with_the_way_out():
    with pytest.raises(ValueError, match="two sources are named sea; rename one with --audio NAME="):
        where(images=("a/sea",), audio=("b/sea",))
    with pytest.raises(ValueError, match="two sources are named sea; rename one with --images NAME="):
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


def printed(tmp_path, capsys, *words):
    main([str(tmp_path / "out"), *map(str, words)])
    return " ".join(capsys.readouterr().out.split())


def test_what_is_there_and_not_used_is_said(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(prepare, "console", Console(width=200))
    (tmp_path / "photos" / "test").mkdir(parents=True)
    lines = []
    for number in range(12):
        name = f"{'test/' if number > 7 else ''}{number}.png"
        Image.new("RGB", (4, 4), (min(number, 8), 0, 0)).save(tmp_path / "photos" / name)
        lines.append({"file_name": name, "text": "x", "split": "extra" if number == 6 else None})
        lines[-1] = {key: value for key, value in lines[-1].items() if value is not None}
    for name in ("more.png", "a/1.png", "b/1.png"):
        (tmp_path / "photos" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "photos" / name).write_bytes((tmp_path / "photos" / "0.png").read_bytes())
    (tmp_path / "photos" / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "T.txt").write_text('{"text": "a"}\n{"text": "b"}\n')
    (tmp_path / "P.txt").write_text('{"text": "a"}\nsaid the parser\n')
    shares = ("--splits.validation", "0", "--splits.test", "0")
    words = ("--images", tmp_path / "photos", "--text", f"T={tmp_path / 'T.txt'}", f"P={tmp_path / 'P.txt'}", *shares)
    out = printed(tmp_path, capsys, *words)
    assert "4×4 colour" in out and "train 7 · extra 1 · test 4" in out.replace("│", "")
    for remark in (
        "photos: only `trimask evaluate --splits` uses extra",
        "photos: files that no record names, and that are therefore not read: 1 in ./, 1 in a/ and 1 in b/",
        "T.txt looks like JSON lines and is read as plain text; name it .jsonl to read a field",
    ):
        assert remark in out
    assert "P.txt looks like JSON" not in out
    assert "the same content" not in out
    Image.new("RGB", (4, 4), (3, 0, 0)).save(tmp_path / "photos" / "test" / "9.png")
    out = printed(tmp_path / "again", capsys, *words)
    assert "photos: 1 of the 4 examples of test have the same content as examples of train; --splits.by content" in out


@pytest.mark.parametrize(("kind", "flag"), [("prompts", "--response-tokens 3"), ("photos", "--max-text-tokens 2")])
def test_a_few_long_texts_are_said_to_stretch_every_row(tmp_path, capsys, monkeypatch, kind, flag):
    monkeypatch.setattr(prepare, "console", Console(width=200))
    texts = [*["zz"] * 199, "abcdefghijklmnop"]
    if kind == "prompts":
        lines = [{"prompt": f"{number}=", "response": text} for number, text in enumerate(texts)]
        (tmp_path / "a.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        words = ("--prompts", tmp_path / "a.jsonl")
    else:
        (tmp_path / "photos").mkdir()
        Image.new("L", (4, 4)).save(tmp_path / "photos" / "1.png")
        lines = [{"file_name": "1.png", "text": text} for text in texts]
        (tmp_path / "photos" / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        words = ("--images", tmp_path / "photos", "--splits.test", "0", "--splits.validation", "0")
    out = printed(tmp_path, capsys, *words, "--text-vocabulary", "256")
    assert "99 % have at most" in out and f"{flag} --on-error skip would leave out 1 texts" in out
    again = printed(tmp_path / "again", capsys, *words, "--text-vocabulary", "256", *flag.split(), "--on-error", "skip")
    assert "200 = 199 + 1" in again and "99 % have at most" not in again


def test_an_unknown_preset_is_refused_with_the_known_ones(tmp_path):
    with pytest.raises(ValueError, match="no preset 'tyni'; there are tiny, small"):
        main([str(tmp_path), "--preset", "tyni"])


@pytest.mark.parametrize("word", ["", "prose="])
def test_a_source_that_is_nowhere_is_refused(word, tmp_path):
    with pytest.raises(ValueError, match=f"--text needs a path or a name of a dataset, got '{word}'"):
        main([str(tmp_path / "new"), "--text", word])
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("channels", [None, 1])
def test_colour_that_is_lost_is_counted_unless_grey_was_asked_for(tmp_path, capsys, monkeypatch, channels):
    """Training pictures are grey; two test pictures are not."""
    monkeypatch.setattr(prepare, "console", Console(width=200))
    (tmp_path / "photos").mkdir()
    lines = []
    for number in range(8):
        colour = (0, 0, 255) if number > 5 else (number, number, number)
        Image.new("RGB", (4, 4), colour).save(tmp_path / f"photos/{number}.png")
        lines.append({"file_name": f"{number}.png", "text": "x", "split": "test" if number > 5 else "train"})
    (tmp_path / "photos/metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    asked = () if channels is None else ("--pictures.channels", str(channels))
    out = printed(tmp_path, capsys, "--images", tmp_path / "photos", *asked)
    assert ("photos: 2 examples lose their colour, which the data that the tokenizer was fitted on lack" in out) == (
        channels is None
    )
