"""Layers of networks, each compared with its formula."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from trimask.diffusion.layers import RMSNorm, product, rotary_sin_cos, rotate, sinusoids
from trimask.diffusion.parametrization import Initializer, ParametrizationConfig


@pytest.mark.parametrize(("x_shape", "weight_shape", "axes"), [((2, 3, 5), (5, 4, 2), 1), ((2, 3, 4, 2), (4, 2, 5), 2)])
def test_a_product_is_the_sum_over_its_axes_with_the_gradients_of_it(x_shape, weight_shape, axes):
    rng = np.random.default_rng(0)
    x, weight = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in (x_shape, weight_shape))

    def outcome(product):
        return product(x, weight), *jax.grad(lambda *xw: jnp.sum(jnp.sin(product(*xw))), argnums=(0, 1))(x, weight)

    plain = outcome(lambda x, weight: jnp.tensordot(x, weight, axes))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
        plain,
        outcome(lambda x, weight: product(x, weight, axes)),
    )


def test_gradients_of_weights_are_summed_in_float32_whatever_the_type_of_activations():
    ones = jnp.ones((1, 1024, 1), jnp.bfloat16)
    weight = jnp.ones((1, 1))
    gradient = jax.grad(lambda weight: product(ones, weight).sum())(weight)
    with_one_more = jnp.concatenate([ones, ones[:, :1]], axis=1)
    assert jax.grad(lambda weight: product(with_one_more, weight).sum())(weight) - gradient == 1  # bfloat16 has 8 bits


def test_rotation_makes_scores_depend_on_distance_only():
    rng = np.random.default_rng(0)
    q, k = jnp.asarray(rng.normal(size=(2, 1, 1, 1, 8)), jnp.float32)

    def at(x, position):
        return rotate(x, rotary_sin_cos(jnp.array([[position]]), 20, 8, 100.0))

    def score(i, j):
        return jnp.sum(at(q, i) * at(k, j))

    np.testing.assert_allclose(score(3, 7), score(13, 17), rtol=1e-4)
    assert abs(float(score(3, 7) - score(3, 8))) > 1e-3
    np.testing.assert_allclose(jnp.linalg.norm(at(q, 5)), jnp.linalg.norm(q), rtol=1e-5)


def test_rotation_turns_pairs_of_both_halves_by_the_angles_of_llama():
    x, position = np.arange(1.0, 5.0), 7
    by = position * np.array([1.0, 100.0**-0.5])
    expected = (x[:2] + 1j * x[2:]) * np.exp(1j * by)
    rotated = rotate(
        jnp.asarray(x, jnp.float32)[None, None, None], rotary_sin_cos(jnp.array([[position]]), 8, 4, 100.0)
    )
    np.testing.assert_allclose(rotated[0, 0, 0], [*expected.real, *expected.imag], rtol=1e-5)


def test_the_norm_follows_its_formula():
    norm = RMSNorm(3, 0.5, "final_norm", Initializer(ParametrizationConfig(), 1.0, 1.0))
    norm.scale[...] = jnp.array([1.0, 2.0, 3.0])
    x = np.array([[1.0, -2.0, 2.0]])
    np.testing.assert_allclose(norm(jnp.asarray(x, jnp.float32)), x / np.sqrt(3.0 + 0.5) * [1, 2, 3], rtol=1e-6)


def test_neighbouring_places_have_dissimilar_sinusoids():
    features = sinusoids(jnp.arange(8), 32)
    unit = features / jnp.linalg.norm(features, axis=-1, keepdims=True)
    assert float((unit @ unit.T - jnp.eye(8)).max()) < 0.9
