"""trimask inspect: prepared folders, runs, and folders that are neither."""

import dataclasses
import json
import shutil
from dataclasses import replace

import jax
import numpy as np
import pytest
from rich.console import Console

from trimask.diffusion.evaluation.results import Evaluation, Score
from trimask.diffusion.pretraining.trained_model import LoadedRun
from trimask.diffusion.transformer import num_parameters
from trimask.scripts import console, evaluate, inspection
from trimask.tokenizers.quality import psnr_db
from trimask.tokenizers.storage import configuration


@pytest.fixture
def printed(monkeypatch, capsys):
    """Calls the function and returns what it printed, on lines as long as they need to be."""

    def call(function, *arguments):
        wide = Console(width=200)
        for module in (console, evaluate, inspection):
            monkeypatch.setattr(module, "console", wide)
        function(*arguments)
        return capsys.readouterr().out

    return call


@pytest.fixture(scope="module")
def loaded(loaded, tmp_path_factory) -> LoadedRun:
    """A run with metrics, whose parameters are all 0."""
    description = dataclasses.replace(loaded.description, data="where/it/was", data_fingerprint="0", num_steps=11)
    folder = tmp_path_factory.mktemp("run")
    (folder / "metrics.jsonl").write_text('{"step": 6, "loss": 2.5}\n{"step": 7, "loss": 1.25}\n{"step": 8, "lo')
    parameters = jax.tree.map(np.zeros_like, loaded.parameters)
    return dataclasses.replace(loaded, folder=folder, description=description, parameters=parameters, step=7)


def test_prepared_data_are_listed_with_layouts_and_encodings(prepared, printed):
    out = printed(inspection.run, prepared.folder)
    for expected in ("synthetic drawn", "<image> 2×3", "3 · 2 · + · 3 · 2 · = · 6 · 4"):
        assert expected in out


def test_every_codec_is_listed_with_its_quality(prepared, printed):
    lines = printed(inspection.run, prepared.folder).splitlines()
    assert [line for line in lines if "PSNR" in line and "image" in line and "dB" in line]
    assert [line for line in lines if "mel" in line and "audio" in line and "dB" in line]
    assert len([line for line in lines if "of 9" in line and "audio" in line]) == 2


def test_quality_is_that_of_the_held_out_pictures(prepared):
    (quality,) = inspection.codec_qualities(prepared, "drawn")
    real = np.stack([example.media["image"] for example in prepared.raw("drawn", "test")])
    codec = prepared.tokenizers.codec("image")
    codes = codec.encode(real)
    assert quality.quality == pytest.approx(psnr_db(real, codec.decode(codes)).mean())
    assert (quality.split, quality.examples) == ("test", 12)
    assert quality.books[0].used == len(np.unique(codes))


def test_texts_alone_have_no_codec(prepared):
    assert inspection.codec_qualities(prepared, "sums") == []


def test_parameters_of_all_classes_add_up(loaded):
    counts = inspection.parameters_per_class(loaded)
    assert sum(counts.values()) == num_parameters(loaded.parameters)
    assert counts["final_norm"] == 16


def test_a_run_shows_its_progress_and_its_last_whole_line_of_metrics(loaded, printed):
    out = printed(inspection.inspect_run, loaded)
    for expected in ("step 7 of 11", "where/it/was", f"{num_parameters(loaded.parameters):,}", "1.25"):
        assert expected in out
    assert "2.5" not in out


def test_a_run_that_was_evaluated_shows_the_table(loaded, printed, tmp_path):
    score = Score(
        dataset="drawn",
        task="text_to_image",
        split="test",
        judge="label",
        examples=7,
        value=0.4321,
        interval=(0.2, 0.6),
        is_share=True,
        higher_is_better=True,
        on_real=0.9,
        mean_nfe=2.0,
    )
    configuration.save(tmp_path / "evaluation.json", Evaluation(step=7, scores=[score]))
    assert "43.2%" in printed(inspection.inspect_run, replace(loaded, folder=tmp_path))


@pytest.mark.parametrize("name", ["metrics.jsonl", "evaluation.json"])
def test_a_folder_in_the_place_of_a_file_that_may_be_missing_is_refused(loaded, tmp_path, name):
    (tmp_path / name).mkdir()
    with pytest.raises(IsADirectoryError, match=f"{name}: a folder, not a file"):
        inspection.inspect_run(replace(loaded, folder=tmp_path))


def test_what_is_no_folder_of_ours_is_refused(tmp_path):
    with pytest.raises(ValueError, match="neither prepared data"):
        inspection.run(tmp_path)
    with pytest.raises(FileNotFoundError, match="no such folder"):
        inspection.run(tmp_path / "none")


def test_a_run_without_a_checkpoint_is_refused(loaded, tmp_path):
    configuration.save(tmp_path / "config.json", loaded.description)
    loaded.tokenizers.save(tmp_path / "tokenizers")
    assert json.loads((tmp_path / "config.json").read_text())["num_steps"] == 11
    with pytest.raises(FileNotFoundError, match="no complete checkpoint yet"):
        inspection.run(tmp_path)


def test_a_shard_that_is_another_is_noticed_before_anything_is_said(prepared, tmp_path, capsys):
    """Two shards of equal size are swapped."""
    folder = shutil.copytree(prepared.folder, tmp_path / "data")
    one, other = sorted((folder / "drawn").glob("*.array_record"))[:2]
    other.write_bytes(one.read_bytes()[::-1][: other.stat().st_size].ljust(other.stat().st_size, b"x"))
    with pytest.raises(ValueError, match=rf"{other.name}: damaged: its SHA-256"):
        inspection.run(folder)
    assert "Datasets in" not in capsys.readouterr().out
