"""Which masks train best: independent ones, complementary pairs, masks by counts, or pairs by counts?

Every way to mask is trained with the ELBO's and with flat weights, on the same number of forward rows, so that pairs
see half as many distinct examples. Trainings of the same weights are compared with independent masks at random times.
The measure is the held-out any-order bound, the mean over tasks; judged samples are reported beside it.

Rule of the verdict, for each way to mask and each weights: it lowers the bound of independent masks, by paired
differences relative to them, with δ = `smallest_effect` (`claims.py`). The default of `trimask train` is the way with
the lowest mean bound under the ELBO's weights if its advantage over independent masks is shown, else independent masks.

What differs between the ways beside the noise of the gradient: independent masks leave an example of n targets without
any loss with a probability of about 1/(n + 1), and counts do not. Under the ELBO's weights the mean of the loss is the
same, but where both sides of a pair are masked: there counts mask at least one token of the other side. With flat
weights counts give an example of n targets (n + 1)/n of the weight that it has otherwise, which texts of few tokens
gain by. All ways are trained with one learning rate and one clipping norm.
"""

from dataclasses import dataclass, replace

import numpy as np

from trimask.diffusion.masking import MaskingConfig
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
    shown,
    table_of,
    table_of_effects,
    use_of_data,
)
from trimask.diffusion.studies.claims import Claim, Findings, table_of_claims
from trimask.diffusion.studies.findings import OVER_SEEDS, write_csv
from trimask.diffusion.studies.trials import Trials, require_some

MASKS = {
    "independent": (False, False),
    "complementary": (True, False),
    "counts": (False, True),
    "counts with complements": (True, True),
}
"""Name of a way to mask → `complementary` and `counts` of its `MaskingConfig`."""
_REFERENCE, _COUNTS, _BOTH = "independent", "counts", "counts with complements"


@dataclass(frozen=True, kw_only=True)
class MaskStudy(Comparison):
    """Trainings that the study of masks compares."""

    weightings: tuple[Weighting, ...] = ("elbo", "unweighted")
    """Weightings of the loss to compare."""

    def __post_init__(self):
        super().__post_init__()
        require_some(weightings=self.weightings)


def masked_by(masking: MaskingConfig, masks: str) -> MaskingConfig:
    """The configuration with another way to mask."""
    complementary, counts = MASKS[masks]
    return replace(masking, complementary=complementary, counts=counts)


def study(config: MaskStudy, trials: Trials) -> Findings:
    """Trains all arms, writes masks.csv and masks.png, and returns the report and the claims."""
    arms, references = {}, {}
    for weighting in config.weightings:
        for masks in MASKS:
            loss = replace(config.base.loss, weighting=weighting)
            masking = masked_by(config.base.masking, masks)
            arms[arm_of(weighting, masks)] = replace(config.base, loss=loss, masking=masking)
            references[arm_of(weighting, masks)] = arm_of(weighting, _REFERENCE)
    compared = compare(arms, references, config, trials, "masks")
    write_csv(trials.folder / "masks.csv", rows_of(compared))
    draw_effects(trials.folder / "masks.png", compared, references, config.smallest_effect)
    claims = [
        claim_of(compared, weighting, masks, config.smallest_effect)
        for weighting in config.weightings
        for masks in MASKS
        if masks != _REFERENCE
    ]
    beside_counts = [
        f"{weighting} {shown(compared.effect(arm_of(weighting, _BOTH), arm_of(weighting, _COUNTS), mean_bits))}"
        for weighting in config.weightings
    ]
    parts = [
        f"{guide(config, 'independent masks with the same weighting of the loss')} "
        f"{OVER_SEEDS.format(len(compared.seeds))} {compared.seeds_in_words(config.smallest_effect)}",
        table_of(compared, references),
        "Each task by itself:",
        table_of_effects(compared, references),
        use_of_data(compared, trials.prepared),
        f"Counts with complements beside counts alone, of which no claim was stated: {', '.join(beside_counts)}.",
        f"The default by the rule: {default_of(compared, config.smallest_effect)}.",
        table_of_claims(claims),
    ]
    return Findings("\n\n".join(parts), claims)


def default_of(compared: Compared, smallest: float) -> str:
    """Name of the way to mask that the rule makes the default."""

    def mean(masks):
        return float(np.mean([mean_bits(outcome) for outcome in compared.outcomes[arm_of("elbo", masks)]]))

    best = min(MASKS, key=mean)
    if best == _REFERENCE or claim_of(compared, "elbo", best, smallest).verdict != "shown":
        return _REFERENCE
    return best


def claim_of(compared: Compared, weighting: Weighting, masks: str, smallest: float) -> Claim:
    """The claim that a way to mask is better than independent masks."""
    name, reference = arm_of(weighting, masks), arm_of(weighting, _REFERENCE)
    what = {"complementary": "complementary masks"}.get(masks, f"masks by {masks}")
    claim = f"{what} lower the held-out bound ({weighting} loss)"
    return claim_on_bound(claim, compared, name, reference, smallest)
