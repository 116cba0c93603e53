"""Do activations, and their updates, keep their size when the network grows?

For each parametrization and shape: the root mean square (RMS) of the residual stream and of the logits, at the start
and of their change after some steps, on one batch that is not trained on. y ∝ size^a is fitted. The exponents of
Complete(d)P are to be within ±0.1 of 0, except for the initial logits, which shrink as width^−½ by design.

Along depth, places are relative: a single block moves the stream by 1/L at most, the middle and the last sum up. With
the residual exponent α = ½ the L random branches add up to the same size at every depth; with α = 1 they vanish at the
start as L^−½, and the stream tends to the embedding. The unembedding starts small (the recipe's init multiplier), since
the change of the logits through its random part shrinks with the width, and would hide what is learned.
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
from trimask.diffusion.pretraining.training_step import Parameters, Pretraining, training_batches
from trimask.diffusion.studies.findings import Panel, draw, exponent, markdown_table, write_csv
from trimask.diffusion.studies.trials import Trials, at_shape, make_room, require_at_least
from trimask.diffusion.transformer import Transformer
from trimask.tokenizers.sequence import TokenRows as TokenSequence
from trimask.tokenizers.storage.ranges import Checked, Size, real


@dataclass(frozen=True, kw_only=True)
class CoordinateCheck(Checked):
    """Shapes and parametrizations to compare."""

    base: TrainConfig
    """The network and recipe that are scaled; `horizon_tokens` says after how many updates are measured."""
    widths: tuple[Size, ...] = (64, 128, 256, 512)
    """At the base's depth."""
    depths: tuple[Size, ...] = (2, 4, 8, 16, 32)
    """At the base's width."""
    kinds: tuple[tuple[ParametrizationKind, Annotated[float, real(0.5, 1)]], ...] = (
        ("completed_p", 0.5), ("completed_p", 1.0), ("completep", 1.0), ("mup", 1.0), ("standard", 1.0)
    )  # fmt: skip
    """Parametrizations, each with its residual exponent α."""
    seeds: Size = 2
    """Initialisations, whose RMS are averaged."""

    def __post_init__(self):
        super().__post_init__()
        require_at_least(1, kinds=len(self.kinds))
        require_at_least(2, widths=len(self.widths), depths=len(self.depths))
        if len(set(_labels(self))) < len(self.kinds):
            raise ValueError(f"two of the kinds are the same: {', '.join(_labels(self))}")


@dataclass(frozen=True)
class Coordinates:
    """RMS by layer: the embedding, each block, the logits."""

    initial: list[float]
    update: list[float]


def coordinates_of(config: TrainConfig, data: Path) -> Coordinates:
    """Trains for the configuration's horizon, and compares the activations before and after."""
    prepared = Prepared(data)
    batches = training_batches(prepared, config)
    steps = batches.num_steps(config.optimizer.horizon_tokens)
    pretraining = Pretraining(config, prepared.tokenizers.vocabulary)
    make_room(pretraining)
    probe = jax.device_put(batches(steps))
    probe = forward_process(jax.random.key(7), probe, pretraining.vocabulary, config.masking).sequence
    state = pretraining.init()
    before = _look(pretraining, state.parameters, probe)
    for step in range(steps):
        state, _ = pretraining.step(state, batches(step))
    after = _look(pretraining, state.parameters, probe)
    return Coordinates([_rms(a) for a in before], [_rms(b - a) for a, b in zip(before, after, strict=True)])


@partial(jax.jit, static_argnums=0)
def _look(pretraining: Pretraining, parameters: Parameters, probe: TokenSequence) -> list[Float[Array, "..."]]:
    return activations(pretraining.model(parameters), probe)


def activations(model: Transformer, sequence: TokenSequence) -> list[Float[Array, "..."]]:
    """The residual stream before the first block and after each, and the logits."""
    h, sin_cos, segments = model.embed(sequence, None)
    seen = [h]
    for block in model.blocks:
        h, _ = block(h, sin_cos, segments, None, None)
        seen.append(h)
    return [*seen, model.unembed(model.final_norm(h).astype(jnp.float32))]


def _rms(x: Float[Array, "..."]) -> float:
    return float(jnp.sqrt(jnp.mean(jnp.square(x))))


PLACES = {
    "width": ("embedding", "first block", "middle block", "last block", "logits"),
    "depth": ("embedding", "middle block", "last block", "logits"),
}
"""What is compared along each axis."""


def at_places(layers: Sequence[float]) -> dict[str, float]:
    """Of the values by layer those at the places that are compared."""
    blocks = len(layers) - 2
    values = (layers[0], layers[1], layers[(blocks + 1) // 2], layers[-2], layers[-1])
    return dict(zip(PLACES["width"], values, strict=True))


def _label(kind: ParametrizationKind, alpha: float) -> str:
    return f"{kind}, α = {alpha:g}" if kind.startswith("complete") else kind


def _labels(config: CoordinateCheck) -> list[str]:
    return [_label(*kind) for kind in config.kinds]


def study(config: CoordinateCheck, trials: Trials) -> str:
    """Runs it, writes rms.csv, exponents.csv and two figures; returns the text."""
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
    measured = dict(zip(cells, trials.measured(configs, coordinates_of, Coordinates, "networks"), strict=True))
    means = _means(config, scans, measured)
    rows = [
        {"axis": axis, "kind": kind, "size": size, "what": what, "place": place, "rms": value}
        for (axis, kind, what, place), by_size in means.items()
        for size, value in by_size.items()
    ]
    write_csv(trials.folder / "rms.csv", rows)
    found = {key: exponent(np.array([*sizes]), np.array([*sizes.values()])) for key, sizes in means.items()}
    exponents = [
        dict(zip(("axis", "kind", "what", "place"), key, strict=True)) | {"exponent": a} for key, a in found.items()
    ]
    write_csv(trials.folder / "exponents.csv", exponents)
    for axis in scans:
        panels = [
            Panel(
                title=f"{place}, {what}",
                curves={label: list(means[axis, label, what, place].items()) for label in _labels(config)},
                x=axis,
                y="RMS",
                scales=("log", "log"),
                coincide=True,
            )
            for what in ("initial", "update")
            for place in PLACES[axis]
        ]
        draw(trials.folder / f"{axis}.png", panels, columns=len(PLACES[axis]))
    return _text(config, found)


def _means(config: CoordinateCheck, scans: dict[str, tuple[int, ...]], measured: dict[Any, Coordinates]):
    """(axis, kind, what, place) → size → RMS, the mean over seeds."""
    means: dict[tuple[str, str, str, str], dict[float, float]] = {}
    for axis, sizes in scans.items():
        for label in _labels(config):
            for size in sizes:
                seen = [measured[axis, label, size, seed] for seed in range(config.seeds)]
                for what in ("initial", "update"):
                    for place in PLACES[axis]:
                        value = np.mean([at_places(getattr(one, what))[place] for one in seen])
                        means.setdefault((axis, label, what, place), {})[float(size)] = float(value)
    return means


def misses(found: dict[tuple[str, str, str, str], float], kind: str) -> list[str]:
    """Where a parametrization's exponents are further than 0.1 from what Complete(d)P promises."""
    missed = []
    for (axis, of, what, place), slope in found.items():
        promised = -0.5 if (axis, what, place) == ("width", "initial", "logits") else 0.0
        if of == kind and abs(slope - promised) > 0.1:
            missed.append(f"{place}, {what}, against {axis}: {slope:+.2f}")
    return missed


def _text(config: CoordinateCheck, found: dict[tuple[str, str, str, str], float]) -> str:
    steps = config.base.optimizer.horizon_tokens // config.base.batch.tokens
    parts = [
        f"Exponents a of RMS ∝ size^a; widths {', '.join(map(str, config.widths))} at depth "
        f"{config.base.model.num_layers}, depths {', '.join(map(str, config.depths))} at width "
        f"{config.base.model.width}; updates after about {steps} steps; mean of {config.seeds} seeds."
    ]
    for axis in ("width", "depth"):
        rows = [
            [label, what, *(f"{found[axis, label, what, place]:+.2f}" for place in PLACES[axis])]
            for label in _labels(config)
            for what in ("initial", "update")
        ]
        parts.append(markdown_table([f"against {axis}", "RMS of", *PLACES[axis]], rows))
    for label in _labels(config):
        missed = misses(found, label)
        verdict = "as promised everywhere" if not missed else f"{len(missed)} of 18 off: {'; '.join(missed)}"
        parts.append(f"- {label}: {verdict}")
    return "\n\n".join(parts)
