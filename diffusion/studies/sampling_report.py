"""Points of the study of sampling: their errors, the choice among them, tables, points.csv and figures."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from trimask.diffusion.evaluation.intervals import half_width_of_one, mean_and_half_width
from trimask.diffusion.sampling.generation_config import GenerationConfig
from trimask.diffusion.studies.findings import Panel, draw_panels, grouped, markdown_table
from trimask.diffusion.studies.heuristics import PARAMETERS

CACHES: tuple[Literal["none", "prefix", "dual"], ...] = ("none", "prefix", "dual")
"""Caches of keys and values to compare, as named in `GenerationConfig.cache`."""


@dataclass(frozen=True)
class PointScore:
    """Score that one judge gives to the answers, with the error by which settings are compared."""

    judge: str
    value: float
    error: float
    """Standard error of a share of right answers; standard deviation over draws of a distance."""
    interval: tuple[float, float] | None
    """95 % interval: of a share over the questions, of a distance over draws. None: a mean over tasks."""
    higher_is_better: bool
    on_real: float | None = None
    """Score of real media. None: not measured."""

    @property
    def goodness(self) -> float:
        """Value that is compared between settings; larger is better. Shares are cut off at the share of real media."""
        if not self.higher_is_better:
            return -self.value
        return self.value if self.on_real is None else min(self.value, self.on_real)

    @property
    def is_share(self) -> bool:
        """Whether the value is shown in per cent."""
        return self.higher_is_better and 0 <= self.value <= 1


@dataclass(frozen=True)
class SamplingPoint:
    """Measurement of one task with one sampling setting."""

    target: str
    """Modality that the task generates."""
    task: str
    """Dataset and name of the task."""
    part: str
    """Part of the study: before (the run's own settings), strategy, guidance or cache; test of a final score."""
    config: GenerationConfig
    scores: tuple[PointScore, ...]
    """Scores, the most important first."""
    nfe: float
    """Mean number of function evaluations of an answer."""
    distinct: float
    """Number of different answers over number of answers."""
    split: str
    examples: int
    """Number of answers."""


def deviations_of(draws: Sequence[SamplingPoint]) -> dict[str, float]:
    """Judge → standard deviation of its score over several draws."""
    return {
        first.judge: float(np.std([point.scores[number].value for point in draws], ddof=1))
        for number, first in enumerate(draws[0].scores)
    }


def with_errors(point: SamplingPoint, deviations: dict[str, float], draws: int) -> SamplingPoint:
    """The point with the deviation over `draws` draws as error of every score that has no interval of its own."""
    scores = (s if s.interval else _with_deviation(s, deviations[s.judge], draws) for s in point.scores)
    return dataclasses.replace(point, scores=tuple(scores))


def _with_deviation(score: PointScore, deviation: float, draws: int) -> PointScore:
    half = half_width_of_one(deviation, draws)
    return dataclasses.replace(score, error=deviation, interval=(score.value - half, score.value + half))


def mean_over_tasks(points: Sequence[SamplingPoint]) -> SamplingPoint:
    """Mean over the tasks of one modality, with the same settings; only scores of judges that all tasks have."""
    scores = []
    for first in points[0].scores:
        same = [score for point in points for score in point.scores if score.judge == first.judge]
        if len(same) == len(points):
            error = float(np.sqrt(np.sum(np.square([score.error for score in same])))) / len(same)
            value = float(np.mean([score.value for score in same]))
            scores.append(dataclasses.replace(first, value=value, error=error, interval=None))
    nfe, distinct = (float(np.mean([getattr(point, name) for point in points])) for name in ("nfe", "distinct"))
    return dataclasses.replace(points[0], scores=tuple(scores), nfe=nfe, distinct=distinct)


def _mean_over_draws(draws: Sequence[SamplingPoint]) -> SamplingPoint:
    """Mean over draws of one task; distances have 95 % intervals over the draws, and shares have none."""
    scores = []
    for number, first in enumerate(draws[0].scores):
        mean, half = mean_and_half_width(np.asarray([point.scores[number].value for point in draws]))
        interval = None if first.is_share else (float(mean - half), float(mean + half))
        scores.append(dataclasses.replace(first, value=float(mean), interval=interval))
    nfe, distinct = (float(np.mean([getattr(point, name) for point in draws])) for name in ("nfe", "distinct"))
    return dataclasses.replace(draws[0], scores=tuple(scores), nfe=nfe, distinct=distinct)


def cheapest_of_best(points: Sequence[SamplingPoint], least_distinct: float) -> SamplingPoint:
    """The point with the fewest evaluations of those that are as good as the best.

    Judge after judge, the points within one error of the best remaining one remain. Points with a share of distinct
    answers below `least_distinct` are excluded, unless all are.
    """
    left = [point for point in points if point.distinct >= least_distinct] or list(points)
    for number in range(len(points[0].scores)):
        best = max((point.scores[number] for point in left), key=lambda score: score.goodness)
        left = [point for point in left if point.scores[number].goodness >= best.goodness - best.error]
    return min(left, key=lambda point: (point.nfe, *(-score.goodness for score in point.scores)))


def table_of_choices(
    points: Sequence[SamplingPoint], new_draws: Mapping[str, Sequence[Sequence[SamplingPoint]]]
) -> str:
    """Markdown table of every task with the run's own settings and with the chosen ones.

    `new_draws` maps a modality to the points of its tasks with the chosen settings, for every draw that chose nothing.
    """
    again = {of_task[0].task: of_task for draws in new_draws.values() for of_task in zip(*draws, strict=True)}
    cells = []
    for task, of_task in _by_task(points).items():
        after = next(point for point in of_task[::-1] if point.config == again[task][0].config)
        rows = (("before", of_task[0]), ("chosen", after), ("chosen, new draws", _mean_over_draws(again[task])))
        for name, point in rows:
            scores = "; ".join(_shown(score) for score in point.scores)
            cells.append([task, name, summary(point.config), scores, f"{point.nfe:.1f}", f"{point.distinct:.1%}"])
        on_real = "; ".join(f"{s.judge} {_number(s, s.on_real)}" for s in of_task[0].scores if s.on_real is not None)
        if on_real:
            cells.append([task, "real media", "", on_real, "", ""])
    return markdown_table(["task", "", "settings", "score (95 % interval)", "NFE", "distinct"], cells)


def table_of_caches(points: Sequence[SamplingPoint]) -> str:
    """Markdown table of the scores in blocks, with each cache."""
    cells = []
    for task, of_task in _by_task(points).items():
        cached = [point for point in of_task if point.part == "cache"]
        for block, of_block in grouped(cached, lambda point: point.config.block_length).items():
            for number in range(len(of_block[0].scores)):
                shown = [_shown(point.scores[number]) for point in of_block]
                cells.append([task, str(block), f"{of_block[0].nfe:.1f}", *shown])
    return markdown_table(["task", "block", "NFE", *CACHES], cells)


def _by_task(points: Sequence[SamplingPoint]) -> dict[str, list[SamplingPoint]]:
    return grouped(points, lambda point: point.task)


def _shown(score: PointScore) -> str:
    """Judge, value and 95 % interval."""
    interval = "" if score.interval is None else f" ({'–'.join(_number(score, end) for end in score.interval)})"
    return f"{score.judge} {_number(score, score.value)}{interval}"


def _number(score: PointScore, value: float) -> str:
    return f"{value:.1%}" if score.is_share else f"{value:.3g}"


def summary(config: GenerationConfig) -> str:
    """Strategy, its parameter, temperature and guidance, in words."""
    parameter = PARAMETERS.get(config.strategy)
    value = f"{config.steps} steps" if parameter is None else f"{getattr(config, parameter):g}"
    return f"{config.strategy}, {value}, temperature {config.temperature:g}, guidance {config.guidance:g}"


def csv_rows(point: SamplingPoint) -> list[dict[str, Any]]:
    """Rows of points.csv: one per judge, with the ends of the 95 % interval."""
    c = point.config
    settings = {"strategy": c.strategy, "steps": c.steps, "threshold": c.threshold, "factor": c.factor}
    settings |= {"entropy_bound": c.entropy_bound, "temperature": c.temperature, "guidance": c.guidance}
    settings |= {"block_length": c.block_length, "cache": c.cache, "nfe": point.nfe, "distinct": point.distinct}
    return [
        {
            "task": point.task,
            "part": point.part,
            **settings,
            "judge": s.judge,
            "value": s.value,
            "low": None if s.interval is None else s.interval[0],
            "high": None if s.interval is None else s.interval[1],
            "on_real": s.on_real,
        }
        for s in point.scores
    ]


def draw_quality(folder: Path, points: Sequence[SamplingPoint]) -> None:
    """Draws guidance.png, if any task is guided, and fronts.png, with a panel for each task and judge."""
    guided, fronts = [], []
    for task, of_task in _by_task(points).items():
        for number, score in enumerate(of_task[0].scores):
            by_temperature: dict[str, list[tuple[float, float]]] = {}
            by_strategy: dict[str, list[tuple[float, float]]] = {}
            for point in sorted(of_task, key=lambda point: point.nfe):
                value = point.scores[number].value
                if point.part == "guidance":
                    label = f"temperature {point.config.temperature:g}"
                    by_temperature.setdefault(label, []).append((point.config.guidance, value))
                elif point.part == "strategy":
                    by_strategy.setdefault(point.config.strategy, []).append((point.nfe, value))
            by_temperature = {label: sorted(curve) for label, curve in by_temperature.items()}
            title, scale = task.replace("_", " "), "linear" if score.higher_is_better else "log"
            if any(len(curve) > 1 for curve in by_temperature.values()):
                guided.append(
                    Panel(title=title, curves=by_temperature, x="guidance", y=score.judge, scales=("linear", scale))
                )
            fronts.append(
                Panel(title=title, curves=by_strategy, x="evaluations (NFE)", y=score.judge, scales=("log", scale))
            )
    if guided:
        draw_panels(folder / "guidance.png", guided, columns=2)
    draw_panels(folder / "fronts.png", fronts, columns=3)
