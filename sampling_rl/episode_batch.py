"""A batch of episodes, one row of tokens each, in which an agent chooses what to reveal: the core of both environments.

Agents see and choose the asked positions only, in the order of the row: index i of an observation or an action is the
i-th asked position, wherever that is in the row.
"""

import dataclasses
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from gymnasium.error import ResetNeeded
from jax.tree_util import Partial
from jaxtyping import Array, Bool, Float, Float64, Int, UInt32

from trimask.diffusion.denoiser import Denoiser
from trimask.diffusion.sampling import sampler
from trimask.diffusion.sampling.generation_config import GenerationConfig
from trimask.diffusion.sampling.guidance import Guidance, generation_denoiser
from trimask.diffusion.sampling.policy import InputsConfig
from trimask.diffusion.sampling.state import Choice, Observation, Rules, State, initial_state
from trimask.sampling_rl.problems import ProblemSet
from trimask.sampling_rl.reward import Reward
from trimask.sampling_rl.rollout import gather_asked, scatter_asked
from trimask.tokenizers.sequence import Example, TokenRows, assemble, disassemble, padding_rows, stack_rows
from trimask.tokenizers.storage.ranges import NonNegative
from trimask.tokenizers.vocabulary import Vocabulary

_USED_BY_EPISODES = (
    *("block_length", "temperature", "top_k", "top_p", "min_p", "guidance", "guidance_interval"),
    *("stop_at_eos", "steps"),
)
"""Fields of `GenerationConfig` that have an effect although an agent acts in place of a strategy."""


@dataclass(frozen=True, kw_only=True)
class UnmaskingConfig(GenerationConfig, InputsConfig):
    """Settings of episodes: how they are sampled, and what agents observe.

    Sampling has the fields of `GenerationConfig` that do not belong to a strategy: block_length, temperature, top_k,
    top_p, min_p, guidance (a guided step counts two evaluations), guidance_interval and stop_at_eos; and steps, which
    only strategies see that drive the environment in place of an agent. Observations have those of a policy: inputs,
    num_top and sees_beyond. Raises ValueError if a field without an effect differs from its default.
    """

    temperature: NonNegative = 0.0
    """Temperature of the tokens; 0 takes the most probable token, so that all randomness is the agent's."""

    def __post_init__(self):
        super().__post_init__()
        for field in dataclasses.fields(GenerationConfig):
            value, default = (getattr(config, field.name) for config in (self, GenerationConfig()))
            if field.name not in _USED_BY_EPISODES and value != default:
                raise ValueError(f"{field.name} has no effect in an environment and must be {default!r}, got {value!r}")
        if "top" not in self.inputs and self.num_top != InputsConfig.num_top:
            raise ValueError(
                f"num_top has no effect without the input top and must be {InputsConfig.num_top}, got {self.num_top}; "
                f"the inputs are {', '.join(self.inputs)}"
            )

    @classmethod
    def of_policy(cls, policy: InputsConfig, **settings: Any) -> "UnmaskingConfig":
        """Configuration in which agents observe what this policy takes as input; `settings` are its other fields."""
        num_top = policy.num_top if "top" in policy.inputs else InputsConfig.num_top
        return cls(inputs=policy.inputs, num_top=num_top, sees_beyond=policy.sees_beyond, **settings)

    def steps_of_block(self, length: int) -> int:
        """Largest number of steps in a block, equal to its tokens, if a problem asks for at most `length` tokens."""
        return min(self.block_length or length, length)

    def episode_rules(self, vocabulary: Vocabulary, length: int) -> Rules:
        """Rules for episodes that ask for at most `length` tokens; masks left at the end of a block are given up."""
        rules = self.extended_rules(self.rules(vocabulary))
        return dataclasses.replace(rules, gives_up_after=self.steps_of_block(length))


AgentObservation = dict[str, np.ndarray]
"""Observation of an agent, or a batch of observations, by the keys of the environment's observation space."""


class EpisodeBatch:
    """A row of tokens per episode; all rows have the length of the longest request, so that each step compiles once."""

    def __init__(self, problems: ProblemSet, denoise: Denoiser, config: UnmaskingConfig, reward: Reward, num_rows: int):
        self.problems, self.config, self.reward = problems, config, reward
        self.length = problems.length
        self.rules = config.episode_rules(problems.vocabulary, self.length)
        # A Partial is a tree of its arrays, so compiled functions take the weights as arguments, not as constants.
        self._denoise = denoise if isinstance(denoise, Partial) else Partial(denoise)
        self._guidance = config.guidance_settings
        self._row_length = max(problem.request.length for problem in problems.problems)
        self._numbers, self._seeds = [0] * num_rows, [0] * num_rows
        self._requests = [padding_rows(problems.vocabulary, (), self._row_length)] * num_rows
        self._right: dict[int, float] = {}
        self._shown: AgentObservation = {}
        self._state: State | None = None
        self._observation: Observation | None = None

    @cached_property
    def hidden_size(self) -> int:
        """Width of the denoiser's hidden states, found without computing any."""
        row = stack_rows([padding_rows(self.problems.vocabulary, (), self._row_length)])
        return jax.eval_shape(lambda denoise, row: denoise(row).hidden, self._denoise, row).shape[-1]

    @property
    def state(self) -> State:
        """The sampler's state. Raises ResetNeeded before the first episode."""
        return _require_begun(self._state)

    @property
    def sampler_observation(self) -> Observation:
        """What a strategy would see of the state. Raises ResetNeeded before the first episode and after `end`."""
        return _require_begun(self._observation)

    def draw_episode(self, generator: np.random.Generator, chosen: int | None) -> tuple[int, int]:
        """Index of a problem, random if `chosen` is None, and the seed of an episode."""
        seed = int(generator.integers(2**32))
        return int(generator.integers(len(self.problems.problems))) if chosen is None else chosen, seed

    def begin(self, episodes: dict[int, tuple[int, int]]) -> None:
        """Begins episodes: row → (index of the problem, seed). The first call must begin all rows."""
        if not episodes:
            return
        vocabulary = self.problems.vocabulary
        for row, (number, seed) in episodes.items():
            self._numbers[row], self._seeds[row] = number, seed
            self._requests[row] = assemble(vocabulary, [self.problems.problems[number].request], self._row_length)
            self._right.pop(row, None)
        fresh = _start(vocabulary.mask_id, stack_rows(self._requests), np.array(self._seeds, np.uint32))
        is_new = np.isin(np.arange(len(self._requests)), list(episodes))
        self._state = fresh if is_new.all() else _replaced(is_new, fresh, self.state)

    def observe(self) -> AgentObservation:
        """Enters the next blocks and runs the denoiser once; returns the agents' observations."""
        vocabulary = self.problems.vocabulary
        self._state, self._observation, shown, status = _observe(
            vocabulary, self.length, self.config.inputs, self._denoise, self._guidance, self.rules, self.state
        )
        self._status = jax.device_get(status)
        self._shown = {key: np.array(value) for key, value in shown.items()}
        return self._shown

    def reveal(
        self, bits: Bool[np.ndarray, "rows asked"]
    ) -> tuple[Float64[np.ndarray, " rows"], Bool[np.ndarray, " rows"]]:
        """Reveals the proposals whose bit is set, and grades the answers of episodes that end.

        Returns each row's reward, and whether its episode ended.
        """
        observation = self.sampler_observation
        self._state, status = _reveal(self.problems.vocabulary, self.length, self.rules, self.state, observation, bits)
        self._status = jax.device_get(status)
        rewards = np.zeros(len(bits))
        ended = np.flatnonzero(self._status.is_done).tolist()
        if ended:
            problems = [self.problems.problems[self._numbers[row]] for row in ended]
            right = self.problems.grade(problems, [self.answer(row) for row in ended])
            lengths = np.array([problem.length for problem in problems])
            rewards[ended] = self.reward(right, self._status.nfe[ended], lengths)
            self._right = dict(zip(ended, right.tolist(), strict=True))
        return rewards, self._status.is_done

    def end(self) -> None:
        """Forgets the observation, so that `reveal` raises ResetNeeded until episodes begin anew."""
        self._observation = None

    def answer(self, row: int) -> Example:
        """The example that a row holds; code −1 where a token is not revealed."""
        sequence = jax.tree.map(lambda x: np.asarray(x[row]), self.state.sequence)
        return disassemble(self.problems.vocabulary, sequence)[0]

    def last_observation(self, row: int) -> AgentObservation:
        """Observation of a finished row, made without an evaluation: 0 but for `is_asked` and the progress."""
        asked = self.problems.problems[self._numbers[row]].length
        return {
            **{key: np.zeros_like(values[row]) for key, values in self._shown.items()},
            "is_asked": (np.arange(self.length) < asked).astype(np.int8),
            "progress": self._status.progress[row].copy(),
        }

    def info(self, row: int) -> dict[str, Any]:
        """The info that Gymnasium returns beside a row's observation; see `UnmaskingEnv`."""
        info = {
            "problem": self._numbers[row],
            "nfe": int(self._status.nfe[row]),
            "gave_up": int(self._status.gave_up[row]),
            "tokens": self._status.tokens[row].copy(),
        }
        return info | ({"right": self._right[row]} if row in self._right else {})


def _require_begun(value: Any) -> Any:
    if value is None:
        raise ResetNeeded("no episode has begun, or it is over: reset the environment first")
    return value


class _RowStatus(NamedTuple):
    """Status of every row, for agents and rewards."""

    progress: Float[Array, "rows 1"]
    """Number of steps taken over number of requested tokens."""
    tokens: Int[Array, "rows asked"]
    """Codes; −1 where a token is masked or given up, and past the last asked position."""
    nfe: Int[Array, " rows"]
    gave_up: Int[Array, " rows"]
    """Number of positions given up so far."""
    is_done: Bool[Array, " rows"]


@partial(jax.jit, static_argnums=0)
def _start(mask_id: int, sequence: TokenRows, seeds: UInt32[Array, " rows"]) -> State:
    return initial_state(sequence, jax.vmap(jax.random.key)(seeds), mask_id)


@jax.jit
def _replaced(is_new: Bool[Array, " rows"], fresh: State, old: State) -> State:
    def rows(new, old):
        return jnp.where(is_new.reshape(-1, *[1] * (new.ndim - 1)), new, old)

    return jax.tree.map(rows, fresh, old)


@partial(jax.jit, static_argnums=(0, 1, 2))
def _observe(
    vocabulary: Vocabulary,
    length: int,
    inputs: tuple[str, ...],
    denoise: Denoiser,
    guidance: Guidance | None,
    rules: Rules,
    state: State,
) -> tuple[State, Observation, dict[str, Array], _RowStatus]:
    state = sampler.enter_blocks(state, rules)
    token_keys, _ = sampler.step_keys(state)
    observation, _ = sampler.observe(token_keys, generation_denoiser(denoise, vocabulary, guidance), state, rules)
    status = _row_status(vocabulary, length, state)

    def at_asked(name: str) -> Array:
        return gather_asked(getattr(observation, name), state.is_asked, length)

    statistics = {name: at_asked(name).astype(jnp.float32) for name in inputs}
    sources = {"is_masked": "holds_mask", "in_block": "in_block", "is_asked": "is_asked"}
    bits = {name: at_asked(source).astype(jnp.int8) for name, source in sources.items()}
    return state, observation, {**statistics, **bits, "progress": status.progress}, status


@partial(jax.jit, static_argnums=(0, 1))
def _reveal(
    vocabulary: Vocabulary,
    length: int,
    rules: Rules,
    state: State,
    observation: Observation,
    bits: Bool[Array, "rows asked"],
) -> tuple[State, _RowStatus]:
    state = sampler.reveal(state, observation, Choice(scatter_asked(bits, state.is_asked)), rules)
    return state, _row_status(vocabulary, length, state)


def _row_status(vocabulary: Vocabulary, length: int, state: State) -> _RowStatus:
    sequence = state.sequence
    starts = jnp.array([ids.start for ids in vocabulary.ranges])
    codes = sequence.tokens - starts[vocabulary.range_numbers(sequence.modality, sequence.coordinates)]
    is_hole = state.is_asked & (sequence.tokens == vocabulary.mask_id)
    return _RowStatus(
        progress=(state.step / state.is_asked.sum(axis=-1))[:, None].astype(jnp.float32),
        tokens=gather_asked(jnp.where(is_hole, -1, codes) + 1, state.is_asked, length) - 1,  # −1 past the last, too
        nfe=state.nfe,
        gave_up=(is_hole & ~state.is_masked).sum(axis=-1),
        is_done=state.is_done,
    )
