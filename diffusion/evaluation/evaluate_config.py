"""What an evaluation is asked for; read without loading a judge."""

from dataclasses import dataclass, field

from trimask.diffusion.run.limits import WorkLimits
from trimask.tokenizers.storage.ranges import Checked, PositiveInt, Seed, Size


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig(Checked):
    """What to measure."""

    splits: tuple[str, ...] | None = None
    """Held-out splits; a dataset is evaluated on those it has. None: all whose name begins with test."""
    judges: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """Task, or "all" → names of judges, in place of the usual ones: exact_match of texts; label of media whose captions
    are labels, else frechet."""
    max_examples: PositiveInt | None = None
    """At most so many examples of each split, evenly spread over it. None: all."""
    bound_samples: Size = 16
    """Masks per example for the bits per token."""
    fit_examples: Size = 10_000
    """At most so many training examples, evenly spread, for a judge to be fitted on."""
    rows: Size = 128
    """Examples in one batch: a matter of memory."""
    seed: Seed = 0
    """Of generation and masks."""
    limits: WorkLimits = WorkLimits()
    """What it may take."""
