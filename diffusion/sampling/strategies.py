"""Which masked positions to reveal next.

A strategy is a function (keys, observation, memory) -> (Choice, memory), vectorised over rows, with one key per row.
Ties break to the lowest position. `with_progress` wraps any of them so that each step reveals something.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from trimask.diffusion.sampling.loop import Choice, Observation, RowKeys, Strategy


def random_order(keys: RowKeys, observation: Observation, memory: Any) -> tuple[Choice, Any]:
    """Reveals an even share of the masks per step, anywhere."""
    score = jax.vmap(lambda key: jax.random.uniform(key, observation.is_masked.shape[1:]))(keys)
    return _reveal_best(score, _even_share(observation), observation), memory


def top_k_confidence(keys: RowKeys, observation: Observation, memory: Any) -> tuple[Choice, Any]:
    """Reveals an even share of the masks per step, the most confident first (LLaDA, arXiv 2502.09992)."""
    return _reveal_best(observation.confidence, _even_share(observation), observation), memory


def threshold(minimum: float) -> Strategy:
    """Reveals every position of at least this confidence, and always the best one (Fast-dLLM, arXiv 2505.22618)."""

    def strategy(keys: RowKeys, observation: Observation, memory: Any) -> tuple[Choice, Any]:
        confident = _candidates(observation) & (observation.confidence >= minimum)
        return Choice(confident, jnp.zeros_like(confident)), memory

    return with_progress(strategy)


def with_progress(strategy: Strategy) -> Strategy:
    """Reveals the most confident position of every row in which the strategy would reveal none."""

    def wrapped(keys: RowKeys, observation: Observation, memory: Any) -> tuple[Choice, Any]:
        choice, memory = strategy(keys, observation, memory)
        is_stuck = ~(choice.reveal & observation.is_masked).any(axis=-1)
        best = _reveal_best(observation.confidence, jnp.ones_like(observation.step), observation)
        return Choice(jnp.where(is_stuck[:, None], best.reveal, choice.reveal), choice.remask), memory

    return wrapped


STRATEGIES: dict[str, Callable[[float], Strategy]] = {
    "random": lambda _: random_order,
    "confidence": lambda _: top_k_confidence,
    "threshold": threshold,
}
"""Name → threshold → strategy; those that need no threshold ignore it."""


def _candidates(observation: Observation) -> Bool[Array, "batch seq"]:
    return observation.is_masked & observation.in_block


def _even_share(observation: Observation) -> Int[Array, " batch"]:
    """⌈masks left / steps left⌉, so that all are revealed in the planned number of steps."""
    left = _candidates(observation).sum(axis=-1)
    return -(-left // jnp.maximum(observation.num_steps - observation.step, 1))


def _reveal_best(score: Float[Array, "batch seq"], count: Int[Array, "*batch"], observation: Observation) -> Choice:
    """The `count` candidates of the highest scores of each row."""
    candidates = _candidates(observation)
    order = jnp.argsort(-jnp.where(candidates, score, -jnp.inf), axis=-1, stable=True)
    rank = jnp.argsort(order, axis=-1)
    chosen = candidates & (rank < count[..., None])
    return Choice(chosen, jnp.zeros_like(chosen))
