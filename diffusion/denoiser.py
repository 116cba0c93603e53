"""The denoiser interface, which is all that sampling, likelihoods, environments and policies know of a model."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Protocol, runtime_checkable

import jax
from jaxtyping import Array, Float, Int

from trimask.tokenizers.sequence import TokenRows

KeysValues = tuple[Float[Array, "rows seq kv_heads head"], Float[Array, "rows seq kv_heads head"]]
"""Keys and values of one block. Its rows are those of the batch; with guidance there are twice as many."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class DenoiserOutput:
    """What a denoiser returns, for all positions or for the requested ones.

    Logits over a large vocabulary take much memory, so they are computed on demand: `read` turns features, for example
    those of a few positions, into logits.
    """

    features: Any
    """Tree of arrays [batch, positions, …]: the input of `read` for each position."""
    read: Callable[[Any], Float[Array, "*shape vocab"]]
    """Maps features to logits. A `jax.tree_util.Partial`, whose arrays are weights."""
    hidden: Float[Array, "batch positions width"]
    """Hidden states after the final norm, before the unembedding."""
    cache: tuple[KeysValues, ...]
    """Keys and values of all positions, per block."""
    num_passes: Int[Array, "*batch"] | int = 1
    """Number of forward passes taken; 2 with guidance."""

    @property
    def logits(self) -> Float[Array, "batch positions vocab"]:
        """Logits of all returned positions."""
        return self.read(self.features)

    def first(self, count: int) -> "DenoiserOutput":
        """The output for the first `count` of the returned positions."""
        features, hidden = jax.tree.map(lambda x: x[:, :count], (self.features, self.hidden))
        return replace(self, features=features, hidden=hidden)


Cache = Any
"""Keys and values returned by an earlier call of a denoiser; None before the first call."""


@runtime_checkable
class Denoiser(Protocol):
    """A function from partially masked rows to logits of the clean tokens."""

    def __call__(
        self, sequence: TokenRows, positions: Int[Array, "batch positions"] | None = None, cache: Any = None
    ) -> DenoiserOutput:
        """Returns logits of the clean token at every position, or only at `positions`.

        With a `cache`, only `positions` are computed, from the cached keys and values of all others.
        """
        ...
