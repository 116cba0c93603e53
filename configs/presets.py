"""Named experiments: what to prepare, how to train, how to sample and evaluate."""

from collections.abc import Callable
from dataclasses import dataclass

from trimask.diffusion.data.batches import BatchConfig
from trimask.diffusion.data.prepare import PrepareConfig
from trimask.diffusion.evaluate import EvaluateConfig
from trimask.diffusion.loop import LoopConfig
from trimask.diffusion.optimizer import OptimizerConfig
from trimask.diffusion.sampling.requests import GenerationConfig
from trimask.diffusion.train import TrainConfig
from trimask.diffusion.transformer import TransformerConfig


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """One whole story from data to numbers."""

    prepare: PrepareConfig
    train: TrainConfig
    evaluate: EvaluateConfig = EvaluateConfig()


def tiny() -> Experiment:
    """Digits to draw, read, say and hear, and sums to add: some minutes on two CPU cores."""
    return Experiment(
        prepare=PrepareConfig(
            sources={"handwritten": "digits/handwritten", "spoken": "digits/spoken", "sums": "digits/sums"}
        ),
        train=TrainConfig(
            model=TransformerConfig(num_layers=4, width=128, num_heads=4),
            optimizer=OptimizerConfig(learning_rate=3e-3, horizon_tokens=2_400_000, warmup_tokens=50_000),
            batch=BatchConfig(tokens=4096),
            loop=LoopConfig(checkpoint_every=200, sample_every=200),
            generation={
                "text": GenerationConfig(temperature=0.0, steps=10),
                "image": GenerationConfig(temperature=1.0, steps=16, guidance=1.0),
                "audio": GenerationConfig(temperature=1.0, steps=16, guidance=1.0),
            },
        ),
    )


PRESETS: dict[str, Callable[[], Experiment]] = {"tiny": tiny}
