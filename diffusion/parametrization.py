"""How hyperparameters tuned on a small network are used on a large one: Table 1 of Complete(d)P (arXiv 2512.22382).

    n = m_N = a tensor's fan-in / its fan-in in the base network         (of vectors and embeddings: the width's ratio)
    l = m_L = number of blocks / the base's                              h ← h + l^−α · f(h)

`base` is the network that was tuned. At its own shape every factor is 1, so that all tables agree there. Every
parameter is born at a `Site`, with its factors as metadata (`multipliers`); the optimizer needs nothing else.

What the paper leaves open, and what is done here:

1. CompleteP and μP do not treat QK norms: there they are taken for other hidden norms.
2. A tied unembedding has no row: it is an input embedding, and its logits are multiplied by 1/n, CompleteP's way.
3. The relative depth of block k among L, at which per-module multipliers are interpolated, is (k + ½) / L.
4. Clipping by the global norm is not scaled, although the norm changes with the shape.
5. A tuned multiplier ζ of a residual branch is put into its last matrix: initial weights and learning rate times ζ, ε
   and λ divided by it. That is the same function of the data, trained the same way up to clipping, and needs no
   other network, so that a search over ζ compiles once. The table's m_L^−α stands in the forward pass.
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
    """Factors on what was tuned at the base shape, for one class of parameters."""

    init_variance: float
    learning_rate: float
    epsilon: float
    """On AdamW's ε."""
    weight_decay: float
    """On the decoupled λ; a step shrinks weights by learning rate × λ."""


@dataclass(frozen=True)
class Table:
    """A parametrization at one ratio of shapes."""

    rows: Mapping[ParameterClass, Row]
    residual: float = 1.0
    """On the output of each branch, attention and MLP."""
    logits: float = 1.0
    """On the output of the unembedding."""


def completed_p(n: float, l: float, a: float) -> Table:  # noqa: E741
    """Complete(d)P: n = m_N, l = m_L, a = α, the residual exponent."""
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
    """CompleteP (arXiv 2505.01618), as Table 1 compares it: the readout has a multiplier in the forward pass."""
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
    """μP (arXiv 2203.03466): the same without what depends on depth."""
    return completep(n, 1.0, a)


def standard(n: float, l: float, a: float) -> Table:  # noqa: E741
    """The usual: variances 1 / fan-in, and one learning rate, ε and decay for all."""
    same = Row(1.0, 1.0, 1.0, 1.0)
    shrinking = Row(n**-1, 1.0, 1.0, 1.0)
    return Table({name: shrinking if name in ("hidden_weight", "unembedding") else same for name in PARAMETER_CLASSES})


TABLES: dict[ParametrizationKind, Callable[[float, float, float], Table]] = {
    "completed_p": completed_p,
    "completep": completep,
    "mup": mup,
    "standard": standard,
}

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
"""Every kind of parameter, and its class."""

BRANCHES = {"attention": "out", "mlp": "down"}
"""The residual branches of a block, and the last matrix of each."""


@dataclass(frozen=True, kw_only=True)
class Family(Checked):
    """Multipliers of one hyperparameter: ζ = of[module] · depth(x) at relative depth x, log-linear in between."""

    of: dict[str, NonNegative] = field(default_factory=dict)
    """Module → factor; 1 where none is given."""
    depth: tuple[Positive, ...] = ()
    """Factors at equal distances over the depth, for modules inside blocks; block k of L is at (k + ½)/L of it."""

    def __post_init__(self):
        super().__post_init__()
        object.__setattr__(self, "of", {current_name("parameter", name): value for name, value in self.of.items()})

    def at(self, module: str, relative_depth: float | None) -> float:
        """ζ of a module whose block is at `relative_depth` in (0, 1); None outside blocks."""
        factor = self.of.get(module, 1.0)
        if relative_depth is None or not self.depth:
            return factor
        return factor * float(np.exp(np.interp(relative_depth, np.linspace(0, 1, len(self.depth)), np.log(self.depth))))


@dataclass(frozen=True, kw_only=True)
class ModuleMultipliers:
    """Per-module multipliers, tuned at the base shape; the table's factors come on top (Complete(d)P, section 4)."""

    learning_rate: Family = Family()
    """On the learning rate."""
    beta1: Family = Family()
    """Exponents: a module's β1 is β1^ζ, so that ζ scales 1 − β1 to first order."""
    beta2: Family = Family()
    """Exponents of β2."""
    epsilon: Family = Family()
    """On AdamW's ε."""
    weight_decay: Family = Family()
    """On the weight decay."""
    init: Family = Family()
    """On the standard deviation of initial weights; norms and biases start at 1 and 0 whatever it says."""
    residual: Family = Family()
    """On residual branches, whose modules are called attention and mlp."""

    def __post_init__(self):
        for name, family in vars(self).items():
            known = BRANCHES if name == "residual" else MODULES
            unknown = set(family.of) - set(known)
            if 0 in family.of.values() and name != "weight_decay":
                raise ValueError(f"multipliers.{name} must be positive, got {family.of}")
            if unknown:
                raise ValueError(f"multipliers.{name} of unknown {', '.join(sorted(unknown))}; has {', '.join(known)}")


@dataclass(frozen=True, kw_only=True)
class ParametrizationConfig(Checked):
    """From which shape hyperparameters are transferred, and how."""

    kind: ParametrizationKind = "completed_p"
    """The table."""
    base_width: Size | None = None
    """Width of the network that was tuned. None: the model's own."""
    base_layers: Size | None = None
    """Its blocks. None: as many as the model has."""
    base_heads: Size | None = None
    """Its heads, of the model's head size. None: in proportion to the width."""
    base_mlp_width: Size | None = None
    """Hidden size of its SwiGLU. None: what its width makes of the model's."""
    alpha: Annotated[float, real(0.5, 1)] = 1.0
    """Residual exponent α in [½, 1]."""
    multipliers: ModuleMultipliers = ModuleMultipliers()
    """Per-module multipliers that were tuned at the base shape."""


AT_BASE = ParametrizationConfig()
"""A network that was itself tuned: every factor is 1."""


@dataclass(frozen=True)
class Multipliers:
    """Factors on the optimizer's global values for one parameter: the table's, times those of its module."""

    learning_rate: float = 1.0
    beta1: float = 1.0
    """An exponent."""
    beta2: float = 1.0
    """An exponent."""
    epsilon: float = 1.0
    weight_decay: float = 1.0


@dataclass(frozen=True)
class Site:
    """Where parameters are born: a network's ratios to its base, and the relative depth of the block."""

    config: ParametrizationConfig
    width_ratio: float
    """m_N of the residual stream."""
    depth_ratio: float
    """m_L."""
    relative_depth: float | None = None

    def block(self, number: int, num_layers: int) -> "Site":
        """The site of one block."""
        return replace(self, relative_depth=(number + 0.5) / num_layers)

    def table(self, ratio: float | None = None) -> Table:
        """The table for a tensor whose fan-in is `ratio` times the base's; None: as the width's."""
        return TABLES[self.config.kind](
            self.width_ratio if ratio is None else ratio, self.depth_ratio, self.config.alpha
        )

    def normal(
        self, key: jax.Array, shape: tuple[int, ...], module: str, base_scale: float, ratio: float | None = None
    ) -> nnx.Param:
        """Normally distributed; `base_scale` is the standard deviation in the base network."""
        variance = self.table(ratio).rows[MODULES[module]].init_variance
        scale = (
            base_scale
            * variance**0.5
            * self.config.multipliers.init.at(module, self.relative_depth)
            * self._branch(module)
        )
        return self.constant(scale * jax.random.normal(key, shape), module, ratio)

    def matrix(self, key: jax.Array, shape: tuple[int, ...], module: str, fan_in: int, base_fan_in: int) -> nnx.Param:
        """Normally distributed with variance 1 / fan-in in the base network."""
        return self.normal(key, shape, module, base_fan_in**-0.5, fan_in / base_fan_in)

    def constant(self, value: jax.Array, module: str, ratio: float | None = None) -> nnx.Param:
        """A parameter that starts at `value`."""
        row, of = self.table(ratio).rows[MODULES[module]], self.config.multipliers
        multipliers = Multipliers(
            learning_rate=row.learning_rate * of.learning_rate.at(module, self.relative_depth) * self._branch(module),
            beta1=of.beta1.at(module, self.relative_depth),
            beta2=of.beta2.at(module, self.relative_depth),
            epsilon=row.epsilon * of.epsilon.at(module, self.relative_depth) / self._branch(module),
            weight_decay=row.weight_decay * of.weight_decay.at(module, self.relative_depth) / self._branch(module),
        )
        return nnx.Param(value, module=module, multipliers=multipliers)

    def _branch(self, module: str) -> float:
        """ζ of the residual branch that this module ends; 1 for the others."""
        family = self.config.multipliers.residual
        return next((family.at(name, self.relative_depth) for name, last in BRANCHES.items() if last == module), 1.0)

    def logits(self, is_tied: bool) -> float:
        """The factor on the logits."""
        return self.width_ratio**-1 if is_tied and self.config.kind != "standard" else self.table().logits


def parameter_modules(model: nnx.Module) -> Any:
    """The name in `MODULES` of every parameter, as a tree like `nnx.to_pure_dict(nnx.state(model))`."""
    return _metadata(model, "module")


def parameter_multipliers(model: nnx.Module) -> Any:
    """The `Multipliers` of every parameter, as a tree like `nnx.to_pure_dict(nnx.state(model))`."""
    return _metadata(model, "multipliers")


def without_multipliers(model: nnx.Module) -> nnx.Module:
    """The model, whose parameters have no `Multipliers` any more: networks that compute the same are then equal."""
    for parameter in jax.tree.leaves(nnx.state(model, nnx.Param), is_leaf=lambda x: isinstance(x, nnx.Variable)):
        parameter.del_metadata("multipliers")
    return model


def _metadata(model: nnx.Module, name: str) -> Any:
    state = nnx.state(model, nnx.Param)
    found = jax.tree.map(lambda p: getattr(p, name), state, is_leaf=lambda x: isinstance(x, nnx.Variable))
    return nnx.to_pure_dict(found)
