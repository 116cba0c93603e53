"""Stops a run whose loss is not finite or jumps far above its recent mean.

    stop if  loss > factor · m,    m ← m + (loss − m) / min(n, 50)

where the loss is the metric that the run names, comparable between all its steps. m is the mean of the first 50 losses
and from then on an exponential moving average over about 50 steps; there is no limit during the first 50 steps, nor
while m is not positive. Both m and n are part of every checkpoint, so a resumed
run stops where an uninterrupted one would.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from trimask.diffusion.run.folder import checkpoint_steps, writing
from trimask.diffusion.run.processes import is_first
from trimask.tokenizers.storage import configuration

_RECENT_STEPS = 50


class Diverged(ValueError):
    """Training was stopped because it diverged; the last good checkpoint is untouched."""


class LossWatch:
    """Running mean of the loss, and the test for losses far above it."""

    def __init__(self, factor: float | None, recent: Mapping[str, float] | None = None, metric: str = "loss"):
        """`recent` restores the state of an earlier watch; `factor` None switches the limit off.

        `metric` is the name of the loss that is compared.
        """
        self._factor, self._metric = factor, metric
        self._mean, self._steps = (recent["mean"], int(recent["steps"])) if recent else (0.0, 0)

    @property
    def recent(self) -> dict[str, float]:
        """State of the watch, to be stored in a checkpoint."""
        return {"mean": self._mean, "steps": self._steps}

    def fault(self, metrics: Mapping[str, Any]) -> str | None:
        """Says what is wrong with a step; None if it is sound, in which case its loss enters the mean."""
        for name in ("loss", "gradient_norm"):
            if name in metrics and not math.isfinite(float(metrics[name])):
                return f"{name} is {float(metrics[name])}"
        loss = float(metrics[self._metric])
        if self._factor is not None and self._steps >= _RECENT_STEPS and loss > self._factor * self._mean > 0:
            return (
                f"{self._metric} {loss:.4g} is more than {self._factor:g} times the recent mean of {self._mean:.4g} "
                "(--loop.spike-factor sets the limit)"
            )
        self._steps += 1
        self._mean += (loss - self._mean) / min(self._steps, _RECENT_STEPS)
        return None


def first_non_finite(state: Any) -> str | None:
    """Names the first array of a state with NaN or infinity in this process's part; None if all are finite."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            continue
        parts = (shard.data for shard in leaf.addressable_shards) if isinstance(leaf, jax.Array) else [leaf]
        if not all(np.isfinite(part).all() for part in parts):
            return f"{jax.tree_util.keystr(path, simple=True, separator='/')} is not finite"
    return None


def divergence_error(
    folder: Path, step: int, fault: str, watch: LossWatch, metrics: Mapping[str, Any], batch: Any
) -> Diverged:
    """The error to raise at `step`; also writes RUN/diverged-step-<n>.json with the step's batch, metrics and fault."""
    numbers = {name: float(mean) for name, mean in metrics.items()}
    content = {
        "step": step,
        "fault": fault,
        "loss": numbers["loss"],
        "recent_mean": watch.recent["mean"],
        "metrics": numbers,
        "batch": batch,
    }
    path = folder / f"diverged-step-{step}.json"
    if is_first():
        with writing(folder):
            configuration.write_json(path, _strict(content))
    steps = checkpoint_steps(folder)
    good = f"the last good checkpoint is of step {steps[-1]}" if steps else "there is no checkpoint yet"
    return Diverged(f"{folder}: stopped at step {step}: {fault}; {good}, and {path.name} names the batch")


def _strict(content: Any) -> Any:
    """Replaces numbers that are not finite by strings, because strict JSON has none."""
    if isinstance(content, dict):
        return {name: _strict(value) for name, value in content.items()}
    return str(content) if isinstance(content, float) and not math.isfinite(content) else content
