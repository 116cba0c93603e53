"""Does the loss depend on the batch, when the recipe is tuned once and rescaled?

At one horizon, B from an eighth to eight times the tuned batch, under four rules: nothing scaled, learning rate times
κ, learning rate times √κ, and the whole SDE rule. The base's learning rate is tuned first. Up to which batch the rule
is to hold is predicted beforehand, from S_crit at half the horizon (`critical_batch.py`). Flat means that the spread of
mean losses over the batches below it is at most max(1 %, 2 standard deviations of seeds). Since a seed is the same
start and the same examples at every batch, the spread's own error is that of differences within seeds.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np

from trimask.diffusion.optimizer import OptimizerConfig
from trimask.diffusion.pretraining.description import TrainConfig
from trimask.diffusion.sde import SDEScaling, rescaled
from trimask.diffusion.studies.critical_batch import EXCESS, Fit, by_cell, fit
from trimask.diffusion.studies.findings import (
    Curve,
    Panel,
    deviation,
    draw,
    markdown_table,
    mean_and_deviation,
    write_csv,
)
from trimask.diffusion.studies.trials import (
    AT_EDGE,
    Outcome,
    Trials,
    at_batch,
    mean_tokens,
    require_at_least,
    tuned_here,
    tuned_on,
)
from trimask.tokenizers.storage.ranges import Checked, Log2, Size, whole

Rule = Literal["nothing", "linear", "root", "sde"]


@dataclass(frozen=True, kw_only=True)
class BatchInvariance(Checked):
    """Batches, and how the base is tuned."""

    base: TrainConfig
    """Network and recipe; its learning rate is tuned first."""
    log2_learning_rates: tuple[Log2, ...] = (-9.0, -8.5, -8.0, -7.5, -7.0, -6.5, -6.0)
    """Grid on which it is tuned."""
    log2_factors: tuple[Annotated[int, whole(-62, 62)], ...] = (-3, -2, -1, 0, 1, 2, 3)
    """Batches, as powers of two of the base's."""
    rules: tuple[Rule, ...] = ("nothing", "linear", "root", "sde")
    """What becomes of the recipe; see RULES."""
    seeds: Size = 3
    """Seeds of every cell."""

    def __post_init__(self):
        super().__post_init__()
        require_at_least(1, rules=len(self.rules), learning_rates=len(self.log2_learning_rates))
        if 0 not in self.log2_factors:
            raise ValueError(f"log2_factors must hold 0, the tuned batch; got {self.log2_factors}")


RULES: Mapping[Rule, Callable[[OptimizerConfig, float], OptimizerConfig]] = {
    "nothing": lambda optimizer, kappa: optimizer,
    "linear": lambda optimizer, kappa: dataclasses.replace(optimizer, learning_rate=optimizer.learning_rate * kappa),
    "root": lambda optimizer, kappa: dataclasses.replace(optimizer, learning_rate=optimizer.learning_rate * kappa**0.5),
    "sde": rescaled,
}
"""What becomes of the recipe at κ = B / B_base, both in non-padding tokens."""

Cell = tuple[str, int]
"""Rule, and the batch as a power of two of the base's."""


def study(config: BatchInvariance, trials: Trials) -> str:
    """Runs it, writes losses.csv and two figures; returns the text."""
    best, is_edge = tuned_on(config.base, config.log2_learning_rates, 2, trials)
    base = tuned_here(best, trials.data)
    fitted = _critical(config, base, trials)
    cells = [(rule, k, seed) for rule in config.rules for k in config.log2_factors for seed in range(config.seeds)]
    configs = [under_rule(base, rule, 2.0**k, seed, trials.data) for rule, k, seed in cells]
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
    return _text(config, base, is_edge, by_seeds, fitted)


def under_rule(base: TrainConfig, rule: Rule, factor: float, seed: int, data: Path) -> TrainConfig:
    """The recipe, tuned at the base's batch, at `factor` times it."""
    horizon = base.optimizer.horizon_tokens
    config = at_batch(base, round(base.batch.tokens * factor), horizon, seed)
    kappa = base.sde.kappa(mean_tokens(config, data), horizon)
    return dataclasses.replace(config, optimizer=RULES[rule](config.optimizer, kappa), sde=SDEScaling())


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

    batches: int
    """How many batches are compared."""
    spread: float
    """(highest − lowest) / lowest of the mean losses over batches."""
    error: float
    """Standard error of the spread, from differences within seeds."""
    allowed: float
    """max(1 %, 2 standard deviations of seeds)."""
    apart: float
    """Largest deviation of a mean curve of the held-out loss from the others' mean, over the second half."""

    @property
    def verdict(self) -> str:
        """Whether the loss is as the rule promises."""
        if self.batches < 2:
            return "undecided, too few batches below B_crit"
        return "flat" if self.spread <= self.allowed else "not flat"


def flatness(by_seeds: Mapping[Cell, Sequence[Outcome]], rule: str, critical: float) -> Flatness:
    """Over all batches of at most `critical` tokens."""
    cells = [o for (of, _), o in by_seeds.items() if of == rule and o[0].batch_tokens <= critical]
    if len(cells) < 2:
        return Flatness(len(cells), spread=np.nan, error=np.nan, allowed=np.nan, apart=np.nan)
    losses = np.array([[o.loss for o in outcomes] for outcomes in cells])
    if not np.isfinite(losses).all():
        return Flatness(len(cells), spread=np.inf, error=np.inf, allowed=EXCESS, apart=np.inf)
    means = losses.mean(axis=1)
    within = np.sqrt(np.mean([deviation(of_cell) ** 2 for of_cell in losses.tolist()]))
    differences = losses[np.argmax(means)] - losses[np.argmin(means)]
    error = deviation(differences.tolist()) / len(differences) ** 0.5
    curves = np.array([_second_half(outcomes) for outcomes in cells])
    return Flatness(
        batches=len(cells),
        spread=float(np.ptp(means) / means.min()),
        error=float(error / means.min()),
        allowed=max(EXCESS, float(2 * within / means.min())),
        apart=float(np.abs(curves / curves.mean(axis=0) - 1).max()),
    )


def _second_half(outcomes: Sequence[Outcome]) -> np.ndarray:
    """Mean held-out loss at ten points of the second half of the tokens."""
    curves = []
    for outcome in outcomes:
        tokens, _, losses = np.array(outcome.curve).T
        curves.append(np.interp(np.linspace(0.55, 1.0, 10) * outcome.steps * outcome.batch_tokens, tokens, losses))
    return np.mean(curves, axis=0)


def _point(outcomes: Sequence[Outcome]) -> tuple[float, float]:
    """Batch and mean loss."""
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
            lines={"B_crit, predicted": critical},
            highest=1.5 * lowest,
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
    fitted: Fit,
) -> str:
    horizon = base.optimizer.horizon_tokens
    critical = horizon / fitted.critical_steps
    parts = [
        f"{by_seeds[config.rules[0], 0][0].num_parameters:,} parameters, {horizon:,} tokens, base batch "
        f"{base.sde.base_batch_tokens:,.0f} tokens, tuned learning rate {base.optimizer.learning_rate:.3g}"
        f"{AT_EDGE if is_edge else ''}, {config.seeds} seeds. {fitted.described} at half the horizon predicts "
        f"B_crit = {critical:,.0f} tokens ({horizon / fitted.interval[1]:,.0f}–{horizon / fitted.interval[0]:,.0f})."
    ]
    header = ["batch in tokens", "steps", *config.rules]
    rows = []
    for k in config.log2_factors:
        one = by_seeds[config.rules[0], k][0]
        cells = [mean_and_deviation([o.loss for o in by_seeds[rule, k]]) for rule in config.rules]
        rows.append([f"{one.batch_tokens:,.0f}", f"{one.steps:,}", *cells])
    parts.append(markdown_table(header, rows) + "\n\n± is one standard deviation of seeds.")
    for rule in config.rules:
        of = flatness(by_seeds, rule, critical)
        parts.append(
            f"- {rule}: {of.verdict}; spread {of.spread:.1%} ± {of.error:.1%} (standard error) over the {of.batches} "
            f"batches up to B_crit, allowed {of.allowed:.1%}; held-out curves within {of.apart:.1%} of their mean."
        )
    return "\n\n".join(parts)
