"""What config.json of a run folder holds, and what of it may differ when the run is continued.

A run is resumed bit for bit or not at all: model, objective, optimizer, data and seed must be what they were. How often
to log, save and sample, how samples are drawn, on how many devices it runs and by which kernels (which changes the
order of sums, and so the last bits), is the user's to change at any time.
"""

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path

from trimask.diffusion.data.batches import BatchConfig
from trimask.diffusion.data.layout import Layout
from trimask.diffusion.loss import LossConfig
from trimask.diffusion.masking import MaskingConfig
from trimask.diffusion.mesh import MeshConfig
from trimask.diffusion.optimizer import OptimizerConfig
from trimask.diffusion.parametrization import ParametrizationConfig
from trimask.diffusion.pretraining.longer import require_longer
from trimask.diffusion.run.folder import checkpoint_steps
from trimask.diffusion.run.step_loop import LoopConfig
from trimask.diffusion.sampling.generation_config import GenerationConfig
from trimask.diffusion.sde import SDEScaling, rescaled
from trimask.diffusion.transformer import TransformerConfig
from trimask.tokenizers.media import MediaTokenizers
from trimask.tokenizers.storage import configuration
from trimask.tokenizers.storage.formats import added_field
from trimask.tokenizers.storage.ranges import Checked, Seed, Size
from trimask.tokenizers.vocabulary import Vocabulary


@dataclass(frozen=True, kw_only=True)
class TrainConfig(Checked):
    """A pretraining run."""

    model: TransformerConfig = TransformerConfig()
    """The network."""
    parametrization: ParametrizationConfig = ParametrizationConfig()
    """From which shape its hyperparameters are transferred."""
    masking: MaskingConfig = MaskingConfig()
    """The forward process."""
    loss: LossConfig = LossConfig()
    """The objective."""
    optimizer: OptimizerConfig = OptimizerConfig()
    """AdamW, its schedule and the weight average, as tuned."""
    sde: SDEScaling = SDEScaling()
    """At which batch and horizon it was tuned."""
    batch: BatchConfig = BatchConfig()
    """What a step trains on."""
    accumulate: Size = 1
    """Micro-batches that a batch's rows are split into, one after another, to save memory."""
    mesh: MeshConfig = MeshConfig()
    """How the work is shared among devices; a run may go on with other ones."""
    loop: LoopConfig = LoopConfig()
    """How often to log and save."""
    generation: dict[str, GenerationConfig] = field(default_factory=dict)
    """How each modality is sampled, by name, unless asked otherwise."""
    seed: Seed = 0
    """Fixes the run."""


@dataclass(frozen=True, kw_only=True)
class RunDescription:
    """What config.json of a run folder holds."""

    train: TrainConfig
    vocabulary: Vocabulary
    layouts: dict[str, Layout]
    """Dataset → layout of the examples the model was trained on."""
    data: str
    """Where the prepared data was."""
    data_fingerprint: str
    """What the prepared data was, wherever it is."""
    num_steps: int
    batch_tokens: float
    """Non-padding tokens of the mean step."""
    kappa: float
    """κ of that batch and the horizon."""
    optimizer: OptimizerConfig
    """The optimizer as it is used: `train.optimizer` at κ."""
    epochs: dict[str, float]
    """Dataset → how often its training examples are seen in these steps."""
    trimask: str
    git_commit: str | None
    init_from: str | None = None
    """Run folder whose weight average this run started from."""
    init_step: int | None = None
    """The step of that weight average."""
    first_horizon_tokens: int | None = added_field(as_before=None, default=None)
    """Horizon of the run before it was made longer: that of `kappa` and `batch_tokens`. None: it was not."""

    @property
    def tuned_horizon(self) -> int:
        """The horizon in tokens that κ is of."""
        return self.first_horizon_tokens or self.train.optimizer.horizon_tokens


def load_description(folder: Path) -> RunDescription:
    """What the config.json of a run folder says."""
    if not (folder / "config.json").is_file() or (folder / "manifest.json").is_file():
        raise FileNotFoundError(f"{folder}: not a run folder; `trimask train` makes one")
    return configuration.load(folder / "config.json", RunDescription)


def transferred(tuned: RunDescription, width: int | None = None) -> TrainConfig:
    """The configuration of a run whose shape, batch and horizon are the base for others; at another width, more heads.

    What it was itself transferred from stays the base.
    """
    model, config = tuned.train.model, tuned.train
    parametrization, sde = config.parametrization, config.sde
    return dataclasses.replace(
        config,
        model=dataclasses.replace(model.at_width(width or model.width), head_size=model.size_of_head),
        parametrization=dataclasses.replace(
            parametrization,
            base_width=parametrization.base_width or model.width,
            base_layers=parametrization.base_layers or model.num_layers,
            base_heads=parametrization.base_heads or model.num_heads,
            base_mlp_width=parametrization.base_mlp_width or model.size_of_mlp,
        ),
        sde=dataclasses.replace(
            sde,
            base_batch_tokens=sde.base_batch_tokens or tuned.batch_tokens,
            base_horizon_tokens=sde.base_horizon_tokens or tuned.tuned_horizon,
        ),
    )


def resumed_description(folder: Path, description: RunDescription, resume: bool) -> RunDescription:
    """The description of the run in `folder`, continued as described; refused if that would make it another run."""
    steps = checkpoint_steps(folder)
    if steps and not resume:
        raise ValueError(f"{folder} holds a run at step {steps[-1]}; --no-resume needs a folder without one")
    if not steps:
        return description  # nothing was finished, so nothing is lost
    if not (folder / "config.json").exists():
        raise ValueError(f"{folder} holds checkpoints and no config.json to say of what; choose another folder")
    old = configuration.load(folder / "config.json", RunDescription)
    batch = dataclasses.replace(description.train.batch, warn_epochs=old.train.batch.warn_epochs)
    free = {name: getattr(old.train, name) for name in ("loop", "generation", "mesh")}
    model = description.train.model.computed_as(old.train.model)
    asked = dataclasses.replace(description.train, **free, batch=batch, model=model)
    changed = configuration.changed_fields(old.train, asked)
    changed += configuration.changed_fields(old.vocabulary, description.vocabulary, "vocabulary.")
    for name in ("data_fingerprint", "init_from"):
        if getattr(old, name) != getattr(description, name):
            changed.append(f"{name}: {getattr(old, name)} → {getattr(description, name)}")
    if [line.partition(":")[0] for line in changed] == ["optimizer.horizon_tokens"]:
        require_longer(folder, old.train.optimizer, description.train.optimizer)
        return _lengthened(old, description)
    if changed:
        raise ValueError(
            f"{folder} holds a run of another configuration; choose another folder. "
            f"There → asked for: {'; '.join(changed)}"
        )
    return dataclasses.replace(old, train=description.train, data=description.data)


def _lengthened(old: RunDescription, asked: RunDescription) -> RunDescription:
    """The run `old` with the horizon that is asked for."""
    return dataclasses.replace(
        old,
        train=asked.train,
        data=asked.data,
        num_steps=asked.num_steps,
        optimizer=rescaled(asked.train.optimizer, old.kappa),
        epochs=asked.epochs,
        first_horizon_tokens=old.tuned_horizon,
    )


def write_description(folder: Path, description: RunDescription, tokenizers: MediaTokenizers) -> None:
    """Writes config.json and, before it, tokenizers/."""
    path = folder / "config.json"
    if not checkpoint_steps(folder):
        tokenizers.save(folder / "tokenizers")
        configuration.save(path, description)
    elif configuration.load(path, RunDescription) != description:
        configuration.save(path, description)
