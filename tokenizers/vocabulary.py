"""One id space for every modality: [special | text | image codebooks | audio codebooks | …].

A *modality* is a kind of medium; a *range* is a run of consecutive ids that one position may take. Text has one
range, whose last id is EOS; a codec has one range per residual codebook. Which range a position draws from follows
from its modality and its coordinates alone, so loss, likelihood and sampling all ask `allowed_ids`. No other module
knows an offset.
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


@dataclass(frozen=True)
class IdRange:
    """Ids start ≤ id < stop, belonging to one modality."""

    modality: str
    start: int
    stop: int


@dataclass(frozen=True)
class Task:
    """What to generate: `target` given `condition` (None: nothing is given)."""

    name: str
    condition: str | None
    target: str

    @property
    def modalities(self) -> tuple[str, ...]:
        """In the order in which they stand in a sequence: what is given, then what is asked for."""
        return (self.target,) if self.condition is None else (self.condition, self.target)


@dataclass(frozen=True, kw_only=True)
class Vocabulary(Checked):
    """The ids of all modalities; a new modality is one more entry of `codebook_sizes`."""

    text_size: Size
    """Number of ids of the text tokenizer, EOS not counted."""
    codebook_sizes: dict[str, tuple[Size, ...]] = field(default_factory=dict)
    """Sizes of the residual codebooks of each media codec, by modality."""

    def __post_init__(self):
        super().__post_init__()
        for modality, sizes in self.codebook_sizes.items():
            if modality in (SPECIAL, TEXT) or not modality.isidentifier():
                raise ValueError(f"a media modality needs a name of its own, got {modality!r}")
            if not sizes:
                raise ValueError(f"{modality} needs at least one codebook")

    def __hash__(self) -> int:
        return hash(self.fingerprint)

    @cached_property
    def modalities(self) -> tuple[str, ...]:
        """Names by modality number; number 0 is `special`, which holds task, boundary and padding tokens."""
        return (SPECIAL, TEXT, *self.codebook_sizes)

    @cached_property
    def tasks(self) -> dict[str, Task]:
        """Every direction: text alone, and to and from each medium."""
        tasks = [Task(TEXT, None, TEXT)]
        for medium in self.codebook_sizes:
            tasks += [Task(f"{TEXT}_to_{medium}", TEXT, medium), Task(f"{medium}_to_{TEXT}", medium, TEXT)]
        return {task.name: task for task in tasks}

    @cached_property
    def special_tokens(self) -> tuple[str, ...]:
        """The first ids, in order."""
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
    def size(self) -> int:
        """Number of ids."""
        return self.ranges[-1].stop

    @property
    def padding_id(self) -> int:
        """Fills a row after its last example."""
        return self.special_tokens.index("<pad>")

    @property
    def mask_id(self) -> int:
        """Stands for a token that is not known yet."""
        return self.special_tokens.index("<mask>")

    @property
    def eos_id(self) -> int:
        """Ends a text and fills the rest of its buffer; the last id of the text range."""
        return self.ranges[1].stop - 1

    @property
    def eos_code(self) -> int:
        """EOS counted within the text range."""
        return self.text_size

    def begin_id(self, modality: str) -> int:
        """The boundary token before a segment of `modality`."""
        return self.special_tokens.index(f"<{modality}>")

    def task_id(self, task: str) -> int:
        """The token that says what to generate."""
        return self.special_tokens.index(f"<task:{task}>")

    def number_of(self, modality: str) -> int:
        """The modality's number, as `Sequence.modality` holds it."""
        if modality not in self.modalities:
            raise ValueError(f"unknown modality {modality!r}; this vocabulary has {', '.join(self.modalities)}")
        return self.modalities.index(modality)

    def num_codebooks(self, modality: str) -> int:
        """Residual codebooks of a codec; 1 for text."""
        return len(self.codebook_sizes.get(modality, (1,)))

    @cached_property
    def _first_range(self) -> np.ndarray:
        """Number of the first range of each modality."""
        return np.array([[r.modality for r in self.ranges].index(name) for name in self.modalities])

    @cached_property
    def _last_codebook(self) -> np.ndarray:
        """Number of the last codebook of each modality."""
        return np.array([self.num_codebooks(name) - 1 for name in self.modalities])

    def range_numbers(
        self, modality: Int[Array, "*shape"], coordinates: Int[Array, "*shape 2"]
    ) -> Int[Array, "*shape"]:
        """The range each position draws from. With several codebooks, the second coordinate says which."""
        first, last = jnp.asarray(self._first_range), jnp.asarray(self._last_codebook)
        return first[modality] + jnp.minimum(coordinates[..., 1], last[modality])

    def allowed_bounds(
        self, modality: Int[Array, "*shape"], coordinates: Int[Array, "*shape 2"]
    ) -> Int[Array, "*shape 2"]:
        """First id, and the one after the last, that a position may take: its range."""
        return jnp.array([(r.start, r.stop) for r in self.ranges])[self.range_numbers(modality, coordinates)]

    def allowed_ids(
        self, modality: Int[Array, "*shape"], coordinates: Int[Array, "*shape 2"]
    ) -> Bool[Array, "*shape vocab"]:
        """The ids a position may take: those of its range; never MASK, never another modality's."""
        bounds = self.allowed_bounds(modality, coordinates)
        ids = jnp.arange(self.size)
        return (ids >= bounds[..., 0, None]) & (ids < bounds[..., 1, None])

    def _starts(self, modality: str, shape: tuple[int, ...]) -> np.ndarray:
        """First id of the range of every code of an array of codes."""
        starts = np.array([r.start for r in self.ranges if r.modality == modality])
        return np.broadcast_to(starts if len(starts) > 1 else starts[0], shape)

    def to_ids(self, modality: str, codes: Int[np.ndarray, "*shape"]) -> Int[np.ndarray, "*shape"]:
        """Ids of a modality's own codes; code -1 becomes MASK. Of several codebooks the last axis is the codebook."""
        codes = np.asarray(codes)
        sizes = np.array([r.stop - r.start for r in self.ranges if r.modality == modality])
        if np.any(codes < -1) or np.any(codes >= (sizes if len(sizes) > 1 else sizes[0])):
            raise ValueError(f"{modality} codes must lie in [-1, {sizes.max()}), got [{codes.min()}, {codes.max()}]")
        return np.where(codes < 0, self.mask_id, codes + self._starts(modality, codes.shape)).astype(np.int32)

    def to_codes(self, modality: str, ids: Int[np.ndarray, "*shape"]) -> Int[np.ndarray, "*shape"]:
        """Inverse of `to_ids`; MASK becomes -1."""
        ids = np.asarray(ids)
        return np.where(ids == self.mask_id, -1, ids - self._starts(modality, ids.shape)).astype(np.int32)

    @property
    def fingerprint(self) -> str:
        """Changes with any change of the id space."""
        content = json.dumps([self.special_tokens, [[r.modality, r.start, r.stop] for r in self.ranges]])
        return hashlib.sha256(content.encode()).hexdigest()[:16]
