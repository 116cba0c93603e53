"""Extends a run beyond its horizon, so that its steps so far are the first steps of the longer run.

With a constant learning rate every step of a run is also a step of a longer run. With warmup_stable_decay those before
the decay are: the longer run continues from the last checkpoint among them, and later checkpoints move to
RUN/decayed-<step>/, a run folder of its own. A cosine depends on the horizon in every step, so no step of it is one of
a longer run.

κ, and with it everything that `sde.py` derives from a batch and a horizon, stays that of the first horizon, and so do
the warmup, of which a short horizon has less, and N_m of the loss, the mean number of targets over the first horizon.
The annealing of the datasets' weights is given in tokens, so it does not depend on the horizon.
"""

import os
import re
import shutil
import sys
from pathlib import Path
from typing import Any

from trimask.diffusion.data.batches import Batches
from trimask.diffusion.optimizer import OptimizerConfig
from trimask.diffusion.run.checkpoint import Checkpoints, DamagedCheckpoint
from trimask.diffusion.run.folder import checkpoint_steps, keep_lines_until, writing

_COPIED = ("config.json", "metrics.jsonl", "tokenizers", "samples")
"""Parts of a run folder, beside checkpoints, that concern steps of both runs and are copied."""
_MOVED = ("generated", "evaluation.json", "likelihood.jsonl")
"""Parts of a run folder that other commands made from the newest checkpoint, and that move with it."""


def require_longer(folder: Path, old: OptimizerConfig, new: OptimizerConfig) -> None:
    """Raises ValueError if the new horizon is shorter, or if the schedule is a cosine, which cannot be extended."""
    if new.horizon_tokens < old.horizon_tokens:
        raise ValueError(
            f"{folder} holds a run of {old.horizon_tokens:,} tokens, which can be made longer and not shorter; "
            f"got {new.horizon_tokens:,}"
        )
    if old.schedule == "cosine":
        raise ValueError(
            f"{folder} holds a run whose cosine ends at {old.horizon_tokens:,} tokens, and no step of it is one of "
            f"{new.horizon_tokens:,}. Start a new run from its weights with --init-from {folder}, or train one that "
            "can be made longer with --optimizer.schedule warmup_stable_decay"
        )


def last_step_before_decay(optimizer: OptimizerConfig, batches: Batches) -> int | None:
    """Last step whose learning rate is that of every longer run; None if the schedule has no decay."""
    if optimizer.schedule != "warmup_stable_decay":
        return None
    return batches.steps_within(optimizer.horizon_tokens - optimizer.length_of_decay)


def steps_of_decay(folder: Path, last_stable: int, like: Any) -> list[int]:
    """Steps of the checkpoints after step `last_stable`, which belong to the decay.

    `like` is a state of the run, to restore into. Raises ValueError if no undamaged checkpoint from before the decay is
    left to continue from.
    """
    steps = checkpoint_steps(folder)
    kept = [step for step in steps if step <= last_stable]
    with Checkpoints(folder) as checkpoints:
        while kept:
            try:
                checkpoints.restore(kept.pop(), like)
                return [step for step in steps if step > last_stable]
            except DamagedCheckpoint as damage:
                print(damage, file=sys.stderr)
    raise ValueError(
        f"{folder} has no undamaged checkpoint from before its decay, which begins after step {last_stable}; it has "
        f"those of {', '.join(map(str, steps))}. Start a new run from its weights with --init-from {folder}"
    )


def set_aside(folder: Path, steps: list[int]) -> Path:
    """Moves the checkpoints of `steps`, and what was made from them, to RUN/decayed-<last step>/, which it returns.

    If killed, the next call completes the move: the newest checkpoint moves last, so the folder's name stays the same.
    """
    name = f"decayed-{steps[-1]}"
    names = (f"{name}{suffix}" for suffix in ("", *(f"-{number}" for number in range(2, 1000))))
    target = next(folder / name for name in names if not {*steps} & {*checkpoint_steps(folder / name)})
    with writing(folder):
        (target / "checkpoints").mkdir(parents=True, exist_ok=True)
        for part in _COPIED:
            if (folder / part).is_dir():
                _copy_folder(folder / part, target / part)
            elif (folder / part).exists():
                shutil.copy2(folder / part, target / part, follow_symlinks=False)
        for part in _MOVED:
            if os.path.lexists(folder / part) and not os.path.lexists(target / part):
                (folder / part).rename(target / part)
        _drop_samples(folder / "samples", steps[0])
        for step in steps:
            (folder / "checkpoints" / str(step)).rename(target / "checkpoints" / str(step))
    return target


def _copy_folder(source: Path, target: Path) -> None:
    """Copies a folder, keeping links, unless the target exists, which appears only when complete."""
    partial = target.with_name(f".{target.name}.partial")
    if partial.exists():
        shutil.rmtree(partial)
    if not target.exists():
        shutil.copytree(source, partial, symlinks=True)
        partial.rename(target)


def _drop_samples(folder: Path, first: int) -> None:
    """Removes samples of step `first` and later ones."""
    for path in folder.glob("step-*"):
        found = re.match(r"step-(\d+)-", path.name)
        if found is not None and int(found[1]) >= first and (path.is_symlink() or path.is_file()):
            path.unlink()
    keep_lines_until(folder / "samples.jsonl", first - 1)
