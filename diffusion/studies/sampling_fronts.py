"""How should each modality be sampled? Quality against function evaluations, and against guidance.

For every task a trained model has, on held-out questions:

1. every strategy over its number, at the run's own guidance and temperature: fronts of quality against evaluations
   (NFE);
2. guidance × temperature with the best of them: curves of accuracy and distance against guidance;
3. what is chosen, in blocks with each cache: what keeping keys and values costs.

Judges are the usual ones, and of media also the Fréchet distance to real ones: a classifier is soon content with all.
What is chosen has the fewest evaluations among all ways that are as good as the best: within one error of the best
classified, where more right than real media is not better, and of those within one error of the smallest distance. A
medium that always comes out the same is no good however right it is: as large a share of the answers must differ as of
real media, but for `alike`. The error of a share is its standard error, that of a distance its deviation over several
draws of the run's own way. Tasks that make text share their settings, and are chosen for by the mean of their scores.
"""

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import jax
import numpy as np

from trimask.diffusion.data.prepared import Prepared
from trimask.diffusion.data.splits import VALIDATION
from trimask.diffusion.evaluation.evaluate import require_same_tokenizers
from trimask.diffusion.evaluation.exam import Exam, is_asked, judges_of, question
from trimask.diffusion.evaluation.held_out import HeldOut, TrainingExamples
from trimask.diffusion.evaluation.results import Score
from trimask.diffusion.pretraining.trained_model import LoadedRun, load
from trimask.diffusion.sampling.generation_config import GenerationConfig
from trimask.diffusion.sampling.generator import Generator
from trimask.diffusion.studies.findings import Panel, draw, markdown_table, write_csv
from trimask.diffusion.studies.trials import Trials
from trimask.tokenizers.storage import configuration
from trimask.tokenizers.storage.files import write_text
from trimask.tokenizers.storage.ranges import Checked, NonNegative, PositiveInt, Seed, Share, Size, whole
from trimask.tokenizers.vocabulary import TEXT

_FIT_EXAMPLES, _ROWS = 10_000, 128
_CACHES = ("none", "prefix", "dual")


@dataclass(frozen=True, kw_only=True)
class SamplingStudy(Checked):
    """Which model, and what is tried."""

    run: str = "runs/tiny"
    """Run folder of a trained model."""
    modalities: tuple[str, ...] | None = None
    """Of what is made. None: all that can be judged."""
    split: str = VALIDATION
    """Held-out split on which is chosen; what is chosen is then measured by `trimask evaluate` on another."""
    guidances: tuple[NonNegative, ...] = (0.0, 0.5, 1.0, 2.0, 4.0)
    """Scales of guidance, for tasks with a condition."""
    temperatures: tuple[NonNegative, ...] = (0.0, 0.6, 1.0)
    """Of the tokens' draw."""
    steps: tuple[Size, ...] = (1, 2, 4, 8, 16, 24)
    """Of strategies that reveal an even share."""
    planned: tuple[str, ...] = ("random", "confidence", "margin", "entropy")
    """Strategies that are tried over the steps."""
    thresholds: tuple[Share, ...] = (0.5, 0.7, 0.9, 0.97)
    """Of the strategy threshold."""
    factors: tuple[NonNegative, ...] = (0.5, 1.0, 2.0, 4.0)
    """Of the strategy factor."""
    entropy_bounds: tuple[NonNegative, ...] = (0.05, 0.2, 1.0, 4.0)
    """Of the strategy entropy_bound, in nats."""
    blocks: tuple[Size, ...] = (4, 8, 16)
    """Lengths of blocks in which caches are tried; those that leave one block are left out."""
    alike: Share = 0.05
    """Share of answers that may be equal to others, beyond that of real media."""
    draws: Annotated[int, whole(2, 1 << 24)] = 3
    """Draws of the run's own way, for the error of distances."""
    max_examples: PositiveInt | None = None
    """At most so many questions of each task. None: all."""
    seed: Seed = 0
    """Of the draws."""
    apply: bool = False
    """Make what is chosen the run's default, in its config.json."""

    def __post_init__(self):
        super().__post_init__()
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
class Verdict:
    """What one judge says of the answers."""

    judge: str
    value: float
    error: float
    higher_is_better: bool
    on_real: float | None = None
    """What it says of real media."""

    @property
    def goodness(self) -> float:
        """Larger is better; shares of right ones up to what real media have."""
        if not self.higher_is_better:
            return -self.value
        return self.value if self.on_real is None else min(self.value, self.on_real)


@dataclass(frozen=True)
class Point:
    """One way to sample, measured."""

    target: str
    task: str
    """With its dataset."""
    part: str
    """before, guidance, strategy or cache."""
    config: GenerationConfig
    verdicts: tuple[Verdict, ...]
    """The most important first."""
    nfe: float
    distinct: float
    """Share of different answers."""


def study(config: SamplingStudy, trials: Trials) -> str:
    """Measures every task, writes points.csv, figures and generation.json; returns the text."""
    loaded, prepared = load(Path(config.run)), Prepared(trials.data)
    require_same_tokenizers(loaded, prepared)
    exams = exams_of(loaded, prepared, config)
    if not exams:
        of = "" if config.modalities is None else f" of {' or '.join(config.modalities)}"
        raise ValueError(f"{prepared.folder}: its split {config.split!r} asks nothing{of} that can be judged")
    chosen: dict[str, GenerationConfig] = {}
    points: list[Point] = []
    for target in dict.fromkeys(exam.task.target for exam in exams):
        own, chosen[target] = measured([exam for exam in exams if exam.task.target == target], config, trials.report)
        points += own
        # Whatever comes after, what was measured is not lost.
        write_csv(trials.folder / "points.csv", [row for point in points for row in _rows(point)])
    _draw(trials.folder, points)
    found = {modality: configuration.to_dict(way) for modality, way in chosen.items()}
    write_text(trials.folder / "generation.json", json.dumps(found, indent=2) + "\n")
    if config.apply:
        train = dataclasses.replace(loaded.description.train, generation=loaded.description.train.generation | chosen)
        configuration.save(loaded.folder / "config.json", dataclasses.replace(loaded.description, train=train))
    where = f"{config.run} at step {loaded.step}, split {config.split}"
    return (
        f"{where}: {len(points)} measurements. Chosen: fewest evaluations of all as good as the best.\n\n"
        f"{_table_of_choices(points, chosen)}\n\n"
        f"{'It is the default of the run now' if config.apply else 'With --apply it becomes the default of the run'}."
        f"\n\nWhat is chosen, in blocks and with caches:\n\n{_table_of_caches(points)}"
    )


def exams_of(loaded: LoadedRun, prepared: Prepared, config: SamplingStudy) -> list[Exam]:
    """Every question of the split that can be judged, by the usual judges and, of media, by their distance."""
    exams = []
    for name, manifest in prepared.manifest.datasets.items():
        if config.split not in manifest.splits:
            continue
        part = HeldOut(prepared, name, config.split, config.max_examples)
        real = TrainingExamples(prepared, name, _FIT_EXAMPLES)
        for task in manifest.tasks(loaded.vocabulary):
            is_wanted = config.modalities is None or task.target in config.modalities
            if is_wanted and is_asked(task, part, set()):
                judges = judges_of(task, part, real, {})[:1]
                if judges and task.target != TEXT and judges[0].name != "frechet":
                    judges += judges_of(task, part, real, {task.name: ("frechet",)})
                if judges:
                    exams.append(Exam(loaded, task, part, real, judges))
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
    length = max(len(_asked(exam, number)) for exam in exams for number in range(len(exam.part.records)))
    blocks = [block for block in config.blocks if block < length]
    kept: list[dict[str, Any]] = [{"block_length": b, "cache": cache} for b in blocks for cache in _CACHES]
    total, points, means = config.draws + len(grid) + len(ways) + len(kept), list[Point](), list[Point]()
    draws = []
    for number in range(config.draws):
        report(f"making {target}", number, total)
        draws.append([_point(exam, "before", before, generator, config.seed + number) for exam in exams])
    errors = [_deviations(own) for own in zip(*draws, strict=True)]

    def record(own: Sequence[Point]) -> None:
        own = [_with_errors(point, error) for point, error in zip(own, errors, strict=True)]
        points.extend(own)
        means.append(_mean(own))

    def measure(part: str, way: GenerationConfig) -> None:
        report(f"making {target}", config.draws - 1 + len(means), total)
        if way.strategy != means[-1].config.strategy:
            jax.clear_caches()  # a strategy is a program per batch size, and there is room for some thousands
        record([_point(exam, part, way, generator, config.seed) for exam in exams])

    record(draws[0])
    for options in ways:
        measure("strategy", dataclasses.replace(before, **options))
    records = [record[target].tobytes() for exam in exams for record in exam.part.records]
    least = len(set(records)) / len(records) - config.alike if target != TEXT else 0.0
    best = choose(means, least).config
    for options in grid:
        measure("guidance", dataclasses.replace(best, **options))
    chosen = choose(means, least).config
    for options in kept:
        measure("cache", dataclasses.replace(chosen, **options))
    report(f"making {target}", total, total)
    return points, chosen


def _asked(exam: Exam, number: int) -> np.ndarray:
    """Places of the codes that are asked for."""
    return np.flatnonzero(question(exam.task, exam.part.records[number]).segments[-1].codes.reshape(-1) < 0)


def _point(exam: Exam, part: str, way: GenerationConfig, generator: Generator, seed: int) -> Point:
    answers = exam.answers(generator, way, seed)
    verdicts = tuple(_verdict(score) for score in exam.graded(answers)[0])
    codes = {answer.example.segments[-1].codes.tobytes() for answer in answers}
    nfe = float(np.mean([answer.nfe for answer in answers]))
    task = f"{exam.part.dataset}: {exam.task.name}"
    return Point(exam.task.target, task, part, way, verdicts, nfe, len(codes) / len(answers))


def _verdict(score: Score) -> Verdict:
    error = 0.0 if score.interval is None else (score.interval[1] - score.interval[0]) / (2 * 1.96)
    return Verdict(score.judge, score.value, error, bool(score.higher_is_better), score.on_real)


def _deviations(draws: Sequence[Point]) -> dict[str, float]:
    """Judge → standard deviation of what it says of several draws."""
    return {
        first.judge: float(np.std([point.verdicts[number].value for point in draws], ddof=1))
        for number, first in enumerate(draws[0].verdicts)
    }


def _with_errors(point: Point, deviations: dict[str, float]) -> Point:
    """Verdicts on a whole set get the error that was found for them."""
    verdicts = (v if v.error else dataclasses.replace(v, error=deviations[v.judge]) for v in point.verdicts)
    return dataclasses.replace(point, verdicts=tuple(verdicts))


def _mean(points: Sequence[Point]) -> Point:
    """Of the tasks of one modality, by the same way to sample; by the judges that all of them have."""
    verdicts = []
    for first in points[0].verdicts:
        same = [v for point in points for v in point.verdicts if v.judge == first.judge]
        if len(same) == len(points):
            error = float(np.sqrt(np.sum(np.square([v.error for v in same])))) / len(same)
            verdicts.append(dataclasses.replace(first, value=float(np.mean([v.value for v in same])), error=error))
    nfe, distinct = (float(np.mean([getattr(point, name) for point in points])) for name in ("nfe", "distinct"))
    return dataclasses.replace(points[0], verdicts=tuple(verdicts), nfe=nfe, distinct=distinct)


def choose(points: Sequence[Point], least_distinct: float) -> Point:
    """The fewest evaluations of those that are, judge after judge, within an error of the best that is left.

    Only those whose answers differ enough, if there are any.
    """
    left = [point for point in points if point.distinct >= least_distinct] or list(points)
    for number in range(len(points[0].verdicts)):
        best = max((point.verdicts[number] for point in left), key=lambda verdict: verdict.goodness)
        left = [point for point in left if point.verdicts[number].goodness >= best.goodness - best.error]
    return min(left, key=lambda point: (point.nfe, *(-verdict.goodness for verdict in point.verdicts)))


def _table_of_choices(points: Sequence[Point], chosen: Mapping[str, GenerationConfig]) -> str:
    cells = []
    for task, own in _by_task(points).items():
        after = next(point for point in own[::-1] if point.config == chosen[point.target])
        for name, point in (("before", own[0]), ("chosen", after)):
            verdicts = "; ".join(_shown(verdict) for verdict in point.verdicts)
            cells.append([task, name, described(point.config), verdicts, f"{point.nfe:.1f}", f"{point.distinct:.1%}"])
        on_real = "; ".join(_number(v, v.on_real) for v in own[0].verdicts if v.on_real is not None)
        if on_real:
            cells.append([task, "real", "", on_real, "", ""])
    return markdown_table(["task", "", "how", "score", "NFE", "distinct"], cells)


def _table_of_caches(points: Sequence[Point]) -> str:
    cells = []
    for task, own in _by_task(points).items():
        kept = [point for point in own if point.part == "cache"]
        for block in dict.fromkeys(point.config.block_length for point in kept):
            of_block = [point for point in kept if point.config.block_length == block]
            for number in range(len(of_block[0].verdicts)):
                shown = [_shown(point.verdicts[number]) for point in of_block]
                cells.append([task, str(block), f"{of_block[0].nfe:.1f}", *shown])
    return markdown_table(["task", "block", "NFE", *_CACHES], cells)


def _by_task(points: Sequence[Point]) -> dict[str, list[Point]]:
    return {task: [point for point in points if point.task == task] for task in dict.fromkeys(p.task for p in points)}


def _shown(verdict: Verdict) -> str:
    return f"{_number(verdict, verdict.value)} ± {_number(verdict, verdict.error).removeprefix(f'{verdict.judge} ')}"


def _number(verdict: Verdict, value: float) -> str:
    is_share = verdict.higher_is_better and 0 <= verdict.value <= 1
    return f"{verdict.judge} {value:.1%}" if is_share else f"{verdict.judge} {value:.3g}"


def described(config: GenerationConfig) -> str:
    """A way to sample in a few words."""
    number = {"threshold": config.threshold, "factor": config.factor, "entropy_bound": config.entropy_bound}
    steps = f"{number[config.strategy]:g}" if config.strategy in number else f"{config.steps} steps"
    return f"{config.strategy}, {steps}, temperature {config.temperature:g}, guidance {config.guidance:g}"


def _rows(point: Point) -> list[dict[str, Any]]:
    """Lines of the table, one per judge."""
    c = point.config
    own = {"strategy": c.strategy, "steps": c.steps, "threshold": c.threshold, "factor": c.factor}
    own |= {"entropy_bound": c.entropy_bound, "temperature": c.temperature, "guidance": c.guidance}
    own |= {"block_length": c.block_length, "cache": c.cache, "nfe": point.nfe, "distinct": point.distinct}
    return [
        {
            "task": point.task,
            "part": point.part,
            **own,
            "judge": v.judge,
            "value": v.value,
            "error": v.error,
            "on_real": v.on_real,
        }
        for v in point.verdicts
    ]


def _draw(folder: Path, points: Sequence[Point]) -> None:
    """guidance.png, of tasks with a condition, and fronts.png; a panel per task and judge."""
    guided, fronts = [], []
    for task, own in _by_task(points).items():
        for number, verdict in enumerate(own[0].verdicts):
            curves: dict[str, list[tuple[float, float]]] = {}
            lines: dict[str, list[tuple[float, float]]] = {}
            for point in sorted(own, key=lambda point: point.nfe):
                value = point.verdicts[number].value
                if point.part == "guidance":
                    label = f"temperature {point.config.temperature:g}"
                    curves.setdefault(label, []).append((point.config.guidance, value))
                elif point.part == "strategy":
                    lines.setdefault(point.config.strategy, []).append((point.nfe, value))
            curves = {label: sorted(curve) for label, curve in curves.items()}
            title, scale = task.replace("_", " "), "linear" if verdict.higher_is_better else "log"
            if any(len(curve) > 1 for curve in curves.values()):
                guided.append(
                    Panel(title=title, curves=curves, x="guidance", y=verdict.judge, scales=("linear", scale))
                )
            fronts.append(
                Panel(title=title, curves=lines, x="evaluations (NFE)", y=verdict.judge, scales=("log", scale))
            )
    if guided:
        draw(folder / "guidance.png", guided, columns=2)
    draw(folder / "fronts.png", fronts, columns=3)
