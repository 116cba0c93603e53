"""Noise schedules: the probability s(t) = 1 − α(t) that a token is masked, from s(0) = 0 (clean) to s(1) = 1 (all).

The negative ELBO of masked diffusion is

    L = E_t Σ_{i masked} w(t) · (−log p(x_i | x_t)),   w(t) = s′(t) / s(t)

(MDLM, arXiv 2406.07524, eq. 11; MD4, arXiv 2406.04329, eq. 9). In a complementary pair, the second mask masks with
probability 1 − s(t), so its weight is s′(t) / (1 − s(t)): the same integral after the change of variable s → 1 − s.

A weight grows without bound where its probability vanishes, so the integral over s is cut off at ε and 1 − ε, for every
schedule alike: t is uniform in [t₀, t₁], where s(t₀) = ε and s(t₁) = 1 − ε, and the weights are multiplied by
(t₁ − t₀) / (1 − 2ε). They are largest at the ends; for ε = 0.001:

    schedule                    linear    cosine_md4    cosine_mdlm    polynomial (power 2)
    largest w(t)                 1,000         1,528             68                      61
    largest of the complement    1,000            68          1,528                   1,939

A schedule is s and its inverse; the derivative is computed by autodiff. Modalities may have schedules of their own, so
s and the weights are functions of a token's time and modality. Two schedules are called "cosine" in the literature; the
two names here say whose they are.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from trimask.tokenizers.storage.ranges import Checked, Positive, real

Curve = Callable[[Float[Array, "*shape"]], Float[Array, "*shape"]]
"""Function of a number per token: of a time, or of a masked share."""

SCHEDULES: dict[str, Callable[["ScheduleConfig"], tuple[Curve, Curve]]] = {
    "linear": lambda config: (lambda t: t, lambda s: s),
    "cosine_md4": lambda config: (
        lambda t: jnp.sin(jnp.pi / 2 * t),
        lambda s: 2 / jnp.pi * jnp.arcsin(s),
    ),
    "cosine_mdlm": lambda config: (
        lambda t: 2 * jnp.sin(jnp.pi / 4 * t) ** 2,
        lambda s: 4 / jnp.pi * jnp.arcsin(jnp.sqrt(s / 2)),
    ),
    "polynomial": lambda config: (lambda t: t**config.power, lambda s: s ** (1 / config.power)),
}
"""Schedule kind → function of the configuration that returns s(t) and t(s)."""

if TYPE_CHECKING:
    ScheduleKind = str
else:
    ScheduleKind = Literal[tuple(SCHEDULES)]  # `--help` and errors list the table


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig(Checked):
    """Configuration of the noise schedule."""

    kind: ScheduleKind = "linear"
    """Formula of the masked share s(t) = 1 − α(t): t (linear), sin(π/2·t) (cosine_md4), 1 − cos(π/2·t) (cosine_mdlm) or
    t^power (polynomial)."""
    power: Positive = 2.0
    """Exponent of the polynomial schedule."""
    min_share: Annotated[float, real(above=0, below=0.5)] = 1e-3
    """Smallest masked share, and smallest kept share, of the times that are drawn; it bounds the loss weights."""

    def __post_init__(self):
        super().__post_init__()

    @property
    def masked_share(self) -> Curve:
        """s(t), the probability that a token is masked, which rises from 0 to 1."""
        return SCHEDULES[self.kind](self)[0]

    @property
    def time_of(self) -> Curve:
        """t(s), the inverse of s(t)."""
        return SCHEDULES[self.kind](self)[1]

    @property
    def power_of_time(self) -> float | None:
        """The exponent if s(t) is a power of t; else None."""
        return {"linear": 1.0, "polynomial": self.power}.get(self.kind)


@dataclass(frozen=True)
class Schedule:
    """The noise schedules of all modalities, as functions of a time per token and of the token's modality number."""

    of_modality: tuple[ScheduleConfig, ...]
    """Schedule of every modality, by its number."""

    @property
    def is_linear(self) -> bool:
        """Whether all schedules are s(t) = t."""
        return all(config.power_of_time == 1 for config in self.of_modality)

    def mask_probability(self, times: Float[Array, "*shape"], modality: Int[Array, "*shape"]) -> Float[Array, "*shape"]:
        """s(t), the probability that a token is masked, which rises from 0 to 1."""
        return self._selected(lambda config: config.masked_share(times), modality)

    def times(self, share: Float[Array, "*shape"], modality: Int[Array, "*shape"]) -> Float[Array, "*shape"]:
        """Times at this share of the interval [t₀, t₁], where a share of 0 is t₀ and a share of 1 is t₁."""
        first, last = self._ends(modality)
        return first + (last - first) * share

    def slope(self, times: Float[Array, "*shape"], modality: Int[Array, "*shape"]) -> Float[Array, "*shape"]:
        """s′(t), which is not negative."""
        return jax.jvp(lambda t: self.mask_probability(t, modality), (times,), (jnp.ones_like(times),))[1]

    def weight(self, times: Float[Array, "*shape"], modality: Int[Array, "*shape"]) -> Float[Array, "*shape"]:
        """w(t) = s′/s · (t₁ − t₀)/(1 − 2ε), the weight of a masked token in the ELBO; 1/t for the linear schedule."""
        return self._scaled_slope(times, modality) / self.mask_probability(times, modality)

    def complementary_weight(
        self, times: Float[Array, "*shape"], modality: Int[Array, "*shape"]
    ) -> Float[Array, "*shape"]:
        """s′/(1 − s) · (t₁ − t₀)/(1 − 2ε), the weight of a token masked by the complementary mask."""
        return self._scaled_slope(times, modality) / (1 - self.mask_probability(times, modality))

    def _scaled_slope(self, times, modality):
        first, last = self._ends(modality)
        integral = self._selected(lambda config: jnp.full(modality.shape, 1 - 2 * config.min_share), modality)
        return self.slope(times, modality) * (last - first) / integral

    def _ends(self, modality):
        """t₀ and t₁ of each token."""

        def end(share):
            return self._selected(lambda config: config.time_of(jnp.full(modality.shape, share(config))), modality)

        return end(lambda config: config.min_share), end(lambda config: 1 - config.min_share)

    def _selected(self, function, modality):
        """`function` of the schedule of each token's modality."""
        values: dict[ScheduleConfig, Array] = {}
        for config in self.of_modality:
            values.setdefault(config, function(config))
        default, *others = values
        result = values[default]
        for config in others:
            numbers = [number for number, own in enumerate(self.of_modality) if own == config]
            result = jnp.where(jnp.isin(modality, jnp.array(numbers)), values[config], result)
        return result


LINEAR, COSINE = (Schedule((ScheduleConfig(kind=kind),)) for kind in ("linear", "cosine_md4"))
"""Schedules that are the same for all modalities."""


def stratified(offset: Float[Array, ""], share: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Evenly spread numbers (u + share) mod 1 in [0, 1), where u = `offset` ~ U[0, 1) is common to the batch.

    With share = i/n this is MD4's antithetic sampling of n items (arXiv 2406.04329); `masking.forward_process` passes
    shares of target tokens.
    """
    return (offset + share) % 1


def low_discrepancy_shares(
    number: Int[Array, " positions"], is_counted: Bool[Array, " positions"]
) -> Float[Array, " positions"]:
    """Share of the counted positions that come before each position when they are ordered by number · φ mod 1.

    φ = (√5 − 1) / 2 is the golden ratio, so the shares of consecutive numbers are spread evenly over [0, 1), however
    many there are (Kronecker sequence). Positions of the same number keep their order. Four numbers of one position:

        number             1     2     3     4
        number · φ mod 1   0.62  0.24  0.85  0.47
        rank               2     0     3     1
        share              0.5   0.0   0.75  0.25
    """
    # The fractional part of number · φ, exact in units of 2⁻³².
    order = jnp.argsort(number.astype(jnp.uint32) * jnp.uint32(2654435769), stable=True)
    in_order = is_counted[order]
    before = jnp.zeros_like(order).at[order].set(jnp.cumsum(in_order) - in_order)
    return before / jnp.maximum(is_counted.sum(), 1)
