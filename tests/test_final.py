"""Scores of the test split: once per rule, with their date, and a page that says how often."""

import dataclasses
import datetime
import json

import pytest
from madeup import written

from trimask.diffusion.studies import final
from trimask.diffusion.studies.final import (
    FinalResult,
    page_of_verdict,
    score_test,
    splits_to_score,
)
from trimask.diffusion.studies.trials import Trials
from trimask.diffusion.studies.verdict import FinalScore, ScoredSetting, Verdict, load_verdict

SHARE = ScoredSetting(
    setting="blocks of 2: threshold, 0.9",
    split="test",
    measure="accuracy",
    value=0.75,
    is_share=True,
    interval=(0.625, 0.875),
    over="40 problems",
    nfe=3.25,
)
DISTANCE = dataclasses.replace(SHARE, measure="frechet", value=12.25, is_share=False, interval=None, over="1 draws")
RESULT = FinalResult("runs/small at step 7", ["blocks of 2: threshold, 0.9"], [SHARE, DISTANCE])


@pytest.fixture
def trials(prepared, tmp_path):
    with Trials(tmp_path, prepared.folder, 0, lambda *_: None) as trials:
        yield trials


def test_the_test_split_is_scored_once_per_rule_unless_it_is_asked_for_again(trials, tmp_path, monkeypatch):
    monkeypatch.setattr(final, "git_commit", lambda: "a" * 40)
    scored = []

    def score():
        scored.append(1)
        return RESULT

    score_test("the best", score, trials, again=False)
    (first,) = load_verdict(trials.folder).scores
    today = str(datetime.date.today())
    assert (first.rule, first.date, first.git_commit, first.figures) == ("the best", today, "a" * 40, [SHARE, DISTANCE])
    assert first.data_fingerprint == trials.fingerprint and first.trimask and first.chosen == RESULT.chosen
    before = (tmp_path / "verdict.json").read_bytes()
    refused = rf"the test split was scored by this rule on {today}, .* --again scores it all the same"
    with pytest.raises(ValueError, match=refused):
        score_test("the best", score, trials, again=False)
    assert (tmp_path / "verdict.json").read_bytes() == before and len(scored) == 1
    score_test("another rule", score, trials, again=False)
    score_test("the best", score, trials, again=True)
    assert [one.rule for one in load_verdict(trials.folder).scores] == ["the best", "another rule", "the best"]
    with pytest.raises(ValueError, match=f"on {today} and {today}, "):
        score_test("the best", score, trials, again=False)


def test_a_study_of_other_rules_is_not_scored(trials, tmp_path):
    (tmp_path / "README.md").write_text("# sampling\n")
    with pytest.raises(ValueError, match="holds a study of rules 1"):
        score_test("the best", lambda: pytest.fail("scored"), trials, again=True)
    assert not (tmp_path / "verdict.json").exists()


def test_a_score_that_fails_leaves_no_verdict(trials, tmp_path):
    def fail():
        raise ValueError("no complete study")

    with pytest.raises(ValueError, match="no complete study"):
        score_test("the best", fail, trials, again=False)
    assert load_verdict(trials.folder) == Verdict() and not (tmp_path / "verdict.json").exists()


def test_the_page_says_what_was_scored_when_and_how_often():
    about = {"chosen": ["one", "two"], "model": "runs/small at step 7", "data_fingerprint": "f", "trimask": "0.3.0"}
    first = FinalScore(rule="the best", date="2026-12-01", git_commit="0123456789abcdef", figures=[SHARE], **about)
    other = dataclasses.replace(first, rule="the cheapest", git_commit=None, figures=[DISTANCE])
    again = dataclasses.replace(first, date="2026-12-05")
    assert page_of_verdict(Verdict()) == ""
    once = page_of_verdict(Verdict(scores=[first]))
    assert "Scored by this rule once." in once and "again" not in once
    assert page_of_verdict(Verdict(scores=[first, other, again])) == written(
        """
        ## Test split

        Scored 3 times, by 2 rules: only the very first score is fresh evidence.

        Rule, by which settings are chosen on validation: the best

        Scored by this rule 2 times, and only the first score is fresh evidence.

        ### Scored on 2026-12-01

        runs/small at step 7; trimask 0.3.0, commit 0123456789ab. Chosen: one; two.

        | setting | split | score | 95 % interval | over | NFE |
        | --- | --- | --- | --- | --- | --- |
        | blocks of 2: threshold, 0.9 | test | accuracy 75.0% | 62.5%–87.5% | 40 problems | 3.2 |

        ### Scored again on 2026-12-05, score 2 by this rule

        runs/small at step 7; trimask 0.3.0, commit 0123456789ab. Chosen: one; two.

        | setting | split | score | 95 % interval | over | NFE |
        | --- | --- | --- | --- | --- | --- |
        | blocks of 2: threshold, 0.9 | test | accuracy 75.0% | 62.5%–87.5% | 40 problems | 3.2 |

        Rule, by which settings are chosen on validation: the cheapest

        Scored by this rule once.

        ### Scored on 2026-12-01

        runs/small at step 7; trimask 0.3.0. Chosen: one; two.

        | setting | split | score | 95 % interval | over | NFE |
        | --- | --- | --- | --- | --- | --- |
        | blocks of 2: threshold, 0.9 | test | frechet 12.2 |  | 1 draws | 3.2 |
        """
    )


def test_all_test_splits_are_scored_and_data_without_any_are_refused(prepared, monkeypatch):
    name, dataset = next(iter(prepared.manifest.datasets.items()))
    splits = [dict.fromkeys(("train", "validation", "test", "test_voice"), 3), dict.fromkeys(("train", "contest"), 3)]
    for known in splits:
        changed = dataclasses.replace(dataset, splits=known)
        monkeypatch.setattr(prepared, "dataset", {name: changed}.__getitem__)
        if "test" in known:
            assert splits_to_score(prepared, [name, name]) == ["test", "test_voice"]
        else:
            with pytest.raises(ValueError, match="no split's name begins with test, so there is nothing to score"):
                splits_to_score(prepared, [name])


def test_verdict_json_is_plain(trials, tmp_path):
    score_test("the best", lambda: RESULT, trials, again=False)
    (score,) = json.loads((tmp_path / "verdict.json").read_text())["scores"]
    assert score["rule"] == "the best" and score["date"] == str(datetime.date.today())
    assert [figure["value"] for figure in score["figures"]] == [0.75, 12.25]
    assert score["figures"][0]["interval"] == [0.625, 0.875]
