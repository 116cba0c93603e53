"""What sampling, likelihoods, environments and policies know of a model: a callable, and what it returns."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Protocol, runtime_checkable

import jax
from jaxtyping import Array, Float, Int

from trimask.tokenizers.sequence import TokenRows

KeysValues = tuple[Float[Array, "rows seq kv_heads head"], Float[Array, "rows seq kv_heads head"]]
"""Rows are those of the batch; with guidance twice as many."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class DenoiserOutput:
    """What a denoiser returns, at all positions or at the ones asked for.

    Logits over a large vocabulary are long: `read` makes them of the features of some positions only, when they are
    wanted.
    """

    features: Any
    """A tree of arrays [batch, asked, …]: what `read` needs to know of a position."""
    read: Callable[[Any], Float[Array, "*shape vocab"]]
    """Features → logits. A `jax.tree_util.Partial`, whose arrays are weights."""
    hidden: Float[Array, "batch asked width"]
    """After the final norm, before the unembedding."""
    cache: tuple[KeysValues, ...]
    """Keys and values of all positions, per block."""
    num_passes: Int[Array, "*batch"] | int = 1
    """Forward passes it took; 2 with guidance."""

    @property
    def logits(self) -> Float[Array, "batch asked vocab"]:
        """At all of them."""
        return self.read(self.features)

    def first(self, count: int) -> "DenoiserOutput":
        """The same of the first `count` positions."""
        features, hidden = jax.tree.map(lambda x: x[:, :count], (self.features, self.hidden))
        return replace(self, features=features, hidden=hidden)


Cache = Any
"""Keys and values that a denoiser returned; None: no pass was made yet."""


@runtime_checkable
class Denoiser(Protocol):
    """What sampling, environments and policies know of a model."""

    def __call__(
        self, sequence: TokenRows, positions: Int[Array, "batch asked"] | None = None, cache: Any = None
    ) -> DenoiserOutput:
        """Logits of the clean token at every position, or only at those asked for."""
        ...
