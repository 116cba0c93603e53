"""`trimask study`: the page that a study leaves, and the data that it is made on; studies are made up."""

import dataclasses
import datetime
import json
import subprocess
import sys
from dataclasses import dataclass
from types import SimpleNamespace

import pytest

from trimask.diffusion.data.prepare_config import PrepareConfig
from trimask.diffusion.pretraining.description import TrainConfig
from trimask.diffusion.studies import trials as trials_module
from trimask.diffusion.studies.claims import Claim, Findings
from trimask.diffusion.studies.final import Final, FinalResult
from trimask.diffusion.studies.verdict import ScoredSetting, load_verdict
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


@dataclass(frozen=True)
class Measured:
    """Result of `measure`."""

    number: int


def measure(config, data) -> Measured:
    """Fake measure that returns the configuration's number."""
    return Measured(config.number)


@pytest.fixture
def made_up(monkeypatch):
    """Data, configuration and workers with which a fake study was called; it writes two figures and a short report."""
    called = []

    def run(config, trials):
        called.append((config, trials.data, trials.workers))
        if isinstance(config, OfARun):
            trials.measurements([config], measure, Measured)
        for name in ("b.png", "a.png"):
            (trials.folder / name).write_bytes(b"")
        return "Found: *little*."

    def score(config, trials):
        figure = ScoredSetting(
            setting="seven",
            split="test",
            measure="accuracy",
            value=0.5,
            is_share=True,
            interval=(0.25, 0.75),
            over="8 problems",
            nfe=1.0,
        )
        return FinalResult(config.run, [str(config.number)], [figure])

    fake = SimpleNamespace(
        run=run,
        summary="",
        presets={"cpu": OfTrainings, "accelerator": OfTrainings},
        data=PrepareConfig(),
        final=Final(lambda config: "the luckiest", score),
    )
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
    assert json.loads((out / "config.json").read_text()) == {"study": "made-up"} | configuration.to_dict(OfARun())
    shown = capsys.readouterr().out
    assert "Found: little." in shown and f"this report: {out}" in shown.replace("\n", "")


def test_the_test_split_is_scored_once_a_study_is_complete_and_the_page_says_so(
    made_up, prepared, tmp_path, monkeypatch
):
    out = tmp_path / "out"
    options = {"out": out, "workers": 0, "data": prepared.folder}
    with pytest.raises(ValueError, match="holds no complete study: 1 of 1 trials are missing"):
        study.run("made-up", study.Options(**options, final=True), OfARun(), "early")
    assert not out.exists()
    study.run("made-up", study.Options(**options), OfARun(), "trimask study made-up out")
    header = (out / "README.md").read_text().split("\n\n")[1]
    assert "Test split" not in (out / "README.md").read_text() and not (out / "verdict.json").exists()
    kept = [(out / name).read_bytes() for name in ("trials.jsonl", "config.json")]
    found = study.run("made-up", study.Options(**options, final=True), OfARun(), "trimask study made-up out --final")
    page = (out / "README.md").read_text()
    # The command and date at the head stay those of the measurements.
    assert found in page and page.split("\n\n")[1] == header
    assert "Scored by this rule once." in found and "| seven | test | accuracy 50.0% | 25.0%–75.0% |" in found
    with pytest.raises(ValueError, match="--again scores it all the same"):
        study.run("made-up", study.Options(**options, final=True), OfARun(), "")
    study.run("made-up", study.Options(**options, final=True, again=True), OfARun(), "")
    assert "2 times, and only the first score is fresh evidence" in (out / "README.md").read_text()
    # A later call keeps the scores on the page, and another grid is another study, which is not complete.
    assert "2 times, " in study.run("made-up", study.Options(**options), OfARun(), "")
    with pytest.raises(ValueError, match="holds no complete study"):
        study.run("made-up", study.Options(**options, final=True, again=True), OfARun(number=8), "")
    assert [(out / name).read_bytes() for name in ("trials.jsonl", "config.json")] == kept


def test_claims_are_recorded_with_the_time_of_all_trials(made_up, prepared, tmp_path, monkeypatch):
    found = Findings("Found: much.", [Claim(claim="so", verdict="shown", effect="+1 %", rule="if it is")])

    def run(config, trials):
        trials.measurements([config], measure, Measured)
        return found

    monkeypatch.setattr(study.STUDIES["made-up"], "run", run)
    clock = iter([0.0, 90.0, 100.0, 140.0])
    monkeypatch.setattr(trials_module, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    options = study.Options(out=tmp_path / "out", workers=0, data=prepared.folder)
    # A call that ends early counts as far as it came.
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(study, "record_claims", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        study.run("made-up", options, OfARun(), "first")
    assert "All trials together took 2 minutes." in study.run("made-up", options, OfARun(number=8), "second")
    verdict = load_verdict(tmp_path / "out")
    assert (verdict.claims, verdict.command, verdict.seconds) == (found.claims, "second", 130.0)
    monkeypatch.setattr(trials_module, "time", SimpleNamespace(perf_counter=lambda: 0.0))
    assert verdict.date == str(datetime.date.today()) and verdict.scores == []
    # A page that is shown again measures nothing.
    study.run("made-up", dataclasses.replace(options, show=True), OfARun(), "third")
    assert load_verdict(tmp_path / "out") == verdict


def test_a_study_that_chooses_nothing_has_no_final_score(tmp_path):
    for name, able in study.STUDIES.items():
        if able.final is None:
            with pytest.raises(ValueError, match=f"study {name} has no score .* is for sampling, unmasking, policies"):
                study.run(name, study.Options(out=tmp_path / "out", final=True), able.presets["cpu"](), "")
    assert not (tmp_path / "out").exists()
    assert {name for name, able in study.STUDIES.items() if able.final} == {"sampling", "unmasking", "policies"}


def test_flags_that_exclude_each_other_are_refused(tmp_path):
    with pytest.raises(ValueError, match="--again is for --final, which is missing"):
        study.Options(out=tmp_path, again=True)
    with pytest.raises(ValueError, match="--show measures nothing; leave out --final or --show"):
        study.Options(out=tmp_path, final=True, show=True)


def test_a_study_is_shown_from_what_it_holds(made_up, prepared, tmp_path, monkeypatch):
    fake = study.STUDIES["made-up"]
    monkeypatch.setattr(fake, "presets", {"cpu": OfARun, "accelerator": OfARun})
    out = tmp_path / "out"
    data = ["--data", str(prepared.folder), "--workers", "0"]
    study.main(["made-up", str(out), *data, "--number", "9"])
    (out / "a.png").unlink()
    before = {path.name: path.read_bytes() for path in out.iterdir() if path.name != ".lock"}
    study.main(["made-up", str(out), *data, "--show"])
    assert made_up[-1][0] == OfARun(number=9) and (out / "a.png").exists()
    after = {path.name: path.read_bytes() for path in out.iterdir() if path.name not in (".lock", "a.png")}
    assert after.keys() == before.keys() and after["trials.jsonl"] == before["trials.jsonl"]
    assert after["config.json"] == before["config.json"]
    with pytest.raises(ValueError, match=r"--show takes the configuration of OUT/config.json; leave out flags"):
        study.main(["made-up", str(out), *data, "--show", "--number", "8"])
    (out / "trials.jsonl").unlink()
    with pytest.raises(ValueError, match="holds a study of rules 1"):
        study.main(["made-up", str(out), *data, "--show"])


def test_what_fails_replaces_nothing_of_a_complete_study(made_up, prepared, tmp_path, monkeypatch):
    out = tmp_path / "out"
    options = study.Options(out=out, workers=0, data=prepared.folder)
    study.run("made-up", options, OfARun(), "first")
    before = {path.name: path.read_bytes() for path in out.iterdir() if path.name != ".lock"}
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(study.STUDIES["made-up"], "run", lambda *_: 1 / 0)
        study.run("made-up", options, OfARun(number=8), "second")
    monkeypatch.setitem(study.STUDIES, "another", study.STUDIES["made-up"])
    with pytest.raises(ValueError, match="holds the study made-up; choose another folder for another"):
        study.run("another", options, OfARun(), "third")
    assert {path.name: path.read_bytes() for path in out.iterdir() if path.name != ".lock"} == before
    # A folder of earlier code, whose configuration does not name its study, says it at the head of its page.
    configuration.save(out / "config.json", OfARun())
    with pytest.raises(ValueError, match="holds the study made-up"):
        study.run("another", options, OfARun(), "third")
    # A study that another process is at work on is left alone.
    held = "import sys; from filelock import FileLock\nwith FileLock(sys.argv[1]): print(flush=True); sys.stdin.read()"
    with subprocess.Popen(
        [sys.executable, "-c", held, str(out / ".lock")], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        process.stdout.readline()
        with pytest.raises(ValueError, match="is in use by"):
            study.run("made-up", options, OfARun(number=8), "fourth")
        process.stdin.close()
    assert configuration.load(out / "config.json", OfARun) == OfARun()


def test_a_study_is_shown_without_preparing_data(made_up, tmp_path):
    with pytest.raises(FileNotFoundError, match="there are no prepared data; --data names those of the study"):
        study.run("made-up", study.Options(out=tmp_path / "out", workers=0, show=True), OfTrainings(), "")
    assert not made_up


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
    assert asked == [(out / "data", PrepareConfig())] and made_up[0][1] == out / "data"
    assert mixed == [(TrainConfig().batch, out / "data")]
    study.run("made-up", study.Options(out=out, workers=0, data=prepared.folder), OfTrainings(), "")
    assert len(asked) == 1 and made_up[1][1] == prepared.folder


def test_without_a_name_all_studies_are_listed(capsys):
    study.main([])
    shown = capsys.readouterr().out
    assert all(f"  {name} " in shown for name in study.STUDIES) and "usage: trimask study NAME OUT [options]" in shown
