"""Rows that are filled by an agent's choices, a problem each: what both environments have in common.

Agents number what is asked for in the order of the row: place i of what they see and choose is the i-th asked position,
wherever that is in a row.
"""

import dataclasses
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from gymnasium.error import ResetNeeded
from jax.tree_util import Partial
from jaxtyping import Array, Bool, Float, Int, UInt32

from trimask.diffusion.denoiser import Denoiser
from trimask.diffusion.sampling import sampler
from trimask.diffusion.sampling.generation_config import GenerationConfig
from trimask.diffusion.sampling.guidance import Guidance, generation_denoiser
from trimask.diffusion.sampling.state import Choice, Observation, Rules, State, initial_state
from trimask.sampling_rl.problems import ProblemSet
from trimask.sampling_rl.reward import Reward
from trimask.sampling_rl.rollout import gather_asked, scatter_asked
from trimask.tokenizers.sequence import Example, TokenRows, assemble, disassemble, padding_rows, stack_rows
from trimask.tokenizers.storage.ranges import Checked, NonNegative, Share, Size, real
from trimask.tokenizers.vocabulary import Vocabulary


@dataclass(frozen=True, kw_only=True)
class UnmaskingConfig(Checked):
    """How rows are filled, but for what the agent decides. What `GenerationConfig` has too means the same here."""

    block_length: Size | None = None
    """Fill blocks of so many tokens from left to right. None: everything at once (full diffusion)."""
    num_top: Size = 1
    """Largest probabilities of each position that are observed: K."""
    temperature: NonNegative = 0.0
    """Of the tokens' draw; 0 takes the most probable, and all randomness is the agent's."""
    top_k: Size | None = None
    """Draw among so many most probable tokens."""
    top_p: Annotated[float, real(above=0, most=1)] | None = None
    """Draw among the most probable tokens that together have this probability."""
    min_p: Share | None = None
    """Draw among the tokens at least so many times as probable as the most probable one."""
    guidance: NonNegative = 0.0
    """Classifier-free guidance: 0 is none. A guided step counts two evaluations."""
    guidance_interval: tuple[Share, Share] | None = None
    """Guide only while the share of masks lies in (low, high]. None: always."""
    stop_at_eos: bool = True
    """A text is over at its first EOS: what comes after is EOS, at no cost."""
    steps: Size = 16
    """Steps planned: agents see nothing of them, but strategies do that reveal an even share."""

    def __post_init__(self):
        super().__post_init__()
        _ = self.generation  # which checks the rest

    @property
    def generation(self) -> GenerationConfig:
        """The same for a sampler."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        del fields["num_top"]
        return GenerationConfig(**fields)

    def rules(self, vocabulary: Vocabulary, length: int) -> Rules:
        """Of episodes that ask for so many tokens at most: as many steps as a block has tokens, then it is given up."""
        patience = min(self.block_length or length, length)
        return dataclasses.replace(self.generation.rules(vocabulary), num_top=self.num_top, gives_up_after=patience)


Shown = dict[str, np.ndarray]
"""An agent's observation, or a batch of them."""


class Episodes:
    """A row of tokens per episode; all rows have the length of the longest request, so everything is compiled once."""

    def __init__(self, problems: ProblemSet, denoise: Denoiser, config: UnmaskingConfig, reward: Reward, num_rows: int):
        self.problems, self.config, self.reward = problems, config, reward
        self.length = problems.length
        self.rules = config.rules(problems.vocabulary, self.length)
        # A Partial is a tree of its arrays: what is compiled takes weights as arguments, not as constants.
        self._denoise = denoise if isinstance(denoise, Partial) else Partial(denoise)
        self._guidance = config.generation.guidance_settings
        self._row_length = max(problem.request.length for problem in problems.problems)
        self._numbers, self._seeds = [0] * num_rows, [0] * num_rows
        self._requests = [padding_rows(problems.vocabulary, (), self._row_length)] * num_rows
        self._right: dict[int, float] = {}
        self._state: State | None = None
        self._seen: Observation | None = None

    @property
    def state(self) -> State:
        """Of the sampler."""
        return _begun(self._state)

    @property
    def seen(self) -> Observation:
        """What a strategy sees of the state; none is made of a finished batch."""
        return _begun(self._seen)

    def drawn(self, generator: np.random.Generator, chosen: int | None) -> tuple[int, int]:
        """The number of an episode's problem, if none is chosen, and the seed of all that is drawn in it."""
        seed = int(generator.integers(2**32))
        return int(generator.integers(len(self.problems.problems))) if chosen is None else chosen, seed

    def begin(self, drawn: dict[int, tuple[int, int]]) -> None:
        """Rows begin with a problem, by number, and a seed; all of them at first."""
        if not drawn:
            return
        vocabulary = self.problems.vocabulary
        for row, (number, seed) in drawn.items():
            self._numbers[row], self._seeds[row] = number, seed
            self._requests[row] = assemble(vocabulary, [self.problems.problems[number].request], self._row_length)
            self._right.pop(row, None)
        fresh = _start(vocabulary.mask_id, stack_rows(self._requests), np.array(self._seeds, np.uint32))
        is_new = np.isin(np.arange(len(self._requests)), list(drawn))
        self._state = fresh if is_new.all() else _replaced(is_new, fresh, self.state)

    def observe(self) -> Shown:
        """One evaluation of the batch."""
        vocabulary = self.problems.vocabulary
        how = (self._denoise, self._guidance, self.rules)
        self._state, self._seen, shown, facts = _observe(vocabulary, self.length, *how, self.state)
        self._facts = jax.device_get(facts)
        return {key: np.array(value) for key, value in shown.items()}

    def reveal(self, bits: Bool[np.ndarray, "rows asked"]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Rewards, and which episodes end with everything revealed, and with something given up."""
        self._state, facts = _reveal(self.problems.vocabulary, self.length, self.rules, self.state, self.seen, bits)
        self._facts = jax.device_get(facts)
        rewards = np.zeros(len(bits))
        ended = np.flatnonzero(self._facts.is_done).tolist()
        if ended:
            problems = [self.problems.problems[self._numbers[row]] for row in ended]
            right = self.problems.grade(problems, [self.answer(row) for row in ended])
            lengths = np.array([problem.length for problem in problems])
            rewards[ended] = self.reward(right, self._facts.nfe[ended], lengths)
            self._right = dict(zip(ended, right.tolist(), strict=True))
        return rewards, self._facts.is_done & self._facts.is_whole, self._facts.is_done & ~self._facts.is_whole

    def end(self) -> None:
        """Nothing is to be revealed before rows begin anew."""
        self._seen = None

    def answer(self, row: int) -> Example:
        """The example of a row; code -1 is not revealed."""
        sequence = jax.tree.map(lambda x: np.asarray(x[row]), self.state.sequence)
        return disassemble(self.problems.vocabulary, sequence)[0]

    def last_observation(self, row: int) -> Shown:
        """Of a finished row, without an evaluation: nothing is masked."""
        nothing = np.zeros(self.length, np.int8)
        return {
            "confidence": np.zeros((self.length, self.config.num_top), np.float32),
            "is_masked": nothing,
            "in_block": nothing.copy(),
            "progress": self._facts.progress[row].copy(),
        }

    def info(self, row: int) -> dict[str, Any]:
        """What is known of a row besides."""
        info = {
            "problem": self._numbers[row],
            "nfe": int(self._facts.nfe[row]),
            "tokens": self._facts.tokens[row].copy(),
        }
        return info | ({"right": self._right[row]} if row in self._right else {})


def _begun(what: Any) -> Any:
    if what is None:
        raise ResetNeeded("no episode has begun, or it is over: reset the environment first")
    return what


class _Facts(NamedTuple):
    """Of every row."""

    progress: Float[Array, "rows 1"]
    tokens: Int[Array, "rows asked"]
    """Codes; −1 where one is masked, given up or not there."""
    nfe: Int[Array, " rows"]
    is_done: Bool[Array, " rows"]
    is_whole: Bool[Array, " rows"]
    """True where everything is revealed."""


@partial(jax.jit, static_argnums=0)
def _start(mask_id: int, sequence: TokenRows, seeds: UInt32[Array, " rows"]) -> State:
    return initial_state(sequence, jax.vmap(jax.random.key)(seeds), mask_id)


@jax.jit
def _replaced(is_new: Bool[Array, " rows"], fresh: State, old: State) -> State:
    def rows(new, old):
        return jnp.where(is_new.reshape(-1, *[1] * (new.ndim - 1)), new, old)

    return jax.tree.map(rows, fresh, old)


@partial(jax.jit, static_argnums=(0, 1))
def _observe(
    vocabulary: Vocabulary, length: int, denoise: Denoiser, guidance: Guidance | None, rules: Rules, state: State
) -> tuple[State, Observation, dict[str, Array], _Facts]:
    state = sampler.enter_blocks(state, rules)
    of_tokens, _ = sampler.step_keys(state)
    seen, _ = sampler.observe(of_tokens, generation_denoiser(denoise, vocabulary, guidance), state, rules)
    facts = _facts(vocabulary, length, state)
    assert seen.top is not None  # num_top is 1 at least
    shown = {
        "confidence": gather_asked(seen.top, state.is_asked, length),
        "is_masked": gather_asked(state.is_masked, state.is_asked, length).astype(jnp.int8),
        "in_block": gather_asked(seen.in_block, state.is_asked, length).astype(jnp.int8),
        "progress": facts.progress,
    }
    return state, seen, shown, facts


@partial(jax.jit, static_argnums=(0, 1))
def _reveal(
    vocabulary: Vocabulary, length: int, rules: Rules, state: State, seen: Observation, bits: Bool[Array, "rows asked"]
) -> tuple[State, _Facts]:
    state = sampler.reveal(state, seen, Choice(scatter_asked(bits, state.is_asked)), rules)
    return state, _facts(vocabulary, length, state)


def _facts(vocabulary: Vocabulary, length: int, state: State) -> _Facts:
    sequence = state.sequence
    starts = jnp.array([ids.start for ids in vocabulary.ranges])
    codes = sequence.tokens - starts[vocabulary.range_numbers(sequence.modality, sequence.coordinates)]
    is_hole = state.is_asked & (sequence.tokens == vocabulary.mask_id)
    return _Facts(
        progress=jnp.minimum(state.step / state.is_asked.sum(axis=-1), 1.0)[:, None].astype(jnp.float32),
        tokens=gather_asked(jnp.where(is_hole, -1, codes) + 1, state.is_asked, length) - 1,  # −1 past the last, too
        nfe=state.nfe,
        is_done=state.is_done,
        is_whole=~is_hole.any(axis=-1),
    )
