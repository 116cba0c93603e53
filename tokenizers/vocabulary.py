"""One id space for every modality: [special | text | image codebooks | audio codebooks | …].

A *modality* is a kind of medium; a *range* is a run of consecutive ids from which one position draws its token. Text
has one range, whose last id is EOS; a codec has one range per residual codebook. Which range a position draws from
follows from its modality and its coordinates alone, so loss, likelihood and sampling all ask `allowed_ids`. No other
module knows where a range starts.
"""

import hashlib
import json
from dataclasses import dataclass, field
from functools import cached_property

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from trimask.tokenizers.storage.ranges import Checked, Size

SPECIAL = "special"
TEXT = "text"
SPECIAL_NUMBER, TEXT_NUMBER = 0, 1
"""Modality numbers of special and text tokens, the same in every vocabulary; the media follow."""


@dataclass(frozen=True)
class IdRange:
    """Consecutive ids of one modality: start ≤ id < stop."""

    modality: str
    start: int
    stop: int


@dataclass(frozen=True)
class Task:
    """A generation task: generate `target` given `condition`; None: nothing is given."""

    name: str
    condition: str | None
    target: str

    @property
    def modalities(self) -> tuple[str, ...]:
        """Modalities in the order of their segments in a sequence: condition, then target."""
        return (self.target,) if self.condition is None else (self.condition, self.target)


@dataclass(frozen=True, kw_only=True)
class Vocabulary(Checked):
    """The token ids of all modalities; a new modality is one more entry of `codebook_sizes`."""

    text_size: Size
    """Number of ids of the text tokenizer, without EOS."""
    codebook_sizes: dict[str, tuple[Size, ...]] = field(default_factory=dict)
    """Sizes of the residual codebooks of each media codec, by modality."""

    def __post_init__(self):
        super().__post_init__()
        for modality, sizes in self.codebook_sizes.items():
            if modality in (SPECIAL, TEXT) or not modality.isidentifier():
                raise ValueError(
                    f"a media modality must be an identifier other than {SPECIAL} and {TEXT}, got {modality!r}"
                )
            if not sizes:
                raise ValueError(f"{modality} needs at least one codebook")

    def __hash__(self) -> int:
        return hash(self.fingerprint)

    @cached_property
    def modalities(self) -> tuple[str, ...]:
        """Modality names by modality number. Number 0 is `special`, which holds task, boundary and padding tokens."""
        return (SPECIAL, TEXT, *self.codebook_sizes)

    @cached_property
    def tasks(self) -> dict[str, Task]:
        """All tasks by name: text alone, and text to and from each medium."""
        tasks = [Task(TEXT, None, TEXT)]
        for medium in self.codebook_sizes:
            tasks += [Task(f"{TEXT}_to_{medium}", TEXT, medium), Task(f"{medium}_to_{TEXT}", medium, TEXT)]
        return {task.name: task for task in tasks}

    @cached_property
    def special_tokens(self) -> tuple[str, ...]:
        """Names of the special tokens in id order; they are the first ids."""
        boundaries = (f"<{modality}>" for modality in self.modalities[1:])
        return ("<pad>", "<mask>", *boundaries, *(f"<task:{task}>" for task in self.tasks))

    @cached_property
    def ranges(self) -> tuple[IdRange, ...]:
        """All ranges in id order; range 0 is `special`."""
        sizes = [(SPECIAL, len(self.special_tokens)), (TEXT, self.text_size + 1)]
        sizes += [(medium, size) for medium, books in self.codebook_sizes.items() for size in books]
        ranges, start = [], 0
        for modality, size in sizes:
            ranges.append(IdRange(modality, start, start + size))
            start += size
        return tuple(ranges)

    @property
    def text_range(self) -> IdRange:
        """The range of the text tokenizer's ids and EOS."""
        return next(r for r in self.ranges if r.modality == TEXT)

    @property
    def size(self) -> int:
        """Total number of ids."""
        return self.ranges[-1].stop

    @property
    def padding_id(self) -> int:
        """The token that fills a row after its last example."""
        return self.special_tokens.index("<pad>")

    @property
    def mask_id(self) -> int:
        """The token MASK, which stands in the place of an unknown token."""
        return self.special_tokens.index("<mask>")

    @property
    def eos_id(self) -> int:
        """EOS, which ends a text and fills the rest of its buffer; the last id of the text range."""
        return self.text_range.stop - 1

    @property
    def eos_code(self) -> int:
        """EOS as a code of the text modality, that is, relative to the start of the text range."""
        return self.text_size

    def pad_with_eos(self, codes: Int[np.ndarray, " n"], length: int) -> Int[np.ndarray, " length"]:
        """Text codes followed by EOS up to `length`. Raises ValueError unless at least one EOS fits."""
        if len(codes) >= length:
            raise ValueError(f"a text of {len(codes)} tokens does not fit a buffer of {length} (one is kept for EOS)")
        return np.concatenate([codes, np.full(length - len(codes), self.eos_code)]).astype(np.int32)

    def until_eos(self, codes: Int[np.ndarray, " n"]) -> Int[np.ndarray, " m"]:
        """Text codes before the first EOS."""
        ends = np.flatnonzero(codes == self.eos_code)
        return codes[: ends[0]] if len(ends) else codes

    def begin_id(self, modality: str) -> int:
        """The boundary token in front of a segment of `modality`."""
        return self.special_tokens.index(f"<{modality}>")

    def task_id(self, task: str) -> int:
        """The task token, which says what to generate."""
        return self.special_tokens.index(f"<task:{task}>")

    def number_of(self, modality: str) -> int:
        """Modality number of a modality name, as in `TokenRows.modality`. Raises ValueError for an unknown name."""
        if modality not in self.modalities:
            raise ValueError(f"unknown modality {modality!r}; this vocabulary has {', '.join(self.modalities)}")
        return self.modalities.index(modality)

    def num_codebooks(self, modality: str) -> int:
        """Number of residual codebooks of a codec; 1 for text."""
        return len(self.codebook_sizes.get(modality, (1,)))

    @cached_property
    def _first_range(self) -> np.ndarray:
        """Index of the first range of each modality."""
        return np.array([[r.modality for r in self.ranges].index(name) for name in self.modalities])

    @cached_property
    def _last_codebook(self) -> np.ndarray:
        """Index of the last codebook of each modality."""
        return np.array([self.num_codebooks(name) - 1 for name in self.modalities])

    def range_numbers(
        self, modality: Int[Array, "*shape"], coordinates: Int[Array, "*shape 2"]
    ) -> Int[Array, "*shape"]:
        """Index into `ranges` of the range that each position draws from.

        For a modality with several codebooks the second coordinate is the codebook.
        """
        first, last = jnp.asarray(self._first_range), jnp.asarray(self._last_codebook)
        return first[modality] + jnp.minimum(coordinates[..., 1], last[modality])

    def allowed_bounds(
        self, modality: Int[Array, "*shape"], coordinates: Int[Array, "*shape 2"]
    ) -> Int[Array, "*shape 2"]:
        """Start and stop of the ids that each position may take, which are those of its range."""
        return jnp.array([(r.start, r.stop) for r in self.ranges])[self.range_numbers(modality, coordinates)]

    def allowed_ids(
        self, modality: Int[Array, "*shape"], coordinates: Int[Array, "*shape 2"]
    ) -> Bool[Array, "*shape vocab"]:
        """True for the ids that each position may take: those of its range, so never MASK or another modality's."""
        bounds = self.allowed_bounds(modality, coordinates)
        ids = jnp.arange(self.size)
        return (ids >= bounds[..., 0, None]) & (ids < bounds[..., 1, None])

    def _starts(self, modality: str, shape: tuple[int, ...]) -> np.ndarray:
        """First id of the range of every code in an array of codes of this shape."""
        starts = np.array([r.start for r in self.ranges if r.modality == modality])
        return np.broadcast_to(starts if len(starts) > 1 else starts[0], shape)

    def to_ids(self, modality: str, codes: Int[np.ndarray, "*shape"]) -> Int[np.ndarray, "*shape"]:
        """Token ids of a modality's codes; code -1 becomes MASK.

        For a codec with several codebooks the last axis is the codebook. Raises ValueError for codes out of range.
        """
        codes = np.asarray(codes)
        sizes = np.array([r.stop - r.start for r in self.ranges if r.modality == modality])
        if np.any(codes < -1) or np.any(codes >= (sizes if len(sizes) > 1 else sizes[0])):
            raise ValueError(f"{modality} codes must lie in [-1, {sizes.max()}), got [{codes.min()}, {codes.max()}]")
        return np.where(codes < 0, self.mask_id, codes + self._starts(modality, codes.shape)).astype(np.int32)

    def to_codes(self, modality: str, ids: Int[np.ndarray, "*shape"]) -> Int[np.ndarray, "*shape"]:
        """Inverse of `to_ids`; MASK becomes code -1."""
        ids = np.asarray(ids)
        return np.where(ids == self.mask_id, -1, ids - self._starts(modality, ids.shape)).astype(np.int32)

    @property
    def fingerprint(self) -> str:
        """Digest of the id space, 16 hex digits; it changes with any change of special tokens or ranges."""
        content = json.dumps([self.special_tokens, [[r.modality, r.start, r.stop] for r in self.ranges]])
        return hashlib.sha256(content.encode()).hexdigest()[:16]
