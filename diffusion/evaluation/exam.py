"""Held-out questions of one task, put to a model and judged: what `evaluate.py` and the study of samplers share."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import numpy as np
from jaxtyping import Bool

from trimask.diffusion.data.prepared import Prepared
from trimask.diffusion.data.records import RawExample
from trimask.diffusion.evaluation.features import FEATURES
from trimask.diffusion.evaluation.held_out import HeldOut, TrainingExamples, spread
from trimask.diffusion.evaluation.intervals import ratio, wilson_interval
from trimask.diffusion.evaluation.judges import DEFAULT_JUDGES, NamedJudge, Scores, are_labels, fits, open_judge
from trimask.diffusion.evaluation.results import Memorisation, Samples, Score
from trimask.diffusion.pretraining.trained_model import LoadedRun
from trimask.diffusion.sampling.generation_config import GenerationConfig
from trimask.diffusion.sampling.generator import Answer, Generator
from trimask.tokenizers.sequence import Example, direct
from trimask.tokenizers.vocabulary import TEXT, Task

_FEW = 3
"""Media are not judged by fewer held-out or training examples, unless a judge is named."""

ALL_TASKS = "all"
"""In place of a task's name: judges of every task that they can judge."""


@dataclass(frozen=True)
class Exam:
    """A task, the held-out examples that ask for it, and who judges the answers."""

    loaded: LoadedRun
    task: Task
    part: HeldOut
    real: TrainingExamples
    judges: Sequence[NamedJudge]

    @cached_property
    def references(self) -> list[dict[str, Any]]:
        """What judges compare with."""
        return [reference(self.task, example) for example in self.part.raw]

    @cached_property
    def on_real(self) -> dict[str, float | None]:
        """Judge → what it says of as many real media; None where it is known."""
        found: dict[str, float | None] = {}
        for judge in self.judges:
            found[judge.name] = None
            if judge.yardstick is not None:
                others = self.part.raw if judge.yardstick == "held_out" else self.real.raw
                chosen = spread(len(others), len(self.part.raw))
                media = [others[number].media[self.task.target] for number in chosen]
                found[judge.name] = score_of(judge(f"real {self.task.target}", media, self.references))
        return found

    def answers(
        self,
        generator: Generator,
        config: GenerationConfig,
        seed: int,
        report: Callable[[int, int], None] = lambda *_: None,
    ) -> list[Answer]:
        """One per held-out example."""
        questions = [question(self.task, record) for record in self.part.records]
        return generator.generate(questions, config, seed, report)

    def graded(self, answers: Sequence[Answer]) -> tuple[list[Score], Samples]:
        """What each judge says of the answers and of real media."""
        task, part = self.task, self.part
        codes = [answer.example.segments[-1].codes for answer in answers]
        shown = [real_one.get("prompt", "") for real_one in self.references]
        if task.condition is None:
            codes = [c[num_given(task, record) :] for c, record in zip(codes, part.records, strict=True)]
        media = self.loaded.tokenizers.decode(task.target, codes)
        scores, is_right = [], None
        for judge in self.judges:
            found = judge(task.name, media, self.references)
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
                    on_real=self.on_real[judge.name],
                    mean_nfe=float(np.mean([answer.nfe for answer in answers])),
                )
            )
        texts = [example.media[TEXT] for example in part.raw]
        whole = [prompt + text for prompt, text in zip(shown, media, strict=True)] if task.target == TEXT else media
        return scores, Samples(task.name, part.split, texts, whole, is_right)

    def memorisation(self, answers: Sequence[Answer]) -> Memorisation:
        """How many generated, and for comparison real held-out, code grids equal one of the training set."""
        task, part, real = self.task, self.part, self.real
        generated = [answer.example.segments[-1].codes for answer in answers]
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


def num_given(task: Task, record: dict[str, Any]) -> int:
    """Codes of a target that are given."""
    return record["num_given"] if task.condition is None else 0


def question(task: Task, record: dict[str, Any]) -> Example:
    """The example with what is asked for masked."""
    given, asked = num_given(task, record), record[task.target].copy()
    asked.reshape(-1)[given:] = -1
    return direct(task, {**record, task.target: asked}, given)


def reference(task: Task, example: RawExample) -> dict[str, Any]:
    """Its media as judges take them: where a text is asked for alone, the answer, and "prompt" is the question."""
    if task.condition is not None:
        return example.media
    text = example.media[TEXT]
    return {**example.media, TEXT: text[example.given_characters :], "prompt": text[: example.given_characters]}


def is_asked(task: Task, part: HeldOut, asked: set[bytes]) -> bool:
    """False where there is no question, or all of them were asked on an earlier split."""
    if task.condition is None:
        return any(record["num_given"] for record in part.records)
    if task.condition != TEXT:
        return True
    prompts = {record[TEXT].tobytes() for record in part.records}
    is_new = not prompts <= asked
    asked |= prompts
    return is_new


def judges_of(
    task: Task, part: HeldOut, real: TrainingExamples, named: Mapping[str, Sequence[str]]
) -> list[NamedJudge]:
    """The judges named for this task, else the usual one; empty where `why_unjudged` says why."""
    names = [name for name in named.get(ALL_TASKS, ()) if fits(name, task.target)]
    names += named.get(task.name, ())
    if not names and why_unjudged(task, part, real) is not None:
        return []
    if not names:
        names = list(DEFAULT_JUDGES.get(task.target, ())) or [_usual(real)]
    return [open_judge(name, task.target, partial(real.training, task.target)) for name in dict.fromkeys(names)]


def why_unjudged(task: Task, part: HeldOut, real: TrainingExamples) -> str | None:
    """Why the usual judge cannot say anything of this task's answers; None if it can."""
    if task.target in DEFAULT_JUDGES:
        return None
    if task.target not in FEATURES:
        return f"there are no features of {task.target}"
    if not real.exists:
        return "there is no training split to fit a judge on"
    if min(len(real.raw), len(part.records)) < _FEW:
        return f"there are fewer than {_FEW} examples"
    return None


def _usual(real: TrainingExamples) -> str:
    return "label" if are_labels([example.media[TEXT] for example in real.raw]) else "frechet"


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


def label_judge(prepared: Prepared, dataset: str, fit_examples: int) -> NamedJudge | None:
    """The judge of labels of a dataset's medium; None where there is none, or captions are not labels."""
    medium, real = prepared.dataset(dataset).medium, TrainingExamples(prepared, dataset, fit_examples)
    if medium is None or medium not in FEATURES or not real.exists or _usual(real) != "label":
        return None
    return open_judge("label", medium, partial(real.training, medium))


def _identity(codes: np.ndarray) -> bytes:
    return np.ascontiguousarray(codes, np.int32).tobytes()
