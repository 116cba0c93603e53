"""Writes a few generated answers for each task during training, to RUN/samples/.

    step-000200-DATASET.png      generated pictures, in one grid
    step-000200-DATASET.wav      generated sounds, with pauses between them
    step-000200-DATASET-0.…      generated media of any other modality, a file each
    samples.jsonl                generated texts: lines of step, task, reference and text

The requests are made of held-out examples of the prepared data. For a task of text alone, the beginning is given: the
prompt, or else the first half.
"""

import os
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from trimask.diffusion.data.prepared import Prepared
from trimask.diffusion.data.splits import TEST, TRAIN, VALIDATION
from trimask.diffusion.pretraining.trained_model import LoadedRun
from trimask.diffusion.run.folder import json_line, read_step_lines, staged
from trimask.scripts.output.presentation import presentation_of
from trimask.tokenizers.sequence import Example
from trimask.tokenizers.storage.files import write_text
from trimask.tokenizers.vocabulary import TEXT, Task

_COUNT = 10
"""Number of answers for each task."""
_SEARCHED = 1000
"""Number of examples among which examples with different texts are searched for."""


class _Question(NamedTuple):
    example: Example
    """The request: an example whose target is masked."""
    reference: str
    """Text of the real example: the caption of a medium, or the right answer."""


def save_training_samples(loaded: LoadedRun, step: int) -> None:
    """Generates and writes a few answers for each task; nothing if the prepared data are gone."""
    if not os.path.lexists(Path(loaded.description.data) / "manifest.json"):
        return
    questions = _questions(Path(loaded.description.data))
    # One row length for all tasks, so that the sampler is compiled once.
    length = max(question.example.length for asked in questions.values() for question in asked)
    generator = loaded.generator(rows=_COUNT, bucket=length)
    folder = loaded.folder / "samples"
    with staged(folder) as stage:
        # Lines of this and later steps were written before the run was resumed, and will be written again.
        lines = [line for line in read_step_lines(folder / "samples.jsonl") if line["step"] < step]
        for (dataset, task), asked in questions.items():
            requests = [question.example for question in asked]
            answers = generator.generate(requests, loaded.generation(task.target), seed=0)
            codes = [answer.example.segments[-1].codes for answer in answers]
            media = loaded.tokenizers.decode(task.target, codes)
            references = [question.reference for question in asked]
            if task.target == TEXT:
                lines += _lines(step, task, references, media)
            else:
                _write_media(stage / f"step-{step:06}-{dataset}", task.target, media, references, loaded)
        write_text(stage / "samples.jsonl", "".join(map(json_line, lines)))


@lru_cache(maxsize=1)
def _questions(data: Path) -> dict[tuple[str, Task], list[_Question]]:
    """Requests for every dataset and task, from held-out examples with different texts; kept for the whole training."""
    prepared = Prepared(data)
    result = {}
    for name, manifest in prepared.manifest.datasets.items():
        split = next((split for split in (VALIDATION, TEST, TRAIN) if split in manifest.splits), None)
        if split is None:
            continue
        records = prepared.examples(name, split)[:_SEARCHED]
        texts = prepared.tokenizers.decode(TEXT, [record[TEXT] for record in records])
        first = {text: record for text, record in zip(reversed(texts), reversed(records), strict=True)}
        chosen = [(text, first[text]) for text in dict.fromkeys(texts)][:_COUNT]
        for task in manifest.tasks(prepared.tokenizers.vocabulary):
            result[name, task] = [_Question(_masked(prepared, task, record), text) for text, record in chosen]
    return result


def _masked(prepared: Prepared, task: Task, record: dict[str, Any]) -> Example:
    codes = {modality: record[modality] for modality in task.modalities}
    target = np.full_like(codes[task.target], -1)
    if task.condition is None:
        text = prepared.tokenizers.vocabulary.until_eos(codes[task.target])
        given = record["num_given"] or len(text) // 2
        target[:given] = codes[task.target][:given]
    return Example.of_task(task, {**codes, task.target: target})


def _write_media(path: Path, modality: str, media: list[Any], captions: list[str], loaded: LoadedRun) -> None:
    """Writes all media to one file if the modality has a writer for that, else each to a file of its own."""
    presentation, codec = presentation_of(modality), loaded.tokenizers.codec(modality)
    if presentation.write_together is not None:
        presentation.write_together(path.with_suffix(f".{presentation.ending}"), media, captions, codec)
        return
    for number, medium in enumerate(media):
        presentation.write(path.with_name(f"{path.name}-{number}.{presentation.ending}"), medium, codec)


def _lines(step: int, task: Task, references: list[str], texts: list[str]) -> list[dict[str, Any]]:
    pairs = zip(references, texts, strict=True)
    return [{"step": step, "task": task.name, "reference": reference, "text": text} for reference, text in pairs]
