"""How should each modality be sampled? Quality against the number of function evaluations (NFE), and against guidance.

For every task of a trained model the study measures, on held-out questions:

1. every heuristic strategy over its parameter, at the guidance and temperature of the run: fronts of quality against
   NFE;
2. guidance × temperature with the best of these: accuracy and distance against guidance;
3. the chosen settings in blocks, with each cache: the loss of quality by keeping keys and values;
4. every modality by the settings that were chosen for the others (`sampling_claims.py`).

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
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

from trimask.diffusion.data.prepared import Prepared
from trimask.diffusion.data.splits import VALIDATION
from trimask.diffusion.evaluation.exam import captions, has_new_questions, question, why_unjudged
from trimask.diffusion.evaluation.held_out import HeldOutExamples, TrainingExamples
from trimask.diffusion.pretraining.trained_model import LoadedRun
from trimask.diffusion.sampling.generation_config import GenerationConfig
from trimask.diffusion.studies.claims import Findings, table_of_claims
from trimask.diffusion.studies.final import FinalResult, splits_to_score
from trimask.diffusion.studies.findings import grouped, write_csv
from trimask.diffusion.studies.heuristics import HeuristicSetting, heuristic_settings
from trimask.diffusion.studies.sampling_claims import DRAWS, FIRST_DRAW, claims_of
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
from trimask.diffusion.studies.sampling_trials import (
    FIT_EXAMPLES,
    AskedTask,
    TaskOutcome,
    TaskTrial,
    measure_task,
    points_by_setting,
)
from trimask.diffusion.studies.trials import Trials, of_model, open_run
from trimask.diffusion.studies.verdict import ScoredSetting
from trimask.tokenizers.storage import configuration
from trimask.tokenizers.storage.files import write_text
from trimask.tokenizers.storage.ranges import Checked, NonNegative, PositiveInt, Seed, Share, Size, whole
from trimask.tokenizers.vocabulary import TEXT, Task


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
class SettingsBefore:
    """Contents of before.json: the run's own settings when the study began, which `apply` replaces in the run."""

    generation: dict[str, GenerationConfig]
    """Modality → settings."""


def study(config: SamplingStudy, trials: Trials) -> Findings:
    """Measures every task, writes points.csv, figures and generation.json, and returns the report and the claims.

    Raises ValueError if the split has no question that can be judged.
    """
    loaded, prepared = open_run(config.run, trials.data)
    asked = asked_by_target(config, loaded, prepared)
    points, chosen = choose(config, loaded, asked, trials)
    crosswise = measure_crosswise(config, loaded.step, asked, chosen, trials)
    claims = claims_of(Path(config.run).name, crosswise)
    write_csv(trials.folder / "points.csv", [row for point in points for row in csv_rows(point)])
    draw_quality(trials.folder, points)
    settings = {modality: configuration.to_dict(generation) for modality, generation in chosen.items()}
    write_text(trials.folder / "generation.json", json.dumps(settings, indent=2) + "\n")
    train = loaded.description.train
    is_applied = train.generation == train.generation | chosen
    if config.apply and trials.may_add and not is_applied:
        train = replace(train, generation=train.generation | chosen)
        configuration.save(loaded.folder / "config.json", replace(loaded.description, train=train))
        is_applied = True
    where = f"{config.run} at step {loaded.step}, split {config.split}"
    applied = "These are the run's defaults" if is_applied else "With --apply they become the run's defaults"
    parts = [
        f"{where}: {len(points)} measurements. Chosen: the settings with the fewest evaluations among all as good as "
        "the best.",
        table_of_choices(points, {target: crosswise[target, target] for target in chosen}),
        "Intervals are 95 %: of shares over the questions; of distances over draws, from the deviation of "
        f"{config.draws} draws with the run's own settings. The draw that chose the settings favours them; *new draws* "
        f"is the mean over {DRAWS} others, with intervals of distances over them. *Real media* are held-out ones "
        f"for shares, and as many training ones for distances. {applied}.",
        "The chosen settings in blocks, with caches:",
        table_of_caches(points),
    ]
    if claims:
        parts += ["Each modality by the settings of the others:", table_of_claims(claims)]
    return Findings("\n\n".join(parts), claims)


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
    _, chosen = choose(config, loaded, asked_by_target(config, loaded, prepared), trials)
    splits = splits_to_score(prepared, prepared.manifest.datasets)
    tasks = [asked for asked in tasks_to_measure(loaded, prepared, config, splits) if asked.task.target in chosen]
    figures = list[ScoredSetting]()
    for target, of_target in grouped(tasks, lambda asked: asked.task.target).items():
        generation = chosen[target]
        draws = [(generation, config.seed + number) for number in range(config.draws)]
        planned = [_trial(config, loaded.step, asked, *draw) for draw in draws for asked in of_target]
        outcomes = trials.unrecorded(planned, measure_task, f"{target}: test")
        points = points_by_setting(of_target, "test", draws, outcomes)
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


def asked_by_target(config: SamplingStudy, loaded: LoadedRun, prepared: Prepared) -> dict[str, list[AskedTask]]:
    """Modality → the tasks that generate it, on the split of the study.

    Raises ValueError if the split has no question that can be judged, or if the model was not trained for guidance.
    """
    tasks = tasks_to_measure(loaded, prepared, config, [config.split])
    if not tasks:
        targets = "" if config.modalities is None else f" for {' or '.join(config.modalities)}"
        raise ValueError(f"{prepared.folder}: split {config.split!r} has no questions{targets} that can be judged")
    for asked in tasks:
        if asked.task.target != TEXT:  # texts are tried without guidance
            loaded.require_trained_guidance(asked.task.name, GenerationConfig(guidance=max(config.guidances)))
    return grouped(tasks, lambda asked: asked.task.target)


def choose(
    config: SamplingStudy, loaded: LoadedRun, asked: Mapping[str, Sequence[AskedTask]], trials: Trials
) -> tuple[list[SamplingPoint], dict[str, GenerationConfig]]:
    """Measures every task on the split of the study; all points, and the chosen settings of each modality."""
    before = _settings_before(trials, {target: loaded.generation(target) for target in asked})
    points, chosen = list[SamplingPoint](), dict[str, GenerationConfig]()
    for target, of_target in asked.items():
        new_points, chosen[target] = measure_target(of_target, config, loaded.step, before[target], trials)
        points += new_points
    return points, chosen


def measure_crosswise(
    config: SamplingStudy,
    model_step: int,
    asked: Mapping[str, Sequence[AskedTask]],
    chosen: Mapping[str, GenerationConfig],
    trials: Trials,
) -> dict[tuple[str, str], list[list[SamplingPoint]]]:
    """A modality, and the one whose chosen settings it is sampled by → points of its tasks, for every draw.

    Texts are sampled without guidance; another modality is left out if its settings are then equal to the own ones.
    """
    found = {}
    for target, tasks in asked.items():
        settings = {other: replace(how, guidance=0.0) if target == TEXT else how for other, how in chosen.items()}
        for other, how in settings.items():
            if other == target or how != settings[target]:
                draws = [(how, config.seed + FIRST_DRAW + number) for number in range(DRAWS)]
                planned = [_trial(config, model_step, task, *draw) for draw in draws for task in tasks]
                outcomes = trials.measurements(planned, measure_task, TaskOutcome, f"{target}, settings of {other}")
                found[target, other] = points_by_setting(tasks, "crosswise", draws, outcomes)
    return found


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
        real = TrainingExamples(prepared, name, FIT_EXAMPLES)
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
        return points_by_setting(tasks, part, settings, outcomes)

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
