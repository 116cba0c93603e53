"""A policy as a strategy, and the folder it is opened from."""

import dataclasses
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import jax
from jaxtyping import Array, Float

from trimask.diffusion.run.checkpoint import Checkpoints
from trimask.diffusion.sampling.actions import Ranks, drawn
from trimask.diffusion.sampling.policy import (
    PolicyConfig,
    PolicyParameters,
    new_parameters,
    policy_features,
    policy_logits,
)
from trimask.diffusion.sampling.state import Choice, Memory, Observation, RowKeys
from trimask.diffusion.sampling.strategies import best
from trimask.tokenizers.storage import configuration


@dataclass(frozen=True, kw_only=True)
class PolicyDescription:
    """What policy.json says: all it takes to use a policy."""

    policy: PolicyConfig
    temperature: float
    """τ by default."""
    block_length: int | None
    """Of the blocks in which it was trained. None: everything at once."""
    best_metric: str
    """Which checkpoint is the best; lower is better."""
    trained_on: str
    """In words: the model and the problems."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LearnedStrategy:
    """A policy as a strategy."""

    config: PolicyConfig = dataclasses.field(metadata={"static": True})
    parameters: PolicyParameters
    temperature: Float[Array, ""] | float = 1.0
    """τ, by which logits are divided."""
    scale: Float[Array, ""] | float = 1.0
    """β of bernoulli: below 1 fewer are revealed at a time, above 1 more."""
    is_forced: bool = dataclasses.field(default=True, metadata={"static": True})
    """Whether the position of the largest logit is revealed where nothing was drawn; what `act` draws never is."""

    def __call__(self, keys: RowKeys, seen: Observation, memory: Memory) -> tuple[Choice, Memory]:
        ranks, logits = self.act(keys, seen)
        reveal = ranks > 0
        if self.is_forced:
            is_stuck = ~reveal.any(axis=-1, keepdims=True)
            reveal |= is_stuck & best(logits, 1, seen).reveal
        return Choice(reveal), memory

    def act(self, keys: RowKeys, seen: Observation) -> tuple[Ranks, Float[Array, "batch seq"]]:
        """What was drawn, and the logits before the temperature."""
        features = policy_features(seen, self.config)
        logits = policy_logits(self.config, self.parameters, features, seen.is_masked, seen.is_asked, seen.steps_taken)
        return drawn(self.config.law, keys, logits / self.temperature, seen.candidates, self.scale), logits


def folder_and_checkpoint(name: str) -> tuple[Path, str]:
    """What FOLDER, FOLDER@STEP and FOLDER@best say; "" is the last checkpoint."""
    path = Path(name)
    folder, _, checkpoint = path.name.partition("@")
    return path.with_name(folder) if folder else path, checkpoint


def describe_policy(name: str) -> "PolicyDescription":
    """What the folder of a policy, named as for `open_policy`, says of itself."""
    path, _ = folder_and_checkpoint(name)
    if not (path / "policy.json").is_file():
        raise FileNotFoundError(f"{path}: not the folder of a policy; `trimask train-policy` makes one")
    return configuration.load(path / "policy.json", PolicyDescription)


def open_policy(name: str) -> "LearnedStrategy":
    """The policy of a run folder of `trimask train-policy`: FOLDER, FOLDER@STEP or FOLDER@best."""
    path, checkpoint = folder_and_checkpoint(name)
    about = describe_policy(name)
    if not (checkpoint in ("", "best") or checkpoint.isdecimal()):
        raise ValueError(f"after @ comes a step or best, got {name!r}")
    with Checkpoints(path) as checkpoints:
        steps = checkpoints.steps()
        if not steps:
            raise FileNotFoundError(f"{path}: has no complete checkpoint yet; `trimask train-policy` continues it")
        like = {"parameters": jax.eval_shape(partial(new_parameters, about.policy), jax.random.key(0))}
        if checkpoint == "":
            restored = checkpoints.restore_newest(like, set_aside=False, is_part=True)
            assert restored is not None
        else:
            step = checkpoints.best(about.best_metric) if checkpoint == "best" else int(checkpoint)
            restored = checkpoints.restore(step, like, is_part=True)
    return LearnedStrategy(about.policy, restored.tree["parameters"], about.temperature)
