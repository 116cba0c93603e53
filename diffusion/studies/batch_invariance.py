"""Does the loss depend on the batch, when the recipe is tuned once and rescaled?

At one horizon, B from an eighth to eight times the tuned batch, under four rules: nothing scaled, learning rate times
κ, learning rate times √κ, and the whole SDE rule. The base's learning rate is tuned first. Up to which batch the rule
is to hold is predicted beforehand, from S_crit at half the horizon (`critical_batch.py`). Flat means that the spread of
mean losses over the batches below it is at most max(1 %, 2 standard deviations of seeds).
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from trimask.diffusion.description import TrainConfig
from trimask.diffusion.optimizer import OptimizerConfig
from trimask.diffusion.sde import SDEScaling, rescaled
from trimask.diffusion.studies.critical_batch import Fit, by_cell, deviation, fit
from trimask.diffusion.studies.findings import Curve, Panel, draw, markdown_table, write_csv
from trimask.diffusion.studies.trials import Outcome, Trials, at_batch, tuned_here, with_learning_rate


@dataclass(frozen=True, kw_only=True)
class BatchInvariance:
    """Batches, and how the base is tuned."""

    base: TrainConfig
    """Network and recipe; its learning rate is tuned first."""
    log2_learning_rates: tuple[float, ...] = (-9.5, -9.0, -8.5, -8.0, -7.5, -7.0)
    """Grid on which it is tuned."""
    log2_factors: tuple[int, ...] = (-3, -2, -1, 0, 1, 2, 3)
    """Batches, as powers of two of the base's."""
    rules: tuple[str, ...] = ("nothing", "linear", "root", "sde")
    """Names in RULES."""
    seeds: int = 3
    """Seeds of every cell."""


RULES: Mapping[str, Callable[[OptimizerConfig, float], OptimizerConfig]] = {
    "nothing": lambda optimizer, kappa: optimizer,
    "linear": lambda optimizer, kappa: dataclasses.replace(optimizer, learning_rate=optimizer.learning_rate * kappa),
    "root": lambda optimizer, kappa: dataclasses.replace(optimizer, learning_rate=optimizer.learning_rate * kappa**0.5),
    "sde": rescaled,
}
"""What becomes of the recipe at κ = B / B_base."""

Cell = tuple[str, int]
"""Rule, and the batch as a power of two of the base's."""


def study(config: BatchInvariance, trials: Trials) -> str:
    """Runs it, writes losses.csv and two figures; returns the text."""
    base = _tuned(config, trials)
    fitted = _critical(config, base, trials)
    cells = [(rule, k, seed) for rule in config.rules for k in config.log2_factors for seed in range(config.seeds)]
    configs = [under_rule(base, rule, 2.0**k, seed) for rule, k, seed in cells]
    outcomes = dict(zip(cells, trials.losses(configs, "batches"), strict=True))
    by_seeds: dict[Cell, list[Outcome]] = {}
    for (rule, k, _), outcome in outcomes.items():
        by_seeds.setdefault((rule, k), []).append(outcome)
    rows = [
        {"rule": rule, "log2_factor": k, "seed": seed, "batch_tokens": round(o.batch_tokens, 1), "steps": o.steps}
        | {"loss": o.loss, "last_loss": o.last_loss}
        for (rule, k, seed), o in outcomes.items()
    ]
    write_csv(trials.folder / "losses.csv", rows)
    critical = base.optimizer.horizon_tokens / fitted.critical_steps
    draw(trials.folder / "loss.png", _loss_panel(config, by_seeds, critical), columns=1)
    draw(trials.folder / "curves.png", [_curves_panel(config, rule, by_seeds) for rule in config.rules])
    return _text(config, base, by_seeds, fitted)


def under_rule(base: TrainConfig, rule: str, kappa: float, seed: int) -> TrainConfig:
    """The tuned recipe at κ times its batch; the SDE rule is the product's own, the others are written into it."""
    batch = round(base.batch.tokens * kappa)
    config = at_batch(base, batch, base.optimizer.horizon_tokens, seed)
    if rule == "sde":
        return config
    return dataclasses.replace(config, optimizer=RULES[rule](config.optimizer, kappa), sde=SDEScaling())


def _tuned(config: BatchInvariance, trials: Trials) -> TrainConfig:
    """The base at the best learning rate of the grid, by the mean of two seeds."""
    grid = [(rate, seed) for rate in config.log2_learning_rates for seed in range(2)]
    configs = [
        dataclasses.replace(with_learning_rate(config.base, 2.0**rate), seed=config.base.seed + 100 + seed)
        for rate, seed in grid
    ]
    losses = [outcome.loss for outcome in trials.losses(configs, "tuning the base")]
    means = np.reshape(losses, (-1, 2)).mean(axis=1)
    best = with_learning_rate(config.base, 2.0 ** config.log2_learning_rates[int(np.argmin(means))])
    return tuned_here(best, trials.data)


def _critical(config: BatchInvariance, base: TrainConfig, trials: Trials) -> Fit:
    """S_crit at half the horizon, from the batches of the study."""
    horizon = base.optimizer.horizon_tokens // 2
    batches = [round(base.batch.tokens * 2.0**k) for k in config.log2_factors]
    cells = [(horizon, batch, seed) for batch in batches for seed in range(config.seeds)]
    configs = [at_batch(base, batch, horizon, seed) for horizon, batch, seed in cells]
    outcomes = trials.losses(configs, "half the horizon")
    return fit(by_cell(dict(zip(cells, outcomes, strict=True))))


@dataclass(frozen=True)
class Flatness:
    """How much the loss depends on the batch, up to the critical one."""

    spread: float
    """(highest − lowest) / lowest of the mean losses over batches."""
    allowed: float
    """max(1 %, 2 standard deviations of seeds)."""
    apart: float
    """Largest deviation of a curve of the training loss from their mean, over the second half of the tokens."""

    @property
    def is_flat(self) -> bool:
        """As the rule promises."""
        return self.spread <= self.allowed


def flatness(by_seeds: Mapping[Cell, Sequence[Outcome]], rule: str, critical: float) -> Flatness:
    """Over all batches of at most `critical` tokens."""
    cells = [o for (of, _), o in by_seeds.items() if of == rule and o[0].batch_tokens <= critical]
    means = np.array([np.mean([o.loss for o in outcomes]) for outcomes in cells])
    within = np.sqrt(np.mean([deviation([o.loss for o in outcomes]) ** 2 for outcomes in cells]))
    curves = np.array([_second_half(outcomes) for outcomes in cells])
    apart = np.abs(curves / curves.mean(axis=0) - 1).max() if np.isfinite(curves).all() else np.inf
    return Flatness(float(np.ptp(means) / means.min()), max(0.01, float(2 * within / means.min())), float(apart))


def _second_half(outcomes: Sequence[Outcome]) -> np.ndarray:
    """Mean training loss at ten points of the second half of the tokens; infinite where a run diverged."""
    curves = []
    for outcome in outcomes:
        tokens, losses = np.array(outcome.curve).T
        at = np.linspace(0.55, 1.0, 10) * outcome.steps * outcome.batch_tokens
        curves.append(np.interp(at, tokens, losses) if np.isfinite(outcome.loss) else np.full(10, np.inf))
    return np.mean(curves, axis=0)


def _point(outcomes: Sequence[Outcome]) -> tuple[float, float]:
    """Batch and mean loss."""
    return outcomes[0].batch_tokens, float(np.mean([outcome.loss for outcome in outcomes]))


def _loss_panel(config: BatchInvariance, by_seeds: Mapping[Cell, Sequence[Outcome]], critical: float) -> list[Panel]:
    curves = {rule: [_point(by_seeds[rule, k]) for k in config.log2_factors] for rule in config.rules}
    lowest = min(loss for curve in curves.values() for _, loss in curve)
    return [
        Panel(
            title="loss at the end",
            curves=curves,
            x="batch in tokens",
            y="loss",
            lines={"B_crit, predicted": critical},
            highest=1.5 * lowest,
        )
    ]


def _curves_panel(config: BatchInvariance, rule: str, by_seeds: Mapping[Cell, Sequence[Outcome]]) -> Panel:
    curves: dict[str, Curve] = {
        f"batch × {2.0**k:g}": [(point[0], point[1]) for point in by_seeds[rule, k][0].curve]
        for k in config.log2_factors
    }
    return Panel(title=rule, curves=curves, x="tokens", y="training loss", scales=("linear", "log"), markers=False)


def _text(config: BatchInvariance, base: TrainConfig, by_seeds: Mapping[Cell, Sequence[Outcome]], fitted: Fit) -> str:
    horizon = base.optimizer.horizon_tokens
    low, high = fitted.interval
    critical = horizon / fitted.critical_steps
    parts = [
        f"{by_seeds[config.rules[0], 0][0].num_parameters:,} parameters, {horizon:,} tokens, base batch "
        f"{base.sde.base_batch_tokens:,.0f} tokens, tuned learning rate {base.optimizer.learning_rate:.3g}, "
        f"{config.seeds} seeds. S_crit = {fitted.critical_steps:.0f} steps (95 %: {low:.0f}–{high:.0f}) at half the "
        f"horizon predicts B_crit = {critical:,.0f} tokens ({horizon / high:,.0f}–{horizon / low:,.0f})."
    ]
    header = ["batch in tokens", "steps", *config.rules]
    rows = []
    for k in config.log2_factors:
        one = by_seeds[config.rules[0], k][0]
        values = [[o.loss for o in by_seeds[rule, k]] for rule in config.rules]
        cells = [f"{np.mean(losses):.4f} ± {deviation(losses):.4f}" for losses in values]
        rows.append([f"{one.batch_tokens:,.0f}", f"{one.steps:,}", *cells])
    parts.append(markdown_table(header, rows) + "\n\n± is one standard deviation of seeds.")
    for rule in config.rules:
        of = flatness(by_seeds, rule, critical)
        parts.append(
            f"- {rule}: spread {of.spread:.1%} up to B_crit, allowed {of.allowed:.1%}: "
            f"{'flat' if of.is_flat else 'not flat'}; training curves within {of.apart:.1%} of their mean."
        )
    return "\n\n".join(parts)
