"""The training step of the masked diffusion objective, and the state that it changes."""

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, PRNGKeyArray

from trimask.diffusion.cost import StepOnMesh, flops_per_token, parameters
from trimask.diffusion.data.batches import Batches
from trimask.diffusion.data.prepared import Prepared
from trimask.diffusion.denoiser import DenoiserOutput
from trimask.diffusion.loss import loss_and_metrics, target_counts
from trimask.diffusion.masking import Noised, forward_process
from trimask.diffusion.mesh import AXES, laid_out, own_rows, shardings, use_mesh
from trimask.diffusion.optimizer import Knobs, adamw, averaged
from trimask.diffusion.parametrization import parameter_multipliers, without_multipliers
from trimask.diffusion.pretraining.description import TrainConfig
from trimask.diffusion.pretraining.warm_start import grown
from trimask.diffusion.run.limits import require_room_for_workers
from trimask.diffusion.run.running_mean import Mean
from trimask.diffusion.sde import rescaled
from trimask.diffusion.transformer import Transformer
from trimask.tokenizers.sequence import TokenRows
from trimask.tokenizers.vocabulary import Vocabulary

_MANY = 1 << 20

Parameters = Any
"""A tree of arrays."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """Everything a step changes."""

    parameters: Parameters
    average: Parameters
    """Exponential moving average of the parameters."""
    optimizer: optax.OptState
    step: Any
    """Steps taken, an int32 scalar (or, like all leaves, its description while saving and restoring)."""
    tokens: Any
    """Non-padding tokens seen: int32 [2], how often 2²⁰ and what is left. A float32 would miss some after 2²⁴."""

    @property
    def num_tokens(self) -> Float[Array, ""]:
        """Non-padding tokens seen, rounded to a float32."""
        return _rounded(self.tokens)


def _counted(tokens: Int[Array, "2"], more: Int[Array, ""]) -> Int[Array, "2"]:
    rest = tokens[1] + more
    return jnp.stack([tokens[0] + rest // _MANY, rest % _MANY])


def _rounded(tokens: Int[Array, "2"]) -> Float[Array, ""]:
    return tokens[0].astype(jnp.float32) * _MANY + tokens[1]


@dataclass(frozen=True)
class Network:
    """A network as a function of its parameters; equal to another, so that both are compiled once, if it computes the
    same."""

    graph: nnx.GraphDef

    def __call__(self, parameters: Parameters, sequence: TokenRows, positions=None, cache=None) -> DenoiserOutput:
        return self.model(parameters)(sequence, positions, cache)

    def model(self, parameters: Parameters) -> Transformer:
        """The network with these parameters."""
        return nnx.merge(self.graph, nnx.State(parameters))


class Pretraining:
    """The training step of one configuration: what is static beside the state.

    Two are equal if they compile the same: if they differ at most in what a step is given, its knobs, key and data.
    """

    def __init__(self, config: TrainConfig, vocabulary: Vocabulary, kappa: float = 1.0, mesh: Mesh | None = None):
        """`kappa` is that of the run's batch and horizon, see `sde.py`; `mesh` the devices to train on, if not one."""
        self.config, self.vocabulary, self.mesh = config, vocabulary, mesh
        abstract = nnx.eval_shape(lambda: self._new_model(jax.random.key(0)))
        self.optimizer = rescaled(config.optimizer, kappa)
        self.knobs = self.optimizer.knobs(parameter_multipliers(abstract))
        self.key = jax.random.key(config.seed)
        self.denoise = Network(nnx.graphdef(without_multipliers(abstract)))
        parts = config.model, config.masking, config.loss, config.accumulate, self.optimizer.schedule_alone
        self._program = self.denoise, vocabulary, mesh, repr(parts)
        self._hash = hash(self._program)

    def __eq__(self, other: object) -> bool:
        return self is other or (isinstance(other, Pretraining) and self._program == other._program)

    def __hash__(self) -> int:
        return self._hash

    def _new_model(self, key: PRNGKeyArray) -> Transformer:
        return Transformer(self.config.model, self.vocabulary, self.config.parametrization, key=key)

    def init(self, old: Parameters | None = None, vocabulary: Vocabulary | None = None) -> TrainState:
        """The state before the first step, from random weights, or from old ones of a model with that vocabulary.

        On a mesh no device ever holds more than its part.
        """

        def new_state(key: PRNGKeyArray, old: Parameters | None) -> TrainState:
            parameters = self.new_parameters(key)
            if old is not None:
                parameters = grown(old, parameters, vocabulary or self.vocabulary, self.vocabulary)
            return laid_out(self.state_of(parameters))

        if self.mesh is None or self.mesh.size == 1:
            device = jax.devices()[0] if self.mesh is None else self.mesh.devices.item()
            # Bound to its device, as a step's result is: or the second step would be compiled again.
            return jax.device_put(new_state(self.key, old), device)
        with use_mesh(self.mesh):
            return jax.jit(new_state)(self.key, old)

    def abstract(self) -> TrainState:
        """Shapes, types and, on a mesh, places of the state, which takes no memory."""
        state = jax.eval_shape(lambda key: self.state_of(self.new_parameters(key)), self.key)
        if self.mesh is None:
            return state
        places = shardings(state, self.mesh)
        return jax.tree.map(lambda x, place: x.update(sharding=place), state, places)

    def new_parameters(self, key: PRNGKeyArray) -> Parameters:
        """Random ones."""
        return nnx.to_pure_dict(nnx.state(self._new_model(jax.random.fold_in(key, 0))))

    def state_of(self, parameters: Parameters) -> TrainState:
        """The state before the first step from these parameters."""
        average = jax.tree.map(jnp.copy, parameters)  # not the same buffers: `step` donates both
        step, tokens = jnp.zeros((), jnp.int32), jnp.zeros(2, jnp.int32)
        return TrainState(parameters, average, adamw(self.knobs).init(parameters), step, tokens)

    def model(self, parameters: Parameters) -> Transformer:
        """The network with these parameters."""
        return self.denoise.model(parameters)

    def step(self, state: TrainState, batch: TokenRows) -> tuple[TrainState, dict[str, Mean]]:
        """One update; the state given is used up."""
        with use_mesh(self.mesh):
            return self.update(self.knobs, self.key, state, batch)

    def compiled(self, state: TrainState, batch: TokenRows) -> jax.stages.Compiled:
        """`update` for such a state and batch, or descriptions of them; call it with (knobs, key, state, batch)."""
        with use_mesh(self.mesh):
            return type(self).update.lower(self, self.knobs, self.key, state, batch).compile()

    @partial(jax.jit, static_argnums=0, donate_argnums=3)
    def update(
        self, knobs: Knobs, key: PRNGKeyArray, state: TrainState, batch: TokenRows
    ) -> tuple[TrainState, dict[str, Mean]]:
        """Mask, loss, gradients, update. Other knobs, or another key, than this configuration's recompile nothing."""
        key = jax.random.fold_in(jax.random.fold_in(key, 1), state.step)
        noised = forward_process(key, batch, self.vocabulary, self.config.masking)
        loss, metrics, gradients = self.gradients(state.parameters, noised)
        updates, optimizer = adamw(knobs).update(gradients, state.optimizer, state.parameters)
        step, tokens = state.step + 1, _counted(state.tokens, jnp.sum(~noised.sequence.is_padding))
        rate = self.optimizer.rate_at(_rounded(tokens))
        parameters = jax.tree.map(lambda p, u: p - rate * u, state.parameters, updates)
        average = averaged(state.average, parameters, knobs.ema_decay, step)
        scalars = {"loss": loss, "gradient_norm": optax.tree.norm(gradients), "tokens": _rounded(tokens)}
        scalars["largest_learning_rate"] = jnp.max(knobs.learning_rate) * rate
        metrics |= {name: Mean(value, jnp.ones(())) for name, value in scalars.items()}
        return laid_out(TrainState(parameters, average, optimizer, step, tokens)), metrics

    def loss(
        self, parameters: Parameters, noised: Noised, counts: Float[Array, " modality"]
    ) -> tuple[Float[Array, ""], dict[str, Mean]]:
        """Loss and metrics of a (micro-)batch, with the normalisers of the whole batch."""
        model = self.model(parameters)
        hidden = model.logit_multiplier * model(noised.sequence).hidden
        dtype = self.config.model.compute_dtype
        return loss_and_metrics(hidden, model.output_matrix, noised, counts, self.vocabulary, self.config.loss, dtype)

    def gradients(self, parameters: Parameters, noised: Noised) -> tuple[Float[Array, ""], dict[str, Mean], Parameters]:
        """Loss, metrics and gradients of the batch, summed over micro-batches with the whole batch's normalisers."""
        counts = target_counts(noised, self.vocabulary)

        def of(noised):
            (loss, metrics), gradients = jax.value_and_grad(self.loss, has_aux=True)(parameters, noised, counts)
            return loss, metrics, gradients

        if self.config.accumulate == 1:
            return of(noised)
        # Micro-batch k is rows k, k + parts, …: every device has some of each.
        parts = self.config.accumulate
        micro = jax.tree.map(lambda x: x.reshape(-1, parts, *x.shape[1:]).swapaxes(0, 1), noised)
        zero = jax.tree.map(jnp.zeros_like, jax.eval_shape(of, jax.tree.map(lambda x: x[0], micro)))
        total, _ = jax.lax.scan(lambda total, part: (jax.tree.map(jnp.add, total, of(part)), None), zero, micro)
        return total


def training_batches(prepared: Prepared, config: TrainConfig, mesh: Mesh | None = None) -> Batches:
    """What a configuration is trained on; of each batch all rows, or those that this process takes on the mesh."""
    copies = 2 if config.masking.complementary else 1
    own = None if mesh is None else partial(own_rows, mesh=mesh, parts=config.accumulate)
    limits = config.loop.limits
    batches = Batches(prepared, config.batch, config.seed, copies, config.accumulate, local_rows=own, limits=limits)
    _require_room(batches, config, prepared.tokenizers.vocabulary, copies, mesh)
    return batches


def _require_room(
    batches: Batches, config: TrainConfig, vocabulary: Vocabulary, copies: int, mesh: Mesh | None
) -> None:
    """Refuses a training that does not fit the devices, or the time, by the estimates of `cost.py`."""
    devices = jax.local_devices()[:1] if mesh is None else mesh.local_devices
    data, fsdp, tensor = (1, 1, 1) if mesh is None else (mesh.shape[axis] for axis in AXES)
    model, horizon, limits = config.model, config.optimizer.horizon_tokens, config.loop.limits
    for dataset in batches.datasets:
        step = StepOnMesh(
            model,
            vocabulary,
            data,
            fsdp,
            tensor,
            dataset.row_length,
            config.accumulate,
            devices[0].platform,
            config.loss,
        )
        rows = -(-copies * dataset.num_rows // (data * fsdp * config.accumulate))
        what = (
            f"a step of {parameters(model, vocabulary).total:,} parameters on {rows:,} rows of {dataset.name}, of "
            f"{dataset.row_length:,} tokens each,"
        )
        limits.require_memory(step.estimate(rows).total, what, devices)
    shortest = min(dataset.row_length for dataset in batches.datasets)
    flops = horizon * flops_per_token(model, vocabulary, shortest)
    everyone = devices if mesh is None else list(mesh.devices.flat)
    require_room_for_workers(config.loop.workers, "loop.workers")
    limits.require_time(flops, f"training on {horizon:,} tokens", everyone)
