"""Which dataset each step trains on, as a pure function of the step.

Weights are shares of the *tokens*. Datasets differ in the tokens T_d that one of their batches holds, so a step
comes from dataset d with probability p_d ∝ w_d / T_d. The draw is a low-discrepancy sequence,

    u_s = (u_0 + s·φ) mod 1,   φ = (√5 − 1)/2,

each u_s uniform over u_0: shares are exact in expectation, and within a few steps of it over any run of steps. Weights
may move, linearly over a span of tokens, to final ones; tokens at a step are counted by their expectation.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int


@dataclass(frozen=True)
class Span:
    """Weights that move from `first` to `last` while tokens go from `start` to `stop`."""

    first: Float[np.ndarray, " datasets"]
    last: Float[np.ndarray, " datasets"]
    start: float
    """Infinity where they never move."""
    stop: float

    def at(self, tokens: float) -> Float[np.ndarray, " datasets"]:
        """Shares of the tokens, which sum to 1."""
        first, last = self.first / self.first.sum(), self.last / self.last.sum()
        if tokens <= self.start:
            return first
        progress = min(1.0, (tokens - self.start) / max(self.stop - self.start, 1))
        return first * (1 - progress) + last * progress


_Planned = tuple[Float[np.ndarray, " steps"], Int[np.ndarray, " steps"]]


class Mixture:
    """The dataset of every step."""

    def __init__(self, weights: Span, batch_tokens: Float[np.ndarray, " datasets"], seed: list[int]):
        """`batch_tokens` are T_d."""
        self.weights, self.batch_tokens = weights, batch_tokens
        self._offset = np.random.default_rng(seed).random()
        self._choices = np.zeros(0, np.int64)
        self._visits = np.zeros((1, len(batch_tokens)), np.int64)
        self._tokens = np.zeros(1)

    def choice(self, step: int) -> tuple[int, int]:
        """Dataset of a step, and how many steps before it were of the same dataset."""
        self._extend(step + 1)
        number = int(self._choices[step])
        return number, int(self._visits[step, number])

    def choices(self, steps: int) -> Int[np.ndarray, " steps"]:
        """The datasets of the first steps."""
        self._extend(steps)
        return self._choices[:steps]

    def visits(self, steps: int) -> Int[np.ndarray, " datasets"]:
        """How many of the first steps were of each dataset."""
        self._extend(steps)
        return self._visits[steps]

    def num_steps(self, tokens: int) -> int:
        """Steps that come nearest to so many tokens, at least one."""
        while self._tokens[-1] < tokens:
            self._extend(len(self._tokens))
        after = int(np.searchsorted(self._tokens, tokens))
        if after > 1 and tokens - self._tokens[after - 1] < self._tokens[after] - tokens:
            after -= 1
        return max(1, after)

    def _extend(self, steps: int) -> None:
        """Plans at least so many steps; doubles what is planned, so that asking step by step stays cheap."""
        known = len(self._choices)
        if steps <= known:
            return
        total = max(steps, 2 * known, 64)
        draws = (self._offset + np.arange(known, total) * (5**0.5 - 1) / 2) % 1
        plan = self._with_moving_weights if self.weights.start < np.inf else self._with_fixed_weights
        tokens, choices = plan(draws)
        visits = self._visits[-1] + np.cumsum(choices[:, None] == np.arange(len(self.batch_tokens)), axis=0)
        self._tokens = np.concatenate([self._tokens, tokens])
        self._choices = np.concatenate([self._choices, choices])
        self._visits = np.concatenate([self._visits, visits])

    def _with_fixed_weights(self, draws: Float[np.ndarray, " steps"]) -> _Planned:
        """Tokens after each of the next steps, and their datasets, where weights never move."""
        rates = self.weights.first / self.weights.first.sum() / self.batch_tokens
        bounds = np.cumsum(rates / rates.sum())[:-1]
        tokens = np.full(len(draws), 1 / rates.sum())
        tokens[0] += self._tokens[-1]
        return np.cumsum(tokens), np.searchsorted(bounds, draws, side="right")

    def _with_moving_weights(self, draws: Float[np.ndarray, " steps"]) -> _Planned:
        """The same where they move."""
        tokens, choices, now = np.empty(len(draws)), np.empty(len(draws), np.int64), self._tokens[-1]
        for index, draw in enumerate(draws):
            if index == 0 or self.weights.start <= now:
                rates = self.weights.at(now) / self.batch_tokens
                bounds = np.cumsum(rates / rates.sum())[:-1]
            now += 1 / rates.sum()
            tokens[index], choices[index] = now, np.searchsorted(bounds, draw, side="right")
        return tokens, choices
