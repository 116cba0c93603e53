"""trimask study: runs one of the experiments behind the claims of the documentation.

A study writes its report OUT/README.md, figures, tables as CSV, its configuration and trials.jsonl, from which the same
command resumes if it is stopped. Trials record validation only. Of sampling, unmasking and policies the same command
with --final scores what the study chose on the test split, once, and adds the score to OUT/verdict.json and the report.
"""

import dataclasses
import datetime
import functools
import json
import platform
import shlex
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import tyro
from rich.markdown import Markdown

from trimask.configs.studies import STUDIES
from trimask.diffusion.data.prepare_config import PrepareConfig
from trimask.diffusion.data.prepared import Prepared
from trimask.diffusion.pretraining.description import load_description
from trimask.diffusion.run.folder import locked, undone_if_empty, writing
from trimask.diffusion.studies.claims import Findings
from trimask.diffusion.studies.final import page_of_verdict, score_test
from trimask.diffusion.studies.trials import Trials
from trimask.diffusion.studies.verdict import load_verdict, record_claims
from trimask.scripts import cli, prepare
from trimask.scripts.console import console, option, parse, progress_report, say
from trimask.scripts.train import with_mixture
from trimask.tokenizers.storage import configuration
from trimask.tokenizers.storage.files import printable, write_text
from trimask.tokenizers.storage.json_text import read_json
from trimask.tokenizers.storage.ranges import Checked, Workers

_STUDY = "study"
"""Field of config.json that names the study."""


@dataclass(frozen=True, kw_only=True)
class Options(Checked):
    """Options that all studies have."""

    out: tyro.conf.Positional[Path]
    """Folder to write the results to."""
    data: Path | None = None
    """Folder that `trimask prepare` wrote. None: the data of the model's run, or, for studies that train models,
    embedded digits and words, or a stream of new ones, prepared in OUT/data."""
    preset: Literal["cpu", "accelerator"] = "cpu"
    """Preset with the default values: cpu, for two cores and half an hour (hours for masks, schedules and policies),
    or accelerator, with larger models."""
    workers: Workers | None = None
    """Number of worker processes; 0: all is computed in this process. None: one per core on a CPU, 0 on an
    accelerator."""
    final: bool = False
    """Score what the complete study chose on the test split, and write the score with its date to OUT/verdict.json; for
    sampling, unmasking and policies."""
    again: bool = False
    """With --final: score the test split although it was scored by the same rule before. The report says so."""
    show: bool = False
    """Draw the report again from what OUT holds, with the configuration of OUT/config.json; nothing is measured."""

    def __post_init__(self):
        super().__post_init__()
        if self.again and not self.final:
            raise ValueError("--again is for --final, which is missing")
        if self.show and self.final:
            raise ValueError("--show measures nothing; leave out --final or --show")


def run(name: str, options: Options, config: Any, command: str) -> str:
    """Runs a study, writes and prints its report, and returns it.

    `command` is the command line, for the report.
    """
    out, study = options.out, STUDIES[name]
    if options.final and study.final is None:
        able = ", ".join(other for other, one in STUDIES.items() if one.final is not None)
        raise ValueError(f"the study {name} has no score on the test split; --final is for {able}")
    adds = not (options.final or options.show)
    _require_own(out, name)
    data = _data(options, config, study.data, adds)
    if _trains(config) and not options.show:
        preset_batch = study.presets[options.preset]().base.batch
        config = dataclasses.replace(config, base=with_mixture(config.base, preset_batch, data))
    with (
        undone_if_empty(out, "config.json"),
        progress_report() as report,
        Trials(out, data, options.workers, report, adds=adds) as trials,
        nullcontext() if options.show else locked(out),
    ):
        if trials.may_add and not (out / "config.json").exists():
            _save_config(out, name, config)
        Prepared(data).require_verified(report)
        found = study.run(config, trials)
        if trials.may_add:
            _save_config(out, name, config)  # not before: what fails at once must not replace that of a complete study
        if isinstance(found, Findings):
            if trials.may_add:
                record_claims(trials, found.claims, command)
            found = found.report
        if options.final and study.final is not None:
            score = functools.partial(study.final.score, config, trials)
            score_test(study.final.rule(config), score, trials, options.again)
        verdict = load_verdict(out)
        took = f"All trials together took {verdict.seconds / 60:.0f} minutes." if verdict.seconds else ""
        report_text = "\n\n".join(filter(None, (found, took, page_of_verdict(verdict))))
        is_new = trials.may_add
    figures = "\n".join(f"![{path.stem}]({path.name})" for path in sorted(out.glob("*.png")))
    where = f"{platform.machine()}, {jax.devices()[0].device_kind}, jax {jax.__version__}"
    made = f"`{command}`, {datetime.date.today()}, {where}"
    made = made if is_new else _made_before(out) or made
    with writing(out):
        write_text(out / "README.md", f"# {name}\n\n{made}\n\n{report_text}\n\n{figures}\n")
    console.print(Markdown(report_text))
    say(f"Figures, tables and this report: {out}")
    return report_text


def _require_own(out: Path, name: str) -> None:
    """Raises ValueError if a folder holds another study, as its config.json or the title of its page says."""
    page, path = out / "README.md", out / "config.json"
    owner = read_json(path).get(_STUDY) if path.is_file() else None
    if owner is None and page.is_file():
        title = page.read_text(encoding="utf-8", errors="replace").partition("\n")[0].removeprefix("# ")
        owner = title if title in STUDIES else None
    if owner not in (None, name):
        raise ValueError(f"{out} holds the study {printable(str(owner))}; choose another folder for {name}")


def _save_config(out: Path, name: str, config: Any) -> None:
    """Writes config.json, with the name of the study."""
    with writing(out):
        out.mkdir(parents=True, exist_ok=True)
        content = {_STUDY: name} | configuration.to_dict(config)
        write_text(out / "config.json", json.dumps(content, indent=2) + "\n")


def _load_config(out: Path, kind: type) -> Any:
    """Configuration in config.json of a study's folder, which is of the dataclass `kind`."""
    path = out / "config.json"
    content = {name: value for name, value in read_json(path).items() if name != _STUDY}
    return configuration.from_dict(content, kind, str(path))


def _data(options: Options, config: Any, default: PrepareConfig, prepares: bool) -> Path:
    """Folder of the prepared data: the named one, else that of the model's run, else OUT/data, which is prepared.

    Raises FileNotFoundError if nothing is to be prepared, and there is none.
    """
    if options.data is not None:
        return options.data
    if "run" in _fields(config):
        return Path(load_description(Path(config.run)).data)
    data = options.out / "data"
    if prepares:
        prepare.run(data, default)
    elif not data.exists():
        raise FileNotFoundError(f"{data}: there are no prepared data; --data names those of the study")
    return data


def _made_before(out: Path) -> str | None:
    """Command, date and machine of the measurements, as the report in OUT says them; None if there is no report."""
    path = out / "README.md"
    parts = path.read_text(encoding="utf-8", errors="replace").split("\n\n") if path.is_file() else []
    return parts[1] if len(parts) > 1 else None


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
    config = parsed.config
    if parsed.show:
        if config != default:
            raise ValueError("--show takes the configuration of OUT/config.json; leave out flags that change it")
        _require_own(parsed.out, name)
        config = _load_config(parsed.out, type(default))
    run(name, parsed, config, shlex.join(["trimask", "study", *arguments]))


if __name__ == "__main__":
    sys.exit(cli.main(["study", *sys.argv[1:]]))
