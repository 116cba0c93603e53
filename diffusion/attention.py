"""Attention within examples, by what computes it fastest on the device at hand.

    o_i = Σ_j softmax_j(q_i · k_j / √d) v_j        over the j of the same segment as i

    plain     all scores exist, [heads, queries, keys] of a row
    cudnn     on GPUs: only who may see whom does, [queries, keys] of a row, for which JAX's interface takes a mask
    splash    on TPUs: nothing of that size does, in a Pallas kernel that is told the segments

The plain one has a gradient of its own, for which XLA on a CPU needs half the time of the one that it derives.
"""

from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from trimask.diffusion.mesh import ROWS, current_mesh

_TILES = (512, 256, 128)

Kernel = Literal["plain", "cudnn", "splash"]


def kernel_for(platform: str, dtype: Any, asked: int, length: int, head: int) -> Kernel:
    """What computes attention fastest on a platform, of what can compute it there.

    cuDNN takes bfloat16, even lengths, and heads of a multiple of 8 up to 128; splash attention lengths of a multiple
    of 128.
    """
    if platform == "tpu" and asked % _TILES[-1] == length % _TILES[-1] == 0:
        return "splash"
    is_even = asked % 2 == length % 2 == 0
    if platform == "gpu" and jnp.dtype(dtype) == jnp.bfloat16 and is_even and head % 8 == 0 and head <= 128:
        return "cudnn"
    return "plain"


def attend(
    query: Float[Array, "batch asked heads head"],
    key: Float[Array, "batch seq kv_heads head"],
    value: Float[Array, "batch seq kv_heads head"],
    query_segment: Int[Array, "batch asked"],
    key_segment: Int[Array, "batch seq"],
    attention: Literal["plain", "kernel"] = "plain",
) -> Float[Array, "batch asked heads head"]:
    """o; a query sees the keys of its own segment.

    `attention` says whether the products are plain, or by the `kernel_for` this platform and these shapes.
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
    query: Float[Array, "batch asked heads head"],
    key: Float[Array, "batch seq kv_heads head"],
    value: Float[Array, "batch seq kv_heads head"],
    query_segment: Int[Array, "batch asked"],
    key_segment: Int[Array, "batch seq"],
) -> Float[Array, "batch asked heads head"]:
    """o by products of matrices; scores and their sums are float32."""
    batch, asked, heads, size = query.shape
    groups = heads // key.shape[2]
    # Queries that share a key lie one after another, as if there were more of them.
    by_key = (query * size**-0.5).reshape(batch, asked, -1, groups, size).transpose(0, 2, 3, 1, 4)
    queries = by_key.reshape(batch, -1, groups * asked, size)
    is_seen = jnp.tile(query_segment, groups)[:, None, :, None] == key_segment[:, None, None, :]
    out = _attend(queries, key.swapaxes(1, 2), value.swapaxes(1, 2), is_seen)
    return out.reshape(batch, -1, groups, asked, size).transpose(0, 3, 1, 2, 4).reshape(query.shape)


@jax.custom_vjp
def _attend(q, k, v, is_seen):
    return _attend_forward(q, k, v, is_seen)[0]


def _attend_forward(q, k, v, is_seen):
    scores = jnp.matmul(q, k.swapaxes(-1, -2), preferred_element_type=jnp.float32)
    scores = jnp.where(is_seen, scores, jnp.finfo(jnp.float32).min)
    exp = jnp.exp(scores - scores.max(axis=-1, keepdims=True))
    p = (exp / exp.sum(axis=-1, keepdims=True)).astype(v.dtype)
    out = p @ v
    return out, (q, k, v, p, out)


def _attend_backward(kept, d_out):
    """dS = P ⊙ (dO·Vᵀ − Σ dO ⊙ O), as in FlashAttention (arXiv 2205.14135, appendix B.2)."""
    q, k, v, p, out = kept
    d_p = jnp.matmul(d_out, v.swapaxes(-1, -2), preferred_element_type=jnp.float32)
    inner = jnp.sum(d_out.astype(jnp.float32) * out.astype(jnp.float32), axis=-1, keepdims=True)
    d_scores = (p * (d_p - inner)).astype(q.dtype)
    return d_scores @ k, d_scores.swapaxes(-1, -2) @ q, p.swapaxes(-1, -2) @ d_out, None


_attend.defvjp(_attend_forward, _attend_backward)


def splash_attention(
    query: Float[Array, "batch asked heads head"],
    key: Float[Array, "batch seq kv_heads head"],
    value: Float[Array, "batch seq kv_heads head"],
    query_segment: Int[Array, "batch asked"],
    key_segment: Int[Array, "batch seq"],
    *,
    interpret: bool = False,
) -> Float[Array, "batch asked heads head"]:
    """o by the kernel for TPUs, a device its rows and heads on the mesh in use; interpreted, on any device, slowly."""
    # Pallas takes a third of a second to load, and only TPUs need it.
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel, splash_attention_mask

    def of_device(query, key, value, query_segment, key_segment):
        asked, length = query.shape[1], key.shape[1]
        tile, other = (next(tile for tile in _TILES if size % tile == 0) for size in (asked, length))
        sizes = splash_attention_kernel.BlockSizes(
            block_q=tile, block_kv=other, block_q_dkv=tile, block_kv_dkv=other, block_q_dq=tile, block_kv_dq=other
        )
        everything = splash_attention_mask.FullMask((asked, length))
        kernel = splash_attention_kernel.make_splash_mha(
            splash_attention_mask.MultiHeadMask([everything] * query.shape[2]),
            block_sizes=sizes,
            head_shards=1,
            q_seq_shards=1,
            interpret=interpret,
        )
        heads_first = (x.swapaxes(1, 2) for x in (query * query.shape[-1] ** -0.5, key, value))
        segments = splash_attention_kernel.SegmentIds(query_segment, key_segment)
        return jax.vmap(kernel)(*heads_first, segments).swapaxes(1, 2)

    if current_mesh() is None:
        return of_device(query, key, value, query_segment, key_segment)
    heads, rows = PartitionSpec(ROWS, None, "tensor"), PartitionSpec(ROWS)
    shared = jax.shard_map(of_device, in_specs=(heads, heads, heads, rows, rows), out_specs=heads, check_vma=False)
    return shared(query, key, value, query_segment, key_segment)
