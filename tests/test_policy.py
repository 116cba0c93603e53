"""The policy network, its two laws against enumeration, and the policy as a strategy."""

import itertools
import math
import typing
from dataclasses import replace
from pathlib import Path

import fakes
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trimask.diffusion import configuration
from trimask.diffusion.checkpoint import Checkpoints, Retention
from trimask.diffusion.sampling import loop, policy
from trimask.diffusion.sampling.config import GenerationConfig
from trimask.diffusion.sampling.policy import (
    LearnedStrategy,
    PolicyConfig,
    PolicyDescription,
    drawn,
    features_of,
    folder_and_checkpoint,
    new_parameters,
    open_policy,
)
from trimask.diffusion.sampling.requests import Generator
from trimask.diffusion.sampling.state import Rules
from trimask.diffusion.transformer import num_parameters

logits_of = jax.jit(policy.logits_of, static_argnums=0)
log_probability = jax.jit(policy.log_probability, static_argnums=0)
CONFIG = PolicyConfig()
SMALL = PolicyConfig(width=8, mlp_width=8, num_heads=1)
LAWS = typing.get_args(typing.get_type_hints(PolicyConfig)["law"])


def shuffled(parameters, size=0.5):
    """Parameters away from their start, where many are zero."""
    leaves, tree = jax.tree.flatten(parameters)
    keys = jax.random.split(jax.random.key(5), len(leaves))
    moved = [leaf + size * jax.random.normal(key, leaf.shape) for leaf, key in zip(leaves, keys, strict=True)]
    return jax.tree.unflatten(tree, moved)


def actions(law, candidates):
    """All actions, as ranks."""
    places = [i for i, is_candidate in enumerate(candidates) if is_candidate]
    for size in range(len(places) + 1):
        if law == "bernoulli":
            for chosen in itertools.combinations(places, size):
                yield [int(i in chosen) for i in range(len(candidates))]
        elif size or not places:
            for order in itertools.permutations(places, size):
                yield [order.index(i) + 1 if i in order else 0 for i in range(len(candidates))]


def probability(law, logits, ranks, candidates):
    """Straight from the definition."""
    left = {i: math.exp(logits[i]) for i, is_candidate in enumerate(candidates) if is_candidate}
    result = 1.0
    if law == "bernoulli":
        for i, weight in left.items():
            result *= (weight if ranks[i] else 1.0) / (1 + weight)
        return result
    for number in range(1, max(ranks) + 1):
        pick = ranks.index(number)
        result *= left[pick] / (sum(left.values()) + (number > 1))
        del left[pick]
    return result / (sum(left.values()) + 1) if max(ranks) else result


rows = st.integers(1, 4).flatmap(
    lambda size: st.tuples(
        st.lists(st.floats(-3, 3, width=32), min_size=size, max_size=size),
        st.lists(st.booleans(), min_size=size, max_size=size),
    )
)


@pytest.mark.parametrize("law", LAWS)
@settings(deadline=None, max_examples=15)
@given(row=rows)
def test_probabilities_of_all_actions_are_those_of_the_definition_and_add_up_to_one(law, row):
    logits, candidates = row
    every = list(actions(law, candidates))
    count = len(every)
    tiled = (jnp.tile(jnp.array(x)[None], (count, 1)) for x in (logits, candidates))
    logits_of_rows, candidates_of_rows = tiled
    found = np.exp(log_probability(law, logits_of_rows, jnp.array(every), candidates_of_rows))
    expected = [probability(law, logits, ranks, candidates) for ranks in every]
    np.testing.assert_allclose(found, expected, rtol=2e-5)
    np.testing.assert_allclose(found.sum(), 1.0, rtol=2e-5)


@pytest.mark.parametrize("law", LAWS)
def test_actions_are_drawn_as_often_as_they_are_probable(law):
    logits, candidates, count = jnp.array([0.3, 9.0, -0.5, 1.0]), jnp.array([True, False, True, True]), 40_000
    keys = jax.random.split(jax.random.key(1), count)
    tiled = (jnp.tile(x[None], (count, 1)) for x in (logits, candidates))
    found = np.asarray(drawn(law, keys, *tiled))
    for ranks in actions(law, candidates.tolist()):
        expected = probability(law, logits.tolist(), ranks, candidates.tolist())
        share = (found == np.array(ranks)).all(axis=1).mean()
        assert abs(share - expected) < 5 * math.sqrt(expected * (1 - expected) / count)
    if law == "dpls":
        # With one draw of noise for both stages it would be 0.415.
        assert abs(((found > 0).sum(axis=1) == 1).mean() - 0.289) < 0.012


def test_a_scale_makes_revealing_that_much_more_probable_up_to_one():
    logits, count = jnp.array([-2.0, 0.0, 3.0]), 20_000
    keys = jax.random.split(jax.random.key(1), count)
    found = drawn("bernoulli", keys, jnp.tile(logits[None], (count, 1)), jnp.ones((count, 3), bool), scale=1.5)
    np.testing.assert_allclose(found.mean(axis=0), np.minimum(1, 1.5 * jax.nn.sigmoid(logits)), atol=0.02)


@pytest.mark.parametrize("law", LAWS)
def test_gradients_of_probabilities_are_those_of_finite_differences(law):
    logits = jnp.array([[0.4, -1.0, 2.0, 0.1]])
    ranks = {"bernoulli": jnp.array([[1, 0, 1, 0]]), "dpls": jnp.array([[2, 0, 1, 0]])}[law]
    candidates = jnp.array([[True, True, True, False]])

    def value(x):
        return log_probability(law, x, ranks, candidates)[0]

    gradient = np.asarray(jax.grad(value)(logits))[0]
    for place in range(4):
        step = jnp.zeros((1, 4)).at[0, place].set(1e-2)
        assert abs(gradient[place] - (value(logits + step) - value(logits - step)) / 2e-2) < 1e-4
    every = jnp.array([[1, 2, 3, 0]])
    assert np.isfinite(jax.grad(lambda x: log_probability(law, x, every, candidates)[0])(logits)).all()


def test_it_has_a_third_of_a_million_parameters_and_begins_with_twelve_percent():
    parameters = new_parameters(CONFIG, jax.random.key(0))
    assert 320_000 < num_parameters(parameters) < 340_000
    features = jax.random.uniform(jax.random.key(1), (4, 16, 1)).astype(jnp.float16)
    everywhere = jnp.ones((4, 16), bool)
    logits = logits_of(CONFIG, parameters, features, everywhere, everywhere, jnp.arange(4))
    assert abs(float(jax.nn.sigmoid(logits).mean()) - 0.12) < 0.01


def test_only_what_is_asked_for_is_seen_wherever_it_stands():
    parameters = shuffled(new_parameters(SMALL, jax.random.key(0)))
    features = jax.random.uniform(jax.random.key(1), (1, 5, 1)).astype(jnp.float16)
    masked = jnp.array([[True, False, True, True, False]])
    steps = jnp.array([3])
    alone = logits_of(SMALL, parameters, features, masked, jnp.ones((1, 5), bool), steps)
    wide = jnp.ones((1, 12, 1), jnp.float16).at[:, 4:9].set(features)
    asked = jnp.zeros((1, 12), bool).at[:, 4:9].set(True)
    among = logits_of(SMALL, parameters, wide, jnp.zeros((1, 12), bool).at[:, 4:9].set(masked), asked, steps)
    np.testing.assert_allclose(among[:, 4:9], alone, atol=1e-5)
    # Place, status and time matter.
    for other in (
        logits_of(SMALL, parameters, features, ~masked, jnp.ones((1, 5), bool), steps),
        logits_of(SMALL, parameters, features, masked, jnp.ones((1, 5), bool), steps + 1),
        logits_of(SMALL, parameters, features[:, ::-1], masked[:, ::-1], jnp.ones((1, 5), bool), steps)[:, ::-1],
    ):
        assert np.abs(other - alone).max() > 1e-2


@pytest.mark.parametrize(
    ("inputs", "size"),
    [
        (("confidence",), 1),
        (("top",), 3),
        (("margin", "entropy"), 2),
        (("hidden", "confidence"), fakes.VOCABULARY.size + 1),
    ],
)
def test_inputs_are_what_the_denoiser_says(inputs, size):
    hidden = fakes.VOCABULARY.size if "hidden" in inputs else None
    config = PolicyConfig(inputs=inputs, num_top=3, hidden_size=hidden, width=8, mlp_width=8, num_heads=1)
    assert config.num_features == size
    rules = config.watching(Rules(mask_id=fakes.MASK, block_length=2))
    state = loop.enter_blocks(fakes.begin([fakes.text_request([-1] * 6)], 8), rules)
    seen, _ = loop.observe(loop.step_keys(state)[0], fakes.mixing(), state, rules)
    features = features_of(seen, config)
    assert features.shape == (1, 8, size) and features.dtype == jnp.float16
    assert (np.abs(np.asarray(features[0, 2:])).max(axis=-1) > 0).all(), "later blocks are seen"
    assert (features[0, :2] == 0).all()
    near = config.watching(Rules(mask_id=fakes.MASK, block_length=2))
    assert near == rules


def test_a_policy_may_see_its_block_alone():
    config = PolicyConfig(sees_beyond=False)
    rules = config.watching(Rules(mask_id=fakes.MASK, block_length=2))
    state = loop.enter_blocks(fakes.begin([fakes.text_request([-1] * 6)], 8), rules)
    seen, _ = loop.observe(loop.step_keys(state)[0], fakes.mixing(), state, rules)
    assert np.flatnonzero(features_of(seen, config)[0, :, 0]).tolist() == [2, 3]


@pytest.mark.parametrize("law", LAWS)
def test_as_a_strategy_it_fills_everything_and_never_waits(law):
    config = PolicyConfig(law=law, width=8, mlp_width=8, num_heads=1)
    parameters = new_parameters(config, jax.random.key(0))
    # Of both blocks together 8 times the evaluations they need: who stalled would use them up, and not hang.
    rules = config.watching(Rules(mask_id=fakes.MASK, block_length=4, max_nfe=48))
    state = fakes.begin([fakes.text_request([-1] * 6)] * 2, 8)
    run = jax.jit(lambda strategy: loop.sample(fakes.mixing(), strategy, rules, state)[0])
    for logit, nfe in ((-30.0, 6), (-math.inf, 6), (math.nan, 6), (math.inf, 2)):
        parameters["output"]["bias"] = jnp.array([logit])  # it would never reveal anything, or all at once
        final = run(LearnedStrategy(config, parameters))
        assert final.is_done.all() and final.nfe.tolist() == [nfe, nfe]
    parameters["output"]["bias"] = jnp.array([-30.0])
    waiting = LearnedStrategy(config, parameters, is_forced=False)
    rules = config.watching(Rules(mask_id=fakes.MASK, block_length=4, gives_up_after=4))
    final, _ = loop.sample(fakes.mixing(), waiting, rules, state)
    is_left = np.asarray(final.sequence.tokens == fakes.MASK).sum(axis=1).tolist()
    # By dpls one is revealed in every step.
    assert (is_left, final.nfe.tolist()) == (([6, 6], [8, 8]) if law == "bernoulli" else ([0, 0], [6, 6]))


def save_policy(folder):
    """A policy of two checkpoints, the first of which is the better one."""
    about = PolicyDescription(policy=SMALL, temperature=0.5, block_length=4, best_metric="cost", trained_on="nothing")
    configuration.save(folder / "policy.json", about)
    with Checkpoints(folder, Retention(last=2)) as checkpoints:
        for step, cost in ((1, 0.1), (2, 0.2)):
            state = {"parameters": new_parameters(SMALL, jax.random.key(step)), "optimizer": (jnp.zeros(2),)}
            checkpoints.save(step, state, notes={}, metrics={"cost": cost})
    return folder


@pytest.fixture
def folder(tmp_path):
    return save_policy(tmp_path)


def test_only_the_name_of_a_folder_says_which_checkpoint():
    assert folder_and_checkpoint("me@lab/fast") == (Path("me@lab/fast"), "")
    assert folder_and_checkpoint("me@lab/fast@best") == (Path("me@lab/fast"), "best")
    assert folder_and_checkpoint("fast@7") == (Path("fast"), "7")


@pytest.mark.parametrize(("suffix", "step"), [("", 2), ("@best", 1), ("@1", 1)])
def test_a_folder_is_a_strategy_wherever_one_is_named(folder, suffix, step):
    expected = new_parameters(SMALL, jax.random.key(step))
    config = GenerationConfig(strategy=f"{folder}{suffix}", policy_scale=1.5)
    assert jax.tree.all(jax.tree.map(jnp.array_equal, config.chosen.parameters, expected))
    assert (config.chosen.temperature, config.chosen.scale) == (0.5, 1.5)
    assert replace(config, policy_temperature=2.0).chosen.temperature == 2.0
    assert config.rules(fakes.VOCABULARY).shows_all
    (answer,) = Generator(fakes.mixing(), fakes.VOCABULARY).generate([fakes.text_request([-1] * 4)], config, seed=0)
    assert (answer.example.segments[0].codes >= 0).all() and 1 <= answer.nfe <= 4


def test_what_is_no_policy_is_refused_in_a_sentence(folder, tmp_path_factory):
    empty = tmp_path_factory.mktemp("empty")
    cases = [
        (str(empty), "not the folder of a policy"),
        (f"{folder}@7", "no checkpoint of step 7; there are 1, 2"),
        (f"{folder}@last", "after @ comes a step or best"),
    ]
    for name, reason in cases:
        with pytest.raises((ValueError, FileNotFoundError), match=reason):
            GenerationConfig(strategy=name).chosen  # noqa: B018
    about = configuration.load(folder / "policy.json", PolicyDescription)
    configuration.save(folder / "policy.json", replace(about, policy=replace(SMALL, law="dpls", mlp_width=12)))
    with pytest.raises(ValueError, match="not a checkpoint of the model in"):
        open_policy(str(folder))
    configuration.save(folder / "policy.json", replace(about, policy=replace(SMALL, law="dpls")))
    with pytest.raises(ValueError, match="policy_scale is of bernoulli"):
        GenerationConfig(strategy=str(folder), policy_scale=2.0).chosen  # noqa: B018
    with pytest.raises(ValueError, match=r"no strategy 'fast'; there are random, .* and paths of policies"):
        GenerationConfig(strategy="fast")


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        ({"inputs": ()}, "inputs must be some"),
        ({"inputs": ("hidden",)}, "hidden_size is of the input hidden"),
        ({"width": 30}, "multiple of 4"),
        ({"num_top": 0}, "at least 1"),
    ],
)
def test_impossible_policies_are_refused(bad, reason):
    with pytest.raises(ValueError, match=reason):
        PolicyConfig(**bad)
