"""Quantisers: codes and vectors that belong together, by slow oracles; gradients; residual codebooks."""

from math import prod

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from trimask.tokenizers.neural.quantizers import Quantizer, QuantizerConfig, with_norm_1

KINDS = {
    "fsq": QuantizerConfig(levels=(5, 4, 2)),
    "fsq, residual": QuantizerConfig(levels=(3, 2), num_codebooks=3),
    "vq": QuantizerConfig(kind="vq", codebook_size=11, dimensions=5),
    "vq, residual": QuantizerConfig(kind="vq", codebook_size=7, dimensions=4, num_codebooks=3),
    "vq, any norm": QuantizerConfig(kind="vq", codebook_size=9, dimensions=6, normalise=False, num_codebooks=2),
}
WIDTH = 6


@pytest.fixture(params=KINDS)
def quantizer(request):
    return Quantizer(KINDS[request.param], WIDTH, rngs=nnx.Rngs(1))


@pytest.fixture
def latents():
    return 2 * jax.random.normal(jax.random.key(2), (3, 4, WIDTH))


def test_looked_up_codes_are_what_the_decoder_gets(quantizer, latents):
    found = quantizer.quantize(latents)
    assert found.codes.shape == (3, 4, quantizer.config.num_codebooks) and found.codes.dtype == jnp.int32
    np.testing.assert_allclose(quantizer.lookup(found.codes), found.latents, atol=1e-5)
    assert all(int(found.codes[..., k].max()) < size for k, size in enumerate(quantizer.config.codebook_sizes))


def test_codes_are_the_nearest_codewords(quantizer, latents):
    """Every codebook rounds what the ones before leave."""
    found, rest = quantizer.quantize(latents), latents
    for number in range(quantizer.config.num_codebooks):
        size = quantizer.config.codebook_sizes[number]
        codewords = quantizer._codewords_of(number, jnp.arange(size))
        distances = jnp.sum((found.projected[number][..., None, :] - codewords) ** 2, axis=-1)
        np.testing.assert_array_equal(found.codes[..., number], jnp.argmin(distances, axis=-1))
        rest = rest - quantizer.project_out[number](quantizer._codewords_of(number, found.codes[..., number]))
    np.testing.assert_allclose(latents - rest, found.latents, atol=1e-5)


@pytest.mark.parametrize("levels", [(2,), (8, 8, 4), (5, 2, 3, 7)])
def test_fsq_has_a_code_for_every_point_of_its_grid(levels):
    quantizer = Quantizer(QuantizerConfig(levels=levels), WIDTH, rngs=nnx.Rngs(0))
    codes = jnp.arange(prod(levels))
    points = quantizer._codewords_of(0, codes)
    np.testing.assert_array_equal(quantizer._round(0, points)[0], codes)
    for axis, number in enumerate(levels):
        np.testing.assert_allclose(
            np.unique(np.asarray(points[:, axis]).round(6)), np.linspace(-1, 1, number), atol=1e-6
        )


def test_gradients_pass_through_the_rounding(quantizer, latents):
    """Those of one codebook are as if nothing had been rounded."""
    gradient = jax.grad(lambda z: jnp.sum(quantizer.quantize(z).latents ** 2))(latents)
    assert np.isfinite(gradient).all() and (np.abs(gradient).sum(axis=-1) > 0).all()
    if quantizer.config.num_codebooks > 1:
        return
    of_output = 2 * quantizer.quantize(latents).latents

    def unrounded(z):
        from trimask.tokenizers.neural.quantizers import _bounded

        return quantizer.project_out[0](_bounded(quantizer.project_in[0](z), quantizer.config))

    (expected,) = jax.vjp(unrounded, latents)[1](of_output)
    np.testing.assert_allclose(gradient, expected, rtol=1e-4, atol=1e-4)


def test_vectors_may_use_their_first_codebooks_alone():
    quantizer = Quantizer(KINDS["vq, residual"], WIDTH, rngs=nnx.Rngs(1))
    latents = jax.random.normal(jax.random.key(3), (4, 2, WIDTH))
    num_used = jnp.array([1, 2, 3, 3])
    found = quantizer.quantize(latents, num_used[:, None])
    whole = quantizer.quantize(latents)
    np.testing.assert_array_equal(found.latents[2:], whole.latents[2:])
    first = quantizer.project_out[0](quantizer._codewords_of(0, whole.codes[..., 0]))
    np.testing.assert_allclose(found.latents[0], first[0], atol=1e-5)
    # The commitment is the mean over the vectors that use a codebook.
    squares = [
        jnp.sum((u - quantizer._codewords_of(k, found.codes[..., k])) ** 2, axis=-1)
        for k, u in enumerate(found.projected)
    ]
    expected = sum(float(square[k:].mean()) for k, square in enumerate(squares))
    assert float(found.commitment) == pytest.approx(expected, rel=1e-5)
    assert float(Quantizer(KINDS["fsq"], WIDTH, rngs=nnx.Rngs(1)).quantize(latents).commitment) == 0


def test_vectors_and_codewords_have_norm_1_if_directions_are_compared(latents):
    quantizer = Quantizer(KINDS["vq"], WIDTH, rngs=nnx.Rngs(1))
    (projected,) = quantizer.quantize(latents).projected
    for vectors in (projected, quantizer.codewords[...][0]):
        np.testing.assert_allclose(jnp.linalg.norm(vectors, axis=-1), 1, rtol=1e-4)
    assert not with_norm_1(jnp.zeros(3)).any()


def test_a_codebook_of_one_codeword_or_of_too_many_is_refused():
    with pytest.raises(
        ValueError, match=r"levels must give a codebook of 2 to 16,777,216 codewords, got 65536 × 65536"
    ):
        QuantizerConfig(levels=(65536, 65536))
