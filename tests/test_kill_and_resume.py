"""Killed at any moment and started again, a run ends with the same bits: the study, with few kills."""

import json
import shutil

import pytest

from trimask.diffusion.data.plan import PrepareConfig
from trimask.diffusion.data.prepare import prepare
from trimask.diffusion.data.sources import SourceConfig
from trimask.diffusion.studies.kill_and_resume import differences
from trimask.scripts import study as study_script


@pytest.fixture(scope="module")
def study(synthetic_source, tmp_path_factory):
    """The study's folder; of one dataset, and so one row length to compile."""
    folder, data = tmp_path_factory.mktemp("study"), tmp_path_factory.mktemp("sums")
    sums = {"sums": SourceConfig(kind="synthetic", where=("sums",))}
    prepare(data, PrepareConfig(sources=sums, text_vocabulary=262))
    study_script.main(["kill-and-resume", str(folder), "--data", str(data), "--kills", "1", "--steps", "18"])
    return folder


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
