"""Killed at any moment and started again, a run ends with the same bits: the study, with few kills."""

import json
import shutil

import pytest

from trimask.diffusion.studies.kill_and_resume import differences, main


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """The study's folder, and its exit status."""
    folder = tmp_path_factory.mktemp("study")
    return folder, main(["--kills", "3", "--folder", str(folder)])


def test_a_run_that_was_killed_three_times_has_the_same_bits(study):
    assert study[1] == 0


def test_the_study_would_notice_a_difference(study, tmp_path):
    whole, killed = study[0] / "uninterrupted", shutil.copytree(study[0] / "killed", tmp_path / "killed")
    assert differences(whole, killed) == []
    lines = (killed / "metrics.jsonl").read_text().splitlines()
    changed = json.loads(lines[7])
    changed["loss"] += 1e-6
    (killed / "metrics.jsonl").write_text("\n".join([*lines[:7], json.dumps(changed), *lines[8:], lines[-1]]) + "\n")
    shutil.rmtree(max((killed / "checkpoints").iterdir(), key=lambda path: int(path.name)))
    found = " ".join(differences(whole, killed))
    assert "parameters/embedding" in found and "optimizer" in found and "step 8: loss" in found
    assert "150 lines, 151 after kills" in found
