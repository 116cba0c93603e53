"""Strategies: which masked positions each step reveals, and which revealed ones it masks again.

A strategy is a function (keys, observation, memory) -> (Choice, memory), vectorised over rows, with one key per row;
its parameters are keyword arguments, named as the fields of `GenerationConfig`. It acts on the current block. Ties go
to the lowest position.

Strategies of "an even share" reveal what brings the masks of the block from the planned share t to s:
⌈masks · (1 − s/t)⌉, at least one.

Deviations from the papers
1. ReMDM by confidence weighs revealed positions by softmax(−confidence at commit) over the block; the published code
   does so over the sequence.
2. In blocks, time runs from 1 to 0 in every block.
3. `factor` follows the formula also at the last rank, where the published code always succeeds.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from trimask.diffusion.sampling.state import Choice, Memory, Observation, RowKeys

ChoiceAndMemory = tuple[Choice, Memory]
Scalar = Float[Array, ""] | float


def random(keys: RowKeys, observation: Observation, memory: Memory) -> ChoiceAndMemory:
    """Reveals an even share, uniformly at random."""
    return highest_scoring(uniform(keys, observation.length), _even_share(observation), observation), memory


def ancestral(keys: RowKeys, observation: Observation, memory: Memory) -> ChoiceAndMemory:
    """Reveals each mask independently with probability (α_s − α_t)/(1 − α_t) = (t − s)/t.

    This is the reverse process on a time grid (MDLM, arXiv 2406.07524; MD4, arXiv 2406.04329).
    """
    probability = jnp.where(observation.next_time > 0, 1 - observation.next_time / observation.time, 1.0)
    return Choice(observation.candidates & (uniform(keys, observation.length) < probability[:, None])), memory


def first_hitting(keys: RowKeys, observation: Observation, memory: Memory) -> ChoiceAndMemory:
    """Reveals one mask, uniformly at random.

    This is the reverse process at the times of its jumps (first-hitting sampler, arXiv 2409.02908), for a denoiser
    without a time input.
    """
    return highest_scoring(uniform(keys, observation.length), 1, observation), memory


def confidence(keys: RowKeys, observation: Observation, memory: Memory) -> ChoiceAndMemory:
    """Reveals an even share, of highest confidence (LLaDA, arXiv 2502.09992)."""
    return highest_scoring(observation.confidence, _even_share(observation), observation), memory


def margin(keys: RowKeys, observation: Observation, memory: Memory) -> ChoiceAndMemory:
    """Reveals an even share, with the largest difference of the two highest probabilities (arXiv 2502.06768)."""
    return highest_scoring(observation.margin, _even_share(observation), observation), memory


def entropy(keys: RowKeys, observation: Observation, memory: Memory) -> ChoiceAndMemory:
    """Reveals an even share, of lowest entropy (Dream, arXiv 2508.15487)."""
    return highest_scoring(-observation.entropy, _even_share(observation), observation), memory


def position(keys: RowKeys, observation: Observation, memory: Memory, *, position_penalty: Scalar) -> ChoiceAndMemory:
    """Reveals an even share, with the highest confidence · exp(−penalty · index among the asked positions).

    The penalty counters the high confidence of EOS at the far end of a text.
    """
    index = jnp.cumsum(observation.is_asked, axis=-1) - 1
    discounted = observation.confidence * jnp.exp(-position_penalty * index)
    return highest_scoring(discounted, _even_share(observation), observation), memory


def entropy_bound(keys: RowKeys, observation: Observation, memory: Memory, *, entropy_bound: Scalar) -> ChoiceAndMemory:
    """Reveals most masks, in order of entropy H, with Σ H − max H ≤ γ; at least one (EB-sampler, arXiv 2505.24857)."""
    order, rank = _order_and_rank(-observation.entropy, observation.candidates)
    ordered = jnp.where(observation.candidates, observation.entropy, 0.0)
    ordered = jnp.take_along_axis(ordered, order, axis=-1)
    before = jnp.cumsum(ordered, axis=-1) - ordered  # in ascending order, so the set's largest entropy is the last
    count = jnp.sum((before <= entropy_bound) & _is_candidate(observation, order), axis=-1)
    return Choice(observation.candidates & (rank < jnp.maximum(count, 1)[:, None])), memory


def threshold(keys: RowKeys, observation: Observation, memory: Memory, *, threshold: Scalar) -> ChoiceAndMemory:
    """Reveals every mask of at least this confidence, and always the most confident (Fast-dLLM, arXiv 2505.22618)."""
    confident = Choice(observation.candidates & (observation.confidence >= threshold))
    return _at_least_one(confident, observation.confidence, observation), memory


def leftmost(keys: RowKeys, observation: Observation, memory: Memory, *, threshold: Scalar) -> ChoiceAndMemory:
    """Reveals every mask of at least this confidence; if there is none, the leftmost (Fork-dLLM)."""
    confident = Choice(observation.candidates & (observation.confidence >= threshold))
    return _at_least_one(confident, -_positions(observation).astype(jnp.float32), observation), memory


def factor(keys: RowKeys, observation: Observation, memory: Memory, *, factor: Scalar) -> ChoiceAndMemory:
    """Reveals the n most confident masks, for the largest n with (n + 1)(1 − c_n) < f; at least one.

    c_n is the n-th largest confidence (Fast-dLLM, arXiv 2505.22618).
    """
    order, rank = _order_and_rank(observation.confidence, observation.candidates)
    ordered = jnp.take_along_axis(observation.confidence, order, axis=-1)
    number = jnp.arange(1, ordered.shape[-1] + 1)
    holds = ((number + 1) * (1 - ordered) < factor) & _is_candidate(observation, order)
    count = jnp.max(jnp.where(holds, number, 1), axis=-1)
    return Choice(observation.candidates & (rank < count[:, None])), memory


def given(keys: RowKeys, observation: Observation, memory: Memory) -> ChoiceAndMemory:
    """Reveals an even share in the order of the memory, which is the rank of every position. None: left to right."""
    rank = _positions(observation) if memory is None else memory
    return highest_scoring(-rank.astype(jnp.float32), _even_share(observation), observation), memory


def remdm_cap(keys: RowKeys, observation: Observation, memory: Memory, *, remask: Scalar) -> ChoiceAndMemory:
    """ReMDM (arXiv 2503.00307) with σ = min(η, σ_max), the probability of masking a revealed token again."""
    return _remasking(keys, observation, jnp.minimum(remask, _max_remask_probability(observation))[:, None]), memory


def remdm_rescale(keys: RowKeys, observation: Observation, memory: Memory, *, remask: Scalar) -> ChoiceAndMemory:
    """ReMDM (arXiv 2503.00307) with σ = η · σ_max."""
    return _remasking(keys, observation, remask * _max_remask_probability(observation)[:, None]), memory


def remdm_confidence(keys: RowKeys, observation: Observation, memory: Memory) -> ChoiceAndMemory:
    """ReMDM (arXiv 2503.00307) with σ = σ_max · softmax(−confidence at commit) over the revealed positions."""
    revealed = _revealed(observation)
    weight = jax.nn.softmax(jnp.where(revealed, -observation.commit_confidence, -jnp.inf), axis=-1, where=revealed)
    return _remasking(keys, observation, weight * _max_remask_probability(observation)[:, None]), memory


def remdm_loop(
    keys: RowKeys,
    observation: Observation,
    memory: Memory,
    *,
    remask: Scalar,
    loop_from: Scalar,
    loop_until: Scalar,
    loop_kept: Scalar,
) -> ChoiceAndMemory:
    """ReMDM with a loop (arXiv 2503.00307).

    Reveals until the share `loop_kept` is revealed, keeps that share by remasking with σ = η while time runs from
    `loop_from` to `loop_until`, then reveals the rest. η is at most (1 − kept)/kept, beyond which the share would fall.
    """
    remask = jnp.minimum(remask, (1 - loop_kept) / loop_kept)
    t = 1 - observation.step / observation.num_steps
    s = 1 - (observation.step + 1) / observation.num_steps

    def masked_share(time):
        before = 1 - (1 - time) * loop_kept / (1 - loop_from)
        return jnp.where(time > loop_from, before, jnp.minimum(time / loop_until, 1.0) * (1 - loop_kept))

    is_last = observation.step + 1 >= observation.num_steps
    loops = (t <= loop_from) & (t > loop_until) & ~is_last
    reveals = jnp.where(is_last, 1.0, 1 - masked_share(s) / masked_share(t))
    reveals = jnp.where(loops, remask * loop_kept / (1 - loop_kept), reveals)
    return _remask_and_reveal(keys, observation, jnp.where(loops, remask, 0.0)[:, None], reveals[:, None]), memory


STRATEGIES: dict[str, Callable[..., ChoiceAndMemory]] = {
    function.__name__: function
    for function in (
        random,
        ancestral,
        first_hitting,
        confidence,
        margin,
        entropy,
        position,
        entropy_bound,
        threshold,
        leftmost,
        factor,
        given,
        remdm_cap,
        remdm_rescale,
        remdm_confidence,
        remdm_loop,
    )
}
"""Name of a strategy → its function."""


def _at_least_one(choice: Choice, score: Float[Array, "batch seq"], observation: Observation) -> Choice:
    """The choice, which in rows where it reveals nothing reveals the candidate of the highest score."""
    is_stuck = ~(choice.reveal & observation.candidates).any(axis=-1, keepdims=True)
    return Choice(
        jnp.where(is_stuck, highest_scoring(score, 1, observation).reveal, choice.reveal), choice.remask, choice.goes_on
    )


def uniform(keys: RowKeys, length: int) -> Float[Array, "batch seq"]:
    """One uniform number in [0, 1) per position, which does not depend on the length of the row."""
    fold = jax.vmap(lambda key, position: jax.random.uniform(jax.random.fold_in(key, position)), (None, 0))
    return jax.vmap(fold, (0, None))(keys, jnp.arange(length))


def _positions(observation: Observation) -> Int[Array, "batch seq"]:
    return jnp.broadcast_to(jnp.arange(observation.is_masked.shape[-1]), observation.is_masked.shape)


def _even_share(observation: Observation) -> Int[Array, " batch"]:
    """Number of masks to reveal so that their share falls from t to s; see the module's docstring."""
    left, t, s = observation.candidates.sum(axis=-1), observation.time, observation.next_time
    share = jnp.where(s > 0, s / jnp.where(t > 0, t, 1.0), 0.0)
    return jnp.maximum(left - jnp.floor(left * share + 1e-4).astype(left.dtype), 1)  # 1e-4 absorbs rounding


def _order_and_rank(
    score: Float[Array, "batch seq"], candidates: Bool[Array, "batch seq"]
) -> tuple[Int[Array, "batch seq"], Int[Array, "batch seq"]]:
    """Positions in descending order of score, candidates first; and the rank of each position in that order."""
    # NaN and −∞ rank last among the candidates, but before all other positions, so that something is revealed.
    lowest = jnp.finfo(score.dtype).min
    score = jnp.maximum(jnp.where(jnp.isnan(score), lowest, score), lowest)
    order = jnp.argsort(-jnp.where(candidates, score, -jnp.inf), axis=-1, stable=True)
    return order, jnp.argsort(order, axis=-1)


def _is_candidate(observation: Observation, order: Int[Array, "batch seq"]) -> Bool[Array, "batch seq"]:
    return jnp.take_along_axis(observation.candidates, order, axis=-1)


def highest_scoring(
    score: Float[Array, "batch seq"], count: Int[Array, " batch"] | int, observation: Observation
) -> Choice:
    """Reveals the `count` candidates of the highest score in each row."""
    rank = _order_and_rank(score, observation.candidates)[1]
    return Choice(observation.candidates & (rank < jnp.broadcast_to(jnp.asarray(count), score.shape[:1])[:, None]))


def _revealed(observation: Observation) -> Bool[Array, "batch seq"]:
    """True at positions that may be masked again."""
    return observation.is_asked & ~observation.is_masked & observation.in_block


def _max_remask_probability(observation: Observation) -> Float[Array, " batch"]:
    """σ_max = min(1, (1 − α_s)/α_t), with α = 1 − time (ReMDM, arXiv 2503.00307)."""
    t, s = observation.time, observation.next_time
    return jnp.where(t < 1, jnp.minimum(1.0, s / jnp.where(t < 1, 1 - t, 1.0)), 1.0)


def _remasking(keys: RowKeys, observation: Observation, sigma: Float[Array, "batch #seq"]) -> Choice:
    """Remasks with probability σ, and reveals with probability (α_s − (1 − σ)α_t)/(1 − α_t)."""
    t, s = observation.time[:, None], observation.next_time[:, None]
    reveals = jnp.where(s > 0, (1 - s - (1 - sigma) * (1 - t)) / t, 1.0)
    return _remask_and_reveal(keys, observation, sigma, reveals)


def _remask_and_reveal(keys: RowKeys, observation: Observation, sigma, reveals) -> Choice:
    drawn = uniform(keys, observation.length)
    goes_on = (observation.step + 1 < observation.num_steps) & observation.in_block.any(axis=-1)
    return Choice(observation.candidates & (drawn < reveals), _revealed(observation) & (drawn < sigma), goes_on)
