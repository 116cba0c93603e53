"""Results of evaluating a model as plain dataclasses; evaluation.json holds an `Evaluation`."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jaxtyping import Bool

from trimask.tokenizers.storage.formats import added_field


@dataclass(frozen=True, kw_only=True)
class Score:
    """Score that a judge gives to the answers to one task on one held-out split."""

    dataset: str
    task: str
    split: str
    judge: str
    """Name of the judge."""
    examples: int
    """Number of answers."""
    value: float
    """The score: a share if `is_share`, else in the judge's unit."""
    interval: tuple[float, float] | None
    """95 % interval: Wilson's for shares, else by the delta method. None: the judge scores the set as a whole."""
    is_share: bool
    """Whether the judge found every answer right or wrong, so that the value is the share of right ones."""
    higher_is_better: bool | None
    """Whether a higher value is better. None: unknown, since the judge is the user's."""
    on_real: float | None
    """The judge's score of real media (`JudgeKind.yardstick`). None: it needs none, as exact_match does not."""
    mean_nfe: float
    """Mean number of function evaluations per answer."""


@dataclass(frozen=True, kw_only=True)
class Bound:
    """Negative ELBO in bits per token, Σ bits / Σ tokens over examples: it bounds −log₂ p from above."""

    dataset: str | None
    """Dataset that the examples are from. None: all datasets."""
    task: str | None
    """Task whose targets are measured. None: all tasks that generate this modality."""
    modality: str
    """Modality of the targets."""
    split: str
    examples: int
    """Number of examples."""
    bits_per_token: float
    half_width: float | None
    """Half the width of the 95 % interval over examples. None: there is only one example."""
    bits_per_character: float | None
    """Σ bits / Σ characters, which does not depend on the tokenizer. None: the targets are not text."""


@dataclass(frozen=True, kw_only=True)
class Memorisation:
    """Share of generated media that are copies of training items, beside that of real held-out media."""

    dataset: str
    task: str
    split: str
    generated: int
    """Number of generated items."""
    copied: float
    """Share of generated items whose codes equal those of a training item."""
    distinct: int
    """Number of different items among the generated ones."""
    real: int
    """Number of real held-out items, for comparison."""
    real_copied: float
    """Share of held-out items whose codes equal those of a training item."""
    real_distinct: int
    """Number of different items among the held-out ones."""


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """All results of one model."""

    step: int
    """Training step of the model."""
    scores: list[Score] = field(default_factory=list)
    """One per task, split and judge."""
    bounds: list[Bound] = field(default_factory=list)
    """One per dataset, task and split, then one per modality and split."""
    memorisation: list[Memorisation] = field(default_factory=list)
    """One per task and split of media, if the data is what the model was trained on."""
    notes: list[str] = added_field(as_before=[], default_factory=list)
    """What was not judged, and why; and where the data exceeds the shapes that the model was trained on."""


@dataclass(frozen=True)
class Samples:
    """Media generated for one task and split, to look at."""

    task: str
    split: str
    references: list[str]
    """The text of each example: the prompt of a medium, the right answer of a text."""
    media: list[Any]
    """The generated media, in the same order; a text that answers a question is shown after the question."""
    is_right: Bool[np.ndarray, " items"] | None
    """True for right answers. None: no judge finds answers right or wrong."""
