"""Pretraining: the step of the masked diffusion objective, and the run around it.

A run folder holds config.json (everything resolved), tokenizers/, checkpoints/, metrics.jsonl and tensorboard/: enough
to resume, and to generate from without the data.
"""

import dataclasses
import importlib.metadata
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh
from jax.tree_util import Partial
from jaxtyping import Array, Float, Int, PRNGKeyArray

from trimask.diffusion import configuration
from trimask.diffusion.checkpoint import Checkpoints
from trimask.diffusion.data.batches import Batches, DatasetUse
from trimask.diffusion.data.prepared import Prepared
from trimask.diffusion.denoiser import Output
from trimask.diffusion.description import RunDescription, TrainConfig, continued, write_description
from trimask.diffusion.loop import fit
from trimask.diffusion.loss import Mean, loss_and_metrics, target_counts
from trimask.diffusion.masking import Noised, forward_process
from trimask.diffusion.mesh import gathered, laid_out, own_rows, place_rows, shardings, used
from trimask.diffusion.optimizer import Knobs, adamw, averaged
from trimask.diffusion.parametrization import parameter_multipliers
from trimask.diffusion.processes import is_first, require_agreement, wait_for_all
from trimask.diffusion.run_folder import checkpoint_steps, locked, writing
from trimask.diffusion.sampling.config import GenerationConfig
from trimask.diffusion.sde import rescaled
from trimask.diffusion.transformer import Transformer
from trimask.diffusion.warm_start import grown, require_grown, require_same_model
from trimask.tokenizers import media as media_tokenizers
from trimask.tokenizers.media import MediaTokenizers
from trimask.tokenizers.sequence import Sequence
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


class Pretraining:
    """The training step of one configuration: what is static beside the state."""

    def __init__(self, config: TrainConfig, vocabulary: Vocabulary, kappa: float = 1.0, mesh: Mesh | None = None):
        """`kappa` is that of the run's batch and horizon, see `sde.py`; `mesh` the devices to train on, if not one."""
        self.config, self.vocabulary, self.mesh = config, vocabulary, mesh
        abstract = nnx.eval_shape(lambda: self._new_model(jax.random.key(0)))
        self.graph, _ = nnx.split(abstract)
        self.optimizer = rescaled(config.optimizer, kappa)
        self.knobs = self.optimizer.knobs(parameter_multipliers(abstract))
        self.key = jax.random.key(config.seed)

    def _new_model(self, key: PRNGKeyArray) -> Transformer:
        return Transformer(self.config.model, self.vocabulary, self.config.parametrization, key=key)

    def init(self, source: "Loaded | None" = None) -> TrainState:
        """The state before the first step, with the weights of a source; no device ever holds more than its part."""

        def start(key: PRNGKeyArray, old: Parameters) -> TrainState:
            parameters = self.new_parameters(key)
            if source is not None:
                parameters = grown(old, parameters, source.vocabulary, self.vocabulary)
            return laid_out(self.start(parameters))

        old = None if source is None else source.parameters
        if self.mesh is None or self.mesh.size == 1:
            return start(self.key, old)
        with used(self.mesh):
            return jax.jit(start)(self.key, old)

    def abstract(self) -> TrainState:
        """Shapes, types and, on a mesh, places of the state, which takes no memory."""
        state = jax.eval_shape(lambda key: self.start(self.new_parameters(key)), self.key)
        if self.mesh is None:
            return state
        places = shardings(state, self.mesh)
        return jax.tree.map(lambda x, place: x.update(sharding=place), state, places)

    def new_parameters(self, key: PRNGKeyArray) -> Parameters:
        """Random ones."""
        return nnx.to_pure_dict(nnx.state(self._new_model(jax.random.fold_in(key, 0))))

    def start(self, parameters: Parameters) -> TrainState:
        """The state before the first step from these parameters."""
        average = jax.tree.map(jnp.copy, parameters)  # not the same buffers: `step` donates both
        step, tokens = jnp.zeros((), jnp.int32), jnp.zeros(2, jnp.int32)
        return TrainState(parameters, average, adamw(self.knobs).init(parameters), step, tokens)

    def model(self, parameters: Parameters) -> Transformer:
        """The network with these parameters."""
        return nnx.merge(self.graph, nnx.State(parameters))

    def denoise(self, parameters: Parameters, sequence: Sequence, positions=None, cache=None) -> Output:
        """The network as a function of its parameters too."""
        return self.model(parameters)(sequence, positions, cache)

    def step(self, state: TrainState, batch: Sequence) -> tuple[TrainState, dict[str, Mean]]:
        """One update; the state given is used up."""
        with used(self.mesh):
            return self.update(self.knobs, self.key, state, batch)

    def compiled(self, state: TrainState, batch: Sequence) -> jax.stages.Compiled:
        """`update` for such a state and batch, or descriptions of them; called with its arguments but for the first."""
        with used(self.mesh):
            return type(self).update.lower(self, self.knobs, self.key, state, batch).compile()

    @partial(jax.jit, static_argnums=0, donate_argnums=3)
    def update(
        self, knobs: Knobs, key: PRNGKeyArray, state: TrainState, batch: Sequence
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
    return Batches(prepared, config.batch, config.seed, copies, config.accumulate, own_rows=own)


def train(
    folder: Path,
    data: Path,
    config: TrainConfig,
    sample: Callable[["Loaded", int], None] | None = None,
    *,
    announce: Callable[[RunDescription, list[DatasetUse]], None] = lambda *_: None,
    init_from: Path | None = None,
    resume: bool = True,
) -> "Loaded":
    """Trains on prepared data, or resumes, until the horizon; `sample(model, step)` is called at intervals.

    `announce` is told before the first step what is trained how, and how often each dataset will be seen.
    With `init_from` a run that is new starts from the weight average of that run; without `resume` a folder that holds
    checkpoints is refused.
    """
    prepared = Prepared(data)
    vocabulary = prepared.tokenizers.vocabulary
    mesh = config.mesh.over(jax.devices())
    batches = training_batches(prepared, config, mesh)
    num_steps = batches.num_steps(config.optimizer.horizon_tokens)
    batch_tokens = batches.mean_tokens(num_steps)
    kappa = config.sde.kappa(batch_tokens, config.optimizer.horizon_tokens)
    use = batches.use(num_steps)
    description = RunDescription(
        train=config,
        vocabulary=vocabulary,
        layouts={dataset.name: prepared.dataset(dataset.name).layout for dataset in use},
        data=str(data.absolute()),
        data_fingerprint=prepared.fingerprint,
        num_steps=num_steps,
        batch_tokens=batch_tokens,
        kappa=kappa,
        optimizer=rescaled(config.optimizer, kappa),
        epochs={dataset.name: dataset.epochs for dataset in use},
        trimask=importlib.metadata.version("trimask"),
        git_commit=_git_commit(),
        init_from=None if init_from is None else str(init_from.absolute()),
    )
    require_agreement(
        {
            "configuration": str(config),
            "data": f"{data}, fingerprint {prepared.fingerprint}",
            "run to start from": str(init_from),
            "checkpoints": f"{', '.join(map(str, checkpoint_steps(folder))) or 'none'} in {folder}",
        }
    )
    with locked(folder):
        description = continued(folder, description, resume)
        pretraining = Pretraining(config, vocabulary, kappa, mesh)
        source = None
        if init_from is not None and not checkpoint_steps(folder):
            source = load(init_from, description.init_step, mesh)
            require_same_model(source.description.train, config, init_from)
            require_grown(init_from / "tokenizers", prepared.folder / "tokenizers")
            description = dataclasses.replace(description, init_step=source.step)
        state = pretraining.init(source)
        wait_for_all("all know what the folder holds")
        if is_first():
            announce(description, use)
            with writing(folder):
                write_description(folder, description, prepared.tokenizers)

        alone = Pretraining(config, vocabulary, kappa)  # to sample with: on one device, whatever the mesh

        def trained(state: TrainState, step: int) -> Loaded:
            return Loaded(folder, description, prepared.tokenizers, alone, gathered(state.average, mesh), step)

        def sample_now(state: TrainState, step: int) -> None:
            loaded = trained(state, step)  # by all processes together
            if sample is not None and is_first():
                sample(loaded, step)

        state = fit(
            pretraining.step,
            state,
            batches,
            num_steps=description.num_steps,
            folder=folder,
            config=config.loop,
            items=batches.num_tokens,
            sample=sample_now if sample else None,
            describe=batches.describe,
            place=partial(place_rows, mesh=mesh, parts=config.accumulate),
        )
        return trained(state, description.num_steps)


@dataclass(frozen=True)
class Loaded:
    """A trained model with all it needs to generate."""

    folder: Path
    description: RunDescription
    tokenizers: MediaTokenizers
    pretraining: Pretraining
    parameters: Parameters
    """The weight average."""
    step: int
    """Training steps taken."""

    @property
    def vocabulary(self) -> Vocabulary:
        """Its id space."""
        return self.description.vocabulary

    def generation(self, modality: str) -> GenerationConfig:
        """How a modality is sampled by default."""
        return self.description.train.generation.get(modality, GenerationConfig())

    @property
    def denoise(self) -> Partial:
        """The denoiser: all that sampling needs to know of the model."""
        return Partial(self.pretraining.denoise, self.parameters)


def load(folder: Path, checkpoint: int | Literal["best"] | None = None, mesh: Mesh | None = None) -> Loaded:
    """Opens a run folder at its newest good checkpoint, at that of a step, or at the best by the run's best_metric.

    Only the weight average is read: on a mesh every device gets its part of it, and all processes must ask.
    """
    description = load_description(folder)
    tokenizers = media_tokenizers.load(folder / "tokenizers")
    require_same_vocabulary(description.vocabulary, tokenizers.vocabulary, folder)
    pretraining = Pretraining(description.train, description.vocabulary, mesh=mesh)
    like = {"average": pretraining.abstract().average}
    with Checkpoints(folder) as checkpoints:
        if checkpoint is None:
            restored = checkpoints.restore_newest(like, set_aside=False, is_part=True)
        else:
            metric = description.train.loop.best_metric
            step = checkpoints.best(metric) if checkpoint == "best" else checkpoint
            restored = checkpoints.restore(step, like, is_part=True)
    if restored is None:
        raise FileNotFoundError(f"{folder}: has no complete checkpoint yet; `trimask train` continues it")
    return Loaded(folder, description, tokenizers, pretraining, restored.tree["average"], restored.step)


def load_description(folder: Path) -> RunDescription:
    """What the config.json of a run folder says."""
    if not (folder / "config.json").is_file() or (folder / "manifest.json").is_file():
        raise FileNotFoundError(f"{folder}: not a run folder; `trimask train` makes one")
    return configuration.load(folder / "config.json", RunDescription)


def require_same_vocabulary(model: Vocabulary, tokenizers: Vocabulary, folder: Path) -> None:
    """Refuses tokenizers that are not those of the model, saying where they differ."""
    changed = configuration.differences(model, tokenizers)
    if changed:
        raise ValueError(
            f"{folder}: the model's vocabulary is not the tokenizers' (model → tokenizers): {'; '.join(changed)}"
        )


def _git_commit() -> str | None:
    """The commit, where trimask runs from a git checkout."""
    checkout = Path(__file__).parents[1]
    if not (checkout / ".git").exists() or shutil.which("git") is None:
        return None
    result = subprocess.run(
        ["git", "-C", str(checkout), "rev-parse", "HEAD"], capture_output=True, text=True, check=False
    )
    return result.stdout.strip() if result.returncode == 0 else None
