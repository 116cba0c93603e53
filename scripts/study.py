"""trimask study: runs one of the experiments behind the claims of the documentation.

A study writes its report OUT/README.md, figures, tables as CSV, its configuration and trials.jsonl, from which the same
command resumes if it is stopped.
"""

import dataclasses
import datetime
import platform
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import tyro
from rich.markdown import Markdown

from trimask.configs.studies import DATA, STUDIES
from trimask.diffusion.data.prepared import Prepared
from trimask.diffusion.pretraining.description import load_description
from trimask.diffusion.run.folder import undone_if_empty, writing
from trimask.diffusion.studies.trials import Trials
from trimask.scripts import cli, prepare
from trimask.scripts.console import console, option, parse, progress_report, say
from trimask.scripts.train import with_mixture
from trimask.tokenizers.storage import configuration
from trimask.tokenizers.storage.files import write_text
from trimask.tokenizers.storage.ranges import Checked, Workers


@dataclass(frozen=True, kw_only=True)
class Options(Checked):
    """Options that all studies have."""

    out: tyro.conf.Positional[Path]
    """Folder to write the results to."""
    data: Path | None = None
    """Folder that `trimask prepare` wrote. None: the data of the model's run, or, for studies that train models, the
    embedded digits and words, prepared in OUT/data."""
    preset: Literal["cpu", "accelerator"] = "cpu"
    """Preset with the default values: cpu, for two cores and half an hour, or accelerator, with larger models."""
    workers: Workers | None = None
    """Number of worker processes; 0: all is computed in this process. None: one per core on a CPU, 0 on an
    accelerator."""


def run(name: str, options: Options, config: Any, command: str) -> str:
    """Runs a study, writes and prints its report, and returns it.

    `command` is the command line, for the report.
    """
    out, study = options.out, STUDIES[name]
    data = options.data
    if data is None and "run" in _fields(config):
        data = Path(load_description(Path(config.run)).data)
    elif data is None:
        data = out / "data"
        prepare.run(data, DATA)
    if _trains(config):
        preset_batch = study.presets[options.preset]().base.batch
        config = dataclasses.replace(config, base=with_mixture(config.base, preset_batch, data))
    with undone_if_empty(out, "config.json"):
        with writing(out):
            out.mkdir(parents=True, exist_ok=True)
            configuration.save(out / "config.json", config)
        with progress_report() as report, Trials(out, data, options.workers, report) as trials:
            Prepared(data).require_verified(report)
            report_text = study.run(config, trials)
    figures = "\n".join(f"![{path.stem}]({path.name})" for path in sorted(out.glob("*.png")))
    where = f"{platform.machine()}, {jax.devices()[0].device_kind}, jax {jax.__version__}"
    text = f"# {name}\n\n`{command}`, {datetime.date.today()}, {where}\n\n{report_text}\n\n{figures}\n"
    with writing(out):
        write_text(out / "README.md", text)
    console.print(Markdown(report_text))
    say(f"Figures, tables and this report: {out}")
    return report_text


def _trains(config: Any) -> bool:
    """Whether the study trains models, rather than measuring one that is trained."""
    return "base" in _fields(config)


def _fields(config: Any) -> set[str]:
    return {field.name for field in dataclasses.fields(config)}


def _without_weights(config: Any) -> Any:
    """The configuration without mixture weights: flags of a dictionary with entries cannot add others."""
    if not _trains(config):
        return config
    batch = dataclasses.replace(config.base.batch, weights={})
    return dataclasses.replace(config, base=dataclasses.replace(config.base, batch=batch))


def main(arguments: Sequence[str]) -> None:
    """Runs `trimask study` with these arguments."""
    listed = "\n".join(f"  {name:22} {study.summary}" for name, study in STUDIES.items())
    name, *rest = arguments or ["--help"]
    if name in ("-h", "--help"):
        say(f"{__doc__}\nusage: trimask study NAME OUT [options]\n\nstudies:\n{listed}")
        return
    if name not in STUDIES:
        raise ValueError(f"no study {name!r}; there are {', '.join(STUDIES)}")
    presets = STUDIES[name].presets
    chosen = option(rest, "--preset") or "cpu"
    default = _without_weights(presets[chosen if chosen in presets else "cpu"]())
    kind = dataclasses.make_dataclass(
        "Arguments",
        [("config", Annotated[type(default), tyro.conf.arg(name="")], default)],
        bases=(Options,),
        frozen=True,
        kw_only=True,
    )
    description = f"{name}: {STUDIES[name].summary}\n\n{__doc__}"
    parsed: Any = parse(kind, rest, f"study {name}", description)
    run(name, parsed, parsed.config, shlex.join(["trimask", "study", *arguments]))


if __name__ == "__main__":
    sys.exit(cli.main(["study", *sys.argv[1:]]))
