"""Does a learned policy beat the heuristics? Accuracy against evaluations (NFE), in blocks and without.

On held-out problems of one model:

1. every heuristic over its number, in every setting of blocks: fronts;
2. policies over β (of bernoulli) in the same settings; those that differ in their seed alone are one curve, with the
   standard error of their mean;
3. the order in which positions are revealed, how far it runs from left to right (Spearman's correlation of place and
   step), and how many are revealed per step.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any

import jax
import numpy as np
from jaxtyping import Float
from scipy.stats import spearmanr

from trimask.diffusion.data.prepared import Prepared
from trimask.diffusion.data.splits import TEST
from trimask.diffusion.evaluation.evaluate import require_same_tokenizers
from trimask.diffusion.pretraining.trained_model import load
from trimask.diffusion.run.folder import checkpoint_steps
from trimask.diffusion.sampling.generation_config import GenerationConfig
from trimask.diffusion.sampling.generator import Answer, Generator
from trimask.diffusion.sampling.learned import describe_policy, folder_and_checkpoint, open_policy
from trimask.diffusion.studies.findings import write_csv
from trimask.diffusion.studies.trials import Trials
from trimask.sampling_rl.problem_sets import from_prepared
from trimask.sampling_rl.problems import ProblemSet
from trimask.sampling_rl.studies.unmasking_report import (
    Order,
    Point,
    draw_fronts,
    draw_orders,
    table_of_orders,
    table_of_points,
)
from trimask.sampling_rl.train_policy import PolicyTrainConfig
from trimask.tokenizers.storage import configuration
from trimask.tokenizers.storage.ranges import Checked, NonNegative, PositiveInt, Seed, Share, Size, whole
from trimask.tokenizers.vocabulary import TEXT

_ROWS = 128


@dataclass(frozen=True, kw_only=True)
class UnmaskingStudy(Checked):
    """Which model, which policies, and what they are compared with."""

    run: str = "runs/cups"
    """Run folder of the model."""
    policies: tuple[str, ...] = ()
    """Folders that `trimask train-policy` wrote."""
    dataset: str | None = None
    """Dataset with the problems. None: the only one."""
    task: str = TEXT
    """What is asked."""
    judge: str | None = None
    """Who says what is right, as of `trimask evaluate`. None: the task's usual one."""
    split: str = TEST
    """Split with the problems."""
    length: Size | None = None
    """Tokens of an answer. None: as many as it was prepared with."""
    max_examples: PositiveInt | None = 300
    """At most so many problems. None: all."""
    blocks: tuple[Annotated[int, whole(0, 1 << 24)], ...] = (8, 0)
    """Block lengths; 0: without blocks (full diffusion)."""
    everywhere: bool = False
    """Whether a policy is measured in all of these, rather than in that alone in which it was trained."""
    steps: tuple[Size, ...] = (1, 2, 4, 8, 16, 32)
    """Of the strategies that reveal an even share."""
    planned: tuple[str, ...] = ("random", "confidence", "margin", "entropy")
    """Those strategies."""
    thresholds: tuple[Share, ...] = (0.3, 0.5, 0.7, 0.8, 0.9, 0.95, 0.99)
    """Of threshold and leftmost."""
    factors: tuple[NonNegative, ...] = (0.25, 0.5, 1.0, 2.0, 4.0)
    """Of factor."""
    entropy_bounds: tuple[NonNegative, ...] = (0.01, 0.1, 0.5, 2.0)
    """Of entropy_bound, in nats."""
    scales: tuple[NonNegative, ...] = (0.5, 1.0, 2.0, 4.0)
    """β of policies with the law bernoulli."""
    shown: Size = 48
    """Problems by which orders are looked at."""
    seed: Seed = 0
    """Of the policies' draws."""

    def __post_init__(self):
        super().__post_init__()
        if not self.blocks:
            raise ValueError("there must be blocks; 0 is none, everything at once")
        for way in self.heuristics():
            replace(GenerationConfig(), **way)

    def heuristics(self) -> list[dict[str, Any]]:
        """Strategies with their numbers."""
        tried: list[dict[str, Any]] = [{"strategy": s, "steps": n} for s in self.planned for n in self.steps]
        for name, field, values in (
            ("threshold", "threshold", self.thresholds),
            ("leftmost", "threshold", self.thresholds),
            ("factor", "factor", self.factors),
            ("entropy_bound", "entropy_bound", self.entropy_bounds),
        ):
            tried += [{"strategy": name, field: value} for value in values]
        return tried


@dataclass(frozen=True, kw_only=True)
class Way:
    """A way to sample, with everything else that the outcome depends on; fields named alike are the study's."""

    run: str
    dataset: str | None
    task: str
    judge: str | None
    split: str
    length: int | None
    max_examples: int | None
    shown: int
    """Problems by which the order is looked at; 0: none."""
    seed: int
    how: GenerationConfig
    model_step: int
    policy_step: int | None
    """Newest checkpoint of the policy."""


@dataclass(frozen=True)
class Measurement:
    """What came of a way."""

    accuracy: float
    nfe: float
    problems: int
    left_to_right: float | None
    """The rest is as of `Order`; None where no order was looked at, or all is revealed at once."""
    steps: list[float]
    per_step: list[float]


def study(config: UnmaskingStudy, trials: Trials) -> str:
    """Measures everything, writes points.csv, orders.csv and figures; returns the text."""
    loaded = load(Path(config.run))
    require_same_tokenizers(loaded, Prepared(trials.data))
    planned = list(ways(config, loaded.step))
    outcomes = trials.measured([way for _, way in planned], measure, Measurement, "ways to sample")
    points, orders = [], []
    for (point, way), seen in zip(planned, outcomes, strict=True):
        points.append(replace(point, accuracy=seen.accuracy, nfe=seen.nfe, problems=seen.problems))
        if way.shown and seen.steps:
            tendency = 0.0 if seen.left_to_right is None else seen.left_to_right
            orders.append(Order(point.block, point.label, point.seed, tendency, seen.steps, seen.per_step))
    write_csv(trials.folder / "points.csv", [dataclasses.asdict(point) for point in points])
    if orders:
        write_csv(trials.folder / "orders.csv", [dataclasses.asdict(order) for order in orders])
    draw_fronts(trials.folder / "fronts.png", points)
    draw_orders(trials.folder / "orders.png", orders)
    name = " ".join(filter(None, (config.dataset, config.task, config.split)))
    where = f"{config.run} at step {loaded.step}, {points[0].problems} problems of {name}"
    return f"{where}.\n\n{table_of_points(points)}\n\n{table_of_orders(orders)}"


def ways(config: UnmaskingStudy, model_step: int) -> Iterator[tuple[Point, Way]]:
    """All that is measured, each with the point that it will be."""
    policies = list(zip(config.policies, map(open_policy, config.policies), trainings_of(config.policies), strict=True))
    for name, _, training in policies:
        if not config.everywhere and training.block not in (None, *config.blocks):
            raise ValueError(f"{name} was trained in blocks of {training.block}, which are not among {config.blocks}")
    asked = {field.name for field in dataclasses.fields(Way)} & {field.name for field in dataclasses.fields(config)}
    shared: dict[str, Any] = {name: getattr(config, name) for name in asked - {"shown"}}
    shared |= {"model_step": model_step}

    def of(block, label, number, how, seed=None, policy_step=None):
        is_shown = number in (1.0, 0.9) and (label in ("threshold", "leftmost") or policy_step is not None)
        shown = config.shown if is_shown else 0
        point = Point(block, label, number, 0.0, 0.0, 0, seed)
        return point, Way(**shared, how=how, shown=shown, policy_step=policy_step)

    for block in config.blocks:
        base = GenerationConfig(temperature=0.0, stop_at_eos=False, block_length=block or None)
        for options in config.heuristics():
            yield of(block, options["strategy"], _number(options), replace(base, **options))
        for name, policy, training in policies:
            if not config.everywhere and training.block not in (None, block):
                continue
            newest = max(checkpoint_steps(folder_and_checkpoint(name)[0]))
            for scale in config.scales if policy.config.law == "bernoulli" else (1.0,):
                how = replace(base, strategy=name, policy_scale=scale)
                yield of(block, training.label, scale, how, training.seed, newest)


def measure(way: Way, data: Path) -> Measurement:
    """Samples all problems in a way."""
    _let_go_of_programs_but(way.how.strategy, way.how.block_length)
    generator, problems = _opened(
        way.run, data, way.dataset, way.task, way.judge, way.split, way.length, way.max_examples
    )
    requests = [problem.request for problem in problems.problems]
    answers = generator.generate(requests, way.how, way.seed)
    right = problems.grade(problems.problems, [answer.example for answer in answers])
    nfe = float(np.mean([answer.nfe for answer in answers]))
    order = _order(generator.trajectories(requests[: way.shown], way.how, way.seed)) if way.shown else (None, [], [])
    return Measurement(float(np.mean(right)), nfe, len(answers), *order)


@lru_cache(maxsize=1)
def _let_go_of_programs_but(strategy: str, block: int | None) -> None:
    """Of a hundred ways they would be more than a process can map."""
    jax.clear_caches()


@lru_cache(maxsize=1)
def _opened(run: str, data: Path, dataset, task, judge, split, length, max_examples) -> tuple[Generator, ProblemSet]:
    loaded = load(Path(run))
    problems = from_prepared(
        Prepared(data), dataset, task, split, length=length, max_examples=max_examples, judge=judge
    )
    return Generator(loaded.denoise, loaded.vocabulary, rows=_ROWS), problems


@dataclass(frozen=True)
class PolicyOrigin:
    """What is known of a policy's training."""

    label: str
    seed: int | None
    block: int | None
    """Length of its blocks; 0: without."""
    kind: str
    """Everything but the seed and, of a start that was taken over, its folder."""


def trainings_of(names: Sequence[str]) -> list[PolicyOrigin]:
    """Of policies by their names; those that share a label differ in their seed alone."""
    found = [_training(name) for name in names]
    for label in {training.label for training in found}:
        same = [training for training in found if training.label == label]
        if len({training.kind for training in same}) > 1 or len({training.seed for training in same}) < len(same):
            found = [
                replace(training, label=f"{label} ({Path(name).name})") if training.label == label else training
                for training, name in zip(found, names, strict=True)
            ]
    return found


def _training(name: str) -> PolicyOrigin:
    folder, checkpoint = folder_and_checkpoint(name)
    if not (folder / "config.json").is_file():
        return PolicyOrigin(folder.name, None, None, name)
    config = configuration.load(folder / "config.json", PolicyTrainConfig)
    block = config.generation.block_length
    parts = [f"policy, α {config.reward.alpha:g}", "full" if block is None else f"blocks of {block}"]
    parts += ["experts"] if config.experts and config.learns_from == "itself" else []
    parts += [f"imitated, {max(checkpoint_steps(folder))} steps"] if config.learns_from == "experts" else []
    parts += ["from a start"] if config.init_from else []
    parts += [config.policy.law] if config.policy.law != "bernoulli" else []
    parts += [" and ".join(config.policy.inputs)] if config.policy.inputs != ("confidence",) else []
    parts += [config.reward.kind] if config.reward.kind != "multiplicative" else []
    about = describe_policy(str(folder))
    alike = replace(config, seed=0, init_from=config.init_from and "a start")
    return PolicyOrigin(", ".join(parts), config.seed, block or 0, f"{alike} {about.trained_on} {checkpoint}")


def _number(way: dict[str, Any]) -> float:
    return float(next(value for name, value in way.items() if name != "strategy"))


def _order(paths: Sequence[Sequence[Answer]]) -> tuple[float | None, list[float], list[float]]:
    """The last three fields of `Order`."""
    whens = [_when(path) for path in paths]
    correlations = [spearmanr(np.arange(len(when)), when).statistic for when in whens if len(set(when)) > 1]
    longest, most = max(len(when) for when in whens), max(int(when.max()) for when in whens)
    shares = np.full((len(whens), longest), np.nan)
    counts = np.zeros((len(whens), most))
    for row, when in enumerate(whens):
        shares[row, : len(when)] = when / when.max()
        counts[row, : int(when.max())] = np.bincount(when.astype(int))[1:]
    tendency = float(np.mean(correlations)) if correlations else None
    return tendency, np.nanmean(shares, axis=0).tolist(), counts.mean(axis=0).tolist()


def _when(path: Sequence[Answer]) -> Float[np.ndarray, " asked"]:
    """Of each place that was asked for, the step in which it was revealed."""
    states = np.stack([answer.example.segments[-1].codes.reshape(-1) for answer in path])
    is_asked = states[0] < 0
    return np.argmax(states[:, is_asked] >= 0, axis=0).astype(float)
