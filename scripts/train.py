"""trimask train: pretrains a model on prepared data; the same command resumes a run that was stopped.

With --tuned-at, the hyperparameters of another run are the defaults, and are transferred from the shape, batch and
horizon of that run to those of the new one.
"""

import dataclasses
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated

import tyro

from trimask.configs.presets import Experiment, preset
from trimask.diffusion.data.batches import BatchConfig, DatasetUse
from trimask.diffusion.data.prepared import Prepared
from trimask.diffusion.optimizer import Hyperparameters
from trimask.diffusion.parametrization import ModuleMultipliers
from trimask.diffusion.pretraining.description import RunDescription, TrainConfig, load_description, transferred_config
from trimask.diffusion.pretraining.train_run import train
from trimask.diffusion.pretraining.trained_model import LoadedRun
from trimask.diffusion.run.folder import checkpoint_steps
from trimask.diffusion.run.processes import ending_together, is_first, join
from trimask.diffusion.schedule import ScheduleConfig
from trimask.diffusion.sde import SDEScaling
from trimask.diffusion.transformer import num_parameters
from trimask.scripts import cli
from trimask.scripts.compile_cache import Compiling
from trimask.scripts.console import console, option, parse_from_preset, say, table
from trimask.scripts.output.samples import save_training_samples
from trimask.tokenizers.storage import configuration

_SCHEDULE_OF_MODALITY = re.compile(r"^--masking\.schedules\.(\w+)\.")
"""A flag of the noise schedule of one modality."""


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Run folder, data and configuration of a training."""

    run: tyro.conf.Positional[Path]
    """Run folder to write: config.json, tokenizers/, checkpoints/, metrics.jsonl, samples/."""
    data: Path
    """Folder of prepared data, which `trimask prepare` wrote."""
    preset: str | None = None
    """Name of an experiment whose values are the defaults. None: general defaults."""
    tuned_at: Path | None = None
    """Run folder in which the hyperparameters were tuned; its values are the defaults, and its hyperparameters are
    transferred to the shape, batch and horizon of this run. None: hyperparameters are used as they are given."""
    multipliers: Path | None = None
    """File multipliers.json that `trimask study search` wrote, with multipliers for each module. None: none."""
    init_from: Path | None = None
    """Run folder whose newest weights a new run starts from; the new vocabulary may be larger. None: random weights."""
    resume: bool = True
    """Resume the run in the folder if there is one; --no-resume refuses a folder that has checkpoints."""
    config: Annotated[TrainConfig, tyro.conf.arg(name="")]
    compiling: Annotated[Compiling, tyro.conf.arg(name="")] = Compiling()


def run(
    folder: Path, data: Path, config: TrainConfig, *, init_from: Path | None = None, resume: bool = True
) -> LoadedRun:
    """Trains or resumes a run, prints where it is, and returns its newest checkpoint."""
    loaded = train(folder, data, config, save_training_samples, announce=_announce, init_from=init_from, resume=resume)
    if is_first():
        say(f"{num_parameters(loaded.parameters):,} parameters, {loaded.step:,} steps: {folder}")
    return loaded


def _announce(description: RunDescription, use: Sequence[DatasetUse]) -> None:
    """Prints how often each dataset will be repeated, and the hyperparameters, with notes on what may be too much."""
    _print_use(description.train, use)
    _print_recipe(description)


def _print_recipe(description: RunDescription) -> None:
    """Prints the tuned hyperparameters and those that the SDE rule makes of them, and the batch's critical size."""
    tuned, used, sde = description.train.optimizer, description.optimizer, description.train.sde
    batch, horizon, kappa = description.batch_tokens, tuned.horizon_tokens, description.kappa
    base_batch = sde.base_batch_tokens or batch
    base_horizon = sde.base_horizon_tokens or description.tuned_horizon
    rows = [["batch in tokens", f"{base_batch:,.0f}", f"{batch:,.0f}"]]
    rows += [["horizon in tokens", f"{base_horizon:,.0f}", f"{horizon:,}"], ["steps", "", f"{description.num_steps:,}"]]
    rows += [
        [f.name.replace("_", " "), *(f"{getattr(o, f.name):.5g}" for o in (tuned, used))]
        for f in fields(Hyperparameters)
    ]
    console.print(table(f"Hyperparameters, at κ = {kappa:.4g}", ["", "as tuned", "as used"], rows))
    if description.first_horizon_tokens is not None:
        first = f"{description.tuned_horizon:,} tokens"
        say(f"The run is extended: κ, the warmup and the loss's N_m stay those of its first horizon, {first}.")
    critical = sde.critical_batch(horizon)
    if critical is None:
        say("The critical batch is not known; `trimask study critical-batch` measures it.")
    elif batch <= critical:
        say(f"The critical batch, {critical:,.0f} tokens, is {critical / batch:.3g} times the batch.")
    else:
        say(
            f"Note: the batch is {batch / critical:.3g} times the critical batch, {critical:,.0f} tokens: "
            f"with fewer than {sde.critical_steps:,.0f} steps the loss will be higher."
        )


def _print_use(config: TrainConfig, use: Sequence[DatasetUse]) -> None:
    """Prints how often each dataset will be repeated, with a note if it is more than `batch.warn_epochs` times."""
    rows = [[d.name, f"{d.examples:,}", f"{d.tokens:,}", f"{d.steps:,}", f"{d.epochs:.1f}"] for d in use]
    columns = ["dataset", "training examples", "tokens", "steps", "epochs"]
    console.print(table("Training data", columns, rows))
    often = [d.name for d in use if d.epochs > config.batch.warn_epochs]
    if often:
        limit = f"more than {config.batch.warn_epochs:g} times (batch.warn_epochs)"
        say(f"Note: {' and '.join(often)} will be repeated {limit}, and may be memorised.")


def _defaults(experiment: Experiment, arguments: list[str]) -> TrainConfig:
    """Default configuration: the preset's, or that of the run named by --tuned-at or, without a preset, --init-from."""
    source, tuned = option(arguments, "--init-from", "--init_from"), option(arguments, "--tuned-at", "--tuned_at")
    config = experiment.train
    if tuned is not None:
        if source is not None or option(arguments, "--preset") is not None:
            raise ValueError("--tuned-at sets all defaults, so it cannot be combined with --preset or --init-from")
        width, heads = option(arguments, "--model.width"), option(arguments, "--model.num-heads", "--model.num_heads")
        grows = width is not None and width.isdecimal() and heads is None
        config = transferred_config(load_description(Path(tuned)), int(width or 0) if grows else None)
    elif source is not None and option(arguments, "--preset") is None:
        # The SDE rule does not apply: training that starts from trained weights is no shorter or longer pretraining.
        config = dataclasses.replace(load_description(Path(source)).train, sde=SDEScaling())
    if config is not experiment.train:
        batch = dataclasses.replace(config.batch, final_weights={}, anneal_tokens=None, task_weights={})
        config = dataclasses.replace(config, batch=batch)
    multipliers = option(arguments, "--multipliers")
    if multipliers is not None:
        found = configuration.load(Path(multipliers), ModuleMultipliers)
        parametrization = dataclasses.replace(config.parametrization, multipliers=found)
        config = dataclasses.replace(config, parametrization=parametrization)
    # Entries of a dictionary of configurations have flags only if they are among the defaults.
    named = {name: ScheduleConfig() for word in arguments for name in _SCHEDULE_OF_MODALITY.findall(word)}
    schedules = {**named, **config.masking.schedules}
    config = dataclasses.replace(config, masking=dataclasses.replace(config.masking, schedules=schedules))
    # Without mixture weights: flags of a dictionary with entries cannot add others.
    return dataclasses.replace(config, batch=dataclasses.replace(config.batch, weights={}))


def with_mixture(config: TrainConfig, default: BatchConfig, data: Path) -> TrainConfig:
    """The configuration with default weights for all datasets and tasks of the data for which it has none."""
    prepared, batch = Prepared(data), config.batch
    weights = {name: weight for name, weight in default.weights.items() if name in prepared.manifest.datasets}
    tasks = {name: w for name, w in default.task_weights.items() if name in prepared.tokenizers.vocabulary.tasks}
    batch = dataclasses.replace(batch, weights=weights | batch.weights, task_weights=tasks | batch.task_weights)
    return dataclasses.replace(config, batch=batch)


def _default_batch(arguments: list[str], preset_name: str | None) -> BatchConfig:
    """Batch configuration with the default mixture: that of the run which --tuned-at names, or the preset's."""
    tuned = option(arguments, "--tuned-at", "--tuned_at")
    return (preset(preset_name) if tuned is None else load_description(Path(tuned))).train.batch


def _as_in_run(config: TrainConfig, parsed: Arguments, arguments: list[str]) -> TrainConfig:
    """The configuration with the horizon and the sampling settings of the run that is resumed, unless they are given.

    The horizon of the run from which defaults are taken may have changed since the run began, and its sampling settings
    may have been chosen by `trimask study sampling --apply`.
    """
    if not checkpoint_steps(parsed.run) or not (parsed.run / "config.json").is_file():
        return config
    resumed = load_description(parsed.run).train
    if parsed.preset is None and option(arguments, "--optimizer.horizon-tokens", "--optimizer.horizon_tokens") is None:
        optimizer = dataclasses.replace(config.optimizer, horizon_tokens=resumed.optimizer.horizon_tokens)
        config = dataclasses.replace(config, optimizer=optimizer)
    if not any(word.startswith("--generation") for word in arguments):
        config = dataclasses.replace(config, generation=resumed.generation)
    return config


def main(arguments: Sequence[str]) -> None:
    """Runs `trimask train` with these arguments."""

    def default(experiment: Experiment) -> Arguments:
        return Arguments(run=tyro.MISSING, data=tyro.MISSING, config=_defaults(experiment, list(arguments)))

    with ending_together():
        join()
        parsed = parse_from_preset(default, list(arguments), "train", __doc__ or "")
        config = with_mixture(parsed.config, _default_batch(list(arguments), parsed.preset), parsed.data)
        config = _as_in_run(config, parsed, list(arguments))
        run(parsed.run, parsed.data, config, init_from=parsed.init_from, resume=parsed.resume)


if __name__ == "__main__":
    sys.exit(cli.main(["train", *sys.argv[1:]]))
