"""Does the loss depend on the batch, if the recipe is tuned at one batch and rescaled to the others?

At one horizon, the study trains with batches from an eighth to eight times the tuned one, under four rules: nothing
scaled, learning rate times κ, learning rate times √κ, and the whole SDE rule. The learning rate of the base is tuned
first. The largest batch for which the SDE rule should hold, B_crit, is predicted from S_crit at half the horizon
(`critical_batch.py`). The loss is called flat if the spread of its mean over the batches up to B_crit is at most
max(1 %, 2 standard deviations of seeds). A seed means the same initialisation and the same examples at every batch, so
the 95 % interval of the spread is that of differences within seeds.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np

from trimask.diffusion.evaluation.intervals import half_width_of_mean
from trimask.diffusion.optimizer import OptimizerConfig
from trimask.diffusion.pretraining.description import TrainConfig
from trimask.diffusion.sde import SDEScaling, rescaled
from trimask.diffusion.studies.critical_batch import EXCESS, CriticalBatchFit, by_cell, fit_critical_steps
from trimask.diffusion.studies.findings import (
    OVER_SEEDS,
    Curve,
    Panel,
    draw_panels,
    markdown_table,
    mean_and_interval,
    standard_deviation,
    write_csv,
)
from trimask.diffusion.studies.trainings import Outcome, as_sde_base, at_batch, mean_tokens
from trimask.diffusion.studies.trials import AT_EDGE, Trials, require_at_least, with_tuned_learning_rate
from trimask.tokenizers.storage.ranges import Checked, Log2, Size, whole

Rule = Literal["nothing", "linear", "root", "sde"]


@dataclass(frozen=True, kw_only=True)
class BatchInvariance(Checked):
    """Batches and rules that the study of batch invariance compares."""

    base: TrainConfig
    """Training configuration at the tuned batch; its learning rate is tuned first."""
    log2_learning_rates: tuple[Log2, ...] = (-9.0, -8.5, -8.0, -7.5, -7.0, -6.5, -6.0)
    """Logarithms to base 2 of the learning rates among which that of `base` is chosen."""
    log2_factors: tuple[Annotated[int, whole(-62, 62)], ...] = (-3, -2, -1, 0, 1, 2, 3)
    """Batches to compare, as logarithms to base 2 of their ratio to the batch of `base`; 0 must be among them."""
    rules: tuple[Rule, ...] = ("nothing", "linear", "root", "sde")
    """How the recipe is rescaled to other batches: nothing, the learning rate times κ (linear) or √κ (root), or all
    hyperparameters by the SDE rule (sde)."""
    seeds: Size = 3
    """Number of seeds for every batch and rule."""

    def __post_init__(self):
        super().__post_init__()
        require_at_least(1, rules=len(self.rules), learning_rates=len(self.log2_learning_rates))
        if 0 not in self.log2_factors:
            raise ValueError(f"log2_factors must contain 0, the tuned batch; got {self.log2_factors}")


RULES: Mapping[Rule, Callable[[OptimizerConfig, float], OptimizerConfig]] = {
    "nothing": lambda optimizer, kappa: optimizer,
    "linear": lambda optimizer, kappa: dataclasses.replace(optimizer, learning_rate=optimizer.learning_rate * kappa),
    "root": lambda optimizer, kappa: dataclasses.replace(optimizer, learning_rate=optimizer.learning_rate * kappa**0.5),
    "sde": lambda optimizer, kappa: rescaled(optimizer, kappa, batch_ratio=kappa),
}
"""Rule → function (optimizer config, κ) → rescaled optimizer config, with κ = B / B_base in non-padding tokens."""

Cell = tuple[str, int]
"""Rule, and log2 of the ratio of the batch to the base's."""


def study(config: BatchInvariance, trials: Trials) -> str:
    """Runs the study of batch invariance, writes losses.csv and two figures, and returns the report in Markdown."""
    best, is_edge = with_tuned_learning_rate(config.base, config.log2_learning_rates, 2, trials)
    base = as_sde_base(best, trials.data)
    fit = _critical_batch(config, base, trials)
    cells = [(rule, k, seed) for rule in config.rules for k in config.log2_factors for seed in range(config.seeds)]
    configs = [under_rule(base, rule, 2.0**k, seed, trials.data) for rule, k, seed in cells]
    outcomes = dict(zip(cells, trials.outcomes(configs, "batches"), strict=True))
    by_seeds: dict[Cell, list[Outcome]] = {}
    for (rule, k, _), outcome in outcomes.items():
        by_seeds.setdefault((rule, k), []).append(outcome)
    rows = [
        {"rule": rule, "log2_factor": k, "seed": seed, "batch_tokens": round(o.batch_tokens, 1), "steps": o.steps}
        | {"loss": o.loss, "last_loss": o.last_loss}
        for (rule, k, seed), o in outcomes.items()
    ]
    write_csv(trials.folder / "losses.csv", rows)
    critical = base.optimizer.horizon_tokens / fit.critical_steps
    draw_panels(trials.folder / "loss.png", _loss_panel(config, by_seeds, critical), columns=1)
    draw_panels(trials.folder / "curves.png", [_curves_panel(config, rule, by_seeds) for rule in config.rules])
    return _text(config, base, is_edge, by_seeds, fit)


def under_rule(base: TrainConfig, rule: Rule, factor: float, seed: int, data: Path) -> TrainConfig:
    """The configuration at `factor` times the batch of the base, with its optimizer rescaled by the rule."""
    horizon = base.optimizer.horizon_tokens
    config = at_batch(base, round(base.batch.tokens * factor), horizon, seed)
    kappa = base.sde.kappa(mean_tokens(config, data), horizon)
    return dataclasses.replace(config, optimizer=RULES[rule](config.optimizer, kappa), sde=SDEScaling())


def _critical_batch(config: BatchInvariance, base: TrainConfig, trials: Trials) -> CriticalBatchFit:
    """S_crit at half the horizon, fitted to the batches of the study."""
    horizon = base.optimizer.horizon_tokens // 2
    batches = [round(base.batch.tokens * 2.0**k) for k in config.log2_factors]
    cells = [(horizon, batch, seed) for batch in batches for seed in range(config.seeds)]
    configs = [at_batch(base, batch, horizon, seed) for horizon, batch, seed in cells]
    outcomes = trials.outcomes(configs, "half the horizon")
    return fit_critical_steps(by_cell(dict(zip(cells, outcomes, strict=True))))


@dataclass(frozen=True)
class Flatness:
    """How much the loss depends on the batch, up to the critical batch."""

    batches: int
    """Number of batches compared."""
    spread: float
    """(highest − lowest) / lowest of the batches' mean losses."""
    half_width: float | None
    """Half the width of the 95 % interval of the spread, from differences within seeds. None: a single seed."""
    allowed: float
    """Largest spread that counts as flat: max(1 %, 2 standard deviations of seeds)."""
    curve_deviation: float
    """Largest relative deviation of a batch's held-out loss curve from the mean curve, in the second half of training;
    curves are means over seeds."""

    @property
    def verdict(self) -> str:
        """Whether the loss is flat, in words; undecided if fewer than two batches are compared."""
        if self.batches < 2:
            return "undecided, too few batches below B_crit"
        return "flat" if self.spread <= self.allowed else "not flat"


def flatness(by_seeds: Mapping[Cell, Sequence[Outcome]], rule: str, critical: float) -> Flatness:
    """Flatness of the loss under a rule over all batches of at most `critical` tokens.

    NaN if there are fewer than two of them, infinite if a run diverged.
    """
    cells = [o for (of_rule, _), o in by_seeds.items() if of_rule == rule and o[0].batch_tokens <= critical]
    if len(cells) < 2:
        return Flatness(len(cells), spread=np.nan, half_width=None, allowed=np.nan, curve_deviation=np.nan)
    losses = np.array([[o.loss for o in outcomes] for outcomes in cells])
    if not np.isfinite(losses).all():
        return Flatness(len(cells), spread=np.inf, half_width=None, allowed=EXCESS, curve_deviation=np.inf)
    means = losses.mean(axis=1)
    within_seeds = np.sqrt(np.mean([standard_deviation(of_cell) ** 2 for of_cell in losses.tolist()]))
    differences = losses[np.argmax(means)] - losses[np.argmin(means)]
    half = half_width_of_mean(differences.tolist())
    curves = np.array([_second_half(outcomes) for outcomes in cells])
    return Flatness(
        batches=len(cells),
        spread=float(np.ptp(means) / means.min()),
        half_width=None if half is None else float(half / means.min()),
        allowed=max(EXCESS, float(2 * within_seeds / means.min())),
        curve_deviation=float(np.abs(curves / curves.mean(axis=0) - 1).max()),
    )


def _second_half(outcomes: Sequence[Outcome]) -> np.ndarray:
    """Held-out loss, the mean over seeds, at ten points of the second half of training."""
    curves = []
    for outcome in outcomes:
        tokens, _, losses = np.array(outcome.curve).T
        curves.append(np.interp(np.linspace(0.55, 1.0, 10) * outcome.steps * outcome.batch_tokens, tokens, losses))
    return np.mean(curves, axis=0)


def _point(outcomes: Sequence[Outcome]) -> tuple[float, float]:
    """Batch in tokens and mean loss over seeds."""
    return outcomes[0].batch_tokens, float(np.mean([outcome.loss for outcome in outcomes]))


def _loss_panel(config: BatchInvariance, by_seeds: Mapping[Cell, Sequence[Outcome]], critical: float) -> list[Panel]:
    curves = {str(rule): [_point(by_seeds[rule, k]) for k in config.log2_factors] for rule in config.rules}
    lowest = min(loss for curve in curves.values() for _, loss in curve)
    return [
        Panel(
            title="loss at the end",
            curves=curves,
            x="batch in tokens",
            y="loss",
            vertical_lines={"B_crit, predicted": critical},
            y_max=1.5 * lowest,
        )
    ]


def _curves_panel(config: BatchInvariance, rule: str, by_seeds: Mapping[Cell, Sequence[Outcome]]) -> Panel:
    curves: dict[str, Curve] = {
        f"batch × {2.0**k:g}": [(tokens, loss) for tokens, _, loss in by_seeds[rule, k][0].curve]
        for k in config.log2_factors
    }
    return Panel(title=rule, curves=curves, x="tokens", y="held-out loss", scales=("linear", "log"), markers=False)


def _text(
    config: BatchInvariance,
    base: TrainConfig,
    is_edge: bool,
    by_seeds: Mapping[Cell, Sequence[Outcome]],
    fit: CriticalBatchFit,
) -> str:
    horizon = base.optimizer.horizon_tokens
    critical = horizon / fit.critical_steps
    parts = [
        f"{by_seeds[config.rules[0], 0][0].num_parameters:,} parameters, {horizon:,} tokens, base batch "
        f"{base.sde.base_batch_tokens:,.0f} tokens, tuned learning rate {base.optimizer.learning_rate:.3g}"
        f"{AT_EDGE if is_edge else ''}, {config.seeds} seeds. {fit.summary} at half the horizon predicts "
        f"B_crit = {critical:,.0f} tokens {fit.batch_interval(horizon)}."
    ]
    header = ["batch in tokens", "steps", *config.rules]
    rows = []
    for k in config.log2_factors:
        one = by_seeds[config.rules[0], k][0]
        cells = [mean_and_interval([o.loss for o in by_seeds[rule, k]]) for rule in config.rules]
        rows.append([f"{one.batch_tokens:,.0f}", f"{one.steps:,}", *cells])
    parts.append(markdown_table(header, rows) + f"\n\n{OVER_SEEDS.format(config.seeds)}")
    for rule in config.rules:
        result = flatness(by_seeds, rule, critical)
        half = "" if result.half_width is None else f" ± {result.half_width:.1%}"
        parts.append(
            f"- {rule}: {result.verdict}; spread {result.spread:.1%}{half} over the {result.batches} batches up to "
            f"B_crit, allowed {result.allowed:.1%}; held-out curves within {result.curve_deviation:.1%} of their mean."
        )
    return "\n\n".join(parts)
