"""`trimask study`: the page that a study leaves, and the data that it is made on; studies are made up."""

import datetime
from dataclasses import dataclass
from types import SimpleNamespace

import pytest

from trimask.diffusion.pretraining.description import TrainConfig
from trimask.scripts import study
from trimask.tokenizers.storage import configuration


@dataclass(frozen=True, kw_only=True)
class OfARun:
    """Fake study of an existing run."""

    run: str = "runs/small"
    number: int = 7


@dataclass(frozen=True, kw_only=True)
class OfTrainings:
    """Fake study that trains models."""

    base: TrainConfig = TrainConfig()


@pytest.fixture
def made_up(monkeypatch):
    """Data, configuration and workers with which a fake study was called; it writes two figures and a short report."""
    called = []

    def run(config, trials):
        called.append((config, trials.data, trials.workers))
        for name in ("b.png", "a.png"):
            (trials.folder / name).write_bytes(b"")
        return "Found: *little*."

    fake = SimpleNamespace(run=run, summary="", presets={"cpu": OfTrainings, "accelerator": OfTrainings})
    monkeypatch.setitem(study.STUDIES, "made-up", fake)
    return called


def test_the_page_says_what_was_run_where_and_what_was_found(made_up, prepared, tmp_path, monkeypatch, capsys):
    described = {study.Path("runs/small"): SimpleNamespace(data=str(prepared.folder))}
    monkeypatch.setattr(study, "load_description", described.__getitem__)
    monkeypatch.setattr("platform.machine", lambda: "abacus")
    out = tmp_path / "out"
    found = study.run("made-up", study.Options(out=out, workers=0), OfARun(), "trimask study made-up out")
    # The data are those that the run was trained on.
    assert made_up == [(OfARun(), prepared.folder, 0)] and found == "Found: *little*."
    title, command, *rest = (out / "README.md").read_text().split("\n\n")
    assert title == "# made-up" and rest == ["Found: *little*.", "![a](a.png)\n![b](b.png)\n"]
    assert command.startswith(f"`trimask study made-up out`, {datetime.date.today()}, abacus, cpu, jax ")
    assert configuration.load(out / "config.json", OfARun) == OfARun()
    shown = capsys.readouterr().out
    assert "Found: little." in shown and f"this report: {out}" in shown.replace("\n", "")


def test_trainings_without_data_are_of_digits_that_are_prepared_for_them(made_up, prepared, tmp_path, monkeypatch):
    asked, mixed = [], []

    def prepare(folder, config):
        asked.append((folder, config))
        folder.symlink_to(prepared.folder)

    def with_mixture(config, usual, data):
        mixed.append((usual, data))
        return config

    out = tmp_path / "out"
    out.mkdir()
    monkeypatch.setattr(study.prepare, "run", prepare)
    monkeypatch.setattr(study, "with_mixture", with_mixture)
    study.run("made-up", study.Options(out=out, workers=0), OfTrainings(), "")
    assert asked == [(out / "data", study.DATA)] and made_up[0][1] == out / "data"
    assert mixed == [(TrainConfig().batch, out / "data")]
    study.run("made-up", study.Options(out=out, workers=0, data=prepared.folder), OfTrainings(), "")
    assert len(asked) == 1 and made_up[1][1] == prepared.folder


def test_without_a_name_all_studies_are_listed(capsys):
    study.main([])
    shown = capsys.readouterr().out
    assert all(f"  {name} " in shown for name in study.STUDIES) and "usage: trimask study NAME OUT [options]" in shown
