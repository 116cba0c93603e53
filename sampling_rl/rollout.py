"""Episodes of a policy or a strategy on a batch of problems, on the device in one call, and what is learned from them.

Every step of an episode is stored as the policy saw it, and with its rounding: inputs in half precision, masks and
revealed positions as bits; for the law dpls the order of picks, 16 bits per position.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from operator import itemgetter

import jax
import jax.numpy as jnp
from jax.tree_util import Partial
from jaxtyping import Array, Bool, Float16, Int, PRNGKeyArray, Shaped, UInt8

from trimask.diffusion.sampling import sampler
from trimask.diffusion.sampling.actions import Ranks
from trimask.diffusion.sampling.generator import SamplerParts, sampler_arguments
from trimask.diffusion.sampling.learned import LearnedStrategy
from trimask.diffusion.sampling.policy import PolicyConfig, policy_features
from trimask.diffusion.sampling.state import Choice, Observation, RowKeys, Rules, State, Strategy, initial_state
from trimask.sampling_rl.problems import Problem
from trimask.tokenizers.sequence import Example, TokenRows, assemble, disassemble, stack_rows
from trimask.tokenizers.vocabulary import Vocabulary

_BUCKET = 8
"""Rows are padded to a multiple of so many tokens."""

_FEWEST = 16
"""No fewer rows are played by themselves."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Trajectories:
    """Steps of episodes. Positions are those asked for, in order; behind the last of a problem there is nothing."""

    features: Float16[Array, "episodes steps asked features"]
    is_masked: UInt8[Array, "episodes steps bytes"]
    """Bits."""
    candidates: UInt8[Array, "episodes steps bytes"]
    """Bits: what the action could reveal."""
    action: UInt8[Array, "episodes steps bytes"] | Int[Array, "episodes steps asked"]
    """Bits of bernoulli, int16 ranks of dpls."""
    is_asked: Bool[Array, "episodes asked"]
    num_steps: Int[Array, " episodes"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class PolicyInputs:
    """Steps of trajectories, unpacked: what the policy is asked."""

    features: Float16[Array, "batch asked features"]
    is_masked: Bool[Array, "batch asked"]
    candidates: Bool[Array, "batch asked"]
    ranks: Ranks
    is_asked: Bool[Array, "batch asked"]
    steps_taken: Int[Array, " batch"]


def step_of(trajectories: Trajectories, episodes: Int[Array, " batch"], steps: Int[Array, " batch"]) -> PolicyInputs:
    """The given steps of the given episodes."""
    asked = trajectories.is_asked.shape[-1]

    def bits(packed):
        return jnp.unpackbits(packed[episodes, steps], axis=-1, count=asked).astype(bool)

    is_bits = trajectories.action.dtype == jnp.uint8
    ranks = bits(trajectories.action) if is_bits else trajectories.action[episodes, steps]
    return PolicyInputs(
        features=trajectories.features[episodes, steps],
        is_masked=bits(trajectories.is_masked),
        candidates=bits(trajectories.candidates),
        ranks=ranks.astype(jnp.int32),
        is_asked=trajectories.is_asked[episodes],
        steps_taken=steps,
    )


def nothing(config: PolicyConfig, is_asked: Bool[Array, "episodes seq"], asked: int, steps: int) -> Trajectories:
    """Trajectories without a step, with room for so many."""
    episodes, num_bytes = len(is_asked), -(-asked // 8)
    bits = jnp.zeros((episodes, steps, num_bytes), jnp.uint8)
    ranks = jnp.zeros((episodes, steps, asked), jnp.int16)
    return Trajectories(
        features=jnp.zeros((episodes, steps, asked, config.num_features), jnp.float16),
        is_masked=bits,
        candidates=bits,
        action=bits if config.law == "bernoulli" else ranks,
        is_asked=gather_asked(is_asked, is_asked, asked),
        num_steps=jnp.zeros(episodes, jnp.int32),
    )


def gather_asked(
    values: Shaped[Array, "rows seq *rest"], is_asked: Bool[Array, "rows seq"], length: int
) -> Shaped[Array, "rows asked *rest"]:
    """Values at the asked positions of each row, in order; 0 or False past the last."""
    places = jnp.argsort(~is_asked, axis=-1, stable=True)[:, :length]
    exists = jnp.arange(length) < is_asked.sum(axis=-1, keepdims=True)
    places, exists = (x.reshape(*x.shape, *[1] * (values.ndim - 2)) for x in (places, exists))
    return jnp.where(exists, jnp.take_along_axis(values, places, axis=1), jnp.zeros((), values.dtype))


def scatter_asked(bits: Bool[Array, "rows asked"], is_asked: Bool[Array, "rows seq"]) -> Bool[Array, "rows seq"]:
    """The inverse: True at the asked positions whose bit is set."""
    number = jnp.maximum(jnp.cumsum(is_asked, axis=-1) - 1, 0)
    return is_asked & jnp.take_along_axis(bits, number, axis=1)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Recorder:
    """A policy or a strategy as a strategy whose memory is what it saw and did."""

    config: PolicyConfig = dataclasses.field(metadata={"static": True})
    """Of the policy that is to learn from it."""
    strategy: Strategy
    acts_anywhere: bool = dataclasses.field(default=False, metadata={"static": True})
    """Whether actions are taken to be of all masked positions, whatever block the strategy had (expert steering)."""

    def __call__(self, keys: RowKeys, seen: Observation, memory: Trajectories) -> tuple[Choice, Trajectories]:
        if isinstance(self.strategy, LearnedStrategy):
            ranks, _ = self.strategy.act(keys, seen)
        else:
            ranks = self._ranks(self.strategy(keys, seen, None)[0].reveal & seen.candidates, seen)
        candidates = seen.is_masked if self.acts_anywhere else seen.candidates
        rows, at = jnp.arange(len(seen.step)), jnp.where(seen.in_block.any(axis=-1), seen.steps_taken, 1 << 30)

        def wrote(old, new):
            new = gather_asked(new, seen.is_asked, memory.is_asked.shape[-1])
            new = jnp.packbits(new, axis=-1) if new.dtype == bool else new.astype(old.dtype)
            return old.at[rows, at].set(new, mode="drop")

        is_bits = self.config.law == "bernoulli"
        return Choice(ranks > 0), dataclasses.replace(
            memory,
            features=wrote(memory.features, policy_features(seen, self.config)),
            is_masked=wrote(memory.is_masked, seen.is_masked),
            candidates=wrote(memory.candidates, candidates),
            action=wrote(memory.action, ranks > 0 if is_bits else ranks),
            num_steps=jnp.where(seen.in_block.any(axis=-1), seen.steps_taken + 1, memory.num_steps),
        )

    def _ranks(self, reveal: Bool[Array, "batch seq"], seen: Observation) -> Ranks:
        """Picks of a strategy that has no order: the most confident first."""
        if self.config.law == "bernoulli":
            return reveal.astype(jnp.int32)
        order = jnp.argsort(jnp.where(reveal, -seen.confidence, jnp.inf), axis=-1, stable=True)
        return jnp.where(reveal, jnp.argsort(order, axis=-1) + 1, 0)


def rows_of(problems: Sequence[Problem], vocabulary: Vocabulary) -> TokenRows:
    """All problems as rows of one length."""
    length = max(problem.request.length for problem in problems)
    length = -(-length // _BUCKET) * _BUCKET
    return stack_rows([assemble(vocabulary, [problem.request], length) for problem in problems])


def episodes_of(vocabulary: Vocabulary, state: State) -> list[Example]:
    """The answers, code -1 where a token was never revealed."""
    rows = jax.device_get(state.sequence)
    return [disassemble(vocabulary, jax.tree.map(itemgetter(n), rows))[0] for n in range(len(rows.tokens))]


@partial(jax.jit, static_argnums=0, static_argnames=("asked", "steps"))
def rollout(
    vocabulary: Vocabulary,
    denoise: Partial,
    how: SamplerParts,
    rows: TokenRows,
    key: PRNGKeyArray,
    *,
    asked: int,
    steps: int,
) -> tuple[State, Trajectories]:
    """An episode per row, all in one call on the device; the strategy of `how` is a `Recorder`.

    `asked` is the most tokens that a row asks for, `steps` the most steps an episode can have.
    """
    keys = jax.vmap(partial(jax.random.fold_in, key))(jnp.arange(len(rows.tokens)))
    denoiser, recorder, rules = sampler_arguments(vocabulary, denoise, how)
    assert isinstance(recorder, Recorder)
    state = initial_state(rows, keys, rules.mask_id)
    memory = nothing(recorder.config, state.is_asked, asked, steps)
    rules = recorder.config.extended_rules(rules)
    rules = dataclasses.replace(rules, shows_all=rules.shows_all or recorder.acts_anywhere)
    return _narrowing(partial(sampler.sample, denoiser, recorder, rules), state, memory)


def _narrowing(sample, state: State, memory: Trajectories) -> tuple[State, Trajectories]:
    """Plays all rows until half of them are done, then the other half by themselves, and so on."""
    half = len(state.step) // 2
    if half < _FEWEST:
        return sample(state, memory)
    whole = sample(state, memory, half)
    left = jnp.argsort(whole[0].is_done, stable=True)[:half]
    part = _narrowing(sample, *jax.tree.map(lambda x: x[left], whole))
    return jax.tree.map(lambda x, new: x.at[left].set(new), whole, part)


def most_steps(rules: Rules, asked: int) -> int:
    """Steps that an episode can have: so many in a block as the rules say, or as it has positions."""
    block = min(rules.block_length or asked, asked)
    in_block = int(rules.gives_up_after or block)
    return -(-asked // block) * in_block
