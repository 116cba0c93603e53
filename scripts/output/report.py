"""Writes a report of a trained and evaluated run, with generated media to look at and listen to.

digits.png      generated pictures, wrong ones framed
unmasking.gif   animation of one picture being generated
words/*.wav     generated media of all other modalities, one for each prompt
text.txt        generated texts
loss.png        loss and bits per token in training
accuracy.png    accuracies with intervals
report.html     all of these in one page
"""

from collections.abc import Iterator, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import numpy as np
from PIL import Image, ImageDraw

from trimask.diffusion.data.prepared import Prepared
from trimask.diffusion.evaluation.results import Evaluation, Samples
from trimask.diffusion.pretraining.trained_model import LoadedRun
from trimask.diffusion.run.metrics import read_metrics
from trimask.diffusion.sampling.prompts import Prompts
from trimask.diffusion.transformer import num_parameters
from trimask.scripts.evaluate import shown_bits, shown_score
from trimask.scripts.output.answers import file_stem
from trimask.scripts.output.media_files import (
    data_uri,
    enlarged,
    enlargement,
    image_grid,
    png_bytes,
    write_animation,
    write_png,
)
from trimask.scripts.output.plots import plot_accuracy, plot_loss, training_seconds
from trimask.scripts.output.presentation import PRESENTATIONS, frame_of, presentation_of
from trimask.tokenizers.storage import configuration
from trimask.tokenizers.storage.files import write_text
from trimask.tokenizers.vocabulary import TEXT

_TEMPLATE = Path(__file__).with_name("report.html.jinja")
_PICTURES = 40
"""Number of pictures in digits.png, over all datasets."""
_SHOWN_WORDS = 24
"""Number of files of words/ that the page shows."""
_SHOWN_LINES = 12
"""Number of texts of each task that the page shows."""
_WRONG = (214, 48, 49)
"""Colour of the frame of a wrong picture, in RGB."""


class Word(NamedTuple):
    """A generated sound, or medium of a further modality, for the page."""

    prompt: str
    is_right: bool | None
    """None: no judge has decided."""
    file: Path
    picture: Image.Image


class ReportLine(NamedTuple):
    """A generated text, for the page."""

    prompt: str
    """The given beginning of the text, or the condition's modality in brackets."""
    answer: str
    expected: str
    """The text of the real example."""
    is_right: bool | None
    """None: no judge has decided."""


class Written(NamedTuple):
    """Generated texts of one task and split."""

    title: str
    lines: list[ReportLine]


def write_report(
    run: Path, evaluation: Evaluation, samples: Sequence[Samples], loaded: LoadedRun, prepared: Prepared
) -> Path:
    """Writes all files of the report to the run folder, and returns the path of report.html.

    Raises ValueError if metrics.jsonl has no complete line of a training.
    """
    metrics = _whole_lines(run)
    target = {name: task.target for name, task in loaded.vocabulary.tasks.items()}
    drawn = [sample for sample in samples if target[sample.task] == "image"]
    spoken = [sample for sample in samples if target[sample.task] not in (TEXT, "image")]
    written = [_written(sample, prepared) for sample in samples if target[sample.task] == TEXT]
    _write_drawings(run, drawn, loaded)
    words = _write_words(run / "words", spoken, loaded)
    write_text(run / "text.txt", "\n".join(map(_as_text, written)))
    plot_loss(run / "loss.png", metrics)
    plot_accuracy(run / "accuracy.png", evaluation.scores)
    page = _page(
        evaluation=evaluation,
        step=loaded.step,
        parameters=num_parameters(loaded.parameters),
        seconds=training_seconds(metrics),
        tokens=metrics[-1]["tokens"],
        settings=list(_flat(configuration.to_dict(loaded.description.train))),
        description=loaded.description,
        has_drawings=bool(drawn),
        words=words[:_SHOWN_WORDS],
        more_words=len(words[_SHOWN_WORDS:]),
        written=[Written(title, lines[:_SHOWN_LINES]) for title, lines in written],
        shown=shown_score,
        bits=shown_bits,
        uri=lambda name: file_uri(run / name),
        picture_uri=lambda picture: data_uri("image/png", png_bytes(picture)),
    )
    path = run / "report.html"
    write_text(path, page)
    return path


def _whole_lines(run: Path) -> list[dict[str, Any]]:
    """Lines of metrics.jsonl with all metrics that the report needs. Raises ValueError if there are none."""
    lines = read_metrics(run)
    whole = [line for line in lines if {"loss", "tokens"} <= line.keys() and line.get("tokens_per_second", 0) > 0]
    if not whole:
        raise ValueError(
            f"{run / 'metrics.jsonl'}: none of its {len(lines)} lines has the step, loss, tokens and tokens_per_second "
            "of a training, so there is nothing to report"
        )
    return whole


def file_uri(path: Path) -> str:
    """Data URI with the content of a file."""
    kinds = {".png": "image/png", ".gif": "image/gif", ".wav": "audio/wav"}
    kind = kinds.get(path.suffix, "application/octet-stream")
    return data_uri(kind, path.read_bytes())


def _page(**content: Any) -> str:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_TEMPLATE.parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(_TEMPLATE.name).render(content)


def _write_drawings(run: Path, drawn: Sequence[Samples], loaded: LoadedRun) -> None:
    """Writes digits.png with pictures of all datasets, and unmasking.gif of the first, if pictures were generated."""
    pictures, captions = [], []
    for sample in drawn:
        height, width = sample.media[0].shape[:2]
        scale = enlargement(height, width, wanted=90)
        for i in _in_turn(sample.references)[: _PICTURES // len(drawn)]:
            is_wrong = sample.is_right is not None and not sample.is_right[i]
            pictures.append(_framed(enlarged(sample.media[i], scale), is_wrong))
            captions.append(f"✗ {sample.references[i]}" if is_wrong else sample.references[i])
    if drawn:
        write_png(run / "digits.png", image_grid(pictures, captions, columns=5, scale=1))
        _write_unmasking(run / "unmasking.gif", drawn[0], loaded)


def _write_unmasking(path: Path, sample: Samples, loaded: LoadedRun) -> None:
    """Writes an animation of the first prompt whose picture was right, generated again step by step."""
    prompt = sample.references[0 if sample.is_right is None else int(np.argmax(sample.is_right))]
    asked = Prompts(loaded.tokenizers, loaded.description.layouts).from_text(prompt, "image")
    generator = loaded.generator(rows=1)
    (states,) = generator.trajectories([asked], loaded.generation("image"), seed=0)
    write_animation(path, [frame_of(loaded.tokenizers, state.example) for state in states], 200)


def _in_turn(references: Sequence[str]) -> list[int]:
    """Indices of the items: the first with each reference, then the second with each, …"""
    items: dict[str, list[int]] = {}
    for number, reference in enumerate(references):
        items.setdefault(reference, []).append(number)
    return [number for turn in zip_longest(*items.values()) for number in turn if number is not None]


def _framed(picture: Image.Image, is_wrong: bool) -> np.ndarray:
    """The picture, with a coloured frame if it is wrong."""
    if is_wrong:
        ImageDraw.Draw(picture).rectangle((0, 0, picture.width - 1, picture.height - 1), outline=_WRONG, width=4)
    return np.asarray(picture)


def _write_words(folder: Path, spoken: Sequence[Samples], loaded: LoadedRun) -> list[Word]:
    """Writes the first answer to each prompt, after removing those of an earlier report."""
    folder.mkdir(exist_ok=True)
    for old in [path for entry in PRESENTATIONS.values() for path in folder.glob(f"*.{entry.ending}")]:
        old.unlink()
    words, stems = [], set[str]()
    for sample in spoken:
        first = {reference: i for i, reference in reversed(list(enumerate(sample.references)))}
        for prompt in dict.fromkeys(sample.references):
            i, stem = first[prompt], file_stem(prompt, stems.__contains__)
            stems.add(stem)
            modality = loaded.vocabulary.tasks[sample.task].target
            presentation, codec = presentation_of(modality), loaded.tokenizers.codec(modality)
            file = folder / f"{stem}.{presentation.ending}"
            presentation.write(file, sample.media[i], codec)
            picture = presentation.picture_of(sample.media[i], codec)
            words.append(Word(prompt, _is_right(sample, i), file, picture))
    return words


def _is_right(sample: Samples, item: int) -> bool | None:
    return None if sample.is_right is None else bool(sample.is_right[item])


def _written(sample: Samples, prepared: Prepared) -> Written:
    """Prompts and answers of all items of a task."""
    task = prepared.manifest.vocabulary.tasks[sample.task]
    given = _given(prepared, sample) if task.condition is None else [""] * len(sample.references)
    lines = [
        ReportLine(
            prompt or f"[{task.condition}]", answer[len(prompt) :], expected[len(prompt) :], _is_right(sample, i)
        )
        for i, (prompt, answer, expected) in enumerate(zip(given, sample.media, sample.references, strict=True))
    ]
    return Written(f"{sample.task.replace('_', ' ')} · {sample.split}", lines)


def _given(prepared: Prepared, sample: Samples) -> list[str]:
    """The given beginning of each text."""
    known = {
        example.media[TEXT]: example.media[TEXT][: example.given_characters]
        for name, dataset in prepared.manifest.datasets.items()
        if dataset.medium is None and sample.split in dataset.splits
        for example in prepared.raw(name, sample.split)
    }
    return [known[reference] for reference in sample.references]


def _as_text(written: Written) -> str:
    lines = [f"{line.prompt} → {line.answer}" + _expected(line) for line in written.lines]
    return "\n".join([f"# {written.title}", *lines, ""])


def _expected(line: ReportLine) -> str:
    return "" if line.is_right else f"   {'✗' if line.is_right is False else 'real:'} {line.expected}"


def _flat(content: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Values of nested dictionaries with their dotted names."""
    for name, value in content.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
