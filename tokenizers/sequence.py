"""Media segments ↔ fixed-length rows of tokens.

An example is laid out as  [task] ([begin modality] its codes)+ , what is given before what is asked for; a row holds
one example or several packed ones, then padding. Every position knows what it is even when masked: its modality, its
coordinates inside the segment (text: offset, 0; image: row, column; audio: frame, codebook) and its example (`segment`,
counted from 1; 0 is padding). Task, boundary and padding tokens are of modality 0 and are never masked.
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

from trimask.tokenizers.vocabulary import TEXT, Task, Vocabulary


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TokenRows:
    """Rows of tokens and what each position is; leading axes are free (usually batch)."""

    tokens: Int[Any, "*batch seq"]
    modality: Int[Any, "*batch seq"]
    """Number of the modality (`Vocabulary.modalities`)."""
    coordinates: Int[Any, "*batch seq 2"]
    """Coordinates inside the segment."""
    segment: Int[Any, "*batch seq"]
    """Number of the packed example, from 1; attention stays inside. 0 is padding."""
    is_condition: Bool[Any, "*batch seq"]
    """True where the token is given: never predicted and never part of the loss."""

    @property
    def is_padding(self) -> Bool[Any, "*batch seq"]:
        """True after the last example of a row."""
        return self.segment == 0

    @property
    def is_target(self) -> Bool[Any, "*batch seq"]:
        """True where the model may be asked to predict: media and text that are not given."""
        return (self.modality != 0) & ~self.is_condition

    @property
    def length(self) -> int:
        """Positions of a row."""
        return self.tokens.shape[-1]

    def replace(self, **changes) -> "TokenRows":
        """A copy with some fields replaced."""
        return dataclasses.replace(self, **changes)


@dataclass(frozen=True)
class Segment:
    """One modality's codes in their natural shape (text [n], image [rows, columns], audio [frames, codebooks]).

    Code -1 is a masked position. The first `num_given` codes, in reading order, are a condition.
    """

    modality: str
    codes: Int[np.ndarray, "..."]
    num_given: int = 0

    @property
    def is_condition(self) -> bool:
        """True if all of it is given."""
        return self.num_given == self.codes.size


@dataclass(frozen=True)
class Example:
    """A task and its segments in order."""

    task: str
    segments: tuple[Segment, ...]

    @property
    def length(self) -> int:
        """Tokens of the example: the task, and a boundary before each segment."""
        return 1 + sum(1 + segment.codes.size for segment in self.segments)


def example_starts(sequence: TokenRows) -> Int[Array, "batch seq"]:
    """For every position, the position at which its example starts."""
    previous = jnp.pad(sequence.segment, ((0, 0), (1, 0)))[:, :-1]
    is_start = sequence.segment != previous
    return jax.lax.cummax(jnp.where(is_start, jnp.arange(sequence.length), 0), axis=1)


def task_tokens(sequence: TokenRows) -> Int[Array, "batch seq"]:
    """For every position, the task token of its example."""
    return jnp.take_along_axis(sequence.tokens, example_starts(sequence), axis=1)


def direct(task: Task, codes: Mapping[str, Any], num_given: int = 0) -> Example:
    """The example of `task` over paired media.

    What the task is given is the condition, and so are the first `num_given` codes of what it asks for.
    """
    given = {task.target: num_given} | ({} if task.condition is None else {task.condition: codes[task.condition].size})
    return Example(task.name, tuple(Segment(m, codes[m], given[m]) for m in task.modalities))


def fill_text(vocabulary: Vocabulary, codes: Int[np.ndarray, " n"], length: int) -> Int[np.ndarray, " length"]:
    """Text codes followed by EOS up to `length`; at least one EOS must fit."""
    if len(codes) >= length:
        raise ValueError(f"a text of {len(codes)} tokens does not fit a buffer of {length} (one is kept for EOS)")
    return np.concatenate([codes, np.full(length - len(codes), vocabulary.eos_code)]).astype(np.int32)


def until_eos(vocabulary: Vocabulary, codes: Int[np.ndarray, " n"]) -> Int[np.ndarray, " m"]:
    """The text before its first EOS."""
    ends = np.flatnonzero(codes == vocabulary.eos_code)
    return codes[: ends[0]] if len(ends) else codes


def assemble(vocabulary: Vocabulary, examples: list[Example], length: int) -> TokenRows:
    """One row of `length` tokens holding the examples one after another, then padding."""
    row = empty(vocabulary, (), length)
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
    """Inverse of `assemble`: the examples of one row, MASK as code -1."""
    tokens, modality, coordinates = np.asarray(row.tokens), np.asarray(row.modality), np.asarray(row.coordinates)
    segment, is_condition = np.asarray(row.segment), np.asarray(row.is_condition)
    examples = []
    for number in range(1, segment.max(initial=0) + 1):
        task_position, *rest = np.flatnonzero(segment == number)
        begins = [position for position in rest if modality[position] == 0]
        parts = np.split(np.array(rest, int), [rest.index(begin) for begin in begins[1:]])
        task = next(task for task in vocabulary.tasks if vocabulary.task_id(task) == tokens[task_position])
        examples.append(
            Example(
                task, tuple(_segment(vocabulary, tokens, modality, coordinates, is_condition, part) for part in parts)
            )
        )
    return examples


def empty(vocabulary: Vocabulary, batch: tuple[int, ...], length: int) -> TokenRows:
    """Rows of padding."""
    shape = (*batch, length)
    return TokenRows(
        tokens=np.full(shape, vocabulary.padding_id, np.int32),
        modality=np.zeros(shape, np.int32),
        coordinates=np.zeros((*shape, 2), np.int32),
        segment=np.zeros(shape, np.int32),
        is_condition=np.zeros(shape, bool),
    )


def stack(rows: list[TokenRows]) -> TokenRows:
    """Rows of one length as a batch."""
    return jax.tree.map(lambda *fields: np.stack(fields), *rows)


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
    """Coordinates of every code of a segment, flattened; text has one coordinate, the second is 0."""
    if len(shape) == 1:
        return np.stack([np.arange(shape[0]), np.zeros(shape[0], int)], axis=-1)
    return np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), axis=-1).reshape(-1, 2)
