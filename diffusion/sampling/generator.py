"""Generates answers to requests, which are examples with masked codes: batching, random keys and reading of rows.

A request's random key is derived from the seed, its content and the number of equal requests before it, never from its
row in a batch. Requests whose lengths round up to the same multiple are batched together, in 2ⁿ rows. When half of a
batch is finished, the rest continues in a batch of half the size, so that finished rows cost nothing. In a batch of
another size or length the answer is the same, unless the denoiser's rounding decides between two tokens.
"""

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial
from jaxtyping import Array, Bool, Float, Int, UInt32

from trimask.diffusion.denoiser import Cache, Denoiser
from trimask.diffusion.sampling import sampler
from trimask.diffusion.sampling.generation_config import GenerationConfig
from trimask.diffusion.sampling.guidance import Guidance, generation_denoiser
from trimask.diffusion.sampling.state import Memory, RowKeys, Rules, State, Strategy, initial_state
from trimask.diffusion.schedule import LINEAR, Schedule
from trimask.tokenizers.sequence import Example, TokenRows, assemble, disassemble, stack_rows
from trimask.tokenizers.vocabulary import Vocabulary


@dataclass(frozen=True)
class Answer:
    """A request with some or all of its masked codes filled."""

    example: Example
    nfe: int
    """Number of function evaluations it took."""
    log_probs: Float[np.ndarray, " asked"]
    """Log-probability, in nats, of each generated token when it was revealed, in the order of the row; −∞ if masked."""
    steps: Int[np.ndarray, " asked"]
    """Step, counted from 1, in which each of them was revealed; 0 while it is masked."""


SamplerParts = tuple[Guidance | None, Strategy, Rules]
"""Guidance, strategy and rules: what the sampler needs of a `GenerationConfig`."""


class Generator:
    """Answers requests with one denoiser; compiles once per row length, batch size and kind of configuration."""

    def __init__(
        self,
        denoise: Denoiser,
        vocabulary: Vocabulary,
        *,
        schedule: Schedule = LINEAR,
        rows: int = 32,
        bucket: int = 8,
    ):
        """Batches have at most `rows` rows, which are padded to a multiple of `bucket` tokens.

        `schedule` is that of the noise with which the denoiser was trained, which `grid` may follow.
        """
        # A Partial is a tree of its arrays: the compiled loop takes weights as arguments, not as constants.
        self.denoise = denoise if isinstance(denoise, Partial) else Partial(denoise)
        self.vocabulary, self.schedule, self.rows, self.bucket = vocabulary, schedule, rows, bucket

    def generate(
        self,
        requests: Sequence[Example],
        config: GenerationConfig,
        seed: int,
        report: Callable[[int, int], None] = lambda *_: None,
    ) -> list[Answer]:
        """Answers in the order of the requests: every code -1 is filled, all others are kept.

        Calls `report(number of answers so far, number of requests)` as rows finish. Raises ValueError if `max_nfe` or
        `order` of the configuration do not suit the requests.
        """
        answers: dict[int, Answer] = {}
        parts = self._parts(config)
        for numbers, state, memory in self._initial_batches(requests, config, seed):
            while numbers:
                half = len(state.step) // 2
                state, memory, is_done = _sample(self.vocabulary, self.denoise, parts, state, memory, half)
                is_done = np.asarray(is_done)
                done = [row for row in range(len(numbers)) if is_done[row]]
                answers |= {numbers[row]: answer for row, answer in self._answers(state, done)}
                report(len(answers), len(requests))
                left = [row for row in range(len(numbers)) if not is_done[row]]
                numbers = [numbers[row] for row in left]
                if numbers:
                    kept = _with_repeats(left, _batch_size(len(left), self.rows))
                    state, memory = _take_rows((state, memory), np.array(kept))
        return [answers[number] for number in range(len(requests))]

    def _parts(self, config: GenerationConfig) -> SamplerParts:
        return config.guidance_settings, config.strategy_function, config.rules(self.vocabulary, self.schedule)

    def largest_batch(self, requests: Sequence[Example]) -> tuple[int, int]:
        """Most rows of a batch that `generate` makes of these requests, and most tokens of a row."""
        longest = max(request.length for request in requests)
        return _batch_size(len(requests), self.rows), -(-longest // self.bucket) * self.bucket

    def watch(self, requests: Sequence[Example], config: GenerationConfig, seed: int) -> Iterator[tuple[int, Answer]]:
        """Yields (index of the request, its state) before the first step and after each of its steps.

        The last state of a request is the answer that `generate` gives.
        """
        parts = self._parts(config)
        for numbers, state, memory in self._initial_batches(requests, config, seed):
            yield from ((numbers[row], answer) for row, answer in self._answers(state, list(range(len(numbers)))))
            cache, passes = None, 0
            is_done = ~np.asarray(state.is_masked).any(axis=-1)
            while not np.asarray(is_done)[: len(numbers)].all():
                before = np.asarray(state.step)
                state, memory, cache, is_done = _advance(self.vocabulary, self.denoise, parts, state, memory, cache)
                moved = np.flatnonzero(np.asarray(state.step)[: len(numbers)] != before[: len(numbers)]).tolist()
                yield from ((numbers[row], answer) for row, answer in self._answers(state, moved))
                passes += 1
                is_over = config.cache == "none" or passes >= (config.refresh_every or np.inf)
                if is_over or not np.asarray(state.is_open).any():
                    cache, passes = None, 0

    def trajectories(self, requests: Sequence[Example], config: GenerationConfig, seed: int) -> list[list[Answer]]:
        """The states of each request, before the first step and after every step; the last is `generate`'s answer."""
        paths: list[list[Answer]] = [[] for _ in requests]
        for number, answer in self.watch(requests, config, seed):
            paths[number].append(answer)
        return paths

    def _answers(self, state: State, rows: list[int]) -> Iterator[tuple[int, Answer]]:
        fields = (state.sequence, state.nfe, state.commit_confidence, state.commit_step, state.is_asked)
        sequence, nfe, confidence, steps, is_asked = jax.device_get(fields)
        for row in rows:
            with np.errstate(divide="ignore"):
                log_probs = np.log(confidence[row][is_asked[row]])
            yield row, Answer(self._example(sequence, row), int(nfe[row]), log_probs, steps[row][is_asked[row]])

    def _example(self, rows, row: int) -> Example:
        return disassemble(self.vocabulary, jax.tree.map(lambda x: x[row], rows))[0]

    def _initial_batches(
        self, requests, config: GenerationConfig, seed: int
    ) -> Iterator[tuple[list[int], State, Memory]]:
        """Batches before their first step; all are checked before the first is yielded."""
        if config.max_nfe is not None or config.order is not None:
            for _, state in self._initial_states(requests, seed):
                _require_budget(config.rules(self.vocabulary), state)
                _initial_memory(config, state)
        for numbers, state in self._initial_states(requests, seed):
            yield numbers, state, _initial_memory(config, state)

    def _initial_states(self, requests, seed: int) -> Iterator[tuple[list[int], State]]:
        """Indices of a batch's requests, of one padded length, and its state before the first step."""
        if not requests:
            return
        words = request_words(requests)
        by_length: dict[int, list[int]] = {}
        for number, request in enumerate(requests):
            by_length.setdefault(-(-request.length // self.bucket) * self.bucket, []).append(number)
        for length, numbers in by_length.items():
            for first in range(0, len(numbers), self.rows):
                chunk = numbers[first : first + self.rows]
                filled = _with_repeats(chunk, _batch_size(len(chunk), self.rows))
                sequence = stack_rows([assemble(self.vocabulary, [requests[n]], length) for n in filled])
                seed32 = np.uint32(seed & 0xFFFF_FFFF)
                yield chunk, _initial_state(seed32, words[filled], sequence, self.vocabulary.mask_id)


def _with_repeats(numbers: list[int], size: int) -> list[int]:
    """The numbers, padded to `size` with repeats of the first."""
    return numbers + numbers[:1] * (size - len(numbers))


def _batch_size(count: int, most: int) -> int:
    """The smallest 2ⁿ of at least `count` rows, but at most `most`."""
    return min(most, 1 << (count - 1).bit_length())


@jax.jit
def _take_rows(tree: Any, rows: Int[Array, " rows"]) -> Any:
    """Selects rows of every array."""
    return jax.tree.map(lambda x: x[rows], tree)


def _initial_memory(config: GenerationConfig, state: State) -> Memory:
    """The strategy's memory before the first step: for `given`, the rank of every position in the order; else None."""
    if config.strategy != "given" or config.order is None:
        return None
    is_asked = np.asarray(state.is_asked)
    counts = {int(count) for count in is_asked.sum(axis=-1)}
    if counts != {len(config.order)}:
        asked = ", ".join(map(str, sorted(counts)))
        raise ValueError(f"order has {len(config.order)} indices, and the requests have {asked} masked codes")
    rank = np.zeros(is_asked.shape, np.int32)
    rank[is_asked] = np.tile(np.argsort(config.order), len(rank))
    return jax.device_put(rank)


def _require_budget(rules: Rules, state: State) -> None:
    """Raises ValueError if `max_nfe` does not allow a step in every block."""
    if rules.max_nfe is None:
        return
    blocks = int(jnp.max(jnp.where(state.is_asked.any(axis=-1), state.num_blocks(rules), 1)))
    least = rules.passes_per_step * blocks
    if rules.max_nfe < least:
        raise ValueError(f"max_nfe is {rules.max_nfe}, and {blocks} blocks take at least {least} evaluations")


def sampler_arguments(
    vocabulary: Vocabulary, denoise: Denoiser, parts: SamplerParts
) -> tuple[Denoiser, Strategy, Rules]:
    """The arguments of `sampler.sample` and `sampler.advance` before the state."""
    guidance, strategy, rules = parts
    return generation_denoiser(denoise, vocabulary, guidance), strategy, rules


# Functions, not methods: a new Generator of the same network finds them compiled.
@partial(jax.jit, static_argnums=0)
def _sample(
    vocabulary, denoise, parts: SamplerParts, state: State, memory: Memory, max_unfinished: Int[Array, ""] | int
) -> tuple[State, Memory, Bool[Array, " batch"]]:
    state, memory = sampler.sample(*sampler_arguments(vocabulary, denoise, parts), state, memory, max_unfinished)
    return state, memory, state.is_done


@partial(jax.jit, static_argnums=0)
def _advance(
    vocabulary, denoise, parts: SamplerParts, state: State, memory: Memory, cache: Cache
) -> tuple[State, Memory, Cache, Bool[Array, " batch"]]:
    state, memory, cache = sampler.advance(*sampler_arguments(vocabulary, denoise, parts), state, memory, cache)
    return state, memory, cache, state.is_done


def request_words(requests: Sequence[Example]) -> UInt32[np.ndarray, "rows 2"]:
    """Two words per request that tell it from all others: of a hash of it and of the number of equal ones before it."""
    digests = []
    for request, repeat in zip(requests, occurrence_numbers(requests), strict=True):
        content = _content_hash(request)
        content.update(str(repeat).encode())
        digests.append(np.frombuffer(content.digest()[:8], np.uint32))
    return np.stack(digests)


@jax.jit
def request_keys(seed: UInt32[Array, ""], words: UInt32[Array, "rows 2"]) -> RowKeys:
    """One random key per request: that of the seed, with both words of the request folded in."""
    base = jax.random.key(seed)
    return jax.vmap(lambda row: jax.random.fold_in(jax.random.fold_in(base, row[0]), row[1]))(words)


@partial(jax.jit, static_argnums=3)
def _initial_state(seed: UInt32[Array, ""], words: UInt32[Array, "rows 2"], rows: TokenRows, mask_id: int) -> State:
    """The state before the first step, in one program: each takes its time to be compiled, or read."""
    return initial_state(rows, request_keys(seed, words), mask_id)


def occurrence_numbers(requests: Sequence[Example]) -> list[int]:
    """Number of equal requests before each one; together with seed and content it determines an answer's random key."""
    counts: Counter[bytes] = Counter()
    numbers = []
    for request in requests:
        digest = _content_hash(request).digest()
        numbers.append(counts[digest])
        counts[digest] += 1
    return numbers


def _content_hash(request: Example) -> Any:
    """SHA-256 of a request's task and codes, to be updated further."""
    content = hashlib.sha256(request.task.encode())
    for segment in request.segments:
        codes = np.ascontiguousarray(segment.codes, np.int32)
        content.update(f"\0{segment.modality}\0{codes.shape}\0".encode() + codes.tobytes())
    return content
