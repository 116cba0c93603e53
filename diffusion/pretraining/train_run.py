"""A pretraining run: everything around the step of `training_step.py`.

A run folder holds config.json (everything resolved), tokenizers/, checkpoints/, metrics.jsonl and tensorboard/: enough
to resume, and to generate from without the data.
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

from trimask.diffusion.data.batches import Batches, DatasetUse
from trimask.diffusion.data.prepared import Prepared
from trimask.diffusion.data.verification import BackgroundVerification
from trimask.diffusion.mesh import gathered, place_rows
from trimask.diffusion.pretraining.description import (
    RunDescription,
    TrainConfig,
    load_description,
    resumed_description,
    write_description,
)
from trimask.diffusion.pretraining.longer import last_step_before_decay, set_aside, steps_of_decay
from trimask.diffusion.pretraining.trained_model import LoadedRun, load
from trimask.diffusion.pretraining.training_step import Pretraining, TrainState, training_batches
from trimask.diffusion.pretraining.warm_start import require_grown, require_same_model
from trimask.diffusion.run.folder import WRITTEN_FIRST, checkpoint_steps, locked, undone_if_empty, writing
from trimask.diffusion.run.metrics import Metrics
from trimask.diffusion.run.processes import is_first, require_agreement, wait_for_all
from trimask.diffusion.run.step_loop import fit
from trimask.diffusion.sde import rescaled


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
    """Trains on prepared data, or resumes, until the horizon; `sample(model, step)` is called at intervals.

    `announce` is told before the first step what is trained how, and how often each dataset will be seen.
    With `init_from` a run that is new starts from the weight average of that run; without `resume` a folder that holds
    checkpoints is refused. A longer horizon than that of the run in the folder makes it longer (`longer.py`).
    """
    prepared = Prepared(data)
    vocabulary = prepared.tokenizers.vocabulary
    mesh = config.mesh.over(jax.devices())
    batches = training_batches(prepared, config, mesh)
    description, use = _described(config, prepared, batches, data, init_from)
    require_agreement(
        {
            "configuration": str(config),
            f"fingerprint of {data}": prepared.fingerprint,  # which may lie elsewhere on another host
            "run to start from": str(init_from),
            f"checkpoints in {folder}": ", ".join(map(str, checkpoint_steps(folder))) or "none",
        }
    )
    with undone_if_empty(folder, *WRITTEN_FIRST), locked(folder):
        description = resumed_description(folder, description, resume)
        pretraining = Pretraining(config, vocabulary, description.kappa, mesh)
        if init_from is None or checkpoint_steps(folder):
            state = pretraining.init()
        else:
            source = load(init_from, description.init_step, mesh)
            require_same_model(source.description.train, config, init_from)
            require_grown(init_from / "tokenizers", prepared.folder / "tokenizers")
            description = dataclasses.replace(description, init_step=source.step)
            state = pretraining.init(source.parameters, source.vocabulary)
        decayed = _decayed(folder, description, batches, state)
        wait_for_all("all know what the folder holds")
        if is_first():
            announce(description, use)
            if decayed:
                set_aside(folder, decayed)
            with writing(folder):
                write_description(folder, description, prepared.tokenizers)
        wait_for_all("the folder holds the beginning of what is trained")

        alone = Pretraining(config, vocabulary, description.kappa)  # to sample with: on one device, whatever the mesh

        def trained(state: TrainState, step: int) -> LoadedRun:
            return LoadedRun(folder, description, prepared.tokenizers, alone, gathered(state.average, mesh), step)

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
        state = fit(
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
            to_devices=partial(place_rows, mesh=mesh, parts=config.accumulate),
        )
        verification.require_undamaged(wait=True)
        return trained(state, description.num_steps)


def _described(
    config: TrainConfig, prepared: Prepared, batches: Batches, data: Path, init_from: Path | None
) -> tuple[RunDescription, list[DatasetUse]]:
    """What config.json says of a new run, and how often it sees each dataset."""
    num_steps = batches.num_steps(config.optimizer.horizon_tokens)
    batch_tokens = batches.mean_tokens(num_steps)
    kappa = config.sde.kappa(batch_tokens, config.optimizer.horizon_tokens)
    use = batches.dataset_use(num_steps)
    description = RunDescription(
        train=config,
        vocabulary=prepared.tokenizers.vocabulary,
        layouts={dataset.name: prepared.dataset(dataset.name).layout for dataset in use},
        data=str(data.absolute()),
        data_fingerprint=prepared.fingerprint,
        num_steps=num_steps,
        batch_tokens=batch_tokens,
        kappa=kappa,
        optimizer=rescaled(config.optimizer, kappa),
        epochs={dataset.name: dataset.epochs for dataset in use},
        trimask=importlib.metadata.version("trimask"),
        git_commit=_git_commit(),
        init_from=None if init_from is None else str(init_from.absolute()),
    )
    return description, use


def _decayed(folder: Path, description: RunDescription, batches: Batches, state: TrainState) -> list[int]:
    """Steps of the checkpoints in the folder that are none of the longer run that is described."""
    if description.first_horizon_tokens is None:
        return []
    before = load_description(folder).train.optimizer
    last_stable = last_step_before_decay(before, batches)
    is_longer = before.horizon_tokens < description.train.optimizer.horizon_tokens
    return steps_of_decay(folder, last_stable, state) if is_longer and last_stable is not None else []


def _git_commit() -> str | None:
    """The commit, where trimask runs from a git checkout."""
    checkout = Path(__file__).parents[2]
    if not (checkout / ".git").exists() or shutil.which("git") is None:
        return None
    result = subprocess.run(
        ["git", "-C", str(checkout), "rev-parse", "HEAD"], capture_output=True, text=True, check=False
    )
    return result.stdout.strip() if result.returncode == 0 else None
