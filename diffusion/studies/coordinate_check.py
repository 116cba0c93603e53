"""Do activations, and their updates, keep their size when the network grows?

For each parametrization and shape, the study measures the root mean square (RMS) of the residual stream and of the
logits at initialisation, and that of their change after some training steps, on one batch that is not trained on. It
fits y ∝ size^a. Complete(d)P predicts exponents a of 0 (within ±0.1), except for the initial logits, which shrink as
width^−½ by design.

Shapes of different depth are compared at equal relative depth: a single block changes the stream by at most 1/L, and
the middle and the last block hold the sum of the changes before them. With the residual exponent α = ½ the L random
branches add up to the same size at every depth; with α = 1 they vanish at initialisation as L^−½, and the stream tends
to the embedding. The unembedding starts small (the recipe's init multiplier), since the change of the logits through
its random part shrinks with the width, and would hide what is learned.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from trimask.diffusion.data.prepared import Prepared
from trimask.diffusion.masking import forward_process
from trimask.diffusion.parametrization import ParametrizationKind
from trimask.diffusion.pretraining.description import TrainConfig
from trimask.diffusion.pretraining.training_batches import training_batches
from trimask.diffusion.pretraining.training_step import Parameters, Pretraining
from trimask.diffusion.studies.findings import Panel, draw_panels, markdown_table, power_law_exponent, write_csv
from trimask.diffusion.studies.trainings import at_shape, make_room_for
from trimask.diffusion.studies.trials import Trials, require_at_least
from trimask.diffusion.transformer import Transformer
from trimask.tokenizers.sequence import TokenRows as TokenSequence
from trimask.tokenizers.storage.ranges import Checked, Size, real


@dataclass(frozen=True, kw_only=True)
class CoordinateCheck(Checked):
    """Shapes and parametrizations that the coordinate check compares."""

    base: TrainConfig
    """Training configuration that is scaled to every shape; activations are measured after its horizon_tokens."""
    widths: tuple[Size, ...] = (64, 128, 256, 512)
    """Widths to compare, at the number of layers of `base`."""
    depths: tuple[Size, ...] = (2, 4, 8, 16, 32)
    """Numbers of layers to compare, at the width of `base`."""
    kinds: tuple[tuple[ParametrizationKind, Annotated[float, real(0.5, 1)]], ...] = (
        ("completed_p", 0.5), ("completed_p", 1.0), ("completep", 1.0), ("mup", 1.0), ("standard", 1.0)
    )  # fmt: skip
    """Parametrizations to compare, each with its residual exponent α in [0.5, 1]."""
    seeds: Size = 2
    """Number of initialisations of every network, over which the RMS is averaged."""

    def __post_init__(self):
        super().__post_init__()
        require_at_least(1, kinds=len(self.kinds))
        require_at_least(2, widths=len(self.widths), depths=len(self.depths))
        if len(set(_labels(self))) < len(self.kinds):
            raise ValueError(f"kinds must differ from each other, got {', '.join(_labels(self))}")


@dataclass(frozen=True)
class Coordinates:
    """Root mean squares of one network by layer: after the embedding, after each block, of the logits."""

    initial: list[float]
    """RMS of the activations at initialisation."""
    update: list[float]
    """RMS of their change after training."""


def coordinates_of(config: TrainConfig, data: Path) -> Coordinates:
    """Trains for the configuration's horizon and measures the activations before and after.

    The name of this function is part of the keys in trials.jsonl, so it must not change.
    """
    prepared = Prepared(data)
    batches = training_batches(prepared, config)
    steps = batches.num_steps(config.optimizer.horizon_tokens)
    mean_targets = batches.mean_targets(steps, config.masking.joint_probability)
    pretraining = Pretraining(config, prepared.tokenizers.vocabulary, mean_targets=mean_targets)
    make_room_for(pretraining)
    probe = jax.device_put(batches(steps))
    probe = forward_process(jax.random.key(7), probe, pretraining.vocabulary, config.masking).sequence
    state = pretraining.init()
    before = _activations(pretraining, state.parameters, probe)
    for step in range(steps):
        state, _ = pretraining.step(state, batches(step))
    after = _activations(pretraining, state.parameters, probe)
    return Coordinates([_rms(a) for a in before], [_rms(b - a) for a, b in zip(before, after, strict=True)])


@partial(jax.jit, static_argnums=0)
def _activations(pretraining: Pretraining, parameters: Parameters, probe: TokenSequence) -> list[Float[Array, "..."]]:
    return activations(pretraining.model(parameters), probe)


def activations(model: Transformer, sequence: TokenSequence) -> list[Float[Array, "..."]]:
    """The residual stream (batch, seq, width) after the embedding and after each block, and the logits."""
    h, sin_cos, segments = model.embed(sequence, None)
    stream = [h]
    for block in model.blocks:
        h, _ = block(h, sin_cos, segments, None, None)
        stream.append(h)
    return [*stream, model.unembed(model.final_norm(h).astype(jnp.float32))]


def _rms(x: Float[Array, "..."]) -> float:
    return float(jnp.sqrt(jnp.mean(jnp.square(x))))


COMPARED_LAYERS = {
    "width": ("embedding", "first block", "middle block", "last block", "logits"),
    "depth": ("embedding", "middle block", "last block", "logits"),
}
"""Axis → layers that are compared along it. Without the first block along depth, whose relative depth changes."""

Quantity = tuple[str, str, str, str]
"""Axis (width or depth), parametrization, "initial" or "update", and layer: identifies an RMS or an exponent."""


def by_layer_name(layers: Sequence[float]) -> dict[str, float]:
    """Name of each compared layer → its value, of the values of all layers."""
    blocks = len(layers) - 2
    values = (layers[0], layers[1], layers[(blocks + 1) // 2], layers[-2], layers[-1])
    return dict(zip(COMPARED_LAYERS["width"], values, strict=True))


def _label(kind: ParametrizationKind, alpha: float) -> str:
    return f"{kind}, α = {alpha:g}" if kind.startswith("complete") else kind


def _labels(config: CoordinateCheck) -> list[str]:
    return [_label(*kind) for kind in config.kinds]


def study(config: CoordinateCheck, trials: Trials) -> str:
    """Runs the coordinate check, writes rms.csv, exponents.csv and two figures, and returns the report in Markdown."""
    scans = {"width": config.widths, "depth": config.depths}
    cells, configs = [], []
    for axis, sizes in scans.items():
        for size in sizes:
            for kind, alpha in config.kinds:
                parametrization = dataclasses.replace(config.base.parametrization, alpha=alpha)
                base = dataclasses.replace(config.base, parametrization=parametrization)
                shape = {"width": size} if axis == "width" else {"layers": size}
                for seed in range(config.seeds):
                    cells.append((axis, _label(kind, alpha), size, seed))
                    configs.append(dataclasses.replace(at_shape(base, kind, **shape), seed=base.seed + seed))
    measured = dict(zip(cells, trials.measurements(configs, coordinates_of, Coordinates, "networks"), strict=True))
    means = _means(config, scans, measured)
    rows = [
        {"axis": axis, "kind": kind, "size": size, "what": what, "place": layer, "rms": value}
        for (axis, kind, what, layer), by_size in means.items()
        for size, value in by_size.items()
    ]
    write_csv(trials.folder / "rms.csv", rows)
    exponents = {
        quantity: power_law_exponent(np.array([*by_size]), np.array([*by_size.values()]))
        for quantity, by_size in means.items()
    }
    rows = [
        dict(zip(("axis", "kind", "what", "place"), quantity, strict=True)) | {"exponent": exponent}
        for quantity, exponent in exponents.items()
    ]
    write_csv(trials.folder / "exponents.csv", rows)
    for axis in scans:
        draw_panels(trials.folder / f"{axis}.png", _panels(config, axis, means), columns=len(COMPARED_LAYERS[axis]))
    return _text(config, exponents)


def _panels(config: CoordinateCheck, axis: str, means: dict[Quantity, dict[float, float]]) -> list[Panel]:
    """RMS against size: a row of panels at initialisation and a row of the update, with a panel for each layer."""
    return [
        Panel(
            title=f"{layer}, {what}",
            curves={label: list(means[axis, label, what, layer].items()) for label in _labels(config)},
            x=axis,
            y="RMS",
            scales=("log", "log"),
            coincide=True,
        )
        for what in ("initial", "update")
        for layer in COMPARED_LAYERS[axis]
    ]


def _means(
    config: CoordinateCheck, scans: dict[str, tuple[int, ...]], measured: dict[Any, Coordinates]
) -> dict[Quantity, dict[float, float]]:
    """Quantity → size → RMS, the mean over seeds."""
    means: dict[Quantity, dict[float, float]] = {}
    for axis, sizes in scans.items():
        for label in _labels(config):
            for size in sizes:
                of_seeds = [measured[axis, label, size, seed] for seed in range(config.seeds)]
                for what in ("initial", "update"):
                    for layer in COMPARED_LAYERS[axis]:
                        value = np.mean([by_layer_name(getattr(one, what))[layer] for one in of_seeds])
                        means.setdefault((axis, label, what, layer), {})[float(size)] = float(value)
    return means


def unexpected_exponents(exponents: dict[Quantity, float], label: str) -> list[str]:
    """Exponents of a parametrization, by its label, that differ by more than 0.1 from the prediction of Complete(d)P.

    Each is described in words. The prediction is −½ for the initial logits against width, and else 0.
    """
    unexpected = []
    for (axis, kind, what, layer), exponent in exponents.items():
        predicted = -0.5 if (axis, what, layer) == ("width", "initial", "logits") else 0.0
        if kind == label and abs(exponent - predicted) > 0.1:
            unexpected.append(f"{layer}, {what}, against {axis}: {exponent:+.2f}")
    return unexpected


def _text(config: CoordinateCheck, exponents: dict[Quantity, float]) -> str:
    steps = config.base.optimizer.horizon_tokens // config.base.batch.tokens
    parts = [
        f"Exponents a of RMS ∝ size^a; widths {', '.join(map(str, config.widths))} at depth "
        f"{config.base.model.num_layers}, depths {', '.join(map(str, config.depths))} at width "
        f"{config.base.model.width}; updates after about {steps} steps; mean of {config.seeds} seeds."
    ]
    for axis in ("width", "depth"):
        rows = [
            [label, what, *(f"{exponents[axis, label, what, layer]:+.2f}" for layer in COMPARED_LAYERS[axis])]
            for label in _labels(config)
            for what in ("initial", "update")
        ]
        parts.append(markdown_table([f"against {axis}", "RMS of", *COMPARED_LAYERS[axis]], rows))
    for label in _labels(config):
        unexpected = unexpected_exponents(exponents, label)
        verdict = f"{len(unexpected)} of 18 exponents off by more than 0.1: {'; '.join(unexpected)}"
        parts.append(f"- {label}: {verdict if unexpected else 'all exponents within 0.1 of the prediction'}")
    return "\n\n".join(parts)
