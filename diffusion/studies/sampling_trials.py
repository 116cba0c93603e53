"""One trial of the study of sampling: a task's held-out questions are answered with one setting, and judged."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from trimask.diffusion.data.prepared import Prepared
from trimask.diffusion.evaluation.exam import Exam, choose_judges
from trimask.diffusion.evaluation.held_out import HeldOutExamples, TrainingExamples
from trimask.diffusion.evaluation.intervals import standard_error_of
from trimask.diffusion.evaluation.results import Score
from trimask.diffusion.pretraining.trained_model import LoadedRun
from trimask.diffusion.sampling.generation_config import GenerationConfig
from trimask.diffusion.sampling.generator import Generator
from trimask.diffusion.studies.sampling_report import PointScore, SamplingPoint
from trimask.diffusion.studies.trainings import make_room_for
from trimask.diffusion.studies.trials import ModelTrial, open_run
from trimask.tokenizers.vocabulary import TEXT, Task

FIT_EXAMPLES = 10_000
"""Largest number of training examples to which judges are fitted."""
_ROWS = 128
"""Number of rows generated at once."""


@dataclass(frozen=True, kw_only=True)
class TaskTrial(ModelTrial):
    """A task and the setting to sample with, and all else that the result depends on; stored in trials.jsonl."""

    dataset: str
    task: str
    split: str
    max_examples: int | None
    """Largest number of questions. None: all."""
    seed: int
    """Seed of the generated answers."""
    how: GenerationConfig
    """Sampling settings of the trial."""


@dataclass(frozen=True, kw_only=True)
class TaskOutcome:
    """Result of a `TaskTrial`; stored in trials.jsonl."""

    scores: list[Score]
    """Scores of the answers, the most important first."""
    distinct: float
    """Number of different answers over number of answers."""


class AskedTask(NamedTuple):
    """A task of a dataset that can be judged, and the held-out examples that ask for it."""

    task: Task
    held_out: HeldOutExamples


def measure_task(trial: TaskTrial, data: Path) -> TaskOutcome:
    """Samples answers to all questions of a task, and judges them.

    The name of this function is part of the keys in trials.jsonl, so it must not change.
    """
    make_room_for(trial.how.strategy, most=1)  # a strategy is a program for every batch size
    exam, generator = _exam(trial.run, data, trial.dataset, trial.task, trial.split, trial.max_examples)
    answers = exam.answers(generator, trial.how, trial.seed)
    codes = {answer.example.segments[-1].codes.tobytes() for answer in answers}
    return TaskOutcome(scores=exam.grade(answers)[0], distinct=len(codes) / len(answers))


@lru_cache(maxsize=32)
def _exam(
    run: str, data: Path, dataset: str, task: str, split: str, max_examples: int | None
) -> tuple[Exam, Generator]:
    """Exam of a task: by the first default judge, and media also by their distance to real ones."""
    loaded, prepared, generator = _opened(run, data)
    part = HeldOutExamples(prepared, dataset, split, max_examples)
    real = TrainingExamples(prepared, dataset, FIT_EXAMPLES)
    asked = loaded.vocabulary.tasks[task]
    judges = choose_judges(asked, part, real, {})[:1]
    if asked.target != TEXT and judges[0].name != "frechet":
        judges += choose_judges(asked, part, real, {task: ("frechet",)})
    return Exam(loaded, asked, part, real, judges), generator


@lru_cache(maxsize=1)
def _opened(run: str, data: Path) -> tuple[LoadedRun, Prepared, Generator]:
    """The run, the data and what generates answers, kept for the next trial."""
    loaded, prepared = open_run(run, data)
    return loaded, prepared, loaded.generator(rows=_ROWS)


def points_by_setting(
    tasks: Sequence[AskedTask],
    part: str,
    settings: Sequence[tuple[GenerationConfig, int]],
    outcomes: Sequence[TaskOutcome],
) -> list[list[SamplingPoint]]:
    """Points of every setting with its seed; `outcomes` has those of all tasks for one setting after another."""
    rows = [outcomes[first : first + len(tasks)] for first in range(0, len(outcomes), len(tasks))]
    return [
        [_point(asked, part, how, outcome) for asked, outcome in zip(tasks, row, strict=True)]
        for (how, _), row in zip(settings, rows, strict=True)
    ]


def _point(asked: AskedTask, part: str, how: GenerationConfig, outcome: TaskOutcome) -> SamplingPoint:
    task, held_out, first = asked.task, asked.held_out, outcome.scores[0]
    name, scores = f"{held_out.dataset}: {task.name}", tuple(map(_point_score, outcome.scores))
    counts = (first.mean_nfe, outcome.distinct, held_out.split, first.examples)
    return SamplingPoint(task.target, name, part, how, scores, *counts)


def _point_score(score: Score) -> PointScore:
    error = 0.0 if score.interval is None else standard_error_of(score.interval)
    return PointScore(score.judge, score.value, error, score.interval, bool(score.higher_is_better), score.on_real)
