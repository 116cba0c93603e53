"""Named configurations for training unmasking policies."""

from collections.abc import Callable
from dataclasses import replace

from trimask.diffusion.sampling.generation_config import GenerationConfig
from trimask.diffusion.sampling.policy import PolicyConfig
from trimask.sampling_rl.grpo import GRPOConfig
from trimask.sampling_rl.train_policy import PolicyTrainConfig

_EPISODES = GenerationConfig(temperature=0.0, stop_at_eos=False)


def paper() -> PolicyTrainConfig:
    """Blocks of 32 tokens, with the optimizer of arXiv 2512.09106."""
    return PolicyTrainConfig(generation=replace(_EPISODES, block_length=32), temperature=0.5)


def blocks() -> PolicyTrainConfig:
    """Blocks of 8 tokens, for small models and short training: smaller policy and batches, larger learning rate."""
    return PolicyTrainConfig(
        policy=PolicyConfig(width=64, mlp_width=256),
        generation=replace(_EPISODES, block_length=8),
        grpo=GRPOConfig(learning_rate=3e-4, warmup=10, clip_norm=1.0, weight_decay=0.0),
        problems_per_step=8,
    )


def full() -> PolicyTrainConfig:
    """No blocks: the policy may reveal any position; starts from the policy that --init-from names."""
    return replace(blocks(), generation=_EPISODES, expert_block=8)


def steered() -> PolicyTrainConfig:
    """Like `full`, with one expert rollout in every group (expert steering)."""
    return replace(full(), experts=(0.7,))


def imitation() -> PolicyTrainConfig:
    """Imitates the best of four confidence thresholds in blocks of 8: a start for `full`, or a baseline."""
    return replace(
        full(),
        learns_from="experts",
        experts=(0.3, 0.5, 0.7, 0.9),
        grpo=replace(full().grpo, learning_rate=2e-3, updates=4),
        problems_per_step=16,
    )


POLICIES: dict[str, Callable[[], PolicyTrainConfig]] = {
    "paper": paper,
    "blocks": blocks,
    "full": full,
    "steered": steered,
    "imitation": imitation,
}
