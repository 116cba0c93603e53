"""Group relative policy optimisation of an unmasking policy, as in arXiv 2512.09106.

    A_g = R_g − mean of the rewards of the group                          (not divided by their standard deviation)
    ρ_t = π_new(u_t)/π_old(u_t)                                           (of a whole action: all positions of a step)
    J   = mean_g (1/T_g) Σ_t min(ρ_t A_g, clip(ρ_t, 1 − ε, 1 + ε) A_g) − β KL + η H

with T_g the number of steps of episode g and u_t the action of step t. A group consists of the episodes of one problem:
G by the policy and E by expert strategies (expert steering). The likelihood of an expert's action, in numerator and
denominator, is that of the mixture of policy and experts:

    G/(G + E) · π(u) + 1/(G + E)

Deviations
1. The mean over episodes is over those of groups whose rewards differ; the other groups have no gradient.
2. An expert acts in blocks of its own; its action is taken as one over all masked positions, as in the paper, so that
   positions which it left masked beyond its block count as not revealed.
3. KL is the divergence of the policy from its initial parameters, estimated on the steps of the batch by ρ − 1 − log ρ
   with ρ = π_start/π (Schulman).
4. A batch without any signal still makes an optimizer step, of momentum and weight decay alone.
5. Entropy is the sum over candidate positions of that of revealing each, σ(b); under the law dpls this differs from the
   entropy of the action.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float

from trimask.diffusion.run.running_mean import Mean
from trimask.diffusion.sampling.actions import log_probability
from trimask.diffusion.sampling.policy import PolicyConfig, PolicyParameters, policy_logits
from trimask.sampling_rl.rollout import PolicyInputs, Trajectories, policy_inputs_at
from trimask.tokenizers.storage.ranges import Checked, NonNegative, NonNegativeInt, Positive, Size, real, whole


@dataclass(frozen=True, kw_only=True)
class GRPOConfig(Checked):
    """Objective of GRPO and its optimizer."""

    group: Annotated[int, whole(2, 1 << 24)] = 8
    """G: number of episodes that the policy makes of each problem."""
    clip: Positive = 0.5
    """ε: ratios of likelihoods are clipped to [1 − ε, 1 + ε]."""
    updates: Size = 2
    """Number of optimizer updates on each batch of episodes."""
    normalise: Literal["step", "token"] = "step"
    """What has equal weight in the objective: every step of an episode, or every position that could be revealed."""
    kl: NonNegative = 0.0
    """β: weight of the divergence from the initial policy."""
    entropy: NonNegative = 0.0
    """η: weight of the entropy bonus."""
    learning_rate: Positive = 3e-5
    """Peak learning rate, after which it follows a cosine to 0."""
    warmup: NonNegativeInt = 100
    """Number of updates over which the learning rate rises linearly to its peak."""
    beta1: Annotated[float, real(0, below=1)] = 0.9
    """Decay rate of AdamW's first moment."""
    beta2: Annotated[float, real(0, below=1)] = 0.99
    """Decay rate of AdamW's second moment."""
    weight_decay: NonNegative = 0.1
    """Weight decay of AdamW."""
    clip_norm: Positive = 0.2
    """Largest global norm of a gradient; longer gradients are scaled down to it."""
    chunk: Size = 128
    """Number of steps whose gradients are computed at once; limits memory."""

    def optimizer(self, num_updates: int) -> optax.GradientTransformation:
        """AdamW with gradient clipping, warm-up and a cosine schedule over `num_updates`."""
        warmup = min(self.warmup, num_updates - 1)
        rate = optax.warmup_cosine_decay_schedule(
            self.learning_rate / max(warmup, 1), self.learning_rate, warmup, max(num_updates, 1)
        )
        adam = optax.adamw(rate, self.beta1, self.beta2, weight_decay=self.weight_decay)
        return optax.chain(optax.clip_by_global_norm(self.clip_norm), adam)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class GRPOBatch:
    """Episodes to learn from."""

    trajectories: Trajectories
    advantages: Float[Array, " episodes"]
    is_expert: Bool[Array, " episodes"]
    """Whether the likelihood of the episode's actions is that of the mixture of policy and experts."""
    has_signal: Bool[Array, " episodes"]
    """Whether the episode counts: the rewards of its group differ, or it is to be imitated."""


def group_advantages(
    rewards: Float[np.ndarray, "groups episodes"],
) -> tuple[Float[np.ndarray, "groups episodes"], Bool[np.ndarray, " groups"]]:
    """Reward minus the mean reward of the group, and whether the rewards of each group differ."""
    centred = rewards - rewards.mean(axis=1, keepdims=True)
    return centred, np.abs(centred).max(axis=1) > 1e-9


def step_values(
    parameters: PolicyParameters,
    step: PolicyInputs,
    old: Float[Array, " batch"] | None,
    advantage: Float[Array, " batch"],
    is_expert: Bool[Array, " batch"],
    policy: PolicyConfig,
    config: GRPOConfig,
    start: PolicyParameters | None,
    experts: int,
) -> tuple[Float[Array, " batch"], dict[str, Float[Array, " batch"]], Float[Array, " batch"]]:
    """Objective, metrics and log-likelihood (nats) of each step.

    `old` is the log-likelihood before the first update on the batch; None: the present one. `start` are the initial
    parameters, for the divergence; None: no divergence. `experts` is E, the number of experts in a group.
    """
    inputs = (step.features, step.is_masked, step.is_asked, step.steps_taken)
    logits = policy_logits(policy, parameters, *inputs)
    by_policy = log_probability(policy.law, logits, step.ranks, step.candidates)
    group_size = config.group + experts
    by_mixture = jnp.logaddexp(np.log(config.group / group_size) + by_policy, np.log(1 / group_size))
    new = jnp.where(is_expert, by_mixture, by_policy)
    ratio = jnp.exp(new - (jax.lax.stop_gradient(new) if old is None else old))
    clipped = jnp.clip(ratio, 1 - config.clip, 1 + config.clip)
    objective = jnp.minimum(ratio * advantage, clipped * advantage)
    p = jax.nn.sigmoid(logits)
    per_position = p * jax.nn.softplus(-logits) + (1 - p) * jax.nn.softplus(logits)
    entropy = jnp.sum(jnp.where(step.candidates, per_position, 0.0), axis=-1)
    kl = jnp.zeros_like(by_policy)
    if start is not None:
        before = log_probability(policy.law, policy_logits(policy, start, *inputs), step.ranks, step.candidates)
        kl = jnp.exp(before - by_policy) - 1 - (before - by_policy)
    objective += config.entropy * entropy - config.kl * kl
    is_clipped = (ratio * advantage > clipped * advantage).astype(jnp.float32)
    is_good = (advantage > 0).astype(jnp.float32)
    values = {"clipped": is_clipped, "kl": kl, "entropy": entropy, "good": is_good, "likelihood": is_good * new}
    return objective, values, new


@partial(jax.jit, static_argnames=("policy", "config", "experts"))
def objective_gradient(
    parameters: PolicyParameters,
    batch: GRPOBatch,
    old: Float[Array, "episodes steps"] | None,
    start: PolicyParameters | None,
    *,
    policy: PolicyConfig,
    config: GRPOConfig,
    experts: int = 0,
) -> tuple[PolicyParameters, Float[Array, "episodes steps"], dict[str, Mean]]:
    """Gradient of −J, log-likelihood of every step (nats), and metrics.

    Only steps of episodes with signal are computed, `chunk` at a time; the log-likelihood of all others is 0. The
    metric log_likelihood is the mean over steps whose advantage is positive. Other arguments are those of
    `step_values`.
    """
    episodes, most = batch.trajectories.features.shape[:2]
    is_step = (jnp.arange(most) < batch.trajectories.num_steps[:, None]) & batch.has_signal[:, None]
    weights = _step_weights(batch, is_step, config)
    order = jnp.argsort(~is_step.reshape(-1), stable=True)
    order = jnp.pad(order, (0, -len(order) % config.chunk), constant_values=episodes * most)
    num_chunks = -(-is_step.sum() // config.chunk)

    def loss(parameters, episode, number, is_counted):
        """Loss of the chunk; sums of its metrics; log-likelihood of its steps."""
        step = policy_inputs_at(batch.trajectories, episode, number)
        values, metrics, new = step_values(
            parameters,
            step,
            None if old is None else old[episode, number],
            batch.advantages[episode],
            batch.is_expert[episode],
            policy,
            config,
            start,
            experts,
        )
        sums = {name: jnp.sum(jnp.where(is_counted, value, 0.0)) for name, value in metrics.items()}
        sums["positions"] = jnp.sum(jnp.where(is_counted[:, None], step.candidates, False))
        return -jnp.sum(jnp.where(is_counted, values * weights[episode, number], 0.0)), (sums, new)

    def add_chunk(chunk, carry):
        total, gradients, sums, likelihoods = carry
        indices = jax.lax.dynamic_slice_in_dim(order, chunk * config.chunk, config.chunk)
        inside = jnp.minimum(indices, episodes * most - 1)
        episode, number = inside // most, inside % most
        is_counted = (indices < episodes * most) & is_step[episode, number]
        (value, (chunk_sums, new)), chunk_gradients = jax.value_and_grad(loss, has_aux=True)(
            parameters, episode, number, is_counted
        )
        gradients = jax.tree.map(jnp.add, gradients, chunk_gradients)
        sums = {name: sums[name] + chunk_sums[name] for name in sums}
        row = jnp.where(is_counted, episode, episodes)
        return total + value, gradients, sums, likelihoods.at[row, number].set(new, mode="drop")

    zeros = {name: jnp.zeros(()) for name in ("clipped", "kl", "entropy", "good", "likelihood", "positions")}
    carry = (jnp.zeros(()), jax.tree.map(jnp.zeros_like, parameters), zeros, jnp.zeros((episodes, most)))
    total, gradients, sums, likelihoods = jax.lax.fori_loop(0, num_chunks, add_chunk, carry)
    steps = is_step.sum().astype(jnp.float32)
    metrics = {
        "loss": Mean(total, jnp.ones(())),
        "clip_fraction": Mean(sums["clipped"], steps),
        "kl": Mean(sums["kl"], steps),
        "entropy": Mean(sums["entropy"], sums["positions"]),
        "log_likelihood": Mean(sums["likelihood"], sums["good"]),
        "gradient_norm": Mean(optax.tree.norm(gradients), jnp.ones(())),
    }
    return gradients, likelihoods, metrics


def _step_weights(
    batch: GRPOBatch, is_step: Bool[Array, "episodes steps"], config: GRPOConfig
) -> Float[Array, "episodes steps"]:
    """Weight of every step in J: 1/(number of episodes · T_g), or by its number of candidate positions."""
    trajectories = batch.trajectories
    if config.normalise == "step":
        return is_step / jnp.maximum(trajectories.num_steps, 1)[:, None] / jnp.maximum(batch.has_signal.sum(), 1)
    candidates = jax.lax.population_count(trajectories.candidates).sum(axis=-1)
    return is_step * candidates / jnp.maximum(jnp.sum(is_step * candidates), 1)


@partial(jax.jit, static_argnames=("optimizer",))
def _apply_gradients(optimizer, gradients, state, parameters):
    changes, state = optimizer.update(gradients, state, parameters)
    return optax.apply_updates(parameters, changes), state


def update(
    parameters: PolicyParameters,
    optimizer_state: optax.OptState,
    batch: GRPOBatch,
    *,
    optimizer: optax.GradientTransformation,
    policy: PolicyConfig,
    config: GRPOConfig,
    experts: int = 0,
    start: PolicyParameters | None = None,
) -> tuple[PolicyParameters, optax.OptState, Mapping[str, Mean]]:
    """New parameters and optimizer state after `config.updates` updates on a batch, and the metrics of the last one."""
    old, metrics = None, {}
    for _ in range(config.updates):
        gradients, likelihoods, metrics = objective_gradient(
            parameters, batch, old, start, policy=policy, config=config, experts=experts
        )
        parameters, optimizer_state = _apply_gradients(optimizer, gradients, optimizer_state, parameters)
        old = likelihoods if old is None else old
    return parameters, optimizer_state, metrics
