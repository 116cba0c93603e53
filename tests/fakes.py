"""Denoisers without a network, requests, noise schedules beside those of the table, and a network as one program."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.tree_util import Partial

from trimask.diffusion.denoiser import DenoiserOutput
from trimask.diffusion.masking import MaskingConfig
from trimask.diffusion.sampling.generation_config import GenerationConfig, strategy_parameters
from trimask.diffusion.sampling.generator import request_keys, request_words
from trimask.diffusion.sampling.state import Choice, State, initial_state
from trimask.diffusion.sampling.strategies import STRATEGIES
from trimask.diffusion.schedule import SCHEDULES as TABLE
from trimask.diffusion.schedule import ScheduleConfig
from trimask.tokenizers.sequence import Example, Segment, assemble, stack_rows
from trimask.tokenizers.vocabulary import TEXT, Vocabulary

VOCABULARY = Vocabulary(text_size=6, codebook_sizes={"image": (5,), "audio": (3, 4)})
MASK = VOCABULARY.mask_id
TEXT_IDS = VOCABULARY.text_range


MASKINGS = {kind: MaskingConfig(counts=False, schedule=ScheduleConfig(kind=kind)) for kind in TABLE} | {
    "by modality": MaskingConfig(counts=False, schedules={TEXT: ScheduleConfig(kind="polynomial", power=3.0)})
}
"""Name → masking by every schedule of the table, and by one that differs by modality: t³ for text, t for all others."""


def output(logits) -> DenoiserOutput:
    return DenoiserOutput(logits, Partial(_unchanged), logits, ())


def run(network, *inputs) -> DenoiserOutput:
    """Output of a network, computed by one compiled program, not by one program per operation."""
    return _run(*nnx.split(network), *inputs)


@partial(jax.jit, static_argnums=0)
def _run(graph, state, *inputs) -> DenoiserOutput:
    seen = nnx.merge(graph, state)(*inputs)
    return dataclasses.replace(seen, features=seen.logits, read=Partial(_unchanged))


def _unchanged(features):
    return features


def at(logits, positions):
    """Logits at the requested positions; all positions if None."""
    return logits if positions is None else jnp.take_along_axis(logits, positions[..., None], axis=1)


def fake(logits_of_row):
    """A denoiser with fixed logits [seq, vocab] for each row; all of one shape share a compiled program."""
    return Partial(_fixed, logits=logits_of_row)


def _fixed(sequence, positions=None, cache=None, *, logits):
    return output(at(jnp.broadcast_to(logits, (*sequence.tokens.shape, logits.shape[-1])), positions))


def knows(answer):
    """A denoiser that gives the ids of this row a probability of nearly 1."""
    return fake(20.0 * jax.nn.one_hot(jnp.asarray(answer), VOCABULARY.size))


def mixing(answer=None, is_sure=False):
    """Logits that depend on all tokens of the row, exactly representable so that batches cannot matter.

    With an answer, a row of ids, the same program can also be sure of it.
    """
    table = jax.random.randint(jax.random.key(7), (VOCABULARY.size, VOCABULARY.size), -8, 8) / 4
    certain = jnp.zeros(VOCABULARY.size) if answer is None else 20.0 * jax.nn.one_hot(answer, VOCABULARY.size)
    return Partial(_mix, table=0 * table if is_sure else table, certain=certain if is_sure else 0 * certain)


def flat(mixed, logit):
    """The denoiser made by `mixing`, with the same logit for every id; it shares the compiled program."""
    table, certain = mixed.keywords["table"], mixed.keywords["certain"]
    return Partial(mixed.func, table=jnp.zeros_like(table), certain=jnp.full_like(certain, logit))


TRACES: list[tuple[int, ...]] = []
"""Shapes for which a mixing denoiser was traced."""


def _mix(sequence, positions=None, cache=None, *, table, certain):
    TRACES.append(sequence.tokens.shape)
    row = jnp.where(sequence.is_padding[..., None], 0.0, table[sequence.tokens]).sum(axis=1, keepdims=True)
    place = jnp.arange(sequence.length)[None, :, None] % 3
    return output(at(row + table[sequence.tokens] * (1 + place) + certain, positions))


def joint(probabilities):
    """The exact denoiser of a distribution over as many text tokens as it has axes, at a row's end; one program."""
    return Partial(_joint, p=jnp.asarray(probabilities))


def _joint(sequence, positions=None, cache=None, *, p):
    n, size = p.ndim, p.shape[0]

    def conditional(tokens):
        codes = tokens - TEXT_IDS.start
        agrees = jnp.ones(p.shape)
        for axis in range(n):
            one = (jnp.arange(size) == codes[axis]) | (tokens[axis] == MASK)
            agrees = agrees * one.reshape([-1 if a == axis else 1 for a in range(n)])
        weight = p * agrees
        marginals = [weight.sum(axis=tuple(a for a in range(n) if a != axis)) for axis in range(n)]
        return jnp.stack(marginals) / weight.sum()

    rows = jnp.log(jax.vmap(conditional)(sequence.tokens[:, 2 : 2 + n]) + 1e-30)
    full = jnp.full((*sequence.tokens.shape, VOCABULARY.size), -30.0)
    return output(at(full.at[:, 2 : 2 + n, TEXT_IDS.start : TEXT_IDS.start + size].set(rows), positions))


def any_strategy(name, **numbers):
    """A strategy of `STRATEGIES` with these parameters, others 0. All strategies share one compiled program."""
    every = {number: np.float32(numbers.get(number, 0)) for each in STRATEGIES for number in strategy_parameters(each)}
    return Partial(_chosen, which=np.int32(list(STRATEGIES).index(name)), numbers=every)


def _chosen(keys, seen, memory, *, which, numbers):
    def choose(name):
        choice, _ = STRATEGIES[name](
            keys, seen, memory, **{number: numbers[number] for number in strategy_parameters(name)}
        )
        nothing, ends = jnp.zeros_like(choice.reveal), jnp.zeros_like(seen.step, bool)
        remask, goes_on = choice.remask, choice.goes_on
        return Choice(choice.reveal, nothing if remask is None else remask, ends if goes_on is None else goes_on)

    return jax.lax.switch(which, [partial(choose, name) for name in STRATEGIES]), memory


@dataclasses.dataclass(frozen=True, kw_only=True)
class OneProgram(GenerationConfig):
    """A configuration whose strategy function is `any_strategy`, so that all strategies compile once."""

    @property
    def strategy_function(self):
        return any_strategy(self.strategy, **{name: getattr(self, name) for name in strategy_parameters(self.strategy)})


def opening(loaded, *expected):
    """Replacement of `load` that returns this run; it fails for arguments other than the expected ones."""

    def load(*asked):
        assert asked == expected
        return loaded

    return load


def text_request(codes) -> Example:
    return Example("text", (Segment("text", np.array(codes)),))


def begin(requests, length: int, seed: int = 0) -> State:
    rows = jax.tree.map(jnp.asarray, stack_rows([assemble(VOCABULARY, [r], length) for r in requests]))
    return initial_state(rows, request_keys(np.uint32(seed), request_words(requests)), MASK)
