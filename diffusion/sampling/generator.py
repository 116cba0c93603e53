"""From examples with holes to finished examples: batching, seeding and decoding of whole requests.

A request's randomness is folded in from the seed and its own content and number, never from its place in a batch. Rows
of one bucket of lengths go together, in batches of 2ⁿ rows. When half of a batch is done the rest goes on in half the
batch, so that finished rows cost nothing. In a batch of another size or length an answer is the same as long as the
rounding of the denoiser does not decide between two tokens.
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
from trimask.diffusion.sampling.state import Memory, RowKeys, Rules, State, Strategy, start
from trimask.tokenizers.sequence import Example, TokenRows, assemble, disassemble, stack
from trimask.tokenizers.vocabulary import Vocabulary


@dataclass(frozen=True)
class Answer:
    """An example, finished or on its way."""

    example: Example
    nfe: int
    """Function evaluations it took."""
    log_probs: Float[np.ndarray, " asked"]
    """Log-probability, in nats, of each token that was asked for when it was revealed, in the order of the row."""


class Generator:
    """Fills requests with one denoiser; compiled once per row length, batch size and kind of configuration."""

    def __init__(self, denoise: Denoiser, vocabulary: Vocabulary, *, rows: int = 32, bucket: int = 8):
        """Batches have `rows` rows at most, padded to a multiple of `bucket` tokens."""
        # A Partial is a tree of its arrays: the compiled loop takes weights as arguments, not as constants.
        self.denoise = denoise if isinstance(denoise, Partial) else Partial(denoise)
        self.vocabulary, self.rows, self.bucket = vocabulary, rows, bucket

    def generate(
        self,
        requests: Sequence[Example],
        config: GenerationConfig,
        seed: int,
        report: Callable[[int, int], None] = lambda *_: None,
    ) -> list[Answer]:
        """Answers in the order of the requests. Code -1 is filled, everything else is kept."""
        answers: dict[int, Answer] = {}
        how = _sampler_parts(config, self.vocabulary)
        for numbers, state, memory in self._batches(requests, config, seed):
            while numbers:
                enough = len(state.step) // 2
                state, memory, is_done = _sample(self.vocabulary, self.denoise, how, state, memory, enough)
                is_done = np.asarray(is_done)
                done = [row for row in range(len(numbers)) if is_done[row]]
                answers |= {numbers[row]: answer for row, answer in self._answers(state, done)}
                report(len(answers), len(requests))
                left = [row for row in range(len(numbers)) if not is_done[row]]
                numbers = [numbers[row] for row in left]
                if numbers:
                    state, memory = _rows((state, memory), np.array(_filled(left, _batch_size(len(left), self.rows))))
        return [answers[number] for number in range(len(requests))]

    def largest_batch(self, requests: Sequence[Example]) -> tuple[int, int]:
        """Rows of the largest batch that `generate` may make of requests, and tokens of the longest row."""
        longest = max(request.length for request in requests)
        return _batch_size(len(requests), self.rows), -(-longest // self.bucket) * self.bucket

    def watch(self, requests: Sequence[Example], config: GenerationConfig, seed: int) -> Iterator[tuple[int, Answer]]:
        """Number and state of each request, before the first step and after each of its steps; else as `generate`.

        The last of a request is its answer; of a token that is still masked the log-probability is −∞.
        """
        how = _sampler_parts(config, self.vocabulary)
        for numbers, state, memory in self._batches(requests, config, seed):
            yield from ((numbers[row], answer) for row, answer in self._answers(state, list(range(len(numbers)))))
            cache, passes = None, 0
            is_done = ~np.asarray(state.is_masked).any(axis=-1)
            while not np.asarray(is_done)[: len(numbers)].all():
                before = np.asarray(state.step)
                state, memory, cache, is_done = _advance(self.vocabulary, self.denoise, how, state, memory, cache)
                moved = np.flatnonzero(np.asarray(state.step)[: len(numbers)] != before[: len(numbers)]).tolist()
                yield from ((numbers[row], answer) for row, answer in self._answers(state, moved))
                passes += 1
                is_over = config.cache == "none" or passes >= (config.refresh_every or np.inf)
                if is_over or not np.asarray(state.is_open).any():
                    cache, passes = None, 0

    def trajectories(self, requests: Sequence[Example], config: GenerationConfig, seed: int) -> list[list[Answer]]:
        """Each request before the first step and after every step; the last is what `generate` answers."""
        paths: list[list[Answer]] = [[] for _ in requests]
        for number, answer in self.watch(requests, config, seed):
            paths[number].append(answer)
        return paths

    def _answers(self, state: State, rows: list[int]) -> Iterator[tuple[int, Answer]]:
        fields = (state.sequence, state.nfe, state.commit_confidence, state.is_asked)
        sequence, nfe, confidence, is_asked = jax.device_get(fields)
        for row in rows:
            with np.errstate(divide="ignore"):
                log_probs = np.log(confidence[row][is_asked[row]])
            yield row, Answer(self._example(sequence, row), int(nfe[row]), log_probs)

    def _example(self, rows, row: int) -> Example:
        return disassemble(self.vocabulary, jax.tree.map(lambda x: x[row], rows))[0]

    def _batches(self, requests, config: GenerationConfig, seed: int) -> Iterator[tuple[list[int], State, Memory]]:
        """The batches at their start; all of them are checked before the first."""
        if config.max_nfe is not None or config.order is not None:
            for _, state in self._states(requests, seed):
                _require_budget(config.rules(self.vocabulary), state)
                _memory(config, state)
        for numbers, state in self._states(requests, seed):
            yield numbers, state, _memory(config, state)

    def _states(self, requests, seed: int) -> Iterator[tuple[list[int], State]]:
        """Requests of one bucket of lengths, `rows` at most at a time; a batch is filled up with repeats."""
        if not requests:
            return
        words = request_words(requests)
        by_length: dict[int, list[int]] = {}
        for number, request in enumerate(requests):
            by_length.setdefault(-(-request.length // self.bucket) * self.bucket, []).append(number)
        for length, numbers in by_length.items():
            for first in range(0, len(numbers), self.rows):
                chunk = numbers[first : first + self.rows]
                filled = _filled(chunk, _batch_size(len(chunk), self.rows))
                sequence = stack([assemble(self.vocabulary, [requests[n]], length) for n in filled])
                yield chunk, _start(np.uint32(seed & 0xFFFF_FFFF), words[filled], sequence, self.vocabulary.mask_id)


SamplerParts = tuple[Guidance | None, Strategy, Rules]


def _sampler_parts(config: GenerationConfig, vocabulary: Vocabulary) -> SamplerParts:
    return config.guide, config.chosen, config.rules(vocabulary)


def _filled(numbers: list[int], size: int) -> list[int]:
    return numbers + numbers[:1] * (size - len(numbers))


def _batch_size(count: int, most: int) -> int:
    """The least 2ⁿ that holds so many rows, but not more than `most`."""
    return min(most, 1 << (count - 1).bit_length())


@jax.jit
def _rows(tree: Any, rows: Int[Array, " rows"]) -> Any:
    """These rows of every array."""
    return jax.tree.map(lambda x: x[rows], tree)


def _memory(config: GenerationConfig, state: State) -> Memory:
    """What the strategy remembers at the start: the rank of every position in a given order."""
    if config.strategy != "given" or config.order is None:
        return None
    is_asked = np.asarray(state.is_asked)
    counts = {int(count) for count in is_asked.sum(axis=-1)}
    if counts != {len(config.order)}:
        asked = ", ".join(map(str, sorted(counts)))
        raise ValueError(f"order has {len(config.order)} places, and {asked} are asked for")
    rank = np.zeros(is_asked.shape, np.int32)
    rank[is_asked] = np.tile(np.argsort(config.order), len(rank))
    return jax.device_put(rank)


def _require_budget(rules: Rules, state: State) -> None:
    """Every block takes a step."""
    if rules.max_nfe is None:
        return
    blocks = int(jnp.max(jnp.where(state.is_asked.any(axis=-1), state.num_blocks(rules), 1)))
    least = rules.passes_per_step * blocks
    if rules.max_nfe < least:
        raise ValueError(f"max_nfe is {rules.max_nfe}, and {blocks} blocks take {least} evaluations at least")


def sampler_arguments(vocabulary: Vocabulary, denoise: Denoiser, how: SamplerParts) -> tuple[Denoiser, Strategy, Rules]:
    """What `loop.sample` and `loop.advance` take before the state."""
    guidance, strategy, rules = how
    return generation_denoiser(denoise, vocabulary, guidance), strategy, rules


# Functions, not methods: a new Generator of the same network finds them compiled.
@partial(jax.jit, static_argnums=0)
def _sample(
    vocabulary, denoise, how: SamplerParts, state: State, memory: Memory, enough: Int[Array, ""] | int
) -> tuple[State, Memory, Bool[Array, " batch"]]:
    state, memory = sampler.sample(*sampler_arguments(vocabulary, denoise, how), state, memory, enough)
    return state, memory, state.is_done


@partial(jax.jit, static_argnums=0)
def _advance(
    vocabulary, denoise, how: SamplerParts, state: State, memory: Memory, cache: Cache
) -> tuple[State, Memory, Cache, Bool[Array, " batch"]]:
    state, memory, cache = sampler.advance(*sampler_arguments(vocabulary, denoise, how), state, memory, cache)
    return state, memory, cache, state.is_done


def request_words(requests: Sequence[Example]) -> UInt32[np.ndarray, "rows 2"]:
    """What tells a request from all others: two words of a hash of it and of how many equal ones came before it."""
    digests = []
    for request, repeat in zip(requests, repeats(requests), strict=True):
        content = _content(request)
        content.update(str(repeat).encode())
        digests.append(np.frombuffer(content.digest()[:8], np.uint32))
    return np.stack(digests)


@jax.jit
def request_keys(seed: UInt32[Array, ""], words: UInt32[Array, "rows 2"]) -> RowKeys:
    """A key per request: the seed's, with both words of the request folded in."""
    base = jax.random.key(seed)
    return jax.vmap(lambda row: jax.random.fold_in(jax.random.fold_in(base, row[0]), row[1]))(words)


@partial(jax.jit, static_argnums=3)
def _start(seed: UInt32[Array, ""], words: UInt32[Array, "rows 2"], sequence: TokenRows, mask_id: int) -> State:
    """The state before the first step: one program, for each takes its time to be compiled, or read."""
    return start(sequence, request_keys(seed, words), mask_id)


def repeats(requests: Sequence[Example]) -> list[int]:
    """How many equal requests came before each: with seed and content all that an answer depends on."""
    seen: Counter[bytes] = Counter()
    numbers = []
    for request in requests:
        digest = _content(request).digest()
        numbers.append(seen[digest])
        seen[digest] += 1
    return numbers


def _content(request: Example) -> Any:
    """A hash that has seen the request."""
    content = hashlib.sha256(request.task.encode())
    for segment in request.segments:
        codes = np.ascontiguousarray(segment.codes, np.int32)
        content.update(f"\0{segment.modality}\0{codes.shape}\0".encode() + codes.tobytes())
    return content
