"""Asks a model the held-out questions of one task and judges the answers; shared by `evaluate.py` and studies."""

from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import numpy as np
from jaxtyping import Bool

from trimask.diffusion.data.prepared import Prepared
from trimask.diffusion.data.records import RawExample
from trimask.diffusion.evaluation.features import FEATURES
from trimask.diffusion.evaluation.held_out import HeldOutExamples, TrainingExamples, evenly_spaced
from trimask.diffusion.evaluation.intervals import ratio_and_half_width, wilson_interval
from trimask.diffusion.evaluation.judges import DEFAULT_JUDGES, NamedJudge, Scores, are_labels, can_judge, open_judge
from trimask.diffusion.evaluation.results import Memorisation, Samples, Score
from trimask.diffusion.pretraining.trained_model import LoadedRun
from trimask.diffusion.sampling.generation_config import GenerationConfig
from trimask.diffusion.sampling.generator import Answer, Generator
from trimask.tokenizers.sequence import Example
from trimask.tokenizers.vocabulary import TEXT, Task

_FEW = 3
"""Least number of held-out and of training examples with which media are judged, unless a judge is named."""

ALL_TASKS = "all"
"""Stands for a task's name: its judges judge every task that they can."""


@dataclass(frozen=True)
class Exam:
    """A task, the held-out examples of a split that ask for it, and the judges of the answers."""

    loaded: LoadedRun
    task: Task
    held_out: HeldOutExamples
    training: TrainingExamples
    judges: Sequence[NamedJudge]

    @cached_property
    def references(self) -> list[dict[str, Any]]:
        """What the judges compare the answers with, one per held-out example."""
        return [reference(self.task, example) for example in self.held_out.raw]

    @cached_property
    def scores_of_real_media(self) -> dict[str, float | None]:
        """Each judge's score of as many real media as there are answers, by its name; None if it has no yardstick."""
        scores: dict[str, float | None] = {}
        for judge in self.judges:
            scores[judge.name] = None
            if judge.yardstick is not None:
                examples = self.held_out.raw if judge.yardstick == "held_out" else self.training.raw
                indices = evenly_spaced(len(examples), len(self.held_out.raw))
                media = [examples[index].media[self.task.target] for index in indices]
                scores[judge.name] = score_value(judge(f"real {self.task.target}", media, self.references))
        return scores

    def answers(
        self,
        generator: Generator,
        config: GenerationConfig,
        seed: int,
        report: Callable[[int, int], None] = lambda *_: None,
    ) -> list[Answer]:
        """The model's answers, one per held-out example."""
        questions = [question(self.task, record) for record in self.held_out.records]
        return generator.generate(questions, config, seed, report)

    def grade(self, answers: Sequence[Answer]) -> tuple[list[Score], Samples]:
        """Each judge's score of the answers beside its score of real media, and the answers to look at."""
        task, held_out = self.task, self.held_out
        codes = [answer.example.segments[-1].codes for answer in answers]
        prompts = [real.get("prompt", "") for real in self.references]
        if task.condition is None:
            codes = [c[num_given(task, record) :] for c, record in zip(codes, held_out.records, strict=True)]
        media = self.loaded.tokenizers.decode(task.target, codes)
        scores, is_right = [], None
        for judge in self.judges:
            value, interval, verdicts = _summary(judge(task.name, media, self.references))
            is_right = verdicts if is_right is None else is_right
            scores.append(
                Score(
                    dataset=held_out.dataset,
                    task=task.name,
                    split=held_out.split,
                    judge=judge.name,
                    examples=len(media),
                    value=value,
                    interval=interval,
                    is_share=verdicts is not None,
                    higher_is_better=judge.higher_is_better,
                    on_real=self.scores_of_real_media[judge.name],
                    mean_nfe=float(np.mean([answer.nfe for answer in answers])),
                )
            )
        texts = [example.media[TEXT] for example in held_out.raw]
        whole = [prompt + text for prompt, text in zip(prompts, media, strict=True)] if task.target == TEXT else media
        return scores, Samples(task.name, held_out.split, texts, whole, is_right)

    def memorisation(self, answers: Sequence[Answer]) -> Memorisation:
        """Share of answers, and for comparison of held-out items, whose codes equal those of a training item."""
        target = self.task.target
        known = {_code_bytes(record[target]) for record in self.training.records}
        generated = [_code_bytes(answer.example.segments[-1].codes) for answer in answers]
        real = [_code_bytes(record[target]) for record in self.held_out.records]
        return Memorisation(
            dataset=self.held_out.dataset,
            task=self.task.name,
            split=self.held_out.split,
            generated=len(generated),
            copied=float(np.mean([codes in known for codes in generated])),
            distinct=len(set(generated)),
            real=len(real),
            real_copied=float(np.mean([codes in known for codes in real])),
            real_distinct=len(set(real)),
        )


def num_given(task: Task, record: dict[str, Any]) -> int:
    """Number of codes at the beginning of a record's target that are given, as the question."""
    return record["num_given"] if task.condition is None else 0


def question(task: Task, record: dict[str, Any]) -> Example:
    """The example of a record with its target masked, except for given codes."""
    given, asked = num_given(task, record), record[task.target].copy()
    asked.reshape(-1)[given:] = -1
    return Example.of_task(task, {**record, task.target: asked}, given)


def reference(task: Task, example: RawExample) -> dict[str, Any]:
    """The media of an example as judges take them.

    For a task that continues a text, "text" is the answer alone and "prompt" the question before it.
    """
    if task.condition is not None:
        return example.media
    text = example.media[TEXT]
    return {**example.media, TEXT: text[example.given_characters :], "prompt": text[: example.given_characters]}


def has_new_questions(task: Task, held_out: HeldOutExamples, asked: Set[bytes]) -> bool:
    """Whether a split asks for a task, with at least one caption that earlier splits did not ask.

    `asked` holds the captions of earlier splits (`captions`); it matters only to tasks whose condition is text.
    """
    if task.condition is None:
        return any(record["num_given"] for record in held_out.records)
    return task.condition != TEXT or not captions(held_out) <= asked


def captions(held_out: HeldOutExamples) -> set[bytes]:
    """The different texts of the examples, as bytes of their codes."""
    return {record[TEXT].tobytes() for record in held_out.records}


def choose_judges(
    task: Task, held_out: HeldOutExamples, training: TrainingExamples, named: Mapping[str, Sequence[str]]
) -> list[NamedJudge]:
    """The judges named for this task, else the default ones; empty if `why_unjudged` gives a reason."""
    names = [name for name in named.get(ALL_TASKS, ()) if can_judge(name, task.target)]
    names += named.get(task.name, ())
    if not names and why_unjudged(task, held_out, training) is not None:
        return []
    if not names:
        names = list(DEFAULT_JUDGES.get(task.target, ())) or [_default_media_judge(training)]
    media = partial(training.training_media, task.target)
    return [open_judge(name, task.target, media) for name in dict.fromkeys(names)]


def why_unjudged(task: Task, held_out: HeldOutExamples, training: TrainingExamples) -> str | None:
    """Reason why no default judge can judge this task's answers; None if one can."""
    if task.target in DEFAULT_JUDGES:
        return None
    if task.target not in FEATURES:
        return f"there are no features of {task.target}"
    if not training.exists:
        return "there is no training split to fit a judge on"
    if min(len(training.raw), len(held_out.records)) < _FEW:
        return f"there are fewer than {_FEW} examples"
    return None


def _default_media_judge(training: TrainingExamples) -> str:
    """Name of the judge of media if none is named: label if captions are labels, else frechet."""
    return "label" if are_labels([example.media[TEXT] for example in training.raw]) else "frechet"


def score_value(scores: Scores | float) -> float:
    """The score of the whole set."""
    return scores if isinstance(scores, float) else ratio_and_half_width(scores.totals, scores.counts)[0]


def _summary(
    scores: Scores | float,
) -> tuple[float, tuple[float, float] | None, Bool[np.ndarray, " items"] | None]:
    """Value, 95 % interval, and which answers are right, None unless each is either right or wrong."""
    if isinstance(scores, float):
        return scores, None, None
    value, half_width = ratio_and_half_width(scores.totals, scores.counts)
    if (scores.counts == 1).all() and np.isin(scores.totals, (0, 1)).all():
        return value, wilson_interval(int(scores.totals.sum()), len(scores.totals)), scores.totals == 1
    return value, None if half_width is None else (value - half_width, value + half_width), None


def label_judge(prepared: Prepared, dataset: str, fit_examples: int) -> NamedJudge | None:
    """The judge label for a dataset's medium; None if there is no medium, or its captions are not labels."""
    medium, training = prepared.dataset(dataset).medium, TrainingExamples(prepared, dataset, fit_examples)
    if medium is None or medium not in FEATURES or not training.exists or _default_media_judge(training) != "label":
        return None
    return open_judge("label", medium, partial(training.training_media, medium))


def _code_bytes(codes: np.ndarray) -> bytes:
    """Codes as bytes, which are equal if the codes are."""
    return np.ascontiguousarray(codes, np.int32).tobytes()
