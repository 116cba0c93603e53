"""How few steps are enough? S_crit, from two horizons, and what it predicts for a third.

At each horizon D the batch B doubles, everything else by the SDE rule: the loss stays where it is as long as there are
steps enough, and rises beyond. With S = B's number of steps, and L_D the loss at that horizon with many of them,

    L(D, S) = L_D · (1 + 0.01 · (S_crit / S)^p),

so that S_crit is where the loss is 1 % above its plateau. S_crit and p are the same at all horizons; the interval comes
from drawing the seeds anew (bootstrap), the same ones for all batches, since a seed's start and examples are common to
them. B_crit = D / S_crit.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from trimask.diffusion.pretraining.description import TrainConfig
from trimask.diffusion.sde import SDEScaling
from trimask.diffusion.studies.findings import Panel, deviation, draw, markdown_table, mean_and_deviation, write_csv
from trimask.diffusion.studies.trials import Outcome, Trials, at_batch, require_at_least, tuned_here
from trimask.tokenizers.storage.ranges import Checked, PositiveInt, Size

EXCESS = 0.01
"""The loss at S_crit above its plateau, as a fraction."""
_DRAWS = 200
_POWERS = (0.3, 4.0)
"""Bounds of p."""

Losses = Mapping[tuple[int, int], Sequence[tuple[float, float]]]
"""(Horizon, positions of a batch) → (steps, loss) of every seed."""


@dataclass(frozen=True, kw_only=True)
class CriticalBatch(Checked):
    """Horizons and batches."""

    base: TrainConfig
    """Network and recipe, taken as tuned at its own batch and horizon."""
    horizons: tuple[PositiveInt, ...] = (100_000, 200_000)
    """Tokens; S_crit is fitted to these."""
    predicted_horizon: PositiveInt = 400_000
    """Tokens; B_crit of this one is predicted, and then measured."""
    batches: tuple[Size, ...] = (64, 128, 256, 512, 1024, 2048, 4096)
    """Positions of a batch."""
    seeds: Size = 3
    """Seeds of every cell."""

    def __post_init__(self):
        super().__post_init__()
        require_at_least(1, horizons=len(self.horizons))
        require_at_least(3, batches=len(self.batches))


@dataclass(frozen=True)
class Fit:
    """What the data say of S_crit."""

    critical_steps: float
    interval: tuple[float, float]
    """95 %, by bootstrap over seeds; not numbers where there is one seed."""
    power: float
    longest: float
    """Steps of the longest run."""
    plateaus: dict[int, float]
    """Horizon → L_D."""

    @property
    def described(self) -> str:
        """S_crit with its interval, and what speaks against it."""
        low, high = self.interval
        beyond = f", beyond the longest runs of {self.longest:,.0f}" if self.critical_steps > self.longest else ""
        bound = ", at its bound" if not _POWERS[0] * 1.01 < self.power < _POWERS[1] * 0.99 else ""
        interval = f"(95 %: {low:.0f}–{high:.0f})" if np.isfinite(low) else "(one seed: no interval)"
        return f"S_crit = {self.critical_steps:.0f} steps {interval}, p = {self.power:.2f}{bound}{beyond},"

    def loss(self, horizon: int, steps: float) -> float:
        """L(D, S)."""
        return self.plateaus[horizon] * (1 + EXCESS * (self.critical_steps / steps) ** self.power)


def study(config: CriticalBatch, trials: Trials) -> str:
    """Runs it, writes losses.csv and a figure; returns the text."""
    horizons = (*config.horizons, config.predicted_horizon)
    cells = [(d, b, seed) for d in horizons for b in config.batches for seed in range(config.seeds)]
    tuned = tuned_here(config.base, trials.data)
    configs = [at_batch(tuned, batch, horizon, seed) for horizon, batch, seed in cells]
    outcomes = dict(zip(cells, trials.losses(configs), strict=True))
    rows = [
        {"horizon": horizon, "batch": batch, "seed": seed, "steps": outcome.steps, "loss": outcome.loss}
        for (horizon, batch, seed), outcome in outcomes.items()
    ]
    write_csv(trials.folder / "losses.csv", rows)
    losses = by_cell(outcomes)
    fitted = fit({cell: points for cell, points in losses.items() if cell[0] in config.horizons})
    check = fit({cell: points for cell, points in losses.items() if cell[0] == config.predicted_horizon})
    draw(trials.folder / "loss.png", _panels(config, losses, fitted, check))
    return _text(config, losses, fitted, check)


def by_cell(outcomes: Mapping[tuple[int, int, int], Outcome]) -> dict[tuple[int, int], list[tuple[float, float]]]:
    """Outcomes of (horizon, batch, seed) as losses; infinite where a run diverged."""
    losses: dict[tuple[int, int], list[tuple[float, float]]] = {}
    for (horizon, batch, _), outcome in outcomes.items():
        losses.setdefault((horizon, batch), []).append((float(outcome.steps), outcome.loss))
    return losses


def fit(losses: Losses) -> Fit:
    """S_crit by least squares on the logarithm of the loss, with an interval."""
    critical, power, plateaus = _fit_once(losses)
    longest = max(steps for points in losses.values() for steps, _ in points)
    seeds = min(len(points) for points in losses.values())
    low = high = float("nan")
    if seeds > 1:
        rng = np.random.default_rng(0)
        draws = []
        for _ in range(_DRAWS):
            drawn = rng.integers(0, seeds, seeds)
            draws.append(_fit_once({cell: [points[seed] for seed in drawn] for cell, points in losses.items()})[0])
        low, high = map(float, np.quantile(draws, (0.025, 0.975)))
    return Fit(critical, (low, high), power, longest, plateaus)


def _fit_once(losses: Losses) -> tuple[float, float, dict[int, float]]:
    from scipy.optimize import least_squares  # takes half a second to load

    horizons = sorted({horizon for horizon, _ in losses})
    points = [(horizons.index(horizon), s, loss) for (horizon, _), cell in losses.items() for s, loss in cell]
    of, steps, values = (np.array(column) for column in zip(*points, strict=True))
    if not np.isfinite(values).any():
        raise ValueError("all runs diverged: the learning rate of the base is too high for all batches")
    values = np.minimum(values, 10 * values[np.isfinite(values)].max())  # diverged: far worse than the worst

    def residuals(unknown):
        critical, power = unknown[:2]
        excess = EXCESS * np.exp(power * (critical - np.log(steps)))
        return unknown[2:][of] + np.log1p(excess) - np.log(values)

    lowest = [min(value for o, _, value in points if o == number) for number in range(len(horizons))]
    start = [np.log(np.median(steps)), 1.0, *np.log(lowest)]
    bounds = (
        [0.0, _POWERS[0], *[-np.inf] * len(horizons)],
        [np.log(steps.max()) + 3, _POWERS[1], *[np.inf] * len(horizons)],
    )
    found = least_squares(residuals, start, bounds=bounds, loss="soft_l1", f_scale=0.02).x
    plateaus = {horizon: float(np.exp(value)) for horizon, value in zip(horizons, found[2:], strict=True)}
    return float(np.exp(found[0])), float(found[1]), plateaus


def largest_flat_batch(losses: Losses, horizon: int, plateau: float) -> float | None:
    """The largest batch in tokens whose mean loss is within max(1 %, 2 deviations of seeds) of the plateau."""
    flat = []
    for (of, _), cell in losses.items():
        values = [loss for _, loss in cell]
        if of == horizon and np.mean(values) <= plateau + max(EXCESS * plateau, 2 * deviation(values)):
            flat.append(horizon / cell[0][0])
    return max(flat, default=None)


def _panels(config: CriticalBatch, losses: Losses, fitted: Fit, check: Fit) -> list[Panel]:
    panels = []
    for horizon in (*config.horizons, config.predicted_horizon):
        points = sorted((steps, loss) for (of, _), cell in losses.items() if of == horizon for steps, loss in cell)
        of = fitted if horizon in fitted.plateaus else check
        line = [(s, of.loss(horizon, s)) for s in np.geomspace(points[0][0], points[-1][0], 50).tolist()]
        title = f"{horizon:,} tokens" + ("" if horizon in fitted.plateaus else ", predicted")
        panels.append(
            Panel(
                title=title,
                curves={"fit": line},
                points={"runs": points},
                x="steps",
                y="loss",
                markers=False,
                lines={"S_crit of the first two": fitted.critical_steps},
            )
        )
    return panels


def _text(config: CriticalBatch, losses: Losses, fitted: Fit, check: Fit) -> str:
    horizon, plateau = config.predicted_horizon, check.plateaus[config.predicted_horizon]
    predicted = SDEScaling(critical_steps=fitted.critical_steps).critical_batch(horizon)
    rows = []
    for (d, batch), cell in losses.items():
        steps = cell[0][0]
        loss = mean_and_deviation([loss for _, loss in cell])
        rows.append([f"{d:,}", f"{batch:,}", f"{d / steps:,.0f}", f"{steps:,.0f}", loss])
    low, high = fitted.interval
    flat = largest_flat_batch(losses, horizon, plateau)
    return "\n\n".join(
        [
            markdown_table(["horizon", "batch in positions", "in tokens", "steps", "loss ± sd of seeds"], rows),
            f"{fitted.described} from horizons {' and '.join(f'{d:,}' for d in config.horizons)}.",
            f"Predicted for {horizon:,} tokens: B_crit = {predicted:,.0f} tokens "
            f"({horizon / high:,.0f}–{horizon / low:,.0f}). Measured there alone: {check.described} that is B_crit = "
            f"{horizon / check.critical_steps:,.0f}. The largest batch whose loss is within noise of the plateau has "
            f"{'none measured' if flat is None else f'{flat:,.0f} tokens'}.",
        ]
    )
