"""What a trained model can do on held-out data.

- bits per token (negative ELBO) of what each direction asks for, and of each modality (`likelihood.py`);
- scores of what it generates, by judges that know nothing of it (`judges.py`), beside those of real media;
- memorisation: the share of generated code grids that copy a training item, and the distinct ones, beside the same
  for real held-out items.

Everything follows from the seed: the same call gives the same numbers, bit for bit.
"""

import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import jax
import numpy as np
from jaxtyping import Float

from trimask.diffusion.data.layout import Layout
from trimask.diffusion.data.prepared import Prepared
from trimask.diffusion.data.splits import is_test
from trimask.diffusion.evaluation.evaluate_config import EvaluateConfig
from trimask.diffusion.evaluation.exam import ALL_TASKS, Exam, is_asked, judges_of, num_given, why_unjudged
from trimask.diffusion.evaluation.held_out import HeldOut, TrainingExamples
from trimask.diffusion.evaluation.intervals import ratio
from trimask.diffusion.evaluation.judges import NamedJudge
from trimask.diffusion.evaluation.likelihood import num_asked, target_bits
from trimask.diffusion.evaluation.results import Bound, Evaluation, Samples
from trimask.diffusion.pretraining.trained_model import LoadedRun, require_same_vocabulary
from trimask.diffusion.run.progress import Report, silent
from trimask.diffusion.sampling.generator import Generator
from trimask.tokenizers.sequence import direct
from trimask.tokenizers.vocabulary import TEXT, Task


def evaluate(
    loaded: LoadedRun, prepared: Prepared, config: EvaluateConfig, report: Report = silent
) -> tuple[Evaluation, list[Samples]]:
    """All numbers, and what was generated for them."""
    require_same_tokenizers(loaded, prepared)
    for judged in config.judges:
        if judged not in (ALL_TASKS, *loaded.vocabulary.tasks):
            raise ValueError(f"judges of an unknown task {judged!r}; there are {', '.join(loaded.vocabulary.tasks)}")
    splits = _splits(prepared, config)
    generator = Generator(loaded.denoise, loaded.vocabulary, rows=config.rows)
    result, samples, measured = Evaluation(step=loaded.step), [], list[_Measured]()
    for name, manifest in prepared.manifest.datasets.items():
        asked: dict[str, set[bytes]] = {}
        real = TrainingExamples(prepared, name, config.fit_examples)
        held_out = [HeldOut(prepared, name, split, config.max_examples) for split in splits if split in manifest.splits]
        rows = min(config.rows, max((len(part.numbers) for part in held_out), default=1))
        loaded.require_room(config.limits, rows, manifest.layout.example_length())
        result.notes.extend(_unseen(name, manifest.layout, loaded.description.layouts.values()))
        judges: dict[str, list[NamedJudge]] = {}
        is_trained_on = prepared.fingerprint == loaded.description.data_fingerprint
        for task in manifest.tasks(loaded.vocabulary):
            for part in held_out:
                measured.append(_measured(loaded, task, part, config, report))
                result.bounds.append(_bound([measured[-1]], name, task.name))
                if not is_asked(task, part, asked.setdefault(task.name, set())):
                    continue
                if task.name not in judges:
                    judges[task.name] = judges_of(task, part, real, config.judges)
                if not judges[task.name]:
                    why = why_unjudged(task, part, real)
                    result.notes.append(
                        f"{task.name} on {name} {part.split} is not judged: {why}; "
                        f"--judge {task.name}=MODULE:FUNCTION names a judge of yours"
                    )
                    continue
                exam = Exam(loaded, task, part, real, judges[task.name])
                progress = partial(report, f"{task.name} on {part.split}")
                answers = exam.answers(generator, loaded.generation(task.target), config.seed, progress)
                scores, sample = exam.graded(answers)
                result.scores.extend(scores)
                samples.append(sample)
                if task.target != TEXT and is_trained_on:
                    result.memorisation.append(exam.memorisation(answers))
    for split in splits:
        for modality in loaded.vocabulary.modalities:
            of_modality = [m for m in measured if (m.task.target, m.split) == (modality, split)]
            if of_modality:
                result.bounds.append(_bound(of_modality, None, None))
    return result, samples


def require_same_tokenizers(loaded: LoadedRun, prepared: Prepared) -> None:
    """Refuses data of other tokens than the model's."""
    require_same_vocabulary(loaded.vocabulary, prepared.tokenizers.vocabulary, prepared.folder)
    ours, theirs = loaded.tokenizers.fingerprints, prepared.manifest.tokenizers
    other = [modality for modality in ours if ours[modality] != theirs.get(modality)]
    if other:
        raise ValueError(
            f"{prepared.folder}: its tokenizers of {', '.join(other)} are not the run's; prepare it with "
            f"--tokenizers {loaded.folder}"
        )


def _splits(prepared: Prepared, config: EvaluateConfig) -> list[str]:
    """What to evaluate on, in the data's order."""
    there = list(dict.fromkeys(split for d in prepared.manifest.datasets.values() for split in d.splits))
    if config.splits is None:
        found = [split for split in there if is_test(split)]
        if not found:
            raise ValueError(
                f"{prepared.folder}: no split's name begins with test; --splits names others: {', '.join(there)}"
            )
        return found
    for split in config.splits:
        if split not in there:
            raise ValueError(f"{prepared.folder}: no split {split!r}, only {', '.join(there)}")
    return list(config.splits)


def _unseen(name: str, layout: Layout, trained: Iterable[Layout]) -> Iterator[str]:
    """What of a dataset is larger than anything the model was trained on."""
    for modality, shape in layout.shapes.items():
        known = [other.shapes[modality] for other in trained if modality in other.shapes]
        most = [max(sizes) for sizes in zip(*known, strict=True)]
        if known and any(size > limit for size, limit in zip(shape, most, strict=True)):
            here, there = ("×".join(map(str, sizes)) for sizes in (shape, most))
            yield f"{name} has {modality} of {here} codes, and the model was trained on {there} at most"


@dataclass(frozen=True)
class _Measured:
    """Bits of the examples of one direction."""

    task: Task
    split: str
    bits: Float[np.ndarray, " examples"]
    tokens: Float[np.ndarray, " examples"]
    characters: int | None
    """Of all texts."""


def _measured(loaded: LoadedRun, task: Task, part: HeldOut, config: EvaluateConfig, report: Report) -> _Measured:
    examples = [direct(task, record, num_given(task, record)) for record in part.records]
    key = jax.random.fold_in(
        jax.random.key(config.seed), zlib.crc32(f"{part.dataset} {task.name} {part.split}".encode())
    )
    bits = target_bits(
        key,
        examples,
        loaded.denoise,
        loaded.vocabulary,
        loaded.description.train.masking.schedule,
        num_draws=config.bound_samples,
        rows=config.rows,
        report=partial(report, f"bits of {task.name} on {part.split}"),
    )
    characters = None
    if task.target == TEXT:
        asked = [record[TEXT][num_given(task, record) :] for record in part.records]
        characters = sum(map(len, loaded.tokenizers.decode(TEXT, asked)))
    tokens = np.array([num_asked(example, loaded.vocabulary) for example in examples], float)
    return _Measured(task, part.split, bits, tokens, characters)


def _bound(measured: Sequence[_Measured], dataset: str | None, task: str | None) -> Bound:
    """All examples of one modality and split."""
    bits = np.concatenate([m.bits for m in measured])
    value, half_width = ratio(bits, np.concatenate([m.tokens for m in measured]))
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
