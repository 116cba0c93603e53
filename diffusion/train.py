"""Pretraining: the step of the masked diffusion objective, its configuration, and the run around it.

A run folder holds config.json (everything resolved), tokenizers/, checkpoints/, metrics.jsonl and tensorboard/: enough
to resume, and to generate from without the data.
"""

import importlib.metadata
import subprocess
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.tree_util import Partial
from jaxtyping import Array, Float, PRNGKeyArray

from trimask.diffusion import configuration
from trimask.diffusion.checkpoint import Checkpoints
from trimask.diffusion.data.batches import BatchConfig, Batches
from trimask.diffusion.data.prepared import Prepared
from trimask.diffusion.layout import Layout
from trimask.diffusion.loop import LoopConfig, fit
from trimask.diffusion.loss import LossConfig, Mean, loss_and_metrics, target_counts
from trimask.diffusion.masking import MaskingConfig, Noised, forward_process
from trimask.diffusion.optimizer import OptimizerConfig, adamw
from trimask.diffusion.parametrization import parameter_classes, standard
from trimask.diffusion.sampling.requests import GenerationConfig
from trimask.diffusion.transformer import Output, Transformer, TransformerConfig
from trimask.tokenizers import media as media_tokenizers
from trimask.tokenizers.media import MediaTokenizers
from trimask.tokenizers.sequence import Sequence
from trimask.tokenizers.vocabulary import Vocabulary

Parameters = Any
"""A tree of arrays."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """A pretraining run."""

    model: TransformerConfig = TransformerConfig()
    """The network."""
    masking: MaskingConfig = MaskingConfig()
    """The forward process."""
    loss: LossConfig = LossConfig()
    """The objective."""
    optimizer: OptimizerConfig = OptimizerConfig()
    """AdamW, its schedule and the weight average."""
    batch: BatchConfig = BatchConfig()
    """What a step trains on."""
    accumulate: int = 1
    """Micro-batches that a batch's rows are split into, one after another, to save memory."""
    loop: LoopConfig = LoopConfig()
    """How often to log and save."""
    generation: dict[str, GenerationConfig] = field(default_factory=dict)
    """How each modality is sampled, by name, unless asked otherwise."""
    seed: int = 0
    """Fixes the run."""

    def __post_init__(self):
        if self.accumulate < 1:
            raise ValueError(f"accumulate must be at least 1, got {self.accumulate}")


@dataclass(frozen=True, kw_only=True)
class RunDescription:
    """What config.json of a run folder holds."""

    train: TrainConfig
    vocabulary: Vocabulary
    layouts: dict[str, Layout]
    """Dataset → layout of the examples the model was trained on."""
    data: str
    """Where the prepared data was."""
    num_steps: int
    trimask: str
    git_commit: str | None


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
    """Non-padding tokens seen, a float32 scalar."""


class Pretraining:
    """The training step of one configuration: what is static beside the state."""

    def __init__(self, config: TrainConfig, vocabulary: Vocabulary):
        self.config, self.vocabulary = config, vocabulary
        abstract = nnx.eval_shape(lambda: self._new_model(jax.random.key(0)))
        self.graph, _ = nnx.split(abstract)
        self.optimizer = adamw(config.optimizer, parameter_classes(abstract), standard())
        self.key = jax.random.key(config.seed)

    def _new_model(self, key: PRNGKeyArray) -> Transformer:
        return Transformer(self.config.model, self.vocabulary, key=key)

    def init(self) -> TrainState:
        """The state before the first step."""
        model = self._new_model(jax.random.fold_in(self.key, 0))
        parameters = nnx.to_pure_dict(nnx.state(model))
        average = jax.tree.map(jnp.copy, parameters)  # not the same buffers: `step` donates both
        step, tokens = jnp.zeros((), jnp.int32), jnp.zeros((), jnp.float32)
        return TrainState(parameters, average, self.optimizer.init(parameters), step, tokens)

    def model(self, parameters: Parameters) -> Transformer:
        """The network with these parameters."""
        return nnx.merge(self.graph, nnx.State(parameters))

    def denoise(self, parameters: Parameters, sequence: Sequence, positions=None, cache=None) -> Output:
        """The network as a function of its parameters too."""
        return self.model(parameters)(sequence, positions, cache)

    @partial(jax.jit, static_argnums=0, donate_argnums=1)
    def step(self, state: TrainState, batch: Sequence) -> tuple[TrainState, dict[str, Mean]]:
        """One update: mask, loss, gradients, update."""
        config = self.config.optimizer
        key = jax.random.fold_in(jax.random.fold_in(self.key, 1), state.step)
        noised = forward_process(key, batch, self.vocabulary.mask_id, self.config.masking)
        loss, metrics, gradients = self.gradients(state.parameters, noised)
        updates, optimizer = self.optimizer.update(gradients, state.optimizer, state.parameters)
        tokens = state.tokens + jnp.sum(~noised.sequence.is_padding)
        rate, decay = config.learning_rate_at(tokens), config.ema_decay_at(state.step)
        parameters = jax.tree.map(lambda p, u: p - rate * u, state.parameters, updates)
        average = jax.tree.map(lambda a, p: decay * a + (1 - decay) * p, state.average, parameters)
        scalars = {"loss": loss, "gradient_norm": optax.global_norm(gradients), "learning_rate": rate, "tokens": tokens}
        metrics |= {name: Mean(value, jnp.ones(())) for name, value in scalars.items()}
        return TrainState(parameters, average, optimizer, state.step + 1, tokens), metrics

    def gradients(self, parameters: Parameters, noised: Noised) -> tuple[Float[Array, ""], dict[str, Mean], Parameters]:
        """Loss, metrics and gradients of the batch, summed over micro-batches with the whole batch's normalisers."""
        counts = target_counts(noised, self.vocabulary)

        def loss_of(parameters, noised):
            logits = self.denoise(parameters, noised.sequence).logits
            return loss_and_metrics(logits, noised, counts, self.vocabulary, self.config.loss)

        def of(noised):
            (loss, metrics), gradients = jax.value_and_grad(loss_of, has_aux=True)(parameters, noised)
            return loss, metrics, gradients

        if self.config.accumulate == 1:
            return of(noised)
        micro = jax.tree.map(lambda x: x.reshape(self.config.accumulate, -1, *x.shape[1:]), noised)
        zero = jax.tree.map(
            lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(of, jax.tree.map(lambda x: x[0], micro))
        )
        total, _ = jax.lax.scan(lambda total, part: (jax.tree.map(jnp.add, total, of(part)), None), zero, micro)
        return total


def train(
    folder: Path,
    data: Path,
    config: TrainConfig,
    sample: Callable[["Loaded", int], None] | None = None,
) -> "Loaded":
    """Trains on prepared data, or resumes, until the horizon; `sample(model, step)` is called at intervals."""
    prepared = Prepared(data)
    vocabulary = prepared.tokenizers.vocabulary
    batches = Batches(prepared, config.batch, config.seed, copies=2 if config.masking.complementary else 1)
    num_steps = batches.num_steps(config.optimizer.horizon_tokens)
    description = RunDescription(
        train=config,
        vocabulary=vocabulary,
        layouts={name: d.layout for name, d in prepared.manifest.datasets.items()},
        data=str(data.absolute()),
        num_steps=num_steps,
        trimask=importlib.metadata.version("trimask"),
        git_commit=_git_commit(),
    )
    _describe(folder, description, prepared.tokenizers)
    pretraining = Pretraining(config, vocabulary)

    def sample_now(state: TrainState, step: int) -> None:
        if sample is not None:
            sample(Loaded(folder, description, prepared.tokenizers, pretraining, state.average, step), step)

    state = fit(
        pretraining.step,
        pretraining.init(),
        batches,
        num_steps=num_steps,
        folder=folder,
        config=config.loop,
        items_per_batch=lambda batch: int(np.count_nonzero(~batch.is_padding)),
        sample=sample_now,
    )
    return Loaded(folder, description, prepared.tokenizers, pretraining, state.average, num_steps)


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


def load(folder: Path) -> Loaded:
    """Opens a run folder at its newest checkpoint."""
    if not (folder / "config.json").is_file() or (folder / "manifest.json").is_file():
        raise FileNotFoundError(f"{folder}: not a run folder; `trimask train` makes one")
    description = configuration.load(folder / "config.json", RunDescription)
    tokenizers = media_tokenizers.load(folder / "tokenizers")
    require_same_vocabulary(description.vocabulary, tokenizers.vocabulary, folder)
    pretraining = Pretraining(description.train, description.vocabulary)
    if not (folder / "checkpoints").is_dir():
        raise FileNotFoundError(f"{folder}: has no checkpoint yet; `trimask train` continues it")
    with Checkpoints(folder / "checkpoints") as checkpoints:
        newest = checkpoints.latest()
        if newest is None:
            raise FileNotFoundError(f"{folder}: has no complete checkpoint yet; `trimask train` continues it")
        try:
            state = checkpoints.restore(newest, jax.eval_shape(pretraining.init))
        except Exception as error:  # a damaged file can make Orbax's readers raise almost anything
            first_line = str(error).partition("\n")[0]
            shown = first_line if len(first_line) <= 200 else f"{first_line[:199]}…"
            raise ValueError(
                f"{folder / 'checkpoints' / str(newest)}: damaged, or not of the model in config.json: {shown}"
            ) from error
    return Loaded(folder, description, tokenizers, pretraining, state.average, newest)


def require_same_vocabulary(model: Vocabulary, tokenizers: Vocabulary, folder: Path) -> None:
    """Refuses tokenizers that are not those of the model, saying where they differ."""
    changed = configuration.differences(model, tokenizers)
    if changed:
        raise ValueError(
            f"{folder}: the model's vocabulary is not the tokenizers' (model → tokenizers): {'; '.join(changed)}"
        )


def _describe(folder: Path, description: RunDescription, tokenizers: MediaTokenizers) -> None:
    """Writes config.json and tokenizers/; a folder of another configuration is refused."""
    path = folder / "config.json"
    if path.exists():
        old = configuration.load(path, RunDescription)
        changed = configuration.differences(old.train, description.train)
        changed += configuration.differences(old.vocabulary, description.vocabulary, "vocabulary.")
        if old.data != description.data:
            changed.append(f"data: {old.data} → {description.data}")
        if changed:
            raise ValueError(
                f"{folder} holds a run of another configuration; choose another folder. "
                f"There → asked for: {'; '.join(changed)}"
            )
        return
    folder.mkdir(parents=True, exist_ok=True)
    tokenizers.save(folder / "tokenizers")
    configuration.save(path, description)


def _git_commit() -> str | None:
    """The commit, where trimask runs from a git checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    return result.stdout.strip() if result.returncode == 0 else None
