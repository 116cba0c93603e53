"""Trials: recorded ones are not run again, programs are shared by configurations, and processes agree."""

import dataclasses
import hashlib
import json
import os
from dataclasses import asdict
from pathlib import Path

import pytest
from test_trainings import CONFIG

from trimask.diffusion.pretraining.description import RULES, TrainConfig
from trimask.diffusion.run.step_loop import LoopConfig
from trimask.diffusion.studies import trainings
from trimask.diffusion.studies import trials as studies_trials
from trimask.diffusion.studies.trainings import (
    Outcome,
    at_shape,
    outcome_of,
    with_learning_rate,
)
from trimask.diffusion.studies.trials import ModelTrial, Trials, _interleaved
from trimask.tokenizers.storage import configuration
from trimask.tokenizers.storage.formats import RENAMED


def silent(what: str, done: int, total: int) -> None:
    """A `Report` that discards progress."""


@pytest.fixture(scope="module", autouse=True)
def held_out_tokens():
    """The default number of held-out tokens per batch; tests use fewer, since evaluation takes most of a trial."""
    usual = trainings._HELD_OUT_TOKENS
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainings, "_HELD_OUT_TOKENS", 512)
        yield usual


def fake(config, data) -> Outcome:
    """Fake measure that returns the learning rate."""
    if config.seed == 13:
        raise RuntimeError("killed")
    rate = config.optimizer.learning_rate
    return Outcome(rate, rate, [[1.0, rate]], 1, 1.0, 1, 0.0)


def test_what_is_known_is_not_run_again(prepared, tmp_path):
    configs = [with_learning_rate(CONFIG, rate) for rate in (0.1, 0.2, 0.3)]
    fatal = dataclasses.replace(CONFIG, seed=13)
    reports = []
    with Trials(tmp_path, prepared.folder, 0, lambda *report: reports.append(report)) as trials:
        with pytest.raises(RuntimeError):
            trials.measurements([*configs[:2], fatal], fake, Outcome)
        path = tmp_path / "trials.jsonl"
        assert len(path.read_text().splitlines()) == 2
        path.write_text(path.read_text() + '{"key": "torn')
        reports.clear()
        found = trials.measurements(configs, fake, Outcome, "again")
        assert [one.loss for one in found] == [0.1, 0.2, 0.3]
        assert reports == [("again", 2, 3), ("again", 3, 3)]
        lines = list(map(json.loads, path.read_text().splitlines()))
        assert [line["outcome"]["loss"] for line in lines] == [0.1, 0.2, 0.3]
    with Trials(tmp_path, prepared.folder, 0, silent) as trials:
        assert trials.measurements(configs, fake, Outcome) == found
        assert trials.measurements([], fake, Outcome) == []
        compiled = Path(trials._compiled.name)
        assert compiled.is_dir()
    assert not compiled.exists()


@pytest.mark.parametrize("line", ['{"no": "key"}', '{"key": "a", "outcome": {"loss": 1.0}}'])
def test_a_line_that_is_no_outcome_is_refused_by_its_number(prepared, tmp_path, line):
    (tmp_path / "trials.jsonl").write_text(line + "\n")
    with (
        Trials(tmp_path, prepared.folder, 0, silent) as trials,
        pytest.raises(ValueError, match=r"trials.jsonl, line 1: not an outcome of this study"),
    ):
        trials.measurements([CONFIG], fake, Outcome)


def test_data_that_a_trial_cannot_be_judged_on_are_refused_before_training(prepared, tmp_path, monkeypatch):
    monkeypatch.setattr(trainings, "_HELD_OUT_TOKENS", 5)
    with (
        Trials(tmp_path, prepared.folder, 0, lambda *_: pytest.fail("a trial was begun")) as trials,
        pytest.raises(ValueError, match="holds fewer than 1 rows of drawn"),
    ):
        trials.outcomes([CONFIG])


def test_processes_are_refused_where_they_would_not_use_the_accelerator(prepared, tmp_path, monkeypatch):
    monkeypatch.setattr("jax.default_backend", lambda: "gpu")
    with pytest.raises(ValueError, match="on this gpu workers must be 0"):
        Trials(tmp_path, prepared.folder, 2, silent)
    assert Trials(tmp_path, prepared.folder, None, silent).workers == 0


def test_trials_of_the_first_rules_are_shown_and_none_is_added(prepared, tmp_path):
    """A line without rules is of rules 1, and its key is what it was before there were others."""
    with Trials(tmp_path, prepared.folder, 0, silent) as trials:
        trials.measurements([CONFIG], fake, Outcome)
        path = tmp_path / "trials.jsonl"
        line = json.loads(path.read_text())
        assert line["rules"] == RULES == 2
        said = {**line["config"], "loop": studies_trials._LOOP_IN_KEYS}
        identified = ["fake", said, trials.fingerprint]
        keys = [hashlib.sha256(json.dumps(words).encode()).hexdigest()[:16] for words in (identified, [*identified, 2])]
        assert line["key"] == keys[1]
        before = json.dumps({"key": keys[0], "outcome": line["outcome"], "config": line["config"]}) + '\n{"torn'
        path.write_text(before)
        assert trials.measurements([CONFIG], fake, Outcome)[0].loss == CONFIG.optimizer.learning_rate
        refused = rf"{tmp_path} holds a study of rules 1 .* follows rules 2; choose another folder"
        with pytest.raises(ValueError, match=refused):
            trials.measurements([CONFIG, with_learning_rate(CONFIG, 0.5)], fake, Outcome)
        assert path.read_text() == before and not trials.may_add
        path.unlink()
        assert trials.may_add and trials.measurements(
            [CONFIG], fake, Outcome
        )  # an empty folder is of the present rules


def test_a_line_whose_rules_were_changed_is_another_trial_of_a_folder_that_is_only_shown(prepared, tmp_path):
    path = tmp_path / "trials.jsonl"
    for rules in (3, 1, "2", None):
        with Trials(tmp_path, prepared.folder, 0, silent) as trials:
            path.unlink(missing_ok=True)
            trials.measurements([CONFIG], fake, Outcome)
            path.write_text(json.dumps(json.loads(path.read_text()) | {"rules": rules}))
            with pytest.raises(ValueError, match=f"holds a study of rules {rules} "):
                trials.measurements([CONFIG], fake, Outcome)


def test_a_page_without_trials_is_of_the_first_rules(tmp_path):
    assert studies_trials.rules_of(tmp_path) == RULES
    (tmp_path / "README.md").write_text("# sampling\n")
    assert studies_trials.rules_of(tmp_path) == 1


def test_recorded_trials_are_enough_or_the_study_is_incomplete(prepared, tmp_path):
    configs = [with_learning_rate(CONFIG, rate) for rate in (0.1, 0.2)]
    with Trials(tmp_path, prepared.folder, 0, silent) as trials:
        trials.measurements(configs[:1], fake, Outcome)
    with Trials(tmp_path, prepared.folder, 0, silent, adds=False) as trials:
        assert trials.measurements(configs[:1], fake, Outcome)[0].loss == 0.1 and not trials.may_add
        with pytest.raises(ValueError, match=r"holds no complete study: 1 of 2 trials are missing\. The same command"):
            trials.measurements(configs, fake, Outcome)


@dataclasses.dataclass(frozen=True, kw_only=True)
class OfASplit:
    """Fake trial that is measured on a split."""

    split: str


@dataclasses.dataclass(frozen=True)
class Seen:
    """Result of `see`."""

    split: str


def see(config, data) -> Seen:
    """Fake measure that returns the split."""
    return Seen(config.split)


def test_test_data_is_measured_without_a_record_and_never_as_a_trial(prepared, tmp_path):
    reports = []
    with Trials(tmp_path, prepared.folder, 0, lambda *report: reports.append(report)) as trials:
        for split in ("test", "test_voice"):
            with pytest.raises(ValueError, match=f"record validation only, got split '{split}'; .* by --final"):
                trials.measurements([OfASplit(split="validation"), OfASplit(split=split)], see, Seen)
        assert not (tmp_path / "trials.jsonl").exists()
        reports.clear()
        asked = [OfASplit(split=split) for split in ("test", "test_voice")]
        assert trials.unrecorded(asked, see, "scores") == [Seen("test"), Seen("test_voice")]
        assert reports == [("scores", 0, 2), ("scores", 1, 2), ("scores", 2, 2)]
    assert not (tmp_path / "trials.jsonl").exists()


def die(config, data) -> Outcome:
    """Fake measure that ends its process."""
    os._exit(9)


def test_a_process_that_dies_is_one_clear_error_and_loses_nothing(prepared, tmp_path):
    with Trials(tmp_path, prepared.folder, 0, silent) as trials:
        trials.measurements([CONFIG], fake, Outcome)
    with (
        Trials(tmp_path, prepared.folder, 1, silent) as trials,
        pytest.raises(ChildProcessError, match="the same command"),
    ):
        trials.measurements([CONFIG], die, Outcome)
    assert len((tmp_path / "trials.jsonl").read_text().splitlines()) == 1


def test_what_is_compiled_alike_does_not_come_at_once():
    wide = at_shape(CONFIG, "mup", width=32)
    configs = [
        CONFIG,
        with_learning_rate(CONFIG, 1.0),
        dataclasses.replace(CONFIG, seed=1),
        wide,
        dataclasses.replace(wide, seed=2),
    ]
    order = _interleaved({str(number): config for number, config in enumerate(configs)})
    assert order == ["0", "3", "1", "4", "2"]


def test_other_data_or_another_measurement_is_another_trial(prepared, tmp_path):
    def other(config, data) -> Outcome:
        return dataclasses.replace(fake(config, data), loss=0.5)

    with Trials(tmp_path, prepared.folder, 0, silent) as trials:
        trials.measurements([CONFIG], fake, Outcome)
        assert trials.measurements([CONFIG], other, Outcome)[0].loss == 0.5
        trials.fingerprint = "other"
        trials.measurements([CONFIG], fake, Outcome)
    assert len((tmp_path / "trials.jsonl").read_text().splitlines()) == 3


def test_a_trial_is_known_by_the_names_its_line_has_and_whatever_its_loop_was(prepared, tmp_path, monkeypatch):
    config = with_learning_rate(CONFIG, 0.25)
    with Trials(tmp_path, prepared.folder, 0, silent) as trials:
        said = configuration.to_dict(config)
        said["optimizer"]["pace"] = said["optimizer"].pop("learning_rate")
        key = trials._key("fake", said, TrainConfig, RULES)
        line = {"key": key, "rules": RULES, "outcome": asdict(fake(config, None)), "config": said}
        (tmp_path / "trials.jsonl").write_text(json.dumps(line) + "\n")
        monkeypatch.setitem(RENAMED, "OptimizerConfig.pace", "learning_rate")
        monkeypatch.setattr(trials, "run_unordered", lambda _, work: iter(work and pytest.fail("it was run again")))
        asked = dataclasses.replace(config, loop=LoopConfig(log_every=3))
        assert trials.measurements([asked], fake, Outcome)[0].loss == 0.25


def test_a_model_is_known_by_its_weights_wherever_its_folder_is(prepared, tmp_path):
    def measured(run, digest):
        trial = ModelTrial(run=run, model_step=3, model_digest=digest)
        with Trials(tmp_path, prepared.folder, 0, silent) as trials:
            trials.measurements([trial], lambda *_: dataclasses.replace(fake(CONFIG, None)), Outcome)
        return len((tmp_path / "trials.jsonl").read_text().splitlines())

    assert measured("runs/a", "one") == measured("/elsewhere/a", "one") == 1
    assert measured("runs/a", "two") == 2
    # Without a digest, as in trials of rules 1, it is its folder that tells.
    assert measured("runs/a", "") == 3 and measured("runs/b", "") == 4


def test_processes_agree_with_this_one_and_leave_its_environment_alone(
    prepared, held_out_tokens, tmp_path, monkeypatch
):
    monkeypatch.setattr(trainings, "_HELD_OUT_TOKENS", held_out_tokens)  # as in the processes
    outcome = outcome_of(CONFIG, prepared.folder)
    before = dict(os.environ)
    with Trials(tmp_path, prepared.folder, 1, silent) as trials:
        (one,) = trials.outcomes([CONFIG])
    # Sums in one thread may be taken in another order.
    assert one.loss == pytest.approx(outcome.loss, rel=1e-4)
    assert dict(os.environ) == before


def test_what_processes_say_is_known_by_its_number(prepared, tmp_path):
    with Trials(tmp_path, prepared.folder, 2, silent) as trials:
        assert dict(trials.run_unordered(divmod, [(7, 2), (9, 4), (5, 5)])) == {0: (3, 1), 1: (2, 1), 2: (1, 0)}


def test_negative_workers_are_refused(prepared, tmp_path):
    with pytest.raises(ValueError, match="workers must not be negative, got -1"):
        Trials(tmp_path, prepared.folder, -1, silent)


def test_processes_leave_no_variable_of_theirs_behind(monkeypatch):
    for name in ("JAX_PLATFORMS", "XLA_FLAGS", "JAX_COMPILATION_CACHE_DIR"):
        monkeypatch.delenv(name, raising=False)
    before = dict(os.environ)
    with studies_trials._worker_environment("folder"):
        within = {name: value for name, value in os.environ.items() if before.get(name) != value}
    assert within == {
        "XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1",
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": "folder",
    }
    assert dict(os.environ) == before
