"""Training batches as a pure function of the step.

A step's batch comes from one dataset, at that dataset's own row length: padding all datasets to one length costs far
more than mixing them within a batch gains. Which dataset is a low-discrepancy draw,

    u_s = (u_0 + s·φ) mod 1,   φ = (√5 − 1)/2,

so that its share of the first n steps is within a few steps of its weight. Examples are packed into rows once, for
the whole dataset; each epoch visits all rows in an order of its own; each row draws its task. Nothing is remembered
between steps: an iterator's state is one integer.
"""

from collections.abc import Sequence as AnySequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np

from trimask.diffusion.data.prepare import TRAIN, Prepared
from trimask.tokenizers.sequence import Example, Sequence, assemble, direct, stack
from trimask.tokenizers.vocabulary import Task, Vocabulary

# Streams of random numbers that one seed is split into.
_DATASET, _ORDER, _TASK = range(3)


@dataclass(frozen=True, kw_only=True)
class BatchConfig:
    """What a step trains on."""

    tokens: int = 4096
    """Positions of a batch, padding included; rows are as many as fit."""
    weights: dict[str, float] = field(default_factory=dict)
    """Share of the steps of each dataset; 1 where none is given."""
    task_weights: dict[str, float] = field(default_factory=dict)
    """Share of a dataset's rows that each of its tasks gets; 1 where none is given."""
    packed_length: int = 24
    """Row length to which examples of text alone are packed, if they are shorter."""

    def __post_init__(self):
        for name, weight in {**self.weights, **self.task_weights}.items():
            if weight < 0:
                raise ValueError(f"the weight of {name} must not be negative, got {weight}")


class Batches:
    """`batches(step)` is the batch of a step: rows of one dataset."""

    def __init__(self, prepared: Prepared, config: BatchConfig, seed: int, copies: int = 1):
        """`copies` is how often each row enters the model's batch: 2 with complementary masks."""
        vocabulary = prepared.tokenizers.vocabulary
        unknown = set(config.weights) - set(prepared.manifest.datasets)
        unknown |= set(config.task_weights) - set(vocabulary.tasks)
        if unknown:
            raise ValueError(
                f"weights for unknown {', '.join(sorted(unknown))}; there are datasets "
                f"{', '.join(prepared.manifest.datasets)} and tasks {', '.join(vocabulary.tasks)}"
            )
        self.seed = seed
        weights = {name: config.weights.get(name, 1.0) for name in prepared.manifest.datasets}
        weights = {name: weight for name, weight in weights.items() if weight > 0}
        if not weights:
            raise ValueError("all datasets have weight 0")
        self.datasets = [_Dataset(prepared, name, config, copies) for name in weights]
        shares = np.array(list(weights.values())) / sum(weights.values())
        self._bounds = np.cumsum(shares)[:-1]
        self._offset = np.random.default_rng([seed, _DATASET]).random()
        self._choices = np.zeros(0, np.int64)

    def __call__(self, step: int) -> Sequence:
        """The batch of a step, as NumPy arrays."""
        choices = self.choices(step + 1)
        number = choices[step]
        visit = int(np.count_nonzero(choices[:step] == number))
        return self.datasets[number].batch(visit, [self.seed, int(number)])

    def describe(self, step: int) -> dict[str, Any]:
        """The dataset of a step's batch and, row by row, the ids of its examples."""
        choices = self.choices(step + 1)
        number = int(choices[step])
        dataset = self.datasets[number]
        rows = dataset._indices(int(np.count_nonzero(choices[:step] == number)), (self.seed, number))
        ids = [[dataset.examples[example]["id"] for example in dataset.rows[row]] for row in rows]
        return {"dataset": dataset.name, "ids": ids}

    def choices(self, steps: int) -> np.ndarray:
        """The dataset number of each of the first `steps` steps."""
        if len(self._choices) < steps:
            golden = (5**0.5 - 1) / 2
            draws = (self._offset + np.arange(2 * steps) * golden) % 1
            self._choices = np.searchsorted(self._bounds, draws, side="right")
        return self._choices[:steps]

    def tokens_per_step(self) -> float:
        """Mean non-padding tokens of a step."""
        shares = np.diff(np.concatenate([[0.0], self._bounds, [1.0]]))
        return float(sum(share * d.tokens_per_batch for share, d in zip(shares, self.datasets, strict=True)))


class _Dataset:
    """One dataset's rows, and its batches by number."""

    def __init__(self, prepared: Prepared, name: str, config: BatchConfig, copies: int):
        manifest = prepared.dataset(name)
        self.name = name
        self.vocabulary: Vocabulary = prepared.tokenizers.vocabulary
        self.tasks: list[Task] = manifest.tasks(self.vocabulary)
        weights = np.array([config.task_weights.get(task.name, 1.0) for task in self.tasks])
        if not weights.sum():
            raise ValueError(f"all tasks of {name} have weight 0")
        self.task_bounds = np.cumsum(weights / weights.sum())[:-1]
        self.examples = prepared.examples(name, TRAIN)
        length = manifest.example_length
        self.row_length = length if manifest.medium else max(length, config.packed_length)
        self.rows = pack([length] * len(self.examples), self.row_length)
        self.num_rows = config.tokens // self.row_length // copies
        if self.num_rows < 1:
            raise ValueError(f"a batch of {config.tokens} tokens holds no row of {name}, of {self.row_length} tokens")
        self.tokens_per_batch = copies * self.num_rows * length * len(self.examples) / len(self.rows)

    def batch(self, number: int, seed: list[int]) -> Sequence:
        """Batch `number` of an endless walk through the rows, epoch after epoch."""
        draws = np.random.default_rng([*seed, _TASK, number]).random((self.num_rows, self.row_length))
        rows = []
        for index, row_draws in zip(self._indices(number, tuple(seed)), draws, strict=True):
            examples = [self._example(e, draw) for e, draw in zip(self.rows[index], row_draws, strict=False)]
            rows.append(assemble(self.vocabulary, examples, self.row_length))
        return stack(rows)

    def _example(self, number: int, draw: float) -> Example:
        task = self.tasks[int(np.searchsorted(self.task_bounds, draw, side="right"))]
        example = self.examples[number]
        return direct(task, example, example["num_given"] if task.condition is None else 0)

    def _indices(self, number: int, seed: tuple[int, ...]) -> list[int]:
        """Row indices of a batch."""
        walk = range(number * self.num_rows, (number + 1) * self.num_rows)
        return [int(_order(seed, i // len(self.rows), len(self.rows))[i % len(self.rows)]) for i in walk]


@lru_cache(maxsize=16)
def _order(seed: tuple[int, ...], epoch: int, count: int) -> np.ndarray:
    """The order in which an epoch visits the rows."""
    return np.random.default_rng([*seed, _ORDER, epoch]).permutation(count)


def pack(lengths: AnySequence[int], capacity: int) -> list[list[int]]:
    """Example numbers by row: best fit decreasing, each example whole in the row it fills best."""
    if max(lengths) > capacity:
        raise ValueError(f"an example of {max(lengths)} tokens does not fit a row of {capacity}")
    rows: list[list[int]] = []
    with_room: dict[int, list[int]] = {}
    for example in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        length = lengths[example]
        room = min((free for free, open_rows in with_room.items() if free >= length and open_rows), default=None)
        if room is None:
            row, room = len(rows), capacity
            rows.append([])
        else:
            row = with_room[room].pop()
        rows[row].append(example)
        with_room.setdefault(room - length, []).append(row)
    return rows
