"""Which dataset each step trains on, as a pure function of the step.

Weights are shares of the *tokens*. Datasets differ in the tokens T_d that one of their batches holds, so a step
comes from dataset d with probability p_d ∝ w_d / T_d. The draw is a low-discrepancy sequence,

    u_s = (u_0 + s·φ) mod 1,   φ = (√5 − 1)/2  (the additive recurrence of the golden ratio),

in which u_0 is uniform in [0, 1), so each u_s is: shares are exact in expectation, and within a few steps of it over
any run of steps. Weights may move linearly to final ones over a range of training tokens; the tokens before a step are
counted by their expectation.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int


@dataclass(frozen=True)
class WeightSchedule:
    """Weights of the datasets, which move linearly from `initial` to `final` between two numbers of training tokens."""

    initial: Float[np.ndarray, " datasets"]
    final: Float[np.ndarray, " datasets"]
    start: float
    """Number of tokens at which the weights begin to move; infinity if they are constant."""
    stop: float
    """Number of tokens at which the weights reach `final`."""

    def at(self, tokens: float) -> Float[np.ndarray, " datasets"]:
        """Share of the tokens of each dataset after `tokens` training tokens; shares sum to 1."""
        initial, final = self.initial / self.initial.sum(), self.final / self.final.sum()
        if tokens <= self.start:
            return initial
        progress = min(1.0, (tokens - self.start) / max(self.stop - self.start, 1))
        return initial * (1 - progress) + final * progress


_PlannedSteps = tuple[Float[np.ndarray, " steps"], Int[np.ndarray, " steps"]]
"""Number of training tokens after each step, and the step's dataset."""


class Mixture:
    """Dataset of every step, planned as far as it was needed."""

    def __init__(self, weights: WeightSchedule, batch_tokens: Float[np.ndarray, " datasets"], seed: list[int]):
        """`batch_tokens` is T_d, the mean number of tokens of a batch of each dataset; `seed` draws u_0."""
        self.weights, self.batch_tokens = weights, batch_tokens
        self._offset = np.random.default_rng(seed).random()
        self._choices = np.zeros(0, np.int64)
        self._visits = np.zeros((1, len(batch_tokens)), np.int64)
        self._tokens = np.zeros(1)

    def choice(self, step: int) -> tuple[int, int]:
        """Number of a step's dataset, and the number of earlier steps of the same dataset."""
        self._extend(step + 1)
        number = int(self._choices[step])
        return number, int(self._visits[step, number])

    def choices(self, steps: int) -> Int[np.ndarray, " steps"]:
        """Dataset numbers of the first `steps` steps."""
        self._extend(steps)
        return self._choices[:steps]

    def visits(self, steps: int) -> Int[np.ndarray, " datasets"]:
        """Number of steps of each dataset among the first `steps`."""
        self._extend(steps)
        return self._visits[steps]

    def num_steps(self, tokens: int) -> int:
        """Number of steps, at least 1, whose expected tokens come nearest to `tokens`."""
        while self._tokens[-1] < tokens:
            self._extend(len(self._tokens))
        after = int(np.searchsorted(self._tokens, tokens))
        if after > 1 and tokens - self._tokens[after - 1] < self._tokens[after] - tokens:
            after -= 1
        return max(1, after)

    def _extend(self, steps: int) -> None:
        """Plans at least `steps` steps, and twice as many as before, so that extending step by step stays cheap."""
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

    def _with_fixed_weights(self, draws: Float[np.ndarray, " steps"]) -> _PlannedSteps:
        """Plan of the next steps if the weights are constant; `draws` are their u_s."""
        rates = self.weights.initial / self.weights.initial.sum() / self.batch_tokens
        bounds = np.cumsum(rates / rates.sum())[:-1]
        tokens = np.full(len(draws), 1 / rates.sum())
        tokens[0] += self._tokens[-1]
        return np.cumsum(tokens), np.searchsorted(bounds, draws, side="right")

    def _with_moving_weights(self, draws: Float[np.ndarray, " steps"]) -> _PlannedSteps:
        """Plan of the next steps if the weights move; `draws` are their u_s."""
        tokens, choices, now = np.empty(len(draws)), np.empty(len(draws), np.int64), self._tokens[-1]
        for index, draw in enumerate(draws):
            if index == 0 or self.weights.start <= now:
                rates = self.weights.at(now) / self.batch_tokens
                bounds = np.cumsum(rates / rates.sum())[:-1]
            now += 1 / rates.sum()
            tokens[index], choices[index] = now, np.searchsorted(bounds, draw, side="right")
        return tokens, choices
