"""Attention within examples, computed by the fastest implementation for the device.

    o_i = Σ_j softmax_j(q_i · k_j / √d) v_j        over the j in the same segment as i

    plain     stores all scores of a row, [heads, queries, keys]
    cudnn     on GPUs: stores only the mask of a row, [queries, keys], which JAX's interface requires
    splash    on TPUs: stores nothing of that size; a Pallas kernel that takes segment ids

The plain implementation has a hand-written gradient, which takes XLA on a CPU half the time of the derived one.
"""

from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from trimask.diffusion.mesh import ROW_AXES, current_mesh

_TILES = (512, 256, 128)
"""Tile sizes of splash attention, the preferred one first."""

Kernel = Literal["plain", "cudnn", "splash"]
"""Name of an implementation."""


def kernel_for(platform: str, dtype: Any, num_queries: int, length: int, head: int) -> Kernel:
    """The fastest implementation that supports these shapes on a platform (cpu, gpu or tpu).

    cuDNN needs bfloat16, even lengths, and head sizes that are multiples of 8 up to 128; splash attention needs lengths
    that are multiples of 128.
    """
    if platform == "tpu" and num_queries % _TILES[-1] == length % _TILES[-1] == 0:
        return "splash"
    is_even = num_queries % 2 == length % 2 == 0
    if platform == "gpu" and jnp.dtype(dtype) == jnp.bfloat16 and is_even and head % 8 == 0 and head <= 128:
        return "cudnn"
    return "plain"


def attend(
    query: Float[Array, "batch queries heads head"],
    key: Float[Array, "batch seq kv_heads head"],
    value: Float[Array, "batch seq kv_heads head"],
    query_segment: Int[Array, "batch queries"],
    key_segment: Int[Array, "batch seq"],
    attention: Literal["plain", "kernel"] = "plain",
) -> Float[Array, "batch queries heads head"]:
    """Attention output o; a query attends to the keys of its own segment.

    `attention` selects plain matrix products, or the implementation that `kernel_for` chooses for this platform.
    """
    kernel: Kernel = "plain"
    if attention == "kernel":
        kernel = kernel_for(jax.default_backend(), query.dtype, query.shape[1], key.shape[1], query.shape[-1])
    if kernel == "splash":
        return splash_attention(query, key, value, query_segment, key_segment)
    if kernel == "cudnn":
        mask = query_segment[:, None, :, None] == key_segment[:, None, None, :]
        return jax.nn.dot_product_attention(query, key, value, mask=mask, implementation="cudnn")
    return plain_attention(query, key, value, query_segment, key_segment)


def plain_attention(
    query: Float[Array, "batch queries heads head"],
    key: Float[Array, "batch seq kv_heads head"],
    value: Float[Array, "batch seq kv_heads head"],
    query_segment: Int[Array, "batch queries"],
    key_segment: Int[Array, "batch seq"],
) -> Float[Array, "batch queries heads head"]:
    """Attention output o by matrix products; scores are computed and summed in float32."""
    batch, num_queries, heads, size = query.shape
    groups = heads // key.shape[2]
    # Heads that share a key are laid out as more queries of one head.
    by_key = (query * size**-0.5).reshape(batch, num_queries, -1, groups, size).transpose(0, 2, 3, 1, 4)
    queries = by_key.reshape(batch, -1, groups * num_queries, size)
    is_visible = jnp.tile(query_segment, groups)[:, None, :, None] == key_segment[:, None, None, :]
    out = _attend(queries, key.swapaxes(1, 2), value.swapaxes(1, 2), is_visible)
    return out.reshape(batch, -1, groups, num_queries, size).transpose(0, 3, 1, 2, 4).reshape(query.shape)


@jax.custom_vjp
def _attend(q, k, v, is_visible):
    return _attend_forward(q, k, v, is_visible)[0]


def _attend_forward(q, k, v, is_visible):
    scores = jnp.matmul(q, k.swapaxes(-1, -2), preferred_element_type=jnp.float32)
    scores = jnp.where(is_visible, scores, jnp.finfo(jnp.float32).min)
    exp = jnp.exp(scores - scores.max(axis=-1, keepdims=True))
    p = (exp / exp.sum(axis=-1, keepdims=True)).astype(v.dtype)
    out = p @ v
    return out, (q, k, v, p, out)


def _attend_backward(residuals, d_out):
    """dS = P ⊙ (dO·Vᵀ − Σ dO ⊙ O), as in FlashAttention (arXiv 2205.14135, appendix B.2)."""
    q, k, v, p, out = residuals
    d_p = jnp.matmul(d_out, v.swapaxes(-1, -2), preferred_element_type=jnp.float32)
    inner = jnp.sum(d_out.astype(jnp.float32) * out.astype(jnp.float32), axis=-1, keepdims=True)
    d_scores = (p * (d_p - inner)).astype(q.dtype)
    return d_scores @ k, d_scores.swapaxes(-1, -2) @ q, p.swapaxes(-1, -2) @ d_out, None


_attend.defvjp(_attend_forward, _attend_backward)


def splash_attention(
    query: Float[Array, "batch queries heads head"],
    key: Float[Array, "batch seq kv_heads head"],
    value: Float[Array, "batch seq kv_heads head"],
    query_segment: Int[Array, "batch queries"],
    key_segment: Int[Array, "batch seq"],
    *,
    interpret: bool = False,
) -> Float[Array, "batch queries heads head"]:
    """Attention output o by the TPU kernel; on a mesh each device computes its rows and heads.

    `interpret` runs the kernel in an interpreter on any device, slowly.
    """
    # Pallas takes a third of a second to load, and only TPUs need it.
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel, splash_attention_mask

    def local_attention(query, key, value, query_segment, key_segment):
        num_queries, length = query.shape[1], key.shape[1]
        query_tile, key_tile = (next(tile for tile in _TILES if size % tile == 0) for size in (num_queries, length))
        sizes = splash_attention_kernel.BlockSizes(
            block_q=query_tile,
            block_kv=key_tile,
            block_q_dkv=query_tile,
            block_kv_dkv=key_tile,
            block_q_dq=query_tile,
            block_kv_dq=key_tile,
        )
        full = splash_attention_mask.FullMask((num_queries, length))
        kernel = splash_attention_kernel.make_splash_mha(
            splash_attention_mask.MultiHeadMask([full] * query.shape[2]),
            block_sizes=sizes,
            head_shards=1,
            q_seq_shards=1,
            interpret=interpret,
        )
        heads_first = (x.swapaxes(1, 2) for x in (query * query.shape[-1] ** -0.5, key, value))
        segments = splash_attention_kernel.SegmentIds(query_segment, key_segment)
        return jax.vmap(kernel)(*heads_first, segments).swapaxes(1, 2)

    if current_mesh() is None:
        return local_attention(query, key, value, query_segment, key_segment)
    heads, rows = PartitionSpec(ROW_AXES, None, "tensor"), PartitionSpec(ROW_AXES)
    sharded = jax.shard_map(
        local_attention, in_specs=(heads, heads, heads, rows, rows), out_specs=heads, check_vma=False
    )
    return sharded(query, key, value, query_segment, key_segment)
