"""Named settings of the studies: `cpu` for two cores in less than half an hour, `accelerator` for an order more."""

from typing import Any

from trimask.configs.presets import tiny
from trimask.diffusion.data.batches import BatchConfig
from trimask.diffusion.loss import LossConfig
from trimask.diffusion.optimizer import OptimizerConfig
from trimask.diffusion.studies.coordinate_check import CoordinateCheck
from trimask.diffusion.train import TrainConfig
from trimask.diffusion.transformer import TransformerConfig

DATA = tiny().prepare
"""What studies train on unless told otherwise: real handwritten digits and synthetic speech, with their words.

Sums are left out: they are learned in a sudden jump, and whether a run is before or after it hides all else.
"""


def _proxy(width: int, layers: int, tokens: int, batch: int = 1024, **optimizer: Any) -> TrainConfig:
    """The network and recipe that are scaled: heads of 16."""
    return TrainConfig(
        model=TransformerConfig(num_layers=layers, width=width, num_heads=width // 16),
        loss=LossConfig(weighting="unweighted"),
        optimizer=OptimizerConfig(horizon_tokens=tokens, **optimizer),
        batch=BatchConfig(tokens=batch, weights={"handwritten": 2.0, "spoken": 1.0, "sums": 0.0}),
    )


def coordinate_check_cpu() -> CoordinateCheck:
    """Widths 64 to 512 and depths 2 to 32, after five steps."""
    recipe = {"learning_rate": 2e-3, "warmup_tokens": 0, "schedule": "constant"}
    return CoordinateCheck(base=_proxy(64, 4, tokens=5 * 256, batch=256, **recipe))
