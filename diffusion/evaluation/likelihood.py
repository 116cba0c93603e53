"""Bits of held-out examples: the negative ELBO of what each asks for, by Monte Carlo.

    bits = mean over draws d of  Σ_{i masked} w_d · (−log₂ p(x_i | x_d)),    τ_d = (u + d / draws) mod 1

    times     every token is masked with probability 1 − α(τ_d), and w_d = −α′/(1 − α)
    subsets   l = ⌈τ_d · n⌉ of the n tokens asked for are masked, w_d = n / l: without the chance of masking none,
              and with a smaller variance (LLaDA, arXiv 2502.09992)

Both are unbiased but for `min_time` of the first, and an upper bound of −log₂ p. An example's u and masks follow from
the seed and its content alone: not from its number, the row it stands in, the rows beside it, or the padding after it.
What else is asked changes the shapes of batches, and so at most the last bits of float32 sums.
Examples that are to be compared may share them, by their `draws`.
"""

import hashlib
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray, UInt32

from trimask.diffusion.cross_entropy import cross_entropy, restrict
from trimask.diffusion.denoiser import Denoiser
from trimask.diffusion.masking import draw_is_masked
from trimask.diffusion.schedule import ScheduleConfig, stratified_times
from trimask.tokenizers.sequence import Example, Segment, TokenRows, assemble, stack_rows, until_eos
from trimask.tokenizers.vocabulary import TEXT, Vocabulary

Estimator = Literal["times", "subsets"]
_MAX_LOGITS = 2**25
"""Of one batch: 128 MiB in float32."""


def num_asked(example: Example, vocabulary: Vocabulary) -> int:
    """Tokens that are asked for: of a text up to its first EOS, which counts; those after it are known for nothing."""
    asked = 0
    for segment in example.segments:
        codes = segment.codes.reshape(-1)[segment.num_given :]
        if segment.modality == TEXT:
            codes = codes[: len(until_eos(vocabulary, codes)) + 1]
        asked += codes.size
    return asked


def draws_of(segments: Sequence[Segment]) -> int:
    """The number of the draws of a content: equal ones have equal draws, whatever else is asked."""
    return int.from_bytes(_digest(segments)[:4], "big")


def _digest(segments: Sequence[Segment]) -> bytes:
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
    schedule: ScheduleConfig,
    *,
    num_draws: int,
    estimator: Estimator = "times",
    rows: int = 128,
    draws: Sequence[int] | None = None,
    report: Callable[[int, int], None] = lambda *_: None,
) -> Float[np.ndarray, " examples"]:
    """Bits of all that each example asks for, given its condition; at most `rows` examples at a time.

    `draws` has a number for each example, by which its u and masks are drawn; None: that of its content. Equal examples
    with equal draws are computed once.
    """
    bits, done = np.zeros(len(examples)), 0
    streams = np.array([draws_of(e.segments) for e in examples] if draws is None else draws, np.uint32)
    first_of: dict[Any, int] = {}
    keys = ((e.task, int(stream), _digest(e.segments)) for e, stream in zip(examples, streams, strict=True))
    same = np.array([first_of.setdefault(key, number) for number, key in enumerate(keys)], int)
    for length, all_numbers in _by_length(examples).items():
        numbers = [number for number in all_numbers if same[number] == number]
        size = max(1, min(rows, _MAX_LOGITS // (length * vocabulary.size)))
        for first in range(0, len(numbers), size):
            chunk = numbers[first : first + size]
            filled = np.array(chunk + chunk[:1] * (min(size, 1 << (len(chunk) - 1).bit_length()) - len(chunk)))
            batch = stack_rows([assemble(vocabulary, [examples[number]], length) for number in filled])
            for draw in range(num_draws):
                place = np.int32(draw), np.int32(num_draws)
                drawn = _bits(key, streams[filled], *place, denoise, batch, vocabulary, schedule, estimator)
                bits[chunk] += np.asarray(drawn, np.float64)[: len(chunk)] / num_draws
            done += int(np.isin(same, chunk).sum())
            report(done, len(examples))
    return bits[same]


def estimates_of_bits(
    key: PRNGKeyArray,
    examples: Sequence[Example],
    *args: Any,
    repeats: int = 8,
    report: Callable[[int, int], None] = lambda *_: None,
    **options: Any,
) -> Float[np.ndarray, "repeats examples"]:
    """So many independent estimates of `target_bits`."""
    if repeats < 2:
        raise ValueError(f"an interval needs at least 2 estimates, got {repeats}")
    total, estimates = repeats * len(examples), []
    for number, own in enumerate(jax.random.split(key, repeats)):
        before = number * len(examples)
        counted = partial(lambda before, done, _: report(before + done, total), before)
        estimates.append(target_bits(own, examples, *args, report=counted, **options))
    return np.stack(estimates)


def mean_of(
    estimates: Float[np.ndarray, "repeats *rest"],
) -> tuple[Float[np.ndarray, "*rest"], Float[np.ndarray, "*rest"]]:
    """Mean of independent estimates, and half the width of its 95 % interval (Student's t)."""
    from scipy.special import stdtrit  # takes a third of a second to load

    repeats = len(estimates)
    error = np.std(estimates, axis=0, ddof=1) / repeats**0.5
    return np.mean(estimates, axis=0), float(stdtrit(repeats - 1, 0.975)) * np.asarray(error)


def _by_length(examples: Sequence[Example]) -> dict[int, list[int]]:
    """Row length → numbers of its examples. Lengths are 2ⁿ or 3 · 2ⁿ, or the longest, so that few are compiled."""
    longest = max(example.length for example in examples)
    lengths = sorted({longest, *(b * 2**n for b in (2, 3) for n in range(3, longest.bit_length()))})
    groups: dict[int, list[int]] = {}
    for number, example in enumerate(examples):
        groups.setdefault(next(n for n in lengths if n >= example.length), []).append(number)
    return dict(sorted(groups.items()))


@partial(jax.jit, static_argnames=("vocabulary", "schedule", "estimator"))
def _bits(
    key: PRNGKeyArray,
    streams: UInt32[Array, " batch"],
    draw: Int[Array, ""],
    num_draws: Int[Array, ""],
    denoise: Denoiser,
    sequence: TokenRows,
    vocabulary: Vocabulary,
    schedule: ScheduleConfig,
    estimator: Estimator,
) -> Float[Array, " batch"]:
    """Bits of every row by one draw of so many."""

    chosen = schedule.build(vocabulary)

    def mask(stream, is_target, modality):
        key_time, key_mask = jax.random.split(jax.random.fold_in(key, stream))
        offset, key_mask = jax.random.uniform(key_time), jax.random.fold_in(key_mask, draw)
        # The first values of a row are the same however long it is (tested), so padding changes no mask.
        if estimator == "subsets":
            count = is_target.sum()
            size = jnp.clip(jnp.ceil(((offset + draw / num_draws) % 1) * count), 1, count)
            noise = jnp.where(is_target, jax.random.uniform(key_mask, is_target.shape), jnp.inf)
            return is_target & (jnp.argsort(jnp.argsort(noise)) < size), jnp.full(is_target.shape, count / size)
        times = jnp.full(is_target.shape, stratified_times(offset, draw / num_draws, schedule.min_time))
        is_masked = draw_is_masked(key_mask, is_target[None], chosen.keep_probability(times, modality)[None])[0]
        return is_masked, chosen.weight(times, modality)

    is_masked, weight = jax.vmap(mask)(streams, sequence.is_target, sequence.modality)
    noised = sequence.replace(tokens=jnp.where(is_masked, vocabulary.mask_id, sequence.tokens))
    allowed = vocabulary.allowed_ids(sequence.modality, sequence.coordinates)
    nll, _ = cross_entropy(restrict(denoise(noised).logits, allowed), jnp.asarray(sequence.tokens))
    nats = jnp.where(is_masked, weight * nll, 0.0)
    return nats.sum(axis=-1) / jnp.log(2)
