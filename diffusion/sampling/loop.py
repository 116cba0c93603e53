"""Generation: observe, choose, reveal, until nothing is masked.

    observe(keys, denoise, state) -> Observation     the only caller of the denoiser
    strategy(keys, observation, memory) -> (Choice, memory)
    reveal(state, observation, choice) -> state      the only writer of tokens

A denoiser is any callable `denoise(sequence) -> Output`; guidance and the ids allowed at a position are transforms of
it (`guidance.py`). Each row has a key of its own, so what it becomes does not depend on its neighbours. The number of
function evaluations (NFE) counts forward passes made while the row still had masks; a guided pass counts two.

Conventions: confidence is the proposed token's probability under the denoiser, before temperature and noise; entropy
is in nats; margin is the difference of the two largest probabilities; Gumbel noise is float32.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from trimask.diffusion.transformer import Output
from trimask.tokenizers.sequence import Sequence

RowKeys = Key[Array, " batch"]
"""A random key per row."""


@runtime_checkable
class Denoiser(Protocol):
    """What sampling, environments and policies know of a model."""

    def __call__(
        self, sequence: Sequence, positions: Int[Array, "batch asked"] | None = None, cache: Any = None
    ) -> Output:
        """Logits of the clean token at every position, or only at those asked for."""
        ...


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class State:
    """A batch half-way from masks to tokens."""

    sequence: Sequence
    is_masked: Bool[Array, "batch seq"]
    keys: RowKeys
    """One per row, fixed."""
    temperature: Float[Array, " batch"]
    """Of the tokens' draw; 0 takes the most probable."""
    step: Int[Array, ""]
    """Steps taken."""
    num_steps: Int[Array, ""]
    """Steps planned; a strategy may need fewer."""
    nfe: Int[Array, " batch"]
    """Function evaluations so far."""
    commit_confidence: Float[Array, "batch seq"]
    """Confidence of each token when it was revealed; 1 where it was given."""

    @property
    def is_done(self) -> Bool[Array, " batch"]:
        """True where nothing is masked."""
        return ~self.is_masked.any(axis=-1)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Observation:
    """What a strategy sees."""

    proposal: Int[Array, "batch seq"]
    confidence: Float[Array, "batch seq"]
    entropy: Float[Array, "batch seq"]
    margin: Float[Array, "batch seq"]
    is_masked: Bool[Array, "batch seq"]
    in_block: Bool[Array, "batch seq"]
    """Where this step may act; all of the row unless a wrapper narrows it."""
    modality: Int[Array, "batch seq"]
    step: Int[Array, ""]
    num_steps: Int[Array, ""]
    commit_confidence: Float[Array, "batch seq"]
    num_passes: int = dataclasses.field(metadata={"static": True})
    """Forward passes this observation took."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Choice:
    """Which masked positions take their proposal, and which revealed ones are masked again."""

    reveal: Bool[Array, "batch seq"]
    remask: Bool[Array, "batch seq"]


Strategy = Callable[[RowKeys, Observation, Any], tuple[Choice, Any]]


def start(
    sequence: Sequence,
    keys: RowKeys,
    mask_id: int,
    *,
    temperature: Float[Array, " batch"] | float = 0.0,
    num_steps: int = 16,
) -> State:
    """The state before the first step: every position that holds MASK is to be filled."""
    batch = sequence.tokens.shape[:1]
    is_masked = sequence.tokens == mask_id
    return State(
        sequence=sequence,
        is_masked=is_masked,
        keys=keys,
        temperature=jnp.broadcast_to(jnp.asarray(temperature, jnp.float32), batch),
        step=jnp.zeros((), jnp.int32),
        num_steps=jnp.asarray(num_steps, jnp.int32),
        nfe=jnp.zeros(batch, jnp.int32),
        commit_confidence=jnp.where(is_masked, 0.0, 1.0),
    )


def observe(keys: RowKeys, denoise: Denoiser, state: State) -> Observation:
    """Runs the denoiser once and proposes a token everywhere; `keys` has one key per row."""
    output = denoise(state.sequence)
    log_p = jax.nn.log_softmax(output.logits)
    noise = jax.vmap(lambda key: jax.random.gumbel(key, log_p.shape[1:]))(keys)
    proposal = jnp.argmax(log_p + state.temperature[:, None, None] * noise, axis=-1)
    p = jnp.exp(log_p)
    top = jax.lax.top_k(p, 2)[0]
    return Observation(
        proposal=proposal.astype(jnp.int32),
        confidence=jnp.take_along_axis(p, proposal[..., None], axis=-1)[..., 0],
        entropy=-jnp.sum(jnp.where(p > 0, p * log_p, 0.0), axis=-1),
        margin=top[..., 0] - top[..., 1],
        is_masked=state.is_masked,
        in_block=jnp.ones_like(state.is_masked),
        modality=state.sequence.modality,
        step=state.step,
        num_steps=state.num_steps,
        commit_confidence=state.commit_confidence,
        num_passes=output.num_passes,
    )


def reveal(state: State, observation: Observation, choice: Choice, mask_id: int) -> State:
    """Writes the chosen proposals, masks what is to be masked again, and counts the evaluation."""
    revealed = choice.reveal & state.is_masked
    remasked = choice.remask & ~state.is_masked & state.sequence.is_target
    tokens = jnp.where(revealed, observation.proposal, jnp.where(remasked, mask_id, state.sequence.tokens))
    confidence = jnp.where(revealed, observation.confidence, jnp.where(remasked, 0.0, state.commit_confidence))
    return dataclasses.replace(
        state,
        sequence=state.sequence.replace(tokens=tokens),
        is_masked=(state.is_masked & ~revealed) | remasked,
        step=state.step + 1,
        nfe=state.nfe + jnp.where(state.is_done, 0, observation.num_passes),
        commit_confidence=confidence,
    )


def advance(denoise: Denoiser, strategy: Strategy, mask_id: int, state: State, memory: Any) -> tuple[State, Any]:
    """One step of every row."""
    keys = jax.vmap(lambda key: jax.random.split(jax.random.fold_in(key, state.step)))(state.keys)
    observation = observe(keys[:, 0], denoise, state)
    choice, memory = strategy(keys[:, 1], observation, memory)
    return reveal(state, observation, choice, mask_id), memory


def sample(denoise: Denoiser, strategy: Strategy, mask_id: int, state: State, memory: Any = None) -> State:
    """Steps until nothing is masked, within one jitted loop; give it a strategy that always makes progress."""

    def unfinished(carry):
        return ~carry[0].is_done.all()

    def body(carry):
        return advance(denoise, strategy, mask_id, *carry)

    return jax.lax.while_loop(unfinished, body, (state, memory))[0]
