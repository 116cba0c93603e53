"""Does the noise schedule matter, and does each modality want its own?

Every noise schedule is trained for all modalities with the ELBO's and with flat weights, on equal tokens, and compared
with the linear one of the same weights by the held-out any-order bound, which no schedule enters. Hypothesis, stated
beforehand: under the ELBO's weights all schedules optimise the same bound and differ by the noise of its gradient
alone; under flat weights they differ by which masked shares they emphasise. (Not quite: where both sides of a pair are
masked, as `masking.joint_probability` says, the other side's tokens are masked by the schedule, too, so there the
schedules do not optimise the same bound.) Samples are judged on one grid of planned
shares for all (`fixed`), and on the schedule's own (`own`).

Then each modality gets the schedule that was best for it, and the three together are trained beside the best single
schedule.

Rule of the verdict on a schedule: it lowers the bound, by paired differences relative to linear, with δ =
`smallest_effect` (`claims.py`). On schedules of modalities: together they lower the mean bound relative to the best
single schedule of the same weights, in seeds that chose neither; undecided, without trainings, if the best of every
modality is the best single one, since nothing is left to compare.

The pilot, which says how many seeds are needed, is of linear and the polynomial of power 3, the furthest from it.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from trimask.diffusion.pretraining.description import TrainConfig
from trimask.diffusion.schedule import ScheduleConfig
from trimask.diffusion.studies.arms import (
    Compared,
    Comparison,
    Weighting,
    arm_of,
    claim_on_bound,
    compare,
    draw_effects,
    guide,
    mean_bits,
    rows_of,
    table_of,
    table_of_effects,
    use_of_data,
)
from trimask.diffusion.studies.claims import Claim, Findings, table_of_claims
from trimask.diffusion.studies.findings import OVER_SEEDS, write_csv
from trimask.diffusion.studies.trials import Trials, require_some
from trimask.tokenizers.vocabulary import Vocabulary

SCHEDULES = {
    "linear": ScheduleConfig(),
    "cosine_md4": ScheduleConfig(kind="cosine_md4"),
    "cosine_mdlm": ScheduleConfig(kind="cosine_mdlm"),
    "polynomial 2": ScheduleConfig(kind="polynomial", power=2.0),
    "polynomial 3": ScheduleConfig(kind="polynomial", power=3.0),
}
"""Name → noise schedule that is compared."""
_REFERENCE = "linear"
_PILOTED = "polynomial 3"
"""Schedule of the pilot, the furthest from linear."""


@dataclass(frozen=True, kw_only=True)
class ScheduleStudy(Comparison):
    """Trainings that the study of noise schedules compares."""

    weightings: tuple[Weighting, ...] = ("elbo", "unweighted")
    """Weightings of the loss to compare."""

    def __post_init__(self):
        super().__post_init__()
        require_some(weightings=self.weightings)


def study(config: ScheduleStudy, trials: Trials) -> Findings:
    """Trains all arms, writes their tables and figures, and returns the report and the claims."""
    arms = {
        arm_of(weighting, name): _with(config.base, weighting, schedule)
        for weighting in config.weightings
        for name, schedule in SCHEDULES.items()
    }
    references = {arm_of(w, name): arm_of(w, _REFERENCE) for w in config.weightings for name in SCHEDULES}
    piloted = {arm_of(weighting, name) for weighting in config.weightings for name in (_REFERENCE, _PILOTED)}
    compared = compare(arms, references, config, trials, "schedules", piloted=piloted)
    write_csv(trials.folder / "schedules.csv", rows_of(compared))
    draw_effects(trials.folder / "schedules.png", compared, references, config.smallest_effect)
    claims = [
        claim_on_bound(
            f"{name} has a lower held-out bound than linear ({weighting} loss)",
            compared,
            arm_of(weighting, name),
            arm_of(weighting, _REFERENCE),
            config.smallest_effect,
        )
        for weighting in config.weightings
        for name in SCHEDULES
        if name != _REFERENCE
    ]
    of_modalities, further = _compare_modalities(config, compared, trials)
    claims += further
    parts = [
        f"{guide(config, 'the linear schedule with the same weighting of the loss')} "
        f"{OVER_SEEDS.format(len(compared.seeds))} {compared.seeds_in_words(config.smallest_effect)}",
        table_of(compared, references),
        "Each task by itself:",
        table_of_effects(compared, references),
        use_of_data(compared, trials.prepared),
        "## A schedule per modality",
        *of_modalities,
        "## Claims",
        table_of_claims(claims),
    ]
    return Findings("\n\n".join(parts), claims)


def _compare_modalities(config: ScheduleStudy, compared: Compared, trials: Trials) -> tuple[list[str], list[Claim]]:
    """Trains the best schedule of each modality beside the best single one; parts of the report, and the claims."""
    arms, references, chosen, claims = dict[str, TrainConfig](), dict[str, str](), [], dict[str, Claim]()
    for weighting in config.weightings:
        best = best_of_modalities(compared, weighting, trials.prepared.tokenizers.vocabulary)
        single = best_single(compared, weighting)
        names = ", ".join(f"{modality} {schedule}" for modality, schedule in best.items())
        chosen.append(f"{weighting}: {names}; the best single schedule is {single}")
        if set(best.values()) == {single}:
            claims[weighting] = Claim(
                claim=_claim_of(weighting),
                verdict="undecided",
                effect=f"not trained: {single} is the best schedule of every modality",
                rule="undecided, without trainings, if the best schedule of every modality is the best single one",
                more="seeds by which modalities have different best schedules",
            )
            continue
        alone, together = arm_of(weighting, "single"), arm_of(weighting, "own")
        arms[alone] = _with(config.base, weighting, SCHEDULES[single])
        schedules = {modality: SCHEDULES[name] for modality, name in best.items()}
        arms[together] = replace(arms[alone], masking=replace(arms[alone].masking, schedules=schedules))
        references[alone] = references[together] = alone
    report = [f"Best of each modality, by its own bound: {'. '.join(chosen)}."]
    if arms:
        confirmed = compare(arms, references, config, trials, "schedules of modalities", confirming=compared)
        write_csv(trials.folder / "modalities.csv", rows_of(confirmed))
        draw_effects(trials.folder / "modalities.png", confirmed, references, config.smallest_effect)
        for weighting in (w for w in config.weightings if w not in claims):
            own, single = arm_of(weighting, "own"), arm_of(weighting, "single")
            claims[weighting] = claim_on_bound(_claim_of(weighting), confirmed, own, single, config.smallest_effect)
        report += ["Trained from seeds that chose nothing:", table_of(confirmed, references)]
    return report, [claims[weighting] for weighting in config.weightings]


def _claim_of(weighting: Weighting) -> str:
    return f"a schedule per modality lowers the held-out bound ({weighting} loss)"


def best_of_modalities(compared: Compared, weighting: Weighting, vocabulary: Vocabulary) -> Mapping[str, str]:
    """Modality → schedule with the lowest bound of the tasks that ask for it."""
    best = {}
    for modality in vocabulary.modalities[1:]:
        means = {}
        for name in SCHEDULES:
            outcomes = compared.outcomes[arm_of(weighting, name)]
            tasks = [task for task in outcomes[0].bits if vocabulary.tasks[task].target == modality]
            if tasks:
                means[name] = float(np.mean([outcome.bits[task] for outcome in outcomes for task in tasks]))
        if means:
            best[modality] = min(means, key=means.__getitem__)
    return best


def best_single(compared: Compared, weighting: Weighting) -> str:
    """Schedule with the lowest mean bound."""
    return min(
        SCHEDULES, key=lambda name: float(np.mean(list(map(mean_bits, compared.outcomes[arm_of(weighting, name)]))))
    )


def _with(base: TrainConfig, weighting: Weighting, schedule: ScheduleConfig) -> TrainConfig:
    """The training with other weights and one noise schedule for all modalities."""
    masking = replace(base.masking, schedule=schedule, schedules={})
    return replace(base, loss=replace(base.loss, weighting=weighting), masking=masking)
