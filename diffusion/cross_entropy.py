"""Cross-entropy; at masked positions over a large vocabulary, without an array of [tokens, vocab].

    loss = Σ_{i masked} c_i · nll_i + z_i · (log Z_i)²        nll_i = log Z_i − h_i · W[:, x_i]
    log Z_i = log Σ_{v allowed at i} exp(h_i · W[:, v])       allowed: one range of ids, [start_i, stop_i)

What is not masked does not enter the loss, and most ids are not allowed at a position, so neither is computed: masked
positions are sorted by their range and taken so many rows at a time, for as many chunks as there are; of a chunk only
the ids are looked at that one of its rows may take, so many columns at a time, with an online log-sum-exp (Milakov and
Gimelshein, arXiv 1805.02867). That no logits are kept is the idea of cut cross-entropy (arXiv 2411.09009).

Deviations from that paper
1. The gradient is computed with the loss, since the cotangent of a sum is one number: the last tile of logits, mostly
   the only one, is not computed again.
2. Gradients are not filtered by size; they are exact.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from trimask.diffusion.mesh import partition


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
    rows: int,
    columns: int,
    dtype: str,
) -> tuple[Float[Array, ""], Float[Array, " tokens"]]:
    """The loss, with its gradient of hidden states and matrix, and −log p of the clean tokens in nats, without one.

    `bounds` are start and stop of the ids a position may take, `weight` and `z_weight` its c and z. At most rows ×
    columns logits exist at a time. Products are of numbers of type `dtype`, sums are float32. −log p is 0 where nothing
    is masked. On a mesh each device takes its share of the tokens, and gathers the matrix.
    """
    return _sums(hidden, matrix, clean, bounds, is_masked, weight, z_weight, rows, columns, dtype, False)[0]


def _forward(hidden, matrix, clean, bounds, is_masked, weight, z_weight, rows, columns, dtype):
    values, gradients = _sums(hidden, matrix, clean, bounds, is_masked, weight, z_weight, rows, columns, dtype, True)
    return values, gradients


def _backward(rows, columns, dtype, gradients, cotangents):
    d_hidden, d_matrix = (cotangents[0] * gradient for gradient in gradients)
    return d_hidden, d_matrix, None, None, None, None, None


masked_cross_entropy.defvjp(_forward, _backward)


def _sums(hidden, matrix, clean, bounds, is_masked, weight, z_weight, rows, columns, dtype, with_gradient):
    """The values of `masked_cross_entropy`, and (d hidden, d matrix) or None; on the mesh in use, if there is one."""
    mesh, matrix = jax.sharding.get_abstract_mesh(), matrix.astype(dtype)
    of_tokens = (hidden, clean, bounds, is_masked, weight, z_weight)
    of_device = partial(_sums_here, rows=rows, columns=columns, with_gradient=with_gradient)
    if mesh.empty or mesh.size == 1:
        return of_device(matrix, *of_tokens)

    place = partition("unembedding", matrix.shape, mesh)
    scattered = place[0] or ()

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
    out_specs = ((whole, split), (split, place) if with_gradient else None)
    shared = jax.shard_map(of_share, in_specs=(whole, *[split] * 6), out_specs=out_specs, check_vma=False)
    (loss, nll), gradients = shared(matrix, *padded)
    return (loss, nll[: len(clean)]), gradients and (gradients[0][: len(clean)], gradients[1])


def _sums_here(narrow, hidden, clean, bounds, is_masked, weight, z_weight, *, rows, columns, with_gradient):
    """The values and gradients of this device's tokens; `narrow` is the matrix in the dtype of products."""
    tokens, vocab, dtype = len(clean), narrow.shape[1], narrow.dtype
    rows, columns = min(rows, tokens), min(columns, vocab)
    order = jnp.argsort(jnp.where(is_masked, bounds[:, 0], vocab), stable=True)
    order = jnp.pad(order, (0, -tokens % rows), constant_values=tokens)  # past the end: read as 0, never written

    def of_chunk(chunk, carry):
        loss, nll, gradients = carry
        here = jax.lax.dynamic_slice_in_dim(order, chunk * rows, rows)
        h, x, allowed, is_there, c, z = (
            jnp.take(values, here, axis=0, mode="fill", fill_value=0)
            for values in (hidden, clean, bounds, is_masked, weight, z_weight)
        )
        h = jnp.where(is_there[:, None], h, 0.0).astype(dtype)
        # Of the rows that are not there all ids count, so that nothing of theirs is infinite.
        start = jnp.where(is_there, allowed[:, 0], 0)
        stop = jnp.where(is_there, allowed[:, 1], vocab)
        low = jnp.min(jnp.where(is_there, start, vocab))
        high = jnp.max(jnp.where(is_there, stop, 0))
        num_tiles = jnp.maximum(-(-(high - low) // columns), 1)

        def tile(number):
            """Logits of a tile, its first id, and which id each row looks for."""
            wanted = low + number * columns
            first = jnp.minimum(wanted, vocab - columns)
            ids = first + jnp.arange(columns)
            part = jax.lax.dynamic_slice_in_dim(narrow, first, columns, axis=1)
            logits = jnp.matmul(h, part, preferred_element_type=jnp.float32)
            # Ids below the wanted one belong to the tile before.
            is_allowed = (ids >= jnp.maximum(start[:, None], wanted)) & (ids < stop[:, None])
            return jnp.where(is_allowed, logits, -jnp.inf), first, part

        def summed(number, carry):
            most, total, target, _ = carry
            logits, first, _ = tile(number)
            new = jnp.maximum(most, logits.max(axis=-1))
            total = total * jnp.exp(most - new) + jnp.sum(jnp.exp(logits - new[:, None]), axis=-1)
            place = x - first
            own = jnp.take_along_axis(logits, jnp.clip(place, 0, columns - 1)[:, None], axis=-1)[:, 0]
            target = jnp.where((place >= 0) & (place < columns), jnp.maximum(target, own), target)
            return new, total, target, logits

        nothing = jnp.full(rows, jnp.finfo(jnp.float32).min)
        start_carry = (nothing, jnp.zeros(rows), jnp.full(rows, -jnp.inf), jnp.zeros((rows, columns)))
        most, total, target, last = jax.lax.fori_loop(0, num_tiles, summed, start_carry)
        log_z = most + jnp.log(total)
        own = jnp.where(is_there, log_z - target, 0.0)
        c, z = jnp.where(is_there, c, 0.0), jnp.where(is_there, z, 0.0)
        loss += jnp.sum(c * own + z * log_z**2)
        nll = nll.at[here].set(own, mode="drop")
        if not with_gradient:
            return loss, nll, gradients

        def pulled_back(logits, first, part, carry):
            d_h, d_matrix = carry
            p = jnp.exp(logits - log_z[:, None])
            d_logits = (c + 2 * z * log_z)[:, None] * p
            is_target = first + jnp.arange(columns) == x[:, None]
            d_logits = jnp.where(is_target & (logits > -jnp.inf), d_logits - c[:, None], d_logits).astype(dtype)
            d_h += jnp.matmul(d_logits, part.T, preferred_element_type=jnp.float32)
            new = jnp.matmul(h.T, d_logits, preferred_element_type=jnp.float32)
            old = jax.lax.dynamic_slice_in_dim(d_matrix, first, columns, axis=1)
            return d_h, jax.lax.dynamic_update_slice_in_dim(d_matrix, old + new, first, axis=1)

        def again(number, carry):
            logits, first, part = tile(number)
            return pulled_back(logits, first, part, carry)

        d_hidden, d_matrix = gradients
        first = jnp.minimum(low + (num_tiles - 1) * columns, vocab - columns)
        part = jax.lax.dynamic_slice_in_dim(narrow, first, columns, axis=1)
        carry = pulled_back(last, first, part, (jnp.zeros(h.shape), d_matrix))
        d_h, d_matrix = jax.lax.fori_loop(0, num_tiles - 1, again, carry)
        return loss, nll, (d_hidden.at[here].set(d_h, mode="drop"), d_matrix)

    zeros = (jnp.zeros(hidden.shape), jnp.zeros(narrow.shape)) if with_gradient else None
    num_chunks = -(-is_masked.sum() // rows)
    loss, nll, gradients = jax.lax.fori_loop(0, num_chunks, of_chunk, (jnp.zeros(()), jnp.zeros(tokens), zeros))
    return (loss, nll), gradients
