"""Verdicts on learned policies, from the points of the study `unmasking`.

Policies are sampled at β = 1 (`--policy-scale`), on the same problems as the heuristics, and compared over the seeds of
their trainings, in accuracy (`claims.py`). In its own setting of blocks a policy is

    as accurate     as the best value of threshold, whatever its evaluations: shown if the 95 % interval over seeds lies
                    above −δ, refuted if it lies below −δ
    more accurate   than threshold with as many evaluations (NFE), interpolated on threshold's front of accuracy
                    against NFE at that of each seed: refuted if the interval lies below δ, else shown if it lies above
                    0; undecided if a seed's NFE is below the front's first point

with δ two points, and *shown* only with five seeds. A setting collapses without blocks if it keeps at most half of the
accuracy that it has in blocks:

    heuristics      threshold, and the most accurate of all heuristics, each at its best value: by the 95 % intervals of
                    both accuracies over problems, the ends that speak against the verdict
    a policy        its accuracy without blocks less half of that in blocks, of policies of the same seed: it does not
                    collapse if the interval over seeds lies above 0, and does if below; nothing is claimed of
                    policies that are right in blocks less often than one time in ten

The best values are those of the same problems, which favours heuristics. Intervals over seeds are for these problems.
"""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace

import numpy as np

from trimask.diffusion.evaluation.intervals import wilson_interval
from trimask.diffusion.sampling.strategies import STRATEGIES
from trimask.diffusion.studies.claims import LEAST_SEEDS, Claim, Decision, more_seeds, paired_effect
from trimask.diffusion.studies.findings import grouped
from trimask.sampling_rl.studies.unmasking_report import FrontPoint, front

DELTA = 0.02
"""δ: smallest difference of accuracies that would matter."""
_LEAST_ACCURACY = 0.1
"""Smallest accuracy of which half can be lost in a way that means something."""
_COMPARED = "threshold"


def claims_of(points: Sequence[FrontPoint], labels: Collection[str], where: str) -> list[Claim]:
    """Claims on the heuristics, and on the policies with these labels that were measured with two seeds or more.

    `where` says on what they were measured.
    """
    policies = [p for p in points if p.label in labels and p.number == 1 and p.seed is not None]
    heuristics = [p for p in points if p.label in STRATEGIES]
    claims = list[Claim]()
    for (block, label), seeds in grouped(policies, lambda p: (p.block, p.label)).items():
        thresholds = [p for p in heuristics if (p.block, p.label) == (block, _COMPARED)]
        if len(seeds) > 1 and thresholds:
            claims += _beside_thresholds(_named(block, label), seeds, thresholds)
    claims += _collapse_of_heuristics(heuristics)
    claims += _collapse_of_policies(policies)
    return [replace(claim, claim=f"{where}: {claim.claim}") for claim in claims]


def _named(block: int, label: str) -> str:
    return f"{label}, " + (f"in blocks of {block}" if block else "without blocks")


def _beside_thresholds(name: str, seeds: Sequence[FrontPoint], thresholds: Sequence[FrontPoint]) -> Iterator[Claim]:
    """Claims on one policy in one setting of blocks."""
    best = max(p.accuracy for p in thresholds)
    yield _claim(
        f"{name}: as accurate as the best threshold",
        [seed.accuracy - best for seed in seeds],
        f"shown: the 95 % interval lies above −{DELTA:.0%}; refuted: below",
        allowed=DELTA,
    )
    best_at = front([(p.nfe, p.accuracy) for p in thresholds])
    rivals = np.interp([seed.nfe for seed in seeds], *np.array(best_at).T)
    claim = _claim(
        f"{name}: more accurate than threshold with as many evaluations",
        [seed.accuracy - float(rival) for seed, rival in zip(seeds, rivals, strict=True)],
        f"refuted: the 95 % interval lies below {DELTA:.0%}; shown: else, above 0",
        smallest=DELTA,
    )
    if min(seed.nfe for seed in seeds) < best_at[0][0]:
        claim = replace(claim, verdict="undecided", more="a threshold that is as cheap")
    yield claim


def _collapse_of_heuristics(heuristics: Sequence[FrontPoint]) -> Iterator[Claim]:
    """Claims that heuristics collapse without blocks, for every block length."""
    by_block = grouped(heuristics, lambda p: p.block)
    without = by_block.get(0, [])
    for block, within in by_block.items():
        for name, these in (("threshold", {_COMPARED}), ("the most accurate heuristic", set(STRATEGIES))):
            one, other = ([p for p in points if p.label in these] for points in (without, within))
            if block and one and other:
                yield _collapse(f"{name} collapses without blocks of {block}", _best(one), _best(other))


def _best(points: Sequence[FrontPoint]) -> FrontPoint:
    return max(points, key=lambda p: p.accuracy)


def _collapse(claim: str, without: FrontPoint, within: FrontPoint) -> Claim:
    """The claim that half of an accuracy or more is lost."""
    (low, high), (least, most) = (
        wilson_interval(round(p.accuracy * p.problems), p.problems) for p in (without, within)
    )
    verdict: Decision = "undecided"
    if high <= least / 2:
        verdict = "shown"
    elif low > most / 2:
        verdict = "refuted"
    shown = [
        f"{p.accuracy:.1%} ({a:.1%} to {b:.1%}; {p.label} {p.number:g})"
        for p, a, b in ((without, low, high), (within, least, most))
    ]
    return Claim(
        claim=claim,
        verdict=verdict,
        effect=f"{shown[0]} without blocks, {shown[1]} in blocks, {without.problems} problems",
        rule="shown: at most half of the accuracy is kept, by the ends of both 95 % intervals that speak against it; "
        "refuted: more than half, likewise",
        more="more problems" if verdict == "undecided" else "",
    )


def _collapse_of_policies(policies: Sequence[FrontPoint]) -> Iterator[Claim]:
    """The claim that policies do not collapse, for every block length that policies of the same seeds were measured in.

    Policies without blocks are told from those in blocks by their labels, which say how each was trained.
    """
    by_label = grouped(policies, lambda p: (p.block, p.label))
    for (block, label), within in by_label.items():
        partner = label.replace(f"blocks of {block}", "full")
        without = {p.seed: p for p in by_label.get((0, partner), [])}
        pairs = [(without[p.seed], p) for p in within if p.seed in without]
        is_able = np.mean([p.accuracy for p in within]) >= _LEAST_ACCURACY
        if block and partner != label and len(pairs) > 1 and is_able:
            yield _claim(
                f"{partner}, does not collapse without blocks of {block}",
                [one.accuracy - other.accuracy / 2 for one, other in pairs],
                "shown: the 95 % interval of its accuracy less half of that in blocks lies above 0; refuted: below",
            )


def _claim(
    claim: str, differences: Sequence[float], rule: str, *, allowed: float = 0.0, smallest: float = 0.0
) -> Claim:
    """The claim that accuracies differ by more than −`allowed`; `smallest` is δ."""
    effect, judged = paired_effect(differences), paired_effect([d + allowed for d in differences])
    low, high = effect.interval
    verdict = judged.decide(smallest)
    more = max(more_seeds(judged, smallest), LEAST_SEEDS - len(differences))
    return Claim(
        claim=claim,
        verdict=verdict,
        effect=f"{effect.mean:+.1%} ({low:+.1%} to {high:+.1%}), {len(differences)} seeds",
        rule=rule,
        more=f"{more} more seeds" if verdict == "undecided" else "",
    )
