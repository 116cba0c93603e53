"""trimask prepare: turns your files, or the embedded datasets, into tokens for training.

If it is stopped, the same command resumes.
"""

import dataclasses
import glob
import os
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro

from trimask.configs.presets import Experiment
from trimask.diffusion.data.modalities import MODALITIES, modality
from trimask.diffusion.data.prepare import prepare
from trimask.diffusion.data.prepare_config import PrepareConfig
from trimask.diffusion.data.prepared import Prepared
from trimask.diffusion.data.readers.texts import files_in_other_case, json_like_files
from trimask.diffusion.data.records import BadRecord
from trimask.diffusion.data.sources import SourceConfig, folder_kind
from trimask.diffusion.data.splits import is_used_by_default, split_of_folder
from trimask.scripts import cli
from trimask.scripts.console import console, joined, parse_from_preset, progress_report, say, table

_STRETCHED = 2
"""Ratio of the longest text to the 99 % quantile of lengths from which a remark is printed."""


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Folder to write, and sources of the data.

    A source is NAME=PATH, which names the dataset, or PATH alone, whose last part is then the name.
    """

    folder: tyro.conf.Positional[Path]
    """Folder to write: tokenizers/, shards and manifest.json."""
    preset: str | None = None
    """Name of an experiment whose values, sources included, are the defaults. None: no preset."""
    images: tuple[str, ...] = ()
    """Folders of pictures, each with a metadata.jsonl of file_name and text."""
    audio: tuple[str, ...] = ()
    """Folders of sounds, each with a metadata.jsonl of file_name and text."""
    media: tuple[str, ...] = ()
    """Folders of media of any modality, written MODALITY:FOLDER or MODALITY:NAME=FOLDER. --images FOLDER is short for
    --media image:FOLDER, and --audio FOLDER for --media audio:FOLDER."""
    text: tuple[str, ...] = ()
    """Text files (.txt or .jsonl); those without a NAME form one dataset, text."""
    prompts: tuple[str, ...] = ()
    """Files of JSON lines with prompt and response; those without a NAME form one dataset, prompts."""
    tfds: tuple[str, ...] = ()
    """Names of datasets of TensorFlow Datasets."""
    config: Annotated[PrepareConfig, tyro.conf.arg(name="")]

    def resolved(self) -> PrepareConfig:
        """The configuration with the sources of all flags added. Raises ValueError if two have the same name."""
        sources = dict(self.config.sources)
        for kind in SOURCE_FLAGS:
            for given_kind, given in _by_kind(kind, getattr(self, kind)).items():
                for name, where in _named(given_kind, given).items():
                    if name in sources:
                        raise ValueError(f"two sources are named {name}; rename one with --{kind} NAME={where[0]}")
                    sources[name] = SourceConfig(kind=given_kind, where=where)
        return dataclasses.replace(self.config, sources=sources)


SOURCE_FLAGS = tuple(field.name for field in dataclasses.fields(Arguments) if field.default == ())
"""Flags that name sources. Each is called as their kind, but `media`, which names the kind itself."""


def _by_kind(flag: str, given: Sequence[str]) -> dict[str, list[str]]:
    """Kind of source → sources that a flag gives; for --media the kind is that of the modality's folders."""
    if flag != "media":
        return {flag: list(given)}
    kinds: dict[str, list[str]] = {}
    for word in given:
        medium, colon, source = word.partition(":")
        if not colon or medium not in MODALITIES:
            known = ", ".join(MODALITIES)
            raise ValueError(f"--media takes MODALITY:[NAME=]FOLDER, with modality one of {known}; got {word!r}")
        kinds.setdefault(folder_kind(medium), []).append(source)
    return kinds


def _named(kind: str, given: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Name of the dataset → its paths, made absolute, or its TFDS name.

    Raises ValueError if a source is empty, its name is that of a split, or two have the same name.
    """
    named: dict[str, tuple[str, ...]] = {}
    for source in given:
        name, equals, where = source.partition("=")
        is_path = kind != "tfds" and (os.path.lexists(source) or bool(glob.glob(source, recursive=True)))
        if not equals or not name.isidentifier() or is_path:
            name, where = "", source
        if not where:
            raise ValueError(f"--{kind} needs a path or a name of a dataset, got {source!r}")
        if kind != "tfds":
            where = str(Path(where).absolute())
        if not name:
            name = kind if kind in ("text", "prompts") else _as_name(where)
            if split_of_folder(name) is not None:
                raise ValueError(
                    f"--{kind} {source}: {name} is the name of a split. Give the parent folder, whose {name}/ is then "
                    f"that split, or name the dataset otherwise with NAME={source}"
                )
        if name in named and kind not in ("text", "prompts"):
            raise ValueError(f"two sources are named {name}; rename one with --{kind} NAME={source}")
        named[name] = (*named.get(name, ()), where)
    return named


def _as_name(where: str) -> str:
    """Identifier made of the last part of a path, or of a TFDS name."""
    word = "".join(c if c.isalnum() else "_" for c in Path(where.partition(":")[0]).name).strip("_")
    return word if word.isidentifier() else f"data_{word}"


def run(folder: Path, config: PrepareConfig) -> Prepared:
    """Prepares data with a progress bar, and prints a table of the datasets and remarks on them.

    Raises ValueError, with a hint how to go on, for a record that cannot be read.
    """
    try:
        with progress_report() as report:
            prepared = prepare(folder, config, report)
    except BadRecord as error:
        hint = "correct it, or use --on-error skip, which lists such records in rejects.jsonl and goes on"
        raise ValueError(f"{error}\n{hint}") from error
    rows = []
    for name, dataset in prepared.manifest.datasets.items():
        splits = " · ".join(f"{split} {examples:,}" for split, examples in dataset.splits.items())
        layout, media = dataset.layout, ""
        shapes = ", ".join(f"{name} {'×'.join(map(str, shape))}" for name, shape in layout.shapes.items())
        if dataset.medium is not None:
            media = modality(dataset.medium).describe_shape(
                tuple(prepared.plan.media_shapes[name]), prepared.config.media
            )
        accepted = dataset.records - dataset.rejected
        counts = f"{dataset.records:,} = {accepted:,} + {dataset.rejected:,}"
        length = f"{'' if layout.is_uniform else '≤ '}{layout.example_length()}"
        rows.append([name, counts, splits, media, shapes, length])
    columns = ["dataset", "records = used + rejected", "examples", "media", "codes", "tokens each"]
    console.print(table(f"Prepared in {folder}", columns, rows))
    if any(dataset.rejected for dataset in prepared.manifest.datasets.values()):
        say(f"Rejected records, with reasons: {folder / 'rejects.jsonl'}")
    for remark in remarks(prepared):
        say(remark)
    return prepared


def remarks(prepared: Prepared) -> Iterator[str]:
    """Remarks on prepared data that the table does not show, such as unused files and contents in several splits."""
    for name, dataset in prepared.manifest.datasets.items():
        unused = [split for split in dataset.splits if not is_used_by_default(split)]
        if unused:
            yield f"{name}: only `trimask evaluate --splits` uses {_listed(unused)}"
        if dataset.unread:
            files = [f"{count:,} in {place}" for place, count in dataset.unread.items()]
            yield f"{name}: files that no record names, and that are therefore not read: {_listed(files)}"
        for split, others in dataset.shared.items():
            for other, count in others.items():
                yield (
                    f"{name}: {count:,} of the {dataset.splits[split]:,} examples of {split} have the same content as "
                    f"examples of {other}; --splits.by content puts equal contents into one split"
                )
        for what, count in sum((Counter(report.lost) for report in prepared.reports[name]), Counter[str]()).items():
            yield f"{name}: {count:,} examples lose their {what}, which the data that the tokenizer was fitted on lack"
        if dataset.source.kind in ("text", "prompts"):
            for path in files_in_other_case(dataset.source.where):
                yield f"{name}: {path} differs from a given name in upper and lower case only, and is not read"
        if dataset.source.kind == "text":
            for path in json_like_files(dataset.source.where):
                yield f"{name}: {path} looks like JSON lines and is read as plain text; name it .jsonl to read a field"
        yield from _outliers(name, prepared)
    for held_out, others in prepared.manifest.shared.items():
        name, _, split = held_out.partition("/")
        for other, count in others.items():
            yield (
                f"{name}: {count:,} of the {prepared.dataset(name).splits[split]:,} examples of {split} have the same "
                f"content as examples of train of {other.partition('/')[0]}; --splits.by content puts equal contents "
                "into one split"
            )


def _outliers(name: str, prepared: Prepared) -> Iterator[str]:
    """Remark on a few long texts that make the rows of all texts long."""
    layout = prepared.dataset(name).layout
    shards = [shard for report in prepared.reports[name] for shard in report.shards.values()]
    text, given = (np.concatenate([getattr(s, f"{what}_tokens") for s in shards]) for what in ("text", "given"))
    lengths, what, flag = text, "text", "--max-text-tokens"
    if layout.fill == "answer":
        lengths, what, flag = text - given + 1, "response, with its end,", "--response-tokens"
    most = int(np.quantile(lengths, 0.99, method="higher"))
    if layout.fill != "none" and lengths.max() >= _STRETCHED * most:
        yield (
            f"{name}: the longest {what} has {lengths.max():,} tokens, 99 % have at most {most:,}, and every row is as "
            f"long as the longest; {flag} {most} --on-error skip would leave out {int((lengths > most).sum()):,} texts"
        )


def _listed(words: Sequence[str]) -> str:
    return " and ".join(words) if len(words) < 3 else f"{', '.join(words[:-1])} and {words[-1]}"


def main(arguments: Sequence[str]) -> None:
    """Runs `trimask prepare` with these arguments."""

    def default(experiment: Experiment) -> Arguments:
        return Arguments(folder=tyro.MISSING, config=experiment.prepare)

    given = joined(list(arguments), *(f"--{kind}" for kind in SOURCE_FLAGS), "--splits.held-out")
    parsed = parse_from_preset(default, given, "prepare", __doc__ or "")
    run(parsed.folder, parsed.resolved())


if __name__ == "__main__":
    sys.exit(cli.main(["prepare", *sys.argv[1:]]))
