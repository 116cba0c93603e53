"""Noise schedules: the probability α(t) that a token is kept, from α(0) = 1 (clean) to α(1) = 0 (all masked).

Only α, or the masked share 1 − α, is written down; its derivative is computed by autodiff. The negative ELBO of masked
diffusion is

    L = E_t Σ_{i masked} w(t) · (−log p(x_i | x_t)),   w(t) = −α′(t) / (1 − α(t))

(MDLM, arXiv 2406.07524, eq. 11; MD4, arXiv 2406.04329, eq. 9). In a complementary pair, the second mask masks with
probability α(t), so its weight is −α′(t) / α(t): the same integral after the change of variable α → 1 − α. Schedules
may differ between modalities, so α and the weights are functions of a token's time and modality.

Two schedules are called "cosine" in the literature; the two names here say whose they are.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from trimask.tokenizers.storage.ranges import Checked, Positive, real
from trimask.tokenizers.vocabulary import Vocabulary

MaskedShare = Callable[[Float[Array, "*shape"], Int[Array, "*shape"]], Float[Array, "*shape"]]
"""Maps times of tokens and their modality numbers to a share (probability)."""


@dataclass(frozen=True)
class Schedule:
    """A noise schedule, given by one function of time."""

    share: MaskedShare
    """α, which falls from 1 to 0 in t; or 1 − α, which rises from 0 to 1, if `is_masked_share`."""
    is_masked_share: bool = False
    """Whether `share` is 1 − α. Where 1 − α is small, giving it directly is more precise than subtracting α from 1."""

    def keep_probability(self, times: Float[Array, "*shape"], modality: Int[Array, "*shape"]) -> Float[Array, "*shape"]:
        """α(t), the probability that a token is kept."""
        share = self.share(times, modality)
        return 1 - share if self.is_masked_share else share

    def mask_probability(self, times: Float[Array, "*shape"], modality: Int[Array, "*shape"]) -> Float[Array, "*shape"]:
        """1 − α(t), the probability that a token is masked."""
        share = self.share(times, modality)
        return share if self.is_masked_share else 1 - share

    def slope(self, times: Float[Array, "*shape"], modality: Int[Array, "*shape"]) -> Float[Array, "*shape"]:
        """−α′(t), which is not negative."""
        derivative = jax.jvp(lambda t: self.share(t, modality), (times,), (jnp.ones_like(times),))[1]
        return derivative if self.is_masked_share else -derivative

    def weight(self, times: Float[Array, "*shape"], modality: Int[Array, "*shape"]) -> Float[Array, "*shape"]:
        """w(t) = −α′/(1 − α), the weight of a masked token in the ELBO; 1/t for the linear schedule."""
        return _ratio(self.slope(times, modality), self.mask_probability(times, modality))

    def complementary_weight(
        self, times: Float[Array, "*shape"], modality: Int[Array, "*shape"]
    ) -> Float[Array, "*shape"]:
        """−α′/α, the weight of a token masked by the complementary mask; 1/(1 − t) for the linear schedule."""
        return _ratio(self.slope(times, modality), self.keep_probability(times, modality))


def _ratio(slope, probability):
    """slope / probability, and 0 where the probability is 0: no token is masked there."""
    return jnp.where(probability > 0, slope / jnp.where(probability > 0, probability, 1.0), 0.0)


SCHEDULES: dict[str, Callable[["ScheduleConfig", Vocabulary], Schedule]] = {
    "linear": lambda config, _: Schedule(lambda t, _: 1 - t),
    "cosine_md4": lambda config, _: Schedule(lambda t, _: 1 - jnp.cos(jnp.pi / 2 * (1 - t))),
    "cosine_mdlm": lambda config, _: Schedule(lambda t, _: jnp.cos(jnp.pi / 2 * t)),
    "polynomial": lambda config, _: Schedule(lambda t, _: 1 - t**config.power),
}
"""Schedule kind → function of configuration and vocabulary that returns the schedule."""

if TYPE_CHECKING:
    ScheduleKind = str
else:
    ScheduleKind = Literal[tuple(SCHEDULES)]  # `--help` and errors list the table


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig(Checked):
    """Configuration of the noise schedule α(t)."""

    kind: ScheduleKind = "linear"
    """Formula of α(t): 1 − t (linear), 1 − cos(π/2·(1 − t)) (cosine_md4), cos(π/2·t) (cosine_mdlm) or 1 − t^power
    (polynomial)."""
    power: Positive = 2.0
    """Exponent of the polynomial schedule."""
    min_time: Annotated[float, real(above=0, below=0.5)] = 1e-3
    """Times are uniform in [min_time, 1 − min_time], which bounds the loss weights; the reported bound is a mean over
    this interval."""

    def __post_init__(self):
        super().__post_init__()

    def build(self, vocabulary: Vocabulary) -> Schedule:
        """The schedule for tokens of this vocabulary."""
        return SCHEDULES[self.kind](self, vocabulary)


def stratified_times(
    offset: Float[Array, ""], share: Float[Array, "*shape"], min_time: float
) -> Float[Array, "*shape"]:
    """Times t = (u + share) mod 1, scaled to [min_time, 1 − min_time]; u = `offset` ~ U[0, 1) is common to the batch.

    With share = i/n this is MD4's antithetic sampling of n items (arXiv 2406.04329); `masking.forward_process` passes
    shares of target tokens.
    """
    return min_time + (1 - 2 * min_time) * ((offset + share) % 1)


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
