"""Does it matter whether every update mixes all datasets, or only the sequence of updates does?

Batches of one dataset each (`mix` = step) need no padding to a common length, but the noise of a gradient then has a
part that comes from the choice of the dataset. The golden-ratio order of datasets (`mixture.py`) cancels most of it
over a few steps. The study trains with both kinds of batches at nearly the same mean number of tokens per step, small
and large, and compares the held-out any-order bound.

Rule of the verdict: mixing every update lowers the mean bound, by paired differences, with δ = `smallest_effect`
(`claims.py`).
"""

import math
from dataclasses import dataclass, replace
from typing import Literal

from trimask.diffusion.data.batches import Batches
from trimask.diffusion.data.prepared import Prepared
from trimask.diffusion.pretraining.description import TrainConfig
from trimask.diffusion.studies.arms import (
    Comparison,
    claim_on_bound,
    compare,
    draw_effects,
    guide,
    rows_of,
    table_of,
    use_of_data,
)
from trimask.diffusion.studies.claims import Findings, table_of_claims
from trimask.diffusion.studies.findings import write_csv
from trimask.diffusion.studies.trials import Trials, require_some
from trimask.tokenizers.storage.ranges import Size

Mix = Literal["step", "update"]
_TRIES = 12
"""Most batch sizes that are tried in a row, and half of those that are tried around the best of them."""
_LARGEST_DIFFERENCE = 0.02
"""Largest relative difference of the mean numbers of tokens per step of two arms that are compared."""
_STEPS = 500
"""Number of steps over which they are taken."""


@dataclass(frozen=True, kw_only=True)
class MixingStudy(Comparison):
    """Trainings that the study of mixing compares."""

    batches: tuple[Size, ...] = (52, 736)
    """Mean numbers of non-padding tokens per step."""

    def __post_init__(self):
        super().__post_init__()
        require_some(batches=self.batches)


def study(config: MixingStudy, trials: Trials) -> Findings:
    """Trains all arms, writes mixing.csv and mixing.png, and returns the report and the claims."""
    prepared = trials.prepared
    if len(prepared.manifest.datasets) < 2:
        raise ValueError(f"{trials.data}: has a single dataset, so there is nothing to mix; prepare two or more")
    arms, references = {}, {}
    for tokens in config.batches:
        step, update = with_equal_tokens(config.base, prepared, tokens)
        for mix, train in (("step", step), ("update", update)):
            arms[_arm(mix, tokens)], references[_arm(mix, tokens)] = train, _arm("step", tokens)
    compared = compare(arms, references, config, trials, "mixing")
    write_csv(trials.folder / "mixing.csv", rows_of(compared))
    draw_effects(trials.folder / "mixing.png", compared, references, config.smallest_effect)
    claims = [
        claim_on_bound(
            f"mixing every update lowers the held-out bound, {tokens} tokens per step",
            compared,
            _arm("update", tokens),
            _arm("step", tokens),
            config.smallest_effect,
        )
        for tokens in config.batches
    ]
    sizes = ", ".join(f"{arm}: {outcomes[0].batch_tokens:.1f}" for arm, outcomes in compared.outcomes.items())
    parts = [
        f"{guide(config, 'batches of one dataset each')} Mean tokens per step: {sizes}. "
        f"{compared.seeds_in_words(config.smallest_effect)}",
        table_of(compared, references),
        use_of_data(compared, prepared),
        table_of_claims(claims),
    ]
    return Findings("\n\n".join(parts), claims)


def with_equal_tokens(base: TrainConfig, prepared: Prepared, tokens: int) -> tuple[TrainConfig, TrainConfig]:
    """The training with batches of one dataset each, and that with batches of all, of about `tokens` tokens per step.

    Raises ValueError if no sizes are alike, since batches consist of whole rows.
    """
    update, mean = _with_tokens(base, prepared, "update", float(tokens))
    step, other = _with_tokens(base, prepared, "step", mean)
    if abs(other / mean - 1) > _LARGEST_DIFFERENCE:
        raise ValueError(
            f"batches of one dataset each have {other:.1f} tokens per step where those of all have {mean:.1f}; choose "
            f"other --batches than {tokens}, where they differ by at most {_LARGEST_DIFFERENCE:.0%}"
        )
    return step, update


def _with_tokens(base: TrainConfig, prepared: Prepared, mix: Mix, tokens: float) -> tuple[TrainConfig, float]:
    """The training with the batch, in positions, whose mean tokens per step are nearest to `tokens`, and that mean.

    Found by P ← P · tokens / mean(P), and then among sizes around the best.
    """
    tried: dict[int, float] = {}

    def mean_of(positions: int) -> float:
        if positions not in tried:
            try:
                batch = replace(base.batch, tokens=positions, mix=mix)
                tried[positions] = Batches(prepared, batch, base.seed).mean_tokens(_STEPS)
            except ValueError:  # no room for a row of every dataset
                tried[positions] = math.inf
        return tried[positions]

    def best() -> int:
        return min(tried, key=lambda positions: abs(tried[positions] - tokens))

    positions = round(2 * tokens)
    while positions not in tried and len(tried) < _TRIES:
        mean = mean_of(positions)
        positions = round(positions * tokens / mean) if math.isfinite(mean) else round(positions * 1.2) + 1
    stride = max(1, round(tokens / 100))
    for positions in [best() + stride * number for number in range(-_TRIES, _TRIES + 1)]:
        mean_of(max(1, positions))
    return replace(base, batch=replace(base.batch, tokens=best(), mix=mix)), tried[best()]


def _arm(mix: str, tokens: int) -> str:
    return f"{mix}, {tokens} tokens"
