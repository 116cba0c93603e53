"""Which masked positions to reveal next, and which to mask again.

A strategy is a function (keys, observation, memory) -> (Choice, memory), vectorised over rows, with one key per row;
its numbers are keyword arguments, named as the fields of `GenerationConfig`. It sees one block. Ties break to the
lowest position.

An even share of the masks is what brings them from the planned share t to s: ⌈masks · (1 − s/t)⌉, at least one.

Deviations
1. ReMDM by confidence weighs revealed positions by softmax(−confidence at commit) over the block, as the published code
   does over the sequence.
2. In blocks, time runs from 1 to 0 in every block.
3. `factor` follows the formula also at the last rank, where the published code always succeeds.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from trimask.diffusion.sampling.state import Choice, Memory, Observation, RowKeys, Strategy

Step = tuple[Choice, Memory]
Number = Float[Array, ""] | float


def random(keys: RowKeys, seen: Observation, memory: Memory) -> Step:
    """An even share, anywhere."""
    return best(uniform(keys, seen.length), _even_share(seen), seen), memory


def ancestral(keys: RowKeys, seen: Observation, memory: Memory) -> Step:
    """Each mask with probability (α_s − α_t)/(1 − α_t) = (t − s)/t (MDLM, MD4): the reverse process on a time grid."""
    probability = jnp.where(seen.next_time > 0, 1 - seen.next_time / seen.time, 1.0)
    return Choice(seen.candidates & (uniform(keys, seen.length) < probability[:, None])), memory


def first_hitting(keys: RowKeys, seen: Observation, memory: Memory) -> Step:
    """One mask, anywhere: the reverse process at the times of its jumps (arXiv 2409.02908), without a time input."""
    return best(uniform(keys, seen.length), 1, seen), memory


def confidence(keys: RowKeys, seen: Observation, memory: Memory) -> Step:
    """An even share, the most confident first (LLaDA, arXiv 2502.09992)."""
    return best(seen.confidence, _even_share(seen), seen), memory


def margin(keys: RowKeys, seen: Observation, memory: Memory) -> Step:
    """An even share, the largest difference of the two best probabilities first (arXiv 2502.06768)."""
    return best(seen.margin, _even_share(seen), seen), memory


def entropy(keys: RowKeys, seen: Observation, memory: Memory) -> Step:
    """An even share, the smallest entropy first (Dream, arXiv 2508.15487)."""
    return best(-seen.entropy, _even_share(seen), seen), memory


def position(keys: RowKeys, seen: Observation, memory: Memory, *, position_penalty: Number) -> Step:
    """An even share by confidence · exp(−penalty · place): against the pull of a far end that is surely EOS."""
    place = jnp.cumsum(seen.is_asked, axis=-1) - 1
    return best(seen.confidence * jnp.exp(-position_penalty * place), _even_share(seen), seen), memory


def entropy_bound(keys: RowKeys, seen: Observation, memory: Memory, *, entropy_bound: Number) -> Step:
    """In order of entropy the largest set with Σ H − max H ≤ γ (EB-sampler, arXiv 2505.24857); at least one."""
    order, rank = _sorted(-seen.entropy, seen.candidates)
    ordered = jnp.where(seen.candidates, seen.entropy, 0.0)
    ordered = jnp.take_along_axis(ordered, order, axis=-1)
    before = jnp.cumsum(ordered, axis=-1) - ordered  # of a sorted set the largest is the last
    count = jnp.sum((before <= entropy_bound) & _is_candidate(seen, order), axis=-1)
    return Choice(seen.candidates & (rank < jnp.maximum(count, 1)[:, None])), memory


def threshold(keys: RowKeys, seen: Observation, memory: Memory, *, threshold: Number) -> Step:
    """Every mask of at least this confidence, and always the best one (Fast-dLLM, arXiv 2505.22618)."""
    return _or(Choice(seen.candidates & (seen.confidence >= threshold)), seen.confidence, seen), memory


def leftmost(keys: RowKeys, seen: Observation, memory: Memory, *, threshold: Number) -> Step:
    """Every mask of at least this confidence; where there is none, the first (Fork-dLLM)."""
    return _or(
        Choice(seen.candidates & (seen.confidence >= threshold)), -_places(seen).astype(jnp.float32), seen
    ), memory


def factor(keys: RowKeys, seen: Observation, memory: Memory, *, factor: Number) -> Step:
    """The n most confident, n the largest with (n + 1)(1 − c_n) < f (Fast-dLLM, arXiv 2505.22618); at least one."""
    order, rank = _sorted(seen.confidence, seen.candidates)
    ordered = jnp.take_along_axis(seen.confidence, order, axis=-1)
    number = jnp.arange(1, ordered.shape[-1] + 1)
    holds = ((number + 1) * (1 - ordered) < factor) & _is_candidate(seen, order)
    count = jnp.max(jnp.where(holds, number, 1), axis=-1)
    return Choice(seen.candidates & (rank < count[:, None])), memory


def given(keys: RowKeys, seen: Observation, memory: Memory) -> Step:
    """An even share in the order that the memory gives: the rank of every position. None: from left to right."""
    rank = _places(seen) if memory is None else memory
    return best(-rank.astype(jnp.float32), _even_share(seen), seen), memory


def remdm_cap(keys: RowKeys, seen: Observation, memory: Memory, *, remask: Number) -> Step:
    """ReMDM (arXiv 2503.00307) with σ = min(η, σ_max): revealed tokens are masked again with probability σ."""
    return _remasking(keys, seen, jnp.minimum(remask, _most_remasked(seen))[:, None]), memory


def remdm_rescale(keys: RowKeys, seen: Observation, memory: Memory, *, remask: Number) -> Step:
    """ReMDM with σ = η · σ_max."""
    return _remasking(keys, seen, remask * _most_remasked(seen)[:, None]), memory


def remdm_confidence(keys: RowKeys, seen: Observation, memory: Memory) -> Step:
    """ReMDM with σ = σ_max · softmax(−confidence at commit) over the revealed positions."""
    revealed = _revealed(seen)
    weight = jax.nn.softmax(jnp.where(revealed, -seen.commit_confidence, -jnp.inf), axis=-1, where=revealed)
    return _remasking(keys, seen, weight * _most_remasked(seen)[:, None]), memory


def remdm_loop(
    keys: RowKeys,
    seen: Observation,
    memory: Memory,
    *,
    remask: Number,
    loop_from: Number,
    loop_until: Number,
    loop_kept: Number,
) -> Step:
    """ReMDM's loop: reveal until the share `loop_kept` is known, hold that with σ = η while time runs from `loop_from`
    to `loop_until`, then reveal the rest. Larger η than (1 − kept)/kept cannot hold it, and counts as that.
    """
    remask = jnp.minimum(remask, (1 - loop_kept) / loop_kept)
    t = 1 - seen.step / seen.num_steps
    s = 1 - (seen.step + 1) / seen.num_steps

    def masked(time):
        before = 1 - (1 - time) * loop_kept / (1 - loop_from)
        return jnp.where(time > loop_from, before, jnp.minimum(time / loop_until, 1.0) * (1 - loop_kept))

    is_last = seen.step + 1 >= seen.num_steps
    loops = (t <= loop_from) & (t > loop_until) & ~is_last
    reveals = jnp.where(is_last, 1.0, 1 - masked(s) / masked(t))
    reveals = jnp.where(loops, remask * loop_kept / (1 - loop_kept), reveals)
    return _remask_and_reveal(keys, seen, jnp.where(loops, remask, 0.0)[:, None], reveals[:, None]), memory


STRATEGIES: dict[str, Callable[..., Step]] = {
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


def with_progress(strategy: Strategy) -> Strategy:
    """Reveals the most confident position of every row in which the strategy would reveal none."""

    def wrapped(keys: RowKeys, seen: Observation, memory: Memory) -> Step:
        choice, memory = strategy(keys, seen, memory)
        return _or(choice, seen.confidence, seen), memory

    return wrapped


def _or(choice: Choice, score: Float[Array, "batch seq"], seen: Observation) -> Choice:
    """The choice; where it reveals nothing, the candidate of the highest score."""
    is_stuck = ~(choice.reveal & seen.candidates).any(axis=-1, keepdims=True)
    return Choice(jnp.where(is_stuck, best(score, 1, seen).reveal, choice.reveal), choice.remask, choice.goes_on)


def uniform(keys: RowKeys, length: int) -> Float[Array, "batch seq"]:
    """A number in [0, 1) per position, the same whatever the length of the row."""
    fold = jax.vmap(lambda key, place: jax.random.uniform(jax.random.fold_in(key, place)), (None, 0))
    return jax.vmap(fold, (0, None))(keys, jnp.arange(length))


def _places(seen: Observation) -> Int[Array, "batch seq"]:
    return jnp.broadcast_to(jnp.arange(seen.is_masked.shape[-1]), seen.is_masked.shape)


def _even_share(seen: Observation) -> Int[Array, " batch"]:
    left = seen.candidates.sum(axis=-1)
    share = jnp.where(seen.next_time > 0, seen.next_time / jnp.where(seen.time > 0, seen.time, 1.0), 0.0)
    return jnp.maximum(left - jnp.floor(left * share + 1e-4).astype(left.dtype), 1)  # + rounding


def _sorted(
    score: Float[Array, "batch seq"], candidates: Bool[Array, "batch seq"]
) -> tuple[Int[Array, "batch seq"], Int[Array, "batch seq"]]:
    """Positions from the candidate of the highest score to the lowest, the others last; and the rank of each."""
    # What is not a number, or −∞, comes last of the candidates but before all else, so that something is revealed.
    lowest = jnp.finfo(score.dtype).min
    score = jnp.maximum(jnp.where(jnp.isnan(score), lowest, score), lowest)
    order = jnp.argsort(-jnp.where(candidates, score, -jnp.inf), axis=-1, stable=True)
    return order, jnp.argsort(order, axis=-1)


def _is_candidate(seen: Observation, order: Int[Array, "batch seq"]) -> Bool[Array, "batch seq"]:
    return jnp.take_along_axis(seen.candidates, order, axis=-1)


def best(score: Float[Array, "batch seq"], count: Int[Array, " batch"] | int, seen: Observation) -> Choice:
    """The `count` candidates of the highest scores of each row."""
    rank = _sorted(score, seen.candidates)[1]
    return Choice(seen.candidates & (rank < jnp.broadcast_to(jnp.asarray(count), score.shape[:1])[:, None]))


def _revealed(seen: Observation) -> Bool[Array, "batch seq"]:
    """What may be masked again."""
    return seen.is_asked & ~seen.is_masked & seen.in_block


def _most_remasked(seen: Observation) -> Float[Array, " batch"]:
    """σ_max = min(1, (1 − α_s)/α_t), with α = 1 − time."""
    return jnp.where(
        seen.time < 1, jnp.minimum(1.0, seen.next_time / jnp.where(seen.time < 1, 1 - seen.time, 1.0)), 1.0
    )


def _remasking(keys: RowKeys, seen: Observation, sigma: Float[Array, "batch #seq"]) -> Choice:
    """Masks are revealed with probability (α_s − (1 − σ)α_t)/(1 − α_t), where σ is theirs."""
    t, s = seen.time[:, None], seen.next_time[:, None]
    reveals = jnp.where(s > 0, (1 - s - (1 - sigma) * (1 - t)) / t, 1.0)
    return _remask_and_reveal(keys, seen, sigma, reveals)


def _remask_and_reveal(keys: RowKeys, seen: Observation, sigma, reveals) -> Choice:
    number = uniform(keys, seen.length)
    goes_on = (seen.step + 1 < seen.num_steps) & seen.in_block.any(axis=-1)
    return Choice(seen.candidates & (number < reveals), _revealed(seen) & (number < sigma), goes_on)
