"""trimask demo: prepares data, trains, evaluates, and writes a report of a model that writes, draws and speaks."""

import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from trimask.configs.presets import Experiment, preset
from trimask.scripts import cli, evaluate, prepare, train
from trimask.scripts.compile_cache import Compiling
from trimask.scripts.console import console, parse, say
from trimask.scripts.output.report import write_report


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Experiment of the demo, and its folders."""

    run: tyro.conf.Positional[Path | None] = None
    """Run folder to write. None: runs/PRESET."""
    preset: str = "tiny"
    """Name of the experiment, a preset of `trimask train`."""
    data: Path | None = None
    """Folder for the prepared data. None: data/PRESET."""
    compiling: Annotated[Compiling, tyro.conf.arg(name="")] = Compiling()


def run(folder: Path, data: Path, experiment: Experiment) -> Path:
    """Prepares, trains, evaluates and reports, and returns the path of the report. Finished parts are not repeated."""
    clock = _Clock()
    with clock.stage("prepare"):
        prepared = prepare.run(data, experiment.prepare)
    with clock.stage("train"):
        loaded = train.run(folder, data, experiment.train)
    with clock.stage("evaluate"):
        evaluation, samples = evaluate.run(loaded, data, experiment.evaluate)
    with clock.stage("report"):
        report = write_report(folder, evaluation, samples, loaded, prepared)
    _print_next(folder, report)
    console.print(clock.summary())
    return report


def _print_next(folder: Path, report: Path) -> None:
    lines = f"""
Report:  {report.absolute()}
Commands to try next:
  trimask generate {folder} --prompt "a handwritten seven" --to image
  trimask generate {folder} --prompt seven --to audio
  trimask generate {folder} --infill "47+38=__"
  trimask inspect {folder}
"""
    say(lines)


class _Clock:
    """Measures the duration of each stage, in seconds."""

    def __init__(self):
        self.seconds: dict[str, float] = {}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        console.rule(name)
        start = time.perf_counter()
        yield
        self.seconds[name] = time.perf_counter() - start

    def summary(self) -> str:
        parts = [f"{name} {seconds:.0f} s" for name, seconds in self.seconds.items()]
        return " · ".join([*parts, f"total {sum(self.seconds.values()):.0f} s"])


def main(arguments: Sequence[str]) -> None:
    """Runs `trimask demo` with these arguments."""
    parsed: Arguments = parse(Arguments, list(arguments), "demo", __doc__ or "")
    folder, data = parsed.run or Path("runs", parsed.preset), parsed.data or Path("data", parsed.preset)
    run(folder, data, preset(parsed.preset))


if __name__ == "__main__":
    sys.exit(cli.main(["demo", *sys.argv[1:]]))
