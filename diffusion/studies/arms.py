"""Compares trainings that differ in one thing, the arms, over paired seeds, by bounds and judged samples.

Every arm is trained from the same seeds. First a pilot of 3 seeds, which counts for nothing else, says how many seeds
the comparison needs (`claims.py`); it may be one of a few arms, whose differences vary as much as those of the others.
"""

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Literal

import numpy as np

from trimask.diffusion.data.prepared import Prepared
from trimask.diffusion.data.sources import uses_of_parts
from trimask.diffusion.data.splits import TRAIN
from trimask.diffusion.pretraining.description import TrainConfig
from trimask.diffusion.sampling.generation_config import GenerationConfig
from trimask.diffusion.studies.claims import (
    BLOCK,
    LEAST_SEEDS,
    SEEDS,
    Claim,
    Effect,
    in_words,
    more_seeds,
    paired_effect,
    power_of,
    seeds_for,
)
from trimask.diffusion.studies.findings import Interval, draw_intervals, markdown_table, mean_and_interval
from trimask.diffusion.studies.judged_trainings import Judged, JudgedTraining, judged_training
from trimask.diffusion.studies.trials import Trials
from trimask.tokenizers.storage.ranges import Checked, NonNegativeInt, Positive, Size, whole

Weighting = Literal["elbo", "unweighted"]
"""Weights of the loss."""
PILOT_SEEDS = 3
"""Number of seeds of the pilot."""


@dataclass(frozen=True, kw_only=True)
class Comparison(Checked):
    """What all comparisons of arms have: the training, how many seeds, and how models are judged."""

    base: TrainConfig
    """Training of which the arms vary one thing."""
    smallest_effect: Positive = 0.005
    """δ: smallest relative difference of the mean bound that would matter."""
    max_seeds: Annotated[int, whole(LEAST_SEEDS, len(SEEDS["comparing"]))] = 5
    """Most seeds of each arm, if the pilot asks for more."""
    first_seed: NonNegativeInt = 0
    """First seed of a block, relative to that of the base: 0, or a multiple of 2,000 to try claims again by seeds that
    are kept aside."""
    examples: Size = 400
    """Number of validation examples of each dataset on which bounds and judges are computed."""
    draws: Size = 8
    """Number of random masks per example, for the bounds."""
    samplings: dict[str, dict[str, GenerationConfig]] = field(default_factory=dict)
    """Name of a way to sample → settings by modality."""

    def __post_init__(self):
        super().__post_init__()
        if self.first_seed % BLOCK:
            raise ValueError(f"first_seed must be a multiple of {BLOCK:,}, got {self.first_seed}")


@dataclass(frozen=True)
class Compared:
    """Outcomes of all arms."""

    outcomes: dict[str, list[Judged]]
    """Arm → outcome of every seed; the same seeds for all arms."""
    seeds: list[int]
    """The seeds, relative to that of the base."""
    asked_seeds: int
    """Number of seeds that the pilot asks for; more than were run if `max_seeds` is smaller."""
    deviation: float
    """Largest standard deviation of the effects in the pilot."""

    def seeds_in_words(self, smallest: float) -> str:
        """How many seeds the pilot asks for, how many were run, and what they can show."""
        run, power = len(self.seeds), power_of(len(self.seeds), self.deviation, smallest)
        return (
            f"By the pilot its noisiest arm needs {in_words(self.asked_seeds)} seeds to show a true effect of "
            f"{smallest:.2%} with a probability of 80 %. {run} were run (`--max-seeds`), which show it with a "
            f"probability of {power:.0%}."
        )

    def effect(self, arm: str, reference: str, measure: Callable[[Judged], float]) -> Effect | None:
        """How much smaller the measure is in one arm than in another, relative to the latter.

        None: fewer than two seeds have trainings of both that did not diverge.
        """
        return effect_of(self.outcomes, arm, reference, measure)

    def diverged(self, *arms: str) -> int:
        """Number of trainings of these arms that diverged."""
        return sum(not _is_finite(outcome) for arm in dict.fromkeys(arms) for outcome in self.outcomes[arm])


def effect_of(
    outcomes: Mapping[str, Sequence[Judged]], arm: str, reference: str, measure: Callable[[Judged], float]
) -> Effect | None:
    """How much smaller the measure is in one arm than in another, relative to the latter, within seeds.

    None: fewer than two seeds have trainings of both that did not diverge.
    """
    pairs = zip(outcomes[arm], outcomes[reference], strict=True)
    finite = [(one, other) for one, other in pairs if _is_finite(one) and _is_finite(other)]
    return paired_effect([1 - measure(one) / measure(other) for one, other in finite]) if len(finite) > 1 else None


def _is_finite(outcome: Judged) -> bool:
    """Whether a training did not diverge."""
    return math.isfinite(mean_bits(outcome))


def arm_of(weighting: Weighting, what: str) -> str:
    """Name of the arm that has something and these weights of the loss."""
    return f"{what}, {weighting}"


def compare(
    arms: Mapping[str, TrainConfig],
    references: Mapping[str, str],
    config: Comparison,
    trials: Trials,
    what: str,
    *,
    piloted: Collection[str] | None = None,
    confirming: Compared | None = None,
) -> Compared:
    """Trains and judges all arms; `references` maps each arm to that which it is compared with, maybe itself.

    The pilot trains the arms in `piloted`, among which are their references, or all. A comparison that confirms what
    another has chosen has other seeds, and no pilot of its own.
    """

    trials.require_validation()

    def seeds_for_use(use: str, number: int) -> list[int]:
        return [config.first_seed + seed for seed in SEEDS[use][:number]]

    if confirming is None:
        few = arms if piloted is None else {name: arm for name, arm in arms.items() if name in piloted}
        pilot = _trained(few, seeds_for_use("pilot", PILOT_SEEDS), config, trials, f"{what}: pilot")
        effects = {arm: effect_of(pilot, arm, references[arm], mean_bits) for arm in few}
        if None in effects.values():
            raise ValueError(
                "trainings of the pilot diverged, so that it does not say how many seeds are needed: "
                f"{', '.join(arm for arm, effect in effects.items() if effect is None)}; choose a smaller "
                "--base.optimizer.learning-rate"
            )
        deviation = max(effect.deviation for effect in effects.values() if effect is not None)
        asked, use = seeds_for(deviation, config.smallest_effect), "comparing"
    else:
        asked, deviation, use = confirming.asked_seeds, confirming.deviation, "confirming"
    seeds = seeds_for_use(use, min(asked, config.max_seeds))
    return Compared(_trained(arms, seeds, config, trials, what), seeds, asked, deviation)


def _trained(
    arms: Mapping[str, TrainConfig], seeds: Sequence[int], config: Comparison, trials: Trials, what: str
) -> dict[str, list[Judged]]:
    """Arm → outcome of every seed."""
    planned = [
        JudgedTraining(
            train=replace(train, seed=train.seed + seed),
            samplings=config.samplings,
            examples=config.examples,
            draws=config.draws,
        )
        for seed in seeds
        for train in arms.values()
    ]
    found = trials.measurements(planned, judged_training, Judged, what)
    return {arm: found[number :: len(arms)] for number, arm in enumerate(arms)}


def mean_bits(outcome: Judged) -> float:
    """Bits per token of the tasks' targets, the mean over tasks."""
    return float(np.mean(list(outcome.bits.values())))


def bits_of(task: str) -> Callable[[Judged], float]:
    """Measure: bits per token of one task's targets."""
    return lambda outcome: outcome.bits[task]


def mean_share(sampling: str) -> Callable[[Judged], float]:
    """Measure: share of right answers sampled in one way, the mean over tasks; Fréchet distances do not count."""
    return lambda outcome: float(np.mean([v for name, v in outcome.judged[sampling].items() if "frechet" not in name]))


def mean_distance(sampling: str) -> Callable[[Judged], float]:
    """Measure: Fréchet distance of samples, the geometric mean over tasks."""
    return lambda outcome: float(
        np.exp(np.mean([np.log(v) for name, v in outcome.judged[sampling].items() if "frechet" in name]))
    )


def rows_of(compared: Compared) -> list[dict[str, object]]:
    """A row for each arm and seed: bits of each task, scores of each way to sample, and use of the data."""
    return [
        {"arm": arm, "seed": seed, "steps": outcome.steps, "batch_tokens": round(outcome.batch_tokens, 1)}
        | {f"bits {task}": bits for task, bits in outcome.bits.items()}
        | {f"{how} {score}": value for how, scores in outcome.judged.items() for score, value in scores.items()}
        | {f"epochs {dataset}": round(epochs, 3) for dataset, epochs in outcome.epochs.items()}
        for arm, outcomes in compared.outcomes.items()
        for seed, outcome in zip(compared.seeds, outcomes, strict=True)
    ]


WAYS_TO_SAMPLE = {"fixed": "linear shares of masks for all arms", "own": "those of the training's schedule"}
"""Name of a way to sample → what it plans."""


def guide(config: Comparison, reference: str) -> str:
    """A paragraph that says what the columns of `table_of` are; `reference` says with what arms are compared."""
    ways = ", ".join(f"*{name}* plans {WAYS_TO_SAMPLE[name]}" for name in config.samplings if name in WAYS_TO_SAMPLE)
    return (
        f"Bounds are in bits per token of each task's targets, on {config.examples} validation examples of each "
        f"dataset; lower is better. *Bound lower by* is 1 − b/b₀ within each seed, with b the mean over tasks and b₀ "
        f"that of {reference}; positive is better. *Right* is the share of samples that judges accept, the mean over "
        "tasks, and *Fréchet* their distance to real media, the geometric mean over tasks"
        f"{f'; {ways}' if ways else ''}."
    )


def table_of(compared: Compared, references: Mapping[str, str]) -> str:
    """Markdown table of all arms: bits of each task, the mean bound beside the reference's, and judged samples."""
    first = next(iter(compared.outcomes.values()))[0]
    judged = {name: scores for outcomes in compared.outcomes.values() for name, scores in _scores(outcomes).items()}
    samplings = list(judged)
    nears = [name for name, scores in judged.items() if any("frechet" in score for score in scores)]
    header = ["arm", *first.bits, "bound lower by"]
    header += [f"{name}: right" for name in samplings] + [f"{name}: Fréchet" for name in nears]
    body = []
    for arm, outcomes in compared.outcomes.items():
        bits = [mean_and_interval([outcome.bits[task] for outcome in outcomes]) for task in first.bits]
        is_reference = references[arm] == arm
        effect = "" if is_reference else shown(compared.effect(arm, references[arm], mean_bits))
        finite = list(filter(_is_finite, outcomes))
        shares = [_with_interval(list(map(mean_share(name), finite)), ".1%") for name in samplings]
        distances = [_with_interval(list(map(mean_distance(name), finite)), ".3g") for name in nears]
        body.append([arm, *bits, effect, *shares, *distances])
    return markdown_table(header, body)


def _scores(outcomes: Sequence[Judged]) -> dict[str, dict[str, float]]:
    """Ways to sample that have scores, with those of the first training that did not diverge."""
    first = next(filter(_is_finite, outcomes), None)
    return {} if first is None else {name: scores for name, scores in first.judged.items() if scores}


def _with_interval(values: Sequence[float], form: str) -> str:
    """Mean ± half the width of its 95 % interval over seeds; empty for fewer than two."""
    if len(values) < 2:
        return ""
    effect = paired_effect(values)
    return f"{effect.mean:{form}} ± {effect.half_width:{form}}"


def table_of_effects(compared: Compared, references: Mapping[str, str]) -> str:
    """Markdown table of all arms but the references: how much lower the bound of each task is than the reference's."""
    measures = {task: bits_of(task) for task in next(iter(compared.outcomes.values()))[0].bits}
    body = [
        [arm, *(shown(compared.effect(arm, references[arm], measure)) for measure in measures.values())]
        for arm in compared.outcomes
        if arm != references[arm]
    ]
    return markdown_table(["arm", *(f"{task}: bound lower by" for task in measures)], body)


def draw_effects(path: Path, compared: Compared, references: Mapping[str, str], smallest: float) -> None:
    """Draws how much lower the mean bound, and the bound of each task, is than that of the arm's reference."""
    measures: dict[str, Callable[[Judged], float]] = {"mean over tasks": mean_bits}
    measures |= {task: bits_of(task) for task in next(iter(compared.outcomes.values()))[0].bits}
    panels = {}
    for title, measure in measures.items():
        effects = {
            arm: compared.effect(arm, reference, measure) for arm, reference in references.items() if arm != reference
        }
        panels[title] = {"": {arm: _in_per_cent(effect) for arm, effect in effects.items() if effect is not None}}
    x = f"bound lower by (%), 95 % interval over {len(compared.seeds)} seeds"
    draw_intervals(path, panels, x, {"": 0.0}, {"δ": 100 * smallest})


def _in_per_cent(effect: Effect) -> Interval:
    low, high = effect.interval
    return 100 * effect.mean, 100 * low, 100 * high


def shown(effect: Effect | None) -> str:
    """An effect in per cent, with its interval."""
    if effect is None:
        return "diverged"
    low, high = effect.interval
    return f"{effect.mean:+.2%} ({low:+.2%} to {high:+.2%})"


def claim_on_bound(claim: str, compared: Compared, arm: str, reference: str, smallest: float) -> Claim:
    """The claim that an arm lowers the mean bound of another; less than `smallest`, relative to it, does not count."""
    effect, diverged = compared.effect(arm, reference, mean_bits), compared.diverged(arm, reference)
    least = f"of at least {LEAST_SEEDS} seeds"
    rule = f"refuted: the 95 % interval is below {smallest:.2%}; shown: else, it is above 0, {least}"
    if effect is None or diverged:
        return Claim(
            claim=claim,
            verdict="undecided",
            effect=f"{shown(effect)}; {diverged} trainings diverged",
            rule=rule,
            more="trainings that do not diverge, by a smaller learning rate,",
        )
    verdict = effect.decide(smallest)
    refutation = "; the bound is higher" if effect.interval[1] < 0 else f"; if at all, by less than {smallest:.2%}"
    return Claim(
        claim=claim,
        verdict=verdict,
        effect=f"{shown(effect)}, {len(effect.differences)} paired seeds{refutation if verdict == 'refuted' else ''}",
        rule=rule,
        more=f"about {in_words(more_seeds(effect, smallest))} more seeds" if verdict == "undecided" else "",
    )


def use_of_data(compared: Compared, prepared: Prepared) -> str:
    """Says how often arms saw the rows of every dataset, and the parts that rows have in common."""
    uses: dict[str, list[str]] = {}
    for arm, outcomes in compared.outcomes.items():
        uses.setdefault(passes(outcomes[0].epochs, prepared), []).append(arm)
    return "\n".join(f"- {'; '.join(arms)}: {seen}" for seen, arms in uses.items())


def passes(epochs: Mapping[str, float], prepared: Prepared) -> str:
    """A sentence that says how often training saw the rows of every dataset, and the parts that rows have in common."""
    seen = []
    for name, number in epochs.items():
        dataset = prepared.dataset(name)
        parts = uses_of_parts(dataset.source, number * dataset.splits[TRAIN])
        seen.append(f"{name} {number:.2f}" + (f" ({parts})" if parts else ""))
    return f"Passes over the training rows: {', '.join(seen)}."
