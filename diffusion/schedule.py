"""Noise schedules: the share α(t) of tokens that is kept, from α(0) = 1 (clean) to α(1) = 0 (all masked).

Only α, or the masked share 1 − α, is written down; the derivative comes from autodiff. The negative ELBO of masked
diffusion is

    L = E_t Σ_{i masked} w(t) · (−log p(x_i | x_t)),   w(t) = −α′(t) / (1 − α(t))

(MDLM, arXiv 2406.07524, eq. 11; MD4, arXiv 2406.04329, eq. 9). Of a complementary pair, the complement masks with
probability α(t), so its weight is −α′(t) / α(t): the same integral after the change of variable α → 1 − α. A schedule
may differ between modalities, so α and the weights are those of a token: at its time and of its modality.

Two schedules are called "cosine" in the literature, so both names say whose they are.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from trimask.tokenizers.storage.ranges import Checked, Positive, real
from trimask.tokenizers.vocabulary import Vocabulary

MaskedShare = Callable[[Float[Array, "*shape"], Int[Array, "*shape"]], Float[Array, "*shape"]]
"""Times of tokens and the numbers of their modalities → shares."""


@dataclass(frozen=True)
class Schedule:
    """A share of tokens over time, of which all else follows."""

    share: MaskedShare
    """α, which falls from 1 to 0 in t; or, if `is_masked_share`, 1 − α, which rises from 0 to 1."""
    is_masked_share: bool = False
    """Where 1 − α is small, it has more digits if it is given than as a difference from 1."""

    def kept(self, times: Float[Array, "*shape"], modality: Int[Array, "*shape"]) -> Float[Array, "*shape"]:
        """α(t), the probability that a token is kept."""
        share = self.share(times, modality)
        return 1 - share if self.is_masked_share else share

    def masked(self, times: Float[Array, "*shape"], modality: Int[Array, "*shape"]) -> Float[Array, "*shape"]:
        """1 − α(t), the probability that a token is masked."""
        share = self.share(times, modality)
        return share if self.is_masked_share else 1 - share

    def slope(self, times: Float[Array, "*shape"], modality: Int[Array, "*shape"]) -> Float[Array, "*shape"]:
        """−α′(t), not negative."""
        derivative = jax.jvp(lambda t: self.share(t, modality), (times,), (jnp.ones_like(times),))[1]
        return derivative if self.is_masked_share else -derivative

    def weight(self, times: Float[Array, "*shape"], modality: Int[Array, "*shape"]) -> Float[Array, "*shape"]:
        """w(t) = −α′/(1 − α), the ELBO's weight of a masked token; 1/t for the linear schedule."""
        return _ratio(self.slope(times, modality), self.masked(times, modality))

    def complementary_weight(
        self, times: Float[Array, "*shape"], modality: Int[Array, "*shape"]
    ) -> Float[Array, "*shape"]:
        """−α′/α, the weight where the complement of a mask is masked; 1/(1 − t) for the linear schedule."""
        return _ratio(self.slope(times, modality), self.kept(times, modality))


def _ratio(slope, probability):
    """slope / probability, and 0 where the probability is rounded to 0: nothing is masked there."""
    return jnp.where(probability > 0, slope / jnp.where(probability > 0, probability, 1.0), 0.0)


SCHEDULES: dict[str, Callable[["ScheduleConfig", Vocabulary], Schedule]] = {
    "linear": lambda config, _: Schedule(lambda t, _: 1 - t),
    "cosine_md4": lambda config, _: Schedule(lambda t, _: 1 - jnp.cos(jnp.pi / 2 * (1 - t))),
    "cosine_mdlm": lambda config, _: Schedule(lambda t, _: jnp.cos(jnp.pi / 2 * t)),
    "polynomial": lambda config, _: Schedule(lambda t, _: 1 - t**config.power),
}
"""Kind → the schedule of a configuration and a vocabulary, which numbers the modalities."""

if TYPE_CHECKING:
    Kind = str
else:
    Kind = Literal[tuple(SCHEDULES)]  # `--help` and errors list the table


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig(Checked):
    """Which α(t)."""

    kind: Kind = "linear"
    """linear 1 − t; cosine_md4 1 − cos(π/2·(1 − t)); cosine_mdlm cos(π/2·t); polynomial 1 − t^power."""
    power: Positive = 2.0
    """Exponent of the polynomial schedule."""
    min_time: Annotated[float, real(above=0, below=0.5)] = 1e-3
    """Times are uniform in [min_time, 1 − min_time], which bounds the weights; the bound is the mean over these."""

    def __post_init__(self):
        super().__post_init__()

    def of(self, vocabulary: Vocabulary) -> Schedule:
        """The schedule, for tokens of this vocabulary."""
        return SCHEDULES[self.kind](self, vocabulary)


def stratified_times(
    offset: Float[Array, ""], share: Float[Array, "*shape"], min_time: float
) -> Float[Array, "*shape"]:
    """t = (u + share) mod 1 in [min_time, 1 − min_time]: one u ~ U[0, 1) for a batch spread by each item's share.

    With share = i/n this is MD4's antithetic sampling; `masking.forward_process` passes shares of tokens.
    """
    return min_time + (1 - 2 * min_time) * ((offset + share) % 1)
