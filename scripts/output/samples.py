"""What a model in training can do, to look at: a few answers per task in RUN/samples/.

    step-000200-digits.png    what it draws      step-000200-words.wav    what it says, with pauses between
    step-000200-NAME-0.…      what it makes of any other modality, a file each
    samples.jsonl         what it writes: lines of step, task, the text it should have been, and its own

The questions are of held-out examples of the prepared data; of a text alone the question is given, or its first half.
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
from trimask.diffusion.sampling.generator import Generator
from trimask.scripts.output.presentation import presentation_of
from trimask.tokenizers.sequence import Example, make_example, until_eos
from trimask.tokenizers.storage.files import write_text
from trimask.tokenizers.vocabulary import TEXT, Task

_COUNT = 10
_LOOKED_AT = 1000
"""Examples among which those of different captions are looked for."""


class _Question(NamedTuple):
    example: Example
    reference: str
    """The text that goes with it: a medium's caption, a text's right answer."""


def save_training_samples(loaded: LoadedRun, step: int) -> None:
    """Asks each task a few held-out questions and writes the answers; without the prepared data, nothing."""
    if not os.path.lexists(Path(loaded.description.data) / "manifest.json"):
        return
    questions = _questions(Path(loaded.description.data))
    # One row length for all tasks: what is compiled once per length is compiled once.
    length = max(question.example.length for asked in questions.values() for question in asked)
    generator = Generator(loaded.denoise, loaded.vocabulary, rows=_COUNT, bucket=length)
    folder = loaded.folder / "samples"
    with staged(folder) as stage:
        # Lines of this and later steps come again after a resumed run.
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
    """A few examples of different captions for every dataset and task, with what is asked for masked."""
    prepared = Prepared(data)
    result = {}
    for name, manifest in prepared.manifest.datasets.items():
        split = next((split for split in (VALIDATION, TEST, TRAIN) if split in manifest.splits), None)
        if split is None:
            continue
        records = prepared.examples(name, split)[:_LOOKED_AT]
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
        text = until_eos(prepared.tokenizers.vocabulary, codes[task.target])
        given = record["num_given"] or len(text) // 2
        target[:given] = codes[task.target][:given]
    return make_example(task, {**codes, task.target: target})


def _write_media(path: Path, modality: str, media: list[Any], captions: list[str], loaded: LoadedRun) -> None:
    """One file, or where the modality has none for several, a file each."""
    how, codec = presentation_of(modality), loaded.tokenizers.codec(modality)
    if how.write_together is not None:
        how.write_together(path.with_suffix(f".{how.ending}"), media, captions, codec)
        return
    for number, medium in enumerate(media):
        how.write(path.with_name(f"{path.name}-{number}.{how.ending}"), medium, codec)


def _lines(step: int, task: Task, references: list[str], texts: list[str]) -> list[dict[str, Any]]:
    pairs = zip(references, texts, strict=True)
    return [{"step": step, "task": task.name, "reference": reference, "text": text} for reference, text in pairs]
