"""Parameter classes, and what the optimizer multiplies for each of them.

Every parameter is born with its class as metadata (`parameter_class`), the classes of Table 1 of Complete(d)P
(arXiv 2512.22382). A parameterisation is a table from class to `Multipliers`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import jax
from flax import nnx

ParameterClass = Literal[
    "input_embedding", "hidden_weight", "hidden_bias_or_norm", "qk_norm", "final_norm", "unembedding"
]
PARAMETER_CLASSES: tuple[ParameterClass, ...] = get_args(ParameterClass)


@dataclass(frozen=True, kw_only=True)
class Multipliers:
    """Factors on the optimizer's global values for one class of parameters."""

    learning_rate: float = 1.0
    """On the learning rate."""
    epsilon: float = 1.0
    """On AdamW's ε."""
    weight_decay: float = 1.0
    """On the decoupled weight decay λ; the decay per step is learning rate × λ."""


Parametrization = Mapping[ParameterClass, Multipliers]


def standard() -> Parametrization:
    """Every class as the optimizer's global values say."""
    return {name: Multipliers() for name in PARAMETER_CLASSES}


def parameter(value: jax.Array, parameter_class: ParameterClass) -> nnx.Param:
    """A parameter that knows its class."""
    return nnx.Param(value, parameter_class=parameter_class)


def parameter_classes(module: nnx.Module) -> Any:
    """The class of every parameter of a module, as a tree like `nnx.to_pure_dict(nnx.state(module))`."""
    state = nnx.state(module, nnx.Param)
    classes = jax.tree.map(lambda p: p.parameter_class, state, is_leaf=lambda x: isinstance(x, nnx.Variable))
    return nnx.to_pure_dict(classes)
