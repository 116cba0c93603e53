"""trimask train: pretrain on prepared data; the same command resumes."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from trimask.configs.presets import PRESETS, Experiment
from trimask.diffusion.train import Loaded, TrainConfig, train
from trimask.diffusion.transformer import num_parameters
from trimask.scripts import cli
from trimask.scripts.console import by_preset, console, parse
from trimask.scripts.samples import save_training_samples


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Where to, from what, and how."""

    run: tyro.conf.Positional[Path]
    """Run folder to write: config.json, tokenizers/, checkpoints/, metrics.jsonl, samples/."""
    data: Path
    """Folder that `trimask prepare` wrote."""
    init_from: Path | None = None
    """Run folder whose weights a new run starts from; its vocabulary may have grown since."""
    resume: bool = True
    """Continue the run in the folder; --no-resume refuses a folder that holds checkpoints."""
    config: Annotated[TrainConfig, tyro.conf.arg(name="")]


def run(folder: Path, data: Path, config: TrainConfig, *, init_from: Path | None = None, resume: bool = True) -> Loaded:
    """Trains and says where the result is."""
    loaded = train(folder, data, config, save_training_samples, init_from=init_from, resume=resume)
    console.print(f"{num_parameters(loaded.parameters):,} parameters, {loaded.step:,} steps: {folder}")
    return loaded


def main(arguments: Sequence[str]) -> None:
    """Entry point of the command."""

    def default(experiment: Experiment) -> Arguments:
        return Arguments(run=tyro.MISSING, data=tyro.MISSING, config=experiment.train)

    parsed = parse(by_preset(PRESETS, default), list(arguments), "train", __doc__ or "")
    run(parsed.run, parsed.data, parsed.config, init_from=parsed.init_from, resume=parsed.resume)


if __name__ == "__main__":
    sys.exit(cli.main(["train", *sys.argv[1:]]))
