"""Does a learned policy beat the heuristics? Accuracy against function evaluations (NFE), in blocks and without.

On validation problems of one model the study measures

1. every heuristic over its parameter, in every setting of blocks;
2. policies over β (those with the law bernoulli), in the same settings; policies that differ in their seed alone give
   one curve, with the 95 % interval of their mean;
3. the order in which positions are revealed: how far it runs from left to right (Spearman's correlation of position and
   step), and how many positions are revealed per step.

Verdicts on the policies follow from these points by the rules of `unmasking_claims.py`.

`final` scores the fronts on the test splits: what was chosen on the validation split by `rule`.
"""

import dataclasses
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from jaxtyping import Float

from trimask.diffusion.data.prepared import Prepared
from trimask.diffusion.data.splits import VALIDATION
from trimask.diffusion.pretraining.trained_model import load
from trimask.diffusion.run.folder import checkpoint_steps
from trimask.diffusion.sampling.generation_config import GenerationConfig
from trimask.diffusion.sampling.generator import Answer, Generator
from trimask.diffusion.sampling.learned import describe_policy, folder_and_checkpoint
from trimask.diffusion.studies.claims import Findings, table_of_claims
from trimask.diffusion.studies.final import FinalResult, splits_to_score
from trimask.diffusion.studies.findings import grouped, write_csv
from trimask.diffusion.studies.heuristics import HeuristicSetting, heuristic_settings
from trimask.diffusion.studies.trainings import make_room_for
from trimask.diffusion.studies.trials import ModelTrial, Trials, of_model, open_run, weights_digest
from trimask.diffusion.studies.verdict import ScoredSetting
from trimask.sampling_rl.problem_sets import dataset_with, from_prepared
from trimask.sampling_rl.problems import ProblemSet
from trimask.sampling_rl.studies.unmasking_claims import claims_of
from trimask.sampling_rl.studies.unmasking_report import (
    FrontPoint,
    Order,
    draw_fronts,
    draw_orders,
    on_fronts,
    scored_settings,
    setting_in_words,
    table_of_orders,
    table_of_points,
)
from trimask.sampling_rl.train_policy import PolicyTrainConfig
from trimask.tokenizers.storage import configuration
from trimask.tokenizers.storage.formats import added_field
from trimask.tokenizers.storage.ranges import Checked, NonNegative, PositiveInt, Seed, Share, Size, whole
from trimask.tokenizers.vocabulary import TEXT

_ROWS = 128
"""Number of rows generated at once."""
_SHOWN_VALUES = (1.0, 0.9)
"""Values of β, and thresholds, at which the order of revealing is measured."""


@dataclass(frozen=True, kw_only=True)
class UnmaskingStudy(Checked):
    """Model, problems, policies and heuristics that the study of unmasking compares."""

    run: str = "runs/cups"
    """Run folder of the model."""
    policies: tuple[str, ...] = ()
    """Folders of policies, which `trimask train-policy` wrote; FOLDER@STEP or FOLDER@best names a checkpoint."""
    dataset: str | None = None
    """Dataset with the problems. None: the only one."""
    task: str = TEXT
    """Task of the problems, such as text (complete a text), text_to_image or audio_to_text."""
    judge: str | None = None
    """Judge that decides which answers are right: a name that `trimask evaluate` takes, or MODULE:FUNCTION. None: the
    task's default judge."""
    split: str = VALIDATION
    """Held-out split with the problems; not a test split, on which --final scores what is chosen here."""
    length: Size | None = None
    """Length of an answer in tokens. None: the length with which the data were prepared."""
    max_examples: PositiveInt | None = 300
    """Largest number of problems. None: all."""
    blocks: tuple[Annotated[int, whole(0, 1 << 24)], ...] = (8, 0)
    """Block lengths to compare, in tokens; 0: without blocks (full diffusion)."""
    everywhere: bool = False
    """Measure policies with all block lengths, rather than only with the one they were trained with."""
    steps: tuple[Size, ...] = (1, 2, 4, 8, 16, 32)
    """Numbers of steps to compare, for the strategies in `planned`."""
    planned: tuple[str, ...] = ("random", "confidence", "margin", "entropy")
    """Strategies to compare that reveal everything in a planned number of steps."""
    thresholds: tuple[Share, ...] = (0.3, 0.5, 0.7, 0.8, 0.9, 0.95, 0.99)
    """Confidences to compare from which the strategies threshold and leftmost reveal a token."""
    factors: tuple[NonNegative, ...] = (0.25, 0.5, 1.0, 2.0, 4.0)
    """Factors to compare, for the strategy factor."""
    entropy_bounds: tuple[NonNegative, ...] = (0.01, 0.1, 0.5, 2.0)
    """Entropy bounds to compare, in nats, for the strategy entropy_bound."""
    scales: tuple[NonNegative, ...] = (0.5, 1.0, 2.0, 4.0)
    """Values of β to compare, for policies with the law bernoulli: factors of the probability to reveal."""
    shown: Size = 48
    """Number of problems on which the order of revealing is measured."""
    seed: Seed = 0
    """Seed of the policies' actions."""

    def __post_init__(self):
        super().__post_init__()
        if not self.blocks:
            raise ValueError("there must be block lengths; 0 means no blocks, all positions at once")
        for setting in self.heuristics():
            setting.applied_to(GenerationConfig())

    def heuristics(self) -> list[HeuristicSetting]:
        """Heuristic strategies to compare, at all their values."""
        values = {
            "threshold": self.thresholds,
            "leftmost": self.thresholds,
            "factor": self.factors,
            "entropy_bound": self.entropy_bounds,
        }
        return heuristic_settings(self.planned, self.steps, values)


@dataclass(frozen=True, kw_only=True)
class SamplingTrial(ModelTrial):
    """One setting to sample with, and all else that its result depends on; stored in trials.jsonl.

    Fields that `UnmaskingStudy` has too mean the same.
    """

    dataset: str | None
    task: str
    judge: str | None
    split: str
    length: int | None
    max_examples: int | None
    shown: int
    """Number of problems on which the order of revealing is measured; 0: none."""
    seed: int
    how: GenerationConfig
    """Sampling settings of the trial."""
    policy_step: int | None
    """Step of the policy's newest checkpoint. None: a heuristic."""
    policy_digest: str = added_field(as_before="", default="")
    """Digest of the arrays of the policy's checkpoint; empty for a heuristic."""


@dataclass(frozen=True)
class Measurement:
    """Result of a `SamplingTrial`; stored in trials.jsonl."""

    accuracy: float
    """Mean grade of the answers, in [0, 1]."""
    nfe: float
    """Mean number of function evaluations of an answer."""
    problems: int
    """Number of problems."""
    left_to_right: float | None
    """`Order.left_to_right`. None: no order was measured, or every answer was revealed in one step."""
    steps: list[float]
    """`Order.steps`; empty if no order was measured."""
    per_step: list[float]
    """`Order.per_step`; empty if no order was measured."""


def study(config: UnmaskingStudy, trials: Trials, claimed: Collection[str] | None = None) -> Findings:
    """Measures all settings, writes points.csv, orders.csv and two figures, and returns the report and the claims.

    Claims are made on the policies in the folders `claimed`, or on all.
    """
    loaded, _ = open_run(config.run, trials.data)
    planned, results = _measured(config, loaded.step, trials)
    points, orders = [], []
    for (point, trial), result in zip(planned, results, strict=True):
        points.append(_with_result(point, result))
        if trial.shown and result.steps:
            tendency = 0.0 if result.left_to_right is None else result.left_to_right
            orders.append(Order(point.block, point.label, point.seed, tendency, result.steps, result.per_step))
    write_csv(trials.folder / "points.csv", [dataclasses.asdict(point) for point in points])
    if orders:
        write_csv(trials.folder / "orders.csv", [dataclasses.asdict(order) for order in orders])
    draw_fronts(trials.folder / "fronts.png", points)
    draw_orders(trials.folder / "orders.png", orders)
    name = " ".join(filter(None, (config.dataset, config.task, config.split)))
    where = f"{config.run} at step {loaded.step}, {points[0].problems} problems of {name}"
    parts = [f"{where}.", table_of_points(points), table_of_orders(orders)]
    origins = zip(config.policies, policy_origins(config.policies, config.run), strict=True)
    labels = {origin.label for folder, origin in origins if claimed is None or folder in claimed}
    answers = f", answers of {config.length} tokens" if config.length else ""
    claims = claims_of(points, labels, f"{Path(config.run).name}{answers}")
    if claims:
        parts += ["## Claims", table_of_claims(claims)]
    return Findings("\n\n".join(parts), claims)


def rule(config: UnmaskingStudy) -> str:
    """The rule by which settings are chosen on the validation split."""
    of_what = config.task if config.dataset is None else f"{config.task} of {config.dataset}"
    return (
        f"for {of_what}, in each setting of blocks, those on the front of {config.split}, which are more accurate than "
        "all with fewer or as many evaluations: of the heuristics taken together, and of each policy taken by itself, "
        "with its accuracy and evaluations averaged over its seeds"
    )


def final(config: UnmaskingStudy, trials: Trials) -> FinalResult:
    """Scores the settings that the rule chooses on the test splits; nothing else is measured there.

    Raises ValueError if the dataset has no test split.
    """
    loaded, prepared = open_run(config.run, trials.data)
    planned, results = _measured(config, loaded.step, trials)
    is_chosen = on_fronts([_with_result(point, result) for (point, _), result in zip(planned, results, strict=True)])
    chosen = [pair for pair, is_on_front in zip(planned, is_chosen, strict=True) if is_on_front]
    figures = list[ScoredSetting]()
    for split in splits_to_score(prepared, [dataset_with(prepared, config.task, config.dataset)]):
        asked = [replace(trial, split=split, shown=0) for _, trial in chosen]
        scored = trials.unrecorded(asked, measure, f"settings on {split}")
        points = [_with_result(point, result) for (point, _), result in zip(chosen, scored, strict=True)]
        figures += scored_settings(points, split)
    words = list(dict.fromkeys(setting_in_words(point) for point, _ in chosen))
    return FinalResult(f"{config.run} at step {loaded.step}", words, figures)


def _measured(
    config: UnmaskingStudy, model_step: int, trials: Trials
) -> tuple[list[tuple[FrontPoint, SamplingTrial]], list[Measurement]]:
    """All trials with their points, whose results are 0, and the results."""
    planned = list(planned_trials(config, model_step))
    results = trials.measurements([trial for _, trial in planned], measure, Measurement, "ways to sample")
    return planned, results


def _with_result(point: FrontPoint, result: Measurement) -> FrontPoint:
    return replace(point, accuracy=result.accuracy, nfe=result.nfe, problems=result.problems)


def planned_trials(config: UnmaskingStudy, model_step: int) -> Iterator[tuple[FrontPoint, SamplingTrial]]:
    """All trials, each with its point, whose results are 0 until they are measured.

    Raises ValueError if a policy was trained in blocks that are not among those of the study, and FileNotFoundError if
    a policy has no checkpoint.
    """
    for name in config.policies:
        if not checkpoint_steps(folder_and_checkpoint(name)[0]):
            raise FileNotFoundError(
                f"{name}: not a policy with a complete checkpoint; `trimask train-policy` trains it"
            )
    origins = policy_origins(config.policies, config.run)
    laws = [describe_policy(name).policy.law for name in config.policies]
    policies = list(zip(config.policies, laws, origins, strict=True))
    for name, _, origin in policies:
        if not config.everywhere and origin.block not in (None, *config.blocks):
            raise ValueError(f"{name} was trained in blocks of {origin.block}, which are not among {config.blocks}")
    names = {field.name for field in dataclasses.fields(SamplingTrial)}
    names &= {field.name for field in dataclasses.fields(config)} - {"shown"}
    shared: dict[str, Any] = {name: getattr(config, name) for name in names} | of_model(config.run, model_step)

    def planned(block, label, number, how, seed=None, policy_step=None, policy_digest=""):
        is_shown = number in _SHOWN_VALUES and (label in ("threshold", "leftmost") or policy_step is not None)
        shown = config.shown if is_shown else 0
        point = FrontPoint(block, label, number, 0.0, 0.0, 0, seed)
        return point, SamplingTrial(
            **shared, how=how, shown=shown, policy_step=policy_step, policy_digest=policy_digest
        )

    for block in config.blocks:
        base = GenerationConfig(temperature=0.0, stop_at_eos=False, block_length=block or None)
        for setting in config.heuristics():
            yield planned(block, setting.strategy, float(setting.value), setting.applied_to(base))
        for name, law, origin in policies:
            if not config.everywhere and origin.block not in (None, block):
                continue
            folder, checkpoint = folder_and_checkpoint(name)
            newest = max(checkpoint_steps(folder))
            digest = weights_digest(folder, int(checkpoint) if checkpoint.isdecimal() else newest)
            for scale in config.scales if law == "bernoulli" else (1.0,):
                how = replace(base, strategy=name, policy_scale=scale)
                yield planned(block, origin.label, scale, how, origin.seed, newest, digest)


def measure(trial: SamplingTrial, data: Path) -> Measurement:
    """Samples answers to all problems, and grades them.

    The name of this function is part of the keys in trials.jsonl, so it must not change.
    """
    make_room_for((trial.how.strategy, trial.how.block_length), most=1)
    generator, problems = _opened(
        trial.run, data, trial.dataset, trial.task, trial.judge, trial.split, trial.length, trial.max_examples
    )
    requests = [problem.request for problem in problems.problems]
    answers = generator.generate(requests, trial.how, trial.seed)
    grades = problems.grade(problems.problems, [answer.example for answer in answers])
    nfe = float(np.mean([answer.nfe for answer in answers]))
    order: tuple[float | None, list[float], list[float]] = (None, [], [])
    if trial.shown:
        order = _order(generator.trajectories(requests[: trial.shown], trial.how, trial.seed))
    return Measurement(float(np.mean(grades)), nfe, len(answers), *order)


@lru_cache(maxsize=1)
def _opened(run: str, data: Path, dataset, task, judge, split, length, max_examples) -> tuple[Generator, ProblemSet]:
    """Generator and problems, kept for the next trial, which usually has the same."""
    loaded = load(Path(run))
    problems = from_prepared(
        Prepared(data), dataset, task, split, length=length, max_examples=max_examples, judge=judge
    )
    return loaded.generator(rows=_ROWS), problems


@dataclass(frozen=True)
class PolicyOrigin:
    """How a policy was trained."""

    label: str
    """Name of the policy in figures and tables; without its seed."""
    seed: int | None
    """Seed of the training. None: unknown."""
    block: int | None
    """Block length in training, in tokens; 0: without blocks. None: unknown."""
    kind: str
    """Everything but the seed and the folder of a policy that it was initialised from; equal for repeated trainings."""


def policy_origins(names: Sequence[str], run: str) -> list[PolicyOrigin]:
    """Origins of policies, given by their paths; labels name the run that they were trained on if it is not `run`.

    Policies share a label only if they differ in their seed alone; otherwise the folder's name is added to it.
    """
    origins = [_policy_origin(name, run) for name in names]
    for label, same in grouped(origins, lambda origin: origin.label).items():
        if len({origin.kind for origin in same}) > 1 or len({origin.seed for origin in same}) < len(same):
            origins = [
                replace(origin, label=f"{label} ({Path(name).name})") if origin.label == label else origin
                for origin, name in zip(origins, names, strict=True)
            ]
    return origins


def _policy_origin(name: str, run: str) -> PolicyOrigin:
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
    description = describe_policy(str(folder))
    own = Path(description.trained_on.partition(" at step ")[0]).name
    parts += [f"trained on {own}"] if own != Path(run).name else []
    normalised = replace(config, seed=0, init_from=config.init_from and "a start")
    kind = f"{normalised} {description.trained_on} {checkpoint}"
    return PolicyOrigin(", ".join(parts), config.seed, block or 0, kind)


def _order(trajectories: Sequence[Sequence[Answer]]) -> tuple[float | None, list[float], list[float]]:
    """The last three fields of `Measurement`, from the states of every answer before and after each step."""
    from scipy.stats import spearmanr  # takes a second to load

    steps = [_reveal_steps(trajectory) for trajectory in trajectories]
    correlations = [spearmanr(np.arange(len(of_row)), of_row).statistic for of_row in steps if len(set(of_row)) > 1]
    longest, most = max(len(of_row) for of_row in steps), max(int(of_row.max()) for of_row in steps)
    shares = np.full((len(steps), longest), np.nan)
    counts = np.zeros((len(steps), most))
    for row, of_row in enumerate(steps):
        shares[row, : len(of_row)] = of_row / of_row.max()
        counts[row, : int(of_row.max())] = np.bincount(of_row.astype(int))[1:]
    tendency = float(np.mean(correlations)) if correlations else None
    return tendency, np.nanmean(shares, axis=0).tolist(), counts.mean(axis=0).tolist()


def _reveal_steps(trajectory: Sequence[Answer]) -> Float[np.ndarray, " asked"]:
    """Step, counted from 1, in which each masked position of the request was revealed."""
    states = np.stack([answer.example.segments[-1].codes.reshape(-1) for answer in trajectory])
    is_asked = states[0] < 0
    return np.argmax(states[:, is_asked] >= 0, axis=0).astype(float)
