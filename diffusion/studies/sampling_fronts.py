"""How should each modality be sampled? Quality against the number of function evaluations (NFE), and against guidance.

For every task of a trained model the study measures, on held-out questions:

1. every heuristic strategy over its parameter, at the guidance and temperature of the run: fronts of quality against
   NFE;
2. guidance × temperature with the best of these: accuracy and distance against guidance;
3. the chosen settings in blocks, with each cache: the loss of quality by keeping keys and values.

Answers are scored by the task's default judge, and generated media also by their Fréchet distance to real media, since
many settings satisfy a classifier. The study chooses the settings with the fewest evaluations among all that are as
good as the best: within one error of the best share of right answers (a larger share than that of real media counts as
equal to it), and of those within one error of the smallest distance. Settings whose media are too often equal are
excluded: the share of distinct answers must be at least that of real media minus `alike`. The error of a share is its
standard error; that of a distance is its standard deviation over several draws with the run's own settings. Tasks that
generate text share their settings, which are chosen by the mean of their scores. `rule` says this in a sentence, and
`final` scores what was chosen on the test splits.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from trimask.diffusion.data.prepared import Prepared
from trimask.diffusion.data.splits import VALIDATION
from trimask.diffusion.evaluation.exam import Exam, captions, choose_judges, has_new_questions, question, why_unjudged
from trimask.diffusion.evaluation.held_out import HeldOutExamples, TrainingExamples
from trimask.diffusion.evaluation.intervals import standard_error_of
from trimask.diffusion.evaluation.results import Score
from trimask.diffusion.pretraining.trained_model import LoadedRun
from trimask.diffusion.sampling.generation_config import GenerationConfig
from trimask.diffusion.sampling.generator import Generator
from trimask.diffusion.studies.final import FinalResult, splits_to_score
from trimask.diffusion.studies.findings import grouped, write_csv
from trimask.diffusion.studies.heuristics import HeuristicSetting, heuristic_settings
from trimask.diffusion.studies.sampling_report import (
    CACHES,
    PointScore,
    SamplingPoint,
    cheapest_of_best,
    csv_rows,
    deviations_of,
    draw_quality,
    mean_over_tasks,
    summary,
    table_of_caches,
    table_of_choices,
    with_errors,
)
from trimask.diffusion.studies.trainings import make_room_for
from trimask.diffusion.studies.trials import ModelTrial, Trials, of_model, open_run
from trimask.diffusion.studies.verdict import ScoredSetting
from trimask.tokenizers.storage import configuration
from trimask.tokenizers.storage.files import write_text
from trimask.tokenizers.storage.ranges import Checked, NonNegative, PositiveInt, Seed, Share, Size, whole
from trimask.tokenizers.vocabulary import TEXT, Task

_FIT_EXAMPLES, _ROWS = 10_000, 128
"""Largest number of training examples to which judges are fitted, and number of rows generated at once."""


@dataclass(frozen=True, kw_only=True)
class SamplingStudy(Checked):
    """Model, questions and sampling settings that the study of sampling compares."""

    run: str = "runs/tiny"
    """Run folder of the trained model."""
    modalities: tuple[str, ...] | None = None
    """Modalities whose generation is studied. None: all that can be judged."""
    split: str = VALIDATION
    """Held-out split on which settings are chosen; not a test split, on which --final scores them."""
    guidances: tuple[NonNegative, ...] = (0.0, 0.5, 1.0, 2.0, 4.0)
    """Scales of classifier-free guidance to compare, for tasks with a condition; tasks that generate text get none."""
    temperatures: tuple[NonNegative, ...] = (0.0, 0.6, 1.0)
    """Temperatures of the tokens to compare."""
    steps: tuple[Size, ...] = (1, 2, 4, 8, 16, 24)
    """Numbers of steps to compare, for the strategies in `planned`."""
    planned: tuple[str, ...] = ("random", "confidence", "margin", "entropy")
    """Strategies to compare that reveal everything in a planned number of steps."""
    thresholds: tuple[Share, ...] = (0.5, 0.7, 0.9, 0.97)
    """Confidences to compare from which the strategy threshold reveals a token."""
    factors: tuple[NonNegative, ...] = (0.5, 1.0, 2.0, 4.0)
    """Factors to compare, for the strategy factor."""
    entropy_bounds: tuple[NonNegative, ...] = (0.05, 0.2, 1.0, 4.0)
    """Entropy bounds to compare, in nats, for the strategy entropy_bound."""
    blocks: tuple[Size, ...] = (4, 8, 16)
    """Block lengths, in tokens, with which caches are compared; lengths that give a single block are skipped."""
    alike: Share = 0.05
    """Largest amount by which the share of distinct answers may be below that of real media."""
    draws: Annotated[int, whole(2, 1 << 24)] = 3
    """Number of draws with the run's own settings, from which the errors of distances are estimated."""
    max_examples: PositiveInt | None = None
    """Largest number of questions for each task. None: all."""
    seed: Seed = 0
    """Seed of the generated answers."""
    apply: bool = False
    """Make the chosen settings the run's defaults, in its config.json."""

    def __post_init__(self):
        super().__post_init__()
        if not (self.guidances and self.temperatures and self.steps and self.planned):
            raise ValueError(f"there must be guidances, temperatures, steps and planned strategies to try; got {self}")
        for setting in self.heuristics():
            setting.applied_to(GenerationConfig())

    def heuristics(self) -> list[HeuristicSetting]:
        """Heuristic strategies to compare, at all their values."""
        values = {"threshold": self.thresholds, "factor": self.factors, "entropy_bound": self.entropy_bounds}
        return heuristic_settings(self.planned, self.steps, values)


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


@dataclass(frozen=True, kw_only=True)
class SettingsBefore:
    """Contents of before.json: the run's own settings when the study began, which `apply` replaces in the run."""

    generation: dict[str, GenerationConfig]
    """Modality → settings."""


class AskedTask(NamedTuple):
    """A task of a dataset that can be judged, and the held-out examples that ask for it."""

    task: Task
    held_out: HeldOutExamples


def study(config: SamplingStudy, trials: Trials) -> str:
    """Measures every task, writes points.csv, figures and generation.json, and returns the report in Markdown.

    Raises ValueError if the split has no question that can be judged.
    """
    loaded, prepared = open_run(config.run, trials.data)
    points, chosen = choose(config, loaded, prepared, trials)
    write_csv(trials.folder / "points.csv", [row for point in points for row in csv_rows(point)])
    draw_quality(trials.folder, points)
    settings = {modality: configuration.to_dict(generation) for modality, generation in chosen.items()}
    write_text(trials.folder / "generation.json", json.dumps(settings, indent=2) + "\n")
    if config.apply and trials.may_add:
        train = replace(loaded.description.train, generation=loaded.description.train.generation | chosen)
        configuration.save(loaded.folder / "config.json", replace(loaded.description, train=train))
    where = f"{config.run} at step {loaded.step}, split {config.split}"
    applied = "These are the run's defaults now" if config.apply else "With --apply they become the run's defaults"
    return (
        f"{where}: {len(points)} measurements. Chosen: the settings with the fewest evaluations among all as good as "
        f"the best.\n\n{table_of_choices(points, chosen)}\n\nIntervals are 95 %: of shares over the questions; of "
        f"distances over draws, from the deviation of {config.draws} draws with the run's own settings. {applied}.\n\n"
        f"The chosen settings in blocks, with caches:\n\n{table_of_caches(points)}"
    )


def rule(config: SamplingStudy) -> str:
    """The rule by which settings are chosen on the validation split."""
    return (
        f"for each modality, the settings with the fewest evaluations among all that on {config.split} are as good as "
        "the best: within one standard error of the best share of right answers (a share above that of real media "
        "counts as equal to it), and of those within one standard deviation of draws of the smallest distance; tasks "
        "that generate text share their settings, by the mean of their scores; settings whose share of distinct "
        f"answers is more than {config.alike:g} below that of real media are excluded"
    )


def final(config: SamplingStudy, trials: Trials) -> FinalResult:
    """Scores the chosen settings on all test splits; nothing else is measured there."""
    loaded, prepared = open_run(config.run, trials.data)
    _, chosen = choose(config, loaded, prepared, trials)
    splits = splits_to_score(prepared, prepared.manifest.datasets)
    tasks = [asked for asked in tasks_to_measure(loaded, prepared, config, splits) if asked.task.target in chosen]
    figures = list[ScoredSetting]()
    for target, of_target in grouped(tasks, lambda asked: asked.task.target).items():
        generation = chosen[target]
        draws = [(generation, config.seed + number) for number in range(config.draws)]
        planned = [_trial(config, loaded.step, asked, *draw) for draw in draws for asked in of_target]
        outcomes = trials.unrecorded(planned, measure_task, f"{target}: test")
        points = _by_setting(of_target, "test", draws, outcomes)
        deviations = [deviations_of(of_task) for of_task in zip(*points, strict=True)]
        for point, own in zip(points[0], deviations, strict=True):
            scores = zip(point.scores, with_errors(point, own, config.draws).scores, strict=True)
            figures += [
                _scored(
                    point, score, f"{config.draws} draws" if alone.interval is None else f"{point.examples} questions"
                )
                for alone, score in scores
            ]
    if not figures:
        raise ValueError(f"{prepared.folder}: {', '.join(splits)} has no questions that can be judged")
    words = [f"{target}: {summary(generation)}" for target, generation in chosen.items()]
    return FinalResult(f"{config.run} at step {loaded.step}", words, figures)


def _scored(point: SamplingPoint, score: PointScore, over: str) -> ScoredSetting:
    return ScoredSetting(
        setting=f"{point.task}, {summary(point.config)}",
        split=point.split,
        measure=score.judge,
        value=score.value,
        is_share=score.is_share,
        interval=score.interval,
        over=over,
        nfe=point.nfe,
    )


def choose(
    config: SamplingStudy, loaded: LoadedRun, prepared: Prepared, trials: Trials
) -> tuple[list[SamplingPoint], dict[str, GenerationConfig]]:
    """Measures every task on the split of the study; all points, and the chosen settings of each modality.

    Raises ValueError if the split has no question that can be judged, or if the model was not trained for guidance.
    """
    tasks = tasks_to_measure(loaded, prepared, config, [config.split])
    if not tasks:
        targets = "" if config.modalities is None else f" for {' or '.join(config.modalities)}"
        raise ValueError(f"{prepared.folder}: split {config.split!r} has no questions{targets} that can be judged")
    by_target = grouped(tasks, lambda asked: asked.task.target)
    for asked in tasks:
        if asked.task.target != TEXT:  # texts are tried without guidance
            loaded.require_trained_guidance(asked.task.name, GenerationConfig(guidance=max(config.guidances)))
    before = _settings_before(trials, {target: loaded.generation(target) for target in by_target})
    points, chosen = list[SamplingPoint](), dict[str, GenerationConfig]()
    for target, of_target in by_target.items():
        new_points, chosen[target] = measure_target(of_target, config, loaded.step, before[target], trials)
        points += new_points
    return points, chosen


def _settings_before(trials: Trials, now: dict[str, GenerationConfig]) -> dict[str, GenerationConfig]:
    """The run's own settings when the study began: those of before.json, which is written first; else those of now."""
    path = trials.folder / "before.json"
    known = configuration.load(path, SettingsBefore).generation if path.exists() else {}
    if trials.may_add and not now.keys() <= known.keys():
        trials.folder.mkdir(parents=True, exist_ok=True)
        configuration.save(path, SettingsBefore(generation=now | known))
    return now | known


def tasks_to_measure(
    loaded: LoadedRun, prepared: Prepared, config: SamplingStudy, splits: Iterable[str]
) -> list[AskedTask]:
    """All tasks of the splits that can be judged; no caption is asked that an earlier split asks."""
    tasks = []
    for name, manifest in prepared.manifest.datasets.items():
        real = TrainingExamples(prepared, name, _FIT_EXAMPLES)
        parts = [HeldOutExamples(prepared, name, s, config.max_examples) for s in splits if s in manifest.splits]
        for task in manifest.tasks(loaded.vocabulary):
            known = set[bytes]()
            for part in parts if config.modalities is None or task.target in config.modalities else []:
                if has_new_questions(task, part, known) and why_unjudged(task, part, real) is None:
                    tasks.append(AskedTask(task, part))
                known |= captions(part)
    return tasks


def measure_target(
    tasks: Sequence[AskedTask], config: SamplingStudy, model_step: int, before: GenerationConfig, trials: Trials
) -> tuple[list[SamplingPoint], GenerationConfig]:
    """All points of the tasks that generate one modality, and the settings that are chosen for it.

    `before` are the run's own settings, and `model_step` is the step of its checkpoint.
    """
    target = tasks[0].task.target
    records = [(asked.task, record) for asked in tasks for record in asked.held_out.records]
    real = {record[target].tobytes() for _, record in records}
    least_distinct = 0.0 if target == TEXT else len(real) / len(records) - config.alike

    def measured(part: str, settings: Sequence[tuple[GenerationConfig, int]]) -> list[list[SamplingPoint]]:
        planned = [_trial(config, model_step, asked, *setting) for setting in settings for asked in tasks]
        outcomes = trials.measurements(planned, measure_task, TaskOutcome, f"{target}: {part}")
        return _by_setting(tasks, part, settings, outcomes)

    draws = measured("before", [(before, config.seed + number) for number in range(config.draws)])
    deviations = [deviations_of(of_task) for of_task in zip(*draws, strict=True)]

    def with_all_errors(settings: Sequence[Sequence[SamplingPoint]]) -> list[list[SamplingPoint]]:
        return [
            [with_errors(point, own, config.draws) for point, own in zip(points, deviations, strict=True)]
            for points in settings
        ]

    def best() -> GenerationConfig:
        return cheapest_of_best([mean_over_tasks(points) for points in rows], least_distinct).config

    rows = with_all_errors(draws[:1])
    strategies = [setting.applied_to(before) for setting in config.heuristics()]
    rows += with_all_errors(measured("strategy", [(how, config.seed) for how in strategies]))
    # A text has one right answer, and its tasks share their settings, of which one has no condition: no guidance.
    guidances, guided = config.guidances if target != TEXT else (0.0,), best()
    grid = [replace(guided, guidance=g, temperature=t) for t in config.temperatures for g in guidances]
    rows += with_all_errors(measured("guidance", [(how, config.seed) for how in grid]))
    chosen, longest = best(), max(_num_asked(*record) for record in records)
    blocks = [block for block in config.blocks if block < longest]
    cached = [replace(chosen, block_length=block, cache=cache) for block in blocks for cache in CACHES]
    rows += with_all_errors(measured("cache", [(how, config.seed) for how in cached]))
    return [point for points in rows for point in points], chosen


def _trial(config: SamplingStudy, model_step: int, asked: AskedTask, how: GenerationConfig, seed: int) -> TaskTrial:
    return TaskTrial(
        **of_model(config.run, model_step),
        dataset=asked.held_out.dataset,
        task=asked.task.name,
        split=asked.held_out.split,
        max_examples=config.max_examples,
        seed=seed,
        how=how,
    )


def _num_asked(task: Task, record: dict[str, Any]) -> int:
    """Number of codes to generate for a question."""
    codes = question(task, record).segments[-1].codes
    return int((codes < 0).sum())


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
    real = TrainingExamples(prepared, dataset, _FIT_EXAMPLES)
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


def _by_setting(
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
