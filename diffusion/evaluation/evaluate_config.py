"""Configuration of an evaluation, in a module that loads no judge."""

from dataclasses import dataclass, field

from trimask.diffusion.run.limits import WorkLimits
from trimask.tokenizers.storage.ranges import Checked, PositiveInt, Seed, Size


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig(Checked):
    """What an evaluation measures, and on how many examples."""

    splits: tuple[str, ...] | None = None
    """Held-out splits; each dataset is evaluated on those that it has. None: all whose name begins with test."""
    judges: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """Names of judges for a task, or for "all", by the task's name. Tasks without one are judged by exact_match if they
    generate text; else by label if captions are labels, and by frechet if not."""
    max_examples: PositiveInt | None = None
    """Most examples of each split, evenly spaced over it. None: all."""
    bound_samples: Size = 16
    """Number of random masks per example with which bits per token are estimated."""
    fit_examples: Size = 10_000
    """Most training examples, evenly spaced, on which a judge is fitted."""
    rows: Size = 128
    """Most examples per batch, which memory limits."""
    seed: Seed = 0
    """Seed of generation and of the masks for bits per token."""
    limits: WorkLimits = WorkLimits()
    """Most memory and time that the evaluation may use."""
