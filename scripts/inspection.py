"""trimask inspect: describes prepared data or a run, or makes a page of a trace.

For a folder of prepared data it shows the datasets, the layout of the sequences of each task, the tokens of some
held-out texts, and how well the codecs reconstruct held-out media. For a run it shows the parameters, the newest
metrics and the results of its evaluation. From a trace, which `trimask generate --trace` writes, it makes an HTML page
that shows the generation step by step.
"""

# The module is not called inspect.py: a script that is run by its path would import it in place of the standard one.

import os
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np
import tyro
from rich.table import Table

from trimask.diffusion.data.manifest import DatasetManifest
from trimask.diffusion.data.prepared import Prepared
from trimask.diffusion.data.sources import SourceConfig
from trimask.diffusion.data.splits import TRAIN, is_test
from trimask.diffusion.data.verification import require_undamaged
from trimask.diffusion.evaluation.evaluate_config import EvaluateConfig
from trimask.diffusion.evaluation.exam import label_judge, score_value
from trimask.diffusion.evaluation.results import Evaluation
from trimask.diffusion.parametrization import MODULES, PARAMETER_CLASSES, parameter_modules
from trimask.diffusion.pretraining.trained_model import LoadedRun, load
from trimask.diffusion.run.metrics import read_metrics
from trimask.diffusion.transformer import num_parameters
from trimask.scripts import cli
from trimask.scripts.console import console, parse, progress_report, say, table
from trimask.scripts.evaluate import print_evaluation
from trimask.scripts.output.presentation import presentation_of
from trimask.scripts.output.trajectory import trace_page
from trimask.tokenizers.quality import CodebookUse, codebook_use
from trimask.tokenizers.storage import configuration
from trimask.tokenizers.text import TextTokenizer
from trimask.tokenizers.vocabulary import TEXT, Vocabulary

_SAMPLE_TEXTS = 3
"""Number of texts of each dataset whose tokens are shown."""


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Folder or trace to inspect."""

    folder: tyro.conf.Positional[Path]
    """Folder that `trimask prepare` or `trimask train` wrote, or a trace file that `trimask generate --trace` wrote."""
    verify: bool = False
    """Only verify prepared data: compare every shard with the SHA-256 that was written with it."""


@dataclass(frozen=True, kw_only=True)
class CodecQuality:
    """How well a codec reconstructs the media of one held-out split."""

    medium: str
    split: str
    examples: int
    """Number of media that were encoded and decoded."""
    quality: float | None
    """Mean over examples of the modality's measure of reconstruction, in dB. None: the modality has no measure."""
    judge_on_real: float | None
    """Share of the real media that a judge of the dataset's labels accepts. None: its captions are not labels."""
    judge_on_reconstructed: float | None
    """Share of the media that the judge accepts after encoding and decoding. None: as above."""
    books: list[CodebookUse]
    """Use of each residual codebook."""


def run(folder: Path) -> None:
    """Prints a description of prepared data or a run.

    Raises FileNotFoundError if there is no such folder, and ValueError if it is neither.
    """
    if (folder / "manifest.json").is_file():
        prepared = Prepared(folder)
        if not prepared.is_verified:
            with progress_report() as report:
                prepared.require_verified(report)
        inspect_prepared(prepared)
    elif (folder / "config.json").is_file():
        inspect_run(load(folder))
    elif not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder")
    else:
        raise ValueError(
            f"{folder}: neither prepared data (no manifest.json, which `trimask prepare` writes) "
            "nor a run (no config.json, which `trimask train` writes)"
        )


def verify(prepared: Prepared) -> None:
    """Compares all shards with their SHA-256 and prints that they are intact. Raises Damaged if one is not."""
    with progress_report() as report:
        require_undamaged(prepared.paths, prepared.verify(report))
    shards = sum(len(report.shards) for reports in prepared.reports.values() for report in reports)
    say(f"{prepared.folder}: {shards:,} shards are as they were written")


def inspect_prepared(prepared: Prepared) -> None:
    """Prints datasets, layouts of sequences, tokens of sample texts, and the quality of every codec."""
    datasets, vocabulary = prepared.manifest.datasets, prepared.manifest.vocabulary
    rows = [
        [name, _source(dataset.source), split, f"{examples:,}"]
        for name, dataset in datasets.items()
        for split, examples in dataset.splits.items()
    ]
    console.print(_left(table(f"Datasets in {prepared.folder}", ["dataset", "source", "split", "examples"], rows), 3))
    rows = [
        [task.name.replace("_", " "), name, _layout(task.modalities, dataset), str(dataset.layout.example_length())]
        for name, dataset in datasets.items()
        for task in dataset.tasks(vocabulary)
    ]
    console.print(_left(table("Sequences", ["task", "dataset", "layout", "tokens"], rows), 3))
    _print_vocabulary(vocabulary)
    _print_encodings(prepared)
    measured = [quality for name in datasets for quality in codec_qualities(prepared, name)]
    if measured:
        _print_codecs(measured)


def codec_qualities(prepared: Prepared, dataset: str) -> list[CodecQuality]:
    """Quality of the codec of a dataset's medium on each held-out split; empty for a dataset of texts alone."""
    manifest = prepared.dataset(dataset)
    medium = manifest.medium
    if medium is None:
        return []
    judge = label_judge(prepared, dataset, EvaluateConfig().fit_examples)
    codec, measure, result = prepared.tokenizers.codec(medium), presentation_of(medium).quality, list[CodecQuality]()
    for split in filter(is_test, manifest.splits):
        raw = list(prepared.raw(dataset, split))
        references = [example.media for example in raw]
        real = np.stack([example.media[medium] for example in raw])
        codes = np.stack([record[medium] for record in prepared.examples(dataset, split)])
        ours = codec.decode(codes)
        accuracy = [
            None if judge is None else score_value(judge(medium, list(media), references)) for media in (real, ours)
        ]
        sizes = codec.codebook_sizes
        stages = codes[..., None] if len(sizes) == 1 else codes
        result.append(
            CodecQuality(
                medium=medium,
                split=split,
                examples=len(raw),
                quality=None if measure is None else float(measure.measure(real, ours, codec).mean()),
                judge_on_real=accuracy[0],
                judge_on_reconstructed=accuracy[1],
                books=[codebook_use(stages[..., stage], size) for stage, size in enumerate(sizes)],
            )
        )
    return result


def inspect_run(loaded: LoadedRun) -> None:
    """Prints description, parameters, vocabulary, newest metrics, and the evaluation of a run if there is one."""
    description = loaded.description
    facts = {
        "data": description.data,
        "trimask": description.trimask + (f", commit {description.git_commit[:12]}" if description.git_commit else ""),
        "newest checkpoint": f"step {loaded.step:,} of {description.num_steps:,}",
        "parameters": f"{num_parameters(loaded.parameters):,}",
    }
    console.print(_left(table(f"Run {loaded.folder}", ["what", ""], [list(fact) for fact in facts.items()]), 2))
    rows = [[name.replace("_", " "), f"{count:,}"] for name, count in parameters_per_class(loaded).items()]
    console.print(table("Parameters", ["class", "scalars"], rows))
    _print_vocabulary(loaded.vocabulary)
    if os.path.lexists(loaded.folder / "metrics.jsonl"):
        rows = [[name, f"{value:,.6g}"] for line in read_metrics(loaded.folder)[-1:] for name, value in line.items()]
        console.print(table("Newest metrics", ["metric", "value"], rows))
    if os.path.lexists(loaded.folder / "evaluation.json"):
        print_evaluation(configuration.load(loaded.folder / "evaluation.json", Evaluation))


def parameters_per_class(loaded: LoadedRun) -> dict[str, int]:
    """Number of scalars of each parameter class that occurs."""
    modules = parameter_modules(loaded.pretraining.model(loaded.parameters))
    counts: Counter[str] = Counter()
    for name, leaf in zip(jax.tree.leaves(modules), jax.tree.leaves(loaded.parameters), strict=True):
        counts[MODULES[name]] += leaf.size
    return {name: counts[name] for name in PARAMETER_CLASSES if counts[name]}


def _source(source: SourceConfig) -> str:
    return f"{source.kind} {' '.join(source.where)}"


def _layout(modalities: Sequence[str], dataset: DatasetManifest) -> str:
    parts = [f"<{modality}> {'×'.join(map(str, dataset.layout.shapes[modality]))}" for modality in modalities]
    return " ".join(["<task>", *parts])


def _print_vocabulary(vocabulary: Vocabulary) -> None:
    rows = [[r.modality, f"{r.start:,}–{r.stop - 1:,}", f"{r.stop - r.start:,}"] for r in vocabulary.ranges]
    console.print(table(f"Vocabulary of {vocabulary.size:,} ids", ["modality", "ids", "size"], rows))


def _print_encodings(prepared: Prepared) -> None:
    """Prints a few held-out texts of each dataset, token by token."""
    text, rows = prepared.tokenizers.text, []
    for name, dataset in prepared.manifest.datasets.items():
        split = next(filter(is_test, dataset.splits), TRAIN)
        texts = dict.fromkeys(example.media[TEXT] for example in prepared.raw(name, split))
        rows += [[sample, _pieces(text, sample)] for sample in list(texts)[:_SAMPLE_TEXTS]]
    console.print(_left(table(f"Text tokenizer of {text.size:,} tokens", ["text", "tokens"], rows), 2))


def _pieces(text: TextTokenizer, sample: str) -> str:
    return " · ".join(piece.replace(" ", "␣") for piece in text.decode_batch([i[None] for i in text.encode(sample)]))


def _print_codecs(measured: Sequence[CodecQuality]) -> None:
    rows = [
        [
            *(m.medium, m.split, f"{m.examples:,}", _shown(m)),
            *("" if share is None else f"{share:.1%}" for share in (m.judge_on_real, m.judge_on_reconstructed)),
        ]
        for m in measured
    ]
    columns = ["codec", "held out", "examples", "distance", "judge: real", "reconstructed"]
    measures = [presentation_of(medium).quality for medium in dict.fromkeys(m.medium for m in measured)]
    better = ", ".join(f"{measure.name}: {measure.better}" for measure in measures if measure is not None)
    title = f"Reconstruction by the codecs ({better} is better)" if better else "Reconstruction by the codecs"
    console.print(table(title, columns, rows))
    rows = [
        [f"{m.medium} {number}", m.split, f"{book.used} of {book.size}", f"{book.share:.0%}", f"{book.perplexity:.1f}"]
        for m in measured
        for number, book in enumerate(m.books)
    ]
    console.print(table("Codebook use", ["codebook", "held out", "used", "share", "perplexity"], rows))


def _shown(measured: CodecQuality) -> str:
    """Value and name of the measure of reconstruction; empty if the modality has none."""
    measure = presentation_of(measured.medium).quality
    return "" if measure is None or measured.quality is None else f"{measure.name} {measured.quality:.1f} dB"


def _left(listed: Table, columns: int) -> Table:
    """The table with its first columns left-aligned."""
    for column in listed.columns[:columns]:
        column.justify = "left"
    return listed


def main(arguments: Sequence[str]) -> None:
    """Runs `trimask inspect` with these arguments."""
    parsed: Arguments = parse(Arguments, list(arguments), "inspect", __doc__ or "")
    if parsed.verify:
        verify(Prepared(parsed.folder))
    elif parsed.folder.is_file():
        say(f"page: {trace_page(parsed.folder)}")
    else:
        run(parsed.folder)


if __name__ == "__main__":
    sys.exit(cli.main(["inspect", *sys.argv[1:]]))
