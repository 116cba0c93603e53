"""trimask demo: the whole story, from nothing to a model that writes, draws and speaks."""

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
    """What to make, and where."""

    run: tyro.conf.Positional[Path | None] = None
    """Run folder. None: runs/ and the preset's name."""
    preset: str = "tiny"
    """Named experiment."""
    data: Path | None = None
    """Folder for the prepared data. None: data/ and the preset's name."""
    compiling: Annotated[Compiling, tyro.conf.arg(name="")] = Compiling()


def run(folder: Path, data: Path, experiment: Experiment) -> Path:
    """Prepares, trains, evaluates and reports; what is done already is not done again. Returns the report."""
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
Look and listen:  {report.absolute()}
Or ask it yourself:
  trimask generate {folder} --prompt "a handwritten seven" --to image
  trimask generate {folder} --prompt seven --to audio
  trimask generate {folder} --infill "47+38=__"
  trimask inspect {folder}
"""
    say(lines)


class _Clock:
    """Seconds per stage."""

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
        return " · ".join([*parts, f"all {sum(self.seconds.values()):.0f} s"])


def main(arguments: Sequence[str]) -> None:
    """Entry point of the command."""
    parsed: Arguments = parse(Arguments, list(arguments), "demo", __doc__ or "")
    folder, data = parsed.run or Path("runs", parsed.preset), parsed.data or Path("data", parsed.preset)
    run(folder, data, preset(parsed.preset))


if __name__ == "__main__":
    sys.exit(cli.main(["demo", *sys.argv[1:]]))
