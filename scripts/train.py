"""trimask train: pretrain on prepared data; the same command resumes.

Hyperparameters are stated as they were tuned; --tuned-at names the run where, and its shape, batch and horizon are the
base from which they are transferred to the shape, batch and horizon asked for.
"""

import dataclasses
import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated

import tyro

from trimask.configs.presets import Experiment, preset
from trimask.diffusion.data.batches import BatchConfig, DatasetUse
from trimask.diffusion.data.prepared import Prepared
from trimask.diffusion.optimizer import Knobs
from trimask.diffusion.parametrization import ModuleMultipliers
from trimask.diffusion.pretraining.description import RunDescription, TrainConfig, load_description, transferred
from trimask.diffusion.pretraining.train_run import train
from trimask.diffusion.pretraining.trained_model import LoadedRun
from trimask.diffusion.run.folder import checkpoint_steps
from trimask.diffusion.run.processes import ending_together, is_first, join
from trimask.diffusion.sde import SDEScaling
from trimask.diffusion.transformer import num_parameters
from trimask.scripts import cli
from trimask.scripts.compile_cache import Compiling
from trimask.scripts.console import console, option, parse_from_preset, say, table
from trimask.scripts.output.samples import save_training_samples
from trimask.tokenizers.storage import configuration


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Where to, from what, and how."""

    run: tyro.conf.Positional[Path]
    """Run folder to write: config.json, tokenizers/, checkpoints/, metrics.jsonl, samples/."""
    data: Path
    """Folder that `trimask prepare` wrote."""
    preset: str | None = None
    """Named experiment whose values are the defaults."""
    tuned_at: Path | None = None
    """Run folder in which the hyperparameters were tuned: its values are the defaults, and are transferred."""
    multipliers: Path | None = None
    """The multipliers.json of `trimask study search`."""
    init_from: Path | None = None
    """Run folder whose weights a new run starts from; its vocabulary may have grown since."""
    resume: bool = True
    """Continue the run in the folder; --no-resume refuses a folder that holds checkpoints."""
    config: Annotated[TrainConfig, tyro.conf.arg(name="")]
    compiling: Annotated[Compiling, tyro.conf.arg(name="")] = Compiling()


def run(
    folder: Path, data: Path, config: TrainConfig, *, init_from: Path | None = None, resume: bool = True
) -> LoadedRun:
    """Trains and says where the result is."""
    loaded = train(folder, data, config, save_training_samples, announce=_announce, init_from=init_from, resume=resume)
    if is_first():
        say(f"{num_parameters(loaded.parameters):,} parameters, {loaded.step:,} steps: {folder}")
    return loaded


def _announce(description: RunDescription, use: Sequence[DatasetUse]) -> None:
    """How often each dataset will be seen, and the recipe as it is used, with warnings where something is too much."""
    _print_use(description.train, use)
    _print_recipe(description)


def _print_recipe(description: RunDescription) -> None:
    """The values that the SDE rule makes of those that were tuned, and the distance from the critical batch."""
    tuned, used, sde = description.train.optimizer, description.optimizer, description.train.sde
    batch, horizon, kappa = description.batch_tokens, tuned.horizon_tokens, description.kappa
    base_batch = sde.base_batch_tokens or batch
    base_horizon = sde.base_horizon_tokens or description.tuned_horizon
    rows = [["batch in tokens", f"{base_batch:,.0f}", f"{batch:,.0f}"]]
    rows += [["horizon in tokens", f"{base_horizon:,.0f}", f"{horizon:,}"], ["steps", "", f"{description.num_steps:,}"]]
    rows += [[f.name.replace("_", " "), *(f"{getattr(o, f.name):.5g}" for o in (tuned, used))] for f in fields(Knobs)]
    console.print(table(f"Hyperparameters, at κ = {kappa:.4g}", ["", "as tuned", "as used"], rows))
    if description.first_horizon_tokens is not None:
        say(f"The run is made longer: κ stays that of its first horizon, {description.tuned_horizon:,} tokens.")
    critical = sde.critical_batch(horizon)
    if critical is None:
        say("How large a batch may be is not known: `trimask study critical-batch` measures it.")
    elif batch <= critical:
        say(f"The batch is {critical / batch:.3g} times below the critical one, {critical:,.0f} tokens.")
    else:
        say(
            f"Note: the batch is {batch / critical:.3g} times the critical one, {critical:,.0f} tokens: "
            f"with fewer than {sde.critical_steps:,.0f} steps the loss will be higher."
        )


def _print_use(config: TrainConfig, use: Sequence[DatasetUse]) -> None:
    """How often each dataset will be seen, with a warning where it is too often."""
    rows = [[d.name, f"{d.examples:,}", f"{d.tokens:,}", f"{d.steps:,}", f"{d.epochs:.1f}"] for d in use]
    columns = ["dataset", "training examples", "tokens", "steps", "epochs"]
    console.print(table("To train on", columns, rows))
    often = [d.name for d in use if d.epochs > config.batch.warn_epochs]
    if often:
        limit = f"more than {config.batch.warn_epochs:g} times (batch.warn_epochs)"
        say(f"Note: {' and '.join(often)} will be repeated {limit}, and may be learned by heart.")


def _defaults(experiment: Experiment, arguments: list[str]) -> TrainConfig:
    """The preset's configuration; without one, that of the run whose weights or hyperparameters are taken over."""
    source, tuned = option(arguments, "--init-from", "--init_from"), option(arguments, "--tuned-at", "--tuned_at")
    config = experiment.train
    if tuned is not None:
        if source is not None or option(arguments, "--preset") is not None:
            raise ValueError("--tuned-at gives all values, and goes with neither --preset nor --init-from")
        width, heads = option(arguments, "--model.width"), option(arguments, "--model.num-heads", "--model.num_heads")
        grows = width is not None and width.isdecimal() and heads is None
        config = transferred(load_description(Path(tuned)), int(width or 0) if grows else None)
    elif source is not None and option(arguments, "--preset") is None:
        # What goes on from trained weights is no shorter or longer pretraining: the SDE rule says nothing of it.
        config = dataclasses.replace(load_description(Path(source)).train, sde=SDEScaling())
    if config is not experiment.train:
        batch = dataclasses.replace(config.batch, final_weights={}, anneal_tokens=None, task_weights={})
        config = dataclasses.replace(config, batch=batch)
    multipliers = option(arguments, "--multipliers")
    if multipliers is not None:
        found = configuration.load(Path(multipliers), ModuleMultipliers)
        parametrization = dataclasses.replace(config.parametrization, multipliers=found)
        config = dataclasses.replace(config, parametrization=parametrization)
    # Without the weights: flags of a dictionary that has entries cannot name others.
    return dataclasses.replace(config, batch=dataclasses.replace(config.batch, weights={}))


def with_mixture(config: TrainConfig, usual: BatchConfig, data: Path) -> TrainConfig:
    """The configuration with the usual weights of datasets and tasks that are there, where no others are given."""
    prepared, batch = Prepared(data), config.batch
    weights = {name: weight for name, weight in usual.weights.items() if name in prepared.manifest.datasets}
    tasks = {name: w for name, w in usual.task_weights.items() if name in prepared.tokenizers.vocabulary.tasks}
    batch = dataclasses.replace(batch, weights=weights | batch.weights, task_weights=tasks | batch.task_weights)
    return dataclasses.replace(config, batch=batch)


def _usual(arguments: list[str], preset_name: str | None) -> BatchConfig:
    """Whose mixture is the default: that of the run whose hyperparameters are taken over, or the preset's."""
    tuned = option(arguments, "--tuned-at", "--tuned_at")
    return (preset(preset_name) if tuned is None else load_description(Path(tuned))).train.batch


def _as_it_is(config: TrainConfig, parsed: Arguments, arguments: list[str]) -> TrainConfig:
    """With what a run that is there has and the command does not say.

    The horizon of another run, whose configuration is taken over, may have grown since; how answers are sampled may
    have been chosen by `trimask study sampling --apply`.
    """
    if not checkpoint_steps(parsed.run) or not (parsed.run / "config.json").is_file():
        return config
    there = load_description(parsed.run).train
    if parsed.preset is None and option(arguments, "--optimizer.horizon-tokens", "--optimizer.horizon_tokens") is None:
        optimizer = dataclasses.replace(config.optimizer, horizon_tokens=there.optimizer.horizon_tokens)
        config = dataclasses.replace(config, optimizer=optimizer)
    if not any(word.startswith("--generation") for word in arguments):
        config = dataclasses.replace(config, generation=there.generation)
    return config


def main(arguments: Sequence[str]) -> None:
    """Entry point of the command."""

    def default(experiment: Experiment) -> Arguments:
        return Arguments(run=tyro.MISSING, data=tyro.MISSING, config=_defaults(experiment, list(arguments)))

    with ending_together():
        join()
        parsed = parse_from_preset(default, list(arguments), "train", __doc__ or "")
        config = with_mixture(parsed.config, _usual(list(arguments), parsed.preset), parsed.data)
        config = _as_it_is(config, parsed, list(arguments))
        run(parsed.run, parsed.data, config, init_from=parsed.init_from, resume=parsed.resume)


if __name__ == "__main__":
    sys.exit(cli.main(["train", *sys.argv[1:]]))
