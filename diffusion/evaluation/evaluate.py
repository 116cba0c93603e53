"""Evaluates a trained model on held-out data.

- Bits per token (negative ELBO) of each task's targets, and of each modality (`likelihood.py`).
- Scores of generated media by judges that are independent of the model (`judges.py`), beside those of real media.
- Memorisation: the share of generated media whose codes are those of a training item, and the number of different
  ones, beside the same for real held-out media.

The results are determined by the seed: the same call gives the same numbers, bit for bit.
"""

import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import jax
import numpy as np
from jaxtyping import Float

from trimask.diffusion.data.layout import Layout
from trimask.diffusion.data.prepared import Prepared
from trimask.diffusion.data.splits import is_test
from trimask.diffusion.evaluation.evaluate_config import EvaluateConfig
from trimask.diffusion.evaluation.exam import (
    ALL_TASKS,
    Exam,
    captions,
    choose_judges,
    has_new_questions,
    num_given,
    why_unjudged,
)
from trimask.diffusion.evaluation.held_out import HeldOutExamples, TrainingExamples
from trimask.diffusion.evaluation.intervals import ratio_and_half_width
from trimask.diffusion.evaluation.judges import NamedJudge
from trimask.diffusion.evaluation.likelihood import num_asked, target_bits
from trimask.diffusion.evaluation.results import Bound, Evaluation, Samples
from trimask.diffusion.pretraining.trained_model import LoadedRun, require_same_vocabulary
from trimask.diffusion.run.progress import Report, silent
from trimask.diffusion.sampling.generator import Generator
from trimask.tokenizers.sequence import Example
from trimask.tokenizers.vocabulary import TEXT, Task


def evaluate(
    loaded: LoadedRun, prepared: Prepared, config: EvaluateConfig, report: Report = silent
) -> tuple[Evaluation, list[Samples]]:
    """Evaluates a model on prepared data; returns the results and what was generated for them.

    Raises ValueError if the data has other tokenizers than the model, or if a split, judge or task is unknown.
    """
    require_same_tokenizers(loaded, prepared)
    for judged in config.judges:
        if judged not in (ALL_TASKS, *loaded.vocabulary.tasks):
            raise ValueError(f"judges of an unknown task {judged!r}; there are {', '.join(loaded.vocabulary.tasks)}")
    splits = _splits(prepared, config)
    generator = loaded.generator(rows=config.rows)
    result, samples, measured = Evaluation(step=loaded.step), list[Samples](), list[_TargetBits]()
    for name, manifest in prepared.manifest.datasets.items():
        training = TrainingExamples(prepared, name, config.fit_examples)
        held_out = [HeldOutExamples(prepared, name, s, config.max_examples) for s in splits if s in manifest.splits]
        rows = min(config.rows, max((len(examples.indices) for examples in held_out), default=1))
        loaded.require_room(config.limits, rows, manifest.layout.example_length())
        result.notes.extend(_beyond_training(name, manifest.layout, loaded.description.layouts.values()))
        for task in manifest.tasks(loaded.vocabulary):
            asked: set[bytes] = set()
            judges: list[NamedJudge] = []
            for examples in held_out:
                measured.append(measured_bits(loaded, task, examples, config, report))
                result.bounds.append(bound_of([measured[-1]], name, task.name))
                if not has_new_questions(task, examples, asked):
                    continue
                asked |= captions(examples)
                judges = judges or choose_judges(task, examples, training, config.judges)
                if judges:
                    exam = Exam(loaded, task, examples, training, judges)
                    samples.append(_judge(exam, generator, config.seed, result, report))
                else:
                    result.notes.append(
                        f"{task.name} on {name} {examples.split} is not judged: "
                        f"{why_unjudged(task, examples, training)}; --judge {task.name}=MODULE:FUNCTION names a judge "
                        "of yours"
                    )
    for split in splits:
        for modality in loaded.vocabulary.modalities:
            of_modality = [m for m in measured if (m.task.target, m.split) == (modality, split)]
            if of_modality:
                result.bounds.append(bound_of(of_modality, None, None))
    return result, samples


def _judge(exam: Exam, generator: Generator, seed: int, result: Evaluation, report: Report) -> Samples:
    """Generates answers and adds their scores to the result, and the memorisation of media; returns the answers."""
    task, loaded, prepared = exam.task, exam.loaded, exam.training.prepared
    progress, generation = partial(report, f"{task.name} on {exam.held_out.split}"), loaded.generation(task.target)
    loaded.require_trained_guidance(task.name, generation)
    answers = exam.answers(generator, generation, seed, progress)
    scores, samples = exam.grade(answers)
    result.scores.extend(scores)
    if task.target != TEXT and prepared.fingerprint == loaded.description.data_fingerprint:
        result.memorisation.append(exam.memorisation(answers))
    return samples


def prepared_of(loaded: LoadedRun, data: Path | None = None) -> Prepared:
    """Prepared data of a folder; None: the data of the run. Raises FileNotFoundError if there are none."""
    data = data or Path(loaded.description.data)
    if not (data / "manifest.json").is_file():
        raise FileNotFoundError(
            f"{data}: not a folder of prepared data; make one with `trimask prepare {data} --tokenizers "
            f"{loaded.folder}` and its sources, such as --images FOLDER"
        )
    return Prepared(data)


def require_same_tokenizers(loaded: LoadedRun, prepared: Prepared) -> None:
    """Raises ValueError if data was prepared with other tokenizers than the model's."""
    require_same_vocabulary(loaded.vocabulary, prepared.tokenizers.vocabulary, prepared.folder)
    ours, theirs = loaded.tokenizers.fingerprints, prepared.manifest.tokenizers
    other = [modality for modality in ours if ours[modality] != theirs.get(modality)]
    if other:
        raise ValueError(
            f"{prepared.folder}: its tokenizers of {', '.join(other)} are not the run's; prepare it with "
            f"--tokenizers {loaded.folder}"
        )


def _splits(prepared: Prepared, config: EvaluateConfig) -> list[str]:
    """Names of the splits to evaluate on, in the data's order."""
    present = list(dict.fromkeys(split for d in prepared.manifest.datasets.values() for split in d.splits))
    if config.splits is None:
        tests = [split for split in present if is_test(split)]
        if not tests:
            raise ValueError(
                f"{prepared.folder}: no split's name begins with test; --splits names others: {', '.join(present)}"
            )
        return tests
    for split in config.splits:
        if split not in present:
            raise ValueError(f"{prepared.folder}: no split {split!r}, only {', '.join(present)}")
    return list(config.splits)


def _beyond_training(name: str, layout: Layout, trained: Iterable[Layout]) -> Iterator[str]:
    """Notes on modalities of a dataset whose shape is larger than all that the model was trained on."""
    for modality, shape in layout.shapes.items():
        known = [other.shapes[modality] for other in trained if modality in other.shapes]
        most = [max(sizes) for sizes in zip(*known, strict=True)]
        if known and any(size > limit for size, limit in zip(shape, most, strict=True)):
            found, trained_on = ("×".join(map(str, sizes)) for sizes in (shape, most))
            yield f"{name} has {modality} of {found} codes, and the model was trained on {trained_on} at most"


@dataclass(frozen=True)
class _TargetBits:
    """Bits of the targets of one task on one split."""

    task: Task
    split: str
    bits: Float[np.ndarray, " examples"]
    tokens: Float[np.ndarray, " examples"]
    """Number of target tokens of each example."""
    characters: int | None
    """Number of characters of all target texts; None for media."""


def measured_bits(
    loaded: LoadedRun, task: Task, held_out: HeldOutExamples, config: EvaluateConfig, report: Report = silent
) -> _TargetBits:
    """Estimates the bits of a task's targets on a split."""
    examples = [Example.of_task(task, record, num_given(task, record)) for record in held_out.records]
    key = jax.random.fold_in(
        jax.random.key(config.seed), zlib.crc32(f"{held_out.dataset} {task.name} {held_out.split}".encode())
    )
    bits = target_bits(
        key,
        examples,
        loaded.denoise,
        loaded.vocabulary,
        num_draws=config.bound_samples,
        rows=config.rows,
        report=partial(report, f"bits of {task.name} on {held_out.split}"),
    )
    characters = None
    if task.target == TEXT:
        asked = [record[TEXT][num_given(task, record) :] for record in held_out.records]
        characters = sum(map(len, loaded.tokenizers.decode(TEXT, asked)))
    tokens = np.array([num_asked(example, loaded.vocabulary) for example in examples], float)
    return _TargetBits(task, held_out.split, bits, tokens, characters)


def bound_of(measured: Sequence[_TargetBits], dataset: str | None, task: str | None) -> Bound:
    """The negative ELBO of all examples measured, which are of one modality and split."""
    bits = np.concatenate([m.bits for m in measured])
    value, half_width = ratio_and_half_width(bits, np.concatenate([m.tokens for m in measured]))
    characters = sum(m.characters or 0 for m in measured)
    return Bound(
        dataset=dataset,
        task=task,
        modality=measured[0].task.target,
        split=measured[0].split,
        examples=len(bits),
        bits_per_token=value,
        half_width=half_width,
        bits_per_character=float(bits.sum()) / characters if characters else None,
    )
