"""Media segments ↔ fixed-length rows of tokens.

An example is laid out as  [task] ([begin modality] its codes)+ , condition before target. A row holds one example or
several packed ones, then padding. Every position carries its modality, its coordinates inside the segment (text:
offset, 0; image: row, column; audio: frame, codebook) and the number of its example (`segment`, from 1; 0 is padding),
even when its token is masked. Task, boundary and padding tokens have modality 0 and are never masked.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from trimask.tokenizers.vocabulary import SPECIAL_NUMBER, TEXT, TEXT_NUMBER, Task, Vocabulary


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TokenRows:
    """Rows of tokens with the description of each position; leading axes are free (usually batch)."""

    tokens: Int[Any, "*batch seq"]
    modality: Int[Any, "*batch seq"]
    """Modality number of each position (see `Vocabulary.modalities`)."""
    coordinates: Int[Any, "*batch seq 2"]
    """Coordinates inside the segment."""
    segment: Int[Any, "*batch seq"]
    """Number of the example within the row, from 1; attention stays inside an example. 0 is padding."""
    is_condition: Bool[Any, "*batch seq"]
    """True where the token is given: never predicted, never part of the loss."""

    @property
    def is_padding(self) -> Bool[Any, "*batch seq"]:
        """True after the last example of a row."""
        return self.segment == 0

    @property
    def is_target(self) -> Bool[Any, "*batch seq"]:
        """True where the model may predict the token: media and text that are not given."""
        return (self.modality != SPECIAL_NUMBER) & ~self.is_condition

    @property
    def is_text(self) -> Bool[Any, "*batch seq"]:
        """True for tokens of texts, EOS included."""
        return self.modality == TEXT_NUMBER

    @property
    def length(self) -> int:
        """Number of positions in a row."""
        return self.tokens.shape[-1]

    def replace(self, **changes) -> "TokenRows":
        """A copy with some fields replaced."""
        return dataclasses.replace(self, **changes)


@dataclass(frozen=True)
class Segment:
    """Codes of one modality in their natural shape: text [n], image [rows, columns], audio [frames, codebooks].

    Code -1 is a masked position. The first `num_given` codes, in reading order, are a condition.
    """

    modality: str
    codes: Int[np.ndarray, "..."]
    num_given: int = 0

    @property
    def is_condition(self) -> bool:
        """True if every code of the segment is given."""
        return self.num_given == self.codes.size


@dataclass(frozen=True)
class Example:
    """A task and its segments in order."""

    task: str
    segments: tuple[Segment, ...]

    @classmethod
    def of_task(cls, task: Task, codes: Mapping[str, Any], num_given: int = 0) -> "Example":
        """The example of a task built from the codes of its modalities.

        The condition is given, and so are the first `num_given` codes of the target.
        """
        given = {task.target: num_given}
        if task.condition is not None:
            given[task.condition] = codes[task.condition].size
        return cls(task.name, tuple(Segment(m, codes[m], given[m]) for m in task.modalities))

    @property
    def length(self) -> int:
        """Number of tokens of the example, with the task token and one boundary token per segment."""
        return 1 + sum(1 + segment.codes.size for segment in self.segments)


def example_starts(sequence: TokenRows) -> Int[Array, "batch seq"]:
    """Position of the first token of each position's example."""
    previous = jnp.pad(sequence.segment, ((0, 0), (1, 0)))[:, :-1]
    is_start = sequence.segment != previous
    return jax.lax.cummax(jnp.where(is_start, jnp.arange(sequence.length), 0), axis=1)


def task_tokens(sequence: TokenRows) -> Int[Array, "batch seq"]:
    """Task token of each position's example."""
    return jnp.take_along_axis(sequence.tokens, example_starts(sequence), axis=1)


def assemble(vocabulary: Vocabulary, examples: list[Example], length: int) -> TokenRows:
    """One row of `length` tokens: the examples one after another, then padding.

    Raises ValueError if the examples do not fit.
    """
    row = padding_rows(vocabulary, (), length)
    start = 0
    for number, example in enumerate(examples, 1):
        stop = start + example.length
        if stop > length:
            raise ValueError(f"examples of {sum(e.length for e in examples)} tokens do not fit a row of {length}")
        row.segment[start:stop] = number
        row.tokens[start] = vocabulary.task_id(example.task)
        start += 1
        for segment in example.segments:
            row.tokens[start] = vocabulary.begin_id(segment.modality)
            part = slice(start + 1, start + 1 + segment.codes.size)
            row.tokens[part] = vocabulary.to_ids(segment.modality, segment.codes).reshape(-1)
            row.modality[part] = vocabulary.number_of(segment.modality)
            row.coordinates[part] = _coordinates(segment.codes.shape)
            row.is_condition[part] = np.arange(segment.codes.size) < segment.num_given
            start = part.stop
    return row


def disassemble(vocabulary: Vocabulary, row: TokenRows) -> list[Example]:
    """Inverse of `assemble`: the examples of one row, with masked tokens as code -1."""
    tokens, modality, coordinates = np.asarray(row.tokens), np.asarray(row.modality), np.asarray(row.coordinates)
    segment, is_condition = np.asarray(row.segment), np.asarray(row.is_condition)
    examples = []
    for number in range(1, segment.max(initial=0) + 1):
        task_position, *rest = np.flatnonzero(segment == number)
        begins = [position for position in rest if modality[position] == SPECIAL_NUMBER]
        parts = np.split(np.array(rest, int), [rest.index(begin) for begin in begins[1:]])
        task = next(task for task in vocabulary.tasks if vocabulary.task_id(task) == tokens[task_position])
        examples.append(
            Example(
                task, tuple(_segment(vocabulary, tokens, modality, coordinates, is_condition, part) for part in parts)
            )
        )
    return examples


def padding_rows(vocabulary: Vocabulary, batch: tuple[int, ...], length: int) -> TokenRows:
    """Rows that consist of padding alone, of shape [*batch, length]."""
    shape = (*batch, length)
    return TokenRows(
        tokens=np.full(shape, vocabulary.padding_id, np.int32),
        modality=np.zeros(shape, np.int32),
        coordinates=np.zeros((*shape, 2), np.int32),
        segment=np.zeros(shape, np.int32),
        is_condition=np.zeros(shape, bool),
    )


def stack_rows(rows: list[TokenRows]) -> TokenRows:
    """Stacks rows of equal length into a batch."""
    return jax.tree.map(lambda *fields: np.stack(fields), *rows)


def concatenate_rows(parts: list[TokenRows]) -> TokenRows:
    """Batches of rows of one length as one batch."""
    return jax.tree.map(lambda *arrays: np.concatenate(arrays), *parts)


def _segment(vocabulary, tokens, modality, coordinates, is_condition, part) -> Segment:
    """The segment at positions `part`, whose first position is the boundary token."""
    begin, codes = part[0], part[1:]
    name = vocabulary.special_tokens[tokens[begin]].strip("<>")
    ids = tokens[codes]
    if name != TEXT:
        ids = ids.reshape(coordinates[codes].max(axis=0, initial=-1) + 1)
    return Segment(name, vocabulary.to_codes(name, ids), int(is_condition[codes].sum()))


@lru_cache(maxsize=1024)
def _coordinates(shape: tuple[int, ...]) -> np.ndarray:
    """Coordinates of every code of a segment of this shape, flattened; the second coordinate of text is 0."""
    if len(shape) == 1:
        return np.stack([np.arange(shape[0]), np.zeros(shape[0], int)], axis=-1)
    return np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), axis=-1).reshape(-1, 2)
