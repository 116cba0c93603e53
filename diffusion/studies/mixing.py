"""Does it matter whether every update mixes all datasets, or only the sequence of updates does?

Batches of one dataset each (`mix` = step) need no padding to a common length, but the noise of a gradient then has a
part that comes from the choice of the dataset. The golden-ratio order of datasets (`mixture.py`) cancels most of it
over a few steps. The study trains with both kinds of batches at the same mean number of tokens per step, small and
large, and compares the held-out any-order bound.

Rule of the verdict: mixing every update lowers the mean bound, by paired differences, with δ = `smallest_effect`
(`claims.py`).
"""

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
    rows_of,
    table_of,
    use_of_data,
)
from trimask.diffusion.studies.claims import Findings, table_of_claims
from trimask.diffusion.studies.findings import write_csv
from trimask.diffusion.studies.trials import Trials
from trimask.tokenizers.storage.ranges import Size

Mix = Literal["step", "update"]
_TRIES = 12
"""Most batch sizes that are tried."""


@dataclass(frozen=True, kw_only=True)
class MixingStudy(Comparison):
    """Trainings that the study of mixing compares."""

    batches: tuple[Size, ...] = (72, 736)
    """Mean numbers of non-padding tokens per step."""


def study(config: MixingStudy, trials: Trials) -> Findings:
    """Trains all arms, writes mixing.csv and mixing.png, and returns the report and the claims."""
    prepared = trials.prepared
    arms, references = {}, {}
    for tokens in config.batches:
        for mix in ("step", "update"):
            arms[_arm(mix, tokens)] = with_tokens(config.base, prepared, mix, tokens)
            references[_arm(mix, tokens)] = _arm("step", tokens)
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
        f"Mean tokens per step: {sizes}. {compared.seeds_in_words(config.smallest_effect)}",
        table_of(compared, references),
        use_of_data(compared, prepared),
        table_of_claims(claims),
    ]
    return Findings("\n\n".join(parts), claims)


def with_tokens(base: TrainConfig, prepared: Prepared, mix: Mix, tokens: int) -> TrainConfig:
    """The training with the batch, in positions, whose mean tokens per step are nearest to `tokens`.

    Found by a few steps of P ← P · tokens / mean(P), since batches consist of whole rows.
    """
    tried: dict[int, float] = {}
    positions = 2 * tokens
    while positions not in tried and len(tried) < _TRIES:
        try:
            batch = replace(base.batch, tokens=positions, mix=mix)
            tried[positions] = Batches(prepared, batch, base.seed).mean_tokens(1000)
            positions = round(positions * tokens / tried[positions])
        except ValueError:  # no room for a row of every dataset
            tried[positions] = float("inf")
            positions = round(positions * 1.2) + 1
    nearest = min(tried, key=lambda positions: abs(tried[positions] - tokens))
    return replace(base, batch=replace(base.batch, tokens=nearest, mix=mix))


def _arm(mix: str, tokens: int) -> str:
    return f"{mix}, {tokens} tokens"
