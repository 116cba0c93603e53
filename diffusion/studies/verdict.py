"""verdict.json of a study's folder: what the study found of its claims, and all scores of the test split."""

import datetime
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from trimask.diffusion.run.folder import writing
from trimask.diffusion.studies.claims import Claim
from trimask.diffusion.studies.trials import Trials, recorded_seconds
from trimask.tokenizers.storage import configuration
from trimask.tokenizers.storage.formats import added_field

FILE = "verdict.json"
"""Name of the file in a study's folder."""


@dataclass(frozen=True, kw_only=True)
class ScoredSetting:
    """One figure of the test split."""

    setting: str
    """What was chosen and is scored: a task or a block length, a strategy and its parameter."""
    split: str
    measure: str
    """What the value is: accuracy, or the name of a judge."""
    value: float
    """A share if `is_share`, else in the measure's unit."""
    is_share: bool
    interval: tuple[float, float] | None
    """95 % interval. None: there is a single item, seed or draw."""
    over: str
    """What the interval is over, such as 300 problems or 3 seeds."""
    nfe: float
    """Mean number of function evaluations of an answer."""

    def shown(self, value: float) -> str:
        """A value of this measure as text: in per cent if it is a share."""
        return f"{value:.1%}" if self.is_share else f"{value:.3g}"


@dataclass(frozen=True, kw_only=True)
class FinalScore:
    """A score of the test split, with the rule that chose what is scored."""

    rule: str
    """The rule by which settings were chosen on the validation split, in words."""
    chosen: list[str]
    """What it chose."""
    model: str
    """Run and step of the model."""
    data_fingerprint: str
    """Fingerprint of the prepared data."""
    date: str
    """Day of the score, as YYYY-MM-DD."""
    trimask: str
    """Version of trimask."""
    git_commit: str | None
    """Commit of the git checkout that trimask ran from. None: it ran from no checkout."""
    figures: list[ScoredSetting]


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """Contents of verdict.json."""

    scores: list[FinalScore] = field(default_factory=list)
    """All scores of the test split, the earliest first."""
    claims: list[Claim] = added_field(as_before=[], default_factory=list)
    """Claims of the study, as its newest trials decide them."""
    command: str = added_field(as_before="", default="")
    """Command that made the newest trials."""
    date: str = added_field(as_before="", default="")
    """Day on which claims were decided last, as YYYY-MM-DD."""
    seconds: float | None = added_field(as_before=None, default=None)
    """Duration of all trials together. None: they do not say it."""


def load_verdict(folder: Path) -> Verdict:
    """Loads verdict.json of a study's folder; nothing in it if there is none."""
    path = folder / FILE
    return configuration.load(path, Verdict) if path.exists() else Verdict()


def record_claims(trials: Trials, claims: Sequence[Claim], command: str) -> None:
    """Writes the claims of a study whose trials are complete."""
    before = load_verdict(trials.folder)
    verdict = replace(
        before,
        claims=list(claims),
        command=command,
        date=str(datetime.date.today()),
        seconds=recorded_seconds(trials.folder),
    )
    with writing(trials.folder):
        configuration.save(trials.folder / FILE, verdict)
