"""Codebooks: fitted by k-means, looked up by squared distance.

    code(x) = argmin_k ‖x − c_k‖²

and of equally near codewords the one of lowest index.
"""

from functools import cache

import numpy as np
from jaxtyping import Float32, Int, Num, Shaped
from threadpoolctl import ThreadpoolController, threadpool_limits

_MANY = 1 << 32
"""Multiplications of a pass over all vectors beyond which k-means sees them in mini-batches."""
_CANDIDATES = 3
"""For each codeword, of which k-means in mini-batches begins with one."""
_VERY_MANY = 4096
"""Codewords beyond which to choose among candidates takes longer than all else."""
_PASSES = 3
"""Over all vectors, in mini-batches: ten gain 0.03 dB of PSNR."""


def fit_codebook(
    vectors: Num[np.ndarray, "count dim"], size: int, seed: int, max_vectors: int
) -> Num[np.ndarray, "codewords dim"]:
    """At most `size` codewords for these vectors, a random `max_vectors` of them if there are more.

    Where there are no more distinct vectors than codewords, they are the codebook, which is then shorter. Where vectors
    and codewords are many, as 200,000 of 48 numbers and 1,024, Lloyd's hundreds of passes would take minutes to days;
    in mini-batches (Sculley 2010) there are three passes, and pictures come back 0.13 dB worse.
    """
    if len(vectors) > max_vectors:
        chosen = np.random.default_rng(seed).choice(len(vectors), max_vectors, replace=False)
        vectors = vectors[np.sort(chosen)]
    distinct, counts = np.unique(vectors, axis=0, return_counts=True)
    if len(distinct) <= size:
        return distinct
    from sklearn.cluster import KMeans, MiniBatchKMeans  # takes seconds to load, and only fitting needs it

    if distinct.size * size > _MANY:
        points = distinct.astype(np.float32)
        # No early end by a mean of distances: its last bits depend on the number of threads, all else does not. And no
        # codeword is moved for being rare beside the commonest one, a blank patch say, which would move most of them.
        kmeans = MiniBatchKMeans(
            size,
            init=_beginnings(points, counts, size, seed),
            n_init=1,
            init_size=size,
            batch_size=max(4096, 2 * size),
            max_iter=_PASSES,
            max_no_improvement=None,
            reassignment_ratio=0.0,
            random_state=seed,
        )
        return kmeans.fit(points, sample_weight=counts).cluster_centers_
    # One thread: scikit-learn adds partial sums in the order in which its threads finish.
    with threadpool_limits(1):
        kmeans = KMeans(size, n_init=1, random_state=seed).fit(distinct.astype(np.float64), sample_weight=counts)
    return kmeans.cluster_centers_


def _beginnings(
    points: Float32[np.ndarray, "count dim"], counts: Int[np.ndarray, " count"], size: int, seed: int
) -> Float32[np.ndarray, "{size} dim"]:
    """Points of which none is there twice: far from each other, by k-means++ on some, unless they are very many."""
    from sklearn.cluster import kmeans_plusplus

    few = size if size > _VERY_MANY else min(len(points), _CANDIDATES * size)
    some = np.random.default_rng(seed).choice(len(points), few, replace=False, p=counts / counts.sum())
    if few == size:
        return points[some]
    with threadpool_limits(1):
        return kmeans_plusplus(points[some], size, n_local_trials=1, random_state=seed)[0]


def nearest_codeword(
    vectors: Num[np.ndarray, "batch count dim"], codebook: Num[np.ndarray, "codewords dim"]
) -> Int[np.ndarray, "batch count"]:
    """Code of each vector. Exact, ties included, where vectors and codewords are integers."""
    codewords = codebook.astype(np.float64)
    half_norms = np.square(codewords).sum(1) / 2
    codes = np.empty(vectors.shape[:2], np.int32)
    # Item by item: BLAS may round a larger product differently; codes must not depend on the batch. On one
    # thread: for products this small, waiting for another core costs up to thirty times the work.
    with _threads().limit(limits=1, user_api="blas"):
        for item, rows in enumerate(vectors):
            codes[item] = np.argmin(half_norms - rows.astype(np.float64) @ codewords.T, axis=1)
    return codes


@cache
def _threads() -> ThreadpoolController:
    """Looks for the libraries once, which takes milliseconds."""
    return ThreadpoolController()


def check_codes(codes: Shaped[np.ndarray, "..."], size: int) -> None:
    """Refuses codes that this codebook does not have."""
    if codes.size and (codes.min() < 0 or codes.max() >= size):
        raise ValueError(f"codes must be from 0 to {size - 1}, got {codes.min()} to {codes.max()}")
