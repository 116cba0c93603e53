"""Searches multipliers for each module by trust-region random search, and measures their gain on larger networks.

    log2 ζ(module, block) = value of the module's group + value of the block's depth

for each family of multipliers; the values of depth are interpolated between three. Each round tries random points
around a centre. If the best of them is better than the centre, it becomes the new centre and the radius grows;
otherwise the radius shrinks (Complete(d)P, arXiv 2512.22382, section 4; the factors of growing and shrinking are ours).
All trials of the search have the same seed, so that they differ by their multipliers alone. Whether the gain is real is
measured at the end on other seeds and shapes, against the same recipe without multipliers. A round is a function of the
seed and of the rounds before it, so a search can be resumed, with any number of worker processes.
"""

import dataclasses
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated

import numpy as np
from jaxtyping import Float

from trimask.diffusion.evaluation.intervals import half_width_of_mean
from trimask.diffusion.parametrization import Family, ModuleMultipliers
from trimask.diffusion.pretraining.description import TrainConfig
from trimask.diffusion.studies.findings import OVER_SEEDS, Panel, draw_panels, markdown_table, write_csv
from trimask.diffusion.studies.trainings import Outcome, at_shape
from trimask.diffusion.studies.trials import AT_EDGE, Trials, with_tuned_learning_rate
from trimask.tokenizers.storage import configuration
from trimask.tokenizers.storage.ranges import Checked, Log2, NonNegative, Positive, PositiveInt, Size, real

GROUPS: Mapping[str, tuple[str, ...]] = {
    "embeddings": ("embedding", "place_range", "place_scale", "place_map"),
    "attention": ("query", "key", "value", "out"),
    "mlp": ("gate", "up", "down"),
    "norms": ("attention_norm", "mlp_norm", "query_norm", "key_norm", "final_norm"),
    "unembedding": ("unembedding",),
}
"""Group → modules that share a multiplier in the search."""

_DEPTHS = 3
"""Number of values that describe how multipliers change with depth."""


@dataclass(frozen=True, kw_only=True)
class MultiplierSearch(Checked):
    """Budget and trust region of the search for multipliers, and the networks on which the result is compared."""

    base: TrainConfig
    """Training configuration of the search; its learning rate is tuned first."""
    log2_learning_rates: tuple[Log2, ...] = (-9.0, -8.5, -8.0, -7.5, -7.0, -6.5, -6.0, -5.5)
    """Logarithms to base 2 of the learning rates among which that of `base` is chosen."""
    runs: PositiveInt = 193
    """Largest number of trainings in the search: one at the centre, and rounds of per_round."""
    hours: NonNegative | None = None
    """Hours after which this call begins no further round. None: only `runs` ends the search."""
    per_round: Size = 12
    """Number of random points per round."""
    radius: Positive = 0.4
    """Initial radius of the trust region: standard deviation of log2 of a multiplier."""
    changed: Annotated[float, real(above=0, most=1)] = 0.3
    """Probability that a point changes a coordinate of the centre."""
    width_factor: Size = 4
    """Ratio of the width of the larger network, on which the result is compared, to that of `base`."""
    depth_factor: Size = 2
    """Ratio of the number of layers of the larger network to that of `base`."""
    seeds: Size = 3
    """Number of seeds of the final comparison."""


SearchPoint = Float[np.ndarray, " dimensions"]
"""log2 of the multipliers, one for each of `search_dimensions`."""


def search_dimensions() -> list[tuple[str, str]]:
    """(Family, group) of every dimension; groups are those of `GROUPS`, residual branches, and the values of depth."""
    dimensions = []
    for family in (field.name for field in dataclasses.fields(ModuleMultipliers)):
        groups = ["attention", "mlp"] if family == "residual" else [*GROUPS]
        if family == "init":
            groups.remove("norms")
        dimensions += [(family, group) for group in [*groups, *(f"depth {number}" for number in range(_DEPTHS))]]
    return dimensions


def multipliers_at(point: SearchPoint) -> ModuleMultipliers:
    """Multipliers of every module at a point of the search."""
    values: dict[str, dict[str, float]] = {}
    for (family, group), log2_factor in zip(search_dimensions(), point.tolist(), strict=True):
        values.setdefault(family, {})[group] = 2.0**log2_factor
    families = {}
    for family, factors in values.items():
        depth = tuple(factors.pop(f"depth {number}") for number in range(_DEPTHS))
        if family != "residual":
            factors = {module: factor for group, factor in factors.items() for module in GROUPS[group]}
        families[family] = Family(of=factors, depth=depth)
    return ModuleMultipliers(**families)


def study(config: MultiplierSearch, trials: Trials) -> str:
    """Runs the search and the comparison, writes multipliers.json, two tables and a figure; returns the report.

    The tables are search.csv and comparison.csv.
    """
    base, is_edge = with_tuned_learning_rate(config.base, config.log2_learning_rates, 1, trials)
    rounds = _search(config, base, trials)
    best = min(rounds, key=lambda one: one.loss)
    multipliers = multipliers_at(best.centre)
    configuration.save(trials.folder / "multipliers.json", multipliers)
    write_csv(trials.folder / "search.csv", [{"runs": r.runs, "loss": r.loss, "radius": r.radius} for r in rounds])
    compared = _compare(config, base, multipliers, trials)
    draw_panels(trials.folder / "search.png", [_panel(rounds)])
    return _text(config, base, is_edge, rounds, best, compared)


@dataclass(frozen=True)
class SearchRound:
    """State of the search after a round."""

    runs: int
    """Number of trainings so far."""
    centre: SearchPoint
    loss: float
    """Loss at the centre."""
    radius: float


def with_multipliers(config: TrainConfig, multipliers: ModuleMultipliers) -> TrainConfig:
    """The configuration with other multipliers."""
    parametrization = dataclasses.replace(config.parametrization, multipliers=multipliers)
    return dataclasses.replace(config, parametrization=parametrization)


def random_points(
    config: MultiplierSearch, seed: int, number: int, centre: SearchPoint, radius: float
) -> list[SearchPoint]:
    """Points of round `number`: normal steps from the centre along random dimensions."""
    rng = np.random.default_rng([seed, number])
    shape = (config.per_round, len(centre))
    steps = radius * rng.normal(size=shape) * (rng.random(shape) < config.changed)
    return list(centre + steps)


def _search(config: MultiplierSearch, base: TrainConfig, trials: Trials) -> list[SearchRound]:
    """All rounds until the budget is spent; trainings that are recorded are not repeated."""
    started = time.monotonic()
    centre = np.zeros(len(search_dimensions()))
    (first,) = trials.outcomes([base], "search")
    rounds = [SearchRound(1, centre, first.loss, config.radius)]
    while rounds[-1].runs + config.per_round <= config.runs:
        if config.hours is not None and time.monotonic() - started > 3600 * config.hours:
            break
        last = rounds[-1]
        points = random_points(config, base.seed, len(rounds), last.centre, last.radius)
        outcomes = trials.outcomes(
            [with_multipliers(base, multipliers_at(point)) for point in points], f"search, round {len(rounds)}"
        )
        rounds.append(next_round(last, points, [outcome.loss for outcome in outcomes]))
    return rounds


def next_round(last: SearchRound, points: Sequence[SearchPoint], losses: Sequence[float]) -> SearchRound:
    """State after a round: at the best point with 1.2 times the radius if it is better, else with 0.8 times the radius.

    The radius stays within [0.05, 1].
    """
    best, runs = int(np.argmin(losses)), last.runs + len(points)
    if losses[best] < last.loss:
        return SearchRound(runs, points[best], losses[best], min(1.0, 1.2 * last.radius))
    return SearchRound(runs, last.centre, last.loss, max(0.05, 0.8 * last.radius))


Comparison = dict[tuple[str, bool], list[Outcome]]
"""(Name of the shape, whether with multipliers) → outcomes of all seeds."""


def _compare(config: MultiplierSearch, base: TrainConfig, multipliers: ModuleMultipliers, trials: Trials) -> Comparison:
    """Trains at the base shape, wider, deeper and both, with and without the multipliers, on seeds not yet used."""
    width, depth = base.model.width * config.width_factor, base.model.num_layers * config.depth_factor
    shapes = {
        "base": (base.model.width, base.model.num_layers),
        f"{config.width_factor} times as wide": (width, base.model.num_layers),
        f"{config.depth_factor} times as deep": (base.model.width, depth),
        "both": (width, depth),
    }
    cells = [(name, tuned, s) for name in shapes for tuned in (False, True) for s in range(config.seeds)]
    configs = []
    for name, is_tuned, seed in cells:
        train = at_shape(base, base.parametrization.kind, *shapes[name])
        if is_tuned:
            train = with_multipliers(train, multipliers)
        configs.append(dataclasses.replace(train, seed=base.seed + 1 + seed))
    outcomes = dict(zip(cells, trials.outcomes(configs, "comparison"), strict=True))
    write_csv(
        trials.folder / "comparison.csv",
        [
            {"shape": name, "multipliers": tuned, "seed": seed, "loss": outcome.loss, "steps": outcome.steps}
            for (name, tuned, seed), outcome in outcomes.items()
        ],
    )
    compared: Comparison = {}
    for (name, tuned, _), outcome in outcomes.items():
        compared.setdefault((name, tuned), []).append(outcome)
    return compared


def speedup(plain: Sequence[Outcome], tuned: Sequence[Outcome]) -> float:
    """Ratio of the tokens that plain runs need to those that tuned runs need, to the lowest loss that both reach.

    Tokens are read from the mean curves of the held-out loss. NaN if a run diverged.
    """
    if not all(np.isfinite(one.loss) for one in [*plain, *tuned]):
        return float("nan")
    curves = []
    for runs in (plain, tuned):
        tokens, _, losses = np.mean([np.array(one.curve) for one in runs], axis=0).T
        curves.append((tokens, np.minimum.accumulate(losses)))
    lowest = max(losses[-1] for _, losses in curves)
    slow, fast = (np.interp(-lowest, -losses, tokens) for tokens, losses in curves)
    return float(slow / fast)


def _panel(rounds: Sequence[SearchRound]) -> Panel:
    return Panel(
        title="search",
        curves={"loss at the centre": [(float(r.runs), r.loss) for r in rounds]},
        x="runs",
        y="loss",
        scales=("linear", "linear"),
    )


def _text(
    config: MultiplierSearch,
    base: TrainConfig,
    is_edge: bool,
    rounds: Sequence[SearchRound],
    best: SearchRound,
    compared: Comparison,
) -> str:
    rows = []
    for name in dict.fromkeys(name for name, _ in compared):
        plain, tuned = ([o.loss for o in compared[name, is_tuned]] for is_tuned in (False, True))
        difference = np.array(tuned) - np.array(plain)
        half = half_width_of_mean(difference.tolist())
        means = (f"{np.mean(plain):.4f}", f"{np.mean(tuned):.4f}")
        gain = f"{difference.mean() / np.mean(plain):+.1%}" + (
            "" if half is None else f" ± {half / np.mean(plain):.1%}"
        )
        faster = f"{speedup(compared[name, False], compared[name, True]):.2f}"
        rows.append([name, f"{compared[name, False][0].num_parameters:,}", *means, gain, faster])
    largest = sorted(zip(search_dimensions(), best.centre.tolist(), strict=True), key=lambda pair: -abs(pair[1]))[:10]
    named = ", ".join(f"{family} of {group} ×{2.0**log2_factor:.2f}" for (family, group), log2_factor in largest)
    header = ["shape", "parameters", "untuned", "with multipliers", "difference", "speed-up"]
    return "\n\n".join(
        [
            f"Tuned learning rate {base.optimizer.learning_rate:.3g}{AT_EDGE if is_edge else ''}; "
            f"{rounds[-1].runs} runs of "
            f"{base.optimizer.horizon_tokens:,} tokens in {len(search_dimensions())} dimensions lowered the loss of "
            f"the searched seed from {rounds[0].loss:.4f} to {best.loss:.4f}. On {config.seeds} other seeds, at the "
            "base and transferred:",
            markdown_table(header, rows),
            OVER_SEEDS.format(config.seeds),
            "Speed-up: ratio of the tokens that the untuned runs need to those that the runs with multipliers need, to "
            "the same held-out loss of the averaged weights.",
            f"The largest multipliers: {named}. All of them: multipliers.json, for `trimask train --multipliers`.",
        ]
    )
