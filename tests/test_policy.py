"""The policy network, its two laws against enumeration, and the policy as a strategy."""

import itertools
import json
import math
import shutil
import typing
from dataclasses import replace
from functools import partial
from pathlib import Path

import fakes
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from trimask.diffusion.run.checkpoint import Checkpoints, Retention
from trimask.diffusion.sampling import actions, policy, sampler
from trimask.diffusion.sampling.actions import draw_action
from trimask.diffusion.sampling.generation_config import GenerationConfig
from trimask.diffusion.sampling.generator import Generator
from trimask.diffusion.sampling.learned import (
    LearnedStrategy,
    PolicyDescription,
    describe_policy,
    folder_and_checkpoint,
    open_policy,
)
from trimask.diffusion.sampling.policy import PolicyConfig, new_policy_parameters, policy_features
from trimask.diffusion.sampling.state import Choice, Rules
from trimask.diffusion.transformer import num_parameters
from trimask.tokenizers.storage import configuration

logits_of = jax.jit(policy.policy_logits, static_argnums=0)
log_probability = jax.jit(actions.log_probability, static_argnums=0)
draw = jax.jit(draw_action, static_argnums=0)
CONFIG = PolicyConfig()
SMALL = PolicyConfig(width=8, mlp_width=8, num_heads=1)
LAWS = typing.get_args(typing.get_type_hints(PolicyConfig)["law"])
PUBLISHED = json.loads((Path(__file__).parent / "published" / "policy.json").read_text())
"""State dict, inputs and logits of the paper's published network; its `source` says how they were recorded."""


def shuffled(parameters, size=0.5):
    """Parameters with noise added, since many are initialised to zero."""
    rng = np.random.default_rng(4)
    return jax.tree.map(lambda leaf: leaf + size * rng.normal(size=leaf.shape).astype(leaf.dtype), parameters)


def actions(law, candidates):
    """All possible actions of a law, as ranks."""
    positions = [i for i, is_candidate in enumerate(candidates) if is_candidate]
    for size in range(len(positions) + 1):
        if law == "bernoulli":
            for chosen in itertools.combinations(positions, size):
                yield [int(i in chosen) for i in range(len(candidates))]
        elif size or not positions:
            for order in itertools.permutations(positions, size):
                yield [order.index(i) + 1 if i in order else 0 for i in range(len(candidates))]


def probability(law, logits, ranks, candidates):
    """Probability of an action, computed from the law's definition."""
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
    logits_of_rows = np.tile(np.array(logits, np.float32), (count, 1))
    found = np.exp(log_probability(law, logits_of_rows, np.array(every), np.tile(candidates, (count, 1))))
    expected = [probability(law, logits, ranks, candidates) for ranks in every]
    np.testing.assert_allclose(found, expected, rtol=2e-5)
    np.testing.assert_allclose(found.sum(), 1.0, rtol=2e-5)


@pytest.mark.parametrize("law", LAWS)
def test_actions_are_drawn_as_often_as_they_are_probable(law):
    logits, candidates, count = np.float32([0.3, 9.0, -0.5, 1.0]), np.array([True, False, True, True]), 40_000
    keys = jax.random.split(jax.random.key(1), count)
    found = np.asarray(draw(law, keys, *(np.tile(x, (count, 1)) for x in (logits, candidates))))
    for ranks in actions(law, candidates.tolist()):
        expected = probability(law, logits.tolist(), ranks, candidates.tolist())
        share = (found == np.array(ranks)).all(axis=1).mean()
        assert abs(share - expected) < 5 * math.sqrt(expected * (1 - expected) / count)
    if law == "dpls":
        # With one draw of noise for both stages it would be 0.415.
        assert abs(((found > 0).sum(axis=1) == 1).mean() - 0.289) < 0.012


def test_a_scale_makes_revealing_that_much_more_probable_up_to_one():
    logits, count = np.float32([-2.0, 0.0, 3.0]), 20_000
    keys = jax.random.split(jax.random.key(1), count)
    found = draw("bernoulli", keys, np.tile(logits, (count, 1)), np.ones((count, 3), bool), scale=1.5)
    np.testing.assert_allclose(np.mean(found, axis=0), np.minimum(1, 1.5 / (1 + np.exp(-logits))), atol=0.02)


@pytest.mark.parametrize("law", LAWS)
def test_gradients_of_probabilities_are_those_of_finite_differences(law):
    logits = np.float32([[0.4, -1.0, 2.0, 0.1]])
    ranks = {"bernoulli": np.array([[1, 0, 1, 0]]), "dpls": np.array([[2, 0, 1, 0]])}[law]
    candidates = np.array([[True, True, True, False]])
    gradient_of = jax.jit(jax.grad(lambda x, ranks: log_probability(law, x, ranks, candidates)[0]))
    gradient = np.asarray(gradient_of(logits, ranks))[0]
    for place in range(4):
        step = 1e-2 * np.eye(4, dtype=np.float32)[[place]]
        above, below = (log_probability(law, x, ranks, candidates).item() for x in (logits + step, logits - step))
        assert abs(gradient[place] - (above - below) / 2e-2) < 1e-4
    assert np.isfinite(gradient_of(logits, np.array([[1, 2, 3, 0]]))).all()


def from_published(state, heads):
    """Parameters of our network from the state dict of the published one."""
    arrays = {name.removeprefix("base_policy."): np.float32(values) for name, values in state.items()}
    block = "transformer_blocks.0."

    def linear(*names):
        """Several layers side by side are one; kernels are transposed."""
        kernels, biases = ([arrays[f"{name}.{part}"] for name in names] for part in ("weight", "bias"))
        return {"kernel": np.concatenate(kernels).T, "bias": np.concatenate(biases)}

    def norm(name):
        return {"scale": arrays[f"{name}.weight"], "bias": arrays[f"{name}.bias"]}

    for name in (f"{block}{layer}.{part}" for layer in ("q_proj", "k_proj") for part in ("weight", "bias")):
        # Rotary embeddings pair neighbours of a head there, and its halves here.
        pairs = arrays[name].reshape(heads, -1, 2, *arrays[name].shape[1:])
        arrays[name] = pairs.swapaxes(1, 2).reshape(arrays[name].shape)
    return {
        "input": linear("confidence_proj"),
        "status": {"embedding": arrays["mask_embedding.weight"]},
        "time_in": linear("time_mlp.0"),
        "time_out": linear("time_mlp.2"),
        "modulation": linear(f"{block}ada_conditioning"),
        "query_key_value": linear(*(f"{block}{name}_proj" for name in "qkv")),
        "attention_out": linear(f"{block}out_proj"),
        "up": linear(f"{block}linear1"),
        "down": linear(f"{block}linear2"),
        "attention_norm": norm(f"{block}norm1"),
        "mlp_norm": norm(f"{block}norm2"),
        "final_norm": norm("final_norm"),
        "output": linear("output_proj"),
    }


def test_weights_of_the_published_network_give_its_logits():
    """To the rounding of float32, whose last bit is 2e-7 of logits of this size."""
    config = PolicyConfig(inputs=("top",), num_top=3, width=8, mlp_width=12, num_heads=2, time_embedding="published")
    parameters = jax.tree.map(jnp.asarray, from_published(PUBLISHED["state"], config.num_heads))
    shapes = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), policy.policy_shapes(config))
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), parameters) == shapes
    features, is_masked = np.float32(PUBLISHED["confidences"]), np.array(PUBLISHED["is_masked"])
    steps = np.array(PUBLISHED["steps"])
    found = logits_of(config, parameters, features, is_masked, np.ones_like(is_masked), steps)
    np.testing.assert_allclose(found, PUBLISHED["logits"], atol=1e-5)


@pytest.mark.parametrize("block_length", [1, 8, 31])
def test_at_first_a_block_is_left_with_as_many_masks_as_one_of_32_in_the_paper(block_length):
    """Where every step reveals each mask with the same probability, until the block has had a step per token."""
    bias = CONFIG.bias_of(block_length)
    assert (1 / (1 + math.exp(bias))) ** block_length == pytest.approx(0.017, rel=1e-6)
    assert bias > -2


def test_the_initial_bias_is_at_least_minus_two_or_the_given_one_and_0_by_dpls():
    assert [CONFIG.bias_of(length) for length in (33, 64, 1024)] == [-2.0] * 3
    assert replace(CONFIG, initial_bias=-3.5).bias_of(8) == -3.5
    assert replace(CONFIG, law="dpls").bias_of(8) == replace(CONFIG, law="dpls", initial_bias=1.0).bias_of(64) == 0.0
    for config, bias in ((SMALL, -0.4092), (replace(SMALL, law="dpls"), 0.0)):
        assert new_policy_parameters(config, jax.random.key(0), 8)["output"]["bias"] == pytest.approx(bias, abs=1e-4)


def test_what_it_sees_changes_its_first_logits_a_little():
    """The last layer's weights have variance 0.01 / fan-in; twice that would be 41 % more standard deviation."""
    kernel = new_policy_parameters(CONFIG, jax.random.key(0), 4)["output"]["kernel"]
    assert float(kernel.std()) == pytest.approx((0.01 / CONFIG.width) ** 0.5, rel=0.2)


def test_it_has_a_third_of_a_million_parameters_and_begins_with_twelve_percent():
    parameters = new_policy_parameters(CONFIG, jax.random.key(0), 32)
    assert 320_000 < num_parameters(parameters) < 340_000
    features = np.random.default_rng(1).random((4, 16, 1)).astype(np.float16)
    everywhere = np.ones((4, 16), bool)
    logits = logits_of(CONFIG, parameters, features, everywhere, everywhere, np.arange(4))
    assert abs(1 / (1 + math.exp(-CONFIG.bias_of(32))) - 0.12) < 1e-3
    # The output's weights add noise with a standard deviation of 0.1.
    assert np.abs(logits - CONFIG.bias_of(32)).max() < 0.4


def test_only_what_is_asked_for_is_seen_wherever_it_stands():
    parameters = shuffled(new_policy_parameters(SMALL, jax.random.key(0), 4))
    wide = np.random.default_rng(1).random((1, 12, 1)).astype(np.float16)
    masked = np.array([[True, False, True, True, False]])
    asked = np.zeros((1, 12), bool)
    asked[:, 4:9] = True

    def logits(features, masked, step=3):
        """Logits at five positions among twelve."""
        around = wide.copy(), np.zeros((1, 12), bool)
        for whole, part in zip(around, (features, masked), strict=True):
            whole[:, 4:9] = part
        return np.asarray(logits_of(SMALL, parameters, *around, asked, np.array([step])))[:, 4:9]

    features = wide[:, :5]
    alone = logits_of(SMALL, parameters, features, masked, np.ones((1, 5), bool), np.array([3]))
    among = logits(features, masked)
    np.testing.assert_allclose(among, alone, atol=1e-5)
    network = nnx.merge(policy._graph_and_shapes(SMALL)[0], nnx.State(parameters))
    after_three_of_five = jax.jit(network)(features.astype(np.float32), masked, np.ones((1, 5), bool), np.array([0.6]))
    np.testing.assert_allclose(alone, after_three_of_five, atol=1e-5)
    # Position, status and time matter.
    for other in (
        logits(features, ~masked),
        logits(features, masked, step=4),
        logits(features[:, ::-1], masked[:, ::-1])[:, ::-1],
    ):
        assert np.abs(other - among).max() > 1e-2


def seen_by(config, rules):
    """Features of the first step of a row whose six masked positions begin at the third position."""

    @jax.jit
    def features(state):
        state = sampler.enter_blocks(state, rules)
        return policy_features(sampler.observe(sampler.step_keys(state)[0], fakes.mixing(), state, rules)[0], config)

    return np.asarray(features(fakes.begin([fakes.text_request([-1] * 6)], 8)))


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
    rules = config.extended_rules(Rules(mask_id=fakes.MASK, block_length=2))
    features = seen_by(config, rules)
    assert features.shape == (1, 8, size) and features.dtype == np.float32
    assert (np.abs(features[0, 2:]).max(axis=-1) > 0).all(), "later blocks are seen"
    assert (features[0, :2] == 0).all()


def test_inputs_may_be_rounded_to_half_precision_and_then_the_policy_acts_on_the_rounded_ones():
    confidence = np.random.default_rng(0).random((1, 8), np.float32)
    state = fakes.begin([fakes.text_request([-1] * 6)], 8)
    seen = sampler.observe(state.keys, fakes.mixing(), state, Rules(mask_id=fakes.MASK))[0]

    @partial(jax.jit, static_argnums=0)
    def acted_on(config, confidence):
        return policy_features(replace(seen, confidence=confidence), config).astype(jnp.float32)

    rounded = acted_on(PolicyConfig(input_dtype="float16"), confidence)[..., 0]
    np.testing.assert_array_equal(rounded, confidence.astype(np.float16).astype(np.float32))
    np.testing.assert_array_equal(acted_on(CONFIG, confidence)[..., 0], confidence)


def test_a_policy_may_see_its_block_alone():
    config = PolicyConfig(sees_beyond=False)
    rules = config.extended_rules(Rules(mask_id=fakes.MASK, block_length=2))
    assert np.flatnonzero(seen_by(config, rules)[0, :, 0]).tolist() == [2, 3]


@pytest.mark.parametrize("law", LAWS)
def test_as_a_strategy_it_fills_everything_and_never_waits(law):
    config = PolicyConfig(law=law, width=8, mlp_width=8, num_heads=1)
    parameters = new_policy_parameters(config, jax.random.key(0), 4)
    # 8 times the evaluations that both blocks need: a policy that stalled would use them up, and not hang.
    rules = config.extended_rules(Rules(mask_id=fakes.MASK, block_length=4, max_nfe=48))
    state = fakes.begin([fakes.text_request([-1] * 6)] * 2, 8)
    run = jax.jit(lambda strategy, rules: sampler.sample(fakes.mixing(), strategy, rules, state)[0])
    for logit, nfe in ((-30.0, 6), (-math.inf, 6), (math.nan, 6), (math.inf, 2)):
        parameters["output"]["bias"] = np.float32([logit])  # it would never reveal anything, or all at once
        final = run(LearnedStrategy(config, parameters), rules)
        assert np.all(final.is_done) and final.nfe.tolist() == [nfe, nfe]
    parameters["output"]["bias"] = np.float32([-30.0])
    waiting = LearnedStrategy(config, parameters, is_forced=False)
    rules = config.extended_rules(Rules(mask_id=fakes.MASK, block_length=4, gives_up_after=4))
    final = run(waiting, rules)
    is_left = (np.asarray(final.sequence.tokens) == fakes.MASK).sum(axis=1).tolist()
    # By dpls one is revealed in every step.
    assert (is_left, final.nfe.tolist()) == (([6, 6], [8, 8]) if law == "bernoulli" else ([0, 0], [6, 6]))


@pytest.mark.parametrize("sees_beyond", [True, False])
def test_tokens_that_were_given_up_stay_masked_in_what_a_policy_sees(sees_beyond):
    """Six masks in three blocks; of the first, which takes a single step, the second mask is given up."""
    config = replace(SMALL, sees_beyond=sees_beyond)
    rules = config.extended_rules(Rules(mask_id=fakes.MASK, block_length=2, gives_up_after=1))
    acts = LearnedStrategy(config, shuffled(new_policy_parameters(config, jax.random.key(0), 2)))

    @jax.jit
    def looked(state):
        state = sampler.enter_blocks(state, rules)
        seen, _ = sampler.observe(state.keys, fakes.mixing(), state, rules)
        asked = (policy_features(seen, config), jnp.arange(8)[None] > 2, seen.is_asked, seen.steps_taken)
        return state, seen, acts.act(state.keys, seen)[1], policy.policy_logits(config, acts.parameters, *asked)

    state, seen, _, _ = looked(fakes.begin([fakes.text_request([-1] * 6)], 8))
    state, seen, logits, expected = looked(sampler.reveal(state, seen, Choice(jnp.arange(8)[None] == 2), rules))
    assert np.flatnonzero(seen.holds_mask[0]).tolist() == [3, 4, 5, 6, 7]
    assert np.flatnonzero(seen.is_masked[0]).tolist() == [4, 5, 6, 7]
    assert np.flatnonzero(seen.candidates[0]).tolist() == [4, 5]
    assert np.flatnonzero(seen.confidence[0]).tolist() == ([3, 4, 5, 6, 7] if sees_beyond else [4, 5])
    np.testing.assert_allclose(logits, expected, rtol=1e-6)
    everything = Choice(jnp.ones((1, 8), bool))
    state, seen, _, _ = looked(sampler.reveal(state, seen, everything, rules))
    assert np.flatnonzero(state.sequence.tokens[0] == fakes.MASK).tolist() == [3, 6, 7]
    # When the row is done nothing more is computed for it.
    state, seen, _, _ = looked(sampler.reveal(state, seen, everything, rules))
    assert state.is_done.all() and np.flatnonzero(seen.holds_mask[0]).tolist() == [3]
    assert not seen.confidence.any()


def save_policy(folder):
    """A policy of two checkpoints, the first of which is the better one."""
    about = PolicyDescription(policy=SMALL, temperature=0.5, block_length=4, best_metric="cost", trained_on="nothing")
    configuration.save(folder / "policy.json", about)
    with Checkpoints(folder, Retention(last=2)) as checkpoints:
        for step, cost in ((1, 0.1), (2, 0.2)):
            state = {"parameters": new_policy_parameters(SMALL, jax.random.key(step), 4), "optimizer": (jnp.zeros(2),)}
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
    expected = new_policy_parameters(SMALL, jax.random.key(step), 4)
    config = GenerationConfig(strategy=f"{folder}{suffix}", policy_scale=1.5)
    assert jax.tree.all(jax.tree.map(np.array_equal, config.strategy_function.parameters, expected))
    assert (config.strategy_function.temperature, config.strategy_function.scale) == (0.5, 1.5)
    assert replace(config, policy_temperature=2.0).strategy_function.temperature == 2.0
    assert config.rules(fakes.VOCABULARY).shows_all
    (answer,) = Generator(fakes.mixing(), fakes.VOCABULARY).generate([fakes.text_request([-1] * 4)], config, seed=0)
    assert (answer.example.segments[0].codes >= 0).all() and 1 <= answer.nfe <= 4


def test_a_damaged_checkpoint_is_left_for_the_one_before_and_that_is_said(folder, capsys):
    for path in (folder / "checkpoints/2/state").rglob("*"):
        if path.is_file():
            path.write_bytes(b"damaged")
    chosen = GenerationConfig(strategy=str(folder)).strategy_function
    assert jax.tree.all(
        jax.tree.map(np.array_equal, chosen.parameters, new_policy_parameters(SMALL, jax.random.key(1), 4))
    )
    assert "checkpoints/2: damaged" in (said := capsys.readouterr().err) and "going back to step 1" in said
    with pytest.raises(ValueError, match="checkpoints/2: damaged"):
        GenerationConfig(strategy=f"{folder}@2").strategy_function  # noqa: B018


def test_a_policy_of_former_rules_is_refused_wherever_one_is_named(folder):
    about = configuration.load(folder / "policy.json", PolicyDescription)
    configuration.save(folder / "policy.json", replace(about, rules=1))
    said = rf"{folder} holds a policy of rules 1, .* only policies of rules 2 .* train it again with `trimask train-pol"
    generation = GenerationConfig(strategy=str(folder))
    assert describe_policy(str(folder)).rules == 1  # what a study of it is shown with
    for opens in (open_policy, lambda _: generation.strategy_function):
        with pytest.raises(ValueError, match=said):
            opens(f"{folder}@best")
    assert "rules" not in json.loads((folder / "policy.json").read_text())


def test_what_is_no_policy_is_refused_in_a_sentence(folder, tmp_path_factory):
    empty = tmp_path_factory.mktemp("empty")
    early = tmp_path_factory.mktemp("early")
    shutil.copy(folder / "policy.json", early)
    cases = [
        (str(empty), "not the folder of a policy"),
        (str(early), "has no complete checkpoint yet; `trimask train-policy` continues it"),
        (f"{folder}@7", "no checkpoint of step 7; there are 1, 2"),
        (f"{folder}@last", "a policy is named FOLDER, FOLDER@STEP or FOLDER@best"),
    ]
    for name, reason in cases:
        with pytest.raises((ValueError, FileNotFoundError), match=reason):
            GenerationConfig(strategy=name).strategy_function  # noqa: B018
    about = configuration.load(folder / "policy.json", PolicyDescription)
    configuration.save(folder / "policy.json", replace(about, policy=replace(SMALL, law="dpls", mlp_width=12)))
    with pytest.raises(ValueError, match="not a checkpoint of the model in"):
        open_policy(str(folder))
    configuration.save(folder / "policy.json", replace(about, policy=replace(SMALL, law="dpls")))
    with pytest.raises(ValueError, match="policy_scale needs law bernoulli"):
        GenerationConfig(strategy=str(folder), policy_scale=2.0).strategy_function  # noqa: B018
    with pytest.raises(ValueError, match=r"no strategy 'fast'; there are random, .* and folders of policies"):
        GenerationConfig(strategy="fast")


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        ({"inputs": ()}, "inputs must be at least one"),
        ({"inputs": ("hidden",)}, "hidden_size goes with the input hidden"),
        ({"width": 30}, "multiple of 4"),
        ({"num_top": 0}, "at least 1"),
        ({"initial_bias": math.nan}, "initial_bias must be finite"),
    ],
)
def test_impossible_policies_are_refused(bad, reason):
    with pytest.raises(ValueError, match=reason):
        PolicyConfig(**bad)
