"""Trains an unmasking policy on episodes with a frozen model, in a run folder that can be resumed.

A policy learns from its own episodes (GRPO), or by imitation of experts alone (behaviour cloning). Experts use the
strategy threshold. Of the episodes that they make of a problem, the policy imitates the one with the highest reward, if
that is positive: the objective is that of GRPO with advantage 1, so the first update on a batch is one of maximum
likelihood, and further updates leave out actions that have become 1 + ε times as likely. Imitation needs no
exploration; it serves as initialisation for GRPO, or as a baseline.

A run folder holds policy.json (all that is needed to use the policy), config.json (the complete configuration),
checkpoints/, metrics.jsonl and tensorboard/. Resuming is bit for bit exact, as in pretraining: the problems and the
randomness of a step are functions of its number.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.tree_util import Partial
from jaxtyping import Bool, Float, Int

from trimask.diffusion.mesh import replicate, split_rows
from trimask.diffusion.run.folder import WRITTEN_FIRST, checkpoint_steps, locked, undone_if_empty, writing
from trimask.diffusion.run.running_mean import Mean
from trimask.diffusion.run.step_loop import LoopConfig, train_loop
from trimask.diffusion.sampling.generation_config import GenerationConfig
from trimask.diffusion.sampling.generator import SamplerParts
from trimask.diffusion.sampling.learned import (
    LearnedStrategy,
    PolicyDescription,
    open_policy,
    require_these_rules,
)
from trimask.diffusion.sampling.policy import PolicyConfig, PolicyParameters, new_policy_parameters
from trimask.sampling_rl.grpo import GRPOBatch, GRPOConfig, group_advantages, update
from trimask.sampling_rl.problems import ProblemSet
from trimask.sampling_rl.reward import RewardConfig
from trimask.sampling_rl.rollout import Recorder, Trajectories, decoded_answers, max_num_steps, problem_rows, rollout
from trimask.tokenizers.storage import configuration
from trimask.tokenizers.storage.ranges import Checked, Positive, Seed, Share, Size


@dataclass(frozen=True, kw_only=True)
class PolicyTrainConfig(Checked):
    """Complete configuration of the training of a policy."""

    policy: PolicyConfig = PolicyConfig()
    """Network of the policy."""
    grpo: GRPOConfig = GRPOConfig()
    """Objective of GRPO and its optimizer."""
    reward: RewardConfig = RewardConfig()
    """Reward of an episode."""
    generation: GenerationConfig = GenerationConfig(temperature=0.0, stop_at_eos=False)
    """Blocks, tokens and guidance of the episodes; the policy takes the place of the strategy."""
    temperature: Positive = 1.0
    """τ: default temperature of the trained policy's actions; in the paper 0.5 in blocks of 32 and 1 without blocks."""
    learns_from: Literal["itself", "experts"] = "itself"
    """Episodes to learn from: the policy's own, joined by those of experts if there are any (itself), or those of
    experts alone, by imitation (experts)."""
    experts: tuple[Share, ...] = ()
    """Thresholds of the experts; each makes an episode of every problem with the strategy threshold."""
    expert_block: Size = 32
    """Block length of the experts, in tokens, if the policy has no blocks; else they have the policy's block length."""
    init_from: str | None = None
    """Policy whose weights are the initial ones: FOLDER, FOLDER@STEP or FOLDER@best. None: random initialisation."""
    problems_per_step: Size = 16
    """Number of problems of a training step."""
    epochs: Positive = 1.0
    """Number of times that each problem is used."""
    seed: Seed = 0
    """Seed of the initialisation, the order of problems and the episodes."""
    loop: LoopConfig = LoopConfig(checkpoint_every=50, keep_best=1, best_metric="cost", spike_factor=None)
    """Logging and checkpoints. The metric cost is minus the reward or, when imitating experts, minus the log-likelihood
    of a step in nats."""

    def __post_init__(self):
        super().__post_init__()
        if self.learns_from == "experts" and not self.experts:
            raise ValueError("learns_from experts needs experts, a list of thresholds; got none")
        if self.generation.temperature != 0:
            raise ValueError(
                "the policy's actions are the only random ones: the temperature of tokens must be 0, got "
                f"{self.generation.temperature}"
            )
        if self.generation.cache != "none":
            raise ValueError(f"episodes are played without a cache: cache must be none, got {self.generation.cache}")

    @property
    def episodes_per_problem(self) -> int:
        """Number of episodes that are played of each problem, by the policy and by experts."""
        return len(self.experts) + (self.grpo.group if self.learns_from == "itself" else 0)

    def num_steps(self, num_problems: int) -> int:
        """Number of training steps, at least 1."""
        return max(1, round(self.epochs * num_problems / self.problems_per_step))


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class PolicyState:
    """Training state: all that a step changes."""

    parameters: PolicyParameters
    optimizer: optax.OptState
    start: PolicyParameters | None
    """Initial parameters, for the divergence from them; never changed. None: the divergence has no weight."""
    step: Any
    """Number of training steps so far, an int32 scalar."""


class PolicyTraining:
    """Initial state, batches and training step of one configuration."""

    def __init__(self, config: PolicyTrainConfig, problems: ProblemSet, denoise: Partial):
        self.config, self.problems, self.denoise = config, problems, replicate(denoise)
        self.num_steps = config.num_steps(len(problems.problems))
        self.optimizer = config.grpo.optimizer(self.num_steps * config.grpo.updates)
        self.key = jax.random.key(config.seed)
        self.rows = problem_rows(problems.problems, problems.vocabulary)
        self.block_length = min(config.generation.block_length or problems.length, problems.length)
        rules = config.generation.rules(problems.vocabulary)
        self.rules = dataclasses.replace(rules, gives_up_after=self.block_length)
        block_length = config.generation.block_length or config.expert_block
        expert = dataclasses.replace(config.generation, strategy="threshold", block_length=block_length)
        self.experts = [dataclasses.replace(expert, threshold=threshold) for threshold in config.experts]
        self.max_num_steps = max(max_num_steps(self.rules, problems.length), problems.length)
        self._require_memory()

    def _require_memory(self) -> None:
        """Raises an error if the memory is too small: for parameters, moments and gradients, and a step's episodes."""
        config, length = self.config, self.problems.length
        width, hidden = config.policy.width, config.policy.mlp_width
        weights = width * (12 * width + 2 * hidden + config.policy.num_features)
        episodes = config.problems_per_step * config.episodes_per_problem
        numbers = episodes * self.max_num_steps * length * (config.policy.num_features + 4)
        activations = config.grpo.chunk * length * (12 * width + 2 * hidden)
        what = f"a policy of {weights:,} weights with {episodes:,} episodes of {self.max_num_steps:,} steps"
        config.loop.limits.require_memory(4 * (5 * weights + numbers + 2 * activations), what, jax.local_devices()[:1])

    def init(self, opens_policy: bool = True) -> PolicyState:
        """State before the first step, with random parameters or those of `init_from`.

        Without `opens_policy` they are always random: for a run that resumes, whose checkpoint replaces them.
        """
        if self.config.init_from is None or not opens_policy:
            key = jax.random.fold_in(self.key, 0)
            parameters = new_policy_parameters(self.config.policy, key, self.block_length)
        else:
            parameters = self._parameters_from(self.config.init_from)
        start = jax.tree.map(jnp.copy, parameters) if self.config.grpo.kl else None
        state = PolicyState(parameters, jax.jit(self.optimizer.init)(parameters), start, jnp.zeros((), jnp.int32))
        return replicate(state)

    def _parameters_from(self, name: str) -> PolicyParameters:
        """Parameters of another policy. Raises ValueError if its network differs."""
        other = open_policy(name)
        changed = configuration.changed_fields(other.config, self.config.policy)
        if changed:
            raise ValueError(f"{name} is another kind of policy. Its configuration → this one: {'; '.join(changed)}")
        return other.parameters

    def batch(self, step: int) -> Int[np.ndarray, " groups"]:
        """Indices of the problems of a step; every epoch is a random permutation of all problems."""
        size, total = self.config.problems_per_step, len(self.problems.problems)
        positions = range(step * size, (step + 1) * size)
        epochs = {position // total for position in positions}
        orders = {e: np.random.default_rng((self.config.seed, e)).permutation(total) for e in epochs}
        return np.array([orders[position // total][position % total] for position in positions])

    def step(self, state: PolicyState, batch: Any) -> tuple[PolicyState, dict[str, Mean]]:
        """Plays and grades episodes of the problems with these indices, and updates the policy; returns metrics too."""
        numbers = np.asarray(batch)
        key = jax.random.fold_in(jax.random.fold_in(self.key, 1), state.step)
        if self.config.learns_from == "itself":
            episodes, episode_metrics = self._own_episodes(state.parameters, numbers, key)
        else:
            episodes, episode_metrics = self._episodes_to_imitate(numbers, key)
        parameters, optimizer, metrics = update(
            state.parameters,
            state.optimizer,
            episodes,
            optimizer=self.optimizer,
            policy=self.config.policy,
            config=self.config.grpo,
            experts=len(self.experts),
            start=state.start,
        )
        if self.config.learns_from == "experts":
            likelihood = metrics["log_likelihood"]
            episode_metrics["cost"] = Mean(-likelihood.total, likelihood.count)
        return PolicyState(parameters, optimizer, state.start, state.step + 1), {**metrics, **episode_metrics}

    def _own_episodes(
        self, parameters: PolicyParameters, numbers: Int[np.ndarray, " groups"], key
    ) -> tuple[GRPOBatch, dict[str, Mean]]:
        """Groups of episodes of the policy, and of experts if there are any."""
        by_policy = self._play_policy(parameters, numbers, key)
        parts = [by_policy, *self._play_experts(numbers, key)]
        advantages, has_signal = group_advantages(np.concatenate([part.rewards for part in parts], axis=1))
        metrics = by_policy.metrics() | {"groups_with_signal": _mean(has_signal)}
        if self.experts:
            metrics["expert_reward"] = _mean(np.stack([part.rewards for part in parts[1:]]))
        has_signal = np.broadcast_to(has_signal[:, None], advantages.shape)
        return _joined(parts, advantages, has_signal, is_mixed=True), metrics

    def _episodes_to_imitate(self, numbers: Int[np.ndarray, " groups"], key) -> tuple[GRPOBatch, dict[str, Mean]]:
        """Episodes of experts; the best of each problem has advantage 1, if its reward is positive, all others 0."""
        parts = self._play_experts(numbers, key)
        rewards = np.concatenate([part.rewards for part in parts], axis=1)
        advantages = (np.arange(len(parts)) == rewards.argmax(axis=1)[:, None]) * (rewards > 0).astype(float)
        has_signal = advantages > 0
        metrics = {"expert_reward": _mean(rewards.max(axis=1)), "groups_with_signal": _mean(has_signal.any(axis=1))}
        return _joined(parts, advantages, has_signal, is_mixed=False), metrics

    def _play_policy(self, parameters: PolicyParameters, numbers: Int[np.ndarray, " groups"], key) -> "_GradedEpisodes":
        policy = LearnedStrategy(self.config.policy, parameters)
        parts = (self.config.generation.guidance_settings, Recorder(self.config.policy, policy), self.rules)
        return self._play(parts, numbers, self.config.grpo.group, key)

    def _play_experts(self, numbers: Int[np.ndarray, " groups"], key) -> list["_GradedEpisodes"]:
        played, vocabulary = [], self.problems.vocabulary
        for number, expert in enumerate(self.experts, 1):
            acts_anywhere = self.config.generation.block_length is None
            recorder = Recorder(self.config.policy, expert.strategy_function, acts_anywhere=acts_anywhere)
            parts = (expert.guidance_settings, recorder, expert.rules(vocabulary))
            played.append(self._play(parts, numbers, 1, jax.random.fold_in(key, number)))
        return played

    def _play(self, parts: SamplerParts, numbers: Int[np.ndarray, " groups"], each: int, key) -> "_GradedEpisodes":
        """Plays and grades `each` episodes of every problem."""
        repeated = np.repeat(numbers, each)
        rows = jax.tree.map(lambda x: split_rows(x[repeated]), self.rows)
        length, vocabulary = self.problems.length, self.problems.vocabulary
        final, trajectories = rollout(
            vocabulary, self.denoise, parts, rows, key, asked=length, steps=self.max_num_steps
        )
        asked = [self.problems.problems[number] for number in repeated]
        right = np.asarray(self.problems.grade(asked, decoded_answers(vocabulary, final)), np.float64)
        nfe, lengths = np.asarray(final.nfe), np.array([problem.length for problem in asked])
        rewards = self.config.reward(right, nfe, lengths)
        return _GradedEpisodes(trajectories, *(x.reshape(len(numbers), each) for x in (right, nfe, rewards)))


@dataclass(frozen=True)
class _GradedEpisodes:
    """Episodes of a batch of problems, `each` of every problem, with their grades and rewards."""

    trajectories: Trajectories
    right: Float[np.ndarray, "groups each"]
    nfe: Int[np.ndarray, "groups each"]
    rewards: Float[np.ndarray, "groups each"]

    def metrics(self) -> dict[str, Mean]:
        values = {"reward": self.rewards, "cost": -self.rewards, "accuracy": self.right, "nfe": self.nfe}
        return {name: _mean(value) for name, value in values.items()}


def _mean(values: np.ndarray) -> Mean:
    return Mean(np.float32(values.sum()), np.float32(values.size))


def _joined(
    parts: Sequence[_GradedEpisodes],
    advantages: Float[np.ndarray, "groups episodes"],
    has_signal: Bool[np.ndarray, "groups episodes"],
    is_mixed: bool,
) -> GRPOBatch:
    """All episodes as one batch, part after part.

    `is_mixed` says that the first part is by the policy and the others are by experts, whose actions count with the
    likelihood of the mixture.
    """
    widths = [part.rewards.shape[1] for part in parts]
    gains, signals = (np.split(values, np.cumsum(widths)[:-1], axis=1) for values in (advantages, has_signal))
    return GRPOBatch(
        trajectories=jax.tree.map(lambda *x: jnp.concatenate(x), *(part.trajectories for part in parts)),
        advantages=jax.device_put(np.concatenate([part.reshape(-1) for part in gains]).astype(np.float32)),
        is_expert=jax.device_put(
            np.concatenate([np.full(part.rewards.size, is_mixed and n > 0) for n, part in enumerate(parts)])
        ),
        has_signal=jax.device_put(np.concatenate([part.reshape(-1) for part in signals])),
    )


def problems_summary(run: str, step: int, problems: ProblemSet) -> str:
    """Model and problems in words, for `trained_on` of a policy's description."""
    return f"{run} at step {step}: {len(problems.problems)} problems of {problems.name}"


def train_policy(
    folder: Path, config: PolicyTrainConfig, problems: ProblemSet, denoise: Partial, trained_on: str
) -> LearnedStrategy:
    """Trains a policy in a run folder, or resumes the training there, and returns the policy.

    `trained_on` describes the model and the problems in words (`problems_summary`); it is stored in policy.json. Raises
    ValueError if the folder holds a training with another configuration, loop settings apart.
    """
    training = PolicyTraining(config, problems, denoise)
    description = PolicyDescription(
        policy=config.policy,
        temperature=config.temperature,
        block_length=config.generation.block_length,
        best_metric=config.loop.best_metric,
        trained_on=trained_on,
    )
    with undone_if_empty(folder, "policy.json", *WRITTEN_FIRST), locked(folder):
        _require_same(folder, config, description)
        with writing(folder):
            configuration.save(folder / "config.json", config)
            configuration.save(folder / "policy.json", description)
        state = train_loop(
            training.step,
            training.init(opens_policy=not checkpoint_steps(folder)),
            training.batch,
            num_steps=training.num_steps,
            folder=folder,
            config=config.loop,
            items=lambda step: config.episodes_per_problem * len(training.batch(step)) * problems.length,
            describe=lambda step: training.batch(step).tolist(),
        )
    return LearnedStrategy(config.policy, state.parameters, config.temperature)


def _require_same(folder: Path, config: PolicyTrainConfig, description: PolicyDescription) -> None:
    """Raises ValueError if the folder holds a training by other rules or with another configuration, loop apart."""
    if not checkpoint_steps(folder):
        return
    described = configuration.load(folder / "policy.json", PolicyDescription)
    require_these_rules(folder, described)
    old = configuration.load(folder / "config.json", PolicyTrainConfig)
    changed = configuration.changed_fields(old, dataclasses.replace(config, loop=old.loop))
    changed += configuration.changed_fields(described, description)
    if changed:
        raise ValueError(
            f"{folder} holds a training of another configuration; choose another folder. "
            f"In the folder → requested: {'; '.join(changed)}"
        )
