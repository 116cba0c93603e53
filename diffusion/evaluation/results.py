"""What evaluating a model gives, as plain dataclasses; evaluation.json is an `Evaluation`."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jaxtyping import Bool

from trimask.tokenizers.storage.formats import added_field


@dataclass(frozen=True, kw_only=True)
class Score:
    """What a judge says of a task's answers."""

    dataset: str
    task: str
    split: str
    judge: str
    examples: int
    value: float
    interval: tuple[float, float] | None
    """95 %: Wilson's of shares, else the delta method's. None: the judge gives one score for the whole set."""
    is_share: bool
    """True where every answer was found right or wrong."""
    higher_is_better: bool | None
    """None: only the judge's author knows."""
    on_real: float | None
    """The judge's score of real media, held-out ones (Fréchet: training ones). None: it is known."""
    mean_nfe: float
    """Function evaluations per answer."""


@dataclass(frozen=True, kw_only=True)
class Bound:
    """Negative ELBO in bits per token: Σ bits / Σ tokens over examples."""

    dataset: str | None
    """None: all."""
    task: str | None
    """None: all that ask for this modality."""
    modality: str
    split: str
    examples: int
    bits_per_token: float
    half_width: float | None
    """Half of the 95 % interval over examples."""
    bits_per_character: float | None
    """Of texts: Σ bits / Σ characters, which does not depend on the tokenizer."""


@dataclass(frozen=True, kw_only=True)
class Memorisation:
    """How much of what is generated is copied."""

    dataset: str
    task: str
    split: str
    generated: int
    copied: float
    """Share of generated code grids that equal a training item's."""
    distinct: int
    real: int
    """Held-out items, for comparison."""
    real_copied: float
    real_distinct: int


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """All results of one model."""

    step: int
    scores: list[Score] = field(default_factory=list)
    bounds: list[Bound] = field(default_factory=list)
    """Of every direction, then of every modality."""
    memorisation: list[Memorisation] = field(default_factory=list)
    notes: list[str] = added_field(as_before=[], default_factory=list)
    """What was not judged, and why."""


@dataclass(frozen=True)
class Samples:
    """What was generated for one task and split, for looking at."""

    task: str
    split: str
    references: list[str]
    """The text of each example: the prompt of a medium, the right answer of a text."""
    media: list[Any]
    is_right: Bool[np.ndarray, " items"] | None
    """None where no judge found answers right or wrong."""
