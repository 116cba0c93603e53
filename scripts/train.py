"""trimask train: pretrain on prepared data; the same command resumes."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from trimask.configs.presets import Experiment
from trimask.diffusion.train import Loaded, TrainConfig, train
from trimask.diffusion.transformer import num_parameters
from trimask.scripts import cli
from trimask.scripts.console import console, parse_from_preset
from trimask.scripts.samples import save_training_samples


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Where to, from what, and how."""

    run: tyro.conf.Positional[Path]
    """Run folder to write: config.json, tokenizers/, checkpoints/, metrics.jsonl, samples/."""
    data: Path
    """Folder that `trimask prepare` wrote."""
    preset: str | None = None
    """Named experiment whose values are the defaults."""
    config: Annotated[TrainConfig, tyro.conf.arg(name="")]


def run(folder: Path, data: Path, config: TrainConfig) -> Loaded:
    """Trains and says where the result is."""
    loaded = train(folder, data, config, save_training_samples)
    console.print(f"{num_parameters(loaded.parameters):,} parameters, {loaded.step:,} steps: {folder}")
    return loaded


def main(arguments: Sequence[str]) -> None:
    """Entry point of the command."""

    def default(experiment: Experiment) -> Arguments:
        return Arguments(run=tyro.MISSING, data=tyro.MISSING, config=experiment.train)

    parsed = parse_from_preset(default, list(arguments), "train", __doc__ or "")
    run(parsed.run, parsed.data, parsed.config)


if __name__ == "__main__":
    sys.exit(cli.main(["train", *sys.argv[1:]]))
