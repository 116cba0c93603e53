"""How should each modality be sampled? Quality against function evaluations, and against guidance.

For every task a trained model has, on held-out questions:

1. guidance × temperature, at the run's own strategy and steps: the curve of accuracy against guidance;
2. with the best of them, every strategy over its number: fronts of quality against evaluations (NFE).

What is chosen has the fewest evaluations among all that are as good as the best, to one standard error of the best. A
medium that always comes out the same is no good however right it is: as large a share of the answers must differ as of
real media, but for `alike`. Tasks that make text share their settings, and are chosen for by the mean of their scores.
"""

import dataclasses
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from trimask.diffusion import configuration
from trimask.diffusion.data.prepared import Prepared
from trimask.diffusion.evaluate import require_same_tokenizers
from trimask.diffusion.exam import Exam, is_asked, judges_of
from trimask.diffusion.held_out import HeldOut, Real
from trimask.diffusion.results import Score
from trimask.diffusion.sampling.config import GenerationConfig
from trimask.diffusion.sampling.requests import Generator
from trimask.diffusion.studies.findings import Panel, draw, markdown_table, write_csv
from trimask.diffusion.studies.trials import Trials
from trimask.diffusion.train import Loaded, load
from trimask.tokenizers.vocabulary import TEXT

_FIT_EXAMPLES, _ROWS = 10_000, 128


@dataclass(frozen=True, kw_only=True)
class SamplingStudy:
    """Which model, and what is tried."""

    run: str = "runs/tiny"
    """Run folder of a trained model."""
    split: str = "validation"
    """Held-out split on which is chosen; what is chosen is then measured by `trimask evaluate` on another."""
    guidances: tuple[float, ...] = (0.0, 0.5, 1.0, 2.0, 4.0)
    """Scales of guidance, for tasks with a condition."""
    temperatures: tuple[float, ...] = (0.0, 0.6, 1.0)
    """Of the tokens' draw."""
    steps: tuple[int, ...] = (1, 2, 4, 8, 16, 24)
    """Of strategies that reveal an even share."""
    planned: tuple[str, ...] = ("random", "confidence", "margin", "entropy")
    """Strategies that are tried over the steps."""
    thresholds: tuple[float, ...] = (0.5, 0.7, 0.9, 0.97)
    """Of the strategy threshold."""
    factors: tuple[float, ...] = (0.5, 1.0, 2.0, 4.0)
    """Of the strategy factor."""
    entropy_bounds: tuple[float, ...] = (0.05, 0.2, 1.0, 4.0)
    """Of the strategy entropy_bound, in nats."""
    alike: float = 0.05
    """Share of answers that may be equal to others, beyond that of real media."""
    max_examples: int | None = None
    """At most so many questions of each task. None: all."""
    seed: int = 0
    """Of the draws."""
    apply: bool = False
    """Make what is chosen the run's default, in its config.json."""

    def __post_init__(self):
        if not (self.guidances and self.temperatures and self.steps and self.planned):
            raise ValueError(f"there must be guidances, temperatures, steps and planned strategies to try; got {self}")
        for options in self.ways():
            dataclasses.replace(GenerationConfig(), **options)

    def ways(self) -> list[dict[str, Any]]:
        """What the second part tries: strategies over their number."""
        tried: list[dict[str, Any]] = [{"strategy": s, "steps": n} for s in self.planned for n in self.steps]
        for name, field in (("threshold", "thresholds"), ("factor", "factors"), ("entropy_bound", "entropy_bounds")):
            tried += [{"strategy": name, name: value} for value in getattr(self, field)]
        return tried


@dataclass(frozen=True)
class Point:
    """One way to sample, measured."""

    task: str
    part: str
    """guidance or strategy."""
    config: GenerationConfig
    score: float
    """Larger is better."""
    error: float
    """Standard error of the score; 0 where the judge gives one number for all."""
    nfe: float
    distinct: float
    """Share of different answers."""


def study(config: SamplingStudy, trials: Trials) -> str:
    """Measures every task, writes points.csv, figures and generation.json; returns the text."""
    loaded, prepared = load(Path(config.run)), Prepared(trials.data)
    require_same_tokenizers(loaded, prepared)
    exams = exams_of(loaded, prepared, config)
    if not exams:
        raise ValueError(f"{prepared.folder}: its split {config.split!r} asks nothing that can be judged")
    chosen: dict[str, GenerationConfig] = {}
    points: list[Point] = []
    cells = []
    for target in dict.fromkeys(exam.task.target for exam in exams):
        own, chosen[target] = measured([exam for exam in exams if exam.task.target == target], config, trials.report)
        points += own
        for task in dict.fromkeys(point.task for point in own):
            of_task = [point for point in own if point.task == task]
            after = next(point for point in of_task[::-1] if point.config == chosen[target])
            cells += [
                [task.replace("_", " "), name, *_shown(p)] for name, p in (("before", of_task[0]), ("chosen", after))
            ]
    write_csv(trials.folder / "points.csv", [_row(point) for point in points])
    _draw(trials.folder, points)
    found = {modality: configuration.to_dict(way) for modality, way in chosen.items()}
    configuration.write_text(trials.folder / "generation.json", json.dumps(found, indent=2) + "\n")
    if config.apply:
        train = dataclasses.replace(loaded.description.train, generation=loaded.description.train.generation | chosen)
        configuration.save(loaded.folder / "config.json", dataclasses.replace(loaded.description, train=train))
    header = ["task", "", "how", "score", "NFE", "distinct"]
    where = f"{config.run} at step {loaded.step}, split {config.split}"
    return (
        f"{where}: {len(points)} measurements. Chosen: fewest evaluations within a standard error of the best.\n\n"
        f"{markdown_table(header, cells)}\n\n"
        f"{'It is the default of the run now' if config.apply else 'With --apply it becomes the default of the run'}."
    )


def exams_of(loaded: Loaded, prepared: Prepared, config: SamplingStudy) -> list[Exam]:
    """Every question of the split that can be judged, by the usual judges."""
    exams = []
    for name, manifest in prepared.manifest.datasets.items():
        if config.split not in manifest.splits:
            continue
        part = HeldOut(prepared, name, config.split, config.max_examples)
        real = Real(prepared, name, _FIT_EXAMPLES)
        for task in manifest.tasks(loaded.vocabulary):
            if is_asked(task, part, set()):
                judges = judges_of(task, part, real, {})
                if judges:
                    exams.append(Exam(loaded, task, part, real, judges[:1]))
    return exams


def measured(
    exams: Sequence[Exam], config: SamplingStudy, report: Callable[[str, int, int], None]
) -> tuple[list[Point], GenerationConfig]:
    """All points of the tasks that make one modality, and what is chosen for it."""
    loaded, target = exams[0].loaded, exams[0].task.target
    generator = Generator(loaded.denoise, loaded.vocabulary, rows=_ROWS)
    before = loaded.generation(target)
    # A text that is asked for has one right answer, and its tasks share their settings: one of them has no condition.
    guidances = config.guidances if target != TEXT else (0.0,)
    grid: list[dict[str, Any]] = [{"guidance": g, "temperature": t} for t in config.temperatures for g in guidances]
    ways = config.ways()
    total, points, means = 1 + len(grid) + len(ways), list[Point](), list[Point]()

    def measure(part: str, way: GenerationConfig) -> None:
        report(f"making {target}", len(means), total)
        own = [_point(exam, part, way, generator, config.seed) for exam in exams]
        points.extend(own)
        means.append(_mean(own))

    measure("before", before)
    for options in grid:
        measure("guidance", dataclasses.replace(before, **options))
    records = [record[target].tobytes() for exam in exams for record in exam.part.records]
    least = len(set(records)) / len(records) - config.alike if target != TEXT else 0.0
    best = choose(means, least).config
    for options in ways:
        measure("strategy", dataclasses.replace(best, **options))
    report(f"making {target}", total, total)
    return points, choose(means, least).config


def _point(exam: Exam, part: str, way: GenerationConfig, generator: Generator, seed: int) -> Point:
    answers = exam.answers(generator, way, seed)
    score, error = quality(exam.graded(answers)[0][0])
    codes = {answer.example.segments[-1].codes.tobytes() for answer in answers}
    nfe = float(np.mean([answer.nfe for answer in answers]))
    return Point(exam.task.name, part, way, score, error, nfe, len(codes) / len(answers))


def _mean(points: Sequence[Point]) -> Point:
    """Of the tasks of one modality, by the same way to sample."""
    score, nfe, distinct = (float(np.mean([getattr(p, name) for p in points])) for name in ("score", "nfe", "distinct"))
    error = float(np.sqrt(np.sum(np.square([point.error for point in points])))) / len(points)
    return dataclasses.replace(points[0], score=score, error=error, nfe=nfe, distinct=distinct)


def quality(score: Score) -> tuple[float, float]:
    """A score of which more is better, and its standard error."""
    sign = 1 if score.higher_is_better else -1
    error = 0.0 if score.interval is None else (score.interval[1] - score.interval[0]) / (2 * 1.96)
    return sign * score.value, error


def choose(points: Sequence[Point], least_distinct: float) -> Point:
    """Of those whose answers differ enough, the fewest evaluations within a standard error of the best."""
    varied = [point for point in points if point.distinct >= least_distinct] or list(points)
    best = max(varied, key=lambda point: point.score)
    good = [point for point in varied if point.score >= best.score - best.error]
    return min(good, key=lambda point: (point.nfe, -point.score))


def _shown(point: Point) -> list[str]:
    score = f"{point.score:.1%} ± {point.error:.1%}" if 0 <= point.score <= 1 else f"{point.score:.4g}"
    return [described(point.config), score, f"{point.nfe:.1f}", f"{point.distinct:.1%}"]


def described(config: GenerationConfig) -> str:
    """A way to sample in a few words."""
    number = {"threshold": config.threshold, "factor": config.factor, "entropy_bound": config.entropy_bound}
    steps = f"{number[config.strategy]:g}" if config.strategy in number else f"{config.steps} steps"
    return f"{config.strategy}, {steps}, temperature {config.temperature:g}, guidance {config.guidance:g}"


def _row(point: Point) -> dict[str, Any]:
    c = point.config
    own = {"strategy": c.strategy, "steps": c.steps, "threshold": c.threshold, "factor": c.factor}
    own |= {"entropy_bound": c.entropy_bound, "temperature": c.temperature, "guidance": c.guidance}
    numbers = {"score": point.score, "error": point.error, "nfe": point.nfe, "distinct": point.distinct}
    return {"task": point.task, "part": point.part, **own, **numbers}


def _draw(folder: Path, points: Sequence[Point]) -> None:
    """guidance.png, of tasks with a condition, and fronts.png."""
    guided, fronts = [], []
    for task in dict.fromkeys(point.task for point in points):
        own = [point for point in points if point.task == task]
        curves: dict[str, list[tuple[float, float]]] = {}
        for point in own:
            if point.part == "guidance":
                label = f"temperature {point.config.temperature:g}"
                curves.setdefault(label, []).append((point.config.guidance, point.score))
        title = task.replace("_", " ")
        if any(len(curve) > 1 for curve in curves.values()):
            scales = ("linear", "linear")
            guided.append(Panel(title=title, curves=curves, x="guidance", y="score", scales=scales))
        lines: dict[str, list[tuple[float, float]]] = {}
        for point in sorted(own, key=lambda point: point.nfe):
            if point.part == "strategy":
                lines.setdefault(point.config.strategy, []).append((point.nfe, point.score))
        fronts.append(Panel(title=title, curves=lines, x="evaluations (NFE)", y="score"))
    if guided:
        draw(folder / "guidance.png", guided)
    draw(folder / "fronts.png", fronts, columns=3)
