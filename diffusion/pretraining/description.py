"""The description of a run (config.json in its folder), and which parts of it may change when the run is resumed.

A run is resumed bit for bit or not at all: model, objective, optimizer, data and seed must be what they were. Four
things may change at any time: how often to log, save and sample; how samples are drawn; the number of devices; and the
kernels, which change the order of sums and so the last bits.
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
from trimask.diffusion.sde import SDEScaling
from trimask.diffusion.transformer import TransformerConfig
from trimask.tokenizers.media import MediaTokenizers
from trimask.tokenizers.storage import configuration
from trimask.tokenizers.storage.formats import added_field
from trimask.tokenizers.storage.ranges import Checked, Seed, Size
from trimask.tokenizers.vocabulary import Vocabulary

RULES = 2
"""Number of the rules of the objective that this code follows; runs and trials of other rules are not continued."""

_CHANGED_RULES = {
    2: "the loss is normalised by the run's mean number of targets per step instead of each batch's, times are cut off "
    "by the masked share, half of the examples that are masked on both sides have one time, prompts of texts are "
    "hidden for guidance, the clipping threshold does not follow the horizon, warmup takes at most a quarter of it, "
    "place embeddings have another ε at other widths, and μP another unembedding",
}
"""Number of rules → what they changed."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig(Checked):
    """Configuration of a pretraining run."""

    model: TransformerConfig = TransformerConfig()
    """Shape of the network and how it is computed."""
    parametrization: ParametrizationConfig = ParametrizationConfig()
    """Rule and base shape from which hyperparameters are transferred to this shape."""
    masking: MaskingConfig = MaskingConfig()
    """The forward process: which tokens are masked, and with what probability."""
    loss: LossConfig = LossConfig()
    """Training objective: weights of masked tokens and of modalities."""
    optimizer: OptimizerConfig = OptimizerConfig()
    """AdamW, its learning rate schedule and the weight average, as tuned at the base batch and horizon."""
    sde: SDEScaling = SDEScaling()
    """Base batch and horizon at which the optimizer was tuned, and how it is rescaled to this run's."""
    batch: BatchConfig = BatchConfig()
    """Composition of the batches."""
    accumulate: Size = 1
    """Number of micro-batches into which a batch is split to save memory; their gradients are summed."""
    mesh: MeshConfig = MeshConfig()
    """How work is divided among devices; a run may be resumed with another mesh."""
    loop: LoopConfig = LoopConfig()
    """How often to log, save and sample."""
    generation: dict[str, GenerationConfig] = field(default_factory=dict)
    """Default sampling settings by modality; a modality that is not listed has those of `GenerationConfig`."""
    seed: Seed = 0
    """Seed of parameters, batches and masks: the same seed gives the same run."""


@dataclass(frozen=True, kw_only=True)
class RunDescription:
    """Contents of config.json in a run folder."""

    train: TrainConfig
    """Configuration as the user gave it."""
    vocabulary: Vocabulary
    """Vocabulary of the prepared data."""
    layouts: dict[str, Layout]
    """Layout of the training examples of every dataset, by the dataset's name."""
    data: str
    """Absolute path of the prepared data."""
    data_fingerprint: str
    """Fingerprint of the prepared data, which does not depend on its path."""
    num_steps: int
    """Number of training steps until the horizon."""
    batch_tokens: float
    """Mean number of non-padding tokens per step."""
    mean_targets: dict[str, float] = added_field(as_before={}, default_factory=dict)
    """N_m of the loss: mean number of target tokens per step, by modality. Empty in runs of rules 1."""
    kappa: float
    """κ of this batch and horizon (`sde.py`)."""
    optimizer: OptimizerConfig
    """The optimizer as used: `train.optimizer` rescaled by κ."""
    epochs: dict[str, float]
    """Number of epochs over the training examples of every dataset, by the dataset's name."""
    trimask: str
    """Version of trimask that wrote the description."""
    git_commit: str | None
    """Commit of the git checkout that trimask ran from. None: it ran from no checkout."""
    init_from: str | None = None
    """Run folder whose weight average this run started from. None: random parameters."""
    init_step: int | None = None
    """Step of that weight average."""
    first_horizon_tokens: int | None = added_field(as_before=None, default=None)
    """First horizon of an extended run, in tokens, to which `kappa`, `batch_tokens`, `mean_targets` and the warmup
    belong. None: not extended."""
    rules: int = added_field(as_before=1, default=RULES)
    """Number of the rules of the objective that the run was trained by."""

    @property
    def tuned_horizon(self) -> int:
        """Horizon, in tokens, for which `kappa` was computed."""
        return self.first_horizon_tokens or self.train.optimizer.horizon_tokens


def load_description(folder: Path) -> RunDescription:
    """Loads config.json of a run folder; raises FileNotFoundError if this is none."""
    if not (folder / "config.json").is_file() or (folder / "manifest.json").is_file():
        raise FileNotFoundError(f"{folder}: not a run folder; `trimask train` makes one")
    return configuration.load(folder / "config.json", RunDescription)


def transferred_config(tuned: RunDescription, width: int | None = None) -> TrainConfig:
    """The configuration of a run, as the base from which other shapes, batches and horizons are transferred.

    At another width the network has more heads, of the same size. If the run was itself transferred, its base is kept.
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
    """The description that config.json in `folder` is to hold when the run there continues as `description` says.

    Raises ValueError if it would be another run (see the module's docstring), or if `resume` is False and there is one.
    """
    steps = checkpoint_steps(folder)
    if steps and not resume:
        raise ValueError(f"{folder} holds a run at step {steps[-1]}; --no-resume needs a folder without one")
    if not steps:
        return description  # without a checkpoint there is nothing to resume
    if not (folder / "config.json").exists():
        raise ValueError(f"{folder} holds checkpoints without a config.json that describes them; choose another folder")
    old = configuration.load(folder / "config.json", RunDescription)
    if old.rules != RULES:
        changes = "; ".join(text for number, text in _CHANGED_RULES.items() if number > old.rules)
        raise ValueError(
            f"{folder} holds a run of rules {old.rules}, which this version, of rules {RULES}, does not continue: "
            f"since then {changes}. Train it again in another folder, or start a new run from its weights with "
            f"--init-from {folder}"
        )
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
            f"In the folder → requested: {'; '.join(changed)}"
        )
    return dataclasses.replace(old, train=description.train, data=description.data)


def _lengthened(old: RunDescription, asked: RunDescription) -> RunDescription:
    """The description of the run `old`, with the longer horizon of `asked`.

    Raises ValueError if the mixture moves on after the first horizon, so that N_m of the loss would be another one.
    """
    for modality, mean in asked.mean_targets.items():
        first = old.mean_targets.get(modality, 0.0)
        if not first / 2 <= mean <= 2 * first:
            raise ValueError(
                f"a run of {asked.train.optimizer.horizon_tokens:,} tokens has {mean:.4g} targets of {modality} per "
                f"step, and its first {old.tuned_horizon:,} tokens have {first:.4g}, by which the loss is normalised; "
                "let batch.anneal_tokens end well within the first horizon, or start a new run with --init-from"
            )
    return dataclasses.replace(
        old,
        train=asked.train,
        data=asked.data,
        num_steps=asked.num_steps,
        optimizer=dataclasses.replace(
            old.train.sde.rescale(asked.train.optimizer, old.batch_tokens, old.tuned_horizon),
            warmup_tokens=old.optimizer.length_of_warmup,
        ),
        epochs=asked.epochs,
        first_horizon_tokens=old.tuned_horizon,
    )


def write_description(folder: Path, description: RunDescription, tokenizers: MediaTokenizers) -> None:
    """Writes config.json and, before a run's first checkpoint, tokenizers/."""
    path = folder / "config.json"
    if not checkpoint_steps(folder):
        tokenizers.save(folder / "tokenizers")
        configuration.save(path, description)
    elif configuration.load(path, RunDescription) != description:
        configuration.save(path, description)
