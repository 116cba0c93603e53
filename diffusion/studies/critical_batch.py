"""How few training steps are enough? Fits S_crit to two horizons, and predicts the critical batch of a third.

At each horizon D (tokens) the batch B is doubled again and again, with all else by the SDE rule: the loss stays the
same while there are enough steps, and rises with fewer. With S the number of steps and L_D the plateau, the loss at
that horizon with many steps,

    L(D, S) = L_D · (1 + 0.01 · (S_crit / S)^p),

so S_crit is the number of steps at which the loss is 1 % above the plateau. S_crit and p are the same at all horizons.
The confidence interval comes from a bootstrap over seeds; all batches use the same resampled seeds, because a seed
means the same initialisation and examples in all of them. The critical batch in tokens is B_crit = D / S_crit.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from trimask.diffusion.pretraining.description import TrainConfig
from trimask.diffusion.sde import SDEScaling
from trimask.diffusion.studies.findings import (
    OVER_SEEDS,
    Panel,
    draw_panels,
    markdown_table,
    mean_and_interval,
    standard_deviation,
    write_csv,
)
from trimask.diffusion.studies.trainings import Outcome, as_sde_base, at_batch
from trimask.diffusion.studies.trials import Trials, require_at_least
from trimask.tokenizers.storage.ranges import Checked, PositiveInt, Size

EXCESS = 0.01
"""Relative increase of the loss over its plateau at S_crit."""
_DRAWS = 200
"""Number of bootstrap samples."""
_POWERS = (0.3, 4.0)
"""Bounds of p in the fit."""

Losses = Mapping[tuple[int, int], Sequence[tuple[float, float]]]
"""(Horizon in tokens, batch in positions) → (number of steps, loss) of every seed."""


@dataclass(frozen=True, kw_only=True)
class CriticalBatch(Checked):
    """Horizons and batches that the study of the critical batch compares."""

    base: TrainConfig
    """Training configuration, taken as tuned at its own batch and horizon."""
    horizons: tuple[PositiveInt, ...] = (100_000, 200_000)
    """Horizons in tokens to which S_crit is fitted."""
    predicted_horizon: PositiveInt = 400_000
    """Horizon in tokens for which the critical batch is predicted, and then measured."""
    batches: tuple[Size, ...] = (64, 128, 256, 512, 1024, 2048, 4096)
    """Batches to compare, in positions, padding included."""
    seeds: Size = 3
    """Number of seeds for every horizon and batch."""

    def __post_init__(self):
        super().__post_init__()
        require_at_least(1, horizons=len(self.horizons))
        require_at_least(3, batches=len(self.batches))


@dataclass(frozen=True)
class CriticalBatchFit:
    """Parameters of L(D, S), fitted to losses."""

    critical_steps: float
    """S_crit, the number of steps at which the loss is 1 % above the plateau."""
    interval: tuple[float, float]
    """95 % confidence interval of S_crit, by bootstrap over seeds; NaN if there is a single seed."""
    power: float
    """Exponent p of the excess of the loss over the plateau."""
    longest: float
    """Number of steps of the longest run; a larger S_crit is extrapolated."""
    plateaus: dict[int, float]
    """Horizon in tokens → L_D."""

    @property
    def summary(self) -> str:
        """S_crit with its interval, p, and whether they are extrapolated or at a bound, in words."""
        beyond = f", beyond the longest runs of {self.longest:,.0f}" if self.critical_steps > self.longest else ""
        bound = ", at its bound" if not _POWERS[0] * 1.01 < self.power < _POWERS[1] * 0.99 else ""
        steps = f"{self.critical_steps:.0f} steps {_shown_interval(*self.interval)}"
        return f"S_crit = {steps}, p = {self.power:.2f}{bound}{beyond},"

    def batch_interval(self, horizon: int) -> str:
        """95 % confidence interval of B_crit in tokens at a horizon in tokens, in words."""
        low, high = self.interval
        return _shown_interval(horizon / high, horizon / low)

    def loss(self, horizon: int, steps: float) -> float:
        """Loss L(D, S) of a run, by the fit; the horizon must be one of `plateaus`."""
        return self.plateaus[horizon] * (1 + EXCESS * (self.critical_steps / steps) ** self.power)


def _shown_interval(low: float, high: float) -> str:
    return f"(95 % over seeds: {low:,.0f}–{high:,.0f})" if np.isfinite(low) else "(one seed: no interval)"


def study(config: CriticalBatch, trials: Trials) -> str:
    """Runs the study of the critical batch, writes losses.csv and a figure, and returns the report in Markdown."""
    horizons = (*config.horizons, config.predicted_horizon)
    cells = [(d, b, seed) for d in horizons for b in config.batches for seed in range(config.seeds)]
    tuned = as_sde_base(config.base, trials.data)
    configs = [at_batch(tuned, batch, horizon, seed) for horizon, batch, seed in cells]
    outcomes = dict(zip(cells, trials.outcomes(configs), strict=True))
    rows = [
        {"horizon": horizon, "batch": batch, "seed": seed, "steps": outcome.steps, "loss": outcome.loss}
        for (horizon, batch, seed), outcome in outcomes.items()
    ]
    write_csv(trials.folder / "losses.csv", rows)
    losses = by_cell(outcomes)
    predicting = fit_critical_steps({cell: points for cell, points in losses.items() if cell[0] in config.horizons})
    measured = fit_critical_steps(
        {cell: points for cell, points in losses.items() if cell[0] == config.predicted_horizon}
    )
    draw_panels(trials.folder / "loss.png", _panels(config, losses, predicting, measured))
    return _text(config, losses, predicting, measured)


def by_cell(outcomes: Mapping[tuple[int, int, int], Outcome]) -> dict[tuple[int, int], list[tuple[float, float]]]:
    """(Horizon, batch) → losses of all seeds, from the outcomes of (horizon, batch, seed); infinite if diverged."""
    losses: dict[tuple[int, int], list[tuple[float, float]]] = {}
    for (horizon, batch, _), outcome in outcomes.items():
        losses.setdefault((horizon, batch), []).append((float(outcome.steps), outcome.loss))
    return losses


def fit_critical_steps(losses: Losses) -> CriticalBatchFit:
    """Fits L(D, S) by robust least squares on the logarithm of the loss, with a bootstrap interval of S_crit.

    Raises ValueError if all runs diverged.
    """
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
    return CriticalBatchFit(critical, (low, high), power, longest, plateaus)


def _fit_once(losses: Losses) -> tuple[float, float, dict[int, float]]:
    """S_crit, p and plateaus. The unknowns are log S_crit, p, and log L_D of every horizon."""
    from scipy.optimize import least_squares  # takes half a second to load

    horizons = sorted({horizon for horizon, _ in losses})
    points = [(horizons.index(horizon), s, loss) for (horizon, _), cell in losses.items() for s, loss in cell]
    horizon_index, steps, values = (np.array(column) for column in zip(*points, strict=True))
    if not np.isfinite(values).any():
        raise ValueError("all runs diverged, at every batch: lower the learning rate of the base")
    values = np.minimum(values, 10 * values[np.isfinite(values)].max())  # diverged runs: ten times the worst

    def residuals(unknown):
        log_critical, power = unknown[:2]
        excess = EXCESS * np.exp(power * (log_critical - np.log(steps)))
        return unknown[2:][horizon_index] + np.log1p(excess) - np.log(values)

    lowest = [min(value for index, _, value in points if index == number) for number in range(len(horizons))]
    start = [np.log(np.median(steps)), 1.0, *np.log(lowest)]
    bounds = (
        [0.0, _POWERS[0], *[-np.inf] * len(horizons)],
        [np.log(steps.max()) + 3, _POWERS[1], *[np.inf] * len(horizons)],
    )
    solution = least_squares(residuals, start, bounds=bounds, loss="soft_l1", f_scale=0.02).x
    plateaus = {horizon: float(np.exp(value)) for horizon, value in zip(horizons, solution[2:], strict=True)}
    return float(np.exp(solution[0])), float(solution[1]), plateaus


def largest_flat_batch(losses: Losses, horizon: int, plateau: float) -> float | None:
    """Largest batch in tokens whose mean loss is at most max(1 %, 2 standard deviations of seeds) above the plateau.

    None if there is no such batch.
    """
    flat = []
    for (of_horizon, _), cell in losses.items():
        values = [loss for _, loss in cell]
        margin = max(EXCESS * plateau, 2 * standard_deviation(values))
        if of_horizon == horizon and np.mean(values) <= plateau + margin:
            flat.append(horizon / cell[0][0])
    return max(flat, default=None)


def _panels(
    config: CriticalBatch, losses: Losses, predicting: CriticalBatchFit, measured: CriticalBatchFit
) -> list[Panel]:
    """Loss against steps: a panel for each horizon, with the fit to it."""
    panels = []
    for horizon in (*config.horizons, config.predicted_horizon):
        points = sorted(point for (of_horizon, _), cell in losses.items() if of_horizon == horizon for point in cell)
        fit = predicting if horizon in predicting.plateaus else measured
        line = [(s, fit.loss(horizon, s)) for s in np.geomspace(points[0][0], points[-1][0], 50).tolist()]
        title = f"{horizon:,} tokens" + ("" if horizon in predicting.plateaus else ", predicted")
        panels.append(
            Panel(
                title=title,
                curves={"fit": line},
                points={"runs": points},
                x="steps",
                y="loss",
                markers=False,
                vertical_lines={"S_crit of the first two": predicting.critical_steps},
            )
        )
    return panels


def _text(config: CriticalBatch, losses: Losses, predicting: CriticalBatchFit, measured: CriticalBatchFit) -> str:
    horizon, plateau = config.predicted_horizon, measured.plateaus[config.predicted_horizon]
    predicted = SDEScaling(critical_steps=predicting.critical_steps).critical_batch(horizon)
    rows = []
    for (d, batch), cell in losses.items():
        steps = cell[0][0]
        loss = mean_and_interval([loss for _, loss in cell])
        rows.append([f"{d:,}", f"{batch:,}", f"{d / steps:,.0f}", f"{steps:,.0f}", loss])
    flat = largest_flat_batch(losses, horizon, plateau)
    largest = "No measured batch has a loss within noise of the plateau."
    if flat is not None:
        largest = f"The largest batch whose loss is within noise of the plateau has {flat:,.0f} tokens."
    return "\n\n".join(
        [
            markdown_table(["horizon", "batch in positions", "in tokens", "steps", "loss"], rows),
            OVER_SEEDS.format(config.seeds),
            f"{predicting.summary} from horizons {' and '.join(f'{d:,}' for d in config.horizons)}.",
            f"Predicted for {horizon:,} tokens: B_crit = {predicted:,.0f} tokens "
            f"{predicting.batch_interval(horizon)}. Measured there alone: {measured.summary} that is B_crit = "
            f"{horizon / measured.critical_steps:,.0f}. {largest}",
        ]
    )
