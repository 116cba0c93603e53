"""Loading a trained model from its run folder, with all it needs to generate."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import jax
from jax.sharding import Mesh
from jax.tree_util import Partial

from trimask.diffusion.cost import evaluation_bytes
from trimask.diffusion.pretraining.description import RunDescription, load_description
from trimask.diffusion.pretraining.training_step import Parameters, Pretraining
from trimask.diffusion.run.checkpoint import Checkpoints
from trimask.diffusion.run.limits import WorkLimits
from trimask.diffusion.sampling.generation_config import GenerationConfig
from trimask.diffusion.sampling.generator import Generator
from trimask.diffusion.transformer import num_parameters
from trimask.tokenizers import media as media_tokenizers
from trimask.tokenizers.media import MediaTokenizers
from trimask.tokenizers.storage import configuration
from trimask.tokenizers.vocabulary import TEXT, Vocabulary


@dataclass(frozen=True)
class LoadedRun:
    """A trained model, with its tokenizers and the description of its run."""

    folder: Path
    description: RunDescription
    tokenizers: MediaTokenizers
    pretraining: Pretraining
    parameters: Parameters
    """Exponential moving average of the weights."""
    step: int
    """Number of training steps taken."""

    @property
    def vocabulary(self) -> Vocabulary:
        """Vocabulary that the model was trained with."""
        return self.description.vocabulary

    def generation(self, modality: str) -> GenerationConfig:
        """Default sampling settings for generating a modality."""
        return self.description.train.generation.get(modality, GenerationConfig())

    def require_trained_guidance(self, task: str, config: GenerationConfig) -> None:
        """Raises ValueError if the configuration is guided although training never hid the conditions of the task."""
        is_hidden = self.description.train.masking.drop_probability > 0 and (task != TEXT or self.description.rules > 1)
        if config.guidance and not is_hidden:
            why = "its masking.drop_probability is 0" if task != TEXT else "it never hid the beginning of a text"
            raise ValueError(
                f"guidance needs a model that was trained without conditions, too, and {self.folder} was not for the "
                f"task {task}: {why}; got guidance {config.guidance}, for this model it must be 0"
            )

    def require_room(self, limits: WorkLimits, rows: int, length: int) -> None:
        """Raises ValueError if evaluating `rows` rows of `length` tokens does not fit the memory of one device."""
        what = f"evaluating the model on {rows:,} rows of {length:,} tokens"
        needed = evaluation_bytes(self.description.train.model, self.vocabulary, rows, length)
        limits.require_memory(needed, what, jax.local_devices()[:1])

    @property
    def denoise(self) -> Partial:
        """The model as a denoiser, which is all that sampling depends on."""
        return Partial(self.pretraining.denoise, self.parameters)

    @property
    def num_parameters(self) -> int:
        """Number of parameters of the network."""
        return num_parameters(self.parameters)

    def generator(self, *, rows: int = 32, bucket: int = 8) -> Generator:
        """Generator of this model's answers, whose plan may follow the noise schedules of its training."""
        schedule = self.description.train.masking.schedule_of(self.vocabulary)
        return Generator(self.denoise, self.vocabulary, schedule=schedule, rows=rows, bucket=bucket)


def load(folder: Path, checkpoint: int | Literal["best"] | None = None, mesh: Mesh | None = None) -> LoadedRun:
    """Loads the weight average of a run's newest undamaged checkpoint, that of a step, or the best by its best_metric.

    On a mesh every device gets its part of the weights, and all processes must call this together. Raises
    FileNotFoundError if the folder holds no run or no complete checkpoint.
    """
    description = load_description(folder)
    tokenizers = media_tokenizers.load_tokenizers(folder / "tokenizers")
    require_same_vocabulary(description.vocabulary, tokenizers.vocabulary, folder)
    train, vocabulary, targets = description.train, description.vocabulary, description.mean_targets
    pretraining = Pretraining(train, vocabulary, description.optimizer, targets or None, mesh)
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
    parameters = _by_these_rules(restored.tree["average"], description)
    return LoadedRun(folder, description, tokenizers, pretraining, parameters, restored.step)


def _by_these_rules(parameters: Parameters, description: RunDescription) -> Parameters:
    """Parameters of a run of any rules for today's network.

    μP of rules 1 divided the logits by the ratio of widths; the untied unembedding takes that up.
    """
    model, parametrization = description.train.model, description.train.parametrization
    if description.rules > 1 or parametrization.kind != "mup" or model.tied_unembedding:
        return parameters
    ratio = model.width / model.base(parametrization).width
    return {**parameters, "unembedding": parameters["unembedding"] / ratio}


def require_same_vocabulary(model: Vocabulary, tokenizers: Vocabulary, folder: Path) -> None:
    """Raises ValueError, which lists the differences, if the tokenizers' vocabulary is not the model's."""
    changed = configuration.changed_fields(model, tokenizers)
    if changed:
        raise ValueError(
            f"{folder}: the model's vocabulary is not the tokenizers' (model → tokenizers): {'; '.join(changed)}"
        )
