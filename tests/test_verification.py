"""Damaged prepared data are found, named and made again block by block; edited reports are refused."""

import json
import os
import shutil
from dataclasses import dataclass, replace
from functools import partial
from types import SimpleNamespace

import pytest

from trimask.diffusion.data import sources
from trimask.diffusion.data.prepare import prepare
from trimask.diffusion.data.prepare_config import PrepareConfig
from trimask.diffusion.data.prepared import Prepared
from trimask.diffusion.data.sources import SourceConfig
from trimask.diffusion.data.verification import BackgroundVerification, Damaged, is_verified
from trimask.diffusion.evaluation.results import Evaluation
from trimask.diffusion.pretraining.trained_model import LoadedRun
from trimask.diffusion.studies.sampling_fronts import SamplingStudy
from trimask.sampling_rl import problem_sets
from trimask.scripts import evaluate, study, train_policy
from trimask.scripts.inspection import main as inspect

CONFIG = PrepareConfig(
    sources={name: SourceConfig(kind="synthetic", where=(name,)) for name in ("sums", "drawn")},
    text_vocabulary=257,
    workers=1,
)
SHARD, OTHER, REPORT = "sums/train-00000.array_record", "sums/test-00002.array_record", "sums/block-00000.json"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return prepare(tmp_path_factory.mktemp("made") / "data", CONFIG).folder


@pytest.fixture
def folder(made, tmp_path):
    return shutil.copytree(made, tmp_path / "data")


def bytes_of(folder):
    return {path: (folder / path).read_bytes() for path in (SHARD, OTHER, REPORT, "manifest.json")}


def flipped(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def linked(path):
    copy = path.with_name("elsewhere")
    path.rename(copy)
    os.mkfifo(path)


def swapped(path):
    other = path.parent.parent / OTHER
    content = other.read_bytes()
    other.write_bytes(path.read_bytes())
    path.write_bytes(content)


DAMAGE = {
    "missing": lambda path: path.unlink(),
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"\0"),
    "empty": lambda path: path.write_bytes(b""),
    "a pipe": linked,
}
SEEN_BY_DIGEST = {"flipped": flipped, "swapped": swapped}


@pytest.mark.parametrize("damage", [*DAMAGE, *SEEN_BY_DIGEST])
def test_a_damaged_shard_is_named_and_prepare_makes_its_block_again(made, folder, capsys, damage):
    (DAMAGE | SEEN_BY_DIGEST)[damage](folder / SHARD)
    if damage in DAMAGE:
        with pytest.raises(Damaged, match=f"{REPORT}: damaged: .*{SHARD}"):
            Prepared(folder).examples("sums", "test")
    with pytest.raises(Damaged, match=f"{SHARD}.*`trimask prepare` with the same arguments as before makes them again"):
        inspect([str(folder), "--verify"])
    before = (folder / "drawn/block-00000.json").stat().st_mtime_ns
    prepare(folder, CONFIG)
    said = capsys.readouterr().err
    assert said.count("is made again") == (2 if damage == "swapped" else 1) and SHARD in said
    assert bytes_of(folder) == bytes_of(made) and (folder / "drawn/block-00000.json").stat().st_mtime_ns == before
    inspect([str(folder), "--verify"])
    assert "6 shards are as they were written" in capsys.readouterr().out


def changed(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


LIES = {
    "must be an object, got 5": lambda report: report["shards"].update(train=5),
    "is of another block": lambda report: report["block"].update(start=1),
    "it rejects 1 of 20 records|it counts 20 examples of 19": lambda report: report["rejects"].append(
        {"file": "x", "line": 1, "reason": "x"}
    ),
    "it rejects 2 of 20": lambda report: report["rejects"].extend(2 * [{"file": "x", "line": 1, "reason": "x"}]),
    "its numbers of tokens of train contradict": lambda report: report["shards"]["train"]["given_tokens"].pop(),
    "numbers of tokens of train": lambda report: report["shards"]["train"]["text_tokens"].__setitem__(0, -1),
    "it counts 19 examples of 20 records": lambda report: [
        report["shards"]["train"][name].pop() for name in ("text_tokens", "given_tokens")
    ],
    "must be a whole number, got true": lambda report: report["shards"]["train"]["text_tokens"].append(True),
    "is not a SHA-256": lambda report: report["shards"]["train"].update(sha256="../x"),
    "a split must be a plain word": lambda report: report["shards"].update({"../x": report["shards"].pop("train")}),
}


@pytest.mark.parametrize("reason", LIES)
def test_an_edited_report_is_refused_and_its_block_is_made_again(made, folder, reason):
    changed(folder / REPORT, LIES[reason])
    with pytest.raises(Damaged, match=f"{REPORT}: damaged: .*({reason})"):
        Prepared(folder).examples("sums", "train")
    prepare(folder, CONFIG)
    assert bytes_of(folder) == bytes_of(made)


@pytest.mark.parametrize(
    ("field", "value", "reason"),
    [
        ("records", 45, "the manifest says records 45 of sums, the reports 44"),
        ("rejected", 1, "the manifest says rejected 1 of sums, the reports 0"),
        ("splits", {"train": 21}, "the manifest says splits"),
        ("splits", {"../x": 20}, "datasets and splits must be plain words"),
    ],
)
def test_an_edited_manifest_is_refused(folder, field, value, reason):
    changed(folder / "manifest.json", lambda content: content["datasets"]["sums"].update({field: value}))
    with pytest.raises(ValueError, match=reason):
        Prepared(folder).examples("sums", "train")


def test_a_plan_of_other_datasets_is_refused(folder):
    changed(folder / "plan.json", lambda content: content["blocks"].pop("drawn"))
    with pytest.raises(ValueError, match=r"plan\.json is of datasets sums, the manifest of sums, drawn"):
        Prepared(folder).examples("sums", "train")


def test_a_block_that_comes_out_differently_when_made_again_is_an_error(folder, monkeypatch):
    flipped(folder / SHARD)
    kind = sources.SOURCES["synthetic"]
    monkeypatch.setitem(sources.SOURCES, "synthetic", lambda where, config: Later(kind(where, config)))
    with pytest.raises(ValueError, match="the shards that were made again differ from the damaged ones; the sources"):
        prepare(folder, CONFIG)


@dataclass(frozen=True)
class Later:
    """A source whose records have changed their texts."""

    source: sources.Source
    medium = property(lambda self: self.source.medium)
    fill = property(lambda self: self.source.fill)

    def blocks(self, records):
        return self.source.blocks(records)

    def entries(self, block):
        for entry in self.source.entries(block):
            example = entry.example()
            media = {**example.media, "text": example.media["text"].replace("1", "7")}
            yield replace(entry, load=partial(replace, example, media=media))


def test_preparing_continues_only_from_undamaged_blocks(made, folder, capsys):
    (folder / "manifest.json").unlink()
    flipped(folder / SHARD)
    (folder / "drawn/block-00001.json").write_text("{")
    prepare(folder, CONFIG)
    assert bytes_of(folder) == bytes_of(made) and capsys.readouterr().err.count("the block is made again") == 2


def test_verified_shards_are_not_verified_again_until_they_change(folder):
    prepared = Prepared(folder)
    arguments = (prepared.paths, prepared.is_one_to_one)
    assert not is_verified(*arguments)
    verification = BackgroundVerification(*arguments)
    verification.start()
    verification.require_undamaged(wait=True)
    assert is_verified(*arguments)
    content = (folder / SHARD).read_bytes()
    flipped(folder / SHARD)
    os.utime(folder / SHARD, ns=(1, 1))
    assert not is_verified(*arguments)
    verification.start()
    with pytest.raises(Damaged, match=f"{SHARD}: damaged: its SHA-256 begins with"):
        verification.require_undamaged(wait=True)
    (folder / SHARD).write_bytes(content)
    for record in ("[]", "{", json.dumps({"shards": {SHARD: {"num_bytes": True, "changed_ns": 1}}})):
        (folder / "verified.json").write_text(record)
        assert not is_verified(*arguments)


def _evaluates(data, monkeypatch):
    monkeypatch.setattr(evaluate, "evaluate", lambda *_: (Evaluation(step=1), []))
    monkeypatch.setattr(evaluate, "prepared_of", lambda _, data: Prepared(data))
    evaluate.run(SimpleNamespace(folder=data.parent), data, None)


def _trains_a_policy(data, monkeypatch):
    monkeypatch.setattr(train_policy, "load", lambda *_: object.__new__(LoadedRun))
    monkeypatch.setattr(problem_sets, "require_same_tokenizers", lambda *_: None)
    monkeypatch.setattr(problem_sets, "from_prepared", lambda *_: pytest.fail("began"))
    monkeypatch.setattr(problem_sets, "prepared_of", lambda _, data: Prepared(data))
    asked = {"dataset": None, "task": "text", "split": "train", "max_problems": None, "judge": None}
    train_policy.run(SimpleNamespace(run=data.parent, checkpoint=None, data=data, **asked))


def _studies(data, monkeypatch):
    monkeypatch.setitem(study.STUDIES, "any", SimpleNamespace(run=lambda *_: pytest.fail("began"), data=None))
    options = study.Options(out=data.parent / "out", data=data, workers=0)
    study.run("any", options, SamplingStudy(run="none"), "trimask study any")


@pytest.mark.parametrize("reads", [_evaluates, _trains_a_policy, _studies])
def test_every_command_that_reads_data_finds_damage_that_only_a_digest_shows(folder, monkeypatch, reads):
    flipped(folder / SHARD)
    with pytest.raises(Damaged, match=f"{SHARD}: damaged: its SHA-256 begins with"):
        reads(folder, monkeypatch)
    assert not (folder.parent / "evaluation.json").exists() and not (folder.parent / "out").exists()


def test_a_read_only_folder_is_verified(folder, monkeypatch):
    def refuse(*_):
        raise PermissionError

    monkeypatch.setattr("trimask.tokenizers.storage.configuration.save", refuse)
    assert Prepared(folder).verify() == []
