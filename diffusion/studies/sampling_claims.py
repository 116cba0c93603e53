"""Verdicts of the study of sampling: is each modality better sampled by its own settings than by another's?

Each modality is sampled by the settings that were chosen for it, and by those that were chosen for every other. They
are compared by the Fréchet distance of media and the share of right texts, the mean over the modality's tasks. Settings
were chosen for quality and cost, so verdicts say with how many evaluations. Settings that give answers with the same
scores and evaluations in every draw, such as two numbers of steps that are larger than a text, are compared once; own
settings are not compared with such settings.

Rule for media: the Fréchet distance with own settings is smaller than that with the others', relative to it, with δ =
5 %, by paired differences over draws that chose nothing (`claims.py`). Draws that are all alike decide nothing.
Settings of text may give the same medium to every question of a caption, which anything beats: verdicts say how many
answers are distinct. A nearer medium need not be the one that was asked for: verdicts say how many are right, too.

Rule for texts: the share of right answers in the first draw is larger, by the 95 % interval over questions, as if the
answers by both settings were independent, which makes it wider: refuted if it lies below δ = 1 point, else shown if it
lies above 0.

The questions are those of validation that chose the settings, which favours a modality's own.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from trimask.diffusion.studies.claims import Claim, decide, more_seeds, paired_effect
from trimask.diffusion.studies.findings import grouped
from trimask.diffusion.studies.sampling_report import SamplingPoint, mean_over_tasks

DRAWS = 5
"""Number of draws."""
FIRST_DRAW = 1000
"""Seed of the first draw, relative to that of the study."""
_OF_DISTANCE, _OF_SHARE = 0.05, 0.01
"""δ of a Fréchet distance, relative to it, and of a share of right answers."""

Draws = Sequence[Sequence[SamplingPoint]]
"""Points of all tasks of a modality, for every draw."""


def claims_of(run: str, crosswise: Mapping[tuple[str, str], Draws]) -> list[Claim]:
    """Claims of a run; `crosswise` maps a modality, and the one whose settings it was sampled by, to its draws."""
    claims = []
    for modality in dict.fromkeys(modality for modality, _ in crosswise):
        own = crosswise[modality, modality]
        others = {other: draws for (target, other), draws in crosswise.items() if target == modality != other}
        by_results = grouped(others.items(), lambda named: _results(named[1]))
        for results, same in by_results.items():
            if results != _results(own):
                claims.append(_claim(run, modality, " or ".join(other for other, _ in same), own, same[0][1]))
    return claims


def _results(draws: Draws) -> tuple[object, ...]:
    """All that was measured of draws, without the settings that they were drawn by."""
    return tuple((point.task, point.scores, point.nfe, point.distinct) for draw in draws for point in draw)


def _claim(run: str, modality: str, others: str, own: Draws, crossed: Draws) -> Claim:
    name = f"{run}: {modality} is better sampled by its own settings than by those of {others}"
    one, two = ([mean_over_tasks(draw) for draw in draws] for draws in (own, crossed))
    costs = f"NFE {np.mean([p.nfe for p in one]):.3g}, against {np.mean([p.nfe for p in two]):.3g}"
    if one[0].scores[-1].higher_is_better:
        return _claim_on_share(name, own[0], crossed[0], costs)
    for mine, theirs in zip(_shares(one).items(), _shares(two).values(), strict=True):
        costs += f"; {mine[0]} {mine[1]:.1%}, against {theirs:.1%}"
    return _claim_on_distance(name, one, two, costs)


def _shares(draws: Sequence[SamplingPoint]) -> dict[str, float]:
    """Means over draws: of the scores that are shares, by their judge, and of the share of distinct answers."""
    judged = {
        score.judge: float(np.mean([point.scores[number].value for point in draws]))
        for number, score in enumerate(draws[0].scores)
        if score.is_share
    }
    return judged | {"distinct": float(np.mean([point.distinct for point in draws]))}


def _claim_on_distance(claim: str, own: Sequence[SamplingPoint], crossed: Sequence[SamplingPoint], costs: str) -> Claim:
    distances = [(a.scores[-1].value, b.scores[-1].value) for a, b in zip(own, crossed, strict=True)]
    effect = paired_effect([1 - a / b for a, b in distances])
    (low, high), judge = effect.interval, own[0].scores[-1].judge
    varies = effect.deviation > 0
    verdict = effect.decide(_OF_DISTANCE) if varies else "undecided"
    more = f"{more_seeds(effect, _OF_DISTANCE)} more draws" if varies else "draws that are not all alike"
    return Claim(
        claim=claim,
        verdict=verdict,
        effect=f"{judge} distance smaller by {effect.mean:+.1%} ({low:+.1%} to {high:+.1%}), {len(distances)} paired "
        f"draws; {costs}",
        rule=f"refuted: the 95 % interval is below {_OF_DISTANCE:.0%}; shown: else, it is above 0",
        more=more if verdict == "undecided" else "",
    )


def _claim_on_share(claim: str, own: Sequence[SamplingPoint], crossed: Sequence[SamplingPoint], costs: str) -> Claim:
    """The claim on shares of right answers; the errors of tasks, which are over questions, are independent."""
    one, two = (mean_over_tasks(points).scores[-1] for points in (own, crossed))
    mean, half = one.value - two.value, 1.96 * (one.error**2 + two.error**2) ** 0.5
    verdict = decide((mean - half, mean + half), _OF_SHARE)
    questions = sum(point.examples for point in own)
    return Claim(
        claim=claim,
        verdict=verdict,
        effect=f"more right {mean:+.1%} ({mean - half:+.1%} to {mean + half:+.1%}), {questions} questions; {costs}",
        rule=f"refuted: the 95 % interval is below {_OF_SHARE:.0%}; shown: else, it is above 0",
        more="more questions" if verdict == "undecided" else "",
    )
