"""From examples with holes to finished examples: batching, seeding and decoding of whole requests.

A request's randomness is folded in from the seed and its own content and number, never from its place in a
batch, and every batch has the same number of rows, so an answer does not depend on what else was asked.
"""

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator
from collections.abc import Sequence as AnySequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from trimask.diffusion.sampling import loop
from trimask.diffusion.sampling.guidance import guided, restricted
from trimask.diffusion.sampling.loop import Denoiser, RowKeys, State, Strategy
from trimask.diffusion.sampling.strategies import STRATEGIES
from trimask.tokenizers.sequence import Example, assemble, disassemble, stack
from trimask.tokenizers.vocabulary import Vocabulary


@dataclass(frozen=True, kw_only=True)
class GenerationConfig:
    """How masked positions are filled."""

    strategy: Literal["random", "confidence", "threshold"] = "confidence"
    """Which positions are revealed first: any; the most confident; all that are confident enough."""
    steps: int = 16
    """Steps in which random and confidence reveal everything; fewer where there are fewer masks."""
    threshold: float = 0.9
    """Confidence from which the threshold strategy reveals a position."""
    temperature: float = 1.0
    """Of the tokens' draw; 0 takes the most probable."""
    guidance: float = 0.0
    """Classifier-free guidance: 0 is none."""

    def __post_init__(self):
        if self.steps < 1:
            raise ValueError(f"steps must be at least 1, got {self.steps}")
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature must be finite and not negative, got {self.temperature}")
        if not 0 <= self.threshold <= 1:
            raise ValueError(f"threshold must lie in [0, 1], got {self.threshold}")
        if not 0 <= self.guidance < float("inf"):
            raise ValueError(f"guidance must be finite and not negative, got {self.guidance}")


@dataclass(frozen=True)
class Answer:
    """A finished example."""

    example: Example
    nfe: int
    """Function evaluations it took."""


class Generator:
    """Fills requests with one denoiser; compiled once per row length and configuration."""

    def __init__(self, denoise: Denoiser, vocabulary: Vocabulary, *, rows: int = 32, bucket: int = 8):
        """Batches have `rows` rows, padded to a multiple of `bucket` tokens, whatever is asked."""
        # A Partial is a tree of its arrays: the compiled loop takes weights as arguments, not as constants.
        self.denoise = denoise if isinstance(denoise, Partial) else Partial(denoise)
        self.vocabulary, self.rows, self.bucket = vocabulary, rows, bucket

    def generate(
        self,
        requests: AnySequence[Example],
        config: GenerationConfig,
        seed: int,
        report: Callable[[int, int], None] = lambda *_: None,
    ) -> list[Answer]:
        """Answers in the order of the requests. Code -1 is filled, everything else is kept."""
        answers: dict[int, Answer] = {}
        for numbers, state in self._batches(requests, config, seed):
            final = _sample(config, self.vocabulary, self.denoise, state)
            rows, nfe = jax.device_get((final.sequence, final.nfe))
            for row, number in enumerate(numbers):
                example = self._example(rows, row)
                answers[number] = Answer(example, int(nfe[row]))
            report(len(answers), len(requests))
        return [answers[number] for number in range(len(requests))]

    def trajectories(self, requests: AnySequence[Example], config: GenerationConfig, seed: int) -> list[list[Example]]:
        """Each request before the first step and after every step; the last is what `generate` answers."""
        paths: dict[int, list[Example]] = {}
        for numbers, state in self._batches(requests, config, seed):
            rows, is_done = jax.device_get((state.sequence, state.is_done))
            paths |= {number: [self._example(rows, row)] for row, number in enumerate(numbers)}
            while not is_done.all():
                state = _advance(config, self.vocabulary, self.denoise, state)
                rows, was_done, is_done = jax.device_get((state.sequence, is_done, state.is_done))
                for row, number in enumerate(numbers):
                    if not was_done[row]:
                        paths[number].append(self._example(rows, row))
        return [paths[number] for number in range(len(requests))]

    def _example(self, rows, row: int) -> Example:
        return disassemble(self.vocabulary, jax.tree.map(lambda x: x[row], rows))[0]

    def _batches(self, requests, config: GenerationConfig, seed: int) -> Iterator[tuple[list[int], State]]:
        """Requests of one bucket of lengths, `rows` at a time; the last batch is filled up with repeats."""
        keys = request_keys(requests, seed)
        by_length: dict[int, list[int]] = {}
        for number, request in enumerate(requests):
            by_length.setdefault(-(-request.length // self.bucket) * self.bucket, []).append(number)
        for length, numbers in by_length.items():
            for first in range(0, len(numbers), self.rows):
                chunk = numbers[first : first + self.rows]
                filled = chunk + chunk[:1] * (self.rows - len(chunk))
                sequence = stack([assemble(self.vocabulary, [requests[n]], length) for n in filled])
                yield (
                    chunk,
                    loop.start(
                        jax.tree.map(jnp.asarray, sequence),
                        keys[np.array(filled)],
                        self.vocabulary.mask_id,
                        temperature=config.temperature,
                        num_steps=config.steps,
                    ),
                )


def _step_of(config: GenerationConfig, vocabulary: Vocabulary, denoise: Denoiser) -> tuple[Denoiser, Strategy, int]:
    """What `loop.sample` and `loop.advance` take before the state."""
    denoise = denoise if config.guidance == 0 else guided(denoise, config.guidance, vocabulary.mask_id)
    return restricted(denoise, vocabulary), STRATEGIES[config.strategy](config.threshold), vocabulary.mask_id


# Functions, not methods: a new Generator of the same network finds them compiled.
@partial(jax.jit, static_argnums=(0, 1))
def _sample(config: GenerationConfig, vocabulary: Vocabulary, denoise: Denoiser, state: State) -> State:
    return loop.sample(*_step_of(config, vocabulary, denoise), state)


@partial(jax.jit, static_argnums=(0, 1))
def _advance(config: GenerationConfig, vocabulary: Vocabulary, denoise: Denoiser, state: State) -> State:
    return loop.advance(*_step_of(config, vocabulary, denoise), state, None)[0]


def request_keys(requests: AnySequence[Example], seed: int) -> RowKeys:
    """A key per request, from the seed, the request and how many equal ones came before it."""
    digests = []
    for request, repeat in zip(requests, repeats(requests), strict=True):
        content = _content(request)
        content.update(str(repeat).encode())
        digests.append(np.frombuffer(content.digest()[:8], np.uint32))
    base = jax.random.key(seed)
    fold = jax.vmap(lambda words: jax.random.fold_in(jax.random.fold_in(base, words[0]), words[1]))
    return fold(jnp.asarray(np.stack(digests)))


def repeats(requests: AnySequence[Example]) -> list[int]:
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
