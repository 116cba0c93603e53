"""What a trained model can do on held-out data.

- bits per token (negative ELBO) of what each direction asks for, and of each modality (`likelihood.py`);
- scores of what it generates, by judges that know nothing of it (`judges.py`), beside those of real media;
- memorisation: the share of generated code grids that copy a training item, and the distinct ones, beside the same
  for real held-out items.

Everything follows from the seed: the same call gives the same numbers, bit for bit.
"""

import zlib
from collections.abc import Callable
from collections.abc import Sequence as AnySequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jax
import numpy as np
from jaxtyping import Bool, Float

from trimask.diffusion.data.prepared import Prepared
from trimask.diffusion.held_out import HeldOut, Real, spread
from trimask.diffusion.intervals import ratio, wilson_interval
from trimask.diffusion.judges import NamedJudge, Scores, are_labels, fits, open_judge
from trimask.diffusion.likelihood import num_asked, target_bits
from trimask.diffusion.results import Bound, Evaluation, Memorisation, Samples, Score
from trimask.diffusion.sampling.requests import Answer, Generator
from trimask.diffusion.train import Loaded, require_same_vocabulary
from trimask.tokenizers.sequence import Example, direct
from trimask.tokenizers.vocabulary import TEXT, Task

_FEW = 3
"""Media are not judged by fewer held-out or training examples, unless a judge is named."""
Report = Callable[[str, int, int], None]

ALL_TASKS = "all"
"""In place of a task's name: judges of every task that they can judge."""


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """What to measure."""

    splits: tuple[str, ...] | None = None
    """Held-out splits; a dataset is evaluated on those it has. None: all whose name begins with test."""
    judges: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """Task, or "all" → names of judges, in place of the usual ones: exact_match of texts; label of media whose captions
    are labels, else frechet."""
    max_examples: int | None = None
    """At most so many examples of each split, evenly spread over it. None: all."""
    bound_samples: int = 16
    """Masks per example for the bits per token."""
    fit_examples: int = 10_000
    """At most so many training examples, evenly spread, for a judge to be fitted on."""
    rows: int = 128
    """Examples in one batch: a matter of memory."""
    seed: int = 0
    """Of generation and masks."""

    def __post_init__(self):
        for name in ("max_examples", "bound_samples", "fit_examples", "rows"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")


def evaluate(
    loaded: Loaded, prepared: Prepared, config: EvaluateConfig, report: Report = lambda *_: None
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
        real = Real(prepared, name, config.fit_examples)
        held_out = [HeldOut(prepared, name, split, config.max_examples) for split in splits if split in manifest.splits]
        judges: dict[str, list[NamedJudge]] = {}
        is_trained_on = prepared.fingerprint == loaded.description.data_fingerprint
        for task in manifest.tasks(loaded.vocabulary):
            for part in held_out:
                measured.append(_measured(loaded, task, part, config, report))
                result.bounds.append(_bound([measured[-1]], name, task.name))
                if not _is_asked(task, part, asked.setdefault(task.name, set())):
                    continue
                if task.name not in judges:
                    judges[task.name] = _judges(task, part, real, config)
                if not judges[task.name]:
                    continue
                progress = partial(report, f"{task.name} on {part.split}")
                questions = [_question(task, record) for record in part.records]
                answers = generator.generate(questions, loaded.generation(task.target), config.seed, progress)
                scores, sample = _judged(loaded, task, part, real, answers, judges[task.name])
                result.scores.extend(scores)
                samples.append(sample)
                if task.target != TEXT and is_trained_on:
                    codes = [answer.example.segments[-1].codes for answer in answers]
                    result.memorisation.append(_memorisation(task, part, codes, real))
    for split in splits:
        for modality in loaded.vocabulary.modalities:
            of_modality = [m for m in measured if (m.task.target, m.split) == (modality, split)]
            if of_modality:
                result.bounds.append(_bound(of_modality, None, None))
    return result, samples


def require_same_tokenizers(loaded: Loaded, prepared: Prepared) -> None:
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
        found = [split for split in there if split.startswith("test")]
        if not found:
            raise ValueError(
                f"{prepared.folder}: no split's name begins with test; --splits names others: {', '.join(there)}"
            )
        return found
    for split in config.splits:
        if split not in there:
            raise ValueError(f"{prepared.folder}: no split {split!r}, only {', '.join(there)}")
    return list(config.splits)


def _is_asked(task: Task, part: HeldOut, asked: set[bytes]) -> bool:
    """False where there is no question, or all of them were asked on an earlier split."""
    if task.condition is None:
        return any(record["num_given"] for record in part.records)
    if task.condition != TEXT:
        return True
    prompts = {record[TEXT].tobytes() for record in part.records}
    is_new = not prompts <= asked
    asked |= prompts
    return is_new


def _num_given(task: Task, record: dict[str, Any]) -> int:
    return record["num_given"] if task.condition is None else 0


def _question(task: Task, record: dict[str, Any]) -> Example:
    """The example with what is asked for masked."""
    num_given = _num_given(task, record)
    asked = record[task.target].copy()
    asked.reshape(-1)[num_given:] = -1
    return direct(task, {**record, task.target: asked}, num_given)


@dataclass(frozen=True)
class _Measured:
    """Bits of the examples of one direction."""

    task: Task
    split: str
    bits: Float[np.ndarray, " examples"]
    tokens: Float[np.ndarray, " examples"]
    characters: int | None
    """Of all texts."""


def _measured(loaded: Loaded, task: Task, part: HeldOut, config: EvaluateConfig, report: Report) -> _Measured:
    examples = [direct(task, record, _num_given(task, record)) for record in part.records]
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
        asked = [record[TEXT][_num_given(task, record) :] for record in part.records]
        characters = sum(map(len, loaded.tokenizers.decode(TEXT, asked)))
    return _Measured(task, part.split, bits, np.array([num_asked(e) for e in examples], float), characters)


def _bound(measured: AnySequence[_Measured], dataset: str | None, task: str | None) -> Bound:
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


def _judges(task: Task, part: HeldOut, real: Real, config: EvaluateConfig) -> list[NamedJudge]:
    """Those that are asked for, or the usual ones; none where there is too little to judge by."""
    names = [name for name in config.judges.get(ALL_TASKS, ()) if fits(name, task.target)]
    names += config.judges.get(task.name, ())
    if not names:
        if task.target != TEXT and (not real.exists or min(len(real.raw), len(part.records)) < _FEW):
            return []
        names = ["exact_match"] if task.target == TEXT else [_usual(real)]
    return [open_judge(name, task.target, partial(real.training, task.target)) for name in dict.fromkeys(names)]


def _usual(real: Real) -> str:
    return "label" if are_labels([example.media[TEXT] for example in real.raw]) else "frechet"


def _judged(
    loaded: Loaded,
    task: Task,
    part: HeldOut,
    real: Real,
    answers: AnySequence[Answer],
    judges: AnySequence[NamedJudge],
) -> tuple[list[Score], Samples]:
    """What each judge says of the answers and of real media."""
    codes = [answer.example.segments[-1].codes for answer in answers]
    references: list[dict[str, Any]] = [example.media for example in part.raw]
    shown = [""] * len(answers)
    if task.condition is None:
        codes = [c[_num_given(task, record) :] for c, record in zip(codes, part.records, strict=True)]
        shown = [example.media[TEXT][: example.given] for example in part.raw]
        references = [
            {**example.media, TEXT: example.media[TEXT][example.given :], "prompt": prompt}
            for example, prompt in zip(part.raw, shown, strict=True)
        ]
    media = loaded.tokenizers.decode(task.target, codes)
    scores, is_right = [], None
    for judge in judges:
        found = judge(task.name, media, references)
        on_real = None
        if judge.yardstick is not None:
            others = part.raw if judge.yardstick == "held_out" else real.raw
            media_of = [others[number].media[task.target] for number in spread(len(others), len(media))]
            yardstick = judge(f"real {task.target}", media_of, references)
            on_real = score_of(yardstick)
        value, interval, verdicts = _summary(found)
        is_right = verdicts if is_right is None else is_right
        scores.append(
            Score(
                dataset=part.dataset,
                task=task.name,
                split=part.split,
                judge=judge.name,
                examples=len(media),
                value=value,
                interval=interval,
                is_share=verdicts is not None,
                higher_is_better=judge.higher_is_better,
                on_real=on_real,
                mean_nfe=float(np.mean([answer.nfe for answer in answers])),
            )
        )
    texts = [example.media[TEXT] for example in part.raw]
    whole = [prompt + text for prompt, text in zip(shown, media, strict=True)] if task.target == TEXT else media
    return scores, Samples(task.name, part.split, texts, whole, is_right)


def score_of(found: Scores | float) -> float:
    """One number of what a judge said."""
    return found if isinstance(found, float) else ratio(found.totals, found.counts)[0]


def _summary(
    found: Scores | float,
) -> tuple[float, tuple[float, float] | None, Bool[np.ndarray, " items"] | None]:
    """Value, interval, and which answers are right if they are right or wrong."""
    if isinstance(found, float):
        return found, None, None
    value, half_width = ratio(found.totals, found.counts)
    if (found.counts == 1).all() and np.isin(found.totals, (0, 1)).all():
        return value, wilson_interval(int(found.totals.sum()), len(found.totals)), found.totals == 1
    return value, None if half_width is None else (value - half_width, value + half_width), None


def _memorisation(task: Task, part: HeldOut, generated: AnySequence[np.ndarray], real: Real) -> Memorisation:
    """How many generated, and for comparison real held-out, code grids equal one of the training set."""
    known = {_identity(record[task.target]) for record in real.codes}
    grids = [_identity(codes) for codes in generated]
    held_out = [_identity(record[task.target]) for record in part.records]
    return Memorisation(
        dataset=part.dataset,
        task=task.name,
        split=part.split,
        generated=len(grids),
        copied=float(np.mean([grid in known for grid in grids])),
        distinct=len(set(grids)),
        real=len(held_out),
        real_copied=float(np.mean([grid in known for grid in held_out])),
        real_distinct=len(set(held_out)),
    )


def _identity(codes: np.ndarray) -> bytes:
    return np.ascontiguousarray(codes, np.int32).tobytes()


def label_judge(prepared: Prepared, dataset: str, config: EvaluateConfig) -> NamedJudge | None:
    """The judge of labels of a dataset's medium; None where there is none, or captions are not labels."""
    medium, real = prepared.dataset(dataset).medium, Real(prepared, dataset, config.fit_examples)
    if medium is None or not real.exists or _usual(real) != "label":
        return None
    return open_judge("label", medium, partial(real.training, medium))
