"""trimask prepare: sources → tokenizers and tokenised shards."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from trimask.configs.presets import PRESETS, Experiment
from trimask.diffusion.data.prepare import PrepareConfig, Prepared, prepare
from trimask.scripts import cli
from trimask.scripts.console import by_preset, console, parse, progress_report, table


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Where to, and what."""

    folder: tyro.conf.Positional[Path]
    """Folder to write: tokenizers/, shards and manifest.json."""
    config: Annotated[PrepareConfig, tyro.conf.arg(name="")]


def run(folder: Path, config: PrepareConfig) -> Prepared:
    """Prepares with a progress bar and prints what came out."""
    with progress_report() as report:
        prepared = prepare(folder, config, report)
    rows = []
    for name, dataset in prepared.manifest.datasets.items():
        splits = " · ".join(f"{split} {content.examples:,}" for split, content in dataset.splits.items())
        shapes = ", ".join(f"{modality} {'×'.join(map(str, shape))}" for modality, shape in dataset.shapes.items())
        rows.append([name, splits, shapes, str(dataset.example_length)])
    console.print(table(f"Prepared in {folder}", ["dataset", "examples", "codes", "tokens each"], rows))
    return prepared


def main(arguments: Sequence[str]) -> None:
    """Entry point of the command."""

    def default(experiment: Experiment) -> Arguments:
        return Arguments(folder=tyro.MISSING, config=experiment.prepare)

    parsed = parse(by_preset(PRESETS, default), list(arguments), "prepare", __doc__ or "")
    run(parsed.folder, parsed.config)


if __name__ == "__main__":
    sys.exit(cli.main(["prepare", *sys.argv[1:]]))
