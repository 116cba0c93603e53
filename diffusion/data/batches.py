"""Training batches as a pure function of the step.

A step's batch comes from one dataset (`mixture.py` says which), at that dataset's own row length: padding all datasets
to one length costs more than mixing them within a batch gains. With `mix` = update every batch has rows of all
datasets, padded to the longest, with the same number of rows of a dataset in every step. Examples are packed into rows
once, for the whole dataset. Each epoch visits all rows in a random order of its own, and each example draws its task
anew. Nothing is remembered between steps: the state of the data is one integer, the step.
"""

import math
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial
from typing import Annotated, Any, Literal

import numpy as np
from jaxtyping import Bool, Float, Int

from trimask.diffusion.data.mixture import Mixture, WeightSchedule
from trimask.diffusion.data.prepared import Prepared
from trimask.diffusion.data.splits import TRAIN
from trimask.diffusion.run.limits import WorkLimits
from trimask.tokenizers.sequence import Example, TokenRows, assemble, concatenate_rows, stack_rows
from trimask.tokenizers.storage.formats import added_field
from trimask.tokenizers.storage.ranges import Checked, NonNegative, NonNegativeInt, Positive, Share, Size, whole
from trimask.tokenizers.vocabulary import TEXT

# Streams of random numbers that one seed is split into.
_DATASET, _ORDER, _TASK = range(3)
_BYTES_PER_TOKEN = 60
"""Estimated host memory, in bytes, per position of a batch: its arrays and random numbers."""
_BYTES_PER_STEP = 60
"""Estimated host memory, in bytes, per step that `Mixture` plans."""
_MAX_STEPS = 1 << 31
"""Number of steps from which an int32 can no longer count them."""


@dataclass(frozen=True, kw_only=True)
class BatchConfig(Checked):
    """Size and composition of training batches."""

    tokens: Annotated[int, whole(1, 1 << 40)] = 4096
    """Number of positions of a batch, padding included; the batch has as many rows as fit."""
    weights: dict[str, NonNegative] = field(default_factory=dict)
    """Dataset → its share of the training tokens, relative to the other datasets. Datasets that are not named: 1."""
    final_weights: dict[str, NonNegative] = field(default_factory=dict)
    """Dataset → share of the tokens at the end of annealing. Datasets that are not named keep their `weights`."""
    anneal_tokens: tuple[NonNegativeInt, NonNegativeInt] | None = None
    """Number of training tokens at which the weights begin to move from `weights` to `final_weights`, and at which they
    reach them. None: the weights are constant."""
    task_weights: dict[str, NonNegative] = field(default_factory=dict)
    """Task → its share of the examples of a dataset, relative to the dataset's other tasks. Tasks that are not named:
    1."""
    masked_prompt_share: Share = 0.2
    """Share of the embedded sums whose question may be masked like their answer, so that the model learns to fill holes
    anywhere in the text. Prompts of prompt-response files are never masked."""
    mix: Literal["step", "update"] = added_field(as_before="step", default="step")
    """What has rows of all datasets: a sequence of steps, each of which has rows of one dataset (step), or every single
    update, whose rows are padded to the longest of all datasets (update)."""
    packed_length: Size = 24
    """Row length in tokens into which several examples of text-only datasets are packed; a dataset with a longer
    example has rows of that example's length."""
    warn_epochs: Positive = 16.0
    """Number of epochs of a dataset above which a warning is printed, as models begin to memorise it (arXiv
    2605.12715)."""

    def __post_init__(self):
        super().__post_init__()
        if bool(self.final_weights) != (self.anneal_tokens is not None):
            raise ValueError(
                "final_weights and anneal_tokens are given together or not at all, "
                f"got {self.final_weights} and {self.anneal_tokens}"
            )
        if self.anneal_tokens is not None and self.anneal_tokens[0] > self.anneal_tokens[1]:
            raise ValueError(f"anneal_tokens must be two rising numbers, got {self.anneal_tokens}")
        if self.anneal_tokens is not None and self.mix == "update":
            raise ValueError(
                "weights that change need mix = step; with update every step has the same rows of a dataset"
            )


@dataclass(frozen=True)
class DatasetUse:
    """How often training visits a dataset."""

    name: str
    examples: int
    """Number of training examples of the dataset."""
    tokens: int
    """Number of non-padding tokens of all these examples together."""
    steps: int
    """Number of steps whose batch comes from the dataset."""
    epochs: float
    """Number of passes over the dataset in these steps."""


class Batches:
    """Training batches by step: `batches(step)` is the batch of a step, whose rows come from one group of datasets.

    A group is one dataset, or all of them if every update mixes them.
    """

    def __init__(
        self,
        prepared: Prepared,
        config: BatchConfig,
        seed: int,
        copies: int = 1,
        micro_batches: int = 1,
        split: str = TRAIN,
        local_rows: Callable[[int], Bool[np.ndarray, " rows"]] | None = None,
        limits: WorkLimits | None = None,
    ):
        """Packs the examples of a split of all datasets whose weight is not 0.

        `copies` is how often each row enters the model's batch: 2 with complementary masks. The number of rows is a
        multiple of `micro_batches`, the number of micro-batches that a batch is split into. `local_rows` maps a number
        of rows to a mask of those that this process prepares; the others stay empty. None: it prepares all rows. Raises
        ValueError if the configuration names an unknown dataset or task, if a batch holds no row of a dataset, or if a
        batch does not fit the host's memory.
        """
        names = list(prepared.manifest.datasets)
        _require_known(prepared, config)
        initial = {name: config.weights.get(name, 1.0) for name in names}
        final = {name: config.final_weights.get(name, initial[name]) for name in names}
        used = [name for name in names if initial[name] > 0 or final[name] > 0]
        if not any(initial.values()) or not any(final.values()):
            raise ValueError("all datasets have weight 0")
        self.seed = seed
        self.datasets = [_Dataset(prepared, name, config, copies, split) for name in used]
        initial_weights, final_weights = (np.array([weights[name] for name in used]) for weights in (initial, final))
        if config.mix == "step":
            groups = [[number] for number in range(len(used))]
            for dataset in self.datasets:
                rows = config.tokens // dataset.row_length // copies // micro_batches * micro_batches
                if rows < 1:
                    raise ValueError(
                        f"a batch of {config.tokens} tokens holds fewer than {copies * micro_batches} rows of "
                        f"{dataset.name}, of {dataset.row_length} tokens each"
                    )
                dataset.set_rows(rows)
        else:
            groups = [list(range(len(used)))]
            _share_rows(self.datasets, initial_weights, config.tokens // copies, micro_batches)
            initial_weights = final_weights = np.ones(1)
        self.groups = [_Group(numbers, [self.datasets[number] for number in numbers]) for numbers in groups]
        self._group_of = [index for number in range(len(used)) for index, g in enumerate(groups) if number in g]
        self.limits = limits or WorkLimits()
        for group in self.groups:
            batch = f"a batch of {group.num_rows:,} rows of {group.name}, of {group.row_length:,} tokens each,"
            self.limits.require_memory(_BYTES_PER_TOKEN * group.num_rows * group.row_length, batch)
        local_rows = local_rows or partial(np.ones, dtype=bool)
        self.local_rows = [local_rows(group.num_rows) for group in self.groups]
        start, stop = map(float, config.anneal_tokens or ("inf", "inf"))
        batch_tokens = np.array([group.tokens_per_batch for group in self.groups])
        weights = WeightSchedule(initial_weights, final_weights, start, stop)
        self.mixture = Mixture(weights, batch_tokens, [seed, _DATASET])

    def __call__(self, step: int) -> TokenRows:
        """Batch of a step, as NumPy arrays [rows, row length]."""
        number, visit = self.mixture.choice(step)
        return self.groups[number].batch(visit, self.seed, self.local_rows[number])

    def num_tokens(self, step: int) -> int:
        """Number of non-padding tokens of a step, over all processes and all copies."""
        group, visit = self.mixture.choice(step)
        return sum(dataset.tokens_of(visit, seed) for dataset, seed in self.groups[group].with_seeds(self.seed))

    def describe(self, step: int) -> dict[str, Any]:
        """Composition of a step's batch: its `dataset`, or several, and the `ids` of the examples of each row."""
        number, visit = self.mixture.choice(step)
        group = self.groups[number]
        ids = [
            [dataset.examples[example]["id"] for example in dataset.rows[index]]
            for dataset, seed in group.with_seeds(self.seed)
            for index in dataset.row_numbers(visit, seed)
        ]
        return {"dataset": group.name, "ids": ids}

    def num_steps(self, tokens: int) -> int:
        """Number of steps whose expected non-padding tokens come nearest to `tokens`.

        Raises ValueError if these are 2³¹ steps or more, or if planning them does not fit the host's memory.
        """
        upper_bound = tokens / min(self.mixture.batch_tokens)
        what = f"a training of {tokens:,} tokens, with {upper_bound:,.3g} steps to plan,"
        if upper_bound >= _MAX_STEPS:
            raise ValueError(f"{what} takes more than the {_MAX_STEPS - 1:,} that are counted; use larger batches")
        self.limits.require_memory(_BYTES_PER_STEP * upper_bound, what)
        return self.mixture.num_steps(tokens)

    def steps_within(self, tokens: int) -> int:
        """Largest number of steps that have at most `tokens` non-padding tokens: an exact count, not an expectation."""
        upper_bound = 1
        while self._tokens_of_first(upper_bound) <= tokens:
            upper_bound *= 2
        return bisect_right(range(upper_bound), tokens, key=self._tokens_of_first) - 1

    def _tokens_of_first(self, steps: int) -> int:
        """Number of non-padding tokens of the first `steps` steps together."""
        visited = enumerate(zip(self.datasets, self._visits(steps).tolist(), strict=True))
        return sum(dataset.tokens_of_first(visit, (self.seed, number)) for number, (dataset, visit) in visited)

    def mean_tokens(self, steps: int) -> float:
        """Expected number of non-padding tokens per step, the mean over the first `steps` steps."""
        return float(self.mixture.visits(steps) @ self.mixture.batch_tokens / steps)

    def mean_targets(self, steps: int, joint_probability: float) -> dict[str, float]:
        """Expected number of target tokens per step by modality, the mean over the first `steps` steps.

        Targets are the tokens that may be masked with loss, over all processes and copies. `joint_probability` is that
        of masking the condition of an example, too. No batch is built.
        """
        totals = dict.fromkeys(self.datasets[0].vocabulary.modalities, 0.0)
        for dataset, visits in zip(self.datasets, self._visits(steps).tolist(), strict=True):
            for modality, targets in dataset.targets_per_batch(joint_probability).items():
                totals[modality] += visits * targets
        return {modality: total / steps for modality, total in totals.items() if total > 0}

    def examples_seen(self, steps: int) -> dict[str, Int[np.ndarray, " examples"]]:
        """Dataset → numbers of the examples that the first `steps` steps see, in order of their first use."""
        seen = {}
        for number, (dataset, visits) in enumerate(zip(self.datasets, self._visits(steps), strict=True)):
            rows = [row for visit in range(visits) for row in dataset.row_numbers(visit, (self.seed, number))]
            examples = [example for row in dict.fromkeys(rows) for example in dataset.rows[row]]
            seen[dataset.name] = np.array(examples, np.int64)
        return seen

    def _visits(self, steps: int) -> Int[np.ndarray, " datasets"]:
        """Number of steps among the first `steps` that have rows of each dataset."""
        return self.mixture.visits(steps)[self._group_of]

    def dataset_use(self, steps: int) -> list[DatasetUse]:
        """How often the first `steps` steps visit each dataset."""
        visits = self._visits(steps)
        return [
            DatasetUse(d.name, len(d.examples), int(d.lengths.sum()), int(n), n * d.num_rows / len(d.rows))
            for d, n in zip(self.datasets, visits, strict=True)
        ]


@dataclass(frozen=True)
class _Group:
    """Datasets whose rows are in the same batches, one after another."""

    numbers: list[int]
    """Numbers of the datasets."""
    datasets: list["_Dataset"]

    @property
    def name(self) -> str:
        """Names of the datasets."""
        return " and ".join(dataset.name for dataset in self.datasets)

    @property
    def num_rows(self) -> int:
        """Number of rows of a batch."""
        return sum(dataset.num_rows for dataset in self.datasets)

    @property
    def row_length(self) -> int:
        """Number of tokens of a row, padding included."""
        return max(dataset.row_length for dataset in self.datasets)

    @property
    def tokens_per_batch(self) -> float:
        """Mean number of non-padding tokens of a batch, over all copies."""
        return sum(dataset.tokens_per_batch for dataset in self.datasets)

    def with_seeds(self, seed: int) -> Iterator[tuple["_Dataset", tuple[int, int]]]:
        """Every dataset, and the seed of its batches."""
        return ((dataset, (seed, number)) for dataset, number in zip(self.datasets, self.numbers, strict=True))

    def batch(self, number: int, seed: int, is_local: Bool[np.ndarray, " rows"]) -> TokenRows:
        """Batch `number`; rows where `is_local` is False are empty."""
        ends = np.cumsum([dataset.num_rows for dataset in self.datasets])[:-1]
        parts = [
            dataset.batch(number, own, local, self.row_length)
            for (dataset, own), local in zip(self.with_seeds(seed), np.split(is_local, ends), strict=True)
        ]
        return parts[0] if len(parts) == 1 else concatenate_rows(parts)


class _Dataset:
    """Packed rows of one dataset, and its batches by number."""

    def __init__(self, prepared: Prepared, name: str, config: BatchConfig, copies: int, split: str):
        manifest = prepared.dataset(name)
        self.name, self.vocabulary, self.copies = name, prepared.tokenizers.vocabulary, copies
        self.tasks = manifest.tasks(self.vocabulary)
        weights = np.array([config.task_weights.get(task.name, 1.0) for task in self.tasks])
        if not weights.sum():
            raise ValueError(f"all tasks of {name} have weight 0")
        self.task_shares = weights / weights.sum()
        self.task_bounds = np.cumsum(self.task_shares)[:-1]
        if split not in manifest.splits:
            raise ValueError(f"{name} has no split {split}, only {', '.join(manifest.splits)}; give it the weight 0")
        self.masked_prompt_share = config.masked_prompt_share if manifest.layout.fill == "whole" else 0.0
        self.examples, self.lengths = prepared.examples(name, split), prepared.lengths(name, split)
        self.mean_given = float(prepared.num_given(name, split).mean()) if manifest.medium is None else 0.0
        special = 1 + len(manifest.layout.shapes)
        media = {m: float(math.prod(shape)) for m, shape in manifest.layout.shapes.items() if m != TEXT}
        self.mean_codes = {TEXT: float(self.lengths.mean()) - special - sum(media.values())} | media
        self.row_length = int(self.lengths.max())
        if manifest.medium is None:
            self.row_length = max(self.row_length, config.packed_length)
        self.rows = pack(self.lengths, self.row_length)
        starts = np.cumsum([0, *(len(row) for row in self.rows[:-1])])
        self.row_tokens = np.add.reduceat(self.lengths[np.concatenate(self.rows)], starts)
        self.mean_row_tokens = float(self.lengths.sum() / len(self.rows))

    def set_rows(self, num_rows: int) -> None:
        """Sets the number of rows of a batch."""
        self.num_rows = num_rows
        self.tokens_per_batch = self.copies * num_rows * self.mean_row_tokens

    def targets_per_batch(self, joint_probability: float) -> dict[str, float]:
        """Expected number of target tokens of a batch by modality, copies included."""
        targets = dict.fromkeys(self.mean_codes, 0.0)
        for task, share in zip(self.tasks, self.task_shares, strict=True):
            targets[task.target] += share * self.mean_codes[task.target]
            if task.condition is None:
                targets[task.target] -= share * (1 - self.masked_prompt_share) * self.mean_given
            else:
                targets[task.condition] += share * joint_probability * self.mean_codes[task.condition]
        examples = self.copies * self.num_rows * len(self.lengths) / len(self.rows)
        return {modality: float(examples * mean) for modality, mean in targets.items()}

    def batch(self, number: int, seed: tuple[int, int], is_local: Bool[np.ndarray, " rows"], length: int) -> TokenRows:
        """Batch `number` of an endless sequence of epochs, with rows padded to `length` tokens.

        Rows where `is_local` is False are empty. `seed` is the seed of the training and the number of the dataset.
        """
        draws = np.random.default_rng([*seed, _TASK, number]).random((self.num_rows, self.row_length, 2))
        rows = []
        for index, row_draws, is_filled in zip(self.row_numbers(number, seed), draws, is_local, strict=True):
            numbers = self.rows[index] if is_filled else []
            examples = [self._example(e, two) for e, two in zip(numbers, row_draws, strict=False)]
            rows.append(assemble(self.vocabulary, examples, length))
        return stack_rows(rows)

    def tokens_of(self, number: int, seed: tuple[int, int]) -> int:
        """Number of non-padding tokens of batch `number`, over all copies."""
        return self.copies * int(self.row_tokens[self.row_numbers(number, seed)].sum())

    def tokens_of_first(self, batches: int, seed: tuple[int, int]) -> int:
        """Number of non-padding tokens of the first `batches` batches together."""
        epochs, rest = divmod(batches * self.num_rows, len(self.rows))
        unfinished = self.row_tokens[_row_order(seed, epochs, len(self.rows))[:rest]].sum()
        return self.copies * int(epochs * self.row_tokens.sum() + unfinished)

    def row_numbers(self, number: int, seed: tuple[int, int]) -> Int[np.ndarray, " rows"]:
        """Numbers of the packed rows that batch `number` consists of."""
        epochs, offsets = np.divmod(np.arange(number * self.num_rows, (number + 1) * self.num_rows), len(self.rows))
        orders = (_row_order(seed, epoch, len(self.rows)) for epoch in range(epochs[0], epochs[-1] + 1))
        return np.concatenate([order[offsets[epochs == epoch]] for epoch, order in enumerate(orders, epochs[0])])

    def _example(self, number: int, draws: Float[np.ndarray, "2"]) -> Example:
        """Example `number` with the task of the first draw; the second decides whether its prompt may be masked."""
        task = self.tasks[int(np.searchsorted(self.task_bounds, draws[0], side="right"))]
        example = self.examples[number]
        has_prompt = task.condition is None and draws[1] >= self.masked_prompt_share
        return Example.of_task(task, example, example["num_given"] if has_prompt else 0)


def _share_rows(
    datasets: Sequence[_Dataset], weights: Float[np.ndarray, " datasets"], tokens: int, micro_batches: int
) -> None:
    """Divides the rows of a batch of `tokens` positions by the datasets' shares of the tokens, at least one row each.

    The largest remainders get the rows that rounding leaves.
    """
    longest = max(dataset.row_length for dataset in datasets)
    total = tokens // longest // micro_batches * micro_batches
    shares = weights / np.array([dataset.mean_row_tokens for dataset in datasets])
    wanted = total * shares / shares.sum()
    rows = np.maximum(np.floor(wanted), 1).astype(int)
    while rows.sum() < total:
        rows[np.argmax(wanted - rows)] += 1
    while rows.sum() > total and (rows > 1).any():
        rows[np.argmin(np.where(rows > 1, wanted - rows, np.inf))] -= 1
    if rows.sum() > total:
        raise ValueError(
            f"a batch of {tokens} positions, copies apart, holds {total} rows of {longest} tokens, and needs one of "
            f"each of {', '.join(dataset.name for dataset in datasets)}; choose larger batches, or --batch.mix step"
        )
    for dataset, number in zip(datasets, rows.tolist(), strict=True):
        dataset.set_rows(number)


def _require_known(prepared: Prepared, config: BatchConfig) -> None:
    """Raises ValueError if the configuration has weights for datasets or tasks that do not exist."""
    tasks = prepared.tokenizers.vocabulary.tasks
    unknown = (set(config.weights) | set(config.final_weights)) - set(prepared.manifest.datasets)
    unknown |= set(config.task_weights) - set(tasks)
    if unknown:
        raise ValueError(
            f"weights for unknown {', '.join(sorted(unknown))}; there are datasets "
            f"{', '.join(prepared.manifest.datasets)} and tasks {', '.join(tasks)}"
        )


@lru_cache(maxsize=16)
def _row_order(seed: tuple[int, int], epoch: int, count: int) -> Int[np.ndarray, " count"]:
    """Permutation in which an epoch visits `count` rows."""
    return np.random.default_rng([*seed, _ORDER, epoch]).permutation(count)


def pack(lengths: Int[np.ndarray, " examples"], capacity: int) -> list[list[int]]:
    """Example numbers of each row, by best-fit-decreasing bin packing; no example is divided between rows.

    Raises ValueError if an example is longer than `capacity`, the row length in tokens.
    """
    if lengths.max() > capacity:
        raise ValueError(f"an example of {lengths.max()} tokens does not fit a row of {capacity}")
    rows: list[list[int]] = []
    with_room: dict[int, list[int]] = {}
    for example in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[example])
        room = min((free for free, open_rows in with_room.items() if free >= length and open_rows), default=None)
        if room is None:
            row, room = len(rows), capacity
            rows.append([])
        else:
            row = with_room[room].pop()
        rows[row].append(example)
        with_room.setdefault(room - length, []).append(row)
    return rows
