"""Plays episodes of a policy or a strategy on a batch of problems, in one call on the device, and records their steps.

Every step is recorded with the inputs that the policy saw, rounded as they were: features in the type of
`PolicyConfig.input_dtype`, masks and revealed positions as bits; under the law dpls also the order of picks, with 16
bits per position.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from operator import itemgetter

import jax
import jax.numpy as jnp
from jax.tree_util import Partial
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, Shaped, UInt8

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
"""Row lengths are multiples of this number of tokens."""

_FEWEST = 16
"""Smallest number of rows that are played by themselves, after the others are done."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Trajectories:
    """Recorded steps of episodes. Positions are the asked ones, in order of the row; all is 0 past the last one."""

    features: Float[Array, "episodes steps asked features"]
    is_masked: UInt8[Array, "episodes steps bytes"]
    """Whether each position held MASK before the step, given up or not, as bits."""
    candidates: UInt8[Array, "episodes steps bytes"]
    """Whether the action could reveal each position, as bits."""
    action: UInt8[Array, "episodes steps bytes"] | Int[Array, "episodes steps asked"]
    """Revealed positions: bits under the law bernoulli; under dpls int16 ranks, 1 for the first pick, 0 for none."""
    is_asked: Bool[Array, "episodes asked"]
    """False past the last asked position of a problem."""
    num_steps: Int[Array, " episodes"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class PolicyInputs:
    """A batch of recorded steps, unpacked: inputs of the policy, and the action as ranks."""

    features: Float[Array, "batch asked features"]
    is_masked: Bool[Array, "batch asked"]
    candidates: Bool[Array, "batch asked"]
    ranks: Ranks
    is_asked: Bool[Array, "batch asked"]
    steps_taken: Int[Array, " batch"]


def policy_inputs_at(
    trajectories: Trajectories, episodes: Int[Array, " batch"], steps: Int[Array, " batch"]
) -> PolicyInputs:
    """Unpacks the given step of each of the given episodes."""
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


def empty_trajectories(
    config: PolicyConfig, is_asked: Bool[Array, "episodes seq"], asked: int, steps: int
) -> Trajectories:
    """Trajectories without steps, with room for `steps` steps of `asked` positions."""
    episodes, num_bytes = len(is_asked), -(-asked // 8)
    bits = jnp.zeros((episodes, steps, num_bytes), jnp.uint8)
    ranks = jnp.zeros((episodes, steps, asked), jnp.int16)
    return Trajectories(
        features=jnp.zeros((episodes, steps, asked, config.num_features), config.input_dtype),
        is_masked=bits,
        candidates=bits,
        action=bits if config.law == "bernoulli" else ranks,
        is_asked=gather_asked(is_asked, is_asked, asked),
        num_steps=jnp.zeros(episodes, jnp.int32),
    )


def gather_asked(
    values: Shaped[Array, "rows seq *rest"], is_asked: Bool[Array, "rows seq"], length: int
) -> Shaped[Array, "rows asked *rest"]:
    """Values at the first `length` asked positions of each row, in order; 0 or False past the last one."""
    positions = jnp.argsort(~is_asked, axis=-1, stable=True)[:, :length]
    exists = jnp.arange(length) < is_asked.sum(axis=-1, keepdims=True)
    positions, exists = (x.reshape(*x.shape, *[1] * (values.ndim - 2)) for x in (positions, exists))
    return jnp.where(exists, jnp.take_along_axis(values, positions, axis=1), jnp.zeros((), values.dtype))


def scatter_asked(bits: Bool[Array, "rows asked"], is_asked: Bool[Array, "rows seq"]) -> Bool[Array, "rows seq"]:
    """Inverse of `gather_asked`: True at the asked positions whose bit is set."""
    number = jnp.maximum(jnp.cumsum(is_asked, axis=-1) - 1, 0)
    return is_asked & jnp.take_along_axis(bits, number, axis=1)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Recorder:
    """Strategy that acts as a policy or another strategy does, and records the steps in its memory, `Trajectories`."""

    config: PolicyConfig = dataclasses.field(metadata={"static": True})
    """Configuration of the policy that learns from the recorded steps."""
    strategy: Strategy
    acts_anywhere: bool = dataclasses.field(default=False, metadata={"static": True})
    """Whether all masked positions are recorded as candidates, even beyond the strategy's block (expert steering)."""

    def __call__(self, keys: RowKeys, seen: Observation, memory: Trajectories) -> tuple[Choice, Trajectories]:
        if isinstance(self.strategy, LearnedStrategy):
            ranks, _ = self.strategy.act(keys, seen)
        else:
            ranks = self._ranks(self.strategy(keys, seen, None)[0].reveal & seen.candidates, seen)
        candidates = seen.is_masked if self.acts_anywhere else seen.candidates
        # Rows without an open block have no step to record: their index is out of bounds, and dropped.
        rows, step = jnp.arange(len(seen.step)), jnp.where(seen.in_block.any(axis=-1), seen.steps_taken, 1 << 30)

        def recorded(old, new):
            new = gather_asked(new, seen.is_asked, memory.is_asked.shape[-1])
            new = jnp.packbits(new, axis=-1) if new.dtype == bool else new.astype(old.dtype)
            return old.at[rows, step].set(new, mode="drop")

        is_bits = self.config.law == "bernoulli"
        return Choice(ranks > 0), dataclasses.replace(
            memory,
            features=recorded(memory.features, policy_features(seen, self.config)),
            is_masked=recorded(memory.is_masked, seen.holds_mask),
            candidates=recorded(memory.candidates, candidates),
            action=recorded(memory.action, ranks > 0 if is_bits else ranks),
            num_steps=jnp.where(seen.in_block.any(axis=-1), seen.steps_taken + 1, memory.num_steps),
        )

    def _ranks(self, reveal: Bool[Array, "batch seq"], seen: Observation) -> Ranks:
        """Ranks of revealed positions for a strategy that has no order: the most confident first."""
        if self.config.law == "bernoulli":
            return reveal.astype(jnp.int32)
        order = jnp.argsort(jnp.where(reveal, -seen.confidence, jnp.inf), axis=-1, stable=True)
        return jnp.where(reveal, jnp.argsort(order, axis=-1) + 1, 0)


def problem_rows(problems: Sequence[Problem], vocabulary: Vocabulary) -> TokenRows:
    """Requests of all problems as rows of one length."""
    length = max(problem.request.length for problem in problems)
    length = -(-length // _BUCKET) * _BUCKET
    return stack_rows([assemble(vocabulary, [problem.request], length) for problem in problems])


def decoded_answers(vocabulary: Vocabulary, state: State) -> list[Example]:
    """Answers of all rows; code −1 where a token was never revealed."""
    rows = jax.device_get(state.sequence)
    return [disassemble(vocabulary, jax.tree.map(itemgetter(n), rows))[0] for n in range(len(rows.tokens))]


@partial(jax.jit, static_argnums=0, static_argnames=("asked", "steps"))
def rollout(
    vocabulary: Vocabulary,
    denoise: Partial,
    parts: SamplerParts,
    rows: TokenRows,
    key: PRNGKeyArray,
    *,
    asked: int,
    steps: int,
) -> tuple[State, Trajectories]:
    """Plays an episode per row, all in one call on the device; the strategy of `parts` must be a `Recorder`.

    `asked` is the largest number of tokens that a row asks for, `steps` the largest number of steps of an episode.
    Returns the final state and the recorded steps.
    """
    keys = jax.vmap(partial(jax.random.fold_in, key))(jnp.arange(len(rows.tokens)))
    denoiser, recorder, rules = sampler_arguments(vocabulary, denoise, parts)
    assert isinstance(recorder, Recorder)
    state = initial_state(rows, keys, rules.mask_id)
    memory = empty_trajectories(recorder.config, state.is_asked, asked, steps)
    rules = recorder.config.extended_rules(rules)
    rules = dataclasses.replace(rules, shows_all=rules.shows_all or recorder.acts_anywhere)
    return _sample_narrowing(partial(sampler.sample, denoiser, recorder, rules), state, memory)


def _sample_narrowing(sample, state: State, memory: Trajectories) -> tuple[State, Trajectories]:
    """Plays all rows until half of them are done, then the other half as a smaller batch, and so on."""
    half = len(state.step) // 2
    if half < _FEWEST:
        return sample(state, memory)
    whole = sample(state, memory, half)
    left = jnp.argsort(whole[0].is_done, stable=True)[:half]
    part = _sample_narrowing(sample, *jax.tree.map(lambda x: x[left], whole))
    return jax.tree.map(lambda x, new: x.at[left].set(new), whole, part)


def max_num_steps(rules: Rules, asked: int) -> int:
    """Largest number of steps of an episode that asks for `asked` tokens.

    A block takes at most `rules.gives_up_after` steps; None: as many as it has positions.
    """
    block = min(rules.block_length or asked, asked)
    steps_of_block = int(rules.gives_up_after or block)
    return -(-asked // block) * steps_of_block
