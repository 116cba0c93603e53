"""Training a policy: episodes on a frozen model, GRPO on them, and the run around it.

A run folder holds policy.json (what it takes to use the policy), config.json (everything resolved), checkpoints/,
metrics.jsonl and tensorboard/. It is resumed bit for bit, as pretraining is: a step's problems and randomness follow
from its number.
"""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.tree_util import Partial
from jaxtyping import Float, Int

from trimask.diffusion import configuration
from trimask.diffusion.loop import LoopConfig, fit
from trimask.diffusion.loss import Mean
from trimask.diffusion.run_folder import checkpoint_steps, locked, writing
from trimask.diffusion.sampling.config import GenerationConfig
from trimask.diffusion.sampling.policy import (
    LearnedStrategy,
    Parameters,
    PolicyConfig,
    PolicyDescription,
    new_parameters,
)
from trimask.diffusion.sampling.requests import How
from trimask.sampling_rl.grpo import Batch, GRPOConfig, advantages, update
from trimask.sampling_rl.problems import ProblemSet
from trimask.sampling_rl.reward import RewardConfig
from trimask.sampling_rl.rollout import Recorder, Trajectories, episodes_of, most_steps, rollout, rows_of


@dataclass(frozen=True, kw_only=True)
class PolicyTrainConfig:
    """Everything a training of a policy is."""

    policy: PolicyConfig = PolicyConfig()
    """The network."""
    grpo: GRPOConfig = GRPOConfig()
    """How it learns."""
    reward: RewardConfig = RewardConfig()
    """What for."""
    generation: GenerationConfig = GenerationConfig(temperature=0.0, stop_at_eos=False)
    """Blocks, tokens and guidance of its episodes; the strategy is the policy."""
    temperature: float = 1.0
    """τ of the trained policy by default: 0.5 in blocks of 32, 1 without, in the paper."""
    experts: tuple[float, ...] = ()
    """Thresholds: for each an episode of the strategy threshold joins the group of every problem."""
    expert_block: int = 32
    """Block length of those."""
    problems_per_step: int = 16
    """Groups of a batch."""
    epochs: float = 1.0
    """How often each problem is seen."""
    seed: int = 0
    """Of everything random."""
    loop: LoopConfig = LoopConfig(checkpoint_every=50, keep_best=1, best_metric="cost", spike_factor=None)
    """Logging and saving; cost is minus the reward."""

    def __post_init__(self):
        if min(self.problems_per_step, self.expert_block) < 1 or self.epochs <= 0 or self.temperature <= 0:
            raise ValueError(f"problems_per_step, expert_block, epochs and temperature must be positive, got {self}")
        if any(not 0 <= threshold <= 1 for threshold in self.experts):
            raise ValueError(f"experts are thresholds in [0, 1], got {self.experts}")
        if self.generation.temperature != 0:
            raise ValueError(
                f"all chance is the policy's: the tokens' temperature must be 0, got {self.generation.temperature}"
            )
        if self.generation.cache != "none":
            raise ValueError(f"episodes are made without a cache, got {self.generation.cache}")

    def num_steps(self, num_problems: int) -> int:
        """Steps of the whole training."""
        return max(1, round(self.epochs * num_problems / self.problems_per_step))


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class PolicyState:
    """Everything a step changes, and the start if the divergence from it counts."""

    parameters: Parameters
    optimizer: optax.OptState
    start: Parameters | None
    step: Any


class PolicyTraining:
    """The step of one configuration."""

    def __init__(self, config: PolicyTrainConfig, problems: ProblemSet, denoise: Partial):
        self.config, self.problems, self.denoise = config, problems, denoise
        self.num_steps = config.num_steps(len(problems.problems))
        self.optimizer = config.grpo.optimizer(self.num_steps * config.grpo.updates)
        self.key = jax.random.key(config.seed)
        self.rows = jax.tree.map(jnp.asarray, rows_of(problems.problems, problems.vocabulary))
        block = config.generation.block_length or problems.length
        rules = config.generation.rules(problems.vocabulary)
        self.rules = dataclasses.replace(rules, gives_up_after=min(block, problems.length))
        expert = dataclasses.replace(config.generation, strategy="threshold", block_length=config.expert_block)
        self.experts = [dataclasses.replace(expert, threshold=threshold) for threshold in config.experts]
        self.most_steps = max(most_steps(self.rules, problems.length), problems.length)

    def init(self, parameters: Parameters | None = None) -> PolicyState:
        """The state before the first step; None: random parameters."""
        if parameters is None:
            parameters = new_parameters(self.config.policy, jax.random.fold_in(self.key, 0))
        start = jax.tree.map(jnp.copy, parameters) if self.config.grpo.kl else None
        return PolicyState(parameters, self.optimizer.init(parameters), start, jnp.zeros((), jnp.int32))

    def batch(self, step: int) -> Int[np.ndarray, " groups"]:
        """Numbers of the problems of a step: every epoch is a permutation."""
        size, total = self.config.problems_per_step, len(self.problems.problems)
        places = range(step * size, (step + 1) * size)
        epochs = {place // total for place in places}
        orders = {e: np.random.default_rng((self.config.seed, e)).permutation(total) for e in epochs}
        return np.array([orders[place // total][place % total] for place in places])

    def step(self, state: PolicyState, batch: Any) -> tuple[PolicyState, dict[str, Mean]]:
        """Episodes of the batch's problems, judged, and the updates on them."""
        config, numbers = self.config, np.asarray(batch)
        key = jax.random.fold_in(jax.random.fold_in(self.key, 1), state.step)
        policy = LearnedStrategy(config.policy, state.parameters, is_forced=False)
        how = (config.generation.guide, Recorder(config.policy, policy), self.rules)
        parts = [self._episodes(how, np.repeat(numbers, config.grpo.group), key)]
        for number, expert in enumerate(self.experts, 1):
            recorder = Recorder(config.policy, expert.chosen, acts_anywhere=True)
            how = (expert.guide, recorder, expert.rules(self.problems.vocabulary))
            parts.append(self._episodes(how, numbers, jax.random.fold_in(key, number)))
        rewards = np.concatenate([part.rewards.reshape(len(numbers), -1) for part in parts], axis=1)
        gain, has_signal = advantages(rewards)
        sizes = np.cumsum([part.rewards.size // len(numbers) for part in parts])
        gains = np.split(gain, sizes[:-1], axis=1)
        episodes = Batch(
            trajectories=jax.tree.map(lambda *x: jnp.concatenate(x), *(part.trajectories for part in parts)),
            advantages=jnp.concatenate([jnp.asarray(part.reshape(-1), jnp.float32) for part in gains]),
            is_expert=jnp.concatenate([jnp.full(part.rewards.size, n > 0) for n, part in enumerate(parts)]),
            has_signal=jnp.concatenate([jnp.repeat(jnp.asarray(has_signal), part.shape[1]) for part in gains]),
        )
        parameters, optimizer, metrics = update(
            state.parameters,
            state.optimizer,
            episodes,
            optimizer=self.optimizer,
            policy=config.policy,
            config=config.grpo,
            experts=len(self.experts),
            start=state.start,
        )
        own, count = parts[0], np.float32(parts[0].rewards.size)
        means = {"reward": own.rewards, "cost": -own.rewards, "accuracy": own.right, "nfe": own.nfe}
        found = {name: Mean(np.float32(values.sum()), count) for name, values in means.items()}
        found["groups_with_signal"] = Mean(np.float32(has_signal.sum()), np.float32(len(has_signal)))
        if self.experts:
            others = np.concatenate([part.rewards for part in parts[1:]])
            found["expert_reward"] = Mean(np.float32(others.sum()), np.float32(others.size))
        return PolicyState(parameters, optimizer, state.start, state.step + 1), {**metrics, **found}

    def _episodes(self, how: How, numbers: Int[np.ndarray, " episodes"], key) -> "_Episodes":
        rows = jax.tree.map(lambda x: over_devices(x[numbers]), self.rows)
        length, vocabulary = self.problems.length, self.problems.vocabulary
        final, trajectories = rollout(vocabulary, self.denoise, how, rows, key, asked=length, steps=self.most_steps)
        asked = [self.problems.problems[number] for number in numbers]
        right = np.asarray(self.problems.grade(asked, episodes_of(vocabulary, final)), np.float64)
        nfe, lengths = np.asarray(final.nfe), np.array([problem.length for problem in asked])
        return _Episodes(trajectories, right, nfe, self.config.reward(right, nfe, lengths))


@dataclass(frozen=True)
class _Episodes:
    """Played and judged."""

    trajectories: Trajectories
    right: Float[np.ndarray, " episodes"]
    nfe: Int[np.ndarray, " episodes"]
    rewards: Float[np.ndarray, " episodes"]


def over_devices(x: jax.Array) -> jax.Array:
    """Rows shared out over all devices, where they divide evenly."""
    devices = jax.devices()
    if len(devices) == 1 or len(x) % len(devices):
        return x
    return jax.device_put(x, NamedSharding(Mesh(np.array(devices), ("data",)), PartitionSpec("data")))


def train_policy(
    folder: Path, config: PolicyTrainConfig, problems: ProblemSet, denoise: Partial, trained_on: str
) -> LearnedStrategy:
    """Trains, or resumes, until its problems are used up; `trained_on` says in words on what.

    Raises ValueError where the folder holds a training of another configuration.
    """
    training = PolicyTraining(config, problems, denoise)
    about = PolicyDescription(
        policy=config.policy,
        temperature=config.temperature,
        best_metric=config.loop.best_metric,
        trained_on=trained_on,
    )
    with locked(folder):
        _require_same(folder, config, about)
        with writing(folder):
            configuration.save(folder / "config.json", config)
            configuration.save(folder / "policy.json", about)
        state = fit(
            training.step,
            training.init(),
            training.batch,
            num_steps=training.num_steps,
            folder=folder,
            config=config.loop,
            items_per_batch=lambda batch: config.grpo.group * len(batch) * problems.length,
            describe=lambda step: training.batch(step).tolist(),
        )
    return LearnedStrategy(config.policy, state.parameters, config.temperature)


def _require_same(folder: Path, config: PolicyTrainConfig, about: PolicyDescription) -> None:
    """Refuses to go on with another training in a folder that holds one."""
    if not checkpoint_steps(folder):
        return
    old = configuration.load(folder / "config.json", PolicyTrainConfig)
    changed = configuration.differences(old, dataclasses.replace(config, loop=old.loop))
    changed += configuration.differences(configuration.load(folder / "policy.json", PolicyDescription), about)
    if changed:
        raise ValueError(
            f"{folder} holds a training of another configuration; choose another folder. "
            f"There → asked for: {'; '.join(changed)}"
        )
