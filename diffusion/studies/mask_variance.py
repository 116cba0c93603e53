"""How much of the gradient's variance do complementary masks, masks by counts and stratified times remove?

The gradient of one example, of n targets, is w·G: G is the sum of the gradients of the cross-entropies of its masked
tokens, and w the weight of the time, or count, at which they are masked. Given the number l of masked tokens all sets
of l are equally likely, whatever the schedule. So the study draws, for `examples` examples and every l = 1 … n, one set
of l tokens and its complement, and their gradients G_l and Ḡ_{n−l}, and everything else follows by one-dimensional
quadrature over the time t, with the number l distributed as Bin(l; n, s(t)):

    E‖w·G‖² = Σ_l a_l E‖G_l‖²,              a_l = ∫ w² Bin(l; n, s) dt
    E⟨w·G, w̄·Ḡ⟩ = Σ_l c_l E⟨G_l, Ḡ_{n−l}⟩,   c_l = ∫ w w̄ Bin(l; n, s) dt
    ‖E[w·G | t]‖² = Σ_{l,m} w² Bin(l; n, s) Bin(m; n, s) ⟨E G_l, E G_m⟩

Variances are per row of a batch: V = E‖w·G‖² − ‖ḡ‖² for one mask per example, with ḡ the mean gradient, and
½(V + V̄) + E⟨w·G, w̄·Ḡ⟩ − ‖ḡ‖² for a mask and its complement, which take two rows. By Cauchy and Schwarz the quotient
is at most 2 for schedules whose complement has the same distribution. If times are stratified over a large batch, the
mean of ‖E[w·G | t]‖² takes the place of ‖ḡ‖². In Adam's metric gradients are divided by √v̂, with v̂ the run's.

Intervals are 95 % by a bootstrap over examples. Deviations from exact values:

1. Inner products of gradients of different examples, of which ⟨E G_l, E G_m⟩ is the mean, are those of sketches: of the
   sums of `_SKETCH` groups of coordinates with random signs, which have the same inner products in expectation.
2. Gradients are those of the conditional mode alone; joint and dropped examples are not masked at these counts.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, PRNGKeyArray

from trimask.diffusion.data.prepared import Prepared
from trimask.diffusion.data.splits import TRAIN
from trimask.diffusion.evaluation.exam import num_given
from trimask.diffusion.evaluation.held_out import evenly_spaced
from trimask.diffusion.mask_counts import binomials, cumulative_counts, random_subsets
from trimask.diffusion.masking import CONDITIONAL, Noised
from trimask.diffusion.pretraining.description import TrainConfig
from trimask.diffusion.pretraining.training_step import Pretraining, TrainState
from trimask.diffusion.schedule import ScheduleConfig, ScheduleKind
from trimask.diffusion.studies.findings import Interval, draw_intervals, markdown_table, write_csv
from trimask.diffusion.studies.trainings import trained_until
from trimask.diffusion.studies.trials import Trials, require_some
from trimask.tokenizers.sequence import Example, TokenRows, assemble
from trimask.tokenizers.storage.ranges import Checked, real, whole

_SKETCH = 1 << 14
"""Number of coordinates of a sketch; networks of no more parameters are not sketched."""
_RESAMPLES = 400
"""Number of resamples of the bootstrap."""
_NODES = 4096
"""Number of times of the quadrature."""
_LEAST_EXAMPLES = 5
"""Smallest number of examples that are resampled; all resamples of two are alike."""
METRICS = ("plain", "Adam")


@dataclass(frozen=True, kw_only=True)
class MaskVariance(Checked):
    """Training and noise schedules for which the study measures the variance of the gradient."""

    base: TrainConfig
    """Training during which the gradients are taken, with the weights of the step."""
    moments: tuple[Annotated[float, real(above=0, most=1)], ...] = (0.1, 1.0)
    """Shares of the training after which they are taken."""
    tasks: tuple[str, ...] = ("text_to_image", "text_to_audio", "image_to_text")
    """Tasks whose targets are masked."""
    schedules: tuple[ScheduleKind, ...] = ("linear", "cosine_md4", "cosine_mdlm", "polynomial")
    """Noise schedules to compare."""
    examples: Annotated[int, whole(_LEAST_EXAMPLES, 1 << 16)] = 50
    """Number of examples of each task, and of random masks for each number of masked tokens."""

    def __post_init__(self):
        super().__post_init__()
        require_some(moments=self.moments, tasks=self.tasks, schedules=self.schedules)


@dataclass(frozen=True, kw_only=True)
class VarianceTrial:
    """One training up to a step, and what is measured there; stored in trials.jsonl."""

    train: TrainConfig
    moment: float
    task: str
    schedules: tuple[str, ...]
    examples: int


@dataclass(frozen=True)
class Variance:
    """Variance of the gradient by one way to mask, beside that of independent masks at independent times."""

    schedule: str
    weighting: str
    """Weights of the loss: elbo or unweighted."""
    metric: str
    """One of `METRICS`."""
    masks: str
    """Way to mask: times or counts, stratified or not, in pairs with complements or not."""
    value: float
    """Variance per row, as a multiple of the squared mean of the gradient."""
    ratio: float
    """Divided by the variance of independent masks at independent times."""
    interval: tuple[float, float]
    """95 % interval of the ratio."""


@dataclass(frozen=True)
class Variances:
    """Result of a `VarianceTrial`; stored in trials.jsonl."""

    step: int
    """Step at which the gradients were taken."""
    targets: int
    """Number of targets of an example, n."""
    variances: list[Variance]


class Masks(NamedTuple):
    """A distribution of masks: at node k, which has a probability, of numbers of masked tokens, and weights."""

    probability: Float[np.ndarray, " nodes"]
    weight: Float[np.ndarray, " nodes"]
    of_complement: Float[np.ndarray, " nodes"]
    """Weight of the complement's masked tokens."""
    counts: Float[np.ndarray, "l nodes"]
    """P(l tokens are masked | node), l = 0 … n."""


class Moments(NamedTuple):
    """Means over examples, or the coefficients of a variance, which is linear in them."""

    squares: Float[np.ndarray, " l"]
    """E‖G_l‖²."""
    pairs: Float[np.ndarray, " l"]
    """E⟨G_l, Ḡ_{n−l}⟩."""
    means: Float[np.ndarray, "l l"]
    """⟨E G_l, E G_m⟩."""

    def times(self, other: "Moments") -> float:
        """Sum of the products of coefficients and means."""
        return float(sum((a * b).sum() for a, b in zip(self, other, strict=True)))


def at_times(schedule: ScheduleConfig, weighting: str, n: int) -> Masks:
    """Masks at uniform times: nodes are times, spread so that the shares are dense where weights are large."""
    first, last = (np.arcsin(share**0.5) for share in (schedule.min_share, 1 - schedule.min_share))
    grid = np.sin(np.linspace(first, last, 2 * _NODES + 1)) ** 2
    edges, shares = grid[::2], grid[1::2]
    times = np.asarray(schedule.time_of(jnp.asarray(edges, jnp.float32)), np.float64)
    probability = np.diff(times) / (times[-1] - times[0])
    ones = np.ones(_NODES)
    if weighting == "elbo":
        slope = np.diff(edges) / probability / (1 - 2 * schedule.min_share)
        return Masks(probability, slope / shares, slope / (1 - shares), binomials(n, shares))
    return Masks(probability, ones, ones, binomials(n, shares))


def by_counts(schedule: ScheduleConfig, weighting: str, n: int, *, pairs: bool) -> Masks:
    """Masks by counts: nodes are the counts. Without pairs the loss is scaled to the mean of that at random times."""
    probability = np.diff(cumulative_counts(schedule, n)[n], prepend=0.0)
    masked, scale = 1.0 - probability[0], np.ones(n + 1)
    if not pairs:
        probability, scale = np.append(0.0, probability[1:] / masked), np.full(n + 1, masked)
    count = np.arange(n + 1)
    if weighting == "elbo":
        with np.errstate(divide="ignore"):
            weight = np.where(count > 0, 1 / (count * probability), 0.0)
            of_complement = np.where(count < n, 1 / ((n - count) * probability), 0.0)
        return Masks(
            probability, np.nan_to_num(weight, posinf=0), np.nan_to_num(of_complement, posinf=0), np.eye(n + 1)
        )
    return Masks(probability, scale, scale, np.eye(n + 1))


def coefficients(masks: Masks, *, stratified: bool, pairs: bool) -> Moments:
    """Coefficients of the gradient's variance per row; see the module's docstring."""
    p, w, other, counts = masks
    squares, products = counts @ (p * w**2), np.zeros(len(counts))
    mean_of_node = w * counts
    if pairs:
        of_complement = other * counts[::-1]
        squares = (squares + counts[::-1] @ (p * other**2)) / 2
        products = counts @ (p * w * other)
        mean_of_node = (mean_of_node + of_complement) / 2
    between = (mean_of_node * p) @ mean_of_node.T if stratified else squared_mean(mean_of_node @ p)
    return Moments(squares, products, -(2.0 if pairs else 1.0) * between)


def squared_mean(of_counts: Float[np.ndarray, " l"]) -> Float[np.ndarray, "l l"]:
    """Coefficients of ‖Σ_l a_l E G_l‖²."""
    return np.outer(of_counts, of_counts)


WAYS = {
    f"{way}{', stratified' if stratified else ''}{', pairs' if pairs else ''}": (way, stratified, pairs)
    for way in ("times", "counts")
    for pairs in (False, True)
    for stratified in (False, True)
}
"""Name of a way to mask → what is drawn, whether it is stratified, and whether masks come with their complements."""


def study(config: MaskVariance, trials: Trials) -> str:
    """Measures all moments and tasks, writes variances.csv and two figures, and returns the report in Markdown."""
    planned = [
        VarianceTrial(train=config.base, moment=moment, task=task, schedules=config.schedules, examples=config.examples)
        for moment in config.moments
        for task in config.tasks
    ]
    measured = trials.measurements(planned, measure_variances, Variances, "gradients")
    rows = [
        {"moment": trial.moment, "task": trial.task, "step": result.step, "targets": result.targets}
        | {name: value for name, value in vars(v).items() if name != "interval"}
        | {"low": v.interval[0], "high": v.interval[1], "schedule": _name(v.schedule)}
        for trial, result in zip(planned, measured, strict=True)
        for v in result.variances
    ]
    write_csv(trials.folder / "variances.csv", rows)
    for weighting in ("elbo", "unweighted"):
        shown = [row for row in rows if row["weighting"] == weighting]
        draw_intervals(
            trials.folder / f"{weighting}.png",
            _panels(shown),
            "variance, relative to independent",
            columns=len(config.tasks),
        )
    parts = [
        f"Variance of the gradient per row, divided by that of independent masks at independent times of the same "
        f"schedule; 95 % intervals by a bootstrap over {config.examples} examples. A ratio of 0.5 is worth a batch "
        "twice as large.",
        "Masks by counts with the ELBO's weights, whose mean gradient is that of every schedule, relative to linear:",
        _table_of_schedules(rows),
    ]
    for metric in METRICS:
        for weighting in ("elbo", "unweighted"):
            shown = [row for row in rows if (row["metric"], row["weighting"]) == (metric, weighting)]
            parts.append(f"## {metric} metric, weights {weighting}\n\n{_table(shown)}")
    return "\n\n".join(parts)


def _panels(rows: Sequence[dict[str, Any]]) -> dict[str, dict[str, dict[str, Interval]]]:
    """Panels of moments, metrics and tasks, with a colour for each schedule and a row for each way to mask."""
    panels: dict[str, dict[str, dict[str, Interval]]] = {}
    for row in rows:
        if row["masks"] != "times":
            title = f"{row['task']} at {row['moment']:.0%}, {row['metric']} metric"
            series = panels.setdefault(title, {}).setdefault(row["schedule"], {})
            series[row["masks"]] = (row["ratio"], row["low"], row["high"])
    return dict(sorted(panels.items(), key=lambda one: one[0].split(" at ")[1]))


def _name(schedule: str) -> str:
    """A kind of schedule, with its power if it has one."""
    return f"{schedule} {ScheduleConfig.power:g}" if schedule == "polynomial" else schedule


def _table_of_schedules(rows: Sequence[dict[str, Any]]) -> str:
    """Variance by counts of every schedule, relative to that of the first; schedules in columns."""
    chosen = [row for row in rows if row["masks"] == "counts" and row["weighting"] == "elbo"]
    names = list(dict.fromkeys(row["schedule"] for row in chosen))
    values: dict[tuple[Any, ...], dict[str, float]] = {}
    for row in chosen:
        values.setdefault((row["task"], f"{row['moment']:.0%}", row["metric"]), {})[row["schedule"]] = row["value"]
    body = [[*key, *(f"{of[name] / of[names[0]]:.2f}" for name in names[1:])] for key, of in values.items()]
    return markdown_table(["task", "at", "metric", *names[1:]], body)


def _table(rows: Sequence[dict[str, Any]]) -> str:
    """Ways to mask in columns, task, moment and schedule in rows."""
    names = [name for name in WAYS if name != "times" and any(row["masks"] == name for row in rows)]
    cells: dict[tuple[Any, ...], dict[str, str]] = {}
    for row in rows:
        key = row["task"], f"{row['moment']:.0%}", row["schedule"]
        cells.setdefault(key, {})[row["masks"]] = f"{row['ratio']:.2f} ({row['low']:.2f}–{row['high']:.2f})"
    body = [[*key, *(ways.get(name, "") for name in names)] for key, ways in cells.items()]
    return markdown_table(["task", "at", "schedule", *names], body)


def measure_variances(trial: VarianceTrial, data: Path) -> Variances:
    """Trains up to the moment, takes the gradients, and computes all variances.

    The name of this function is part of the keys in trials.jsonl, so it must not change.
    """
    pretraining, prepared, state = trained_until(trial.train, data, trial.moment)
    gradients = Gradients(pretraining, state, examples_of(prepared, trial.task, trial.examples))
    draw, found = np.random.default_rng(0), list[Variance]()
    resamples = [np.ones(trial.examples), *(_often(draw, trial.examples) for _ in range(_RESAMPLES))]
    for number, metric in enumerate(METRICS):
        moments = [gradients.moments(number, often) for often in resamples]
        for kind in trial.schedules:
            for weighting in ("elbo", "unweighted"):
                found += variances(moments, ScheduleConfig(kind=kind), weighting, metric)
    return Variances(int(state.step), gradients.n, found)


def variances(moments: Sequence[Moments], schedule: ScheduleConfig, weighting: str, metric: str) -> list[Variance]:
    """Variances of all ways to mask that have this objective; the first moments are of all examples, each once."""
    n = len(moments[0].squares) - 1
    at_random_times = at_times(schedule, weighting, n)
    ways = {name: way for name, way in WAYS.items() if weighting == "elbo" or schedule.power_of_time == 1 or not way[2]}
    of_ways = {}
    for name, (drawn, stratified, pairs) in ways.items():
        masks = at_random_times if drawn == "times" else by_counts(schedule, weighting, n, pairs=pairs)
        parts = coefficients(masks, stratified=stratified, pairs=pairs)
        of_ways[name] = np.array([parts.times(each) for each in moments])
    mean = at_random_times.counts @ (at_random_times.probability * at_random_times.weight)
    squared = float((squared_mean(mean) * moments[0].means).sum())
    found = []
    for name, values in of_ways.items():
        quotients = values / of_ways["times"]
        low, high = np.quantile(quotients[1:], [0.025, 0.975])
        interval = float(low), float(high)
        value, ratio = float(values[0]) / squared, float(quotients[0])
        found.append(Variance(schedule.kind, weighting, metric, name, value, ratio, interval))
    return found


def _often(draw: np.random.Generator, examples: int) -> Float[np.ndarray, " examples"]:
    """How often each example is in a resample, of which at least two are different."""
    while True:
        often = np.bincount(draw.integers(examples, size=examples), minlength=examples).astype(float)
        if (often > 0).sum() > 1:
            return often


def examples_of(prepared: Prepared, task: str, number: int) -> list[Example]:
    """Training examples of the first dataset that has a task, evenly spaced."""
    vocabulary = prepared.tokenizers.vocabulary
    for name, manifest in prepared.manifest.datasets.items():
        if task in [known.name for known in manifest.tasks(vocabulary)]:
            records = prepared.examples(name, TRAIN)
            chosen = vocabulary.tasks[task]
            picked = [records[index] for index in evenly_spaced(len(records), number)]
            return [Example.of_task(chosen, record, num_given(chosen, record)) for record in picked]
    raise ValueError(f"no dataset has the task {task!r}; there are {', '.join(vocabulary.tasks)}")


class Gradients:
    """Gradients of examples at all numbers of masked tokens, of which only norms, products and sketches are kept.

    Arrays have the axes metric, example and l = 1 … n; the sizes of the complements are n − l.
    """

    def __init__(self, pretraining: Pretraining, state: TrainState, examples: Sequence[Example]):
        rows = [assemble(pretraining.vocabulary, [example], example.length) for example in examples]
        sizes = {int(row.is_target.sum()) for row in rows}
        if len(sizes) > 1:
            raise ValueError(f"all examples of a task must have as many targets, got {min(sizes)} to {max(sizes)}")
        (self.n,) = sizes
        scale = jnp.stack([jnp.ones(self.num_parameters(state)), 1 / root_of_second_moment(pretraining, state)])
        signs = jax.random.rademacher(jax.random.key(1), (scale.shape[1],), jnp.float32)
        taken = []
        for number, row in enumerate(rows):
            key = jax.random.fold_in(jax.random.key(0), number)
            taken.append(jax.device_get(_of_example(pretraining, self.n, state.parameters, scale, signs, row, key)))
        squares, products, sketches = (np.stack(part, axis=1) for part in zip(*taken, strict=True))
        n = self.n
        # Sizes 0 … n, each from the masks of that size, and from the complements of that size.
        self.squares = np.zeros((*squares.shape[:2], n + 1))
        self.squares[..., 1:] = squares[..., 0]
        self.squares[..., 1:n] = (self.squares[..., 1:n] + squares[..., n - 2 :: -1, 1]) / 2
        self.products = np.zeros_like(self.squares)
        self.products[..., 1:] = products
        means = np.zeros((*sketches.shape[:2], n + 1, sketches.shape[-1]), np.float32)
        means[..., 1:, :] = sketches[..., 0, :]
        means[..., 1:n, :] = (means[..., 1:n, :] + sketches[..., n - 2 :: -1, 1, :]) / 2
        self._products_of_means = [_products(of_metric) for of_metric in means]

    @staticmethod
    def num_parameters(state: TrainState) -> int:
        """Number of parameters of the network."""
        return sum(leaf.size for leaf in jax.tree.leaves(state.parameters))

    def moments(self, metric: int, often: Float[np.ndarray, " examples"]) -> Moments:
        """Moments in one of the metrics of a resample, in which examples are as often as `often` says."""
        total = often.sum()
        different = np.outer(often, often)
        np.fill_diagonal(different, 0)
        return Moments(
            often @ self.squares[metric] / total,
            often @ self.products[metric] / total,
            np.tensordot(different, self._products_of_means[metric], 2) / different.sum(),
        )


def _products(sketches: Float[np.ndarray, "e l sketch"]) -> Float[np.ndarray, "e f l m"]:
    """Inner products of the sketches of all pairs of examples e and f, and of sizes l and m."""
    flat = sketches.reshape(-1, sketches.shape[-1])
    return (flat @ flat.T).reshape(*sketches.shape[:2], *sketches.shape[:2]).transpose(0, 2, 1, 3).astype(np.float64)


def root_of_second_moment(pretraining: Pretraining, state: TrainState) -> Float[Array, " parameters"]:
    """√v̂ + ε of Adam, of every parameter."""
    hyperparameters, adam = pretraining.hyperparameters, state.optimizer
    roots = []
    for number, v in enumerate(jax.tree.leaves(adam.nu)):
        debiased = v / (1 - hyperparameters.beta2[number] ** adam.count)
        roots.append(jnp.ravel(jnp.sqrt(debiased) + hyperparameters.epsilon[number]))
    return jnp.concatenate(roots)


@partial(jax.jit, static_argnums=(0, 1))
def _of_example(
    pretraining: Pretraining,
    n: int,
    parameters: Any,
    scale: Float[Array, "metric parameters"],
    signs: Float[Array, " parameters"],
    row: TokenRows,
    key: PRNGKeyArray,
) -> tuple[Float[Array, "metric l 2"], Float[Array, "metric l"], Float[Array, "metric l 2 sketch"]]:
    """Squared norms of G_l and Ḡ_{n−l}, their inner products, and their sketches, for l = 1 … n, of n targets."""
    vocabulary = pretraining.vocabulary
    size = min(_SKETCH, signs.size)
    padding = -signs.size % size

    def gradient(is_masked):
        tokens = jnp.where(is_masked, vocabulary.mask_id, row.tokens)
        noised = Noised(row.replace(tokens=tokens), row.tokens, row.is_target, is_masked, weight, mode)
        noised = jax.tree.map(lambda x: x[None], noised)
        ones = jnp.ones(len(vocabulary.modalities))
        return ravel_pytree(jax.grad(lambda p: pretraining.loss(p, noised, ones)[0])(parameters))[0]

    weight, mode = jnp.ones(row.tokens.shape), jnp.full(row.tokens.shape, CONDITIONAL)

    def one(count):
        target, sizes = row.is_target[None], jnp.full((1, row.length), count)
        is_masked = random_subsets(jax.random.fold_in(key, count), target, jnp.zeros_like(sizes), sizes)[0]
        both = jnp.stack([gradient(is_masked), gradient(row.is_target & ~is_masked)])
        scaled = scale[:, None] * both
        sketch = (
            jnp.pad(scaled * signs, ((0, 0), (0, 0), (0, padding))).reshape(*scaled.shape[:2], -1, size).sum(axis=2)
        )
        return (scaled**2).sum(axis=-1), (scaled[:, 0] * scaled[:, 1]).sum(axis=-1), sketch

    found = jax.lax.map(one, jnp.arange(1, n + 1))
    return jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1), found)
