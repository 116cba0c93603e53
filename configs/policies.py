"""Named settings of trainings of unmasking policies."""

from collections.abc import Callable
from dataclasses import replace

from trimask.diffusion.sampling.config import GenerationConfig
from trimask.sampling_rl.grpo import GRPOConfig
from trimask.sampling_rl.train import PolicyTrainConfig

_EPISODES = GenerationConfig(temperature=0.0, stop_at_eos=False)


def paper() -> PolicyTrainConfig:
    """In blocks of 32, with the optimizer of arXiv 2512.09106."""
    return PolicyTrainConfig(generation=replace(_EPISODES, block_length=32), temperature=0.5)


def blocks() -> PolicyTrainConfig:
    """In blocks of 8, for models and budgets of minutes: fewer updates, each of them larger."""
    return PolicyTrainConfig(
        generation=replace(_EPISODES, block_length=8),
        grpo=GRPOConfig(learning_rate=1e-3, warmup=10, clip_norm=1.0, weight_decay=0.0),
        problems_per_step=8,
    )


def full() -> PolicyTrainConfig:
    """All at once, with an expert in every group (expert steering)."""
    return replace(blocks(), generation=_EPISODES, experts=(0.9,), expert_block=8)


POLICIES: dict[str, Callable[[], PolicyTrainConfig]] = {"paper": paper, "blocks": blocks, "full": full}
