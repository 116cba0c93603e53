"""Heuristic strategies that studies of sampling compare, each over the parameter that trades quality for speed."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from trimask.diffusion.sampling.generation_config import GenerationConfig

PARAMETERS = {
    "threshold": "threshold",
    "leftmost": "threshold",
    "factor": "factor",
    "entropy_bound": "entropy_bound",
}
"""Strategy → field of `GenerationConfig` that says how many tokens it reveals at once; for all others it is `steps`."""


class HeuristicSetting(NamedTuple):
    """A heuristic strategy at one value of its parameter."""

    strategy: str
    parameter: str
    """Field of `GenerationConfig` that `value` is for."""
    value: int | float

    def applied_to(self, config: GenerationConfig) -> GenerationConfig:
        """The configuration with this strategy and value. Raises ValueError if it refuses them."""
        fields: dict[str, Any] = {self.parameter: self.value}
        return replace(config, strategy=self.strategy, **fields)


def heuristic_settings(
    planned: Sequence[str], steps: Sequence[int], values: Mapping[str, Sequence[float]]
) -> list[HeuristicSetting]:
    """Every planned strategy at every number of steps, then each strategy of `PARAMETERS` in `values` at its values."""
    settings = [HeuristicSetting(strategy, "steps", number) for strategy in planned for number in steps]
    settings += [
        HeuristicSetting(strategy, PARAMETERS[strategy], value)
        for strategy, of_strategy in values.items()
        for value in of_strategy
    ]
    return settings
