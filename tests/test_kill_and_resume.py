"""Killed at any moment and started again, a run ends with the same bits: the study, with few kills."""

import json
import shutil

import madeup
import pytest
from madeup import MadeUp, written

from trimask.diffusion.data.plan import PrepareConfig
from trimask.diffusion.data.prepare import prepare
from trimask.diffusion.data.sources import SourceConfig
from trimask.diffusion.studies import kill_and_resume
from trimask.diffusion.studies.kill_and_resume import Kill, KillAndResume, differences
from trimask.scripts import study as study_script


@pytest.fixture(scope="module")
def study(synthetic_source, tmp_path_factory):
    """The study's folder; of one dataset, and so one row length to compile."""
    folder, data = tmp_path_factory.mktemp("study"), tmp_path_factory.mktemp("sums")
    sums = {"sums": SourceConfig(kind="synthetic", where=("sums",))}
    prepare(data, PrepareConfig(sources=sums, text_vocabulary=262))
    study_script.main(["kill-and-resume", str(folder), "--data", str(data), "--kills", "1", "--steps", "18"])
    return folder


def test_all_that_is_written(tmp_path, monkeypatch):
    kills = [
        Kill("write", reached=7, resumes=5, hit="a checkpoint write"),
        Kill("start", reached=9, resumes=6, hit="starting up"),
        Kill("step", reached=11, resumes=10, hit="training"),
        Kill("step", reached=12, resumes=8, hit="a checkpoint write"),
    ]
    found, asked = [], []

    def made_up(config, *rest):
        asked.append((config.kills, *rest))
        return kills, found

    monkeypatch.setattr(kill_and_resume, "kill_and_resume", made_up)
    trials = MadeUp(tmp_path, None)
    table = written(
        """
        | kill | aimed at | step reached | resumes at | hit |
        | --- | --- | --- | --- | --- |
        | 1 | write | 7 | 5 | a checkpoint write |
        | 2 | start | 9 | 6 | starting up |
        | 3 | step | 11 | 10 | training |
        | 4 | step | 12 | 8 | a checkpoint write |

        Killed: 4×, 2× inside a checkpoint write. Found: """
    )
    assert kill_and_resume.study(KillAndResume(kills=4), trials) == f"{table} the same bits."
    assert asked == [
        (4, tmp_path / "uninterrupted", tmp_path / "killed", trials.data, tmp_path / "compiled", trials.report)
    ]
    assert madeup.files(tmp_path) == ["kills.csv"]
    assert (tmp_path / "kills.csv").read_text().splitlines() == [
        "aim,reached,resumes,hit",
        "write,7,5,a checkpoint write",
        "start,9,6,starting up",
        "step,11,10,training",
        "step,12,8,a checkpoint write",
    ]
    found += [f"leaf {number}" for number in range(22)]
    lines = kill_and_resume.study(KillAndResume(kills=4), trials).removeprefix(table).split("\n\n")
    assert lines == [" 22 differences.", *(f"- different: leaf {number}" for number in range(20))]
    (tmp_path / "killed").mkdir()
    with pytest.raises(ValueError, match="killed is there already; remove it or choose another folder"):
        kill_and_resume.study(KillAndResume(kills=4), trials)


@pytest.mark.parametrize(("kills", "steps"), [(0, 150), (15, 20), (16, 20)])
def test_more_kills_than_a_run_has_room_for_are_refused(kills, steps):
    assert KillAndResume(kills=14, steps=20).training.optimizer.horizon_tokens == 240 * 20
    with pytest.raises(ValueError, match=f"less than three quarters of the steps, got {kills} of {steps}"):
        KillAndResume(kills=kills, steps=steps)


def test_a_run_that_was_killed_has_the_same_bits(study):
    text = (study / "README.md").read_text()
    assert text.count("\n| ") == 3 and "Killed: 1×" in text and text.rstrip().endswith("Found: the same bits.")


def test_the_study_would_notice_a_difference(study, tmp_path):
    whole, killed = study / "uninterrupted", shutil.copytree(study / "killed", tmp_path / "killed")
    assert differences(whole, killed) == []
    lines = (killed / "metrics.jsonl").read_text().splitlines()
    changed = json.loads(lines[7])
    changed["loss"] += 1e-6
    (killed / "metrics.jsonl").write_text("\n".join([*lines[:7], json.dumps(changed), *lines[8:], lines[-1]]) + "\n")
    shutil.rmtree(max((killed / "checkpoints").iterdir(), key=lambda path: int(path.name)))
    found = " ".join(differences(whole, killed))
    assert "parameters/embedding" in found and "optimizer" in found and "step 8: loss" in found
    assert "20 lines, 21 after kills" in found
