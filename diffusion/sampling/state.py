"""What generation works on: rules, the state of a batch, what a strategy sees of it, and what it chooses."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from trimask.diffusion.sampling.proposals import Draw
from trimask.tokenizers.sequence import TokenRows

RowKeys = Key[Array, " batch"]
"""A random key per row."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Rules:
    """What holds for every row of a generation, whatever the strategy. Numbers may change without compiling anew."""

    mask_id: int = dataclasses.field(metadata={"static": True})
    num_steps: Int[Array, ""] | int = 16
    """Steps planned for a row: of strategies that reveal an even share. Others take what they need."""
    draw: Draw = Draw()
    """How tokens are taken from distributions."""
    max_nfe: Int[Array, ""] | int | None = None
    """Evaluations a row may use: with the last of a block's share the rest of the block is revealed."""
    patience: Int[Array, ""] | int | None = None
    """Reveal the rest of a block when its proposals were the same in so many evaluations."""
    gives_up_after: Int[Array, ""] | int | None = None
    """Steps in a block after which what is masked in it stays so. None: never."""
    refresh_every: Int[Array, ""] | int | None = None
    """Passes of a round at most. None: no limit."""
    grid: Literal["linear", "cosine"] = dataclasses.field(default="linear", metadata={"static": True})
    """Share of masks that are left after the share u of the steps: 1 − u, or cos(π/2·u) (MaskGIT), slow at first."""
    block_length: int | None = dataclasses.field(default=None, metadata={"static": True})
    """Positions of a block. None: a row is one block."""
    cache: Literal["none", "prefix", "dual"] = dataclasses.field(default="none", metadata={"static": True})
    """What a round keeps; needs blocks."""
    eos_id: int | None = dataclasses.field(default=None, metadata={"static": True})
    """A text is over at its first EOS after all that was given: masks after it become EOS at no cost. None: no rule."""
    num_top: int = dataclasses.field(default=0, metadata={"static": True})
    """How many of the largest probabilities of a position are observed."""
    shows_hidden: bool = dataclasses.field(default=False, metadata={"static": True})
    """Whether the denoiser's last hidden states are observed."""
    shows_all: bool = dataclasses.field(default=False, metadata={"static": True})
    """Whether masks beyond the block are observed too; takes logits of all of them, and goes with no cache."""
    passes_per_step: int = dataclasses.field(default=1, metadata={"static": True})
    """Evaluations that a step may cost: 2 with guidance."""
    chunk: int = dataclasses.field(default=128, metadata={"static": True})
    """Positions of the batch whose logits are in memory at once, about."""

    def __post_init__(self):
        if self.cache != "none" and self.block_length is None:
            raise ValueError(f"a cache ({self.cache}) needs a block_length")
        if self.cache != "none" and self.shows_all:
            raise ValueError(f"a cache ({self.cache}) computes blocks, and shows_all wants to see beyond them")
        if self.block_length is not None and self.block_length < 1:
            raise ValueError(f"block_length must be at least 1, got {self.block_length}")


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class State:
    """A batch half-way from masks to tokens. All axes begin with the batch."""

    sequence: TokenRows
    is_asked: Bool[Array, "batch seq"]
    """Masked before the first step; the other tokens never change."""
    is_masked: Bool[Array, "batch seq"]
    """To be filled. What was given up holds MASK and is not."""
    keys: RowKeys
    """One per row, fixed."""
    step: Int[Array, " batch"]
    """Steps taken."""
    nfe: Int[Array, " batch"]
    """Function evaluations so far."""
    block: Int[Array, " batch"]
    """Number of the block that is being filled."""
    is_open: Bool[Array, " batch"]
    """True while there is something to do in this block."""
    block_step: Int[Array, " batch"]
    """Steps taken in this block."""
    block_nfe: Int[Array, " batch"]
    """Function evaluations for this block."""
    proposal: Int[Array, "batch seq"]
    """What was proposed last at every position, whether it was revealed or not; 0 before."""
    stable_for: Int[Array, " batch"]
    """Evaluations whose proposals for this block were those of the one before."""
    commit_confidence: Float[Array, "batch seq"]
    """Confidence of each token when it was revealed; 1 where it was given."""
    commit_step: Int[Array, "batch seq"]
    """Step, counted from 1, in which each token was revealed; 0 where it was given or is masked."""

    @property
    def is_done(self) -> Bool[Array, " batch"]:
        """True where nothing is left to do."""
        return ~self.is_open & ~self.is_masked.any(axis=-1)

    @property
    def origin(self) -> Int[Array, " batch"]:
        """Where the first block of a row begins: its first asked position."""
        return jnp.argmax(self.is_asked, axis=-1)

    def num_blocks(self, rules: Rules) -> Int[Array, " batch"]:
        """Blocks from the first to the last asked position."""
        if rules.block_length is None:
            return jnp.ones_like(self.step)
        last = self.is_asked.shape[-1] - 1 - jnp.argmax(self.is_asked[:, ::-1], axis=-1)
        return (last - self.origin) // rules.block_length + 1

    def block_start(self, rules: Rules) -> Int[Array, " batch"]:
        """First position of the block."""
        if rules.block_length is None:
            return jnp.zeros_like(self.step)
        return self.origin + self.block * rules.block_length


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Observation:
    """What a strategy sees. Numbers of the denoiser are 0 where nothing is masked and, without `shows_all`, outside the
    block."""

    proposal: Int[Array, "batch seq"]
    confidence: Float[Array, "batch seq"]
    entropy: Float[Array, "batch seq"]
    margin: Float[Array, "batch seq"]
    is_masked: Bool[Array, "batch seq"]
    in_block: Bool[Array, "batch seq"]
    """Where this step may act."""
    is_asked: Bool[Array, "batch seq"]
    """Where there are masks, or were before they were revealed: what may be masked again."""
    modality: Int[Array, "batch seq"]
    step: Int[Array, " batch"]
    """Steps taken in this block."""
    steps_taken: Int[Array, " batch"]
    """Steps taken in the row."""
    num_steps: Int[Array, " batch"]
    """Steps planned for this block."""
    time: Float[Array, " batch"]
    """Planned share of masks before this step: t, from 1 to 0."""
    next_time: Float[Array, " batch"]
    """And after it: s < t."""
    commit_confidence: Float[Array, "batch seq"]
    num_passes: Int[Array, " batch"]
    """Forward passes this observation took."""
    top: Float[Array, "batch seq top"] | None = None
    """The largest probabilities, in falling order, if `Rules.num_top` asks for them."""
    hidden: Float[Array, "batch seq width"] | None = None
    """The denoiser's last hidden states, if `Rules.shows_hidden` asks for them."""

    @property
    def length(self) -> int:
        """Positions of a row."""
        return self.is_masked.shape[-1]

    @property
    def candidates(self) -> Bool[Array, "batch seq"]:
        """Positions that may be revealed."""
        return self.is_masked & self.in_block


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Choice:
    """Which masked positions take their proposal, and which revealed ones are masked again."""

    reveal: Bool[Array, "batch seq"]
    remask: Bool[Array, "batch seq"] | None = None
    goes_on: Bool[Array, " batch"] | None = None
    """True where the strategy wants another step in this block even if nothing is masked: it remasks."""


Memory = Any
"""What a strategy keeps from step to step: a tree of arrays whose first axis is the batch, or None."""

Strategy = Callable[[RowKeys, Observation, Memory], tuple[Choice, Memory]]
"""It is also called for rows that wait or are done, where `in_block` is False everywhere: what it chooses there has no
effect, and their memory it must leave as it is."""


@partial(jax.jit, static_argnums=2)
def start(sequence: TokenRows, keys: RowKeys, mask_id: int) -> State:
    """The state before the first step: every position that holds MASK is to be filled, but for a hidden condition."""
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
