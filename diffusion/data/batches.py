"""Training batches as a pure function of the step.

A step's batch comes from one dataset (`mixture.py` says which), at that dataset's own row length: padding all datasets
to one length costs far more than mixing them within a batch gains. Examples are packed into rows once, for the whole
dataset; each epoch visits all rows in an order of its own; each example draws its task. Nothing is remembered between
steps: an iterator's state is one integer.
"""

from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache, partial
from typing import Annotated, Any

import numpy as np
from jaxtyping import Bool, Float, Int

from trimask.diffusion.data.mixture import Mixture, Span
from trimask.diffusion.data.prepared import Prepared
from trimask.diffusion.data.splits import TRAIN
from trimask.diffusion.run.limits import WorkLimits
from trimask.tokenizers.sequence import Example, TokenRows, assemble, make_example, stack_rows
from trimask.tokenizers.storage.ranges import Checked, NonNegative, NonNegativeInt, Positive, Share, Size, whole

# Streams of random numbers that one seed is split into.
_DATASET, _ORDER, _TASK = range(3)
_BYTES_OF_TOKEN, _BYTES_OF_STEP = 60, 60
"""Of the host's memory: random numbers and arrays of a batch, and what `Mixture` plans."""
_MOST_STEPS = 1 << 31
"""Beyond which an int32 counts no steps."""


@dataclass(frozen=True, kw_only=True)
class BatchConfig(Checked):
    """What a step trains on."""

    tokens: Annotated[int, whole(1, 1 << 40)] = 4096
    """Positions of a batch, padding included; rows are as many as fit."""
    weights: dict[str, NonNegative] = field(default_factory=dict)
    """Share of the tokens of each dataset; 1 where none is given."""
    final_weights: dict[str, NonNegative] = field(default_factory=dict)
    """Shares to which the weights move; those of `weights` where none is given."""
    anneal_tokens: tuple[NonNegativeInt, NonNegativeInt] | None = None
    """Training tokens at which the weights begin to move and at which they have arrived."""
    task_weights: dict[str, NonNegative] = field(default_factory=dict)
    """Share of a dataset's examples that each of its tasks gets; 1 where none is given."""
    open_questions: Share = 0.2
    """Share of the embedded sums that are trained as one text, question included, so that holes can be anywhere in
    them; prompts with responses are only ever given."""
    packed_length: Size = 24
    """Row length to which examples of text alone are packed, if they are shorter."""
    warn_epochs: Positive = 16.0
    """A dataset that is repeated more often is pointed out: models begin to learn it by heart (tri-modal paper)."""

    def __post_init__(self):
        super().__post_init__()
        if bool(self.final_weights) != (self.anneal_tokens is not None):
            raise ValueError(
                "final_weights and anneal_tokens are given together or not at all, "
                f"got {self.final_weights} and {self.anneal_tokens}"
            )
        if self.anneal_tokens is not None and self.anneal_tokens[0] > self.anneal_tokens[1]:
            raise ValueError(f"anneal_tokens must be two rising numbers, got {self.anneal_tokens}")


@dataclass(frozen=True)
class DatasetUse:
    """How often a dataset is seen."""

    name: str
    examples: int
    tokens: int
    """Of all its training examples."""
    steps: int
    epochs: float


class Batches:
    """`batches(step)` is the batch of a step: rows of one dataset."""

    def __init__(
        self,
        prepared: Prepared,
        config: BatchConfig,
        seed: int,
        copies: int = 1,
        parts: int = 1,
        split: str = TRAIN,
        own_rows: Callable[[int], Bool[np.ndarray, " rows"]] | None = None,
        limits: WorkLimits | None = None,
    ):
        """`copies` is how often each row enters the model's batch: 2 with complementary masks.

        Rows are a multiple of `parts`, the micro-batches that a batch is split into. Those that are not `own_rows` of
        so many are left empty, for other processes prepare them. None: all are. Raises ValueError where a batch, or the
        plan of all steps, does not fit the host's memory.
        """
        names = list(prepared.manifest.datasets)
        _require_known(prepared, config)
        first = {name: config.weights.get(name, 1.0) for name in names}
        last = {name: config.final_weights.get(name, first[name]) for name in names}
        used = [name for name in names if first[name] > 0 or last[name] > 0]
        if not any(first.values()) or not any(last.values()):
            raise ValueError("all datasets have weight 0")
        self.seed = seed
        self.datasets = [_Dataset(prepared, name, config, copies, parts, split) for name in used]
        self.limits = limits or WorkLimits()
        for dataset in self.datasets:
            batch = f"a batch of {dataset.num_rows:,} rows of {dataset.name}, of {dataset.row_length:,} tokens each,"
            self.limits.require_memory(_BYTES_OF_TOKEN * dataset.num_rows * dataset.row_length, batch)
        own_rows = own_rows or partial(np.ones, dtype=bool)
        self.own_rows = [own_rows(dataset.num_rows) for dataset in self.datasets]
        start, stop = map(float, config.anneal_tokens or ("inf", "inf"))
        weights = Span(np.array([first[n] for n in used]), np.array([last[n] for n in used]), start, stop)
        batch_tokens = np.array([dataset.tokens_per_batch for dataset in self.datasets])
        self.mixture = Mixture(weights, batch_tokens, [seed, _DATASET])

    def __call__(self, step: int) -> TokenRows:
        """The batch of a step, as NumPy arrays."""
        number, visit = self.mixture.choice(step)
        return self.datasets[number].batch(visit, (self.seed, number), self.own_rows[number])

    def num_tokens(self, step: int) -> int:
        """Non-padding tokens of a step, of all processes and in all copies."""
        number, visit = self.mixture.choice(step)
        dataset = self.datasets[number]
        return dataset.copies * int(dataset.row_tokens[dataset.row_numbers(visit, (self.seed, number))].sum())

    def describe(self, step: int) -> dict[str, Any]:
        """What the batch of a step is made of: the dataset, and the ids of each row's examples."""
        number, visit = self.mixture.choice(step)
        dataset = self.datasets[number]
        rows = [dataset.rows[index] for index in dataset.row_numbers(visit, (self.seed, number))]
        return {"dataset": dataset.name, "ids": [[dataset.examples[e]["id"] for e in row] for row in rows]}

    def num_steps(self, tokens: int) -> int:
        """Steps that come nearest to so many non-padding tokens."""
        most = tokens / min(self.mixture.batch_tokens)
        what = f"a training of {tokens:,} tokens, with {most:,.3g} steps to plan,"
        if most >= _MOST_STEPS:
            raise ValueError(f"{what} takes more than the {_MOST_STEPS - 1:,} that are counted; use larger batches")
        self.limits.require_memory(_BYTES_OF_STEP * most, what)
        return self.mixture.num_steps(tokens)

    def steps_within(self, tokens: int) -> int:
        """How many of the first steps together have at most so many non-padding tokens, counted and not expected."""
        most = 1
        while self._tokens_of(most) <= tokens:
            most *= 2
        return bisect_right(range(most), tokens, key=self._tokens_of) - 1

    def _tokens_of(self, steps: int) -> int:
        """Non-padding tokens of the first steps."""
        visits = self.mixture.visits(steps).tolist()
        visited = enumerate(zip(self.datasets, visits, strict=True))
        return sum(dataset.tokens_of(visit, (self.seed, number)) for number, (dataset, visit) in visited)

    def mean_tokens(self, steps: int) -> float:
        """Non-padding tokens of the mean of the first steps."""
        return float(self.mixture.visits(steps) @ self.mixture.batch_tokens / steps)

    def use(self, steps: int) -> list[DatasetUse]:
        """How often the first steps see each dataset."""
        visits = self.mixture.visits(steps)
        return [
            DatasetUse(d.name, len(d.examples), int(d.lengths.sum()), int(n), n * d.num_rows / len(d.rows))
            for d, n in zip(self.datasets, visits, strict=True)
        ]


class _Dataset:
    """One dataset's rows, and its batches by number."""

    def __init__(self, prepared: Prepared, name: str, config: BatchConfig, copies: int, parts: int, split: str):
        manifest = prepared.dataset(name)
        self.name, self.vocabulary, self.copies = name, prepared.tokenizers.vocabulary, copies
        self.tasks = manifest.tasks(self.vocabulary)
        weights = np.array([config.task_weights.get(task.name, 1.0) for task in self.tasks])
        if not weights.sum():
            raise ValueError(f"all tasks of {name} have weight 0")
        self.task_bounds = np.cumsum(weights / weights.sum())[:-1]
        if split not in manifest.splits:
            raise ValueError(f"{name} has no split {split}, only {', '.join(manifest.splits)}; give it the weight 0")
        self.open_questions = config.open_questions if manifest.layout.fill == "whole" else 0.0
        self.examples, self.lengths = prepared.examples(name, split), prepared.lengths(name, split)
        self.row_length = int(self.lengths.max())
        if manifest.medium is None:
            self.row_length = max(self.row_length, config.packed_length)
        self.rows = pack(self.lengths, self.row_length)
        starts = np.cumsum([0, *(len(row) for row in self.rows[:-1])])
        self.row_tokens = np.add.reduceat(self.lengths[np.concatenate(self.rows)], starts)
        self.num_rows = config.tokens // self.row_length // copies // parts * parts
        if self.num_rows < 1:
            raise ValueError(
                f"a batch of {config.tokens} tokens holds fewer than {copies * parts} rows of {name}, of "
                f"{self.row_length} tokens each"
            )
        self.tokens_per_batch = copies * self.num_rows * self.lengths.sum() / len(self.rows)

    def batch(self, number: int, seed: tuple[int, int], is_own: Bool[np.ndarray, " rows"]) -> TokenRows:
        """Batch `number` of an endless walk through the rows, epoch after epoch; empty where a row is not our own."""
        draws = np.random.default_rng([*seed, _TASK, number]).random((self.num_rows, self.row_length, 2))
        rows = []
        for index, row_draws, is_wanted in zip(self.row_numbers(number, seed), draws, is_own, strict=True):
            numbers = self.rows[index] if is_wanted else []
            examples = [self._example(e, two) for e, two in zip(numbers, row_draws, strict=False)]
            rows.append(assemble(self.vocabulary, examples, self.row_length))
        return stack_rows(rows)

    def tokens_of(self, batches: int, seed: tuple[int, int]) -> int:
        """Non-padding tokens of the first batches."""
        epochs, rest = divmod(batches * self.num_rows, len(self.rows))
        begun = self.row_tokens[_order(seed, epochs, len(self.rows))[:rest]].sum()
        return self.copies * int(epochs * self.row_tokens.sum() + begun)

    def row_numbers(self, number: int, seed: tuple[int, int]) -> Int[np.ndarray, " rows"]:
        """The rows of a batch."""
        epochs, places = np.divmod(np.arange(number * self.num_rows, (number + 1) * self.num_rows), len(self.rows))
        orders = (_order(seed, epoch, len(self.rows)) for epoch in range(epochs[0], epochs[-1] + 1))
        return np.concatenate([order[places[epochs == epoch]] for epoch, order in enumerate(orders, epochs[0])])

    def _example(self, number: int, draws: Float[np.ndarray, "2"]) -> Example:
        task = self.tasks[int(np.searchsorted(self.task_bounds, draws[0], side="right"))]
        example = self.examples[number]
        is_question = task.condition is None and draws[1] >= self.open_questions
        return make_example(task, example, example["num_given"] if is_question else 0)


def _require_known(prepared: Prepared, config: BatchConfig) -> None:
    tasks = prepared.tokenizers.vocabulary.tasks
    unknown = (set(config.weights) | set(config.final_weights)) - set(prepared.manifest.datasets)
    unknown |= set(config.task_weights) - set(tasks)
    if unknown:
        raise ValueError(
            f"weights for unknown {', '.join(sorted(unknown))}; there are datasets "
            f"{', '.join(prepared.manifest.datasets)} and tasks {', '.join(tasks)}"
        )


@lru_cache(maxsize=16)
def _order(seed: tuple[int, int], epoch: int, count: int) -> Int[np.ndarray, " count"]:
    """The order in which an epoch visits the rows."""
    return np.random.default_rng([*seed, _ORDER, epoch]).permutation(count)


def pack(lengths: Int[np.ndarray, " examples"], capacity: int) -> list[list[int]]:
    """Example numbers by row: best fit decreasing, each example whole in the row it fills best."""
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
