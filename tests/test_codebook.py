"""Codebooks fitted by k-means."""

import numpy as np
import pytest
from threadpoolctl import threadpool_limits

from trimask.tokenizers import codebook as codebooks
from trimask.tokenizers.codebook import fit_codebook, nearest_codeword


def test_only_so_many_vectors_are_drawn_and_the_seed_says_which():
    vectors = np.arange(300).reshape(100, 3)
    drawn = [fit_codebook(vectors, size=50, seed=seed, max_vectors=7) for seed in (0, 0, 1)]
    assert drawn[0].shape == (7, 3)
    assert all(vector in vectors.tolist() for vector in drawn[0].tolist())
    np.testing.assert_array_equal(drawn[0], drawn[1])
    assert not np.array_equal(drawn[0], drawn[2])


def test_every_codeword_is_the_mean_of_the_vectors_nearest_to_it():
    vectors = np.random.default_rng(0).integers(0, 9, (200, 2))
    codebook = fit_codebook(vectors, size=5, seed=0, max_vectors=1000)
    codes = nearest_codeword(vectors[None], codebook)[0]
    for code, codeword in enumerate(codebook):
        # k-means stops when its centres move by less than a ten-thousandth of the variance.
        assert codeword == pytest.approx(vectors[codes == code].mean(axis=0), abs=0.05)


def test_of_many_distances_mini_batches_find_much_the_same_whatever_the_threads(monkeypatch):
    rng = np.random.default_rng(0)
    vectors = rng.integers(0, 200, (40, 6))[rng.integers(0, 40, 20_000)] + rng.integers(-20, 21, (20_000, 6))

    def fitted(threads):
        with threadpool_limits(threads):
            return fit_codebook(vectors, size=64, seed=0, max_vectors=100_000)

    def error(codebook):
        return np.square(vectors - codebook[nearest_codeword(vectors[None], codebook)[0]]).mean()

    by_lloyd = fitted(2)
    monkeypatch.setattr(codebooks, "_MAX_FULL_BATCH_PRODUCTS", 64 * vectors.size // 2)
    in_batches = fitted(2)
    assert not np.array_equal(in_batches, by_lloyd) and len(np.unique(in_batches, axis=0)) == 64
    assert error(in_batches) < 1.25 * error(by_lloyd)
    np.testing.assert_array_equal(in_batches, fitted(1))


def test_a_vector_that_half_of_all_are_takes_no_codewords_from_the_others(monkeypatch):
    rng = np.random.default_rng(1)
    others = rng.integers(0, 200, (5000, 6))
    monkeypatch.setattr(codebooks, "_MAX_FULL_BATCH_PRODUCTS", 0)

    def used_and_error(vectors):
        codebook = fit_codebook(vectors, size=256, seed=0, max_vectors=100_000)
        codes = nearest_codeword(others[None], codebook)[0]
        return len(np.unique(codes)), np.square(others - codebook[codes]).mean()

    used, error = used_and_error(others)
    used_beside, error_beside = used_and_error(np.concatenate([others, np.full((5000, 6), 100)]))
    assert used_beside > 0.95 * used and error_beside < 1.05 * error


def test_of_so_many_vectors_that_all_begin_none_begins_twice(monkeypatch):
    monkeypatch.setattr(codebooks, "_MAX_KMEANS_PLUSPLUS", 4)
    points, counts = np.arange(20, dtype=np.float32).reshape(10, 2), np.arange(1, 11)
    beginnings = codebooks._initial_codewords(points, counts, 10, 0)
    assert sorted(beginnings.tolist()) == points.tolist()
    assert {tuple(one) for one in codebooks._initial_codewords(points, counts, 6, 0).tolist()} <= set(
        map(tuple, points.tolist())
    )
    assert len({tuple(one) for one in codebooks._initial_codewords(points, counts, 6, 0).tolist()}) == 6
