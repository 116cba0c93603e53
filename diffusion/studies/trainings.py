"""One training as a trial of a study: its outcome, and how its configuration is varied.

The outcome is the training objective on held-out batches, with masks that are the same for all trials. `trials.py` runs
trainings and remembers their outcomes.
"""

import json
import math
import time
from collections.abc import Hashable
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from trimask.diffusion.data.batches import BatchConfig, Batches
from trimask.diffusion.data.prepared import Prepared
from trimask.diffusion.data.splits import VALIDATION
from trimask.diffusion.loss import loss_scale
from trimask.diffusion.masking import forward_process
from trimask.diffusion.parametrization import ModuleMultipliers, ParametrizationKind
from trimask.diffusion.pretraining.description import TrainConfig
from trimask.diffusion.pretraining.training_batches import training_batches
from trimask.diffusion.pretraining.training_step import Parameters, Pretraining, TrainState
from trimask.diffusion.run.step_loop import LoopConfig
from trimask.diffusion.sde import SDEScaling
from trimask.diffusion.transformer import num_parameters
from trimask.tokenizers.storage import configuration

_CURVE_POINTS = 20
"""Number of points of an outcome's curve."""
_HELD_OUT_BATCHES, _HELD_OUT_TOKENS = 8, 4096
"""Number of held-out batches of a final loss, and positions per held-out batch."""
_CURVE_BATCHES = 2
"""Number of held-out batches of a point of the curve."""
_MAX_PROGRAMS = 8
"""Number of compiled training programs that a process keeps."""


@dataclass(frozen=True)
class Outcome:
    """Result of one training."""

    loss: float
    """Objective on held-out data with the averaged weights; infinite if training diverged."""
    last_loss: float
    """Objective on held-out data with the weights of the last step; infinite if training diverged."""
    curve: list[list[float]]
    """Points [tokens seen, mean training loss since the previous point, held-out loss of the averaged weights]; the
    held-out loss is of fewer batches than `loss`."""
    steps: int
    """Number of training steps."""
    batch_tokens: float
    """Mean number of non-padding tokens per step."""
    num_parameters: int
    seconds: float
    """Duration of training and evaluation, compilation included."""


_opened = lru_cache(maxsize=4)(Prepared)
_compiled: set[Hashable] = set()
"""Programs for which this process has compiled since it last cleared JAX's caches."""


def outcome_of(config: TrainConfig, data: Path) -> Outcome:
    """Trains and evaluates one configuration, without writing anything.

    The name of this function is part of the keys in trials.jsonl, so it must not change.
    """
    start = time.perf_counter()
    prepared = _opened(data)
    pretraining, batches, steps = _training(config, prepared)
    batch_tokens = batches.mean_tokens(steps)
    held_out = HeldOutLoss(pretraining, prepared, config.batch)
    state, curve = _train(pretraining, batches, held_out, steps)
    losses = [math.inf, math.inf]
    if math.isfinite(curve[-1][1]):
        losses = [held_out(tree) for tree in (state.average, state.parameters)]
    return Outcome(
        loss=losses[0] if math.isfinite(losses[0]) else math.inf,
        last_loss=losses[1] if math.isfinite(losses[1]) else math.inf,
        curve=curve,
        steps=steps,
        batch_tokens=batch_tokens,
        num_parameters=num_parameters(state.parameters),
        seconds=time.perf_counter() - start,
    )


def trained_until(config: TrainConfig, data: Path, share: float) -> tuple[Pretraining, Prepared, TrainState]:
    """The state of a training after a share of its steps, at least one."""
    prepared = _opened(data)
    pretraining, batches, steps = _training(config, prepared)
    state = pretraining.init()
    for step in range(max(1, round(share * steps))):
        state, _ = pretraining.step(state, batches(step))
    return pretraining, prepared, state


def _training(config: TrainConfig, prepared: Prepared) -> tuple[Pretraining, Batches, int]:
    """The training step of a configuration, with the SDE rule's optimizer, its batches and its number of steps."""
    batches = training_batches(prepared, config)
    steps = batches.num_steps(config.optimizer.horizon_tokens)
    optimizer = config.sde.rescale(config.optimizer, batches.mean_tokens(steps), config.optimizer.horizon_tokens)
    mean_targets = batches.mean_targets(steps, config.masking.joint_probability)
    pretraining = Pretraining(config, prepared.tokenizers.vocabulary, optimizer, mean_targets)
    make_room_for(pretraining)
    return pretraining, batches, steps


def make_room_for(program: Hashable, most: int = _MAX_PROGRAMS) -> None:
    """Clears JAX's caches if `program` is new and `most` others were compiled since they were cleared.

    Compiled programs take memory maps, and the operating system limits their number per process.
    """
    if program not in _compiled and len(_compiled) >= most:
        _compiled.clear()
        jax.clear_caches()
    _compiled.add(program)


def program_of(config: TrainConfig) -> str:
    """Text that is equal for configurations that share a compiled program: their JSON without traced numbers."""
    normalised = replace(
        config,
        parametrization=replace(config.parametrization, multipliers=ModuleMultipliers()),
        optimizer=config.optimizer.schedule_only,
        batch=replace(BatchConfig(), tokens=config.batch.tokens, packed_length=config.batch.packed_length),
        loop=LoopConfig(),
        sde=SDEScaling(),
        seed=0,
    )
    return json.dumps(configuration.to_dict(normalised))


def _train(
    pretraining: Pretraining, batches: Batches, held_out: "HeldOutLoss", steps: int
) -> tuple[TrainState, list[list[float]]]:
    """Final state and loss curve (`Outcome.curve`); training stops early once the loss is not finite."""
    state = pretraining.init()
    bounds = sorted({round(steps * (number + 1) / _CURVE_POINTS) for number in range(_CURVE_POINTS)} - {0})
    curve: list[list[float]] = []
    step = 0
    for bound in bounds:
        losses = []
        while step < bound:
            state, metrics = pretraining.step(state, batches(step))
            losses.append(metrics["loss"].total)
            step += 1
        training_loss = float(np.mean(jax.device_get(losses)))
        curve.append([float(state.num_tokens), training_loss, held_out(state.average, _CURVE_BATCHES)])
        if not math.isfinite(training_loss):
            break
    return state, curve


def held_out_batches(prepared: Prepared, config: BatchConfig) -> Batches:
    """Batches of the validation split, with the initial mixture weights and a size independent of the training batch.

    Raises ValueError if the split is too small for a batch.
    """
    held_out = replace(config, tokens=_HELD_OUT_TOKENS, final_weights={}, anneal_tokens=None)
    return Batches(prepared, held_out, seed=0, split=VALIDATION)


class HeldOutLoss:
    """Mean objective on the validation split, on batches and masks that are the same for all parameters."""

    def __init__(self, pretraining: Pretraining, prepared: Prepared, config: BatchConfig):
        batches, masking = held_out_batches(prepared, config), pretraining.config.masking
        self.pretraining, copies = pretraining, 2 if masking.complementary else 1
        self.mean_targets = [
            {
                modality: copies * mean
                for modality, mean in batches.mean_targets(number + 1, masking.joint_probability).items()
            }
            for number in range(_HELD_OUT_BATCHES)
        ]
        self.batches = [jax.device_put(batches(number)) for number in range(_HELD_OUT_BATCHES)]

    def __call__(self, parameters: Parameters, num_batches: int = _HELD_OUT_BATCHES) -> float:
        """Mean loss over the first `num_batches` batches."""
        pretraining, batches = self.pretraining, enumerate(self.batches[:num_batches])
        scale = loss_scale(pretraining.config.loss, self.mean_targets[num_batches - 1], pretraining.vocabulary)
        return float(np.mean(jax.device_get([_loss(pretraining, parameters, scale, batch, n) for n, batch in batches])))


@partial(jax.jit, static_argnums=0)
def _loss(pretraining: Pretraining, parameters: Parameters, scale: Any, batch: Any, number: Any) -> Any:
    noised = forward_process(jax.random.key(number), batch, pretraining.vocabulary, pretraining.config.masking)
    return pretraining.loss(parameters, noised, scale)[0]


def at_shape(
    config: TrainConfig, kind: ParametrizationKind, width: int | None = None, layers: int | None = None
) -> TrainConfig:
    """The configuration, tuned at its own shape, transferred to another width and depth by the parametrization `kind`.

    The size of attention heads stays the same. None leaves the width or the number of layers as it is.
    """
    base = config.model
    model = replace(base.at_width(width or base.width), num_layers=layers or base.num_layers)
    parametrization = replace(
        config.parametrization,
        kind=kind,
        base_width=base.width,
        base_layers=base.num_layers,
        base_heads=base.num_heads,
        base_mlp_width=base.size_of_mlp,
    )
    return replace(config, model=model, parametrization=parametrization)


def with_learning_rate(config: TrainConfig, learning_rate: float) -> TrainConfig:
    """The configuration with another peak learning rate."""
    return replace(config, optimizer=replace(config.optimizer, learning_rate=learning_rate))


def as_sde_base(config: TrainConfig, data: Path) -> TrainConfig:
    """The configuration with its own batch and horizon as the base of the SDE rule, as if it were tuned there."""
    sde = replace(
        config.sde, base_batch_tokens=mean_tokens(config, data), base_horizon_tokens=config.optimizer.horizon_tokens
    )
    return replace(config, sde=sde)


def mean_tokens(config: TrainConfig, data: Path) -> float:
    """Mean number of non-padding tokens per training step."""
    batches = training_batches(_opened(data), config)
    return batches.mean_tokens(batches.num_steps(config.optimizer.horizon_tokens))


def at_batch(config: TrainConfig, batch: int, horizon: int, seed: int) -> TrainConfig:
    """The configuration at another batch, in positions, and horizon, in tokens, with `seed` added to its own seed.

    Hyperparameters stay as tuned; training transfers them by the SDE rule.
    """
    return replace(
        config,
        batch=replace(config.batch, tokens=batch),
        optimizer=replace(config.optimizer, horizon_tokens=horizon),
        seed=config.seed + seed,
    )
