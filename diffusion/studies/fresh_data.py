"""Does a model know the rows that it was trained on better than rows of the same stream that it never saw?

A study of batches, horizons, masks or sizes compares what is learned from data, which repeated data would mix with what
is learned by heart. The study trains on a stream whose rows are seen at most once, for as long as the longest run of
such studies, and compares the held-out bound per token on rows that the run was trained on, evenly spread over the
training, with that on as many rows of the same stream with other numbers. Originals and voices that training never met
are reported beside it.

Rule of the verdict: shown if the bound on held-out rows is at most 0.5 % above that on trained rows, and the 95 %
interval of the difference, over rows, lies within ±1 %; refuted if the interval lies above 0.5 %; else undecided. The
bounds of a row's tasks count together. There is one training, of which the verdict is.

OUT/run holds the training, which continues from its checkpoints, and OUT/model.json says which model it ended with, so
that the report can be drawn without it.
"""

from collections.abc import Sequence
from dataclasses import astuple, dataclass, replace
from functools import lru_cache
from pathlib import Path

import jax
import numpy as np
from jaxtyping import Float

from trimask.diffusion.data.prepared import Prepared
from trimask.diffusion.data.splits import TRAIN, VALIDATION, is_test
from trimask.diffusion.evaluation.exam import num_given
from trimask.diffusion.evaluation.held_out import evenly_spaced
from trimask.diffusion.evaluation.likelihood import num_asked, target_bits
from trimask.diffusion.pretraining.description import TrainConfig
from trimask.diffusion.pretraining.train_run import train
from trimask.diffusion.pretraining.trained_model import LoadedRun, load
from trimask.diffusion.pretraining.training_batches import training_batches
from trimask.diffusion.run.folder import writing
from trimask.diffusion.run.step_loop import LoopConfig
from trimask.diffusion.studies.arms import passes
from trimask.diffusion.studies.claims import Claim, Decision, Findings, table_of_claims
from trimask.diffusion.studies.findings import Interval, draw_intervals, grouped, markdown_table, write_csv
from trimask.diffusion.studies.trials import ModelTrial, Trials, weights_digest
from trimask.tokenizers.sequence import Example
from trimask.tokenizers.storage import configuration
from trimask.tokenizers.storage.ranges import Checked, Size

_LIMIT, _WITHIN = 0.005, 0.01
"""Largest difference, and largest end of its interval, relative to the bound on trained rows."""
SEEN = "trained on"
ALL = "all tasks"
_MODEL = "model.json"
"""Name of the file in a study's folder that says which model it trained."""
_CHUNK = 2500
"""Most rows of a trial, and of a part that only stands beside the verdict."""


@dataclass(frozen=True, kw_only=True)
class FreshData(Checked):
    """Training and rows that the study of fresh data compares."""

    base: TrainConfig
    """Training that is as long as the longest run of the studies."""
    rows: Size = 40_000
    """Number of rows that were trained on, and of held-out rows, evenly divided among the datasets."""
    draws: Size = 2
    """Number of random masks per row, for the bounds."""


@dataclass(frozen=True, kw_only=True)
class TrainedModel:
    """Contents of model.json: the model that the training ended with."""

    step: int
    """Step of its checkpoint."""
    digest: str
    """Digest of its arrays."""
    epochs: dict[str, float]
    """Dataset → number of passes over its training examples."""


@dataclass(frozen=True, kw_only=True)
class RowsTrial(ModelTrial):
    """Rows whose bounds are computed; stored in trials.jsonl."""

    dataset: str
    part: str
    """`trained on`, or the split."""
    total: int
    """Number of rows of the part, evenly spread over it."""
    first: int
    """First of these rows that the trial measures."""
    rows: int
    """Number of rows that the trial measures."""
    draws: int


@dataclass(frozen=True)
class Sums:
    """Sums over rows of their bits b and their target tokens t, from which R = Σb / Σt and its interval follow."""

    rows: int
    bits: float
    tokens: float
    bits_squared: float
    bits_times_tokens: float
    tokens_squared: float

    def plus(self, other: "Sums") -> "Sums":
        """Sums over the rows of both."""
        rows, *sums = (a + b for a, b in zip(astuple(self), astuple(other), strict=True))
        return Sums(int(rows), *sums)

    def ratio_and_half_width(self) -> tuple[float, float]:
        """R, and half the width of its 95 % interval, as `intervals.py` has them."""
        ratio = self.bits / self.tokens
        squares = self.bits_squared - 2 * ratio * self.bits_times_tokens + ratio**2 * self.tokens_squared
        deviation = (max(squares, 0.0) / (self.rows - 1)) ** 0.5
        return ratio, 1.96 * self.rows**0.5 * deviation / self.tokens


@dataclass(frozen=True)
class RowSums:
    """Result of a `RowsTrial`; stored in trials.jsonl."""

    tasks: dict[str, Sums]
    """Task → sums over the rows; also of all tasks together."""


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


def study(config: FreshData, trials: Trials) -> Findings:
    """Trains once, writes bounds.csv and bounds.png, and returns the report and the claim."""
    folder, datasets = trials.folder / "run", trials.prepared.manifest.datasets
    trials.require_validation()
    if config.rows < 2 * len(datasets):
        raise ValueError(f"rows must be at least two for each of {len(datasets)} datasets, got {config.rows}")
    if trials.may_add:
        loop = LoopConfig(log_every=50, checkpoint_every=200, keep_last=1, sample_every=0)
        loaded = train(folder, trials.data, replace(config.base, loop=loop))
        digest = weights_digest(folder, loaded.step)
        model = TrainedModel(step=loaded.step, digest=digest, epochs=loaded.description.epochs)
        with writing(trials.folder):
            configuration.save(trials.folder / _MODEL, model)
    elif not (trials.folder / _MODEL).exists():
        raise ValueError(f"{trials.folder} holds no complete study: its training is missing")
    model = configuration.load(trials.folder / _MODEL, TrainedModel)
    planned = planned_trials(config, model, folder, trials.prepared)
    measured = trials.measurements(planned, measure_rows, RowSums, "rows")
    bounds = bounds_of(planned, measured)
    write_csv(trials.folder / "bounds.csv", [vars(bound) for bound in bounds])
    panels = {
        f"{dataset}: {task}": {"": {b.part: _interval(b) for b in of_task}}
        for (dataset, task), of_task in grouped(bounds, lambda b: (b.dataset, b.task)).items()
    }
    draw_intervals(trials.folder / "bounds.png", panels, "bits per token", columns=3)
    claim = claim_of(bounds)
    body = [[b.dataset, b.task, b.part, f"{b.rows:,}", f"{b.bits_per_token:.4f} ± {b.half_width:.4f}"] for b in bounds]
    parts = [
        f"{passes(model.epochs, trials.prepared)} ± is half the width of the 95 % interval over rows.",
        markdown_table(["dataset", "task", "rows", "number", "bits per token"], body),
        table_of_claims([claim]),
    ]
    return Findings("\n\n".join(parts), [claim])


def planned_trials(config: FreshData, model: TrainedModel, folder: Path, prepared: Prepared) -> list[RowsTrial]:
    """Trials of all parts: rows that were trained on, as many held-out ones, and some of every test split."""
    seen = training_batches(prepared, config.base).examples_seen(model.step)
    trials = list[RowsTrial]()
    for dataset, numbers in seen.items():
        rows = min(config.rows // len(seen), len(numbers))
        splits = prepared.dataset(dataset).splits
        sizes = {SEEN: rows, VALIDATION: min(rows, splits[VALIDATION])}
        sizes |= {split: min(_CHUNK, rows, number) for split, number in splits.items() if is_test(split)}
        trials += [
            RowsTrial(
                run=str(folder),
                model_step=model.step,
                model_digest=model.digest,
                dataset=dataset,
                part=part,
                total=total,
                first=first,
                rows=min(_CHUNK, total - first),
                draws=config.draws,
            )
            for part, total in sizes.items()
            for first in range(0, total, _CHUNK)
        ]
    return trials


def measure_rows(trial: RowsTrial, data: Path) -> RowSums:
    """Computes the bounds on the rows of a trial.

    The name of this function is part of the keys in trials.jsonl, so it must not change.
    """
    loaded, prepared, seen = _opened(trial.run, data)
    vocabulary = prepared.tokenizers.vocabulary
    split = TRAIN if trial.part == SEEN else trial.part
    among = seen[trial.dataset].tolist() if trial.part == SEEN else range(prepared.dataset(trial.dataset).splits[split])
    chosen = [among[number] for number in evenly_spaced(len(among), trial.total)]
    records = prepared.examples(trial.dataset, split)
    picked = [records[number] for number in chosen[trial.first : trial.first + trial.rows]]
    bits, tokens = {}, {}
    for task in prepared.dataset(trial.dataset).tasks(vocabulary):
        examples = [Example.of_task(task, record, num_given(task, record)) for record in picked]
        bits[task.name] = target_bits(jax.random.key(0), examples, loaded.denoise, vocabulary, num_draws=trial.draws)
        tokens[task.name] = np.array([num_asked(example, vocabulary) for example in examples], float)
    bits[ALL], tokens[ALL] = (np.sum(list(of_tasks.values()), axis=0) for of_tasks in (bits, tokens))
    return RowSums({task: sums_of(bits[task], tokens[task]) for task in bits})


@lru_cache(maxsize=1)
def _opened(run: str, data: Path) -> tuple[LoadedRun, Prepared, dict[str, np.ndarray]]:
    """The run, the data and the numbers of the examples of every dataset that were seen, kept for the next trial."""
    loaded, prepared = load(Path(run)), Prepared(data)
    return loaded, prepared, training_batches(prepared, loaded.description.train).examples_seen(loaded.step)


def sums_of(bits: Float[np.ndarray, " rows"], tokens: Float[np.ndarray, " rows"]) -> Sums:
    """Sums over rows."""
    products = (bits**2, bits * tokens, tokens**2)
    return Sums(len(bits), *(float(values.sum()) for values in (bits, tokens, *products)))


def bounds_of(planned: Sequence[RowsTrial], measured: Sequence[RowSums]) -> list[RowBounds]:
    """The bound on every part, for each task and for all together."""
    bounds = []
    pairs = list(zip(planned, measured, strict=True))
    for (dataset, part), of_part in grouped(pairs, lambda pair: (pair[0].dataset, pair[0].part)).items():
        for task in of_part[0][1].tasks:
            first, *others = (result.tasks[task] for _, result in of_part)
            for other in others:
                first = first.plus(other)
            bounds.append(RowBounds(dataset, task, part, first.rows, *first.ratio_and_half_width(), first.tokens))
    return bounds


def _interval(bound: RowBounds) -> Interval:
    value, half = bound.bits_per_token, bound.half_width
    return value, value - half, value + half


def claim_of(bounds: Sequence[RowBounds]) -> Claim:
    """The claim that held-out rows are known as well as those trained on, over all tasks together."""
    mean, error = relative_difference(bounds)
    low, high = mean - error, mean + error
    verdict: Decision = "undecided"
    if mean <= _LIMIT and low >= -_WITHIN and high <= _WITHIN:
        verdict = "shown"
    elif low > _LIMIT:
        verdict = "refuted"
    rows = sum(bound.rows for bound in bounds if (bound.part, bound.task) == (SEEN, ALL))
    return Claim(
        claim="a stream's held-out rows are known as well as those that were trained on",
        verdict=verdict,
        effect=f"bound on held-out rows {mean:+.2%} ({low:+.2%} to {high:+.2%}; {rows:,} rows of each, one training)",
        rule=f"shown: at most {_LIMIT:.1%} more, and the 95 % interval within ±{_WITHIN:.0%}; refuted: the interval is "
        f"above {_LIMIT:.1%}",
        more="more rows" if verdict == "undecided" else "",
    )


def relative_difference(bounds: Sequence[RowBounds]) -> tuple[float, float]:
    """Held-out bound relative to that on trained rows, less 1, and half the width of its interval.

    Datasets are weighted by the target tokens of the trained rows, so that both means are of the same mixture.
    """
    of_all = [bound for bound in bounds if bound.task == ALL]
    weights = {b.dataset: b.tokens for b in of_all if b.part == SEEN}
    total = sum(weights.values())

    def mean_and_error(part: str) -> tuple[float, float]:
        of_part = [(weights[b.dataset] / total, b) for b in of_all if b.part == part]
        error = sum((weight * b.half_width) ** 2 for weight, b in of_part) ** 0.5
        return sum(weight * b.bits_per_token for weight, b in of_part), error

    (seen, error), (held_out, other) = mean_and_error(SEEN), mean_and_error(VALIDATION)
    return held_out / seen - 1, (error**2 + other**2) ** 0.5 / seen
