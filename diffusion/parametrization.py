"""Transfer of hyperparameters tuned on a small network to a large one: Table 1 of Complete(d)P (arXiv 2512.22382).

    n = m_N = a tensor's fan-in / its fan-in in the base network         (vectors and embeddings: ratio of widths;
                                                                          1 if the width is not among its axes)
    l = m_L = number of blocks / number of blocks in the base network    h ← h + l^−α · f(h)

The base network is the one on which hyperparameters were tuned. At its shape every factor is 1, so all tables agree
there. An `Initializer` creates every parameter together with its factors, as metadata (`multipliers`); the optimizer
needs nothing else.

What the paper leaves open, and what is done here:

1. CompleteP and μP do not treat QK norms: there they are treated like other hidden norms.
2. A tied unembedding has no row: it is an input embedding, and its logits are multiplied by 1/n, as in CompleteP.
3. The relative depth of block k of L blocks, at which per-module multipliers are interpolated, is (k + ½) / L.
4. The threshold of clipping by the global norm is not scaled, although the norm changes with the shape.
5. A tuned multiplier ζ of a residual branch is absorbed into the branch's last matrix: its initial weights and learning
   rate are multiplied by ζ, its ε and λ divided by ζ. The function and its training are the same up to clipping, and
   the network is unchanged, so a search over ζ compiles once. The table's m_L^−α is applied in the forward pass.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, Literal, get_args

import jax
import numpy as np
from flax import nnx

from trimask.tokenizers.storage.formats import current_name
from trimask.tokenizers.storage.ranges import Checked, NonNegative, Positive, Size, real

ParameterClass = Literal[
    "input_embedding", "hidden_weight", "hidden_bias_or_norm", "qk_norm", "final_norm", "unembedding"
]
PARAMETER_CLASSES: tuple[ParameterClass, ...] = get_args(ParameterClass)
ParametrizationKind = Literal["completed_p", "completep", "mup", "standard"]


@dataclass(frozen=True)
class Row:
    """Factors on the hyperparameters of the base network, for one class of parameters."""

    init_variance: float
    learning_rate: float
    epsilon: float
    """Factor on AdamW's ε."""
    weight_decay: float
    """Factor on the decoupled weight decay λ; a step shrinks weights by learning rate × λ."""


@dataclass(frozen=True)
class Table:
    """A parametrization at one ratio of shapes."""

    rows: Mapping[ParameterClass, Row]
    residual: float = 1.0
    """Factor on the output of each residual branch, attention and MLP."""
    logits: float = 1.0
    """Factor on the output of the unembedding."""


def completed_p(n: float, l: float, a: float) -> Table:  # noqa: E741
    """Complete(d)P (arXiv 2512.22382, Table 1): n = m_N, l = m_L, a = α, the residual exponent."""
    return Table(
        residual=l**-a,
        rows={
            # class                     init variance  learning rate        AdamW ε          weight decay
            "input_embedding":      Row(1.0,           1.0,                n**-1,           1.0),
            "hidden_weight":        Row(n**-1,         n**-1 * l**(a - 1), n**-1 * l**-a,   n),
            "hidden_bias_or_norm":  Row(1.0,           l**(a - 1),         n**-1 * l**-a,   1.0),
            "qk_norm":              Row(1.0,           l**(a - 1),         l**-a,           1.0),
            "final_norm":           Row(1.0,           1.0,                1.0,             1.0),
            "unembedding":          Row(n**-2,         n**-1,              1.0,             n),
        },
    )  # fmt: skip


def completep(n: float, l: float, a: float) -> Table:  # noqa: E741
    """CompleteP (arXiv 2505.01618) as in Table 1 of Complete(d)P, with a factor 1/n on the logits."""
    return Table(
        residual=l**-a,
        logits=n**-1,
        rows={
            # class                     init variance  learning rate        AdamW ε          weight decay
            "input_embedding":      Row(1.0,           1.0,                1.0,             1.0),
            "hidden_weight":        Row(n**-1,         n**-1 * l**(a - 1), n**-1 * l**-a,   n),
            "hidden_bias_or_norm":  Row(1.0,           l**(a - 1),         n**-1 * l**-a,   1.0),
            "qk_norm":              Row(1.0,           l**(a - 1),         n**-1 * l**-a,   1.0),
            "final_norm":           Row(1.0,           1.0,                1.0,             1.0),
            "unembedding":          Row(1.0,           1.0,                1.0,             n),
        },
    )  # fmt: skip


def mup(n: float, l: float, a: float) -> Table:  # noqa: E741
    """μP (arXiv 2203.03466) as in Table 1 of Complete(d)P: its column without the factors that depend on depth."""
    rows = completed_p(n, 1.0, a).rows
    return Table({**rows, "qk_norm": rows["hidden_bias_or_norm"]})


def standard(n: float, l: float, a: float) -> Table:  # noqa: E741
    """Standard parametrization: initial variance 1 / fan-in; the same learning rate, ε and weight decay for all."""
    same = Row(1.0, 1.0, 1.0, 1.0)
    shrinking = Row(n**-1, 1.0, 1.0, 1.0)
    return Table({name: shrinking if name in ("hidden_weight", "unembedding") else same for name in PARAMETER_CLASSES})


PARAMETRIZATIONS: dict[ParametrizationKind, Callable[[float, float, float], Table]] = {
    "completed_p": completed_p,
    "completep": completep,
    "mup": mup,
    "standard": standard,
}
"""Parametrization → its table as a function of n, l and α."""

MODULES: dict[str, ParameterClass] = {
    "embedding": "input_embedding",
    "place_range": "input_embedding",
    "place_scale": "input_embedding",
    "place_map": "input_embedding",
    "attention_norm": "hidden_bias_or_norm",
    "query": "hidden_weight",
    "key": "hidden_weight",
    "value": "hidden_weight",
    "query_bias": "hidden_bias_or_norm",
    "key_bias": "hidden_bias_or_norm",
    "value_bias": "hidden_bias_or_norm",
    "query_norm": "qk_norm",
    "key_norm": "qk_norm",
    "out": "hidden_weight",
    "mlp_norm": "hidden_bias_or_norm",
    "gate": "hidden_weight",
    "up": "hidden_weight",
    "down": "hidden_weight",
    "final_norm": "final_norm",
    "unembedding": "unembedding",
}
"""Name of every kind of parameter → its class."""

BRANCHES = {"attention": "out", "mlp": "down"}
"""Name of every residual branch of a block → the module of its last matrix."""


@dataclass(frozen=True, kw_only=True)
class Family(Checked):
    """Multipliers of one hyperparameter: ζ = of[module] · depth(x) at relative depth x, interpolated log-linearly."""

    of: dict[str, NonNegative] = field(default_factory=dict)
    """Factor for each module; 1 for modules that are not listed."""
    depth: tuple[Positive, ...] = ()
    """Factors at equal distances over the depth, for modules inside blocks; block k of L blocks is at depth (k +
    ½)/L."""

    def __post_init__(self):
        super().__post_init__()
        object.__setattr__(self, "of", {current_name("parameter", name): value for name, value in self.of.items()})

    def at(self, module: str, relative_depth: float | None) -> float:
        """ζ of a module in a block at `relative_depth` in (0, 1); None: the module is outside the blocks."""
        factor = self.of.get(module, 1.0)
        if relative_depth is None or not self.depth:
            return factor
        return factor * float(np.exp(np.interp(relative_depth, np.linspace(0, 1, len(self.depth)), np.log(self.depth))))


@dataclass(frozen=True, kw_only=True)
class ModuleMultipliers:
    """Per-module multipliers, tuned on the base network and applied on top of the table's (Complete(d)P, section 4)."""

    learning_rate: Family = Family()
    """Multipliers of the learning rate."""
    beta1: Family = Family()
    """Exponents of β1: a module's β1 is β1^ζ, so that ζ scales 1 − β1 to first order."""
    beta2: Family = Family()
    """Exponents of β2: a module's β2 is β2^ζ."""
    epsilon: Family = Family()
    """Multipliers of AdamW's ε."""
    weight_decay: Family = Family()
    """Multipliers of the weight decay."""
    init: Family = Family()
    """Multipliers of the standard deviation of initial weights; norms and biases always start at 1 and 0."""
    residual: Family = Family()
    """Multipliers of the residual branches, whose modules are called attention and mlp."""

    def __post_init__(self):
        for name, family in vars(self).items():
            known = BRANCHES if name == "residual" else MODULES
            unknown = set(family.of) - set(known)
            if 0 in family.of.values() and name != "weight_decay":
                raise ValueError(f"multipliers.{name} must be positive, got {family.of}")
            if unknown:
                raise ValueError(
                    f"multipliers.{name} has unknown modules {', '.join(sorted(unknown))}; known are {', '.join(known)}"
                )


@dataclass(frozen=True, kw_only=True)
class ParametrizationConfig(Checked):
    """Base network from which hyperparameters are transferred, and the rules of the transfer."""

    kind: ParametrizationKind = "completed_p"
    """Parametrization, that is, the table of scaling factors."""
    base_width: Size | None = None
    """Width of the base network, on which hyperparameters were tuned. None: the model's width."""
    base_layers: Size | None = None
    """Number of blocks of the base network. None: the model's."""
    base_heads: Size | None = None
    """Number of heads of the base network, of the model's head size. None: in proportion to the width."""
    base_mlp_width: Size | None = None
    """Hidden width of the base network's SwiGLU. None: in proportion to the width, or its default if the model uses
    that."""
    alpha: Annotated[float, real(0.5, 1)] = 1.0
    """Residual exponent α, between 0.5 and 1."""
    multipliers: ModuleMultipliers = ModuleMultipliers()
    """Per-module multipliers tuned on the base network."""


AT_BASE = ParametrizationConfig()
"""For a network whose hyperparameters were tuned on itself: every factor is 1."""


@dataclass(frozen=True)
class Multipliers:
    """Factors on the optimizer's global hyperparameters for one parameter: the table's times its module's."""

    learning_rate: float = 1.0
    beta1: float = 1.0
    """Exponent of β1: the parameter's own β1 is the global β1 to this power."""
    beta2: float = 1.0
    """Exponent of β2: the parameter's own β2 is the global β2 to this power."""
    epsilon: float = 1.0
    weight_decay: float = 1.0


@dataclass(frozen=True)
class Initializer:
    """Creates parameters with initial values and multipliers, given a network's ratios to its base network."""

    config: ParametrizationConfig
    width_ratio: float
    """m_N of the residual stream: width / width of the base network."""
    depth_ratio: float
    """m_L: number of blocks / number of blocks of the base network."""
    relative_depth: float | None = None
    """Relative depth of the block whose parameters are created, in (0, 1); None outside blocks."""

    def for_block(self, number: int, num_layers: int) -> "Initializer":
        """The initializer for the parameters of block `number`, counted from 0."""
        return replace(self, relative_depth=(number + 0.5) / num_layers)

    def table(self, ratio: float | None = None) -> Table:
        """The table for a tensor whose fan-in is `ratio` times that in the base network; None: the ratio of widths."""
        return PARAMETRIZATIONS[self.config.kind](
            self.width_ratio if ratio is None else ratio, self.depth_ratio, self.config.alpha
        )

    def normal(
        self, key: jax.Array, shape: tuple[int, ...], module: str, base_scale: float, ratio: float | None = None
    ) -> nnx.Param:
        """A normally distributed parameter; `base_scale` is its standard deviation in the base network."""
        variance = self.table(ratio).rows[MODULES[module]].init_variance
        scale = (
            base_scale
            * variance**0.5
            * self.config.multipliers.init.at(module, self.relative_depth)
            * self._branch(module)
        )
        return self.constant(scale * jax.random.normal(key, shape), module, ratio)

    def matrix(self, key: jax.Array, shape: tuple[int, ...], module: str, fan_in: int, base_fan_in: int) -> nnx.Param:
        """A normally distributed parameter, with variance 1 / fan-in in the base network."""
        return self.normal(key, shape, module, base_fan_in**-0.5, fan_in / base_fan_in)

    def constant(self, value: jax.Array, module: str, ratio: float | None = None) -> nnx.Param:
        """A parameter with initial value `value`."""
        row, tuned = self.table(ratio).rows[MODULES[module]], self.config.multipliers
        multipliers = Multipliers(
            learning_rate=row.learning_rate
            * tuned.learning_rate.at(module, self.relative_depth)
            * self._branch(module),
            beta1=tuned.beta1.at(module, self.relative_depth),
            beta2=tuned.beta2.at(module, self.relative_depth),
            epsilon=row.epsilon * tuned.epsilon.at(module, self.relative_depth) / self._branch(module),
            weight_decay=row.weight_decay * tuned.weight_decay.at(module, self.relative_depth) / self._branch(module),
        )
        return nnx.Param(value, module=module, multipliers=multipliers)

    def _branch(self, module: str) -> float:
        """ζ of the residual branch whose last matrix is `module`; 1 for all other modules."""
        family = self.config.multipliers.residual
        return next((family.at(name, self.relative_depth) for name, last in BRANCHES.items() if last == module), 1.0)

    def logits(self, is_tied: bool) -> float:
        """Factor on the logits."""
        return self.width_ratio**-1 if is_tied and self.config.kind != "standard" else self.table().logits


def parameter_modules(model: nnx.Module) -> Any:
    """Name in `MODULES` of every parameter, as a tree like `nnx.to_pure_dict(nnx.state(model))`."""
    return _metadata(model, "module")


def parameter_multipliers(model: nnx.Module) -> Any:
    """`Multipliers` of every parameter, as a tree like `nnx.to_pure_dict(nnx.state(model))`."""
    return _metadata(model, "multipliers")


def without_multipliers(model: nnx.Module) -> nnx.Module:
    """The model without the `Multipliers` of its parameters, so that networks that compute the same are equal."""
    for parameter in jax.tree.leaves(nnx.state(model, nnx.Param), is_leaf=lambda x: isinstance(x, nnx.Variable)):
        parameter.del_metadata("multipliers")
    return model


def _metadata(model: nnx.Module, name: str) -> Any:
    state = nnx.state(model, nnx.Param)
    values = jax.tree.map(lambda p: getattr(p, name), state, is_leaf=lambda x: isinstance(x, nnx.Variable))
    return nnx.to_pure_dict(values)
