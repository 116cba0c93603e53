"""Does a model know the rows that it was trained on better than rows of the same stream that it never saw?

A study of batches, horizons, masks or sizes compares what is learned from data, which repeated data would mix with what
is learned by heart. The study trains on a stream whose rows are seen at most once, for as long as the longest run of
such studies, and compares the held-out bound per token on rows that the run was trained on with that on as many rows of
the same stream with other numbers. Originals and voices that training never met are reported beside it.

Rule of the verdict: shown if the bound on held-out rows is at most 0.5 % above that on trained rows, and the 95 %
interval of the difference, over rows, lies within ±1 %; refuted if the interval lies above 0.5 %; else undecided.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import jax
import numpy as np
from jax.tree_util import Partial

from trimask.diffusion.data.prepared import Prepared
from trimask.diffusion.data.splits import TRAIN, VALIDATION, is_test
from trimask.diffusion.evaluation.exam import num_given
from trimask.diffusion.evaluation.held_out import evenly_spaced
from trimask.diffusion.evaluation.intervals import ratio_and_half_width
from trimask.diffusion.evaluation.likelihood import num_asked, target_bits
from trimask.diffusion.pretraining.description import TrainConfig
from trimask.diffusion.pretraining.training_batches import training_batches
from trimask.diffusion.studies.arms import passes
from trimask.diffusion.studies.claims import Claim, Decision, Findings, table_of_claims
from trimask.diffusion.studies.findings import Interval, draw_intervals, grouped, markdown_table, write_csv
from trimask.diffusion.studies.trainings import trained_until
from trimask.diffusion.studies.trials import Trials
from trimask.tokenizers.sequence import Example
from trimask.tokenizers.storage.ranges import Checked, Size

_LIMIT, _WITHIN = 0.005, 0.01
"""Largest difference, and largest end of its interval, relative to the bound on trained rows."""
SEEN = "trained on"


@dataclass(frozen=True, kw_only=True)
class FreshData(Checked):
    """Training and rows that the study of fresh data compares."""

    base: TrainConfig
    """Training that is as long as the longest run of the studies."""
    rows: Size = 40_000
    """Number of rows of both kinds, of all datasets together."""
    draws: Size = 4
    """Number of random masks per row, for the bounds."""


@dataclass(frozen=True, kw_only=True)
class FreshTrial:
    """One training, and the rows that are compared; stored in trials.jsonl."""

    train: TrainConfig
    rows: int
    draws: int


@dataclass(frozen=True)
class RowBounds:
    """Bound on the rows of one dataset and task."""

    dataset: str
    task: str
    part: str
    """`trained on`, or the split."""
    rows: int
    bits_per_token: float
    half_width: float
    """Half the width of its 95 % interval over rows."""
    tokens: float
    """Number of target tokens of all rows."""


@dataclass(frozen=True)
class Fresh:
    """Result of a `FreshTrial`; stored in trials.jsonl."""

    epochs: dict[str, float]
    """Dataset → number of passes over its training rows."""
    bounds: list[RowBounds]


def study(config: FreshData, trials: Trials) -> Findings:
    """Trains once, writes bounds.csv and bounds.png, and returns the report and the claim."""
    trial = FreshTrial(train=config.base, rows=config.rows, draws=config.draws)
    (found,) = trials.measurements([trial], known_rows, Fresh, "fresh data")
    write_csv(trials.folder / "bounds.csv", [vars(bound) for bound in found.bounds])
    panels = {
        f"{dataset}: {task}": {"": {b.part: _interval(b) for b in bounds}}
        for (dataset, task), bounds in grouped(found.bounds, lambda b: (b.dataset, b.task)).items()
    }
    draw_intervals(trials.folder / "bounds.png", panels, "bits per token", columns=2)
    claim = claim_of(found)
    body = [
        [b.dataset, b.task, b.part, f"{b.rows:,}", f"{b.bits_per_token:.4f} ± {b.half_width:.4f}"] for b in found.bounds
    ]
    parts = [
        f"{passes(found.epochs, trials.prepared)} ± is half the width of the 95 % interval over rows.",
        markdown_table(["dataset", "task", "rows", "number", "bits per token"], body),
        table_of_claims([claim]),
    ]
    return Findings("\n\n".join(parts), [claim])


def _interval(bound: RowBounds) -> Interval:
    return (
        bound.bits_per_token,
        bound.bits_per_token - bound.half_width,
        bound.bits_per_token + bound.half_width,
    )


def claim_of(found: Fresh) -> Claim:
    """The claim that held-out rows are known as well as those trained on, over all tasks together."""
    mean, error = relative_difference(found.bounds)
    low, high = mean - error, mean + error
    verdict: Decision = "undecided"
    if mean <= _LIMIT and low >= -_WITHIN and high <= _WITHIN:
        verdict = "shown"
    elif low > _LIMIT:
        verdict = "refuted"
    rows = sum(bound.rows for bound in found.bounds if bound.part == SEEN)
    return Claim(
        claim="a stream's held-out rows are known as well as those that were trained on",
        verdict=verdict,
        effect=f"bound on held-out rows {mean:+.2%} ({low:+.2%} to {high:+.2%}; {rows:,} rows of each)",
        rule=f"shown: at most {_LIMIT:.1%} more, and the 95 % interval within ±{_WITHIN:.0%}",
        more="more rows" if verdict == "undecided" else "",
    )


def relative_difference(bounds: Sequence[RowBounds]) -> tuple[float, float]:
    """Held-out bound relative to that on trained rows, less 1, and half the width of its interval.

    Tasks are weighted by the target tokens of the trained rows, so that both means are of the same mixture.
    """
    means = dict[str, tuple[float, float]]()
    weights = {(b.dataset, b.task): b.tokens for b in bounds if b.part == SEEN}
    total = sum(weights.values())
    for part in (SEEN, VALIDATION):
        of_part = [(weights[b.dataset, b.task] / total, b) for b in bounds if b.part == part]
        mean = sum(weight * b.bits_per_token for weight, b in of_part)
        means[part] = mean, sum((weight * b.half_width) ** 2 for weight, b in of_part) ** 0.5
    (seen, error), (held_out, other) = means[SEEN], means[VALIDATION]
    return held_out / seen - 1, (error**2 + other**2) ** 0.5 / seen


def known_rows(trial: FreshTrial, data: Path) -> Fresh:
    """Trains, and measures the bounds on rows that were trained on and on others.

    The name of this function is part of the keys in trials.jsonl, so it must not change.
    """
    pretraining, prepared, state = trained_until(trial.train, data, 1.0)
    batches = training_batches(prepared, trial.train)
    denoise = Partial(pretraining.denoise, state.average)
    seen = batches.examples_seen(int(state.step))
    bounds = list[RowBounds]()
    share = trial.rows // len(seen)
    for name, numbers in seen.items():
        splits = prepared.dataset(name).splits
        parts = {SEEN: (TRAIN, numbers[:share].tolist())}
        parts |= {
            split: (split, evenly_spaced(total, len(parts[SEEN][1])))
            for split, total in splits.items()
            if split == VALIDATION or is_test(split)
        }
        for part, (split, chosen) in parts.items():
            bounds += _bounds(prepared, name, part, split, chosen, denoise, trial.draws)
    use = {use.name: use.epochs for use in batches.dataset_use(int(state.step))}
    return Fresh(use, bounds)


def _bounds(
    prepared: Prepared, dataset: str, part: str, split: str, chosen: Sequence[int], denoise: Partial, draws: int
) -> list[RowBounds]:
    """Bounds on the chosen examples of a split, for every task."""
    vocabulary, records = prepared.tokenizers.vocabulary, prepared.examples(dataset, split)
    found = []
    for task in prepared.dataset(dataset).tasks(vocabulary):
        picked = [records[number] for number in chosen]
        examples = [Example.of_task(task, record, num_given(task, record)) for record in picked]
        measure = partial(target_bits, jax.random.key(0), examples, denoise, vocabulary, num_draws=draws)
        tokens = np.array([num_asked(example, vocabulary) for example in examples], float)
        value, half = ratio_and_half_width(measure(), tokens)
        found.append(RowBounds(dataset, task.name, part, len(chosen), value, half or 0.0, float(tokens.sum())))
    return found
