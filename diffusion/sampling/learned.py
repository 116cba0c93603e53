"""A trained policy as a strategy, and opening one from its run folder.

A policy's folder, written by `trimask train-policy`, holds policy.json (`PolicyDescription`) and checkpoints/. It is
named FOLDER for the newest checkpoint, FOLDER@STEP for that of a step, or FOLDER@best for the best by `best_metric`.
"""

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import jax
from jaxtyping import Array, Float

from trimask.diffusion.run.checkpoint import Checkpoints
from trimask.diffusion.sampling.actions import Ranks, draw_action
from trimask.diffusion.sampling.policy import (
    PolicyConfig,
    PolicyParameters,
    policy_features,
    policy_logits,
    policy_shapes,
)
from trimask.diffusion.sampling.state import Choice, Memory, Observation, RowKeys
from trimask.diffusion.sampling.strategies import highest_scoring
from trimask.tokenizers.storage import configuration
from trimask.tokenizers.storage.formats import added_field

_RULES = 2
"""Number of the network and of what it sees. 1 differed in norms, modulation and activation, and did not see tokens
that were given up."""


@dataclass(frozen=True, kw_only=True)
class PolicyDescription:
    """Contents of policy.json: what it takes to use a policy."""

    policy: PolicyConfig
    temperature: float
    """Default temperature τ, the divisor of the logits."""
    block_length: int | None
    """Number of tokens in the blocks it was trained on. None: it was trained without blocks."""
    best_metric: str
    """Metric whose lowest value marks the best checkpoint."""
    trained_on: str
    """The model and the problems it was trained on, in words."""
    rules: int = added_field(as_before=1, default=_RULES)
    """Number of the rules that the network was trained by; a policy of other rules than today's cannot be used."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LearnedStrategy:
    """A policy with its parameters, callable as a strategy."""

    config: PolicyConfig = dataclasses.field(metadata={"static": True})
    parameters: PolicyParameters
    temperature: Float[Array, ""] | float = 1.0
    """Temperature τ, the divisor of the logits."""
    scale: Float[Array, ""] | float = 1.0
    """Factor β on the probabilities of the law bernoulli: below 1 fewer positions are revealed per step."""
    is_forced: bool = dataclasses.field(default=True, metadata={"static": True})
    """Whether a call reveals the position of the largest logit in rows where the action is empty; `act` never does."""

    def __call__(self, keys: RowKeys, observation: Observation, memory: Memory) -> tuple[Choice, Memory]:
        ranks, logits = self.act(keys, observation)
        reveal = ranks > 0
        if self.is_forced:
            is_stuck = ~reveal.any(axis=-1, keepdims=True)
            reveal |= is_stuck & highest_scoring(logits, 1, observation).reveal
        return Choice(reveal), memory

    def act(self, keys: RowKeys, observation: Observation) -> tuple[Ranks, Float[Array, "batch seq"]]:
        """The action drawn, and the logits before the division by the temperature."""
        features = policy_features(observation, self.config)
        holds_mask, is_asked = observation.holds_mask, observation.is_asked
        logits = policy_logits(self.config, self.parameters, features, holds_mask, is_asked, observation.steps_taken)
        ranks = draw_action(self.config.law, keys, logits / self.temperature, observation.candidates, self.scale)
        return ranks, logits


def folder_and_checkpoint(name: str) -> tuple[Path, str]:
    """Folder and checkpoint of FOLDER, FOLDER@STEP or FOLDER@best; the checkpoint is "" for the newest."""
    path = Path(name)
    folder, _, checkpoint = path.name.partition("@")
    return path.with_name(folder) if folder else path, checkpoint


def describe_policy(name: str) -> PolicyDescription:
    """Loads policy.json of a policy, named as for `open_policy`; raises FileNotFoundError if there is none."""
    path, _ = folder_and_checkpoint(name)
    if not (path / "policy.json").is_file():
        raise FileNotFoundError(f"{path}: not the folder of a policy; `trimask train-policy` makes one")
    return configuration.load(path / "policy.json", PolicyDescription)


def require_these_rules(folder: Path, description: PolicyDescription) -> None:
    """Raises ValueError if the policy in the folder was trained by other rules than today's."""
    if description.rules != _RULES:
        raise ValueError(
            f"{folder} holds a policy of rules {description.rules}, whose network is another one; only policies of "
            f"rules {_RULES} can be used: train it again with `trimask train-policy`, in another folder"
        )


def open_policy(name: str) -> LearnedStrategy:
    """Loads a policy by its name: FOLDER, FOLDER@STEP or FOLDER@best.

    Raises FileNotFoundError if there is no policy or no complete checkpoint, ValueError if the name is malformed or the
    policy was trained by other rules than today's.
    """
    path, checkpoint = folder_and_checkpoint(name)
    description = describe_policy(name)
    require_these_rules(path, description)
    if not (checkpoint in ("", "best") or checkpoint.isdecimal()):
        raise ValueError(f"a policy is named FOLDER, FOLDER@STEP or FOLDER@best, got {name!r}")
    with Checkpoints(path) as checkpoints:
        steps = checkpoints.steps()
        if not steps:
            raise FileNotFoundError(f"{path}: has no complete checkpoint yet; `trimask train-policy` continues it")
        like = {"parameters": policy_shapes(description.policy)}
        if checkpoint == "":
            restored = checkpoints.restore_newest(like, set_aside=False, is_part=True)
            assert restored is not None
        else:
            step = checkpoints.best(description.best_metric) if checkpoint == "best" else int(checkpoint)
            restored = checkpoints.restore(step, like, is_part=True)
    return LearnedStrategy(description.policy, restored.tree["parameters"], description.temperature)
