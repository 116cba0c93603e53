"""The types of generation: its rules, the state of a batch, and a strategy's observation and choice.

A position is *asked* if it was masked at the start, so that generation fills it; the other tokens never change.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from trimask.diffusion.sampling.proposals import TokenSampling
from trimask.diffusion.schedule import LINEAR, Schedule
from trimask.tokenizers.sequence import TokenRows

RowKeys = Key[Array, " batch"]
"""One random key per row."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Rules:
    """Settings of generation that hold for every row and every strategy.

    A change of a field that is not static needs no new compilation.
    """

    mask_id: int = dataclasses.field(metadata={"static": True})
    """Id of the MASK token."""
    num_steps: Int[Array, ""] | int = 16
    """Number of steps planned for a row, for strategies that follow the plan; the others take as many as they need."""
    token_sampling: TokenSampling = TokenSampling()
    """Temperature and filters with which tokens are drawn."""
    max_nfe: Int[Array, ""] | int | None = None
    """Most function evaluations per row, divided evenly among its blocks: the last of a block's share reveals the rest
    of the block. None: no limit."""
    patience: Int[Array, ""] | int | None = None
    """Number of consecutive evaluations with equal proposals that reveals the rest of a block. None: no such rule."""
    gives_up_after: Int[Array, ""] | int | None = None
    """Number of steps in a block after which its masks are given up: they stay masked. None: never."""
    refresh_every: Int[Array, ""] | int | None = None
    """Most passes per round (see `sampler.py`). None: no limit."""
    grid: Schedule = dataclasses.field(default=LINEAR, metadata={"static": True})
    """Noise schedule s whose masked share s(1 − u) is left after a share u of the steps."""
    block_length: int | None = dataclasses.field(default=None, metadata={"static": True})
    """Number of positions in a block. None: a row is one block."""
    cache: Literal["none", "prefix", "dual"] = dataclasses.field(default="none", metadata={"static": True})
    """Keys and values that the passes of a round reuse from its first pass (see `sampler.py`); needs blocks."""
    eos_id: int | None = dataclasses.field(default=None, metadata={"static": True})
    """Id of EOS, if a text ends at its first EOS after all given tokens: masks after it become EOS without an
    evaluation. None: text goes on after EOS."""
    num_top: int = dataclasses.field(default=0, metadata={"static": True})
    """Number of largest probabilities of each position that are observed."""
    shows_hidden: bool = dataclasses.field(default=False, metadata={"static": True})
    """Whether the denoiser's last hidden states are observed."""
    shows_all: bool = dataclasses.field(default=False, metadata={"static": True})
    """Whether positions outside the block that hold MASK are observed too, of later blocks and those that were given
    up, which needs their logits and excludes a cache."""
    passes_per_step: int = dataclasses.field(default=1, metadata={"static": True})
    """Most function evaluations per step: 2 with guidance."""
    chunk: int = dataclasses.field(default=128, metadata={"static": True})
    """Approximate number of positions of the batch whose logits are in memory at once."""

    def __post_init__(self):
        if self.cache != "none" and self.block_length is None:
            raise ValueError(f"a cache ({self.cache}) needs a block_length")
        if self.cache != "none" and self.shows_all:
            raise ValueError(f"a cache ({self.cache}) computes only the block, and shows_all needs the whole row")
        if self.block_length is not None and self.block_length < 1:
            raise ValueError(f"block_length must be at least 1, got {self.block_length}")


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class State:
    """A batch in generation."""

    sequence: TokenRows
    is_asked: Bool[Array, "batch seq"]
    """True where the token was masked before the first step; the other tokens never change."""
    is_masked: Bool[Array, "batch seq"]
    """True where a token is still to be revealed; False where MASK was given up."""
    keys: RowKeys
    """Random key of each row, the same in every step."""
    step: Int[Array, " batch"]
    """Number of steps taken."""
    nfe: Int[Array, " batch"]
    """Number of function evaluations so far."""
    block: Int[Array, " batch"]
    """Index of the current block, from 0."""
    is_open: Bool[Array, " batch"]
    """True while the current block needs another step."""
    block_step: Int[Array, " batch"]
    """Number of steps taken in the current block."""
    block_nfe: Int[Array, " batch"]
    """Number of function evaluations spent on the current block."""
    proposal: Int[Array, "batch seq"]
    """Latest proposed token at every position, whether revealed or not; 0 before the first proposal."""
    stable_for: Int[Array, " batch"]
    """Number of consecutive evaluations that repeated the proposals of the one before, in the current block."""
    commit_confidence: Float[Array, "batch seq"]
    """Confidence of each token when it was revealed; 1 where it was given."""
    commit_step: Int[Array, "batch seq"]
    """Step, counted from 1, in which each token was revealed; 0 where it was given or is masked."""

    @property
    def is_done(self) -> Bool[Array, " batch"]:
        """True for rows that need no further step."""
        return ~self.is_open & ~self.is_masked.any(axis=-1)

    @property
    def origin(self) -> Int[Array, " batch"]:
        """Position at which the first block of each row begins: its first asked position."""
        return jnp.argmax(self.is_asked, axis=-1)

    def num_blocks(self, rules: Rules) -> Int[Array, " batch"]:
        """Number of blocks from the first to the last asked position of each row."""
        if rules.block_length is None:
            return jnp.ones_like(self.step)
        last = self.is_asked.shape[-1] - 1 - jnp.argmax(self.is_asked[:, ::-1], axis=-1)
        return (last - self.origin) // rules.block_length + 1

    def block_start(self, rules: Rules) -> Int[Array, " batch"]:
        """First position of the current block; 0 without blocks."""
        if rules.block_length is None:
            return jnp.zeros_like(self.step)
        return self.origin + self.block * rules.block_length


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Observation:
    """What a strategy sees. The denoiser's statistics (proposal to margin, top, hidden) are 0 at positions that do not
    hold MASK and, without `Rules.shows_all`, outside the block."""

    proposal: Int[Array, "batch seq"]
    """Token that is written if the position is revealed."""
    confidence: Float[Array, "batch seq"]
    """Probability of the proposed token, before temperature and filters."""
    entropy: Float[Array, "batch seq"]
    """Entropy of the denoiser's distribution, in nats."""
    margin: Float[Array, "batch seq"]
    """Difference of the two largest probabilities."""
    is_masked: Bool[Array, "batch seq"]
    """True where a token is still to be revealed."""
    holds_mask: Bool[Array, "batch seq"]
    """True where a token is still to be revealed or was given up at the end of its block."""
    in_block: Bool[Array, "batch seq"]
    """True in the current block, where this step may act; False everywhere in rows that wait or are done."""
    is_asked: Bool[Array, "batch seq"]
    """True where the token was masked at the start; only these may be masked again."""
    modality: Int[Array, "batch seq"]
    """Number of each position's modality in `Vocabulary.modalities`, as in `TokenRows`."""
    step: Int[Array, " batch"]
    """Number of steps taken in the current block."""
    steps_taken: Int[Array, " batch"]
    """Number of steps taken in the row."""
    num_steps: Int[Array, " batch"]
    """Number of steps planned for the current block."""
    time: Float[Array, " batch"]
    """t: planned share of masks in the block before this step, from 1 down to 0."""
    next_time: Float[Array, " batch"]
    """s < t: planned share of masks in the block after this step."""
    commit_confidence: Float[Array, "batch seq"]
    """Confidence of each token when it was revealed; 1 where it was given, 0 where it is masked."""
    num_passes: Int[Array, " batch"]
    """Number of forward passes that this observation took."""
    top: Float[Array, "batch seq top"] | None = None
    """The `Rules.num_top` largest probabilities, in descending order. None if that is 0."""
    hidden: Float[Array, "batch seq width"] | None = None
    """The denoiser's last hidden states. None without `Rules.shows_hidden`."""

    @property
    def length(self) -> int:
        """Number of positions in a row."""
        return self.is_masked.shape[-1]

    @property
    def candidates(self) -> Bool[Array, "batch seq"]:
        """True where a token may be revealed: masked and in the current block."""
        return self.is_masked & self.in_block


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Choice:
    """A strategy's decision for one step."""

    reveal: Bool[Array, "batch seq"]
    """True where a masked position takes its proposed token."""
    remask: Bool[Array, "batch seq"] | None = None
    """True where a revealed position is masked again. None: nowhere."""
    goes_on: Bool[Array, " batch"] | None = None
    """True where the block needs another step even if nothing is masked, since the strategy remasks. None: nowhere."""


Memory = Any
"""State that a strategy carries from step to step: a tree of arrays whose first axis is the batch, or None."""

Strategy = Callable[[RowKeys, Observation, Memory], tuple[Choice, Memory]]
"""`strategy(keys, observation, memory) -> (choice, memory)`, with one key per row.

It is also called for rows that wait or are done, where `in_block` is False everywhere: its choice there has no effect,
and it must leave their memory unchanged."""


@partial(jax.jit, static_argnums=2)
def initial_state(sequence: TokenRows, keys: RowKeys, mask_id: int) -> State:
    """State before the first step: every position that holds MASK is to be filled, except in a condition."""
    is_masked = (sequence.tokens == mask_id) & ~sequence.is_condition
    zero = jnp.zeros(is_masked.shape[:1], jnp.int32)
    return State(
        sequence=sequence,
        is_asked=is_masked,
        is_masked=is_masked,
        keys=keys,
        step=zero,
        nfe=zero,
        block=zero,
        is_open=zero > 0,
        block_step=zero,
        block_nfe=zero,
        proposal=jnp.zeros_like(sequence.tokens),
        stable_for=zero,
        commit_confidence=(~is_masked).astype(jnp.float32),
        commit_step=jnp.zeros_like(sequence.tokens),
    )
