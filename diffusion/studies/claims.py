"""Verdicts on claims: effects over paired seeds, the rule of the verdict, and how many seeds are enough.

Arms of a comparison share their seeds: the same start, and the same examples and masks as far as the arms allow. An
effect is the mean over seeds of the differences within seeds, with its 95 % interval by Student's t. It is positive if
it is as claimed, and the smallest effect that would matter, δ, is stated beforehand. The verdict is

    refuted     the interval lies below δ: if there is an effect, it is too small to matter
    shown       else, the interval lies above 0, and there are at least 5 seeds
    undecided   neither; the number of further seeds of each arm that would decide, if mean and deviation stay as they
                are, stands beside it

How many seeds are run follows from a pilot of 3 other seeds, which do not count: as many as show an effect of δ with a
probability of 80 %, within limits. Verdicts are not corrected for being many.

Comparisons of arms take their seeds from blocks of 2,000, which are divided by `SEEDS`. Block 0 is the default; the
others are kept aside: `--first-seed 2000`, in another folder, tries the claims again by seeds that chose nothing.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import numpy as np

from trimask.diffusion.evaluation.intervals import mean_and_half_width
from trimask.diffusion.studies.findings import markdown_table

SEEDS = {"comparing": range(500), "confirming": range(500, 1000), "pilot": range(1000, 1500)}
"""What a study uses seeds for, relative to the first of its block."""
BLOCK = 2000
"""Number of seeds of a block."""
LEAST_SEEDS = 5
"""Smallest number of seeds with which an effect is shown."""
_MOST_SEEDS = 10_000
"""Largest number of seeds that is counted."""
_CERTAIN = 20
"""Number of standard errors of a true effect above which it is shown for certain; SciPy then says nan."""
Decision = Literal["shown", "refuted", "undecided"]


@dataclass(frozen=True, kw_only=True)
class Claim:
    """A claim and what a study found of it; stored in verdict.json."""

    claim: str
    """The claim in words."""
    verdict: Decision
    effect: str
    """Effect with its interval, in words; says of how many seeds or other units."""
    rule: str
    """Rule of the verdict, in words."""
    more: str = ""
    """What would decide an undecided claim."""


class Findings(NamedTuple):
    """What a study with claims returns."""

    report: str
    """The report in Markdown."""
    claims: list[Claim]


def table_of_claims(claims: Sequence[Claim]) -> str:
    """Claims as a Markdown table, and that they are not corrected."""
    body = [[c.claim, f"**{c.verdict}**" + (f"; {c.more} would decide" if c.more else ""), c.effect] for c in claims]
    table = markdown_table(["claim", "verdict", "effect with 95 % interval"], body)
    return f"{table}\n\nVerdicts are not corrected for being many."


@dataclass(frozen=True)
class Effect:
    """Mean of paired differences, positive if as claimed, with its 95 % interval."""

    mean: float
    half_width: float
    differences: list[float] = field(default_factory=list)

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % interval."""
        return self.mean - self.half_width, self.mean + self.half_width

    def decide(self, smallest: float) -> Decision:
        """The verdict, of which `smallest` is the least effect that would matter."""
        return decide(self.interval, smallest, is_enough=len(self.differences) >= LEAST_SEEDS)

    @property
    def deviation(self) -> float:
        """Standard deviation of the differences."""
        return float(np.std(self.differences, ddof=1))


def paired_effect(differences: Sequence[float]) -> Effect:
    """Effect of the differences of at least two seeds."""
    mean, half = mean_and_half_width(np.asarray(differences, float))
    return Effect(float(mean), float(half), [float(d) for d in differences])


def decide(interval: tuple[float, float], smallest: float, *, is_enough: bool = True) -> Decision:
    """The verdict on a claimed effect with this interval; `smallest` is the least effect that would matter.

    `is_enough` says whether there is enough evidence to show anything.
    """
    low, high = interval
    if high < smallest:
        return "refuted"
    return "shown" if low > 0 and is_enough else "undecided"


def more_seeds(effect: Effect, smallest: float) -> int:
    """Number of further seeds that would decide, if mean and deviation of the differences stay as they are."""
    distance = max(effect.mean, smallest - effect.mean)
    seeds = next(
        (n for n in range(LEAST_SEEDS, _MOST_SEEDS) if _t(n, 0.975) * effect.deviation / n**0.5 < distance), _MOST_SEEDS
    )
    return max(0, seeds - len(effect.differences))


def in_words(seeds: int) -> str:
    """A number of seeds; larger ones than are counted are not known."""
    return f"{seeds:,}" if seeds < _MOST_SEEDS - LEAST_SEEDS else f"more than {_MOST_SEEDS:,}"


def power_of(seeds: int, deviation: float, smallest: float) -> float:
    """Probability that so many seeds show a true effect `smallest`, if differences have this deviation.

    Differences are taken as normal, so that their t follows the noncentral distribution.
    """
    from scipy.special import nctdtr  # takes a third of a second to load

    shift = smallest * seeds**0.5 / deviation if deviation else np.inf
    return float(1 - nctdtr(seeds - 1, shift, _t(seeds, 0.975))) if shift < _CERTAIN else 1.0


def seeds_for(deviation: float, smallest: float) -> int:
    """Smallest number of seeds, at least `LEAST_SEEDS`, that show an effect `smallest` with a probability of 80 %."""
    numbers = range(LEAST_SEEDS, _MOST_SEEDS)
    return next((n for n in numbers if power_of(n, deviation, smallest) >= 0.8), _MOST_SEEDS)


def _t(seeds: int, share: float) -> float:
    """Quantile of Student's t for the mean of so many seeds."""
    from scipy.special import stdtrit  # takes a third of a second to load

    return float(stdtrit(seeds - 1, share))
