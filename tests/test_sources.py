"""Sources: one battery for every kind in the table, with a small example of each."""

import dataclasses
import hashlib
import json
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
import soundfile
import tensorflow_datasets as tfds
from PIL import Image

from trimask.diffusion.data import shards
from trimask.diffusion.data.prepare import prepare
from trimask.diffusion.data.prepare_config import PrepareConfig
from trimask.diffusion.data.readers import digits, puzzles, stream
from trimask.diffusion.data.reading_config import FieldConfig, OpenConfig
from trimask.diffusion.data.records import BadRecord, Source
from trimask.diffusion.data.sources import SOURCES, SourceConfig, open_source, uses_of_parts
from trimask.tokenizers.audio import MelConfig
from trimask.tokenizers.image import PatchConfig


@dataclasses.dataclass(frozen=True)
class Made:
    """A small source of some kind."""

    where: str
    broken: frozenset[int] = frozenset()
    """Lines of the records that cannot be used."""
    add: Callable[[], None] | None = None
    """Adds a record before the others, or a file. None: the records of the source are fixed."""


def _folder(root, write, ending):
    """Captioned files: line 3 has no file, line 5 no caption, and line 6 is no JSON."""
    for number in range(10):
        write(root / f"{number}.{ending}", np.random.default_rng(number))
    lines = [{"file_name": f"{number}.{ending}", "text": f"number {number}"} for number in range(9)]
    lines[2]["file_name"], lines[4]["text"] = f"gone.{ending}", ""
    lines = [json.dumps(line) for line in lines]
    lines[5] = "{"
    (root / "metadata.jsonl").write_text("\n".join(lines))

    def add():
        one = json.dumps({"file_name": f"9.{ending}", "text": "one more"})
        (root / "metadata.jsonl").write_text("\n".join([one, *lines]))

    return Made(str(root), frozenset({3, 5, 6}), add)


def _images(root, _):
    return _folder(root, lambda path, rng: Image.fromarray(rng.integers(0, 256, (4, 6, 3), np.uint8)).save(path), "png")


def _audio(root, _):
    return _folder(root, lambda path, rng: soundfile.write(path, rng.uniform(-1, 1, 900), 8000), "wav")


def _text(root, _):
    paragraphs = [f"paragraph {number}\nof two lines".encode() for number in range(8)]
    paragraphs[3] = "grün".encode("latin-1")
    (root / "b.txt").write_bytes(b"\n\n".join(paragraphs))
    return Made(str(root / "*.txt"), frozenset({10}), lambda: (root / "a.txt").write_text("one more\n\nand another"))


def _prompts(root, _):
    lines = [json.dumps({"prompt": f"{a}+{a}=", "response": str(2 * a)}) for a in range(8)]
    lines[1] = json.dumps({"prompt": "without an answer"})
    (root / "b.jsonl").write_text("\n".join(lines))
    more = json.dumps({"prompt": "9+9=", "response": "18"})
    return Made(str(root / "*.jsonl"), frozenset({2}), lambda: (root / "a.jsonl").write_text(more))


def _puzzles(_, stack):
    patch = stack.enter_context(pytest.MonkeyPatch.context())
    patch.setattr(puzzles, "PUZZLE_CONFIGS", {"cups": puzzles.Cups(train=9, validation=2, test=4)})
    return Made("cups")


def _digits(_, stack):
    patch = stack.enter_context(pytest.MonkeyPatch.context())
    patch.setattr(digits, "DIGIT_CONFIGS", {"sums": digits.Sums(numbers=range(10, 15))})
    return Made("sums")


def _stream(_, stack):
    patch = stack.enter_context(pytest.MonkeyPatch.context())
    patch.setattr(stream, "_HELD_OUT", {"validation": 3, "test": 2})
    return Made("drawn:9")


def _tfds(_, stack):
    stack.enter_context(tfds.testing.mock_data(num_examples=8))
    return Made("mnist")


MAKERS = {
    "digits": _digits,
    "images": _images,
    "audio": _audio,
    "text": _text,
    "prompts": _prompts,
    "puzzles": _puzzles,
    "stream": _stream,
    "tfds": _tfds,
}


@pytest.fixture(params=SOURCES)
def kind(request):
    if request.param not in MAKERS:
        pytest.fail(
            f"sources.SOURCES has a kind {request.param!r}, of which this file has no example: add it to MAKERS"
        )
    return request.param


@pytest.fixture
def made(kind, tmp_path):
    with ExitStack() as stack:
        (tmp_path / "source").mkdir()
        yield MAKERS[kind](tmp_path / "source", stack)


@pytest.fixture
def opened(kind, made, tmp_path):
    """Function that opens the source anew."""
    config = OpenConfig(fields=FieldConfig(), media=PrepareConfig().media, folder=tmp_path / "raw")
    return lambda: open_source(SourceConfig(kind=kind, where=(made.where,)), config)


def outcome(entry):
    """All values of a record and its example, or file, line and reason if it cannot be used."""
    if not isinstance(entry, BadRecord):
        try:
            example = entry.example()
        except BadRecord as error:
            entry = error
        else:
            media = {name: x if isinstance(x, str) else (x.shape, x.tobytes()) for name, x in example.media.items()}
            return entry.id, entry.file, entry.line, entry.split, example.id, media, example.given_characters
    return entry.file, entry.line, entry.reason


def outcomes(source, records):
    return [outcome(entry) for block in source.blocks(records) for entry in source.entries(block)]


def ids(source):
    """Ids of all entries that can be used, and of their examples."""
    return [(found[0], found[4]) for found in outcomes(source, 4) if len(found) > 3]


def test_blocks_of_any_size_give_the_same_entries_in_the_same_order(opened):
    source = opened()
    assert isinstance(source, Source)
    whole = outcomes(source, 1000)
    assert len(whole) >= 8
    for records in (1, 2, 3, 7):
        blocks = source.blocks(records)
        assert blocks == opened().blocks(records)
        found = {block: [outcome(entry) for entry in source.entries(block)] for block in reversed(blocks)}
        assert [entry for block in blocks for entry in found[block]] == whole
        assert [len(found[block]) for block in blocks] == [block.count for block in blocks]
        assert max(block.count for block in blocks) == min(records, len(whole))


def test_ids_are_unique_and_do_not_change_when_records_are_added(opened, made):
    before = ids(opened())
    assert ids(opened()) == before
    after = before
    if made.add is not None:
        made.add()
        after = ids(opened())
        assert len(after) > len(before) and [id for id in after if id in before] == before
    assert all(len(set(column)) == len(after) for column in zip(*after, strict=True))


def test_broken_records_are_named_with_file_line_and_reason(opened, made):
    bad = [found for found in outcomes(opened(), 4) if len(found) == 3]
    assert {line for _, line, _ in bad} == made.broken and len(bad) == len(made.broken)
    assert all(made.where.partition("*")[0] in file and reason for file, _, reason in bad)


def bytes_of(folder):
    """Path → digest of every file that preparing makes."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and "raw" not in path.parts]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_preparing_that_is_stopped_within_a_block_is_continued_to_the_same_bytes(kind, made, tmp_path, monkeypatch):
    config = PrepareConfig(
        sources={"some": SourceConfig(kind=kind, where=(made.where,))},
        text_vocabulary=256,
        codecs={
            "image": PatchConfig(codebook_size=3),
            "audio": MelConfig(codebook_size=3, griffin_lim_iterations=1),
        },
        shard_records=4,
        on_error="skip",
        workers=1,
    )
    whole, written = prepare(tmp_path / "whole", config), []
    original = shards.write_records

    def interrupted(path, records):
        if written:
            raise KeyboardInterrupt
        written.append(path)
        return original(path, records)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(shards, "write_records", interrupted)
        prepare(tmp_path / "stopped", config)
    assert not (tmp_path / "stopped/manifest.json").exists()
    prepare(tmp_path / "stopped", config)
    assert bytes_of(tmp_path / "stopped") == bytes_of(whole.folder)
    assert whole.dataset("some").rejected == len(made.broken)


@pytest.mark.parametrize(
    "kind, where, message",
    [
        ("folders", ("a",), r"unknown kind of source 'folders'; there are image, audio, "),
        ("puzzles", (), "a source of kind puzzles needs at least one folder, file or name, got none"),
        ("puzzles", ("cups", "sudoku"), "a source of kind puzzles has one folder or name, got cups, sudoku"),
    ],
)
def test_unknown_kinds_and_wrong_numbers_of_names_are_refused(kind, where, message):
    with pytest.raises(ValueError, match=message):
        PrepareConfig(sources={"x": SourceConfig(kind=kind, where=where)}).open_source("x", Path())


@pytest.mark.parametrize(
    ("kind", "where", "said"),
    [
        ("stream", "drawn:10", "1,239 originals, warped anew each time, 2.0 times each"),
        ("stream", "spoken:10", "160 pairs of a word and a voice, spoken anew each time, 15.5 times each"),
        ("digits", "handwritten_numbers", "1,239 pictures of one digit, 3.8 times each"),  # 10 of 100 have one digit
        ("digits", "handwritten", ""),
        ("images", "photos", ""),
    ],
)
def test_parts_that_records_have_in_common_are_counted(kind, where, said):
    assert uses_of_parts(SourceConfig(kind=kind, where=(where,)), 2478.0) == said
