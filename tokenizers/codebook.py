"""Codebooks for vector quantisation: k-means to fit them, squared distance to look codes up.

    code(x) = argmin_k ‖x − c_k‖²

Among equally near codewords the one with the lowest index is taken.
"""

from functools import cache

import numpy as np
from jaxtyping import Float32, Int, Num, Shaped
from threadpoolctl import ThreadpoolController, threadpool_limits

_MAX_FULL_BATCH_PRODUCTS = 1 << 32
"""Multiplications per pass over all vectors above which k-means uses mini-batches."""
_CANDIDATES_PER_CODEWORD = 3
"""Random vectors per codeword from which k-means++ chooses the initial codewords of mini-batch k-means."""
_MAX_KMEANS_PLUSPLUS = 4096
"""Largest number of codewords initialised by k-means++; with more it takes longer than all the rest."""
_MINI_BATCH_PASSES = 3
"""Passes of mini-batch k-means over all vectors. Ten passes would gain 0.03 dB of PSNR."""


def fit_codebook(
    vectors: Num[np.ndarray, "count dim"], size: int, seed: int, max_vectors: int
) -> Num[np.ndarray, "codewords dim"]:
    """Fits at most `size` codewords by k-means, on a random `max_vectors` of the vectors if there are more.

    If there are at most `size` distinct vectors, they are the codebook. For large problems, such as 200,000 vectors of
    48 numbers and 1,024 codewords, Lloyd's hundreds of passes would take minutes to days; mini-batch k-means (Sculley
    2010) makes three passes, and pictures lose 0.13 dB of PSNR.
    """
    if len(vectors) > max_vectors:
        chosen = np.random.default_rng(seed).choice(len(vectors), max_vectors, replace=False)
        vectors = vectors[np.sort(chosen)]
    distinct, counts = np.unique(vectors, axis=0, return_counts=True)
    if len(distinct) <= size:
        return distinct
    from sklearn.cluster import KMeans, MiniBatchKMeans  # takes seconds to load, and only fitting needs it

    if distinct.size * size > _MAX_FULL_BATCH_PRODUCTS:
        points = distinct.astype(np.float32)
        # No early stopping: it compares mean distances, whose last bits depend on the number of threads. No
        # reassignment of rare codewords: beside a very common vector, such as a blank patch, most codewords are rare.
        kmeans = MiniBatchKMeans(
            size,
            init=_initial_codewords(points, counts, size, seed),
            n_init=1,
            init_size=size,
            batch_size=max(4096, 2 * size),
            max_iter=_MINI_BATCH_PASSES,
            max_no_improvement=None,
            reassignment_ratio=0.0,
            random_state=seed,
        )
        return kmeans.fit(points, sample_weight=counts).cluster_centers_
    # One thread: scikit-learn adds partial sums in the order in which its threads finish.
    with threadpool_limits(1):
        kmeans = KMeans(size, n_init=1, random_state=seed).fit(distinct.astype(np.float64), sample_weight=counts)
    return kmeans.cluster_centers_


def _initial_codewords(
    points: Float32[np.ndarray, "count dim"], counts: Int[np.ndarray, " count"], size: int, seed: int
) -> Float32[np.ndarray, "{size} dim"]:
    """Distinct initial codewords: by k-means++ among random candidates, or drawn at random if there are very many."""
    from sklearn.cluster import kmeans_plusplus

    num_candidates = size if size > _MAX_KMEANS_PLUSPLUS else min(len(points), _CANDIDATES_PER_CODEWORD * size)
    candidates = np.random.default_rng(seed).choice(len(points), num_candidates, replace=False, p=counts / counts.sum())
    if num_candidates == size:
        return points[candidates]
    with threadpool_limits(1):
        return kmeans_plusplus(points[candidates], size, n_local_trials=1, random_state=seed)[0]


def nearest_codeword(
    vectors: Num[np.ndarray, "batch count dim"], codebook: Num[np.ndarray, "codewords dim"]
) -> Int[np.ndarray, "batch count"]:
    """Index of the codeword nearest to each vector. Exact, ties included, if vectors and codewords are integers."""
    codewords = codebook.astype(np.float64)
    half_norms = np.square(codewords).sum(1) / 2
    codes = np.empty(vectors.shape[:2], np.int32)
    # Item by item, because BLAS may round a larger product differently and codes must not depend on the batch. On one
    # thread, because for products this small waiting for another core costs up to thirty times the work.
    with _threads().limit(limits=1, user_api="blas"):
        for item, rows in enumerate(vectors):
            codes[item] = np.argmin(half_norms - rows.astype(np.float64) @ codewords.T, axis=1)
    return codes


@cache
def _threads() -> ThreadpoolController:
    """Controller of the libraries' threads, kept because finding the libraries takes milliseconds."""
    return ThreadpoolController()


def check_codes(codes: Shaped[np.ndarray, "..."], size: int) -> None:
    """Raises ValueError for codes outside a codebook of this size."""
    if codes.size and (codes.min() < 0 or codes.max() >= size):
        raise ValueError(f"codes must be from 0 to {size - 1}, got {codes.min()} to {codes.max()}")
