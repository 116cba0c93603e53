"""What a trained model can do on held-out data.

Three kinds of numbers, each with a 95 % interval where one makes sense:

- accuracy of every direction, judged independently of the model (`judges.py`), beside the judge's own accuracy on real
  held-out media;
- bits per token (negative ELBO) of what each direction asks for, by Monte Carlo over stratified times;
- memorisation: the share of generated code grids that copy a training item, and the distinct ones, beside the same
  for real held-out items.
"""

import zlib
from collections.abc import Callable
from collections.abc import Sequence as AnySequence
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from trimask.diffusion.data.plan import TRAIN
from trimask.diffusion.data.prepared import Prepared
from trimask.diffusion.data.sources import RawExample
from trimask.diffusion.judges import Judge, exact_match, label_judge
from trimask.diffusion.loss import cross_entropy, restrict
from trimask.diffusion.masking import MaskingConfig, forward_process
from trimask.diffusion.sampling.loop import Denoiser
from trimask.diffusion.sampling.requests import Answer, Generator
from trimask.diffusion.schedule import ScheduleConfig
from trimask.diffusion.train import Loaded, require_same_vocabulary
from trimask.tokenizers.sequence import Example, Sequence, assemble, direct, stack
from trimask.tokenizers.vocabulary import TEXT, Task, Vocabulary

Report = Callable[[str, int, int], None]


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """What to measure."""

    splits: tuple[str, ...] = ("test", "test_voice")
    """Held-out splits; a dataset is evaluated on those it has."""
    max_examples: int | None = None
    """At most so many examples of each split. None: all."""
    bound_samples: int = 16
    """Masks per example for the bits per token."""
    seed: int = 0
    """Of generation and masks."""

    def __post_init__(self):
        if self.bound_samples < 1 or (self.max_examples is not None and self.max_examples < 1):
            raise ValueError(f"bound_samples and max_examples must be at least 1, got {self}")


@dataclass(frozen=True, kw_only=True)
class Accuracy:
    """Share of answers that a judge accepts."""

    task: str
    split: str
    examples: int
    accuracy: float
    interval: tuple[float, float]
    """95 % Wilson interval."""
    mean_nfe: float
    """Function evaluations per answer."""
    judge_on_real: float | None
    """The judge's accuracy on real held-out media; None where the judge is string equality."""


@dataclass(frozen=True, kw_only=True)
class Bound:
    """Negative ELBO in bits per token of what a task asks for."""

    task: str
    split: str
    examples: int
    bits_per_token: float
    half_width: float
    """Half of the 95 % interval over examples."""


@dataclass(frozen=True, kw_only=True)
class Memorisation:
    """How much of what is generated is copied."""

    task: str
    generated: int
    copied: float
    """Share of generated code grids that equal a training item's."""
    distinct: int
    real: int
    """Held-out items, for comparison."""
    real_copied: float
    real_distinct: int


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """All results of one model."""

    step: int
    accuracies: list[Accuracy] = field(default_factory=list)
    bounds: list[Bound] = field(default_factory=list)
    memorisation: list[Memorisation] = field(default_factory=list)


@dataclass(frozen=True)
class Samples:
    """What was generated for one task and split, for looking at."""

    task: str
    split: str
    references: list[str]
    """The text of each example: the prompt of a medium, the right answer of a text."""
    media: list[Any]
    is_right: Bool[np.ndarray, " items"]


def evaluate(
    loaded: Loaded, prepared: Prepared, config: EvaluateConfig, report: Report = lambda *_: None
) -> tuple[Evaluation, list[Samples]]:
    """All numbers, and what was generated for them."""
    require_same_vocabulary(loaded.vocabulary, prepared.tokenizers.vocabulary, prepared.folder)
    generator = Generator(loaded.denoise, loaded.vocabulary, rows=128)
    result, samples = Evaluation(step=loaded.step), []
    for name, manifest in prepared.manifest.datasets.items():
        splits = [split for split in config.splits if split in manifest.splits]
        judge = fitted_judge(prepared, name)
        for task in manifest.tasks(loaded.vocabulary):
            # The prompts of every split are alike, so a medium is asked for on the first one only.
            for split in splits if task.target == TEXT else splits[:1]:
                records = prepared.examples(name, split)[: config.max_examples]
                raw = list(islice(prepared.raw(name, split), config.max_examples))
                result.bounds.append(_bound(loaded, task, split, records, config))
                if task.condition is None and not any(record["num_given"] for record in records):
                    continue  # nothing is asked, so no answer is right or wrong
                questions = [_question(task, record) for record in records]
                progress = partial(report, f"{task.name} on {split}")
                answers = generator.generate(questions, loaded.generation(task.target), config.seed, progress)
                codes = [answer.example.segments[-1].codes for answer in answers]
                sample, accuracy = _judged(loaded, task, split, raw, answers, judge)
                samples.append(sample)
                result.accuracies.append(accuracy)
                if task.target != TEXT:
                    train = prepared.examples(name, TRAIN)
                    held_out, known = ([r[task.target] for r in items] for items in (records, train))
                    result.memorisation.append(memorisation(task.name, codes, held_out, known))
    return result, samples


def _question(task: Task, record: dict[str, Any]) -> Example:
    """The example with what is asked for masked."""
    num_given = record["num_given"] if task.condition is None else 0
    asked = record[task.target].copy()
    asked.reshape(-1)[num_given:] = -1
    return direct(task, {**record, task.target: asked}, num_given)


def _judged(
    loaded: Loaded,
    task: Task,
    split: str,
    raw: AnySequence[RawExample],
    answers: AnySequence[Answer],
    judge: Judge | None,
) -> tuple[Samples, Accuracy]:
    """Verdicts on the answers, and the judge's on the real media."""
    references = [example.media[TEXT] for example in raw]
    media = loaded.tokenizers.decode(task.target, [answer.example.segments[-1].codes for answer in answers])
    on_real = None
    if task.target == TEXT:
        is_right = exact_match(media, references)
    else:
        assert judge is not None
        is_right = judge(media, references)
        on_real = float(judge([example.media[task.target] for example in raw], references).mean())
    accuracy = Accuracy(
        task=task.name,
        split=split,
        examples=len(raw),
        accuracy=float(is_right.mean()),
        interval=wilson_interval(int(is_right.sum()), len(raw)),
        mean_nfe=float(np.mean([answer.nfe for answer in answers])),
        judge_on_real=on_real,
    )
    return Samples(task.name, split, references, media, is_right), accuracy


def fitted_judge(prepared: Prepared, dataset: str) -> Judge | None:
    """The judge of a dataset's medium, fitted on its real training items."""
    manifest = prepared.dataset(dataset)
    if manifest.medium is None:
        return None
    raw = list(prepared.raw(dataset, TRAIN))
    media = [example.media[manifest.medium] for example in raw]
    return label_judge(manifest.medium, media, [example.media[TEXT] for example in raw], prepared.sample_rate_hz)


def memorisation(
    task: str,
    generated: AnySequence[np.ndarray],
    held_out: AnySequence[np.ndarray],
    train: AnySequence[np.ndarray],
) -> Memorisation:
    """How many generated, and for comparison real held-out, code grids equal one of the training set."""
    known = {codes.tobytes() for codes in train}
    grids, real = [c.tobytes() for c in generated], [c.tobytes() for c in held_out]
    return Memorisation(
        task=task,
        generated=len(grids),
        copied=float(np.mean([grid in known for grid in grids])),
        distinct=len(set(grids)),
        real=len(real),
        real_copied=float(np.mean([grid in known for grid in real])),
        real_distinct=len(set(real)),
    )


def wilson_interval(successes: int, trials: int, z: float = 1.96) -> tuple[float, float]:
    """Interval of a share that stays inside [0, 1] (Wilson 1927); 95 % for z = 1.96."""
    share = successes / trials
    center = (share + z**2 / (2 * trials)) / (1 + z**2 / trials)
    half = z / (1 + z**2 / trials) * np.sqrt(share * (1 - share) / trials + z**2 / (4 * trials**2))
    return max(0.0, float(center - half)), min(1.0, float(center + half))  # rounding may leave it


def bits_per_token(
    key: PRNGKeyArray,
    denoise: Denoiser,
    sequence: Sequence,
    vocabulary: Vocabulary,
    schedule: ScheduleConfig,
) -> Float[Array, " batch"]:
    """One Monte-Carlo estimate per row of the negative ELBO of its target tokens given its condition."""
    masking = MaskingConfig(schedule=schedule, joint_probability=0.0, drop_probability=0.0)
    noised = forward_process(key, sequence, vocabulary.mask_id, masking)
    logits = denoise(noised.sequence).logits
    allowed = vocabulary.allowed_ids(sequence.modality, sequence.place)
    nll, _ = cross_entropy(restrict(logits, allowed), noised.clean)
    nats = jnp.sum(jnp.where(noised.is_masked, noised.weight * nll, 0.0), axis=-1)
    return nats / noised.is_target.sum(axis=-1) / jnp.log(2)


def _bound(
    loaded: Loaded, task: Task, split: str, records: AnySequence[dict[str, Any]], config: EvaluateConfig
) -> Bound:
    """Mean over examples of the mean over `bound_samples` masks of each."""
    rows = [direct(task, r, r["num_given"] if task.condition is None else 0) for r in records]
    batch = stack([assemble(loaded.vocabulary, [row], row.length) for row in rows])
    key = jax.random.fold_in(jax.random.key(config.seed), zlib.crc32(f"{task.name} {split}".encode()))
    schedule = loaded.description.train.masking.schedule
    draws = [
        _rows_of_bits(jax.random.fold_in(key, draw), loaded.denoise, batch, loaded.vocabulary, schedule)
        for draw in range(config.bound_samples)
    ]
    bits = np.mean(draws, axis=0)
    half_width = 1.96 * float(bits.std(ddof=1)) / len(bits) ** 0.5 if len(bits) > 1 else float("inf")
    return Bound(
        task=task.name, split=split, examples=len(bits), bits_per_token=float(bits.mean()), half_width=half_width
    )


_rows_of_bits = jax.jit(bits_per_token, static_argnames=("vocabulary", "schedule"))
