"""Convolutional encoder and decoder of pictures.

    picture --fold patch--> [blocks]_1 --fold 2--> [blocks]_2 … [blocks]_L (attention) --> latents
    latents --> (attention) [blocks]_L --unfold 2--> … [blocks]_1 --unfold patch--> picture

Folding moves the pixels of a square of side f into the channels, so that a level of n × n positions costs the same
whatever the size of the picture. A block is x + conv(silu(norm(conv(silu(norm(x)))))), with 3 × 3 convolutions (the
encoder of VQGAN, arXiv 2012.09841, with root-mean-square norms over channels, which do not depend on the batch or the
size of the picture).
"""

from dataclasses import dataclass
from itertools import pairwise
from typing import Annotated

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from trimask.tokenizers.storage.ranges import Checked, NonNegativeInt, Size, whole

_RESIDUAL_SCALE = 0.1
"""Scale of the initial weights that end a residual branch."""


@dataclass(frozen=True, kw_only=True)
class PictureNetworkConfig(Checked):
    """Shape of the network."""

    channels: Annotated[int, whole(1, 256)] = 1
    """Number of channels of a picture: 1 for grey, 3 for colour."""
    patch: Annotated[int, whole(1, 64)] = 2
    """Side in pixels of the squares that are folded into channels before the first level."""
    widths: tuple[Size, ...] = (32, 64)
    """Number of channels of every level, the finest first; each has half the height and width of the one before."""
    blocks: Size = 2
    """Number of residual blocks of every level, in the encoder and in the decoder."""
    attention_heads: NonNegativeInt = 0
    """Number of heads of self-attention at the coarsest level. 0: no attention."""

    def __post_init__(self):
        super().__post_init__()
        if not self.widths:
            raise ValueError("widths must name at least one level")
        if self.attention_heads and self.widths[-1] % self.attention_heads:
            raise ValueError(
                f"attention_heads must divide the width of the coarsest level, {self.widths[-1]}; "
                f"got {self.attention_heads}"
            )

    @property
    def stride(self) -> int:
        """Side in pixels of the square that one code stands for."""
        return self.patch << (len(self.widths) - 1)

    @property
    def latent_width(self) -> int:
        """Number of numbers of a latent vector."""
        return self.widths[-1]


class PictureEncoder(nnx.Module):
    """Pictures → latent vectors."""

    def __init__(self, config: PictureNetworkConfig, *, rngs: nnx.Rngs):
        self.config = config
        widths = config.widths
        self.first = _convolution(config.channels * config.patch**2, widths[0], 3, rngs)
        self.levels = nnx.List([_level(width, config.blocks, rngs) for width in widths])
        self.down = nnx.List([_convolution(4 * a, b, 1, rngs) for a, b in pairwise(widths)])
        self.attention = _attention(config, rngs)
        self.norm = _Norm(widths[-1])

    def __call__(self, pictures: Float[Array, "batch height width channels"]) -> Float[Array, "batch rows columns dim"]:
        x = self.first(fold(pictures, self.config.patch))
        for number, blocks in enumerate(self.levels):
            if number:
                x = self.down[number - 1](fold(x, 2))
            for block in blocks:
                x = block(x)
        for attention in self.attention:
            x = attention(x)
        return self.norm(x)


class PictureDecoder(nnx.Module):
    """Latent vectors → pictures."""

    def __init__(self, config: PictureNetworkConfig, *, rngs: nnx.Rngs):
        self.config = config
        widths = config.widths
        self.attention = _attention(config, rngs)
        self.levels = nnx.List([_level(width, config.blocks, rngs) for width in widths])
        self.up = nnx.List([_convolution(b, 4 * a, 1, rngs) for a, b in pairwise(widths)])
        self.norm = _Norm(widths[0])
        self.last = _convolution(widths[0], config.channels * config.patch**2, 3, rngs)

    def __call__(self, latents: Float[Array, "batch rows columns dim"]) -> Float[Array, "batch height width channels"]:
        x = latents
        for attention in self.attention:
            x = attention(x)
        for number in reversed(range(len(self.levels))):
            for block in self.levels[number]:
                x = block(x)
            if number:
                x = unfold(self.up[number - 1](x), 2)
        return unfold(self.last(jax.nn.silu(self.norm(x))), self.config.patch)


def fold(x: Float[Array, "batch height width channels"], side: int) -> Float[Array, "batch rows columns dim"]:
    """Moves the positions of every square of this side into the channels."""
    batch, height, width, channels = x.shape
    x = x.reshape(batch, height // side, side, width // side, side, channels)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(batch, height // side, width // side, side * side * channels)


def unfold(x: Float[Array, "batch rows columns dim"], side: int) -> Float[Array, "batch height width channels"]:
    """The inverse of `fold`."""
    batch, rows, columns, dim = x.shape
    x = x.reshape(batch, rows, columns, side, side, dim // side**2)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(batch, rows * side, columns * side, dim // side**2)


class _Norm(nnx.Module):
    """x / √(mean x² + ε) · scale over channels, computed in float32."""

    def __init__(self, width: int):
        self.scale = nnx.Param(jnp.ones(width))

    def __call__(self, x: Float[Array, "... width"]) -> Float[Array, "... width"]:
        y = x.astype(jnp.float32)
        y = y * jax.lax.rsqrt(jnp.mean(y**2, axis=-1, keepdims=True) + 1e-6)
        return (y * self.scale[...]).astype(x.dtype)


class _Block(nnx.Module):
    """x + conv(silu(norm(conv(silu(norm(x))))))."""

    def __init__(self, width: int, rngs: nnx.Rngs):
        self.norms = nnx.List([_Norm(width), _Norm(width)])
        self.convolutions = nnx.List(
            [_convolution(width, width, 3, rngs), _convolution(width, width, 3, rngs, _RESIDUAL_SCALE)]
        )

    def __call__(self, x: Float[Array, "batch rows columns dim"]) -> Float[Array, "batch rows columns dim"]:
        y = x
        for norm, convolution in zip(self.norms, self.convolutions, strict=True):
            y = convolution(jax.nn.silu(norm(y)))
        return x + y


class _Attention(nnx.Module):
    """x + self-attention over all positions, which have no coordinates: convolutions tell them apart."""

    def __init__(self, width: int, heads: int, rngs: nnx.Rngs):
        self.heads = heads
        self.norm = _Norm(width)
        self.project_in = nnx.Linear(width, 3 * width, rngs=rngs)
        self.project_out = nnx.Linear(width, width, kernel_init=_initializer(_RESIDUAL_SCALE), rngs=rngs)

    def __call__(self, x: Float[Array, "batch rows columns dim"]) -> Float[Array, "batch rows columns dim"]:
        batch, rows, columns, width = x.shape
        shape = batch, rows * columns, 3, self.heads, width // self.heads
        queries, keys, values = jnp.moveaxis(self.project_in(self.norm(x)).reshape(shape), 2, 0)
        mixed = jax.nn.dot_product_attention(queries, keys, values)
        return x + self.project_out(mixed.reshape(x.shape))


def _attention(config: PictureNetworkConfig, rngs: nnx.Rngs) -> nnx.List:
    """The attention layer of the coarsest level, if it has one."""
    heads = config.attention_heads
    return nnx.List([_Attention(config.latent_width, heads, rngs)] if heads else [])


def _level(width: int, blocks: int, rngs: nnx.Rngs) -> nnx.List:
    return nnx.List([_Block(width, rngs) for _ in range(blocks)])


def _convolution(inputs: int, outputs: int, side: int, rngs: nnx.Rngs, scale: float = 1.0) -> nnx.Conv:
    return nnx.Conv(inputs, outputs, (side, side), kernel_init=_initializer(scale), rngs=rngs)


def _initializer(scale: float) -> jax.nn.initializers.Initializer:
    return jax.nn.initializers.variance_scaling(scale**2, "fan_in", "normal")
