"""Per-module multipliers by trust-region random search, and what they are worth on a larger network.

    log2 ζ(module, block) = of its group + of its depth (three values, interpolated),     for each family of multipliers

The centre is moved to the best of a round of random points around it, if that is better than the centre; the radius
then grows, else it shrinks (Complete(d)P, arXiv 2512.22382, section 4; the sizes of both are ours). All trials of the
search have one seed, so that they differ by their multipliers alone; whether the gain is one is seen on other seeds and
shapes at the end, against the same recipe without multipliers. A round is a function of the seed and the rounds before
it, so that a search goes on where it stopped, on any number of processes.
"""

import dataclasses
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated

import numpy as np
from jaxtyping import Float

from trimask.diffusion.parametrization import Family, ModuleMultipliers
from trimask.diffusion.pretraining.description import TrainConfig
from trimask.diffusion.studies.findings import Panel, deviation, draw, markdown_table, write_csv
from trimask.diffusion.studies.trials import AT_EDGE, Outcome, Trials, at_shape, tuned_on
from trimask.tokenizers.storage import configuration
from trimask.tokenizers.storage.ranges import Checked, Log2, NonNegative, Positive, PositiveInt, Size, real

GROUPS: Mapping[str, tuple[str, ...]] = {
    "embeddings": ("embedding", "place_range", "place_scale", "place_map"),
    "attention": ("query", "key", "value", "out"),
    "mlp": ("gate", "up", "down"),
    "norms": ("attention_norm", "mlp_norm", "query_norm", "key_norm", "final_norm"),
    "unembedding": ("unembedding",),
}
"""Modules that share a multiplier in the search."""

_DEPTHS = 3
"""Values of a depth profile."""


@dataclass(frozen=True, kw_only=True)
class Search(Checked):
    """Budget and trust region."""

    base: TrainConfig
    """Network and recipe; its learning rate is tuned first."""
    log2_learning_rates: tuple[Log2, ...] = (-9.0, -8.5, -8.0, -7.5, -7.0, -6.5, -6.0, -5.5)
    """Grid on which it is tuned."""
    runs: PositiveInt = 193
    """Trials of the search: the centre, and rounds of `per_round`."""
    hours: NonNegative | None = None
    """Time after which this call begins no further round. None: only `runs` ends it."""
    per_round: Size = 12
    """Random points of a round."""
    radius: Positive = 0.4
    """Standard deviation of a coordinate in octaves, at first."""
    changed: Annotated[float, real(above=0, most=1)] = 0.3
    """Share of the coordinates that a point changes."""
    width_factor: Size = 4
    """How much wider the network is on which the result is tried."""
    depth_factor: Size = 2
    """How much deeper."""
    seeds: Size = 3
    """Seeds of the comparison at the end."""


Point = Float[np.ndarray, " coordinates"]
"""log2 ζ."""


def coordinates() -> list[tuple[str, str]]:
    """(Family, group) of every coordinate; groups are those above, branches, and the depth profile's values."""
    listed = []
    for family in (field.name for field in dataclasses.fields(ModuleMultipliers)):
        groups = ["attention", "mlp"] if family == "residual" else [*GROUPS]
        if family == "init":
            groups.remove("norms")
        listed += [(family, group) for group in [*groups, *(f"depth {number}" for number in range(_DEPTHS))]]
    return listed


def multipliers_at(point: Point) -> ModuleMultipliers:
    """The multipliers that a point stands for."""
    values: dict[str, dict[str, float]] = {}
    for (family, group), octaves in zip(coordinates(), point.tolist(), strict=True):
        values.setdefault(family, {})[group] = 2.0**octaves
    families = {}
    for family, of in values.items():
        depth = tuple(of.pop(f"depth {number}") for number in range(_DEPTHS))
        modules = of if family == "residual" else {m: factor for group, factor in of.items() for m in GROUPS[group]}
        families[family] = Family(of=modules, depth=depth)
    return ModuleMultipliers(**families)


def study(config: Search, trials: Trials) -> str:
    """Runs it, writes multipliers.json, search.csv, comparison.csv and a figure; returns the text."""
    base, is_edge = tuned_on(config.base, config.log2_learning_rates, 1, trials)
    rounds = _search(config, base, trials)
    best = min(rounds, key=lambda one: one.loss)
    found = multipliers_at(best.centre)
    configuration.save(trials.folder / "multipliers.json", found)
    write_csv(trials.folder / "search.csv", [{"runs": r.runs, "loss": r.loss, "radius": r.radius} for r in rounds])
    compared = _compared(config, base, found, trials)
    draw(trials.folder / "search.png", [_panel(rounds)])
    return _text(config, base, is_edge, rounds, best, compared)


@dataclass(frozen=True)
class Round:
    """Where the search stood."""

    runs: int
    centre: Point
    loss: float
    """At the centre."""
    radius: float


def with_multipliers(config: TrainConfig, multipliers: ModuleMultipliers) -> TrainConfig:
    """The configuration with these multipliers."""
    parametrization = dataclasses.replace(config.parametrization, multipliers=multipliers)
    return dataclasses.replace(config, parametrization=parametrization)


def proposals(config: Search, seed: int, number: int, centre: Point, radius: float) -> list[Point]:
    """The points of round `number`: normal steps from the centre along a random part of the coordinates."""
    rng = np.random.default_rng([seed, number])
    shape = (config.per_round, len(centre))
    steps = radius * rng.normal(size=shape) * (rng.random(shape) < config.changed)
    return list(centre + steps)


def _search(config: Search, base: TrainConfig, trials: Trials) -> list[Round]:
    """Round after round, until the budget is spent; what is known from before is not run again."""
    started = time.monotonic()
    centre = np.zeros(len(coordinates()))
    (first,) = trials.losses([base], "search")
    rounds = [Round(1, centre, first.loss, config.radius)]
    while rounds[-1].runs + config.per_round <= config.runs:
        if config.hours is not None and time.monotonic() - started > 3600 * config.hours:
            break
        last = rounds[-1]
        points = proposals(config, base.seed, len(rounds), last.centre, last.radius)
        outcomes = trials.losses(
            [with_multipliers(base, multipliers_at(point)) for point in points], f"search, round {len(rounds)}"
        )
        rounds.append(moved(last, points, [outcome.loss for outcome in outcomes]))
    return rounds


def moved(last: Round, points: Sequence[Point], losses: Sequence[float]) -> Round:
    """The next centre and radius: 1.2 times it after a better point, 0.8 times it after none."""
    best, runs = int(np.argmin(losses)), last.runs + len(points)
    if losses[best] < last.loss:
        return Round(runs, points[best], losses[best], min(1.0, 1.2 * last.radius))
    return Round(runs, last.centre, last.loss, max(0.05, 0.8 * last.radius))


Comparison = dict[tuple[str, bool], list[Outcome]]
"""(Shape, with multipliers) → outcomes of the seeds."""


def _compared(config: Search, base: TrainConfig, found: ModuleMultipliers, trials: Trials) -> Comparison:
    """Base shape, wider, deeper and both, with and without what was found, on seeds that the search has not seen."""
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
        at = at_shape(base, base.parametrization.kind, *shapes[name])
        if is_tuned:
            at = with_multipliers(at, found)
        configs.append(dataclasses.replace(at, seed=base.seed + 1 + seed))
    outcomes = dict(zip(cells, trials.losses(configs, "comparison"), strict=True))
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
    """Tokens that the plain runs take over those that the tuned ones take, to the lowest loss that both reach.

    By the mean curves of the held-out loss; not a number where a run diverged.
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


def _panel(rounds: Sequence[Round]) -> Panel:
    return Panel(
        title="search",
        curves={"loss at the centre": [(float(r.runs), r.loss) for r in rounds]},
        x="runs",
        y="loss",
        scales=("linear", "linear"),
    )


def _text(
    config: Search,
    base: TrainConfig,
    is_edge: bool,
    rounds: Sequence[Round],
    best: Round,
    compared: Comparison,
) -> str:
    rows = []
    for name in dict.fromkeys(name for name, _ in compared):
        plain, tuned = ([o.loss for o in compared[name, is_tuned]] for is_tuned in (False, True))
        difference = np.array(tuned) - np.array(plain)
        error = deviation(difference.tolist()) / len(difference) ** 0.5
        means = (f"{np.mean(plain):.4f}", f"{np.mean(tuned):.4f}")
        gain = f"{difference.mean() / np.mean(plain):+.1%} ± {error / np.mean(plain):.1%}"
        faster = f"{speedup(compared[name, False], compared[name, True]):.2f}"
        rows.append([name, f"{compared[name, False][0].num_parameters:,}", *means, gain, faster])
    largest = sorted(zip(coordinates(), best.centre.tolist(), strict=True), key=lambda pair: -abs(pair[1]))[:10]
    named = ", ".join(f"{family} of {group} ×{2.0**octaves:.2f}" for (family, group), octaves in largest)
    header = ["shape", "parameters", "untuned", "with multipliers", "difference ± standard error", "speed-up"]
    return "\n\n".join(
        [
            f"Tuned learning rate {base.optimizer.learning_rate:.3g}{AT_EDGE if is_edge else ''}; "
            f"{rounds[-1].runs} runs of "
            f"{base.optimizer.horizon_tokens:,} tokens in {len(coordinates())} dimensions took the loss of the seed "
            f"searched on from {rounds[0].loss:.4f} to {best.loss:.4f}. On {config.seeds} other seeds, at the base and "
            "transferred:",
            markdown_table(header, rows),
            "Speed-up: tokens of the untuned runs over those after which the others have the same loss on held-out "
            "data, of the weight average.",
            f"The largest multipliers: {named}. All of them: multipliers.json, for `trimask train --multipliers`.",
        ]
    )
