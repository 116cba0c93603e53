"""Rollouts, what they store, and the objective and its gradients against an oracle in NumPy."""

import dataclasses
import math
from functools import partial

import fakes
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fakes import MASK, VOCABULARY, text_request
from jax.tree_util import Partial
from test_policy import LAWS, SMALL, shuffled

from trimask.diffusion.sampling import policy, sampler
from trimask.diffusion.sampling.actions import log_probability
from trimask.diffusion.sampling.generator import sampler_arguments
from trimask.diffusion.sampling.learned import LearnedStrategy
from trimask.diffusion.sampling.policy import new_policy_parameters
from trimask.diffusion.sampling.state import Choice, Rules, initial_state
from trimask.diffusion.sampling.strategies import STRATEGIES
from trimask.sampling_rl.grpo import GRPOBatch, GRPOConfig, group_advantages, objective_gradient
from trimask.sampling_rl.problems import Problem
from trimask.sampling_rl.rollout import (
    Recorder,
    decoded_answers,
    gather_asked,
    max_num_steps,
    policy_inputs_at,
    problem_rows,
    rollout,
)

PROBLEMS = [Problem(text_request([1, *[-1] * 10]), {}), Problem(text_request([-1] * 7), {})] * 3
ROWS = jax.tree.map(jnp.asarray, problem_rows(PROBLEMS, VOCABULARY))
EXPERTS = 2
RULES = {
    "blocks": Rules(mask_id=MASK, block_length=4, gives_up_after=4),
    "full": Rules(mask_id=MASK, gives_up_after=10),
}
stored_at = jax.jit(policy_inputs_at)


@partial(jax.jit, static_argnums=0)
def likelihood_of(config, parameters, step):
    """Logits of the policy in a step, and the log-likelihood of its action."""
    asked = (step.features, step.is_masked, step.is_asked, step.steps_taken)
    logits = policy.policy_logits(config, parameters, *asked)
    return logits, log_probability(config.law, logits, step.ranks, step.candidates)


def config_of(law):
    return dataclasses.replace(SMALL, law=law)


def parameters_of(law):
    parameters = shuffled(new_policy_parameters(config_of(law), jax.random.key(0), 4))
    parameters["output"]["bias"] = jnp.array([-1.0])
    return parameters


def recorded(law, rules, strategy=None, play=rollout, **options):
    """Final state and trajectories of a policy, or of a strategy."""
    config = config_of(law)
    acts = strategy or LearnedStrategy(config, parameters_of(law))
    how = (None, Recorder(config, acts, **options), rules)
    steps = max_num_steps(rules, 10)
    return play(VOCABULARY, fakes.mixing(), how, ROWS, jax.random.key(3), asked=10, steps=steps)


@pytest.mark.parametrize("rules", RULES)
@pytest.mark.parametrize("law", LAWS)
def test_what_is_stored_is_what_the_policy_saw_and_did(law, rules):
    rules = RULES[rules]
    final, stored = recorded(law, rules)
    acts = LearnedStrategy(config_of(law), parameters_of(law), is_forced=False)
    assert stored.num_steps.tolist() == final.nfe.tolist() == final.step.tolist()
    denoise, _, rules = sampler_arguments(VOCABULARY, fakes.mixing(), (None, acts, acts.config.extended_rules(rules)))
    keys = jax.vmap(lambda n: jax.random.fold_in(jax.random.key(3), n))(jnp.arange(6))
    state, rows = initial_state(ROWS, keys, MASK), jnp.arange(6)

    @jax.jit
    def act(state):
        state = sampler.enter_blocks(state, rules)
        of_tokens, of_choice = sampler.step_keys(state)
        seen, _ = sampler.observe(of_tokens, denoise, state, rules)
        ranks, logits = acts.act(of_choice, seen)
        likelihood = log_probability(law, logits, ranks, seen.candidates)
        found = (policy.policy_features(seen, acts.config), seen.holds_mask, seen.candidates, ranks)
        found = [gather_asked(values, state.is_asked, 10) for values in found]
        given_up = seen.holds_mask & ~seen.is_masked
        return found, likelihood, sampler.reveal(state, seen, Choice(ranks > 0), rules), given_up

    num_given_up = 0
    for number in range(int(stored.num_steps.max())):
        active = np.asarray(number < stored.num_steps)
        found, likelihood, state, given_up = act(state)
        num_given_up += int(given_up[active].sum())
        step = stored_at(stored, rows, jnp.full(6, number))
        for mine, theirs in zip((step.features, step.is_masked, step.candidates, step.ranks), found, strict=True):
            np.testing.assert_array_equal(np.asarray(mine)[active], np.asarray(theirs)[active])
        again = likelihood_of(acts.config, acts.parameters, step)[1]
        # Another program than that of the update, whose first ratio is tested below: equal to rounding.
        np.testing.assert_allclose(np.asarray(again)[active], np.asarray(likelihood)[active], rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(state.sequence.tokens, final.sequence.tokens)
    assert (num_given_up > 0) == (law == "bernoulli" and rules.block_length is not None)


def test_rows_that_are_done_leave_and_change_nothing(monkeypatch):
    whole = recorded("dpls", RULES["full"])
    monkeypatch.setattr("trimask.sampling_rl.rollout._FEWEST", 1)

    @partial(jax.jit, static_argnums=0, static_argnames=("asked", "steps"))
    def anew(*arguments, **numbers):
        return rollout.__wrapped__(*arguments, **numbers)

    narrowed = recorded("dpls", RULES["full"], play=anew)
    assert len(set(whole[0].nfe.tolist())) > 2
    for one, other in zip(jax.tree.leaves(whole), jax.tree.leaves(narrowed), strict=True):
        if not jnp.issubdtype(one.dtype, jax.dtypes.prng_key):
            np.testing.assert_array_equal(one, other)


def test_episodes_end_with_what_was_not_revealed_in_time():
    impatient = Rules(mask_id=MASK, block_length=4, gives_up_after=1)
    final, stored = recorded("bernoulli", impatient)
    answers = decoded_answers(VOCABULARY, final)
    assert stored.num_steps.tolist() == [3, 2] * 3
    assert any((answer.segments[0].codes < 0).any() for answer in answers)
    assert max_num_steps(impatient, 10) == 3 and max_num_steps(RULES["full"], 10) == 10


def test_an_expert_is_seen_as_acting_anywhere():
    threshold = Partial(STRATEGIES["threshold"], threshold=0.9)
    rules = RULES["blocks"]
    final, stored = recorded("dpls", rules, threshold, acts_anywhere=True)
    assert not (final.sequence.tokens == MASK).any()
    for number in range(int(stored.num_steps.max())):
        step = stored_at(stored, jnp.arange(6), jnp.full(6, number))
        active = np.asarray(number < stored.num_steps)
        np.testing.assert_array_equal(step.candidates[active], (step.is_masked & step.is_asked)[active])
        picks = np.sort(np.asarray(step.ranks), axis=1)[active]
        # Ranks 1, 2, …, in the order of confidence.
        assert (np.diff(picks, axis=1).max(axis=1) <= 1).all() and (picks[:, -1] >= 1).all()
        for row in np.flatnonzero(active):
            ranks, sure = np.asarray(step.ranks[row]), np.asarray(step.features[row, :, 0])
            order = [sure[ranks == n].item() for n in range(1, ranks.max() + 1)]
            assert order == sorted(order, reverse=True)


def test_what_an_expert_did_is_seen_as_a_policy_without_blocks_sees_it():
    threshold = Partial(STRATEGIES["threshold"], threshold=0.9)
    blind = dataclasses.replace(config_of("bernoulli"), sees_beyond=False)
    how = (None, Recorder(blind, threshold, acts_anywhere=True), RULES["blocks"])
    _, stored = rollout(VOCABULARY, fakes.mixing(), how, ROWS, jax.random.key(3), asked=10, steps=12)
    step = stored_at(stored, jnp.arange(6), jnp.zeros(6, int))
    assert (np.asarray(step.features[..., 0])[np.asarray(step.is_masked & step.is_asked)] > 0).all()


def test_advantages_are_differences_from_the_mean_of_the_group():
    found, has_signal = group_advantages(np.array([[1.0, 0.0, 0.0, 0.0], [0.5, 0.5, 0.5, 0.5]]))
    assert found.tolist() == [[0.75, -0.25, -0.25, -0.25], [0, 0, 0, 0]] and has_signal.tolist() == [True, False]


def batch_of(law, experts):
    _, stored = recorded(law, RULES["full"])
    gain = jnp.array([0.7, -0.4, 0.2, -0.6, 0.9, 0.0])
    is_expert = jnp.array([False, True] * 3) & experts
    return GRPOBatch(stored, gain, is_expert, jnp.array([True] * 5 + [False]))


def oracle(law, parameters, batch, old, config, begin):
    """−J in NumPy, from the policy's logits on."""
    stored, total = batch.trajectories, 0.0
    steps_of = {e: int(stored.num_steps[e]) for e in range(6) if batch.has_signal[e]}
    positions = {
        (e, t): int(np.sum(stored_at(stored, jnp.array([e]), jnp.array([t])).candidates))
        for e, count in steps_of.items()
        for t in range(count)
    }
    likelihoods = np.zeros(stored.features.shape[:2])
    for (e, t), count in positions.items():
        step = stored_at(stored, jnp.array([e]), jnp.array([t]))

        def own(parameters, step=step):
            logits, likelihood = jax.device_get(likelihood_of(config_of(law), parameters, step))
            return logits, float(likelihood[0])

        logits, value = own(parameters)
        if batch.is_expert[e]:
            everyone = config.group + EXPERTS
            value = math.log(config.group / everyone * math.exp(value) + 1 / everyone)
        likelihoods[e, t] = value
        ratio, gain = math.exp(value - old[e, t]), float(batch.advantages[e])
        clipped = min(max(ratio, 1 - config.clip), 1 + config.clip)
        gained = min(ratio * gain, clipped * gain)
        p = 1 / (1 + np.exp(-np.asarray(logits[0], np.float64)))[np.asarray(step.candidates[0])]
        gained += config.entropy * float(-(p * np.log(p) + (1 - p) * np.log(1 - p)).sum())
        if begin is not None:
            gap = own(begin)[1] - own(parameters)[1]
            gained -= config.kl * (math.exp(gap) - 1 - gap)
        share = 1 / steps_of[e] / len(steps_of)
        total += gained * (share if config.normalise == "step" else count / sum(positions.values()))
    return -total, likelihoods


@pytest.mark.parametrize(
    ("law", "options"),
    [
        ("dpls", {}),
        ("bernoulli", {"kl": 0.1}),
        ("dpls", {"entropy": 0.05, "normalise": "token", "clip": 0.02}),
    ],
)
def test_the_objective_and_its_gradient_are_those_of_the_definition(law, options):
    config = GRPOConfig(group=4, chunk=16, **options)
    batch, now = batch_of(law, experts=True), parameters_of(law)
    begin = new_policy_parameters(config_of(law), jax.random.key(9), 4) if config.kl else None
    # The policy has moved since the episodes were made.
    keys = iter(jax.random.split(jax.random.key(5), 100))
    before = jax.tree.map(lambda x: x + 0.05 * jax.random.normal(next(keys), x.shape), now)
    old = oracle(law, before, batch, np.zeros(batch.trajectories.features.shape[:2]), config, None)[1]
    found, likelihoods, metrics = objective_gradient(
        now, batch, jnp.asarray(old, jnp.float32), begin, policy=config_of(law), config=config, experts=EXPERTS
    )
    expected, of_steps = oracle(law, now, batch, old, config, begin)
    assert float(metrics["loss"]) == pytest.approx(expected, abs=2e-5)
    signal = np.asarray(batch.has_signal)
    np.testing.assert_allclose(np.where(signal[:, None], likelihoods, 0), of_steps, atol=2e-5)
    direction = jax.tree.map(lambda x: jax.random.normal(next(keys), x.shape), now)
    size = 1e-4  # so short that no ratio comes to be clipped on the way
    ahead, behind = (
        oracle(law, jax.tree.map(lambda x, d, s=s: x + s * d, now, direction), batch, old, config, begin)[0]
        for s in (size, -size)
    )
    along = sum(float(jnp.vdot(g, d)) for g, d in zip(*map(jax.tree.leaves, (found, direction)), strict=True))
    assert along == pytest.approx((ahead - behind) / (2 * size), rel=0.02, abs=1e-3)
    assert 0 < float(metrics["clip_fraction"]) < 1 and float(metrics["log_likelihood"]) < 0
    assert (float(metrics["kl"]) > 0) == (config.kl > 0) and float(metrics["entropy"]) > 0
    # However the steps are cut.
    whole, _, of_whole = objective_gradient(
        now,
        batch,
        jnp.asarray(old, jnp.float32),
        begin,
        policy=config_of(law),
        config=dataclasses.replace(config, chunk=200),
        experts=EXPERTS,
    )
    for one, other in zip(*map(jax.tree.leaves, ((found, metrics), (whole, of_whole))), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)


def test_at_first_every_ratio_is_one_and_nothing_is_clipped():
    config, batch = GRPOConfig(clip=1e-6), batch_of("bernoulli", False)
    _, likelihoods, metrics = objective_gradient(
        parameters_of("bernoulli"), batch, None, None, policy=config_of("bernoulli"), config=config
    )
    assert float(metrics["clip_fraction"]) == 0
    again = objective_gradient(
        parameters_of("bernoulli"), batch, likelihoods, None, policy=config_of("bernoulli"), config=config
    )[2]
    assert float(again["clip_fraction"]) == 0 and float(again["loss"]) == pytest.approx(float(metrics["loss"]))


@pytest.mark.parametrize("bad", [{"group": 1}, {"clip": 0.0}, {"kl": -1.0}])
def test_impossible_settings_are_refused(bad):
    with pytest.raises(ValueError, match=r"must (be at least 2|be positive|not be negative), got"):
        GRPOConfig(**bad)


def test_the_rate_warms_up_from_its_share_of_one_step_and_weights_decay_by_it():
    """Without gradients only the weight decay changes the parameters."""
    config = GRPOConfig(learning_rate=0.5, warmup=4, weight_decay=0.25, beta1=0.0, beta2=0.0)
    optimizer, parameters = config.optimizer(100), {"w": jnp.array([2.0, -4.0])}
    state, found = optimizer.init(parameters), []
    for _ in range(5):
        updates, state = optimizer.update({"w": jnp.zeros(2)}, state, parameters)
        found.append(updates["w"].tolist())
    rates = [0.125, 0.21875, 0.3125, 0.40625, 0.5]
    np.testing.assert_allclose(found, [[-rate * 0.25 * 2, rate * 0.25 * 4] for rate in rates], rtol=1e-6)


def test_gradients_are_clipped_together_before_they_are_averaged():
    config = GRPOConfig(learning_rate=0.5, warmup=0, weight_decay=0.0, beta1=0.5, beta2=0.0, clip_norm=1.0)
    optimizer, parameters = config.optimizer(1000), {"w": jnp.zeros(2)}
    state = optimizer.init(parameters)
    large, small = np.array([30.0, 40.0]), np.array([0.1, 0.2])
    for given in (large, small):
        updates, state = optimizer.update({"w": jnp.asarray(given)}, state, parameters)
    mean = (0.5 * 0.5 * large / 50 + 0.5 * small) / (1 - 0.5**2)
    np.testing.assert_allclose(updates["w"], -0.5 * mean / small, rtol=1e-4)
