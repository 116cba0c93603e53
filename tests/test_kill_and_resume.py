"""Killed at any moment and started again, a run ends with the same bits: the study, with few kills."""

import json
import random
import shutil
from types import SimpleNamespace

import madeup
import pytest
from madeup import MadeUp, written

from trimask.diffusion.data.prepare import prepare
from trimask.diffusion.data.prepare_config import PrepareConfig
from trimask.diffusion.data.sources import SourceConfig
from trimask.diffusion.studies import kill_and_resume
from trimask.diffusion.studies.kill_and_resume import Kill, KillAndResume, run_differences
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
    with pytest.raises(ValueError, match="killed exists already; remove it or choose another folder"):
        kill_and_resume.study(KillAndResume(kills=4), trials)


class Timeline(kill_and_resume.TrainingProcess):
    """A child that begins after a second, takes a step a second, writes in the last half of every fourth, and ends."""

    def __init__(self, run, steps=20):
        self.run, self.steps, self.now, self.killed_at = run, steps, 0.0, None

    def sleep(self, seconds):
        self.now += seconds

    def is_running(self):
        if self.killed_at is not None:
            raise AssertionError("asked when it was killed")
        return self.now < self.steps + 1

    def has_begun(self):
        return self.now >= 1

    def reached(self):
        return min(max(0, int(self.now) - 1), self.steps)

    def is_writing(self):
        return self.has_begun() and self.reached() % 4 == 3 and self.now % 1 > 0.5

    def kill(self):
        self.killed_at = self.now


class Always(random.Random):
    """Fake random generator that draws the same share of every range."""

    def __init__(self, share):
        super().__init__()
        self.share = share

    def uniform(self, low, high):
        return low + (high - low) * self.share


@pytest.mark.parametrize(
    ("aim", "saved", "between", "reached", "hit"),
    [
        ("step", [], (6.0, 6.06), 5, "training"),
        ("step", [4, 8], (10.0, 10.06), 9, "training"),
        ("write", [], (8.5, 8.52), 7, "a checkpoint write"),
        ("write", [4, 7], (12.5, 12.52), 11, "a checkpoint write"),
        ("start", [], (0.25, 0.26), 0, "starting up"),
        ("start", [4], (0.25, 0.26), 0, "starting up"),
    ],
)
def test_a_child_is_killed_where_that_was_aimed_at(tmp_path, monkeypatch, aim, saved, between, reached, hit):
    """At step 5, or the next one after the checkpoint it goes on from."""
    child = Timeline(tmp_path)
    clock = SimpleNamespace(monotonic=lambda: child.now, sleep=child.sleep)
    monkeypatch.setattr(kill_and_resume, "time", clock)
    monkeypatch.setattr(kill_and_resume, "checkpoint_steps", {tmp_path: saved}.__getitem__)
    kill = kill_and_resume.kill_at(child, aim, 5, 0.5, Always(0.5))
    assert between[0] <= child.killed_at <= between[1]
    assert kill == Kill(aim, reached, max(saved, default=0), hit)


@pytest.mark.parametrize(("aim", "step"), [("step", 50), ("write", 20), ("step", 20)])
def test_a_child_that_was_through_before_is_not_killed(tmp_path, monkeypatch, aim, step):
    child = Timeline(tmp_path)
    monkeypatch.setattr(kill_and_resume, "time", SimpleNamespace(monotonic=lambda: child.now, sleep=child.sleep))
    monkeypatch.setattr(kill_and_resume, "checkpoint_steps", lambda run: [])
    assert kill_and_resume.kill_at(child, aim, step, 0.5, Always(1.0)) is None and child.killed_at is None


def test_kills_come_in_the_order_of_their_steps_and_the_run_is_finished(tmp_path, monkeypatch):
    """Each child is the run again; of one that ends too soon the study says so, and finds nothing else."""
    made, asked, reports = [], [], []
    through_at = None

    class Fake:
        def __init__(self, config, run, data, cache):
            made.append((config, run, data, cache))
            self.asked = 0

        def is_running(self):
            self.asked += 1
            return self.asked < 3

        def reached(self):
            return 0

        def finish(self):
            made.append("finished")

    def kill_at(child, aim, step, start_seconds, rng):
        asked.append((aim, step))
        assert isinstance(child, Fake) and start_seconds > 0
        return None if len(asked) == through_at else Kill(aim, step, 0, "training")

    monkeypatch.setattr(kill_and_resume, "TrainingProcess", Fake)
    monkeypatch.setattr(kill_and_resume, "kill_at", kill_at)
    monkeypatch.setattr(kill_and_resume, "checkpoint_steps", {tmp_path / "whole": [5, 40]}.__getitem__)
    monkeypatch.setattr(kill_and_resume, "run_differences", lambda *runs: [str(len(runs))])
    config = KillAndResume(kills=6, steps=40)
    places = tmp_path / "whole", tmp_path / "killed", tmp_path / "data", tmp_path / "compiled"
    whole, killed = ((config.training, run, *places[2:]) for run in places[:2])
    kills, found = kill_and_resume.kill_and_resume(config, *places, lambda *report: reports.append(report))
    assert made == [whole, "finished", *[killed] * 7, "finished"] and found == ["2"]
    assert [aim for aim, _ in asked] == ["write", "start", "step", "write", "step", "write"]
    steps = [step for _, step in asked]
    assert steps == sorted(set(steps)) and steps[0] >= 1 and steps[-1] < 30
    assert kills == [Kill(aim, step, 0, "training") for aim, step in asked]
    assert reports == [("uninterrupted", 0, 1), ("uninterrupted", 1, 1), *(("kills", n, 6) for n in range(7))]
    asked.clear()
    through_at = 3
    kills, found = kill_and_resume.kill_and_resume(config, *places, lambda *_: None)
    assert len(kills) == 2 and found == ["the run was finished after 2 kills"]


@pytest.mark.parametrize(("status", "is_running"), [(None, True), (0, False)])
def test_a_child_runs_until_it_has_a_status(status, is_running):
    child = kill_and_resume.TrainingProcess.__new__(kill_and_resume.TrainingProcess)
    child.process = SimpleNamespace(exitcode=status)
    assert child.is_running() is is_running
    child.process.join = lambda: setattr(child.process, "exitcode", 3)
    with pytest.raises(ChildProcessError, match="training ended with status 3"):
        child.finish()


@pytest.mark.parametrize(("kills", "steps"), [(15, 20), (16, 20)])
def test_more_kills_than_a_run_has_room_for_are_refused(kills, steps):
    assert KillAndResume(kills=14, steps=20).training.optimizer.horizon_tokens == 240 * 20
    with pytest.raises(ValueError, match=f"less than three quarters of the steps, got {kills} of {steps}"):
        KillAndResume(kills=kills, steps=steps)


def test_a_run_that_was_killed_has_the_same_bits(study):
    text = (study / "README.md").read_text()
    assert text.count("\n| ") == 3 and "Killed: 1×" in text and text.rstrip().endswith("Found: the same bits.")


def test_the_study_would_notice_a_difference(study, tmp_path):
    whole, killed = study / "uninterrupted", shutil.copytree(study / "killed", tmp_path / "killed")
    assert run_differences(whole, killed) == []
    lines = (killed / "metrics.jsonl").read_text().splitlines()
    changed = json.loads(lines[7])
    changed["loss"] += 1e-6
    (killed / "metrics.jsonl").write_text("\n".join([*lines[:7], json.dumps(changed), *lines[8:], lines[-1]]) + "\n")
    shutil.rmtree(max((killed / "checkpoints").iterdir(), key=lambda path: int(path.name)))
    found = " ".join(run_differences(whole, killed))
    assert "parameters/embedding" in found and "optimizer" in found and "step 8: loss" in found
    assert "20 lines, 21 after kills" in found


def test_there_are_no_recorded_trials_to_show(tmp_path, monkeypatch):
    monkeypatch.setattr(kill_and_resume, "kill_and_resume", lambda *_: pytest.fail("it began"))
    trials = MadeUp(tmp_path, None)
    trials.adds = False
    with pytest.raises(ValueError, match=r"this study records no trials; its report is .*README\.md"):
        kill_and_resume.study(KillAndResume(), trials)
