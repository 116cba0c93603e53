"""Quantisers: latent vectors ↔ codes, behind one contract.

    quantize(latents)  →  Quantized(latents, codes, …)     what the decoder gets, with gradients for the encoder
    lookup(codes)      →  latents                          the same values, without an encoder

A quantiser has one codebook or several residual ones. Each works in a space of few dimensions, in which codewords are
compared (ViT-VQGAN, arXiv 2110.04627): with r the rest that earlier codebooks leave, projections A and B, and Q the
codebook's rounding,

    r₁ = z,   u_k = A_k r_k,   q_k = Q_k(u_k),   r_{k+1} = r_k − B_k q_k,   ẑ = Σ_k B_k q_k

    vq     Q(u) = the codeword nearest to u. With `normalise`, u and the codewords have norm 1. Codewords follow the
           mean of the vectors that they are given (arXiv 1711.00937, appendix A.1), without gradients.
    fsq    Q(u) = every coordinate of u, bounded by a tanh, rounded to one of `levels` values (arXiv 2309.15505).
           The codebook is their grid in [-1, 1]; it is not learned. Unlike the paper's, the grid of an even number of
           levels is symmetric around 0, too, so no offset is needed.

Gradients pass through the rounding as if it were the identity.
"""

from dataclasses import dataclass
from math import prod
from typing import Annotated, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from trimask.tokenizers.storage.ranges import Checked, whole

_EPSILON = 1e-6
"""Added to squared norms, so that a vector of zeros has a direction of zeros."""
_FSQ_MARGIN = 1e-3
"""Share by which the tanh of fsq is wider than its outermost values, so that they are reached."""


@dataclass(frozen=True, kw_only=True)
class QuantizerConfig(Checked):
    """How latent vectors become codes."""

    kind: Literal["vq", "fsq"] = "fsq"
    """vq: the nearest of the codewords, which are learned. fsq: a grid of values, nothing to learn."""
    levels: tuple[Annotated[int, whole(2, 1 << 16)], ...] = (8, 8, 4)
    """Number of values of every dimension, for fsq; their product is the size of a codebook."""
    codebook_size: Annotated[int, whole(2, 1 << 24)] = 512
    """Number of codewords of every codebook, for vq."""
    dimensions: Annotated[int, whole(1, 4096)] = 8
    """Number of dimensions in which codewords are compared, for vq."""
    normalise: bool = True
    """Compare directions alone, for vq."""
    num_codebooks: Annotated[int, whole(1, 999)] = 1
    """Number of residual codebooks, and so of codes for every latent vector."""

    def __post_init__(self):
        super().__post_init__()
        if self.kind == "fsq" and not 2 <= prod(self.levels) <= 1 << 24:
            raise ValueError(
                f"levels must give a codebook of 2 to {1 << 24:,} codewords, got {' × '.join(map(str, self.levels))}"
            )

    @property
    def codebook_sizes(self) -> tuple[int, ...]:
        """Number of codewords of each codebook."""
        size = prod(self.levels) if self.kind == "fsq" else self.codebook_size
        return (size,) * self.num_codebooks

    @property
    def code_width(self) -> int:
        """Number of dimensions in which vectors are rounded."""
        return len(self.levels) if self.kind == "fsq" else self.dimensions


class Quantized(NamedTuple):
    """Result of quantising latent vectors."""

    latents: Float[Array, "*batch width"]
    """Sum of the codewords, projected back; gradients pass to the encoder."""
    codes: Int[Array, "*batch codebooks"]
    commitment: Float[Array, ""]
    """Mean squared distance between projected vectors and their codewords, summed over codebooks; 0 for fsq."""
    projected: tuple[Float[Array, "*batch dim"], ...]
    """u of every codebook, which codewords follow in training."""


class Codewords(nnx.Variable):
    """Learned codewords of all codebooks, which no gradient moves."""


class Quantizer(nnx.Module):
    """A quantiser of latent vectors of one width."""

    def __init__(self, config: QuantizerConfig, width: int, *, rngs: nnx.Rngs):
        self.config = config
        dim = config.code_width
        self.project_in = nnx.List([nnx.Linear(width, dim, rngs=rngs) for _ in range(config.num_codebooks)])
        self.project_out = nnx.List([nnx.Linear(dim, width, rngs=rngs) for _ in range(config.num_codebooks)])
        if config.kind == "vq":
            shape = (config.num_codebooks, config.codebook_size, dim)
            self.codewords = Codewords(_bounded(jax.random.normal(rngs.params(), shape), config))

    def quantize(
        self, latents: Float[Array, "*batch width"], num_used: Int[Array, "*#batch"] | None = None
    ) -> Quantized:
        """Codes of latent vectors, and what the decoder gets.

        Vectors use their first `num_used` codebooks alone (quantiser dropout, arXiv 2107.03312); None: all.
        """
        rest, total = latents, jnp.zeros_like(latents)
        codes, projected, commitment = [], [], jnp.zeros(())
        for number in range(self.config.num_codebooks):
            vectors = _bounded(self.project_in[number](rest), self.config)
            code, rounded = self._round(number, jax.lax.stop_gradient(vectors))
            through = vectors + jax.lax.stop_gradient(rounded - vectors)
            is_used = jnp.broadcast_to(True if num_used is None else number < num_used, latents.shape[:-1])
            part = jnp.where(is_used[..., None], self.project_out[number](through), 0)
            rest, total = rest - part, total + part
            if self.config.kind == "vq":
                squares = jnp.sum((vectors - jax.lax.stop_gradient(rounded)) ** 2, axis=-1)
                commitment += jnp.sum(squares * is_used) / jnp.maximum(jnp.sum(is_used), 1)
            codes.append(code)
            projected.append(vectors)
        return Quantized(total, jnp.stack(codes, axis=-1), commitment, tuple(projected))

    def lookup(self, codes: Int[Array, "*batch codebooks"]) -> Float[Array, "*batch width"]:
        """What the decoder gets for these codes."""
        return sum(
            (self.project_out[k](self._codewords_of(k, codes[..., k])) for k in range(self.config.num_codebooks)),
            start=jnp.zeros(()),
        )

    def _round(
        self, number: int, vectors: Float[Array, "*batch dim"]
    ) -> tuple[Int[Array, "*batch"], Float[Array, "*batch dim"]]:
        """Codes of projected vectors, and their codewords."""
        if self.config.kind == "fsq":
            most = np.asarray(self.config.levels) - 1
            digits = jnp.clip(jnp.round((vectors + 1) / 2 * most), 0, most).astype(jnp.int32)
            return jnp.sum(digits * self._place_values, axis=-1), 2 * digits / most - 1
        codewords = self.codewords[...][number]
        nearness = vectors @ codewords.T - jnp.sum(codewords**2, axis=-1) / 2
        codes = jnp.argmax(nearness, axis=-1).astype(jnp.int32)
        return codes, codewords[codes]

    def _codewords_of(self, number: int, codes: Int[Array, "*batch"]) -> Float[Array, "*batch dim"]:
        if self.config.kind == "fsq":
            levels = np.asarray(self.config.levels)
            return 2 * (codes[..., None] // self._place_values % levels) / (levels - 1) - 1
        return self.codewords[...][number][codes]

    @property
    def _place_values(self) -> np.ndarray:
        """What a step in every dimension of fsq adds to the code."""
        return np.cumprod([1, *self.config.levels[:-1]])


def _bounded(vectors: Float[Array, "*batch dim"], config: QuantizerConfig) -> Float[Array, "*batch dim"]:
    """Projected vectors as they are rounded: of norm 1, or in [-1, 1] for fsq."""
    if config.kind == "fsq":
        return (1 + _FSQ_MARGIN) * jnp.tanh(vectors)
    return with_norm_1(vectors) if config.normalise else vectors


def with_norm_1(vectors: Float[Array, "*batch dim"]) -> Float[Array, "*batch dim"]:
    """Vectors divided by their norm; zeros stay zeros."""
    return vectors * jax.lax.rsqrt(jnp.sum(vectors**2, axis=-1, keepdims=True) + _EPSILON)
