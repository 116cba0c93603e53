"""trimask evaluate: what a model can do on held-out data, judged independently of it."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro

from trimask.diffusion import configuration
from trimask.diffusion.data.prepared import Prepared
from trimask.diffusion.evaluate import EvaluateConfig, Evaluation, Samples, evaluate
from trimask.diffusion.train import Loaded, load
from trimask.scripts import cli
from trimask.scripts.console import console, parse, progress_report, table


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Which model on which data."""

    run: tyro.conf.Positional[Path]
    """Run folder that `trimask train` wrote; evaluation.json is written into it."""
    data: Path | None = None
    """Prepared folder with held-out splits. None: the one the run was trained on."""
    checkpoint: int | Literal["best"] | None = None
    """Step of the checkpoint, or the best by the run's best_metric. None: the newest."""
    config: Annotated[EvaluateConfig, tyro.conf.arg(name="")] = field(default_factory=EvaluateConfig)


def run(loaded: Loaded, data: Path, config: EvaluateConfig) -> tuple[Evaluation, list[Samples]]:
    """Evaluates with a progress bar, writes evaluation.json and prints the tables."""
    with progress_report() as report:
        result, samples = evaluate(loaded, Prepared(data), config, report)
    configuration.save(loaded.folder / "evaluation.json", result)
    print_evaluation(result)
    return result, samples


def print_evaluation(result: Evaluation) -> None:
    """The accuracy, bits-per-token and memorisation tables."""
    rows = [
        [
            *(a.task.replace("_", " "), a.split, f"{a.accuracy:.1%}", "{:.1%}–{:.1%}".format(*a.interval)),
            *("equality" if a.judge_on_real is None else f"{a.judge_on_real:.1%}", f"{a.mean_nfe:.1f}"),
            str(a.examples),
        ]
        for a in result.accuracies
    ]
    columns = ["task", "held out", "accuracy", "95 %", "judge on real", "NFE", "examples"]
    console.print(table(f"Accuracy at step {result.step:,}", columns, rows))
    rows = [
        [b.task.replace("_", " "), b.split, f"{b.bits_per_token:.3f} ± {b.half_width:.3f}", str(b.examples)]
        for b in result.bounds
    ]
    console.print(table("Bits per token", ["task", "held out", "bits (95 %)", "examples"], rows))
    rows = [
        [
            *(m.task.replace("_", " "), f"{m.copied:.1%}", f"{m.distinct} of {m.generated}"),
            *(f"{m.real_copied:.1%}", f"{m.real_distinct} of {m.real}"),
        ]
        for m in result.memorisation
    ]
    columns = ["task", "copies of training items", "distinct", "real: copies", "real: distinct"]
    console.print(table("Memorisation", columns, rows))


def main(arguments: Sequence[str]) -> None:
    """Entry point of the command."""
    parsed: Arguments = parse(Arguments, list(arguments), "evaluate", __doc__ or "")
    loaded = load(parsed.run, parsed.checkpoint)
    run(loaded, parsed.data or Path(loaded.description.data), parsed.config)


if __name__ == "__main__":
    sys.exit(cli.main(["evaluate", *sys.argv[1:]]))
