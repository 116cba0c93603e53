"""Cross-entropy in tiles against the naive one: values and gradients, over shapes, masks, ranges and tiles."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trimask.diffusion.cross_entropy import cross_entropy, masked_cross_entropy, restrict

RANGES = ((0, 3), (3, 10), (10, 11), (11, 23))


def naive(hidden, matrix, clean, bounds, is_masked, weight, z_weight):
    ids = jnp.arange(matrix.shape[1])
    allowed = (ids >= bounds[:, :1]) & (ids < bounds[:, 1:])
    nll, log_z = cross_entropy(restrict((hidden @ matrix)[None], allowed[None]), clean[None])
    nll, log_z = (jnp.where(is_masked, x[0], 0.0) for x in (nll, log_z))
    return jnp.sum(weight * nll + z_weight * log_z**2), nll


def problem(seed, tokens, width, share, scale=1.0):
    rng = np.random.default_rng(seed)
    bounds = np.array(RANGES)[rng.integers(0, len(RANGES), tokens)]
    numbers = (rng.integers(*bounds.T), bounds, rng.random(tokens) < share)
    floats = (scale * rng.normal(size=(tokens, width)), rng.normal(size=(width, RANGES[-1][1])))
    weights = (rng.random(tokens), 0.1 * rng.random(tokens))
    return (
        *(jnp.asarray(x, jnp.float32) for x in floats),
        *map(jnp.asarray, numbers),
        *(jnp.asarray(x, jnp.float32) for x in weights),
    )


# What is in a problem is no part of the program, so that one is compiled for all problems of a shape.
OURS = jax.jit(jax.value_and_grad(masked_cross_entropy, (0, 1), has_aux=True), static_argnums=(7, 8, 9))
THEIRS = jax.jit(jax.value_and_grad(naive, (0, 1), has_aux=True))


def both(arguments, rows, columns, dtype="float32"):
    return OURS(*arguments, rows, columns, dtype), THEIRS(*arguments)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 1000),
    share=st.sampled_from([0.0, 0.5, 1.0]),
    # Tiles that end with the tokens and ids, before and behind; each is compiled once.
    shape=st.sampled_from([(13, 4, 9), (13, 64, 4), (5, 1, 64), (5, 4, 4), (1, 4, 1)]),
)
def test_loss_and_gradients_are_the_naive_ones(seed, share, shape):
    tokens, positions, ids = shape
    ours, theirs = both(problem(seed, tokens, 6, share), positions, ids)
    # float32, sums of at most 13 × 23 terms in another order.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), ours, theirs)


def test_nothing_masked_is_a_loss_of_zero_without_gradient():
    ((loss, nll), gradients), _ = both(problem(0, 7, 3, 0.0), 2, 5)
    assert float(loss) == 0 and not nll.any()
    assert not any(g.any() for g in gradients)


def test_huge_logits_do_not_overflow():
    ours, theirs = both(problem(1, 9, 6, 1.0, scale=1e4), 4, 4)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), ours[0], theirs[0])
    assert all(np.isfinite(g).all() for g in ours[1])


def test_what_is_not_masked_is_not_looked_at():
    arguments = problem(2, 9, 6, 0.5)
    hidden = jnp.where(arguments[4][:, None], arguments[0], jnp.inf)
    (values, gradients), _ = both((hidden, *arguments[1:]), 64, 5)
    (expected, expected_gradients), _ = both(arguments, 64, 5)
    np.testing.assert_array_equal(values[0], expected[0])
    np.testing.assert_array_equal(gradients[1], expected_gradients[1])


def test_a_token_outside_of_its_range_is_an_infinite_loss():
    arguments = list(problem(3, 4, 6, 1.0))
    arguments[2] = arguments[3][:, 1] % RANGES[-1][1]
    loss, _ = masked_cross_entropy(*arguments, 2, 5, "float32")
    assert np.isposinf(loss)


def test_products_in_half_precision_have_gradients_in_single():
    ours, theirs = both(problem(4, 13, 32, 1.0), 4, 9, "bfloat16")
    assert all(g.dtype == jnp.float32 for g in ours[1])
    # bfloat16 has 8 bits.
    np.testing.assert_allclose(ours[0][0], theirs[0][0], rtol=0.02)
    np.testing.assert_allclose(ours[1][1], theirs[1][1], atol=0.05 * float(jnp.abs(theirs[1][1]).max()))


@pytest.mark.parametrize("columns", [64, 1024])
def test_no_array_is_of_tokens_by_vocabulary(columns):
    tokens, width, vocab = 2048, 8, 1024
    shapes = [((tokens, width), jnp.float32), ((width, vocab), jnp.float32), (tokens, jnp.int32)]
    shapes += [((tokens, 2), jnp.int32), (tokens, bool), (tokens, jnp.float32), (tokens, jnp.float32)]
    arguments = [jax.ShapeDtypeStruct(shape if isinstance(shape, tuple) else (shape,), kind) for shape, kind in shapes]
    gradient = jax.grad(lambda *x: masked_cross_entropy(*x, 32, columns, "float32")[0], (0, 1))
    memory = jax.jit(gradient).lower(*arguments).compile().memory_analysis()
    # A few tiles and a few copies of the matrix, where naive logits alone take 8 MB.
    assert memory.temp_size_in_bytes < 4 * (32 * columns + (tokens + vocab) * width) * 4 < 4 * tokens * vocab / 4
