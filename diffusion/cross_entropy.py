"""Cross-entropy; at masked positions over a large vocabulary, without an array of [tokens, vocab].

    loss = Σ_{i masked} c_i · nll_i + z_i · (log Z_i)²        nll_i = log Z_i − h_i · W[:, x_i]
    log Z_i = log Σ_{v allowed at i} exp(h_i · W[:, v])       allowed: one range of ids, [start_i, stop_i)

What is not masked does not enter the loss, and most ids are not allowed at a position, so neither is computed: masked
positions are sorted by their range and taken a chunk at a time, for as many chunks as there are; of a chunk only the
ids are looked at that one of its positions may take, a tile at a time, with an online log-sum-exp (Milakov and
Gimelshein, arXiv 1805.02867). That no logits are kept is the idea of cut cross-entropy (arXiv 2411.09009).

Deviations from that paper
1. The gradient is computed with the loss, since the cotangent of a sum is one number: the last tile of logits, mostly
   the only one, is not computed again.
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
    """Logits with probability zero for every id that is not allowed."""
    return jnp.where(allowed, logits, -jnp.inf)


def cross_entropy(
    logits: Float[Array, "batch seq vocab"], clean: Int[Array, "batch seq"]
) -> tuple[Float[Array, "batch seq"], Float[Array, "batch seq"]]:
    """−log p of the clean tokens in nats, and log Σ exp logits, at every position."""
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
    """The loss, with its gradient of hidden states and matrix, and −log p of the clean tokens in nats, without one.

    `bounds` are start and stop of the ids a position may take, `weight` and `z_weight` its c and z. At most
    tile_positions × tile_ids logits exist at a time. Products are of numbers of type `dtype`, sums are float32. −log p
    is 0 where nothing is masked. On a mesh each device takes its share of the tokens, and gathers the matrix.
    """
    return _sums(hidden, matrix, clean, bounds, is_masked, weight, z_weight, tile_positions, tile_ids, dtype, False)[0]


def _forward(hidden, matrix, clean, bounds, is_masked, weight, z_weight, tile_positions, tile_ids, dtype):
    return _sums(hidden, matrix, clean, bounds, is_masked, weight, z_weight, tile_positions, tile_ids, dtype, True)


def _backward(tile_positions, tile_ids, dtype, gradients, cotangents):
    d_hidden, d_matrix = (cotangents[0] * gradient for gradient in gradients)
    return d_hidden, d_matrix, None, None, None, None, None


masked_cross_entropy.defvjp(_forward, _backward)


def _sums(hidden, matrix, clean, bounds, is_masked, weight, z_weight, tile_positions, tile_ids, dtype, with_gradient):
    """The values of `masked_cross_entropy`, and (d hidden, d matrix) or None; on the mesh in use, if there is one."""
    mesh, matrix = current_mesh(), matrix.astype(dtype)
    of_tokens = (hidden, clean, bounds, is_masked, weight, z_weight)
    of_device = partial(_sums_here, tile_positions=tile_positions, tile_ids=tile_ids, with_gradient=with_gradient)
    if mesh is None:
        return of_device(matrix, *of_tokens)

    spec = partition_spec("unembedding", matrix.shape, mesh)
    scattered = spec[0] or ()

    def of_share(*arguments):
        (loss, nll), gradients = of_device(*arguments)
        if with_gradient:
            # Each device is given the sum of the part that it has to update.
            d_hidden, d_matrix = gradients
            if scattered:
                d_matrix = jax.lax.psum_scatter(d_matrix, scattered, scatter_dimension=0, tiled=True)
            rest = tuple(axis for axis in mesh.axis_names if axis not in scattered)
            gradients = (d_hidden, jax.lax.psum(d_matrix, rest))
        return (jax.lax.psum(loss, mesh.axis_names), nll), gradients

    whole, split = PartitionSpec(), PartitionSpec(mesh.axis_names)
    padded = (jnp.pad(x, [(0, -len(x) % mesh.size)] + [(0, 0)] * (x.ndim - 1)) for x in of_tokens)
    out_specs = ((whole, split), (split, spec) if with_gradient else None)
    shared = jax.shard_map(of_share, in_specs=(whole, *[split] * 6), out_specs=out_specs, check_vma=False)
    (loss, nll), gradients = shared(matrix, *padded)
    return (loss, nll[: len(clean)]), gradients and (gradients[0][: len(clean)], gradients[1])


def _sums_here(matrix, hidden, clean, bounds, is_masked, weight, z_weight, *, tile_positions, tile_ids, with_gradient):
    """The values and gradients of this device's tokens; the matrix is in the dtype of products."""
    tokens, vocab = len(clean), matrix.shape[1]
    positions, ids = min(tile_positions, tokens), min(tile_ids, vocab)
    order = jnp.argsort(jnp.where(is_masked, bounds[:, 0], vocab), stable=True)
    order = jnp.pad(order, (0, -tokens % positions), constant_values=tokens)  # past the end: read as 0, never written

    def add(number, sums):
        loss, nll, gradients = sums
        here = jax.lax.dynamic_slice_in_dim(order, number * positions, positions)
        taken = (
            jnp.take(values, here, axis=0, mode="fill", fill_value=0)
            for values in (hidden, clean, bounds, is_masked, weight, z_weight)
        )
        chunk = _chunk(*taken, vocab=vocab, tile_ids=ids, dtype=matrix.dtype)
        log_z, target, last_logits = _log_sum_exp(matrix, chunk, ids)
        nll_here = jnp.where(chunk.is_there, log_z - target, 0.0)
        loss += jnp.sum(chunk.weight * nll_here + chunk.z_weight * log_z**2)
        nll = nll.at[here].set(nll_here, mode="drop")
        if with_gradient:
            d_hidden, d_matrix = gradients
            d_here, d_matrix = _pull_back(matrix, chunk, ids, log_z, last_logits, d_matrix)
            gradients = (d_hidden.at[here].set(d_here, mode="drop"), d_matrix)
        return loss, nll, gradients

    zeros = (jnp.zeros(hidden.shape), jnp.zeros(matrix.shape)) if with_gradient else None
    num_chunks = -(-is_masked.sum() // positions)
    loss, nll, gradients = jax.lax.fori_loop(0, num_chunks, add, (jnp.zeros(()), jnp.zeros(tokens), zeros))
    return (loss, nll), gradients


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class _Chunk:
    """Masked positions that are taken together. Where none `is_there`, weights are 0, and all ids are allowed."""

    hidden: Float[Array, "positions width"]
    clean: Int[Array, " positions"]
    start: Int[Array, " positions"]
    stop: Int[Array, " positions"]
    is_there: Bool[Array, " positions"]
    weight: Float[Array, " positions"]
    z_weight: Float[Array, " positions"]
    low: Int[Array, ""]
    """First id that a position may take."""
    num_tiles: Int[Array, ""]
    """How many it takes from there to the last such id, at least one."""


def _chunk(hidden, clean, bounds, is_there, weight, z_weight, *, vocab, tile_ids, dtype) -> _Chunk:
    start = jnp.where(is_there, bounds[:, 0], 0)
    stop = jnp.where(is_there, bounds[:, 1], vocab)
    low, high = jnp.min(jnp.where(is_there, start, vocab)), jnp.max(jnp.where(is_there, stop, 0))
    return _Chunk(
        hidden=jnp.where(is_there[:, None], hidden, 0.0).astype(dtype),
        clean=clean,
        start=start,
        stop=stop,
        is_there=is_there,
        weight=jnp.where(is_there, weight, 0.0),
        z_weight=jnp.where(is_there, z_weight, 0.0),
        low=low,
        num_tiles=jnp.maximum(-(-(high - low) // tile_ids), 1),
    )


def _columns(matrix, chunk: _Chunk, number, ids: int):
    """The first id of a tile, and its columns of the matrix; the last tile begins early rather than end late."""
    first = jnp.minimum(chunk.low + number * ids, matrix.shape[1] - ids)
    return first, jax.lax.dynamic_slice_in_dim(matrix, first, ids, axis=1)


def _tile(matrix, chunk: _Chunk, number, ids: int) -> Float[Array, "positions ids"]:
    """The logits of a tile, −∞ where an id is not allowed or was in the tile before."""
    first, columns = _columns(matrix, chunk, number, ids)
    logits = jnp.matmul(chunk.hidden, columns, preferred_element_type=jnp.float32)
    numbered, wanted = first + jnp.arange(ids), chunk.low + number * ids
    is_allowed = (numbered >= jnp.maximum(chunk.start[:, None], wanted)) & (numbered < chunk.stop[:, None])
    return jnp.where(is_allowed, logits, -jnp.inf)


def _log_sum_exp(matrix, chunk: _Chunk, ids: int):
    """log Z and the clean token's logit at every position, online over tiles, and the logits of the last tile."""

    def add(number, sums):
        largest, total, target, _ = sums
        logits = _tile(matrix, chunk, number, ids)
        new = jnp.maximum(largest, logits.max(axis=-1))
        total = total * jnp.exp(largest - new) + jnp.sum(jnp.exp(logits - new[:, None]), axis=-1)
        column = chunk.clean - _columns(matrix, chunk, number, ids)[0]
        found = jnp.take_along_axis(logits, jnp.clip(column, 0, ids - 1)[:, None], axis=-1)[:, 0]
        target = jnp.where((column >= 0) & (column < ids), jnp.maximum(target, found), target)
        return new, total, target, logits

    positions = len(chunk.clean)
    lowest = jnp.full(positions, jnp.finfo(jnp.float32).min)
    nothing = (lowest, jnp.zeros(positions), jnp.full(positions, -jnp.inf), jnp.zeros((positions, ids)))
    largest, total, target, logits = jax.lax.fori_loop(0, chunk.num_tiles, add, nothing)
    return largest + jnp.log(total), target, logits


def _pull_back(matrix, chunk: _Chunk, ids: int, log_z, last_logits, d_matrix):
    """The gradient of the chunk's hidden states, and that of the matrix added to `d_matrix`."""

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
