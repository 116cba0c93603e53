"""Unmasking as a Gymnasium environment: agents say which proposals are revealed, and are paid for right answers.

    reset        = initial_state, enter_blocks, observe
    step(action) = reveal, then enter_blocks and observe where masks are left, the reward where none are

These are the sampler's own (`diffusion.sampling.loop`), with the sampler's keys: an environment that a strategy drives
is the sampler with that strategy, token for token and evaluation for evaluation. Agents number what is asked for in
the order of the row: index i of an action or observation is the i-th asked position, wherever that is in a row.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces
from gymnasium.utils import seeding
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space
from jaxtyping import Bool

from trimask.diffusion.denoiser import Denoiser
from trimask.diffusion.sampling.state import Observation, State
from trimask.sampling_rl.episode_batch import Episodes, Shown, UnmaskingConfig
from trimask.sampling_rl.problems import ProblemSet
from trimask.sampling_rl.reward import Reward, RewardConfig

_CONFIG, _REWARD = UnmaskingConfig(), RewardConfig()


class _OfSampler:
    """What the sampler has of the episodes under way."""

    episodes: Episodes

    @property
    def state(self) -> State:
        """The sampler's state, a row per environment."""
        return self.episodes.state

    @property
    def seen(self) -> Observation:
        """All that a strategy sees of it."""
        return self.episodes.seen


class UnmaskingEnv(_OfSampler, gymnasium.Env[Shown, np.ndarray]):
    """A frozen masked diffusion model, and an agent that decides what to reveal when.

    ## Description

    A problem is a row of tokens of which some, at most L, are masked: a text to write, a picture's or a sound's codes.
    In every step the model looks at the row once and proposes a token wherever the current block is masked. The agent
    chooses which of the proposals become part of the row; they stay. Many at once is quick. But tokens proposed
    together do not know of each other, so waiting makes answers better: what to reveal when is the agent's art. Blocks
    are filled from left to right, and a block takes as many steps as it has tokens at most.

    ## Action Space

    `MultiBinary(L)`. Bit i reveals the proposal for the i-th token asked for. Bits of tokens that are not masked, not
    in the current block or not there (a problem may ask for less than L) have no effect. Revealing nothing is allowed,
    and costs as much as any other step.

    ## Observation Space

    `Dict`, of the tokens asked for; all zero where a problem asks for less than L.

    | Key          | Space                       | Meaning                                                            |
    |--------------|-----------------------------|--------------------------------------------------------------------|
    | `confidence` | `Box(0, 1, (L, K), float32)`| the model's K largest probabilities, in falling order; 0 where     |
    |              |                             | nothing is masked or outside the block                             |
    | `is_masked`  | `MultiBinary(L)`            | whether the token is still to be revealed                          |
    | `in_block`   | `MultiBinary(L)`            | whether the token is of the block that is being filled             |
    | `progress`   | `Box(0, 1, (1,), float32)`  | steps taken / tokens asked for, 1 at most                          |

    At the end of an episode no evaluation is made: everything but `progress` is 0.

    ## Starting State

    One of the problems, each as likely as any other, with everything that it asks for masked.

    ## Reward

    0 until the end of the episode; then `reward(right, nfe, length)`: how right the answer is by the problems' own
    judge, what is still masked included, the evaluations it took, and the tokens it was asked for. By default
    right · (n − min(NFE, n) + 1)/n for n tokens.

    ## Episode End

    - Termination: everything was revealed.
    - Truncation: nothing is left to do, but some block ran out of steps and its masks were given up. The answer is
      judged as it is.

    ## Information

    `problem`: its number. `nfe`: function evaluations so far, 2 a step with guidance. `tokens`: the L codes asked for,
    −1 where one is masked or not there. At the end also `right`, in [0, 1].

    ## Arguments

    - `problems`: what is asked, and who judges (`ProblemSet`).
    - `denoise`: the model, or any transform of one (`Denoiser`); restricted to the ids that a position may take.
    - `config`: blocks, K, temperature, guidance (`UnmaskingConfig`).
    - `reward`: rightness, evaluations and tokens asked for → reward (`RewardConfig`, or any such function).
    - `render_mode`: "ansi" renders the codes of the row, masks as `_`.

    `reset` takes `options={"problem": number}`. A seed fixes the problem, and with it or with a chosen one everything
    that is drawn thereafter. `unwrapped.state`, `unwrapped.seen` and `unwrapped.rules` are the sampler's: what a
    strategy needs.

    ## References

    *Learning Unmasking Policies for Diffusion Language Models* (arXiv 2512.09106).

    Deviation: a text is over at its first EOS, unless `stop_at_eos` is False.
    """

    metadata = {"render_modes": ["ansi"], "render_fps": 4}  # noqa: RUF012

    def __init__(
        self,
        problems: ProblemSet,
        denoise: Denoiser,
        *,
        config: UnmaskingConfig = _CONFIG,
        reward: Reward = _REWARD,
        render_mode: str | None = None,
    ):
        self.episodes = Episodes(problems, denoise, config, reward, 1)
        self.observation_space, self.action_space = _spaces(problems, config)
        self.rules, self.render_mode = self.episodes.rules, render_mode

    def reset(
        self, *, seed: int | None = None, options: Mapping[str, Any] | None = None
    ) -> tuple[Shown, dict[str, Any]]:
        """Begins an episode."""
        super().reset(seed=seed)
        (chosen,) = _chosen(self.episodes.problems, options, 1)
        self.episodes.begin({0: self.episodes.drawn(self.np_random, chosen)})
        return self._observed(), self.episodes.info(0)

    def step(self, action: Any) -> tuple[Shown, float, bool, bool, dict[str, Any]]:
        """Reveals where bits are set."""
        (reward,), (terminated,), (truncated,) = self.episodes.reveal(_bits(action, (self.episodes.length,))[None])
        if terminated or truncated:
            observation = self.episodes.last_observation(0)
            self.episodes.end()
        else:
            observation = self._observed()
        return observation, float(reward), bool(terminated), bool(truncated), self.episodes.info(0)

    def _observed(self) -> Shown:
        return {key: rows[0] for key, rows in self.episodes.observe().items()}

    def render(self) -> str | None:  # type: ignore[override]
        """The codes of the row, a line per medium."""
        if self.render_mode is None:
            return None
        segments = self.episodes.answer(0).segments
        return "\n".join(
            f"{segment.modality}: " + " ".join("_" if code < 0 else str(code) for code in segment.codes.reshape(-1))
            for segment in segments
        )


class UnmaskingVectorEnv(_OfSampler, VectorEnv[Shown, np.ndarray, np.ndarray]):
    """Many `UnmaskingEnv`s whose rows are one batch.

    ## Description, Action Space, Observation Space, Starting State, Reward

    Those of `UnmaskingEnv`, for each sub-environment. Rows do not depend on their neighbours: sub-environment i of a
    batch that is reset with seed s is the single environment with seed s + i, episode for episode.

    ## Episode End

    A row whose episode ends begins its next one in the same step (`AutoresetMode.SAME_STEP`), before the one evaluation
    of the batch, so none is spent on what is finished.

    ## Information

    As in Gymnasium's own vector environments: arrays over the sub-environments, each with a mask `_key`, and
    `final_obs` and `final_info` of the episodes that have just ended.

    ## Arguments

    Those of `UnmaskingEnv` but `render_mode`, and `num_envs`. `reset` takes a seed or a list of them, and
    `options={"problem": …}` a number, or one for each sub-environment.

    ## References

    Those of `UnmaskingEnv`.
    """

    metadata = {"autoreset_mode": AutoresetMode.SAME_STEP, "render_modes": []}  # noqa: RUF012

    def __init__(
        self,
        problems: ProblemSet,
        denoise: Denoiser,
        *,
        num_envs: int = 1,
        config: UnmaskingConfig = _CONFIG,
        reward: Reward = _REWARD,
    ):
        self.episodes = Episodes(problems, denoise, config, reward, num_envs)
        self.num_envs, self.rules = num_envs, self.episodes.rules
        self.single_observation_space, self.single_action_space = _spaces(problems, config)
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self._generators: list[Any] = [None] * num_envs

    def reset(
        self, *, seed: int | list[int | None] | None = None, options: Mapping[str, Any] | None = None
    ) -> tuple[Shown, dict[str, Any]]:
        """Begins an episode in every row."""
        chosen = _chosen(self.episodes.problems, options, self.num_envs)
        self._seed([seed + row for row in range(self.num_envs)] if isinstance(seed, int) else seed)
        self._begin(range(self.num_envs), chosen)
        return self._observed({})

    def step(self, actions: Any) -> tuple[Shown, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        """Reveals where bits are set."""
        rewards, terminated, truncated = self.episodes.reveal(_bits(actions, (self.num_envs, self.episodes.length)))
        infos: dict[str, Any] = {}
        ended = np.flatnonzero(terminated | truncated).tolist()
        for row in ended:
            last = {"final_obs": self.episodes.last_observation(row), "final_info": self.episodes.info(row)}
            infos = self._add_info(infos, last, row)
        self._begin(ended, [None] * self.num_envs)
        observations, infos = self._observed(infos)
        return observations, rewards, terminated, truncated, infos

    def _begin(self, rows: Iterable[int], chosen: list[int | None]) -> None:
        self.episodes.begin({row: self.episodes.drawn(self._generators[row], chosen[row]) for row in rows})

    def _observed(self, infos: dict[str, Any]) -> tuple[Shown, dict[str, Any]]:
        observations = self.episodes.observe()
        for row in range(self.num_envs):
            infos = self._add_info(infos, self.episodes.info(row), row)
        return observations, infos

    def _seed(self, seeds: list[int | None] | None) -> None:
        """A generator for each row; None keeps the one that is there."""
        seeds = seeds or [None] * self.num_envs
        if len(seeds) != self.num_envs:
            raise ValueError(f"there are {self.num_envs} sub-environments, and {len(seeds)} seeds")
        for row, seed in enumerate(seeds):
            if seed is not None or self._generators[row] is None:
                self._generators[row] = seeding.np_random(seed)[0]


def _spaces(problems: ProblemSet, config: UnmaskingConfig) -> tuple[spaces.Space[Any], spaces.Space[np.ndarray]]:
    """What one agent sees, and what it does."""
    length = problems.length
    observation = {
        "confidence": spaces.Box(0.0, 1.0, (length, config.num_top), np.float32),
        "is_masked": spaces.MultiBinary(length),
        "in_block": spaces.MultiBinary(length),
        "progress": spaces.Box(0.0, 1.0, (1,), np.float32),
    }
    return spaces.Dict(observation), spaces.MultiBinary(length)


def _bits(action: Any, shape: tuple[int, ...]) -> Bool[np.ndarray, "*shape"]:
    """The action, if it is one."""
    bits = np.asarray(action)
    if bits.shape != shape:
        raise ValueError(f"an action is an array {shape} of 0 and 1, got one of shape {bits.shape}")
    if not np.isin(bits, (0, 1)).all():
        raise ValueError(f"an action is an array {shape} of 0 and 1, got one with {bits[~np.isin(bits, (0, 1))][0]!r}")
    return bits.astype(bool)


def _chosen(problems: ProblemSet, options: Mapping[str, Any] | None, num_rows: int) -> list[int | None]:
    """The problem of every row, where the options say it."""
    if not options:
        return [None] * num_rows
    if set(options) != {"problem"}:
        raise ValueError(f"reset takes the option problem, got {', '.join(map(str, options))}")
    numbers = np.asarray(options["problem"])
    if numbers.shape not in ((), (num_rows,)) or numbers.dtype.kind not in "iu":
        raise ValueError(f"problem is a number, or one for each of {num_rows} rows, got {options['problem']!r}")
    if numbers.min() < 0 or numbers.max() >= len(problems.problems):
        raise ValueError(f"problem must lie in [0, {len(problems.problems)}), got {options['problem']!r}")
    return np.broadcast_to(numbers, num_rows).tolist()
