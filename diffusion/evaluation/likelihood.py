"""Monte Carlo estimates of the negative ELBO, in bits, of the targets of held-out examples.

    bits = mean over draws d of  n / l_d · Σ_{i masked} (−log₂ p(x_i | x_d)),    l_d = ⌈n · ((u + d / draws) mod 1)⌉

where l_d of the n target tokens are masked, a random set of that size (LLaDA, arXiv 2502.09992). The estimate is
unbiased for the bound of masked diffusion, which is the mean over all orders in which the tokens may be predicted one
after another; it does not depend on a noise schedule, and has a smaller variance than random times.

u ~ U[0, 1) is drawn once per example, and the masks once per draw d. An example's u and masks are determined by the
random key and the example's seed, by default a digest of its content: not by its index, its row in a batch, the rows
beside it, or the padding after it. The other examples of a call determine the shapes of batches, and so change at most
the last bits of float32 sums. Examples that are to be compared can share a seed.
"""

import hashlib
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray, UInt32

from trimask.diffusion.cross_entropy import cross_entropy, restrict
from trimask.diffusion.denoiser import Denoiser
from trimask.diffusion.schedule import stratified
from trimask.tokenizers.sequence import Example, Segment, TokenRows, assemble, stack_rows
from trimask.tokenizers.vocabulary import TEXT, Vocabulary

_MAX_LOGITS = 2**25
"""Most logits of one batch: 128 MiB in float32."""


def num_asked(example: Example, vocabulary: Vocabulary) -> int:
    """Number of target tokens; in a text up to and including its first EOS, after which EOS is certain."""
    asked = 0
    for segment in example.segments:
        codes = segment.codes.reshape(-1)[segment.num_given :]
        if segment.modality == TEXT:
            codes = codes[: len(vocabulary.until_eos(codes)) + 1]
        asked += codes.size
    return asked


def content_seed(segments: Sequence[Segment]) -> int:
    """An example's default seed: 32 bits of a digest of its segments, so that equal contents have equal draws."""
    return int.from_bytes(_digest(segments)[:4], "big")


def _digest(segments: Sequence[Segment]) -> bytes:
    """SHA-256 of modalities, shapes, numbers of given codes, and codes."""
    digest = hashlib.sha256()
    for segment in segments:
        digest.update(f"{segment.modality} {segment.codes.shape} {segment.num_given}\0".encode())
        digest.update(np.ascontiguousarray(segment.codes, "<i4").tobytes())
    return digest.digest()


def target_bits(
    key: PRNGKeyArray,
    examples: Sequence[Example],
    denoise: Denoiser,
    vocabulary: Vocabulary,
    *,
    num_draws: int,
    rows: int = 128,
    seeds: Sequence[int] | None = None,
    report: Callable[[int, int], None] = lambda *_: None,
) -> Float[np.ndarray, " examples"]:
    """Estimate of the bits of each example's target given its condition, from `num_draws` draws.

    `seeds` has one number per example (see the module's docstring); None: `content_seed`. Equal examples with equal
    seeds are computed once. A batch has at most `rows` examples; `report(done, examples)` is called after each.
    """
    bits, done = np.zeros(len(examples)), 0
    seeds = [content_seed(example.segments) for example in examples] if seeds is None else seeds
    all_seeds = np.array(seeds, np.uint32)
    first_of: dict[Any, int] = {}
    contents = ((e.task, int(seed), _digest(e.segments)) for e, seed in zip(examples, all_seeds, strict=True))
    first_equal = np.array([first_of.setdefault(content, number) for number, content in enumerate(contents)], int)
    for length, all_numbers in _by_length(examples).items():
        numbers = [number for number in all_numbers if first_equal[number] == number]
        size = max(1, min(rows, _MAX_LOGITS // (length * vocabulary.size)))
        for first in range(0, len(numbers), size):
            chunk = numbers[first : first + size]
            filled = np.array(chunk + chunk[:1] * (min(size, 1 << (len(chunk) - 1).bit_length()) - len(chunk)))
            batch = stack_rows([assemble(vocabulary, [examples[number]], length) for number in filled])
            for draw in range(num_draws):
                drawn = _bits_of_one_draw(
                    key,
                    all_seeds[filled],
                    np.int32(draw),
                    np.int32(num_draws),
                    denoise,
                    batch,
                    vocabulary,
                )
                bits[chunk] += np.asarray(drawn, np.float64)[: len(chunk)] / num_draws
            done += int(np.isin(first_equal, chunk).sum())
            report(done, len(examples))
    return bits[first_equal]


def estimates_of_bits(
    key: PRNGKeyArray,
    examples: Sequence[Example],
    *args: Any,
    repeats: int = 8,
    report: Callable[[int, int], None] = lambda *_: None,
    **options: Any,
) -> Float[np.ndarray, "repeats examples"]:
    """`repeats` independent estimates by `target_bits`, whose further arguments are passed on."""
    if repeats < 2:
        raise ValueError(f"an interval needs at least 2 estimates, got {repeats}")
    total, estimates = repeats * len(examples), []
    for number, repeat_key in enumerate(jax.random.split(key, repeats)):
        before = number * len(examples)
        counted = partial(lambda before, done, _: report(before + done, total), before)
        estimates.append(target_bits(repeat_key, examples, *args, report=counted, **options))
    return np.stack(estimates)


def _by_length(examples: Sequence[Example]) -> dict[int, list[int]]:
    """Indices of the examples by row length, which is 2ⁿ, 3 · 2ⁿ or that of the longest, so that few are compiled."""
    longest = max(example.length for example in examples)
    lengths = sorted({longest, *(b * 2**n for b in (2, 3) for n in range(3, longest.bit_length()))})
    groups: dict[int, list[int]] = {}
    for number, example in enumerate(examples):
        groups.setdefault(next(n for n in lengths if n >= example.length), []).append(number)
    return dict(sorted(groups.items()))


@partial(jax.jit, static_argnames="vocabulary")
def _bits_of_one_draw(
    key: PRNGKeyArray,
    seeds: UInt32[Array, " batch"],
    draw: Int[Array, ""],
    num_draws: Int[Array, ""],
    denoise: Denoiser,
    sequence: TokenRows,
    vocabulary: Vocabulary,
) -> Float[Array, " batch"]:
    """Estimate of each row's bits from draw `draw` of `num_draws`."""

    def mask(seed, is_target):
        key_time, key_mask = jax.random.split(jax.random.fold_in(key, seed))
        share, key_mask = stratified(jax.random.uniform(key_time), draw / num_draws), jax.random.fold_in(key_mask, draw)
        count = is_target.sum()
        size = jnp.clip(jnp.ceil(share * count), 1, count)
        # The first values of a row are the same however long it is (tested), so padding changes no mask.
        noise = jnp.where(is_target, jax.random.uniform(key_mask, is_target.shape), jnp.inf)
        return is_target & (jnp.argsort(jnp.argsort(noise)) < size), count / size

    is_masked, weight = jax.vmap(mask)(seeds, sequence.is_target)
    noised = sequence.replace(tokens=jnp.where(is_masked, vocabulary.mask_id, sequence.tokens))
    allowed = vocabulary.allowed_ids(sequence.modality, sequence.coordinates)
    nll, _ = cross_entropy(restrict(denoise(noised).logits, allowed), jnp.asarray(sequence.tokens))
    return weight * jnp.where(is_masked, nll, 0.0).sum(axis=-1) / jnp.log(2)
