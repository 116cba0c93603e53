"""Bits of held-out examples: the negative ELBO of what each asks for, by Monte Carlo.

    bits = mean over draws d of  Σ_{i masked} w(t_d) · (−log₂ p(x_i | x_{t_d})),    t_d = (u + d / draws) mod 1

An example's u and masks follow from the seed and its number alone: not from the row it stands in, the rows beside it,
or the padding after it.
"""

from collections.abc import Callable
from collections.abc import Sequence as AnySequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray

from trimask.diffusion.loss import cross_entropy, restrict
from trimask.diffusion.masking import mask_tokens
from trimask.diffusion.sampling.loop import Denoiser
from trimask.diffusion.schedule import ScheduleConfig, elbo_weight, stratified_times
from trimask.tokenizers.sequence import Example, Sequence, assemble, stack
from trimask.tokenizers.vocabulary import Vocabulary

_MAX_LOGITS = 2**25
"""Of one batch: 128 MiB in float32."""


def num_asked(example: Example) -> int:
    """Tokens that are not given."""
    return sum(segment.codes.size - segment.num_given for segment in example.segments)


def target_bits(
    key: PRNGKeyArray,
    examples: AnySequence[Example],
    denoise: Denoiser,
    vocabulary: Vocabulary,
    schedule: ScheduleConfig,
    *,
    num_draws: int,
    rows: int = 128,
    report: Callable[[int, int], None] = lambda *_: None,
) -> Float[np.ndarray, " examples"]:
    """Bits of all that each example asks for, given its condition; at most `rows` examples at a time."""
    bits, done = np.zeros(len(examples)), 0
    for length, numbers in _by_length(examples).items():
        size = max(1, min(rows, _MAX_LOGITS // (length * vocabulary.size)))
        for first in range(0, len(numbers), size):
            chunk = numbers[first : first + size]
            filled = np.array(chunk + chunk[:1] * (size - len(chunk)))
            batch = stack([assemble(vocabulary, [examples[number]], length) for number in filled])
            for draw in range(num_draws):
                place = jnp.asarray(draw), jnp.asarray(num_draws)
                drawn = _bits(key, jnp.asarray(filled), *place, denoise, batch, vocabulary, schedule)
                bits[chunk] += np.asarray(drawn, np.float64)[: len(chunk)] / num_draws
            done += len(chunk)
            report(done, len(examples))
    return bits


def _by_length(examples: AnySequence[Example]) -> dict[int, list[int]]:
    """Row length → numbers of its examples. Lengths are 2ⁿ or 3 · 2ⁿ, or the longest, so that few are compiled."""
    longest = max(example.length for example in examples)
    lengths = sorted({longest, *(b * 2**n for b in (2, 3) for n in range(3, longest.bit_length()))})
    groups: dict[int, list[int]] = {}
    for number, example in enumerate(examples):
        groups.setdefault(next(n for n in lengths if n >= example.length), []).append(number)
    return dict(sorted(groups.items()))


@partial(jax.jit, static_argnames=("vocabulary", "schedule"))
def _bits(
    key: PRNGKeyArray,
    numbers: Int[Array, " batch"],
    draw: Int[Array, ""],
    num_draws: Int[Array, ""],
    denoise: Denoiser,
    sequence: Sequence,
    vocabulary: Vocabulary,
    schedule: ScheduleConfig,
) -> Float[Array, " batch"]:
    """Bits of every row by one draw of so many."""

    def mask(number, is_target):
        key_time, key_mask = jax.random.split(jax.random.fold_in(key, number))
        time = stratified_times(jax.random.uniform(key_time), draw / num_draws, schedule.min_time)
        keep = jnp.full((1, len(is_target)), schedule.alpha(time))
        # The first values of a row are the same however long it is (tested), so padding changes no mask.
        is_masked = mask_tokens(jax.random.fold_in(key_mask, draw), is_target[None], keep)[0]
        return is_masked, elbo_weight(schedule.alpha, time)

    is_masked, weight = jax.vmap(mask)(numbers, sequence.is_target)
    noised = sequence.replace(tokens=jnp.where(is_masked, vocabulary.mask_id, sequence.tokens))
    allowed = vocabulary.allowed_ids(sequence.modality, sequence.place)
    nll, _ = cross_entropy(restrict(denoise(noised).logits, allowed), jnp.asarray(sequence.tokens))
    nats = jnp.where(is_masked, weight[:, None] * nll, 0.0)
    return nats.sum(axis=-1) / jnp.log(2)
