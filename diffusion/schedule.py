"""Noise schedules: the probability α(t) that a token is kept, from α(0) = 1 (clean) to α(1) = 0 (all masked).

Only α is written down; its derivative comes from autodiff. The negative ELBO of masked diffusion is

    L = E_t Σ_{i masked} w(t) · (−log p(x_i | x_t)),   w(t) = −α′(t) / (1 − α(t))

(MDLM, arXiv 2406.07524, eq. 11; MD4, arXiv 2406.04329, eq. 9). Of a complementary pair, the complement masks with
probability α(t), so its weight is −α′(t) / α(t): the same integral after the change of variable α → 1 − α.

Two schedules are called "cosine" in the literature, so both names say whose they are.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

Kind = Literal["linear", "cosine_md4", "cosine_mdlm", "polynomial"]

Alpha = Callable[[Float[Array, "*shape"]], Float[Array, "*shape"]]


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """Which α(t)."""

    kind: Kind = "linear"
    """linear 1 − t; cosine_md4 1 − cos(π/2·(1 − t)); cosine_mdlm cos(π/2·t); polynomial 1 − t^power."""
    power: float = 2.0
    """Exponent of the polynomial schedule."""
    min_time: float = 1e-3
    """Times are uniform in [min_time, 1 − min_time], which bounds the weights; the bound is the mean over these."""

    def __post_init__(self):
        if self.power <= 0:
            raise ValueError(f"power must be positive, got {self.power}")
        if not 0 < self.min_time < 0.5:
            raise ValueError(f"min_time must lie in (0, 0.5), got {self.min_time}")

    @property
    def alpha(self) -> Alpha:
        """The schedule as a function of t."""
        return _ALPHAS[self.kind](self)


_ALPHAS: dict[str, Callable[[ScheduleConfig], Alpha]] = {
    "linear": lambda _: lambda t: 1 - t,
    "cosine_md4": lambda _: lambda t: 1 - jnp.cos(jnp.pi / 2 * (1 - t)),
    "cosine_mdlm": lambda _: lambda t: jnp.cos(jnp.pi / 2 * t),
    "polynomial": lambda config: lambda t: 1 - t**config.power,
}


def alpha_derivative(alpha: Alpha, times: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """α′(t), negative."""
    return jax.jvp(alpha, (times,), (jnp.ones_like(times),))[1]


def elbo_weight(alpha: Alpha, times: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """w(t) = −α′/(1 − α); 1/t for the linear schedule."""
    return _ratio(-alpha_derivative(alpha, times), 1 - alpha(times))


def complementary_elbo_weight(alpha: Alpha, times: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """−α′/α, the weight where the complement of a mask is masked; 1/(1 − t) for the linear schedule."""
    return _ratio(-alpha_derivative(alpha, times), alpha(times))


def _ratio(slope, probability):
    """slope / probability, and 0 where the probability is rounded to 0: nothing is masked there."""
    return jnp.where(probability > 0, slope / jnp.where(probability > 0, probability, 1.0), 0.0)


def stratified_times(
    offset: Float[Array, ""], share: Float[Array, "*shape"], min_time: float
) -> Float[Array, "*shape"]:
    """t = (u + share) mod 1 in [min_time, 1 − min_time]: one u ~ U[0, 1) for a batch spread by each item's share.

    With share = i/n this is MD4's antithetic sampling; `masking.forward_process` passes shares of tokens.
    """
    return min_time + (1 - 2 * min_time) * ((offset + share) % 1)
