"""Building blocks of networks: matrix products, norms, the feed-forward layer, and position encodings."""

from math import prod

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, Num

from trimask.diffusion.mesh import ROW_AXES, constrain
from trimask.diffusion.parametrization import Initializer


def product(x: Float[Array, "..."], weight: Float[Array, "..."], axes: int = 1) -> Float[Array, "..."]:
    """x · weight over the last `axes` axes of x and the first `axes` of weight, in x's dtype, as one matrix product.

    XLA on a CPU takes up to 50 % longer for the gradient of a product over several axes. The gradient of the weight is
    summed over positions and devices in float32 for every dtype of x.
    """
    inner = prod(weight.shape[:axes])
    y = _product(x.reshape(-1, inner), weight.reshape(inner, -1))
    return y.reshape(*x.shape[: x.ndim - axes], *weight.shape[axes:])


@jax.custom_vjp
def _product(x, weight):
    return x @ weight.astype(x.dtype)


def _product_forward(x, weight):
    return _product(x, weight), (x, weight)


def _product_backward(residuals, d_y):
    x, weight = residuals
    d_weight = jnp.matmul(x.T, d_y, preferred_element_type=jnp.float32)
    return d_y @ weight.astype(x.dtype).T, d_weight.astype(weight.dtype)


_product.defvjp(_product_forward, _product_backward)


class SwiGLU(nnx.Module):
    """Feed-forward layer: down(silu(gate x) · up x) (arXiv 2002.05202)."""

    def __init__(
        self, width: int, hidden: int, base_width: int, base_hidden: int, initializer: Initializer, key: jax.Array
    ):
        keys = jax.random.split(key, 3)
        self.gate = initializer.matrix(keys[0], (width, hidden), "gate", width, base_width)
        self.up = initializer.matrix(keys[1], (width, hidden), "up", width, base_width)
        self.down = initializer.matrix(keys[2], (hidden, width), "down", hidden, base_hidden)

    def __call__(self, x: Float[Array, "batch seq width"]) -> Float[Array, "batch seq width"]:
        gate, up = product(x, self.gate[...]), product(x, self.up[...])
        return product(constrain(jax.nn.silu(gate) * up, ROW_AXES, None, "tensor"), self.down[...])


class RMSNorm(nnx.Module):
    """x / √(mean x² + ε) · scale over the last axis, computed in float32 (arXiv 1910.07467)."""

    def __init__(self, size: int, epsilon: float, module: str, initializer: Initializer):
        self.scale = initializer.constant(jnp.ones(size), module)
        self.epsilon = epsilon

    def __call__(self, x: Float[Array, "*shape size"]) -> Float[Array, "*shape size"]:
        y = x.astype(jnp.float32)
        y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + self.epsilon)
        return (y * self.scale[...]).astype(x.dtype)


def sinusoids(values: Num[Array, "*shape"], size: int) -> Float[Array, "*shape size"]:
    """sin and cos of each value at size/2 frequencies, with periods from 2 (neighbours differ most) to 512."""
    frequencies = jnp.pi * 256.0 ** (-jnp.arange(size // 2) / max(size // 2 - 1, 1))
    angles = values[..., None].astype(jnp.float32) * frequencies
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)


SinCos = Float[Array, "2 batch positions 1 half"]
"""sin and cos of the rotation angles of each position, as `rotate` takes them."""


def rotary_sin_cos(positions: Int[Array, "batch positions"], num_positions: int, head: int, base: float) -> SinCos:
    """sin and cos of the angles position · base^(−i / half), for positions below `num_positions`.

    They are looked up in a table of all positions: without it XLA recomputes them in every layer, for queries and keys,
    in both passes, which takes a twelfth of a training step on a CPU.
    """
    half = head // 2
    angles = jnp.arange(num_positions)[:, None] * base ** (-jnp.arange(half) / half)
    return jnp.stack([jnp.sin(angles)[positions], jnp.cos(angles)[positions]])[..., None, :]


def rotate(
    x: Float[Array, "batch positions heads head"], sin_cos: SinCos
) -> Float[Array, "batch positions heads head"]:
    """Applies rotary position embeddings (arXiv 2104.09864) to heads, with the halves of a head paired as in Llama."""
    sin, cos = sin_cos
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)
