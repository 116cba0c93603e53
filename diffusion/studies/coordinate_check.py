"""Do activations, and their updates, keep their size when the network grows?

For each parametrization and shape: the root mean square (RMS) of the residual stream after every block and of the
logits, at the start and of their change after a few steps, on one batch that is not trained on. y ∝ size^a is fitted;
Complete(d)P's exponents are to be within ±0.1 of 0, except for the initial logits, which shrink as width^−½ by design.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from trimask.diffusion.data.batches import Batches
from trimask.diffusion.data.prepared import Prepared
from trimask.diffusion.description import TrainConfig
from trimask.diffusion.masking import forward_process
from trimask.diffusion.studies.findings import Panel, draw, exponent, markdown_table, write_csv
from trimask.diffusion.studies.trials import Trials, at_shape
from trimask.diffusion.train import Pretraining
from trimask.diffusion.transformer import Transformer
from trimask.tokenizers.sequence import Sequence as TokenSequence


@dataclass(frozen=True, kw_only=True)
class CoordinateCheck:
    """Shapes and parametrizations to compare."""

    base: TrainConfig
    """The network and recipe that are scaled; `horizon_tokens` says after how many updates are measured."""
    widths: tuple[int, ...] = (64, 128, 256, 512)
    """At the base's depth."""
    depths: tuple[int, ...] = (2, 4, 8, 16, 32)
    """At the base's width."""
    kinds: tuple[str, ...] = ("completed_p", "completep", "mup", "standard")
    """Parametrizations."""
    seeds: int = 2
    """Initialisations, whose RMS are averaged."""


@dataclass(frozen=True)
class Coordinates:
    """RMS by layer: the embedding, each block, the logits."""

    initial: list[float]
    update: list[float]


def coordinates_of(config: TrainConfig, data: Path) -> Coordinates:
    """Trains for the configuration's horizon, and compares the activations before and after."""
    prepared = Prepared(data)
    batches = Batches(prepared, config.batch, config.seed)
    pretraining = Pretraining(config, prepared.tokenizers.vocabulary)
    steps = batches.num_steps(config.optimizer.horizon_tokens)
    probe = jax.tree.map(jnp.asarray, batches(steps))
    probe = forward_process(jax.random.key(7), probe, pretraining.vocabulary, config.masking).sequence
    look = jax.jit(lambda parameters: activations(pretraining.model(parameters), probe))
    state = pretraining.init()
    before = look(state.parameters)
    for step in range(steps):
        state, _ = pretraining.step(state, jax.tree.map(jnp.asarray, batches(step)))
    after = look(state.parameters)
    return Coordinates([_rms(a) for a in before], [_rms(b - a) for a, b in zip(before, after, strict=True)])


def activations(model: Transformer, sequence: TokenSequence) -> list[Float[Array, "..."]]:
    """The residual stream before the first block and after each, and the logits."""
    h, positions, same_example = model.embed(sequence, None)
    seen = [h]
    for block in model.blocks:
        h, _ = block(h, positions, same_example, None, None)
        seen.append(h)
    return [*seen, model.unembed(model.final_norm(h).astype(jnp.float32))]


def _rms(x: Float[Array, "..."]) -> float:
    return float(jnp.sqrt(jnp.mean(jnp.square(x))))


PLACES = ("embedding", "first block", "middle block", "last block", "logits")
"""What is compared between networks of different depth."""


def at_places(layers: Sequence[float]) -> dict[str, float]:
    """Of the values by layer those at `PLACES`."""
    blocks = len(layers) - 2
    return dict(zip(PLACES, (layers[0], layers[1], layers[(blocks + 1) // 2], layers[-2], layers[-1]), strict=True))


def study(config: CoordinateCheck, trials: Trials) -> str:
    """Runs it, writes rms.csv, exponents.csv and two figures; returns the text."""
    scans = {"width": config.widths, "depth": config.depths}
    cells = [
        (axis, kind, size, seed)
        for axis, sizes in scans.items()
        for size in sizes
        for kind in config.kinds
        for seed in range(config.seeds)
    ]
    configs = []
    for axis, kind, size, seed in cells:
        shape = {"width": size} if axis == "width" else {"layers": size}
        configs.append(dataclasses.replace(at_shape(config.base, kind, **shape), seed=seed))
    measured = dict(zip(cells, trials.measured(configs, coordinates_of, Coordinates, "networks"), strict=True))
    means = _means(config, scans, measured)
    rows = [
        {"axis": axis, "kind": kind, "size": size, "what": what, "place": place, "rms": value}
        for (axis, kind, what, place), by_size in means.items()
        for size, value in by_size.items()
    ]
    write_csv(trials.folder / "rms.csv", rows)
    found = {key: exponent(np.array([*by_size]), np.array([*by_size.values()])) for key, by_size in means.items()}
    exponents = [
        dict(zip(("axis", "kind", "what", "place"), key, strict=True)) | {"exponent": a} for key, a in found.items()
    ]
    write_csv(trials.folder / "exponents.csv", exponents)
    for axis in scans:
        panels = [
            Panel(
                title=f"{place}, {what}",
                curves={kind: list(means[axis, kind, what, place].items()) for kind in config.kinds},
                x=axis,
                y="RMS",
                scales=("log", "log"),
            )
            for what in ("initial", "update")
            for place in PLACES
        ]
        draw(trials.folder / f"{axis}.png", panels, columns=len(PLACES))
    return _text(config, found)


def _means(config: CoordinateCheck, scans: dict[str, tuple[int, ...]], measured: dict[Any, Coordinates]):
    """(axis, kind, what, place) → size → RMS, the mean over seeds."""
    means: dict[tuple[str, str, str, str], dict[int, float]] = {}
    for axis, sizes in scans.items():
        for kind in config.kinds:
            for size in sizes:
                seen = [measured[axis, kind, size, seed] for seed in range(config.seeds)]
                for what in ("initial", "update"):
                    values = np.mean([list(at_places(getattr(one, what)).values()) for one in seen], axis=0)
                    for place, value in zip(PLACES, values, strict=True):
                        means.setdefault((axis, kind, what, place), {})[size] = float(value)
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
            [kind, what, *(f"{found[axis, kind, what, place]:+.2f}" for place in PLACES)]
            for kind in config.kinds
            for what in ("initial", "update")
        ]
        parts.append(markdown_table([f"against {axis}", "RMS of", *PLACES], rows))
    for kind in config.kinds:
        missed = misses(found, kind)
        verdict = "as promised everywhere" if not missed else f"{len(missed)} of 20 off: {'; '.join(missed)}"
        parts.append(f"- {kind}: {verdict}")
    return "\n\n".join(parts)
