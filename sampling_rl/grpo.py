"""Group relative policy optimisation of an unmasking policy, as in arXiv 2512.09106.

    A_g = R_g − mean of the rewards of the group                          (no division by their deviation)
    ρ_t = π_new(u_t)/π_old(u_t)                                           (of a whole action: all positions of a step)
    J   = mean_g (1/T_g) Σ_t min(ρ_t A_g, clip(ρ_t, 1 − ε, 1 + ε) A_g) − β KL + η H

A group is the episodes of one problem: G by the policy and E by strategies (expert steering). An expert's action has
the likelihood of the mixture it stands for, in numerator and denominator:

    G/(G + E) · π(u) + 1/(G + E)

Deviations
1. The mean over episodes is over those of groups whose rewards differ; the others teach nothing.
2. An expert acts in blocks of its own; its action is taken as one over all masked positions, as in the paper, so that
   what it left masked beyond its block counts as not revealed.
3. KL is that of the policy from its start, estimated on the steps seen, by ρ − 1 − log ρ with ρ = π_start/π (Schulman).
4. A batch without any signal is a step all the same, of momentum and weight decay.
5. Entropy is that of single positions, σ(b), which under dpls is not that of the action.
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
from trimask.sampling_rl.rollout import PolicyInputs, Trajectories, step_of
from trimask.tokenizers.storage.ranges import Checked, NonNegative, NonNegativeInt, Positive, Size, real, whole


@dataclass(frozen=True, kw_only=True)
class GRPOConfig(Checked):
    """The objective and its optimizer."""

    group: Annotated[int, whole(2, 1 << 24)] = 8
    """Episodes of a problem by the policy: G."""
    clip: Positive = 0.5
    """ε."""
    updates: Size = 2
    """Of each batch of episodes."""
    normalise: Literal["step", "token"] = "step"
    """Whether every step of an episode counts the same, or every position that it could reveal."""
    kl: NonNegative = 0.0
    """β, of the divergence from the start."""
    entropy: NonNegative = 0.0
    """η, of the entropy bonus."""
    learning_rate: Positive = 3e-5
    """Peak; it follows a cosine to 0."""
    warmup: NonNegativeInt = 100
    """Updates until the peak."""
    beta1: Annotated[float, real(0, below=1)] = 0.9
    """Decay of the first moment."""
    beta2: Annotated[float, real(0, below=1)] = 0.99
    """Decay of the second moment."""
    weight_decay: NonNegative = 0.1
    """AdamW's."""
    clip_norm: Positive = 0.2
    """Largest norm of a gradient."""
    chunk: Size = 128
    """Steps whose gradient is computed at once."""

    def optimizer(self, num_updates: int) -> optax.GradientTransformation:
        """AdamW with its schedule."""
        warmup = min(self.warmup, num_updates - 1)
        rate = optax.warmup_cosine_decay_schedule(
            self.learning_rate / max(warmup, 1), self.learning_rate, warmup, max(num_updates, 1)
        )
        adam = optax.adamw(rate, self.beta1, self.beta2, weight_decay=self.weight_decay)
        return optax.chain(optax.clip_by_global_norm(self.clip_norm), adam)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Batch:
    """Episodes to learn from."""

    trajectories: Trajectories
    advantages: Float[Array, " episodes"]
    is_expert: Bool[Array, " episodes"]
    has_signal: Bool[Array, " episodes"]
    """Whether there is something to learn from it: the rewards of its group differ, or it is to be imitated."""


def advantages(
    rewards: Float[np.ndarray, "groups episodes"],
) -> tuple[Float[np.ndarray, "groups episodes"], Bool[np.ndarray, " groups"]]:
    """R − mean of the group, and which groups have any signal."""
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
    """Of each step: its objective, metrics, and log-likelihood. `old`: the likelihood before; None: it is now's."""
    asked = (step.features, step.is_masked, step.is_asked, step.steps_taken)
    logits = policy_logits(policy, parameters, *asked)
    own = log_probability(policy.law, logits, step.ranks, step.candidates)
    everyone = config.group + experts
    mixed = jnp.logaddexp(np.log(config.group / everyone) + own, np.log(1 / everyone))
    new = jnp.where(is_expert, mixed, own)
    ratio = jnp.exp(new - (jax.lax.stop_gradient(new) if old is None else old))
    clipped = jnp.clip(ratio, 1 - config.clip, 1 + config.clip)
    objective = jnp.minimum(ratio * advantage, clipped * advantage)
    p = jax.nn.sigmoid(logits)
    per_position = p * jax.nn.softplus(-logits) + (1 - p) * jax.nn.softplus(logits)
    entropy = jnp.sum(jnp.where(step.candidates, per_position, 0.0), axis=-1)
    kl = jnp.zeros_like(own)
    if start is not None:
        before = log_probability(policy.law, policy_logits(policy, start, *asked), step.ranks, step.candidates)
        kl = jnp.exp(before - own) - 1 - (before - own)
    objective += config.entropy * entropy - config.kl * kl
    is_clipped = (ratio * advantage > clipped * advantage).astype(jnp.float32)
    is_good = (advantage > 0).astype(jnp.float32)
    values = {"clipped": is_clipped, "kl": kl, "entropy": entropy, "good": is_good, "likelihood": is_good * new}
    return objective, values, new


@partial(jax.jit, static_argnames=("policy", "config", "experts"))
def gradient(
    parameters: PolicyParameters,
    batch: Batch,
    old: Float[Array, "episodes steps"] | None,
    start: PolicyParameters | None,
    *,
    policy: PolicyConfig,
    config: GRPOConfig,
    experts: int = 0,
) -> tuple[PolicyParameters, Float[Array, "episodes steps"], dict[str, Mean]]:
    """Gradient of −J, log-likelihoods of steps, and metrics; `chunk` steps at a time, only of groups with signal.

    The metric log_likelihood is of steps whose advantage is positive.
    """
    trajectories = batch.trajectories
    episodes, most = trajectories.features.shape[:2]
    is_step = (jnp.arange(most) < trajectories.num_steps[:, None]) & batch.has_signal[:, None]
    order = jnp.argsort(~is_step.reshape(-1), stable=True)
    order = jnp.pad(order, (0, -len(order) % config.chunk), constant_values=episodes * most)
    num_chunks = -(-is_step.sum() // config.chunk)
    candidates = jax.lax.population_count(trajectories.candidates).sum(axis=-1)
    if config.normalise == "step":
        weight = is_step / jnp.maximum(trajectories.num_steps, 1)[:, None] / jnp.maximum(batch.has_signal.sum(), 1)
    else:
        weight = is_step * candidates / jnp.maximum(jnp.sum(is_step * candidates), 1)

    def loss(parameters, episode, number, is_there):
        step = step_of(trajectories, episode, number)
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
        sums = {name: jnp.sum(jnp.where(is_there, value, 0.0)) for name, value in metrics.items()}
        sums["positions"] = jnp.sum(jnp.where(is_there[:, None], step.candidates, False))
        return -jnp.sum(jnp.where(is_there, values * weight[episode, number], 0.0)), (sums, new)

    def body(chunk, carry):
        total, gradients, sums, likelihoods = carry
        here = jax.lax.dynamic_slice_in_dim(order, chunk * config.chunk, config.chunk)
        at = jnp.minimum(here, episodes * most - 1)
        episode, number = at // most, at % most
        is_there = (here < episodes * most) & is_step[episode, number]
        (value, (own, new)), new_gradients = jax.value_and_grad(loss, has_aux=True)(
            parameters, episode, number, is_there
        )
        gradients = jax.tree.map(jnp.add, gradients, new_gradients)
        sums = {name: sums[name] + own[name] for name in sums}
        row = jnp.where(is_there, episode, episodes)
        return total + value, gradients, sums, likelihoods.at[row, number].set(new, mode="drop")

    names = ("clipped", "kl", "entropy", "good", "likelihood", "positions")
    zeros = {name: jnp.zeros(()) for name in names}
    carry = (jnp.zeros(()), jax.tree.map(jnp.zeros_like, parameters), zeros, jnp.zeros((episodes, most)))
    total, gradients, sums, likelihoods = jax.lax.fori_loop(0, num_chunks, body, carry)
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


@partial(jax.jit, static_argnames=("optimizer",))
def _applied(optimizer, gradients, state, parameters):
    changes, state = optimizer.update(gradients, state, parameters)
    return optax.apply_updates(parameters, changes), state


def update(
    parameters: PolicyParameters,
    optimizer_state: optax.OptState,
    batch: Batch,
    *,
    optimizer: optax.GradientTransformation,
    policy: PolicyConfig,
    config: GRPOConfig,
    experts: int = 0,
    start: PolicyParameters | None = None,
) -> tuple[PolicyParameters, optax.OptState, Mapping[str, Mean]]:
    """`updates` steps on one batch of episodes; metrics are those of the last."""
    old, metrics = None, {}
    for _ in range(config.updates):
        gradients, likelihoods, metrics = gradient(
            parameters, batch, old, start, policy=policy, config=config, experts=experts
        )
        parameters, optimizer_state = _applied(optimizer, gradients, optimizer_state, parameters)
        old = likelihoods if old is None else old
    return parameters, optimizer_state, metrics
