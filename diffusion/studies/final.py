"""Scores of the test split of a study: once per rule, kept with their date in verdict.json of the study's folder.

A study chooses on the validation split, by a rule that is fixed before the test split is seen. `--final` of `trimask
study` then scores the choice on the test split. Whoever scores it again, after a look at the first score, has no fresh
evidence any more: a second score by the same rule is refused unless it is asked for, and the page says how often the
test split was scored.
"""

import datetime
import importlib.metadata
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

from trimask.diffusion.data.prepared import Prepared
from trimask.diffusion.data.splits import is_test
from trimask.diffusion.pretraining.train_run import git_commit
from trimask.diffusion.run.folder import locked, writing
from trimask.diffusion.studies.findings import grouped, markdown_table
from trimask.diffusion.studies.trials import Trials, require_these_rules
from trimask.diffusion.studies.verdict import FILE, FinalScore, ScoredSetting, Verdict, load_verdict
from trimask.tokenizers.storage import configuration


class FinalResult(NamedTuple):
    """What a study chose on the validation split, and its figures on the test split."""

    model: str
    """Run and step of the model."""
    chosen: list[str]
    """Chosen settings, in words."""
    figures: list[ScoredSetting]


class Final(NamedTuple):
    """How a study chooses on the validation split, and scores its choice on the test split."""

    rule: Callable[..., str]
    """Takes the study's configuration, and returns the rule in words: what is chosen, from what, and how."""
    score: Callable[..., FinalResult]
    """Takes the configuration and `Trials` that hold all outcomes; measures the choice on the test split."""


def score_test(rule: str, score: Callable[[], FinalResult], trials: Trials, again: bool) -> None:
    """Scores the test split and adds the score to verdict.json.

    Raises ValueError if the study follows other rules of the objective than this code, or if the test split was scored
    by this rule before and `again` is False.
    """
    with locked(trials.folder):
        require_these_rules(trials.folder)
        verdict = load_verdict(trials.folder)
        dates = [earlier.date for earlier in verdict.scores if earlier.rule == rule]
        if dates and not again:
            raise ValueError(
                f"{trials.folder}: the test split was scored by this rule on {' and '.join(dates)}, and another score "
                "is no fresh evidence; --again scores it all the same, which the page then says"
            )
        result = score()
        added = FinalScore(
            rule=rule,
            chosen=result.chosen,
            model=result.model,
            data_fingerprint=trials.fingerprint,
            date=str(datetime.date.today()),
            trimask=importlib.metadata.version("trimask"),
            git_commit=git_commit(),
            figures=result.figures,
        )
        with writing(trials.folder):
            configuration.save(trials.folder / FILE, replace(verdict, scores=[*verdict.scores, added]))


def page_of_verdict(verdict: Verdict) -> str:
    """Section of a study's page in Markdown: every score of the test split, and how often it was scored by each rule.

    Empty if there is no score.
    """
    parts = ["## Test split"] if verdict.scores else []
    by_rule = grouped(verdict.scores, lambda score: score.rule)
    if len(by_rule) > 1:
        parts.append(
            f"Scored {len(verdict.scores)} times, by {len(by_rule)} rules: only the very first score is fresh evidence."
        )
    for rule, scores in by_rule.items():
        often = "once" if len(scores) == 1 else f"{len(scores)} times, and only the first score is fresh evidence"
        parts.append(f"Rule, by which settings are chosen on validation: {rule}\n\nScored by this rule {often}.")
        for number, score in enumerate(scores, 1):
            parts.extend(_section(score, number))
    return "\n\n".join(parts)


def _section(score: FinalScore, number: int) -> Iterator[str]:
    commit = "" if score.git_commit is None else f", commit {score.git_commit[:12]}"
    title = f"Scored on {score.date}" if number == 1 else f"Scored again on {score.date}, score {number} by this rule"
    yield f"### {title}"
    yield f"{score.model}; trimask {score.trimask}{commit}. Chosen: {'; '.join(score.chosen)}."
    cells = [
        [
            *(figure.setting, figure.split, f"{figure.measure} {figure.shown(figure.value)}"),
            "" if figure.interval is None else "–".join(map(figure.shown, figure.interval)),
            *(figure.over, f"{figure.nfe:.1f}"),
        ]
        for figure in score.figures
    ]
    yield markdown_table(["setting", "split", "score", "95 % interval", "over", "NFE"], cells)


def splits_to_score(prepared: Prepared, datasets: Iterable[str]) -> Sequence[str]:
    """Test splits of these datasets: test and test_FIELD. Raises ValueError if there is none."""
    splits = [split for name in datasets for split in prepared.dataset(name).splits if is_test(split)]
    if not splits:
        raise ValueError(f"{prepared.folder}: no split's name begins with test, so there is nothing to score")
    return list(dict.fromkeys(splits))
