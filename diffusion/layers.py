"""What networks are made of: products of matrices, norms, the feed-forward layer, and encodings of positions."""

from math import prod

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, Num

from trimask.diffusion.mesh import ROWS, constrained
from trimask.diffusion.parametrization import Site


def product(x: Float[Array, "..."], weight: Float[Array, "..."], axes: int = 1) -> Float[Array, "..."]:
    """x · weight over the last `axes` axes of x and the first of the weight, in x's type, as one product of matrices.

    XLA on a CPU takes up to half as long again for the gradient of a product over more axes. The gradient of the weight
    is summed in float32, over positions and devices, whatever x's type.
    """
    inner = prod(weight.shape[:axes])
    y = _product(x.reshape(-1, inner), weight.reshape(inner, -1))
    return y.reshape(*x.shape[: x.ndim - axes], *weight.shape[axes:])


@jax.custom_vjp
def _product(x, weight):
    return x @ weight.astype(x.dtype)


def _product_forward(x, weight):
    return _product(x, weight), (x, weight)


def _product_backward(kept, d_y):
    x, weight = kept
    d_weight = jnp.matmul(x.T, d_y, preferred_element_type=jnp.float32)
    return d_y @ weight.astype(x.dtype).T, d_weight.astype(weight.dtype)


_product.defvjp(_product_forward, _product_backward)


class SwiGLU(nnx.Module):
    """down(silu(gate x) · up x)."""

    def __init__(self, width: int, hidden: int, base_width: int, base_hidden: int, site: Site, key: jax.Array):
        keys = jax.random.split(key, 3)
        self.gate = site.matrix(keys[0], (width, hidden), "gate", width, base_width)
        self.up = site.matrix(keys[1], (width, hidden), "up", width, base_width)
        self.down = site.matrix(keys[2], (hidden, width), "down", hidden, base_hidden)

    def __call__(self, x: Float[Array, "batch seq width"]) -> Float[Array, "batch seq width"]:
        gate, up = product(x, self.gate[...]), product(x, self.up[...])
        return product(constrained(jax.nn.silu(gate) * up, ROWS, None, "tensor"), self.down[...])


class RMSNorm(nnx.Module):
    """x / √(mean x² + ε) · scale, over the last axis, in float32."""

    def __init__(self, size: int, epsilon: float, module: str, site: Site):
        self.scale = site.constant(jnp.ones(size), module)
        self.epsilon = epsilon

    def __call__(self, x: Float[Array, "*shape size"]) -> Float[Array, "*shape size"]:
        y = x.astype(jnp.float32)
        y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + self.epsilon)
        return (y * self.scale[...]).astype(x.dtype)


def sinusoids(values: Num[Array, "*shape"], size: int) -> Float[Array, "*shape size"]:
    """sin and cos of each value at size/2 frequencies, from a period of 2 (neighbours differ most) to 512."""
    frequencies = jnp.pi * 256.0 ** (-jnp.arange(size // 2) / max(size // 2 - 1, 1))
    angles = values[..., None].astype(jnp.float32) * frequencies
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)


SinCos = Float[Array, "2 batch asked 1 half"]
"""sin and cos of the angles by which `rotate` turns a head."""


def rotary_sin_cos(positions: Int[Array, "batch asked"], num_positions: int, head: int, base: float) -> SinCos:
    """Of the angles position · base^(−i / half), for positions below `num_positions`.

    Looked up in a table of all positions from 0: XLA computes what it does not look up anew in every layer, for queries
    and keys, in both passes, which is a twelfth of a step on a CPU.
    """
    half = head // 2
    angles = jnp.arange(num_positions)[:, None] * base ** (-jnp.arange(half) / half)
    return jnp.stack([jnp.sin(angles)[positions], jnp.cos(angles)[positions]])[..., None, :]


def rotate(x: Float[Array, "batch asked heads head"], sin_cos: SinCos) -> Float[Array, "batch asked heads head"]:
    """Rotary position embedding (arXiv 2104.09864), halves of the head paired as in Llama."""
    sin, cos = sin_cos
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)
