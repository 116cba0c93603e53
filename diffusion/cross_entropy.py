"""Cross-entropy, and a memory-saving form at masked positions that never stores an array of [tokens, vocab].

    loss = Σ_{i masked} c_i · nll_i + z_i · (log Z_i)²        nll_i = log Z_i − h_i · W[:, x_i]
    log Z_i = log Σ_{v allowed at i} exp(h_i · W[:, v])       allowed: one range of ids, [start_i, stop_i)

Positions that are not masked do not enter the loss, and most ids are not allowed at a position, so neither are
computed. Masked positions are sorted by their range and processed in chunks; for each chunk only the ids that one of
its positions may take are visited, a tile at a time, with an online log-sum-exp (Milakov and Gimelshein, arXiv
1805.02867). Not storing logits is the idea of cut cross-entropy (arXiv 2411.09009).

Deviations from that paper
1. The gradient is computed together with the loss, since the cotangent of a sum is one number. The last tile of
   logits, which is mostly the only one, is therefore not recomputed.
2. Gradients are not filtered by size; they are exact.
"""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from trimask.diffusion.mesh import current_mesh, partition_spec


def restrict(
    logits: Float[Array, "*shape vocab"], allowed: Bool[Array, "*shape vocab"]
) -> Float[Array, "*shape vocab"]:
    """The logits, with −∞ for every id that is not allowed."""
    return jnp.where(allowed, logits, -jnp.inf)


def cross_entropy(
    logits: Float[Array, "batch seq vocab"], clean: Int[Array, "batch seq"]
) -> tuple[Float[Array, "batch seq"], Float[Array, "batch seq"]]:
    """Negative log-probability of the clean tokens in nats, and log Σ exp logits, at every position."""
    log_z = jax.nn.logsumexp(logits, axis=-1)
    return log_z - jnp.take_along_axis(logits, clean[..., None], axis=-1)[..., 0], log_z


@partial(jax.custom_vjp, nondiff_argnums=(7, 8, 9))
def masked_cross_entropy(
    hidden: Float[Array, "tokens width"],
    matrix: Float[Array, "width vocab"],
    clean: Int[Array, " tokens"],
    bounds: Int[Array, "tokens 2"],
    is_masked: Bool[Array, " tokens"],
    weight: Float[Array, " tokens"],
    z_weight: Float[Array, " tokens"],
    tile_positions: int,
    tile_ids: int,
    dtype: str,
) -> tuple[Float[Array, ""], Float[Array, " tokens"]]:
    """The loss, differentiable in `hidden` and `matrix`, and −log p of the clean tokens in nats, without gradient.

    `bounds` are start and stop of the ids that a position may take; `weight` and `z_weight` are its c and z. At most
    tile_positions × tile_ids logits exist at a time. Matrix products are computed in `dtype` and accumulated in
    float32. −log p is 0 at positions that are not masked. On a mesh each device processes its share of the tokens with
    the gathered matrix.
    """
    return _sums(hidden, matrix, clean, bounds, is_masked, weight, z_weight, tile_positions, tile_ids, dtype, False)[0]


def _forward(hidden, matrix, clean, bounds, is_masked, weight, z_weight, tile_positions, tile_ids, dtype):
    return _sums(hidden, matrix, clean, bounds, is_masked, weight, z_weight, tile_positions, tile_ids, dtype, True)


def _backward(tile_positions, tile_ids, dtype, gradients, cotangents):
    d_hidden, d_matrix = (cotangents[0] * gradient for gradient in gradients)
    return d_hidden, d_matrix, None, None, None, None, None


masked_cross_entropy.defvjp(_forward, _backward)


def _sums(hidden, matrix, clean, bounds, is_masked, weight, z_weight, tile_positions, tile_ids, dtype, with_gradient):
    """The values of `masked_cross_entropy`, and (d hidden, d matrix) or None, distributed over the current mesh."""
    mesh, matrix = current_mesh(), matrix.astype(dtype)
    per_token = (hidden, clean, bounds, is_masked, weight, z_weight)
    local_sums = partial(_local_sums, tile_positions=tile_positions, tile_ids=tile_ids, with_gradient=with_gradient)
    if mesh is None:
        return local_sums(matrix, *per_token)

    spec = partition_spec("unembedding", matrix.shape, mesh)
    scattered = spec[0] or ()

    def sums_of_shard(*arguments):
        (loss, nll), gradients = local_sums(*arguments)
        if with_gradient:
            # Each device receives the sum of the part of the gradient that it updates.
            d_hidden, d_matrix = gradients
            if scattered:
                d_matrix = jax.lax.psum_scatter(d_matrix, scattered, scatter_dimension=0, tiled=True)
            rest = tuple(axis for axis in mesh.axis_names if axis not in scattered)
            gradients = (d_hidden, jax.lax.psum(d_matrix, rest))
        return (jax.lax.psum(loss, mesh.axis_names), nll), gradients

    whole, split = PartitionSpec(), PartitionSpec(mesh.axis_names)
    padded = (jnp.pad(x, [(0, -len(x) % mesh.size)] + [(0, 0)] * (x.ndim - 1)) for x in per_token)
    out_specs = ((whole, split), (split, spec) if with_gradient else None)
    sharded = jax.shard_map(sums_of_shard, in_specs=(whole, *[split] * 6), out_specs=out_specs, check_vma=False)
    (loss, nll), gradients = sharded(matrix, *padded)
    return (loss, nll[: len(clean)]), gradients and (gradients[0][: len(clean)], gradients[1])


def _local_sums(matrix, hidden, clean, bounds, is_masked, weight, z_weight, *, tile_positions, tile_ids, with_gradient):
    """The values and gradients for the tokens of one device; the matrix is already in the dtype of the products."""
    tokens, vocab = len(clean), matrix.shape[1]
    positions, ids = min(tile_positions, tokens), min(tile_ids, vocab)
    order = jnp.argsort(jnp.where(is_masked, bounds[:, 0], vocab), stable=True)
    order = jnp.pad(order, (0, -tokens % positions), constant_values=tokens)  # padding: read as 0, never written

    def add(number, sums):
        loss, nll, gradients = sums
        indices = jax.lax.dynamic_slice_in_dim(order, number * positions, positions)
        of_chunk = (
            jnp.take(values, indices, axis=0, mode="fill", fill_value=0)
            for values in (hidden, clean, bounds, is_masked, weight, z_weight)
        )
        chunk = _chunk(*of_chunk, vocab=vocab, tile_ids=ids, dtype=matrix.dtype)
        log_z, target, last_logits = _log_sum_exp(matrix, chunk, ids)
        nll_of_chunk = jnp.where(chunk.is_valid, log_z - target, 0.0)
        loss += jnp.sum(chunk.weight * nll_of_chunk + chunk.z_weight * log_z**2)
        nll = nll.at[indices].set(nll_of_chunk, mode="drop")
        if with_gradient:
            d_hidden, d_matrix = gradients
            d_hidden_of_chunk, d_matrix = _pull_back(matrix, chunk, ids, log_z, last_logits, d_matrix)
            gradients = (d_hidden.at[indices].set(d_hidden_of_chunk, mode="drop"), d_matrix)
        return loss, nll, gradients

    zeros = (jnp.zeros(hidden.shape), jnp.zeros(matrix.shape)) if with_gradient else None
    num_chunks = -(-is_masked.sum() // positions)
    loss, nll, gradients = jax.lax.fori_loop(0, num_chunks, add, (jnp.zeros(()), jnp.zeros(tokens), zeros))
    return (loss, nll), gradients


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class _Chunk:
    """Masked positions processed together. Padding (not `is_valid`) has weight 0 and all ids allowed."""

    hidden: Float[Array, "positions width"]
    clean: Int[Array, " positions"]
    start: Int[Array, " positions"]
    stop: Int[Array, " positions"]
    is_valid: Bool[Array, " positions"]
    weight: Float[Array, " positions"]
    z_weight: Float[Array, " positions"]
    low: Int[Array, ""]
    """First id that any of the positions may take."""
    num_tiles: Int[Array, ""]
    """Number of tiles from `low` to the last id that any of the positions may take, at least one."""


def _chunk(hidden, clean, bounds, is_valid, weight, z_weight, *, vocab, tile_ids, dtype) -> _Chunk:
    start = jnp.where(is_valid, bounds[:, 0], 0)
    stop = jnp.where(is_valid, bounds[:, 1], vocab)
    low, high = jnp.min(jnp.where(is_valid, start, vocab)), jnp.max(jnp.where(is_valid, stop, 0))
    return _Chunk(
        hidden=jnp.where(is_valid[:, None], hidden, 0.0).astype(dtype),
        clean=clean,
        start=start,
        stop=stop,
        is_valid=is_valid,
        weight=jnp.where(is_valid, weight, 0.0),
        z_weight=jnp.where(is_valid, z_weight, 0.0),
        low=low,
        num_tiles=jnp.maximum(-(-(high - low) // tile_ids), 1),
    )


def _columns(matrix, chunk: _Chunk, number, ids: int):
    """First id of a tile, and the matrix columns of its ids; the last tile starts early to end inside the matrix."""
    first = jnp.minimum(chunk.low + number * ids, matrix.shape[1] - ids)
    return first, jax.lax.dynamic_slice_in_dim(matrix, first, ids, axis=1)


def _tile(matrix, chunk: _Chunk, number, ids: int) -> Float[Array, "positions ids"]:
    """Logits of a tile; −∞ for ids that are not allowed or belong to the previous tile."""
    first, columns = _columns(matrix, chunk, number, ids)
    logits = jnp.matmul(chunk.hidden, columns, preferred_element_type=jnp.float32)
    tile_ids, unvisited = first + jnp.arange(ids), chunk.low + number * ids
    is_allowed = (tile_ids >= jnp.maximum(chunk.start[:, None], unvisited)) & (tile_ids < chunk.stop[:, None])
    return jnp.where(is_allowed, logits, -jnp.inf)


def _log_sum_exp(matrix, chunk: _Chunk, ids: int):
    """log Z and the clean token's logit at every position, accumulated over tiles, and the logits of the last tile."""

    def add(number, sums):
        largest, total, target, _ = sums
        logits = _tile(matrix, chunk, number, ids)
        new = jnp.maximum(largest, logits.max(axis=-1))
        total = total * jnp.exp(largest - new) + jnp.sum(jnp.exp(logits - new[:, None]), axis=-1)
        column = chunk.clean - _columns(matrix, chunk, number, ids)[0]
        logit = jnp.take_along_axis(logits, jnp.clip(column, 0, ids - 1)[:, None], axis=-1)[:, 0]
        target = jnp.where((column >= 0) & (column < ids), jnp.maximum(target, logit), target)
        return new, total, target, logits

    positions = len(chunk.clean)
    lowest = jnp.full(positions, jnp.finfo(jnp.float32).min)
    initial = (lowest, jnp.zeros(positions), jnp.full(positions, -jnp.inf), jnp.zeros((positions, ids)))
    largest, total, target, logits = jax.lax.fori_loop(0, chunk.num_tiles, add, initial)
    return largest + jnp.log(total), target, logits


def _pull_back(matrix, chunk: _Chunk, ids: int, log_z, last_logits, d_matrix):
    """Gradient of the chunk's hidden states, and `d_matrix` with the chunk's contribution added."""

    def add(number, logits, gradients):
        d_hidden, d_matrix = gradients
        first, columns = _columns(matrix, chunk, number, ids)
        p = jnp.exp(logits - log_z[:, None])
        d_logits = (chunk.weight + 2 * chunk.z_weight * log_z)[:, None] * p
        is_target = (first + jnp.arange(ids) == chunk.clean[:, None]) & (logits > -jnp.inf)
        d_logits = jnp.where(is_target, d_logits - chunk.weight[:, None], d_logits).astype(matrix.dtype)
        d_hidden += jnp.matmul(d_logits, columns.T, preferred_element_type=jnp.float32)
        new = jnp.matmul(chunk.hidden.T, d_logits, preferred_element_type=jnp.float32)
        old = jax.lax.dynamic_slice_in_dim(d_matrix, first, ids, axis=1)
        return d_hidden, jax.lax.dynamic_update_slice_in_dim(d_matrix, old + new, first, axis=1)

    last = chunk.num_tiles - 1
    gradients = add(last, last_logits, (jnp.zeros(chunk.hidden.shape), d_matrix))
    return jax.lax.fori_loop(0, last, lambda n, sums: add(n, _tile(matrix, chunk, n, ids), sums), gradients)
