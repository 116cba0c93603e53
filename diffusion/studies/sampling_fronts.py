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
generate text share their settings, which are chosen by the mean of their scores.
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np

from trimask.diffusion.data.prepared import Prepared
from trimask.diffusion.data.splits import VALIDATION
from trimask.diffusion.evaluation.exam import Exam, choose_judges, has_new_questions, question
from trimask.diffusion.evaluation.held_out import HeldOutExamples, TrainingExamples
from trimask.diffusion.evaluation.results import Score
from trimask.diffusion.pretraining.trained_model import LoadedRun
from trimask.diffusion.run.progress import Report
from trimask.diffusion.sampling.generation_config import GenerationConfig
from trimask.diffusion.sampling.generator import Generator
from trimask.diffusion.studies.findings import (
    Panel,
    draw_panels,
    grouped,
    markdown_table,
    standard_error_of_interval,
    write_csv,
)
from trimask.diffusion.studies.heuristics import PARAMETERS, HeuristicSetting, heuristic_settings
from trimask.diffusion.studies.trials import Trials, make_room_for, open_run
from trimask.tokenizers.storage import configuration
from trimask.tokenizers.storage.files import write_text
from trimask.tokenizers.storage.ranges import Checked, NonNegative, PositiveInt, Seed, Share, Size, whole
from trimask.tokenizers.vocabulary import TEXT

_FIT_EXAMPLES, _ROWS = 10_000, 128
"""Largest number of training examples to which judges are fitted, and number of rows generated at once."""
_CACHES = ("none", "prefix", "dual")
"""Caches of keys and values to compare, as named in `GenerationConfig.cache`."""


@dataclass(frozen=True, kw_only=True)
class SamplingStudy(Checked):
    """Model, questions and sampling settings that the study of sampling compares."""

    run: str = "runs/tiny"
    """Run folder of the trained model."""
    modalities: tuple[str, ...] | None = None
    """Modalities whose generation is studied. None: all that can be judged."""
    split: str = VALIDATION
    """Held-out split on which settings are chosen; `trimask evaluate` then measures them on another split."""
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


@dataclass(frozen=True)
class Verdict:
    """Score that one judge gives to the answers."""

    judge: str
    value: float
    error: float
    """Standard error of a share of right answers; standard deviation over draws of a distance."""
    higher_is_better: bool
    on_real: float | None = None
    """Score of real media. None: not measured."""

    @property
    def goodness(self) -> float:
        """Value that is compared between settings; larger is better. Shares are cut off at the share of real media."""
        if not self.higher_is_better:
            return -self.value
        return self.value if self.on_real is None else min(self.value, self.on_real)


@dataclass(frozen=True)
class SamplingPoint:
    """Measurement of one task with one sampling setting."""

    target: str
    """Modality that the task generates."""
    task: str
    """Dataset and name of the task."""
    part: str
    """Part of the study: before (the run's own settings), strategy, guidance or cache."""
    config: GenerationConfig
    verdicts: tuple[Verdict, ...]
    """Scores, the most important first."""
    nfe: float
    """Mean number of function evaluations of an answer."""
    distinct: float
    """Number of different answers over number of answers."""


def study(config: SamplingStudy, trials: Trials) -> str:
    """Measures every task, writes points.csv, figures and generation.json, and returns the report in Markdown.

    Raises ValueError if the split has no question that can be judged.
    """
    loaded, prepared = open_run(config.run, trials.data)
    exams = exams_to_measure(loaded, prepared, config)
    if not exams:
        targets = "" if config.modalities is None else f" for {' or '.join(config.modalities)}"
        raise ValueError(f"{prepared.folder}: split {config.split!r} has no questions{targets} that can be judged")
    chosen: dict[str, GenerationConfig] = {}
    points: list[SamplingPoint] = []
    for target, of_target in grouped(exams, lambda exam: exam.task.target).items():
        new_points, chosen[target] = measure_target(of_target, config, trials.report)
        points += new_points
        # Written after every target, so that an error in a later one loses no measurements.
        write_csv(trials.folder / "points.csv", [row for point in points for row in _rows(point)])
    _draw_figures(trials.folder, points)
    settings = {modality: configuration.to_dict(generation) for modality, generation in chosen.items()}
    write_text(trials.folder / "generation.json", json.dumps(settings, indent=2) + "\n")
    if config.apply:
        train = dataclasses.replace(loaded.description.train, generation=loaded.description.train.generation | chosen)
        configuration.save(loaded.folder / "config.json", dataclasses.replace(loaded.description, train=train))
    where = f"{config.run} at step {loaded.step}, split {config.split}"
    applied = "These are the run's defaults now" if config.apply else "With --apply they become the run's defaults"
    return (
        f"{where}: {len(points)} measurements. Chosen: the settings with the fewest evaluations among all as good as "
        f"the best.\n\n{_table_of_choices(points, chosen)}\n\n{applied}.\n\n"
        f"The chosen settings in blocks, with caches:\n\n{_table_of_caches(points)}"
    )


def exams_to_measure(loaded: LoadedRun, prepared: Prepared, config: SamplingStudy) -> list[Exam]:
    """Exams of all tasks of the split that can be judged: by the first default judge, and media by their distance."""
    exams = []
    for name, manifest in prepared.manifest.datasets.items():
        if config.split not in manifest.splits:
            continue
        part = HeldOutExamples(prepared, name, config.split, config.max_examples)
        real = TrainingExamples(prepared, name, _FIT_EXAMPLES)
        for task in manifest.tasks(loaded.vocabulary):
            is_wanted = config.modalities is None or task.target in config.modalities
            if is_wanted and has_new_questions(task, part, set()):
                judges = choose_judges(task, part, real, {})[:1]
                if judges and task.target != TEXT and judges[0].name != "frechet":
                    judges += choose_judges(task, part, real, {task.name: ("frechet",)})
                if judges:
                    exams.append(Exam(loaded, task, part, real, judges))
    return exams


def measure_target(
    exams: Sequence[Exam], config: SamplingStudy, report: Report
) -> tuple[list[SamplingPoint], GenerationConfig]:
    """All points of the tasks that generate one modality, and the settings that are chosen for it."""
    target = exams[0].task.target
    heuristics = config.heuristics()
    # A text has one right answer, and its tasks share their settings, of which one has no condition: no guidance.
    guidances = config.guidances if target != TEXT else (0.0,)
    grid: list[dict[str, Any]] = [{"guidance": g, "temperature": t} for t in config.temperatures for g in guidances]
    longest = max(_num_asked(exam, number) for exam in exams for number in range(len(exam.held_out.records)))
    blocks = [block for block in config.blocks if block < longest]
    caches: list[dict[str, Any]] = [{"block_length": b, "cache": cache} for b in blocks for cache in _CACHES]
    sweep = _Sweep(exams, config, report, config.draws + len(heuristics) + len(grid) + len(caches))
    for setting in heuristics:
        sweep.measure("strategy", setting.applied_to(sweep.before))
    best = sweep.best()
    for options in grid:
        sweep.measure("guidance", dataclasses.replace(best, **options))
    chosen = sweep.best()
    for options in caches:
        sweep.measure("cache", dataclasses.replace(chosen, **options))
    sweep.report_done()
    return sweep.points, chosen


class _Sweep:
    """Measures the tasks that generate one modality with one setting after another."""

    def __init__(self, exams: Sequence[Exam], config: SamplingStudy, report: Report, total: int):
        """Measures the run's own settings, `before`; `total` is the number of measurements, these draws included."""
        loaded, self._target = exams[0].loaded, exams[0].task.target
        self._exams, self._config, self._report, self._total = exams, config, report, total
        self._generator = Generator(loaded.denoise, loaded.vocabulary, rows=_ROWS)
        self.before = loaded.generation(self._target)
        self.points: list[SamplingPoint] = []
        self._means: list[SamplingPoint] = []
        draws = []
        for number in range(config.draws):
            report(f"making {self._target}", number, total)
            draws.append(self._measure("before", self.before, config.seed + number))
        self._errors = [_deviations(of_exam) for of_exam in zip(*draws, strict=True)]
        self._record(draws[0])

    def measure(self, part: str, generation: GenerationConfig) -> None:
        """Measures all tasks with a setting."""
        self._report(f"making {self._target}", self._config.draws - 1 + len(self._means), self._total)
        self._record(self._measure(part, generation, self._config.seed))

    def best(self) -> GenerationConfig:
        """The setting with the fewest evaluations among those measured so far that are as good as the best."""
        least_distinct = 0.0
        if self._target != TEXT:
            real = [record[self._target].tobytes() for exam in self._exams for record in exam.held_out.records]
            least_distinct = len(set(real)) / len(real) - self._config.alike
        return cheapest_of_best(self._means, least_distinct).config

    def report_done(self) -> None:
        """Reports that all measurements are made."""
        self._report(f"making {self._target}", self._total, self._total)

    def _measure(self, part: str, generation: GenerationConfig, seed: int) -> list[SamplingPoint]:
        make_room_for(generation.strategy, most=1)  # a strategy is a program for every batch size
        return [_measure_point(exam, part, generation, self._generator, seed) for exam in self._exams]

    def _record(self, points: Sequence[SamplingPoint]) -> None:
        points = [_with_errors(point, errors) for point, errors in zip(points, self._errors, strict=True)]
        self.points += points
        self._means.append(_mean(points))


def _num_asked(exam: Exam, number: int) -> int:
    """Number of codes to generate for a question."""
    codes = question(exam.task, exam.held_out.records[number]).segments[-1].codes
    return int((codes < 0).sum())


def _measure_point(
    exam: Exam, part: str, generation: GenerationConfig, generator: Generator, seed: int
) -> SamplingPoint:
    answers = exam.answers(generator, generation, seed)
    verdicts = tuple(_verdict(score) for score in exam.grade(answers)[0])
    codes = {answer.example.segments[-1].codes.tobytes() for answer in answers}
    nfe = float(np.mean([answer.nfe for answer in answers]))
    task = f"{exam.held_out.dataset}: {exam.task.name}"
    return SamplingPoint(exam.task.target, task, part, generation, verdicts, nfe, len(codes) / len(answers))


def _verdict(score: Score) -> Verdict:
    error = 0.0 if score.interval is None else standard_error_of_interval(*score.interval)
    return Verdict(score.judge, score.value, error, bool(score.higher_is_better), score.on_real)


def _deviations(draws: Sequence[SamplingPoint]) -> dict[str, float]:
    """Judge → standard deviation of its score over several draws."""
    return {
        first.judge: float(np.std([point.verdicts[number].value for point in draws], ddof=1))
        for number, first in enumerate(draws[0].verdicts)
    }


def _with_errors(point: SamplingPoint, deviations: dict[str, float]) -> SamplingPoint:
    """The point with the deviation over draws as error of every verdict that has no error of its own."""
    verdicts = (v if v.error else dataclasses.replace(v, error=deviations[v.judge]) for v in point.verdicts)
    return dataclasses.replace(point, verdicts=tuple(verdicts))


def _mean(points: Sequence[SamplingPoint]) -> SamplingPoint:
    """Mean over the tasks of one modality, with the same settings; only verdicts of judges that all tasks have."""
    verdicts = []
    for first in points[0].verdicts:
        same = [v for point in points for v in point.verdicts if v.judge == first.judge]
        if len(same) == len(points):
            error = float(np.sqrt(np.sum(np.square([v.error for v in same])))) / len(same)
            verdicts.append(dataclasses.replace(first, value=float(np.mean([v.value for v in same])), error=error))
    nfe, distinct = (float(np.mean([getattr(point, name) for point in points])) for name in ("nfe", "distinct"))
    return dataclasses.replace(points[0], verdicts=tuple(verdicts), nfe=nfe, distinct=distinct)


def cheapest_of_best(points: Sequence[SamplingPoint], least_distinct: float) -> SamplingPoint:
    """The point with the fewest evaluations of those that are as good as the best.

    Judge after judge, the points within one error of the best remaining one remain. Points with a share of distinct
    answers below `least_distinct` are excluded, unless all are.
    """
    left = [point for point in points if point.distinct >= least_distinct] or list(points)
    for number in range(len(points[0].verdicts)):
        best = max((point.verdicts[number] for point in left), key=lambda verdict: verdict.goodness)
        left = [point for point in left if point.verdicts[number].goodness >= best.goodness - best.error]
    return min(left, key=lambda point: (point.nfe, *(-verdict.goodness for verdict in point.verdicts)))


def _table_of_choices(points: Sequence[SamplingPoint], chosen: Mapping[str, GenerationConfig]) -> str:
    cells = []
    for task, of_task in _by_task(points).items():
        after = next(point for point in of_task[::-1] if point.config == chosen[point.target])
        for name, point in (("before", of_task[0]), ("chosen", after)):
            verdicts = "; ".join(_shown(verdict) for verdict in point.verdicts)
            cells.append([task, name, summary(point.config), verdicts, f"{point.nfe:.1f}", f"{point.distinct:.1%}"])
        on_real = "; ".join(_number(v, v.on_real) for v in of_task[0].verdicts if v.on_real is not None)
        if on_real:
            cells.append([task, "real media", "", on_real, "", ""])
    return markdown_table(["task", "", "settings", "score", "NFE", "distinct"], cells)


def _table_of_caches(points: Sequence[SamplingPoint]) -> str:
    cells = []
    for task, of_task in _by_task(points).items():
        cached = [point for point in of_task if point.part == "cache"]
        for block, of_block in grouped(cached, lambda point: point.config.block_length).items():
            for number in range(len(of_block[0].verdicts)):
                shown = [_shown(point.verdicts[number]) for point in of_block]
                cells.append([task, str(block), f"{of_block[0].nfe:.1f}", *shown])
    return markdown_table(["task", "block", "NFE", *_CACHES], cells)


def _by_task(points: Sequence[SamplingPoint]) -> dict[str, list[SamplingPoint]]:
    return grouped(points, lambda point: point.task)


def _shown(verdict: Verdict) -> str:
    return f"{_number(verdict, verdict.value)} ± {_number(verdict, verdict.error).removeprefix(f'{verdict.judge} ')}"


def _number(verdict: Verdict, value: float) -> str:
    is_share = verdict.higher_is_better and 0 <= verdict.value <= 1
    return f"{verdict.judge} {value:.1%}" if is_share else f"{verdict.judge} {value:.3g}"


def summary(config: GenerationConfig) -> str:
    """Strategy, its parameter, temperature and guidance, in words."""
    parameter = PARAMETERS.get(config.strategy)
    value = f"{config.steps} steps" if parameter is None else f"{getattr(config, parameter):g}"
    return f"{config.strategy}, {value}, temperature {config.temperature:g}, guidance {config.guidance:g}"


def _rows(point: SamplingPoint) -> list[dict[str, Any]]:
    """Rows of points.csv: one per judge."""
    c = point.config
    settings = {"strategy": c.strategy, "steps": c.steps, "threshold": c.threshold, "factor": c.factor}
    settings |= {"entropy_bound": c.entropy_bound, "temperature": c.temperature, "guidance": c.guidance}
    settings |= {"block_length": c.block_length, "cache": c.cache, "nfe": point.nfe, "distinct": point.distinct}
    return [
        {
            "task": point.task,
            "part": point.part,
            **settings,
            "judge": v.judge,
            "value": v.value,
            "error": v.error,
            "on_real": v.on_real,
        }
        for v in point.verdicts
    ]


def _draw_figures(folder: Path, points: Sequence[SamplingPoint]) -> None:
    """Draws guidance.png, if any task is guided, and fronts.png, with a panel for each task and judge."""
    guided, fronts = [], []
    for task, of_task in _by_task(points).items():
        for number, verdict in enumerate(of_task[0].verdicts):
            by_temperature: dict[str, list[tuple[float, float]]] = {}
            by_strategy: dict[str, list[tuple[float, float]]] = {}
            for point in sorted(of_task, key=lambda point: point.nfe):
                value = point.verdicts[number].value
                if point.part == "guidance":
                    label = f"temperature {point.config.temperature:g}"
                    by_temperature.setdefault(label, []).append((point.config.guidance, value))
                elif point.part == "strategy":
                    by_strategy.setdefault(point.config.strategy, []).append((point.nfe, value))
            by_temperature = {label: sorted(curve) for label, curve in by_temperature.items()}
            title, scale = task.replace("_", " "), "linear" if verdict.higher_is_better else "log"
            if any(len(curve) > 1 for curve in by_temperature.values()):
                guided.append(
                    Panel(title=title, curves=by_temperature, x="guidance", y=verdict.judge, scales=("linear", scale))
                )
            fronts.append(
                Panel(title=title, curves=by_strategy, x="evaluations (NFE)", y=verdict.judge, scales=("log", scale))
            )
    if guided:
        draw_panels(folder / "guidance.png", guided, columns=2)
    draw_panels(folder / "fronts.png", fronts, columns=3)
