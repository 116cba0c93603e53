"""Unmasking as a Gymnasium environment: agents choose which proposals are revealed, and are rewarded for right answers.

    reset        = initial_state, enter_blocks, observe
    step(action) = reveal, then enter_blocks and observe if masks are left, else the reward

These are the functions of `diffusion.sampling.sampler`, with the sampler's random keys: an environment that is driven
by a strategy does the same as the sampler with that strategy, token for token and evaluation for evaluation. Index i of
an action or an observation is the i-th asked position of the row, that is, the i-th one that is masked in the request.
"""

import copy
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import gymnasium
import numpy as np
from gymnasium import spaces
from gymnasium.utils import EzPickle, seeding
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space
from jaxtyping import Bool

from trimask.diffusion.denoiser import Denoiser
from trimask.diffusion.pretraining.trained_model import load
from trimask.diffusion.sampling.state import Observation, State
from trimask.sampling_rl.episode_batch import AgentObservation, EpisodeBatch, UnmaskingConfig
from trimask.sampling_rl.problem_sets import problems_of
from trimask.sampling_rl.problems import ProblemSet
from trimask.sampling_rl.reward import Reward, RewardConfig
from trimask.tokenizers.vocabulary import TEXT

_CONFIG, _REWARD = UnmaskingConfig(), RewardConfig()


class _Episodes(EzPickle):
    """Running episodes, with the sampler's view of them, which a strategy that drives the environment needs.

    Pickling keeps the arguments of the constructor alone: whoever unpickles an environment opens its run again.
    Copying in one process keeps the episodes.
    """

    episodes: EpisodeBatch

    def __getstate__(self) -> dict[str, Any]:
        arguments = super().__getstate__()
        if arguments["_ezpickle_kwargs"]["run"] is None:
            raise TypeError(
                "an environment that was given `denoise` cannot be pickled for another process; build it from the "
                'folder of a trained run: gymnasium.make("trimask/Unmasking-v0", run=FOLDER)'
            )
        return arguments

    def __deepcopy__(self, memo: dict[int, Any]) -> "_Episodes":
        other = memo[id(self)] = object.__new__(type(self))
        other.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return other

    @property
    def state(self) -> State:
        """The sampler's state, one row per environment."""
        return self.episodes.state

    @property
    def sampler_observation(self) -> Observation:
        """The observation that the sampler would pass to a strategy, one row per environment."""
        return self.episodes.sampler_observation


class UnmaskingEnv(_Episodes, gymnasium.Env[AgentObservation, np.ndarray]):
    """A frozen masked diffusion model, and an agent that decides what to reveal when.

    ## Description

    A problem is a row of tokens of which some, at most L, are masked: a text to write, a picture's or a sound's codes.
    In every step the model evaluates the row once and proposes a token at every masked position of the current block.
    The agent chooses which of the proposals become part of the row; they stay. Revealing many at once is fast, but
    tokens that are proposed together are sampled independently of each other, so revealing fewer makes better answers.
    Blocks are filled from left to right, and a block takes at most `block_length` steps (without blocks L).

    ## Action Space

    `MultiBinary(L)`. Bit i reveals the proposal for the i-th asked position. Bits of positions that are not masked or
    not in the current block, and bits beyond the last position of a problem that asks for fewer than L tokens, have no
    effect. Revealing nothing is allowed, and costs as much as any other step.

    ## Observation Space

    `Dict` over the asked positions. The first five keys are what a policy may take as input (`PolicyConfig.inputs`);
    those that `config.inputs` names are in the observation, by default `confidence` alone. They are 0 where nothing is
    masked and, unless `config.sees_beyond`, outside the block. Everything is 0 past the last asked position if a
    problem asks for fewer than L tokens.

    | Key          | Space                       | Meaning                                                            |
    |--------------|-----------------------------|--------------------------------------------------------------------|
    | `confidence` | `Box(0, 1, (L,), float32)`  | probability of the proposed token                                  |
    | `top`        | `Box(0, 1, (L, K), float32)`| the K largest probabilities, in falling order; K is `num_top`      |
    | `margin`     | `Box(0, 1, (L,), float32)`  | difference of the two largest probabilities                        |
    | `entropy`    | `Box(0, ln V, (L,),         | entropy of the model's distribution, in nats; V is the number of   |
    |              | float32)`                   | ids of the vocabulary                                              |
    | `hidden`     | `Box(-inf, inf, (L, W),     | the model's last hidden state, of width W                          |
    |              | float32)`                   |                                                                    |
    | `is_masked`  | `MultiBinary(L)`            | whether the token is still to be revealed or was given up          |
    | `in_block`   | `MultiBinary(L)`            | whether the token is in the block that is being filled             |
    | `is_asked`   | `MultiBinary(L)`            | whether there is such a position: 0 past the problem's last one    |
    | `progress`   | `Box(0, S, (1,), float32)`  | steps taken / requested tokens; S is the most steps in a block     |

    The observation at the end of an episode is made without an evaluation: all but `is_asked` and `progress` is 0.

    ## Starting State

    A problem drawn uniformly at random, with all tokens that it asks for masked.

    ## Reward

    0 until the end of the episode; then `reward(right, nfe, length)`: the grade of the answer in [0, 1] (positions that
    were given up included), the number of function evaluations, and the number of requested tokens. By default
    right · (n − min(NFE, n) + 1)/n for n tokens.

    ## Episode End

    Termination: every block is finished. A block is finished when all of it is revealed, or when it has taken
    `block_length` steps (without blocks L); masks that are left then are given up, and the answer is graded as it is.
    The limit of steps belongs to the problem that the agent solves, and `progress` is observed, so there is no value to
    bootstrap from. The environment itself never truncates an episode.

    ## Information

    `problem`: index of the problem. `nfe`: number of function evaluations so far, two per step with guidance.
    `gave_up`: number of positions given up so far. `tokens`: the L requested codes, −1 where a token is masked or given
    up, and past the last one. At the end also `right`, the grade of the answer in [0, 1].

    ## Arguments

    - `problems`: the problems and the function that grades answers (`ProblemSet`).
    - `denoise`: the model, or any transform of one (`Denoiser`); its logits are restricted to the ids that a position
      may take.
    - `run`: folder of a trained run, in place of `problems` and `denoise`. The problems are then questions of prepared
      data, named as for `trimask train-policy`: `task` (default text), `dataset` (None: the only one that has the
      task), `split` (default train), `max_problems` (None: all), `judge` (None: the task's default), `data` (folder of
      the data; None: that on which the run was trained) and `checkpoint` (step of the model or "best"; None: newest).
    - `config`: blocks, temperature, guidance, and what is observed (`UnmaskingConfig`). `UnmaskingConfig.of_policy`
      makes the one for observations that hold the inputs of a policy.
    - `reward`: function of grade, evaluations and number of requested tokens (`RewardConfig`, or any such function).
    - `render_mode`: "ansi" renders the codes of the row, with masks as `_`.

    An environment of a run is pickled by these arguments, so that `gymnasium.vector.AsyncVectorEnv` can build it in
    other processes (context "spawn"). An environment with `denoise` raises TypeError when it is pickled.

    `reset` takes `options={"problem": index}` to choose the problem. A seed determines the problem, unless it is
    chosen, and all randomness of the following episodes. `unwrapped.state`, `unwrapped.sampler_observation` and
    `unwrapped.rules` are those of the sampler, for strategies that drive the environment.

    ## References

    *Learning Unmasking Policies for Diffusion Language Models* (arXiv 2512.09106).

    Deviations
    1. A text ends at its first EOS, unless `stop_at_eos` is False.
    2. An episode in which masks were given up is terminated; the paper speaks of a truncated text.
    """

    metadata = {"render_modes": ["ansi"], "render_fps": 4}  # noqa: RUF012

    def __init__(
        self,
        problems: ProblemSet | None = None,
        denoise: Denoiser | None = None,
        *,
        run: str | Path | None = None,
        config: UnmaskingConfig = _CONFIG,
        reward: Reward = _REWARD,
        render_mode: str | None = None,
        **of_run: Any,
    ):
        options = {"config": config, "reward": reward, "render_mode": render_mode}
        EzPickle.__init__(self, problems, denoise, run=run, **options, **of_run)
        self.episodes = EpisodeBatch(*_problems_and_model(problems, denoise, run, config, **of_run), config, reward, 1)
        self.observation_space, self.action_space = _spaces(self.episodes)
        self.rules, self.render_mode = self.episodes.rules, render_mode

    def reset(
        self, *, seed: int | None = None, options: Mapping[str, Any] | None = None
    ) -> tuple[AgentObservation, dict[str, Any]]:
        """Begins an episode, with the problem of `options={"problem": index}` or a random one."""
        super().reset(seed=seed)
        (chosen,) = _chosen_problems(self.episodes.problems, options, 1)
        self.episodes.begin({0: self.episodes.draw_episode(self.np_random, chosen)})
        return self._observe(), self.episodes.info(0)

    def step(self, action: Any) -> tuple[AgentObservation, float, bool, bool, dict[str, Any]]:
        """Reveals the proposals whose bit is set. Raises ValueError if the action is not L values 0 or 1."""
        (reward,), (is_done,) = self.episodes.reveal(_bits(action, (self.episodes.length,))[None])
        if is_done:
            observation = self.episodes.last_observation(0)
            self.episodes.end()
        else:
            observation = self._observe()
        return observation, float(reward), bool(is_done), False, self.episodes.info(0)

    def _observe(self) -> AgentObservation:
        return {key: rows[0] for key, rows in self.episodes.observe().items()}

    def render(self) -> str | None:  # type: ignore[override]
        """Codes of the row, one line per medium; None without a render mode."""
        if self.render_mode is None:
            return None
        segments = self.episodes.answer(0).segments
        return "\n".join(
            f"{segment.modality}: " + " ".join("_" if code < 0 else str(code) for code in segment.codes.reshape(-1))
            for segment in segments
        )


class UnmaskingVectorEnv(_Episodes, VectorEnv[AgentObservation, np.ndarray, np.ndarray]):
    """A vector environment of `UnmaskingEnv`s whose rows are evaluated as one batch.

    ## Description, Action Space, Observation Space, Starting State, Reward

    As for `UnmaskingEnv`, for each sub-environment. Rows do not depend on their neighbours: sub-environment i of a
    vector environment that is reset with seed s equals the single environment with seed s + i, episode for episode.

    ## Episode End

    A row whose episode ends begins its next one in the same step (`AutoresetMode.SAME_STEP`), before the evaluation of
    the batch, so that no evaluation is spent on a finished row.

    ## Information

    As in Gymnasium's own vector environments: arrays over the sub-environments, each with a boolean array `_key`, and
    `final_obs` and `final_info` of the episodes that have just ended.

    ## Arguments

    As for `UnmaskingEnv`, without `render_mode`, and with `num_envs`. `reset` takes a seed or a list of seeds, and
    `options={"problem": …}` with one index, or one for each sub-environment.

    ## References

    As for `UnmaskingEnv`.
    """

    metadata = {"autoreset_mode": AutoresetMode.SAME_STEP, "render_modes": []}  # noqa: RUF012

    def __init__(
        self,
        problems: ProblemSet | None = None,
        denoise: Denoiser | None = None,
        *,
        num_envs: int = 1,
        run: str | Path | None = None,
        config: UnmaskingConfig = _CONFIG,
        reward: Reward = _REWARD,
        **of_run: Any,
    ):
        options = {"num_envs": num_envs, "config": config, "reward": reward}
        EzPickle.__init__(self, problems, denoise, run=run, **options, **of_run)
        model = _problems_and_model(problems, denoise, run, config, **of_run)
        self.episodes = EpisodeBatch(*model, config, reward, num_envs)
        self.num_envs, self.rules = num_envs, self.episodes.rules
        self.single_observation_space, self.single_action_space = _spaces(self.episodes)
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self._generators: list[Any] = [None] * num_envs

    def reset(
        self, *, seed: int | list[int | None] | None = None, options: Mapping[str, Any] | None = None
    ) -> tuple[AgentObservation, dict[str, Any]]:
        """Begins an episode in every row, with the problems of `options={"problem": …}` or random ones."""
        chosen = _chosen_problems(self.episodes.problems, options, self.num_envs)
        self._seed([seed + row for row in range(self.num_envs)] if isinstance(seed, int) else seed)
        self._begin(range(self.num_envs), chosen)
        return self._observe({})

    def step(self, actions: Any) -> tuple[AgentObservation, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        """Reveals the proposals whose bit is set. Raises ValueError if actions are not num_envs × L values 0 or 1."""
        rewards, terminated = self.episodes.reveal(_bits(actions, (self.num_envs, self.episodes.length)))
        infos: dict[str, Any] = {}
        ended = np.flatnonzero(terminated).tolist()
        for row in ended:
            last = {"final_obs": self.episodes.last_observation(row), "final_info": self.episodes.info(row)}
            infos = self._add_info(infos, last, row)
        self._begin(ended, [None] * self.num_envs)
        observations, infos = self._observe(infos)
        return observations, rewards, terminated, np.zeros_like(terminated), infos

    def _begin(self, rows: Iterable[int], chosen: list[int | None]) -> None:
        self.episodes.begin({row: self.episodes.draw_episode(self._generators[row], chosen[row]) for row in rows})

    def _observe(self, infos: dict[str, Any]) -> tuple[AgentObservation, dict[str, Any]]:
        observations = self.episodes.observe()
        for row in range(self.num_envs):
            infos = self._add_info(infos, self.episodes.info(row), row)
        return observations, infos

    def _seed(self, seeds: list[int | None] | None) -> None:
        """Makes a generator for each row from its seed; None keeps the row's generator, or makes a random one."""
        seeds = seeds or [None] * self.num_envs
        if len(seeds) != self.num_envs:
            raise ValueError(f"there must be a seed for each of {self.num_envs} sub-environments, got {len(seeds)}")
        for row, seed in enumerate(seeds):
            if seed is not None or self._generators[row] is None:
                self._generators[row] = seeding.np_random(seed)[0]


def _problems_and_model(
    problems: ProblemSet | None,
    denoise: Denoiser | None,
    run: str | Path | None,
    config: UnmaskingConfig,
    checkpoint: int | Literal["best"] | None = None,
    **questions: Any,
) -> tuple[ProblemSet, Denoiser]:
    """The given problems and model, or those of a run; `questions` are keywords of `problems_of`.

    Raises ValueError unless either is given, and not both, or if the run was not trained for the guidance of `config`.
    """
    given = {"problems": problems, "denoise": denoise, "run": run, "checkpoint": checkpoint, **questions}
    names = [name for name, value in given.items() if value is not None]
    if problems is not None and denoise is not None and len(names) == 2:
        return problems, denoise
    if problems is not None or denoise is not None or run is None:
        raise ValueError(
            "give `problems` and `denoise`, or `run`, the folder of a trained run, with its options; got "
            f"{', '.join(names) or 'nothing'}"
        )
    loaded = load(Path(run), checkpoint)
    loaded.require_trained_guidance(questions.get("task") or TEXT, config)
    return problems_of(loaded, **questions), loaded.denoise


def _spaces(episodes: EpisodeBatch) -> tuple[spaces.Space[Any], spaces.Space[np.ndarray]]:
    """Observation space and action space of one agent."""
    length, config = episodes.length, episodes.config
    observation: dict[str, spaces.Space[Any]] = {
        **{name: _space_of_input(name, episodes) for name in config.inputs},
        **{name: spaces.MultiBinary(length) for name in ("is_masked", "in_block", "is_asked")},
        # A block that is entered has an asked position, so there are at most as many blocks as those.
        "progress": spaces.Box(0.0, float(config.steps_of_block(length)), (1,), np.float32),
    }
    return spaces.Dict(observation), spaces.MultiBinary(length)


def _space_of_input(name: str, episodes: EpisodeBatch) -> spaces.Box:
    """Space of one of the inputs that a policy may take, at all asked positions."""
    length = episodes.length
    if name == "top":
        return spaces.Box(0.0, 1.0, (length, episodes.config.num_top), np.float32)
    if name == "hidden":
        return spaces.Box(-np.inf, np.inf, (length, episodes.hidden_size), np.float32)
    largest = {"confidence": 1.0, "margin": 1.0, "entropy": math.log(episodes.problems.vocabulary.size)}
    return spaces.Box(0.0, largest[name], (length,), np.float32)


def _bits(action: Any, shape: tuple[int, ...]) -> Bool[np.ndarray, "*shape"]:
    """The action as booleans. Raises ValueError if it is not an array of this shape with values 0 and 1."""
    bits = np.asarray(action)
    if bits.shape != shape:
        raise ValueError(f"an action is an array {shape} of 0 and 1, got one of shape {bits.shape}")
    if not np.isin(bits, (0, 1)).all():
        raise ValueError(f"an action is an array {shape} of 0 and 1, got one with {bits[~np.isin(bits, (0, 1))][0]!r}")
    return bits.astype(bool)


def _chosen_problems(problems: ProblemSet, options: Mapping[str, Any] | None, num_rows: int) -> list[int | None]:
    """Index of the problem that the options choose for every row; None without options."""
    if not options:
        return [None] * num_rows
    if set(options) != {"problem"}:
        raise ValueError(f"reset takes one option, problem; got {', '.join(map(str, options))}")
    indices = np.asarray(options["problem"])
    if indices.shape not in ((), (num_rows,)) or indices.dtype.kind not in "iu":
        raise ValueError(f"problem must be an integer, or one for each of {num_rows} rows, got {options['problem']!r}")
    if indices.min() < 0 or indices.max() >= len(problems.problems):
        raise ValueError(f"problem must lie in [0, {len(problems.problems)}), got {options['problem']!r}")
    return np.broadcast_to(indices, num_rows).tolist()
