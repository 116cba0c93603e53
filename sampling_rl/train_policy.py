"""Training a policy: episodes on a frozen model, learning from them, and the run around it.

A policy learns from its own episodes (GRPO), or from those of experts alone: of the episodes that several thresholds
make of a problem it imitates the one with the highest reward, if that is positive (behaviour cloning): the objective is
GRPO's with advantage 1, so the first update on a batch is one of maximum likelihood, and further ones leave out actions
that have become 1 + ε times as likely. Imitation costs no exploration; it is a start for GRPO, or a baseline.

A run folder holds policy.json (what it takes to use the policy), config.json (everything resolved), checkpoints/,
metrics.jsonl and tensorboard/. It is resumed bit for bit, as pretraining is: a step's problems and randomness follow
from its number.
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
from trimask.diffusion.sampling.learned import LearnedStrategy, PolicyDescription, open_policy
from trimask.diffusion.sampling.policy import PolicyConfig, PolicyParameters, new_policy_parameters
from trimask.sampling_rl.grpo import Batch, GRPOConfig, advantages, update
from trimask.sampling_rl.problems import ProblemSet
from trimask.sampling_rl.reward import RewardConfig
from trimask.sampling_rl.rollout import Recorder, Trajectories, episodes_of, most_steps, rollout, rows_of
from trimask.tokenizers.storage import configuration
from trimask.tokenizers.storage.ranges import Checked, Positive, Seed, Share, Size


@dataclass(frozen=True, kw_only=True)
class PolicyTrainConfig(Checked):
    """Everything a training of a policy is."""

    policy: PolicyConfig = PolicyConfig()
    """The network."""
    grpo: GRPOConfig = GRPOConfig()
    """How it learns."""
    reward: RewardConfig = RewardConfig()
    """What for."""
    generation: GenerationConfig = GenerationConfig(temperature=0.0, stop_at_eos=False)
    """Blocks, tokens and guidance of its episodes; the strategy is the policy."""
    temperature: Positive = 1.0
    """τ of the trained policy by default: 0.5 in blocks of 32, 1 without, in the paper."""
    learns_from: Literal["itself", "experts"] = "itself"
    """Whose episodes it learns from: with itself, experts join its groups; experts alone are imitated."""
    experts: tuple[Share, ...] = ()
    """Thresholds: for each the strategy threshold makes an episode of every problem."""
    expert_block: Size = 32
    """Block length of experts of a policy without blocks; else they have the policy's."""
    init_from: str | None = None
    """Policy whose weights are the start: FOLDER, FOLDER@STEP or FOLDER@best."""
    problems_per_step: Size = 16
    """Groups of a batch."""
    epochs: Positive = 1.0
    """How often each problem is seen."""
    seed: Seed = 0
    """Of everything random."""
    loop: LoopConfig = LoopConfig(checkpoint_every=50, keep_best=1, best_metric="cost", spike_factor=None)
    """Logging and saving; cost is minus the reward or, of experts, minus the log-likelihood of a step, in nats."""

    def __post_init__(self):
        super().__post_init__()
        if self.learns_from == "experts" and not self.experts:
            raise ValueError("to learn from experts takes experts: thresholds")
        if self.generation.temperature != 0:
            raise ValueError(
                f"all chance is the policy's: the tokens' temperature must be 0, got {self.generation.temperature}"
            )
        if self.generation.cache != "none":
            raise ValueError(f"episodes are made without a cache, got {self.generation.cache}")

    @property
    def episodes_of_group(self) -> int:
        """Episodes that are made of a problem."""
        return len(self.experts) + (self.grpo.group if self.learns_from == "itself" else 0)

    def num_steps(self, num_problems: int) -> int:
        """Steps of the whole training."""
        return max(1, round(self.epochs * num_problems / self.problems_per_step))


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class PolicyState:
    """Everything a step changes, and the start if the divergence from it counts."""

    parameters: PolicyParameters
    optimizer: optax.OptState
    start: PolicyParameters | None
    step: Any


class PolicyTraining:
    """The step of one configuration."""

    def __init__(self, config: PolicyTrainConfig, problems: ProblemSet, denoise: Partial):
        self.config, self.problems, self.denoise = config, problems, replicate(denoise)
        self.num_steps = config.num_steps(len(problems.problems))
        self.optimizer = config.grpo.optimizer(self.num_steps * config.grpo.updates)
        self.key = jax.random.key(config.seed)
        self.rows = rows_of(problems.problems, problems.vocabulary)
        block = config.generation.block_length or problems.length
        rules = config.generation.rules(problems.vocabulary)
        self.rules = dataclasses.replace(rules, gives_up_after=min(block, problems.length))
        block_length = config.generation.block_length or config.expert_block
        expert = dataclasses.replace(config.generation, strategy="threshold", block_length=block_length)
        self.experts = [dataclasses.replace(expert, threshold=threshold) for threshold in config.experts]
        self.most_steps = max(most_steps(self.rules, problems.length), problems.length)
        self._require_memory()

    def _require_memory(self) -> None:
        """Refuses what does not fit the memory: parameters with moments and gradients, and the episodes of a step."""
        config, length = self.config, self.problems.length
        width, hidden = config.policy.width, config.policy.mlp_width
        weights = width * (12 * width + 2 * hidden + config.policy.num_features)
        episodes = config.problems_per_step * config.episodes_of_group
        numbers = episodes * self.most_steps * length * (config.policy.num_features + 4)
        activations = config.grpo.chunk * length * (12 * width + 2 * hidden)
        what = f"a policy of {weights:,} weights with {episodes:,} episodes of {self.most_steps:,} steps"
        config.loop.limits.require_memory(4 * (5 * weights + numbers + 2 * activations), what, jax.local_devices()[:1])

    def init(self, takes_over: bool = True) -> PolicyState:
        """The state before the first step, of random parameters or of those that are to be taken over."""
        if self.config.init_from is None or not takes_over:
            parameters = new_policy_parameters(self.config.policy, jax.random.fold_in(self.key, 0))
        else:
            parameters = self._taken_over(self.config.init_from)
        start = jax.tree.map(jnp.copy, parameters) if self.config.grpo.kl else None
        state = PolicyState(parameters, jax.jit(self.optimizer.init)(parameters), start, jnp.zeros((), jnp.int32))
        return replicate(state)

    def _taken_over(self, name: str) -> PolicyParameters:
        other = open_policy(name)
        changed = configuration.changed_fields(other.config, self.config.policy)
        if changed:
            raise ValueError(f"{name} is another kind of policy. There → here: {'; '.join(changed)}")
        return other.parameters

    def batch(self, step: int) -> Int[np.ndarray, " groups"]:
        """Numbers of the problems of a step: every epoch is a permutation."""
        size, total = self.config.problems_per_step, len(self.problems.problems)
        places = range(step * size, (step + 1) * size)
        epochs = {place // total for place in places}
        orders = {e: np.random.default_rng((self.config.seed, e)).permutation(total) for e in epochs}
        return np.array([orders[place // total][place % total] for place in places])

    def step(self, state: PolicyState, batch: Any) -> tuple[PolicyState, dict[str, Mean]]:
        """Episodes of the batch's problems, judged, and the updates on them."""
        numbers = np.asarray(batch)
        key = jax.random.fold_in(jax.random.fold_in(self.key, 1), state.step)
        if self.config.learns_from == "itself":
            own = self._by_policy(state.parameters, numbers, key)
            parts = [own, *self._by_experts(numbers, key)]
            advantage, has_signal = advantages(np.concatenate([part.rewards for part in parts], axis=1))
            found = own.metrics() | {"groups_with_signal": _mean(has_signal)}
            has_signal = np.broadcast_to(has_signal[:, None], advantage.shape)
            if self.experts:
                found["expert_reward"] = _mean(np.stack([part.rewards for part in parts[1:]]))
        else:
            parts = self._by_experts(numbers, key)
            rewards = np.concatenate([part.rewards for part in parts], axis=1)
            advantage = (np.arange(len(parts)) == rewards.argmax(axis=1)[:, None]) * (rewards > 0).astype(float)
            has_signal = advantage > 0
            found = {"expert_reward": _mean(rewards.max(axis=1)), "groups_with_signal": _mean(has_signal.any(axis=1))}
        parameters, optimizer, metrics = update(
            state.parameters,
            state.optimizer,
            _batch(parts, advantage, has_signal, is_mixed=self.config.learns_from == "itself"),
            optimizer=self.optimizer,
            policy=self.config.policy,
            config=self.config.grpo,
            experts=len(self.experts),
            start=state.start,
        )
        if self.config.learns_from == "experts":
            likelihood = metrics["log_likelihood"]
            found["cost"] = Mean(-likelihood.total, likelihood.count)
        return PolicyState(parameters, optimizer, state.start, state.step + 1), {**metrics, **found}

    def _by_policy(self, parameters: PolicyParameters, numbers: Int[np.ndarray, " groups"], key) -> "_Episodes":
        policy = LearnedStrategy(self.config.policy, parameters)
        how = (self.config.generation.guidance_settings, Recorder(self.config.policy, policy), self.rules)
        return self._episodes(how, numbers, self.config.grpo.group, key)

    def _by_experts(self, numbers: Int[np.ndarray, " groups"], key) -> list["_Episodes"]:
        played, vocabulary = [], self.problems.vocabulary
        for number, expert in enumerate(self.experts, 1):
            acts_anywhere = self.config.generation.block_length is None
            recorder = Recorder(self.config.policy, expert.strategy_function, acts_anywhere=acts_anywhere)
            how = (expert.guidance_settings, recorder, expert.rules(vocabulary))
            played.append(self._episodes(how, numbers, 1, jax.random.fold_in(key, number)))
        return played

    def _episodes(self, how: SamplerParts, numbers: Int[np.ndarray, " groups"], each: int, key) -> "_Episodes":
        repeated = np.repeat(numbers, each)
        rows = jax.tree.map(lambda x: split_rows(x[repeated]), self.rows)
        length, vocabulary = self.problems.length, self.problems.vocabulary
        final, trajectories = rollout(vocabulary, self.denoise, how, rows, key, asked=length, steps=self.most_steps)
        asked = [self.problems.problems[number] for number in repeated]
        right = np.asarray(self.problems.grade(asked, episodes_of(vocabulary, final)), np.float64)
        nfe, lengths = np.asarray(final.nfe), np.array([problem.length for problem in asked])
        rewards = self.config.reward(right, nfe, lengths)
        return _Episodes(trajectories, *(x.reshape(len(numbers), each) for x in (right, nfe, rewards)))


@dataclass(frozen=True)
class _Episodes:
    """Played and judged."""

    trajectories: Trajectories
    right: Float[np.ndarray, "groups each"]
    nfe: Int[np.ndarray, "groups each"]
    rewards: Float[np.ndarray, "groups each"]

    def metrics(self) -> dict[str, Mean]:
        values = {"reward": self.rewards, "cost": -self.rewards, "accuracy": self.right, "nfe": self.nfe}
        return {name: _mean(value) for name, value in values.items()}


def _mean(values: np.ndarray) -> Mean:
    return Mean(np.float32(values.sum()), np.float32(values.size))


def _batch(
    parts: Sequence[_Episodes],
    advantage: Float[np.ndarray, "groups episodes"],
    has_signal: Bool[np.ndarray, "groups episodes"],
    is_mixed: bool,
) -> Batch:
    """Episodes of all groups one after another, those of the policy first; `is_mixed` says that others are experts'."""
    widths = [part.rewards.shape[1] for part in parts]
    gains, signals = (np.split(values, np.cumsum(widths)[:-1], axis=1) for values in (advantage, has_signal))
    return Batch(
        trajectories=jax.tree.map(lambda *x: jnp.concatenate(x), *(part.trajectories for part in parts)),
        advantages=jax.device_put(np.concatenate([part.reshape(-1) for part in gains]).astype(np.float32)),
        is_expert=jax.device_put(
            np.concatenate([np.full(part.rewards.size, is_mixed and n > 0) for n, part in enumerate(parts)])
        ),
        has_signal=jax.device_put(np.concatenate([part.reshape(-1) for part in signals])),
    )


def trained_on(run: str, step: int, problems: ProblemSet) -> str:
    """A model and problems in words."""
    return f"{run} at step {step}: {len(problems.problems)} problems of {problems.name}"


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
        block_length=config.generation.block_length,
        best_metric=config.loop.best_metric,
        trained_on=trained_on,
    )
    with undone_if_empty(folder, "policy.json", *WRITTEN_FIRST), locked(folder):
        _require_same(folder, config, about)
        with writing(folder):
            configuration.save(folder / "config.json", config)
            configuration.save(folder / "policy.json", about)
        state = train_loop(
            training.step,
            training.init(takes_over=not checkpoint_steps(folder)),
            training.batch,
            num_steps=training.num_steps,
            folder=folder,
            config=config.loop,
            items=lambda step: config.episodes_of_group * len(training.batch(step)) * problems.length,
            describe=lambda step: training.batch(step).tolist(),
        )
    return LearnedStrategy(config.policy, state.parameters, config.temperature)


def _require_same(folder: Path, config: PolicyTrainConfig, about: PolicyDescription) -> None:
    """Refuses to go on with another training in a folder that holds one."""
    if not checkpoint_steps(folder):
        return
    old = configuration.load(folder / "config.json", PolicyTrainConfig)
    changed = configuration.changed_fields(old, dataclasses.replace(config, loop=old.loop))
    changed += configuration.changed_fields(configuration.load(folder / "policy.json", PolicyDescription), about)
    if changed:
        raise ValueError(
            f"{folder} holds a training of another configuration; choose another folder. "
            f"There → asked for: {'; '.join(changed)}"
        )
