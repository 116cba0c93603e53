"""A pretraining run: starts or resumes it in its folder, and repeats the step of `training_step.py`.

A run folder holds config.json (`RunDescription`), tokenizers/, checkpoints/, metrics.jsonl and tensorboard/: enough to
resume training, and to generate without the data.
"""

import dataclasses
import importlib.metadata
import shutil
import subprocess
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from trimask.diffusion.data.batches import Batches, DatasetUse
from trimask.diffusion.data.prepared import Prepared
from trimask.diffusion.data.verification import BackgroundVerification
from trimask.diffusion.mesh import gather, rows_to_devices
from trimask.diffusion.pretraining.description import (
    RunDescription,
    TrainConfig,
    load_description,
    resumed_description,
    write_description,
)
from trimask.diffusion.pretraining.longer import last_step_before_decay, set_aside, steps_of_decay
from trimask.diffusion.pretraining.trained_model import LoadedRun, load
from trimask.diffusion.pretraining.training_batches import training_batches
from trimask.diffusion.pretraining.training_step import Pretraining, TrainState
from trimask.diffusion.pretraining.warm_start import require_grown, require_same_model
from trimask.diffusion.run.folder import WRITTEN_FIRST, checkpoint_steps, locked, undone_if_empty, writing
from trimask.diffusion.run.metrics import Metrics
from trimask.diffusion.run.processes import is_first, require_agreement, wait_for_all
from trimask.diffusion.run.step_loop import train_loop


def train(
    folder: Path,
    data: Path,
    config: TrainConfig,
    sample: Callable[[LoadedRun, int], None] | None = None,
    *,
    announce: Callable[[RunDescription, list[DatasetUse]], None] = lambda *_: None,
    init_from: Path | None = None,
    resume: bool = True,
) -> LoadedRun:
    """Trains on prepared data until the horizon, resuming from the newest checkpoint in `folder`; returns the model.

    Calls `announce(description, use of each dataset)` before the first step, and `sample(model, step)` at the intervals
    of `config.loop`. A new run starts from the weight average of the run `init_from`, if given. Without `resume` a
    folder that holds checkpoints is refused. If the horizon is longer than that of the run in the folder, the run is
    extended (`longer.py`). Raises ValueError if the folder holds a run of another configuration.
    """
    prepared = Prepared(data)
    mesh = config.mesh.over(jax.devices())
    batches = training_batches(prepared, config, mesh)
    description, use = _new_description(config, prepared, batches, data, init_from)
    require_agreement(
        {
            "configuration": str(config),
            f"fingerprint of {data}": prepared.fingerprint,  # whose path may differ between hosts
            "run to start from": str(init_from),
            f"checkpoints in {folder}": ", ".join(map(str, checkpoint_steps(folder))) or "none",
        }
    )
    with undone_if_empty(folder, *WRITTEN_FIRST), locked(folder):
        description = resumed_description(folder, description, resume)
        vocabulary = prepared.tokenizers.vocabulary
        pretraining = Pretraining(config, vocabulary, description.optimizer, description.mean_targets, mesh)
        if init_from is None or checkpoint_steps(folder):
            state = pretraining.init()
        else:
            source = load(init_from, description.init_step, mesh)
            require_same_model(source.description.train, config, init_from)
            require_grown(init_from / "tokenizers", prepared.folder / "tokenizers")
            description = dataclasses.replace(description, init_step=source.step)
            state = pretraining.init(source.parameters, source.vocabulary)
        decayed = _checkpoints_of_decay(folder, description, batches, state)
        wait_for_all("every process has read the folder")
        if is_first():
            announce(description, use)
            if decayed:
                set_aside(folder, decayed)
            with writing(folder):
                write_description(folder, description, prepared.tokenizers)
        wait_for_all("the folder holds the description")
        return _fit(folder, description, prepared, pretraining, mesh, state, batches, sample)


def _fit(
    folder: Path,
    description: RunDescription,
    prepared: Prepared,
    pretraining: Pretraining,
    mesh: Mesh,
    state: TrainState,
    batches: Batches,
    sample: Callable[[LoadedRun, int], None] | None,
) -> LoadedRun:
    """Trains until the horizon, from the newest checkpoint or else from `state`, while the data is verified."""
    config = pretraining.config
    # Sampling uses one device, even if training uses a mesh.
    alone = Pretraining(config, pretraining.vocabulary, description.optimizer, description.mean_targets)

    def trained(state: TrainState, step: int) -> LoadedRun:
        return LoadedRun(folder, description, prepared.tokenizers, alone, gather(state.average, mesh), step)

    def sample_now(state: TrainState, step: int) -> None:
        loaded = trained(state, step)  # by all processes together
        if sample is not None and is_first():
            sample(loaded, step)

    verification = BackgroundVerification(prepared.paths, prepared.is_one_to_one)

    def step(state: TrainState, batch: Any) -> tuple[TrainState, Metrics]:
        verification.require_undamaged()
        return pretraining.step(state, batch)

    if is_first():
        verification.start()
    state = train_loop(
        step,
        state,
        batches,
        num_steps=description.num_steps,
        folder=folder,
        config=config.loop,
        items=batches.num_tokens,
        sample=sample_now if sample else None,
        describe=batches.describe,
        milestone=last_step_before_decay(config.optimizer, batches),
        watched="loss_per_target",
        to_devices=partial(rows_to_devices, mesh=mesh, parts=config.accumulate),
    )
    verification.require_undamaged(wait=True)
    return trained(state, description.num_steps)


def _new_description(
    config: TrainConfig, prepared: Prepared, batches: Batches, data: Path, init_from: Path | None
) -> tuple[RunDescription, list[DatasetUse]]:
    """The description of a run as if it were new, and the use that it makes of each dataset."""
    horizon = config.optimizer.horizon_tokens
    num_steps = batches.num_steps(horizon)
    batch_tokens = batches.mean_tokens(num_steps)
    use = batches.dataset_use(num_steps)
    description = RunDescription(
        train=config,
        vocabulary=prepared.tokenizers.vocabulary,
        layouts={dataset.name: prepared.dataset(dataset.name).layout for dataset in use},
        data=str(data.absolute()),
        data_fingerprint=prepared.fingerprint,
        num_steps=num_steps,
        batch_tokens=batch_tokens,
        mean_targets=batches.mean_targets(num_steps, config.masking.joint_probability),
        kappa=config.sde.kappa(batch_tokens, horizon),
        optimizer=config.sde.rescale(config.optimizer, batch_tokens, horizon),
        epochs={dataset.name: dataset.epochs for dataset in use},
        trimask=importlib.metadata.version("trimask"),
        git_commit=git_commit(),
        init_from=None if init_from is None else str(init_from.absolute()),
    )
    return description, use


def _checkpoints_of_decay(folder: Path, description: RunDescription, batches: Batches, state: TrainState) -> list[int]:
    """Steps of the folder's checkpoints from the decay, if the description extends the run there; else none."""
    if description.first_horizon_tokens is None:
        return []
    previous = load_description(folder).train.optimizer
    last_stable = last_step_before_decay(previous, batches)
    is_longer = previous.horizon_tokens < description.train.optimizer.horizon_tokens
    return steps_of_decay(folder, last_stable, state) if is_longer and last_stable is not None else []


def git_commit() -> str | None:
    """Commit of the git checkout that trimask runs from; None if it runs from none."""
    checkout = Path(__file__).parents[2]
    if not (checkout / ".git").exists() or shutil.which("git") is None:
        return None
    result = subprocess.run(
        ["git", "-C", str(checkout), "rev-parse", "HEAD"], capture_output=True, text=True, check=False
    )
    return result.stdout.strip() if result.returncode == 0 else None
