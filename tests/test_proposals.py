"""Proposals: their values, how tokens are drawn, and that only wanted positions are read."""

import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.tree_util import Partial

from trimask.diffusion.denoiser import DenoiserOutput
from trimask.diffusion.sampling.proposals import TokenSampling, draw_tokens, propose

SIZE = 37


def proposals(logits, is_wanted=None, chunk=64, num_top=0, **draw):
    """Proposals, computed for `chunk` positions of a row at a time."""
    logits = np.asarray(logits, np.float32)
    wanted = np.ones(logits.shape[:2], bool) if is_wanted is None else is_wanted
    keys, positions = (
        jax.random.split(jax.random.key(0), len(logits)),
        np.tile(range(logits.shape[1]), (len(logits), 1)),
    )
    return PROPOSE(logits, wanted, positions, keys, TokenSampling(**draw), chunk * len(logits), num_top)


@partial(jax.jit, static_argnums=(5, 6))
def PROPOSE(logits, *rest):
    return propose(DenoiserOutput(logits, Partial(lambda features: features), logits, ()), *rest)


def test_numbers_are_the_denoisers_before_temperature_and_filters():
    p = np.array([0.1, 0.2, 0.7, 0.0])
    seen = proposals(np.tile(np.log(p + 1e-38), (5, 4, 1)), temperature=3.0, top_k=2)
    assert set(np.unique(seen.token)) == {1, 2}
    np.testing.assert_allclose(seen.confidence, p[np.asarray(seen.token)], rtol=1e-5)
    np.testing.assert_allclose(seen.entropy, -(p[:3] * np.log(p[:3])).sum(), rtol=1e-5)
    np.testing.assert_allclose(seen.margin, 0.5, rtol=1e-5)


def test_impossible_ids_have_no_part_in_anything():
    logits = np.full((1, 1, 4), -np.inf)
    logits[..., 2] = 1.0
    seen = proposals(logits, temperature=1.0)
    assert seen.token.item() == 2
    np.testing.assert_allclose([seen.confidence, seen.margin, seen.entropy], np.array([1, 1, 0])[:, None, None])


def test_zero_temperature_takes_the_most_probable_and_of_equals_the_lowest():
    assert proposals([[[0.0, 0.5, 0.5, 0.1]]]).token.item() == 1
    assert proposals([[[0.0, 0.5, 0.5, 0.1]]]).margin.item() == 0


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_what_is_read_in_chunks_is_what_is_read_at_once(temperature):
    for seed in range(10):
        rng = np.random.default_rng(seed)
        logits, wanted = rng.normal(size=(3, 14, SIZE)).astype(np.float32), rng.random((3, 14)) < 0.1 * seed
        at_once, *chunked = (proposals(logits, wanted, chunk, temperature=temperature) for chunk in (64, 1, 4, 7))
        for other in chunked:
            for a, b in zip(jax.tree.leaves(at_once), jax.tree.leaves(other), strict=True):
                np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7)
                assert not np.asarray(a)[~wanted].any()


def test_the_largest_probabilities_are_told_in_falling_order():
    logits = np.random.default_rng(0).normal(size=(2, 9, SIZE)).astype(np.float32)
    p = np.exp(logits) / np.exp(logits).sum(axis=-1, keepdims=True)
    expected = np.sort(p, axis=-1)[..., ::-1][..., :3]
    wanted = np.arange(9)[None] % 2 == np.arange(2)[:, None]
    for chunk in (64, 2):
        top = proposals(logits, wanted, chunk, num_top=3, temperature=1.0).top
        np.testing.assert_allclose(top, np.where(wanted[..., None], expected, 0), rtol=1e-5)


def test_only_chunks_with_wanted_positions_are_read():
    reads = []

    def read(features):
        jax.debug.callback(lambda: reads.append(features.shape))
        return features

    wanted = np.zeros((2, 40), bool)
    wanted[0, [3, 17, 39]] = wanted[1, :9] = True

    @jax.jit
    def run(logits, wanted, positions, keys):
        return propose(DenoiserOutput(logits, Partial(read), logits, ()), wanted, positions, keys, TokenSampling(), 8)

    keys, positions = jax.random.split(jax.random.key(0), 2), np.tile(np.arange(40), (2, 1))
    jax.block_until_ready(run(np.zeros((2, 40, SIZE), np.float32), wanted, positions, keys))
    jax.effects_barrier()
    assert reads == [(2, 4, SIZE)] * 3  # nine positions of the second row


DRAWN = jax.jit(lambda p, uniform, draw: draw_tokens(jnp.log(p), uniform, draw))


def test_tokens_are_drawn_with_the_tempered_probabilities():
    p = np.random.default_rng(0).dirichlet(np.full(SIZE, 0.3))
    count = 40_000
    uniform = np.random.default_rng(1).random(count, np.float32)
    tokens = DRAWN(np.broadcast_to(p.astype(np.float32), (count, SIZE)), uniform, TokenSampling(temperature=2.0))
    expected = p**0.5 / (p**0.5).sum()
    deviation = np.sqrt(expected * (1 - expected) / count)
    assert (np.abs(np.bincount(tokens, minlength=SIZE) / count - expected) < 5 * deviation + 1e-6).all()


@pytest.mark.parametrize("size", [1, 2, 5, 200])
@settings(deadline=None, max_examples=40)
@given(st.floats(0, 1, exclude_max=True), st.integers(0, 1000))
def test_a_draw_inverts_the_cumulative_distribution(size, uniform, seed):
    p = np.random.default_rng(seed).dirichlet(np.ones(size)).astype(np.float32)
    p[seed % size] *= size == 1  # an impossible id, unless it is the only one
    uniform = np.float32(min(uniform, 1 - 2**-24))
    token = int(DRAWN(p, uniform, TokenSampling(temperature=1.0)))
    cumulative = np.cumsum(p.astype(np.float64)) / p.sum(dtype=np.float64)
    assert p[token] > 0
    assert uniform <= cumulative[token] + 1e-5 and uniform >= (cumulative[token - 1] if token else 0) - 1e-5


def test_a_draw_at_an_edge_is_of_the_token_that_begins_there():
    uniform = np.array([0, 0.25, 0.5, 0.75], np.float32)
    assert DRAWN(np.full((4, 4), 0.25, np.float32), uniform, TokenSampling(temperature=1.0)).tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("used", list(itertools.product([False, True], repeat=3)), ids=str)
@settings(deadline=None, max_examples=20)
@given(
    st.lists(st.sampled_from([1, 2, 3, 5, 8]), min_size=7, max_size=7),
    st.integers(1, 10),
    st.sampled_from([0.05, 0.3, 0.55, 0.9, 1.0]),
    st.sampled_from([0.0, 0.15, 0.61, 1.0]),
)
def test_filters_keep_what_their_definition_keeps(used, weights, top_k, top_p, min_p):
    top_k, top_p, min_p = (
        value if is_used else None for value, is_used in zip((top_k, top_p, min_p), used, strict=True)
    )
    p = np.array(weights, np.float64) / sum(weights)
    kept = p
    if top_k is not None:
        kept = np.where(p >= sorted(p)[::-1][min(top_k, len(p)) - 1], kept, 0)
        kept = kept / kept.sum()
    if top_p is not None:
        values = sorted(set(kept[kept > 0]))[::-1]
        cutoff = next((c for c in values if kept[kept >= c].sum() >= top_p - 1e-6), values[-1])
        kept = np.where(kept >= cutoff, kept, 0)
        kept = kept / kept.sum()
    if min_p is not None:
        kept = np.where(kept >= min_p * kept.max() * (1 - 1e-6), kept, 0)
    grid = ((np.arange(2000) + 0.5) / 2000).astype(np.float32)
    rows = np.broadcast_to(p.astype(np.float32), (2000, len(p)))
    draw = TokenSampling(temperature=1.0, top_k=top_k, top_p=top_p, min_p=min_p)
    drawn = np.bincount(DRAWN(rows, grid, draw), minlength=len(p)) / 2000
    np.testing.assert_allclose(drawn, kept / kept.sum(), atol=2e-3)


def test_a_draw_depends_on_key_and_place_alone():
    logits = np.random.default_rng(0).normal(size=(2, 12, SIZE)).astype(np.float32)
    keys, draw = jax.random.split(jax.random.key(0), 2), TokenSampling(temperature=2.0)

    def tokens(rows, places):
        here = logits[rows, places]
        positions = np.tile(np.arange(12)[places], (len(here), 1))
        return PROPOSE(here, np.ones(positions.shape, bool), positions, keys[rows], draw, 64, 0).token

    everything = tokens(slice(0, 2), slice(0, 12))
    np.testing.assert_array_equal(tokens(slice(0, 2), slice(3, 5)), everything[:, 3:5])
    np.testing.assert_array_equal(tokens(slice(1, 2), slice(0, 7)), everything[1:, :7])


def test_an_unlikely_token_is_as_rare_as_it_is():
    p = np.full(2**15, (1 - 0.5) / (2**15 - 1), np.float32)
    p[7] = 0.5
    uniform = jax.random.uniform(jax.random.key(1), (20_000,))
    token = jax.lax.map(
        lambda u: draw_tokens(jnp.log(jnp.asarray(p)), u, TokenSampling(temperature=1.0)), uniform, batch_size=500
    )
    share = float((np.asarray(token) == 7).mean())
    assert abs(share - 0.5) < 5 * 0.5 / 20_000**0.5
    others = np.asarray(token)[np.asarray(token) != 7]
    assert abs(others.mean() - 2**14) < 5 * 2**15 / 12**0.5 / len(others) ** 0.5


@pytest.mark.parametrize("name", ["top_k", "top_p", "min_p"])
def test_filters_may_change_without_compiling_anew(name):
    count = []

    @jax.jit
    def draw_one(draw):
        count.append(1)
        return draw_tokens(jnp.zeros(8), jnp.float32(0.5), draw)

    for value in (1, 1) if name == "top_k" else (0.5, 0.9):
        draw_one(TokenSampling(temperature=1.0, **{name: value}))
    assert len(count) == 1
