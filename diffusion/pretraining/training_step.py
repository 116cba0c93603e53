"""The training step of the masked diffusion objective, and its state."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, PRNGKeyArray

from trimask.diffusion.denoiser import DenoiserOutput
from trimask.diffusion.loss import loss_and_metrics, loss_scale
from trimask.diffusion.masking import Noised, forward_process
from trimask.diffusion.mesh import constrain_parameters, shardings, use_mesh
from trimask.diffusion.optimizer import (
    Hyperparameters,
    OptimizerConfig,
    adamw,
    initial_adam_state,
    update_average,
)
from trimask.diffusion.parametrization import parameter_multipliers, without_multipliers
from trimask.diffusion.pretraining.description import TrainConfig
from trimask.diffusion.pretraining.warm_start import grown_parameters
from trimask.diffusion.run.running_mean import Mean
from trimask.diffusion.transformer import Transformer
from trimask.tokenizers.sequence import TokenRows
from trimask.tokenizers.vocabulary import Vocabulary

_UNIT = 1 << 20
"""Unit of the first of the two numbers in which a state counts tokens."""

Parameters = Any
"""Tree of the network's parameter arrays."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """State of training, which every step changes."""

    parameters: Parameters
    """Parameters of the network."""
    average: Parameters
    """Exponential moving average of the parameters."""
    optimizer: optax.OptState
    """State of the optimizer: AdamW's moments."""
    step: Any
    """Number of steps taken, an int32 scalar (or, like all leaves, its abstract value while saving and restoring)."""
    tokens: Any
    """Number of non-padding tokens trained on: int32 [2], quotient and remainder by 2²⁰ (float32 is exact to 2²⁴)."""

    @property
    def num_tokens(self) -> Float[Array, ""]:
        """Number of non-padding tokens trained on, rounded to float32."""
        return _num_tokens(self.tokens)


def _add_tokens(tokens: Int[Array, "2"], more: Int[Array, ""]) -> Int[Array, "2"]:
    rest = tokens[1] + more
    return jnp.stack([tokens[0] + rest // _UNIT, rest % _UNIT])


def _num_tokens(tokens: Int[Array, "2"]) -> Float[Array, ""]:
    return tokens[0].astype(jnp.float32) * _UNIT + tokens[1]


@dataclass(frozen=True)
class Network:
    """A network as a function of its parameters.

    Two that compute the same are equal, so that they share one compiled program.
    """

    graph: nnx.GraphDef

    def __call__(self, parameters: Parameters, sequence: TokenRows, positions=None, cache=None) -> DenoiserOutput:
        return self.model(parameters)(sequence, positions, cache)

    def model(self, parameters: Parameters) -> Transformer:
        """The network with these parameters."""
        return nnx.merge(self.graph, nnx.State(parameters))


class Pretraining:
    """The training step of one configuration: everything beside the state that stays the same during a run.

    Two are equal, and so share their compiled programs, if they differ at most in what a step takes as arguments: its
    optimizer hyperparameters, the scale of its loss, random key and data.
    """

    def __init__(
        self,
        config: TrainConfig,
        vocabulary: Vocabulary,
        optimizer: OptimizerConfig | None = None,
        mean_targets: Mapping[str, float] | None = None,
        mesh: Mesh | None = None,
    ):
        """`optimizer` is the one rescaled to the run's batch and horizon (`sde.py`); None: that of the configuration.

        `mean_targets` is N_m, the mean number of targets per step by modality; None: this is not for training. `mesh`
        is that of the devices, None for one device.
        """
        self.config, self.vocabulary, self.mesh, self.mean_targets = config, vocabulary, mesh, mean_targets
        abstract = nnx.eval_shape(lambda: self._new_model(jax.random.key(0)))
        self._shapes = nnx.to_pure_dict(nnx.state(abstract))
        self._multipliers = parameter_multipliers(abstract)
        self.optimizer = optimizer or config.optimizer
        self.denoise = Network(nnx.graphdef(without_multipliers(abstract)))
        loss = replace(config.loss, modality_weights={}, normaliser="modality")
        parts = config.model, config.masking, loss, config.accumulate, self.optimizer.schedule_only
        self._program = self.denoise, vocabulary, mesh, repr(parts)
        self._hash = hash(self._program)

    def __eq__(self, other: object) -> bool:
        return self is other or (isinstance(other, Pretraining) and self._program == other._program)

    def __hash__(self) -> int:
        return self._hash

    @cached_property
    def hyperparameters(self) -> Hyperparameters:
        """Hyperparameters of every parameter, computed when the first step needs them: generation does not."""
        return self.optimizer.hyperparameters(self._multipliers)

    @cached_property
    def loss_scale(self) -> Float[Array, " modality"]:
        """λ_m / N_m of every modality. Raises ValueError without mean numbers of targets."""
        if self.mean_targets is None:
            raise ValueError("training needs the mean numbers of targets per step; Batches.mean_targets computes them")
        return loss_scale(self.config.loss, self.mean_targets, self.vocabulary)

    @cached_property
    def key(self) -> PRNGKeyArray:
        """Random key of the run."""
        return jax.random.key(self.config.seed)

    def _new_model(self, key: PRNGKeyArray) -> Transformer:
        return Transformer(self.config.model, self.vocabulary, self.config.parametrization, key=key)

    def init(self, old: Parameters | None = None, vocabulary: Vocabulary | None = None) -> TrainState:
        """State before the first step, with random parameters or with those of an older model, `old`.

        `vocabulary` is that of the older model, None if it is the same. On a mesh no device ever holds more than its
        part of the state.
        """

        def new_state(key: PRNGKeyArray, old: Parameters | None) -> TrainState:
            parameters = self.new_parameters(key)
            if old is not None:
                parameters = grown_parameters(old, parameters, vocabulary or self.vocabulary, self.vocabulary)
            return constrain_parameters(self._initial_state(parameters))

        if self.mesh is None or self.mesh.size == 1:
            device = jax.devices()[0] if self.mesh is None else self.mesh.devices.item()
            # Committed to its device, as a step's result is; else the second step would compile again.
            return jax.device_put(new_state(self.key, old), device)
        with use_mesh(self.mesh):
            return jax.jit(new_state)(self.key, old)

    def abstract(self) -> TrainState:
        """Shapes, types and, on a mesh, shardings of the state, without its arrays."""
        state = jax.eval_shape(self._initial_state, self._shapes)
        if self.mesh is None:
            return state
        return jax.tree.map(lambda x, sharding: x.update(sharding=sharding), state, shardings(state, self.mesh))

    def new_parameters(self, key: PRNGKeyArray) -> Parameters:
        """Randomly initialised parameters."""
        return nnx.to_pure_dict(nnx.state(self._new_model(jax.random.fold_in(key, 0))))

    def _initial_state(self, parameters: Parameters) -> TrainState:
        """State before the first step, with these parameters."""
        average = jax.tree.map(jnp.copy, parameters)  # not the same buffers: `step` donates both
        step, tokens = jnp.zeros((), jnp.int32), jnp.zeros(2, jnp.int32)
        return TrainState(parameters, average, initial_adam_state(parameters), step, tokens)

    def model(self, parameters: Parameters) -> Transformer:
        """The network with these parameters."""
        return self.denoise.model(parameters)

    def step(self, state: TrainState, batch: TokenRows) -> tuple[TrainState, dict[str, Mean]]:
        """One update; the buffers of the given state are donated, so it must not be used again."""
        with use_mesh(self.mesh):
            return self.update(self.hyperparameters, self.loss_scale, self.key, state, batch)

    def compiled(self, state: TrainState, batch: TokenRows) -> jax.stages.Compiled:
        """`update` compiled for such a state and batch, or their abstract values.

        It takes (hyperparameters, loss scale, key, state, batch).
        """
        with use_mesh(self.mesh):
            arguments = self.hyperparameters, self.loss_scale, self.key, state, batch
            return type(self).update.lower(self, *arguments).compile()

    @partial(jax.jit, static_argnums=0, donate_argnums=4)
    def update(
        self,
        hyperparameters: Hyperparameters,
        loss_scale: Float[Array, " modality"],
        key: PRNGKeyArray,
        state: TrainState,
        batch: TokenRows,
    ) -> tuple[TrainState, dict[str, Mean]]:
        """One update: mask, loss, gradients, AdamW, weight average; returns the new state and the step's metrics.

        Hyperparameters, loss scale and key may differ from this configuration's without compiling anew.
        """
        key = jax.random.fold_in(jax.random.fold_in(key, 1), state.step)
        noised = forward_process(key, batch, self.vocabulary, self.config.masking)
        loss, metrics, gradients = self.gradients(state.parameters, noised, loss_scale)
        updates, optimizer = adamw(hyperparameters).update(gradients, state.optimizer, state.parameters)
        step, tokens = state.step + 1, _add_tokens(state.tokens, jnp.sum(~noised.sequence.is_padding))
        rate = self.optimizer.learning_rate_fraction(_num_tokens(tokens))
        parameters = jax.tree.map(lambda p, u: p - rate * u, state.parameters, updates)
        average = update_average(state.average, parameters, hyperparameters.ema_decay, step)
        # Comparable between the steps of datasets with many and with few targets.
        targets = jnp.sum(loss_scale[noised.sequence.modality] * noised.is_target)
        per_target = loss / jnp.maximum(targets, jnp.finfo(jnp.float32).tiny)
        scalars = {
            "loss": loss,
            "loss_per_target": per_target,
            "gradient_norm": optax.tree.norm(gradients),
            "tokens": _num_tokens(tokens),
        }
        scalars["largest_learning_rate"] = jnp.max(hyperparameters.learning_rate) * rate
        metrics |= {name: Mean(value, jnp.ones(())) for name, value in scalars.items()}
        return constrain_parameters(TrainState(parameters, average, optimizer, step, tokens)), metrics

    def loss(
        self, parameters: Parameters, noised: Noised, loss_scale: Float[Array, " modality"]
    ) -> tuple[Float[Array, ""], dict[str, Mean]]:
        """Loss and metrics of a batch or micro-batch; `loss_scale` is λ_m / N_m."""
        model = self.model(parameters)
        hidden = model.logit_multiplier * model(noised.sequence).hidden
        dtype = self.config.model.compute_dtype
        matrix, config = model.output_matrix, self.config.loss
        return loss_and_metrics(hidden, matrix, noised, loss_scale, self.vocabulary, config, dtype)

    def gradients(
        self, parameters: Parameters, noised: Noised, loss_scale: Float[Array, " modality"]
    ) -> tuple[Float[Array, ""], dict[str, Mean], Parameters]:
        """Loss, metrics and gradients of the batch: the sums over micro-batches."""

        def loss_and_gradients(noised):
            (loss, metrics), gradients = jax.value_and_grad(self.loss, has_aux=True)(parameters, noised, loss_scale)
            return loss, metrics, gradients

        if self.config.accumulate == 1:
            return loss_and_gradients(noised)
        # Micro-batch k is rows k, k + parts, …: every device has some of each.
        parts = self.config.accumulate
        micro = jax.tree.map(lambda x: x.reshape(-1, parts, *x.shape[1:]).swapaxes(0, 1), noised)
        zero = jax.tree.map(jnp.zeros_like, jax.eval_shape(loss_and_gradients, jax.tree.map(lambda x: x[0], micro)))

        def add(total, part):
            return jax.tree.map(jnp.add, total, loss_and_gradients(part)), None

        return jax.lax.scan(add, zero, micro)[0]
