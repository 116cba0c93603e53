"""Verdicts of the study of sampling: is each modality better sampled by its own settings than by another's?

The settings that the study chose for a modality, by few draws, are compared with those that it chose for every other,
by draws that chose nothing. The effect is on the last score of the modality's tasks, the mean over them: by how much
the Fréchet distance of generated media is smaller, relative to that with the other settings; by how much the share of
right texts is larger.

Rule: own settings are better by at least δ, by paired differences over draws (`claims.py`), with δ 5 % of a distance,
and one point of a share. Settings that are equal are not compared.
"""

from collections.abc import Mapping, Sequence

from trimask.diffusion.studies.claims import Claim, decide, more_seeds, paired_effect
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
    return [
        _claim(run, modality, other, crosswise[modality, modality], draws)
        for (modality, other), draws in crosswise.items()
        if modality != other
    ]


def _claim(run: str, modality: str, other: str, own: Draws, crossed: Draws) -> Claim:
    pairs = [
        (mean_over_tasks(one).scores[-1], mean_over_tasks(two).scores[-1])
        for one, two in zip(own, crossed, strict=True)
    ]
    first = pairs[0][0]
    is_share = first.higher_is_better
    effect = paired_effect([a.value - b.value if is_share else 1 - a.value / b.value for a, b in pairs])
    smallest = _OF_SHARE if is_share else _OF_DISTANCE
    verdict = decide(effect, smallest)
    (low, high), what = effect.interval, "more right" if is_share else f"{first.judge} distance smaller by"
    return Claim(
        claim=f"{run}: {modality} is better sampled by its own settings than by those of {other}",
        verdict=verdict,
        effect=f"{what} {effect.mean:+.1%} ({low:+.1%} to {high:+.1%}), {len(pairs)} paired draws",
        rule=f"shown: the 95 % interval is above 0 and the mean at least {smallest:.0%}; refuted: the interval is "
        f"below {smallest:.0%}",
        more=f"{more_seeds(effect, smallest)} more draws" if verdict == "undecided" else "",
    )
