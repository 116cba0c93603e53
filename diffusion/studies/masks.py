"""Which masks train best: independent ones, complementary pairs, masks by counts, or pairs by counts?

Every way to mask is trained with the ELBO's and with flat weights, on the same number of forward rows, so that pairs
see half as many distinct examples. Trainings of the same weights are compared with independent masks at random times.
The measure is the held-out any-order bound, the mean over tasks; judged samples are reported beside it.

Rule of the verdict, for each way to mask and each weights: it lowers the bound of independent masks, by paired
differences relative to them, with δ = `smallest_effect` (`claims.py`). The default of `trimask train`
is the way with the lowest mean bound under the ELBO's weights if its advantage is shown, and independent masks if none
is.

What differs between the ways beside the noise of the gradient: independent masks leave an example of n targets without
any loss with a probability of about 1/(n + 1), and counts do not. Under the ELBO's weights the mean of the loss is the
same; with flat weights counts give such an example (n + 1)/n of the weight that it has otherwise, which texts of few
tokens gain by.
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
    mean_bits,
    rows_of,
    table_of,
    table_of_effects,
    use_of_data,
)
from trimask.diffusion.studies.claims import Claim, Findings, table_of_claims
from trimask.diffusion.studies.findings import OVER_SEEDS, write_csv
from trimask.diffusion.studies.trials import Trials

MASKS = {
    "independent": (False, False),
    "complementary": (True, False),
    "counts": (False, True),
    "counts with complements": (True, True),
}
"""Name of a way to mask → `complementary` and `counts` of its `MaskingConfig`."""
_REFERENCE = "independent"


@dataclass(frozen=True, kw_only=True)
class MaskStudy(Comparison):
    """Trainings that the study of masks compares."""

    weightings: tuple[Weighting, ...] = ("elbo", "unweighted")
    """Weights of the loss."""


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
    over = (
        f"{OVER_SEEDS.format(len(next(iter(compared.outcomes.values()))))} "
        f"{compared.seeds_in_words(config.smallest_effect)}"
    )
    parts = [
        f"Bits per token of the targets of each task, on {config.examples} validation examples, and the mean over "
        f"tasks relative to independent masks of the same weights, by paired seeds with 95 % intervals. {over}",
        table_of(compared, references),
        "Each task by itself:",
        table_of_effects(compared, references),
        use_of_data(compared, trials.prepared),
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
    return claim_on_bound(f"{masks} lower the held-out bound, weights {weighting}", compared, name, reference, smallest)
