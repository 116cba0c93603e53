"""One battery for every strategy: its definition in slow Python, what it may touch, its end, and what it samples."""

import dataclasses
import fnmatch
import inspect
import itertools
import math
import re
import typing
from functools import cache

import fakes
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tyro
from fakes import OneProgram, any_strategy, text_request
from hypothesis import example, given, settings
from hypothesis import strategies as st

from trimask.diffusion.sampling import sampler, strategies
from trimask.diffusion.sampling.generation_config import GenerationConfig, require_used_fields, strategy_parameters
from trimask.diffusion.sampling.generator import Generator, request_keys, request_words
from trimask.diffusion.sampling.learned import LearnedStrategy
from trimask.diffusion.sampling.policy import PolicyConfig, new_policy_parameters
from trimask.diffusion.sampling.state import Observation, initial_state
from trimask.diffusion.sampling.strategies import STRATEGIES, ChoiceAndMemory
from trimask.tokenizers.sequence import assemble

EVERY_STRATEGY = pytest.mark.parametrize("name", STRATEGIES)
ROW = 6
NUMBERS = {
    "threshold": 0.625,  # which is one of the confidences below, as 1.125 is of what the second may come to
    "factor": 1.125,
    "entropy_bound": 0.75,
    "position_penalty": 0.3,
    "remask": 0.3,
    "loop_from": 0.7,
    "loop_until": 0.5,
    "loop_kept": 0.6,
}


@jax.jit
def keys_and_uniforms(seed):
    """A key for each row, and a number for each of its positions, from the key and the position alone."""
    keys = jax.random.split(jax.random.key(seed), ROWS)
    one_row = jax.vmap(lambda key, position: jax.random.uniform(jax.random.fold_in(key, position)), (None, 0))
    return keys, jax.vmap(one_row, (0, None))(keys, jnp.arange(ROW))


def even_share(row):
    left, t, s = len(row["candidates"]), row["t"], row["s"]
    return max(1, math.ceil(left * (1 - s / t) - 1e-4))


def first(row, score, count):
    return set(sorted(row["candidates"], key=lambda i: (-score[i], i))[:count])


def confident(row):
    return {i for i in row["candidates"] if row["confidence"][i] >= np.float32(NUMBERS["threshold"])}


def by_factor(row):
    order = sorted(row["candidates"], key=lambda i: (-row["confidence"][i], i))
    holds = [n for n in range(1, len(order) + 1) if (n + 1) * (1 - row["confidence"][order[n - 1]]) < NUMBERS["factor"]]
    return set(order[: max(holds, default=1)])


def by_entropy(row):
    order = sorted(row["candidates"], key=lambda i: (row["entropy"][i], i))
    sizes = range(1, len(order) + 1)
    fits = [n for n in sizes if sum(row["entropy"][i] for i in order[: n - 1]) <= NUMBERS["entropy_bound"]]
    return set(order[: max(fits, default=1)])


def remasked(row, sigma_of):
    """Positions that ReMDM reveals, and those that it masks again, with σ(position)."""
    t, s = row["t"], row["s"]
    reveal = {i for i in row["candidates"] if s == 0 or row["u"][i] < (1 - s - (1 - sigma_of(None)) * (1 - t)) / t}
    return reveal, {i for i in row["revealed"] if row["u"][i] < sigma_of(i)}


def sigma_max(row):
    return 1.0 if row["t"] == 1 else min(1.0, row["s"] / (1 - row["t"]))


def softly(row):
    weights = {i: math.exp(-row["commit"][i]) for i in row["revealed"]}
    return lambda i: 0.0 if i is None else sigma_max(row) * weights[i] / sum(weights.values())


def in_a_loop(row):
    start, until, kept, eta = (NUMBERS[n] for n in ("loop_from", "loop_until", "loop_kept", "remask"))
    now, then = 1 - row["step"] / row["steps"], 1 - (row["step"] + 1) / row["steps"]

    def masked(time):
        return 1 - (1 - time) * kept / (1 - start) if time > start else min(time / until, 1) * (1 - kept)

    if until < now <= start and row["step"] + 1 < row["steps"]:
        reveal, sigma = eta * kept / (1 - kept), eta
    elif row["step"] + 1 >= row["steps"]:
        reveal, sigma = 1.0, 0.0
    else:
        reveal, sigma = 1 - masked(then) / masked(now), 0.0
    return {i for i in row["candidates"] if row["u"][i] < reveal}, {i for i in row["revealed"] if row["u"][i] < sigma}


def best(row, score, chosen=()):
    return set(chosen) or first(row, score, 1)


ORACLES = {
    "random": lambda r: first(r, r["u"], even_share(r)),
    "ancestral": lambda r: {i for i in r["candidates"] if r["s"] == 0 or r["u"][i] < 1 - r["s"] / r["t"]},
    "first_hitting": lambda r: first(r, r["u"], 1),
    "confidence": lambda r: first(r, r["confidence"], even_share(r)),
    "margin": lambda r: first(r, r["margin"], even_share(r)),
    "entropy": lambda r: first(r, -r["entropy"], even_share(r)),
    "position": lambda r: first(
        r,
        {i: r["confidence"][i] * math.exp(-NUMBERS["position_penalty"] * r["asked"].index(i)) for i in r["candidates"]},
        even_share(r),
    ),
    "entropy_bound": by_entropy,
    "threshold": lambda r: best(r, r["confidence"], confident(r)),
    "leftmost": lambda r: best(r, -np.arange(ROW), confident(r)),
    "factor": by_factor,
    "given": lambda r: first(r, -np.arange(ROW), even_share(r)),
    "remdm_cap": lambda r: remasked(r, lambda _: min(NUMBERS["remask"], sigma_max(r))),
    "remdm_rescale": lambda r: remasked(r, lambda _: NUMBERS["remask"] * sigma_max(r)),
    "remdm_confidence": lambda r: remasked(r, softly(r)),
    "remdm_loop": in_a_loop,
}
STEPS = 5
TIME = {"t", "s", "step", "steps"}
ROWS = 64
"""Number of rows of every observation here, so that each strategy is one program."""
CHOOSE = jax.jit(lambda strategy, keys, seen: strategy(keys, seen, None))


def observation(rows, step=0):
    """The observation of rows of (confidence, entropy, margin, status): masked, revealed, given, or outside the block.

    The last row is repeated up to ROWS.
    """
    rows = [*rows, *[rows[-1]] * (ROWS - len(rows))]
    confidence, entropy, margin = (np.array([[p[k] for p in row] for row in rows], np.float32) for k in range(3))
    status = np.array([[p[3] for p in row] for row in rows])
    batch = len(rows)
    seen = dict(
        proposal=np.zeros(confidence.shape, np.int32),
        confidence=confidence,
        entropy=entropy,
        margin=margin,
        is_masked=(status == "masked") | (status == "outside"),
        holds_mask=(status == "masked") | (status == "outside"),
        in_block=status != "outside",
        is_asked=status != "given",
        modality=np.ones(confidence.shape, np.int32),
        step=np.full(batch, step, np.int32),
        steps_taken=np.full(batch, step, np.int32),
        num_steps=np.full(batch, STEPS, np.int32),
        time=np.full(batch, 1 - step / STEPS, np.float32),
        next_time=np.full(batch, max(0.0, 1 - (step + 1) / STEPS), np.float32),
        commit_confidence=confidence,
        num_passes=np.ones(batch, np.int32),
    )
    return Observation(**jax.device_put(seen))


def known_of(row, uniforms, step):
    """What a definition may look at, by name."""
    where = {s: [i for i in range(ROW) if row[i][3] == s] for s in ("masked", "revealed", "given")}
    return {
        "candidates": where["masked"],
        "revealed": where["revealed"],
        "asked": [i for i in range(ROW) if i not in where["given"]],
        "confidence": np.array([p[0] for p in row], np.float32),
        "commit": np.array([p[0] for p in row], np.float32),
        "entropy": np.array([p[1] for p in row]),
        "margin": np.array([p[2] for p in row]),
        "u": uniforms,
        "t": 1 - step / STEPS,
        "s": 0.0 if step == STEPS - 1 else 1 - (step + 1) / STEPS,
        "step": step,
        "steps": STEPS,
    }


class Watched(dict):
    """A dictionary that remembers which of its keys were read."""

    def __init__(self, *args):
        super().__init__(*args)
        self.read = set()

    def __getitem__(self, key):
        self.read.add(key)
        return super().__getitem__(key)


def definition_of(name):
    """What the definition of a strategy looks at, and whether it masks tokens again."""
    row = [(0.625, 0.25, 0.25, "revealed"), *[(0.625, 0.25, 0.25, "masked")] * (ROW - 1)]
    known = Watched(known_of(row, np.full(ROW, 0.5), 2))
    return known.read, isinstance(ORACLES[name](known), tuple)


def test_every_strategy_of_the_module_is_in_the_table():
    functions = [f for f in vars(strategies).values() if inspect.isfunction(f)]
    found = [f.__name__ for f in functions if f.__annotations__.get("return") == ChoiceAndMemory]
    assert [name for name in found if name not in STRATEGIES] == [], "no line in STRATEGIES"
    assert len(found) >= len(STRATEGIES)


@EVERY_STRATEGY
def test_it_has_a_definition_and_its_numbers_have_fields_and_values(name):
    fields = {field.name for field in dataclasses.fields(GenerationConfig)}
    numbers = set(strategy_parameters(name))
    assert numbers - fields == set(), "numbers without a field in GenerationConfig"
    assert numbers - NUMBERS.keys() == set(), "numbers without a value in NUMBERS of this file"
    assert name in ORACLES, "a strategy without a definition in ORACLES of this file"


@EVERY_STRATEGY
def test_the_help_of_steps_says_whether_it_follows_them(name):
    words = re.sub(r"[^\w*-]+", " ", tyro.extras.get_parser(GenerationConfig).format_help())
    listed = re.search(r"Number of steps in which (.*?) reveal everything", words)
    assert listed is not None
    is_listed = any(fnmatch.fnmatch(name, word) for word in listed[1].split())
    assert is_listed == bool(definition_of(name)[0] & TIME), "the docstring of GenerationConfig.steps lists the others"


positions = st.tuples(
    st.sampled_from([0.125, 0.375, 0.625, 0.625, 0.875]),
    st.sampled_from([0.0, 0.25, 0.25, 0.5]),
    st.sampled_from([0.0, 0.25, 0.5]),
    st.sampled_from(["masked", "masked", "masked", "revealed", "given", "outside"]),
)
rows_of_two = st.lists(st.lists(positions, min_size=ROW, max_size=ROW), min_size=2, max_size=2)


@EVERY_STRATEGY
@settings(deadline=None, max_examples=30)
@given(rows_of_two, st.integers(0, STEPS - 1), st.integers(0, 2**20))
def test_it_equals_its_definition(name, rows, step, seed):
    seen = observation(rows, step)
    keys, uniforms = keys_and_uniforms(seed)
    choice, _ = CHOOSE(any_strategy(name, **NUMBERS), keys, seen)
    revealed, remasked_again, uniforms = jax.device_get((choice.reveal, choice.remask, uniforms))
    for number, row in enumerate(rows):
        if all(status != "masked" for *_, status in row):
            continue
        expected = ORACLES[name](known_of(row, uniforms[number], step))
        reveal, remask = expected if isinstance(expected, tuple) else (expected, set())
        assert set(np.flatnonzero(revealed[number]).tolist()) == reveal
        assert set(np.flatnonzero(remasked_again[number]).tolist()) == remask


LAWS = typing.get_args(typing.get_type_hints(PolicyConfig)["law"])
EXTREMES = (0.0, 0.5, 1.0, math.nan, math.inf, -math.inf)
anything = st.tuples(
    *[st.sampled_from(EXTREMES)] * 3, st.sampled_from(["masked", "masked", "revealed", "given", "outside"])
)
IN_EACH_ROUND = [name for name in STRATEGIES if name != "ancestral" and not name.startswith("remdm")]
"""Strategies that reveal something in every step."""


@cache
def policy(law, bias):
    """A policy whose logits are `bias` plus what a random network adds."""
    config = PolicyConfig(law=law, inputs=("confidence", "margin", "entropy"), width=8, mlp_width=8, num_heads=1)
    parameters = new_policy_parameters(config, jax.random.key(0), 4)
    parameters["output"]["bias"] = jnp.array([bias])
    return LearnedStrategy(config, parameters)


@pytest.mark.parametrize("name", [*STRATEGIES, *LAWS])
@settings(deadline=None, max_examples=12)
@given(st.lists(anything, min_size=ROW, max_size=ROW), st.integers(0, STEPS - 1), st.sampled_from(EXTREMES))
@example([(math.nan, math.nan, math.nan, "masked")] * ROW, 1, math.nan)
@example([(-math.inf, math.inf, -math.inf, s) for s in ("given", "revealed", "masked", *["outside"] * 3)], 2, -math.inf)
@example([(1.0, 0.0, 0.0, "revealed")] * ROW, 0, math.inf)
def test_whatever_the_confidences_it_reveals_something_and_only_candidates(name, row, step, bias):
    seen = observation([row, [(0.5, 0.5, 0.5, "masked")] * ROW], step)
    chosen = any_strategy(name, **NUMBERS) if name in STRATEGIES else policy(name, bias)
    choice, _ = CHOOSE(chosen, keys_and_uniforms(step)[0], seen)
    candidates, revealed = np.asarray(seen.candidates), np.asarray(choice.reveal)
    assert not (revealed & ~candidates).any()
    if name in (*IN_EACH_ROUND, *LAWS):
        assert (revealed.any(axis=1) == candidates.any(axis=1)).all(), "it waits: IN_EACH_ROUND lists those that do not"
    elif step == STEPS - 1:
        assert (revealed == candidates).all(), "what waits has ended by the last step"
    if choice.remask is not None:
        assert not (np.asarray(choice.remask) & np.asarray(seen.is_masked | ~seen.in_block | ~seen.is_asked)).any()


@EVERY_STRATEGY
def test_it_acts_inside_the_block_and_follows_its_key(name):
    row = [(0.625, 0.25, 0.25, s) for s in ("given", "revealed", "masked", "masked", "masked", "outside")]
    seen = observation([row], step=2)
    keys, strategy = keys_and_uniforms(0)[0], any_strategy(name, **NUMBERS)
    choice, _ = CHOOSE(strategy, keys, seen)
    assert not np.asarray(choice.reveal)[:, [0, 1, 5]].any()
    assert not np.asarray(choice.remask)[:, [0, 2, 3, 4, 5]].any()
    reads, remasks = definition_of(name)
    assert choice.remask.any() == choice.goes_on.any() == remasks
    again, _ = CHOOSE(strategy, keys, seen)
    assert all((a == b).all() for a, b in zip(jax.tree.leaves(choice), jax.tree.leaves(again), strict=True))
    other, _ = CHOOSE(strategy, keys_and_uniforms(1)[0], seen)
    assert ("u" in reads) != bool((other.reveal == choice.reveal).all())


BLOCKS = {"block_length": 2}
CACHED = {"block_length": 2, "cache": "dual"}
WITH_BLOCKS = dict.fromkeys(("random", "threshold", "entropy_bound", "given", "remdm_loop"), BLOCKS)


@pytest.mark.parametrize(
    ("kind", "name", "options"),
    [
        *((OneProgram, name, WITH_BLOCKS.get(name, {})) for name in STRATEGIES),
        (GenerationConfig, "factor", CACHED),
        (GenerationConfig, "remdm_cap", CACHED),
    ],
)
def test_it_ends_with_the_answer_if_that_is_known_whatever_the_logits_and_compiles_once(kind, name, options):
    request, codes = text_request([1, -1, -1, 4, -1, -1, -1]), [1, 5, 0, 4, 2, 3, 3]
    answer = assemble(fakes.VOCABULARY, [text_request(codes)], 16).tokens
    # Without an end of its own a strategy would use up the evaluations, and not hang.
    config = kind(strategy=name, steps=4, temperature=0.0, max_nfe=40, **options)
    (sure,) = Generator(fakes.mixing(answer, is_sure=True), fakes.VOCABULARY).generate([request], config, seed=0)
    assert sure.example.segments[0].codes.tolist() == codes
    np.testing.assert_allclose(sure.log_probs, 0.0, atol=1e-3)
    planned = not strategy_parameters(name) and definition_of(name)[0] & TIME
    assert not planned or sure.nfe <= (4 if not options else 6)
    fakes.TRACES.clear()
    for logit in (0.0, math.nan, math.inf, -math.inf):
        (lost,) = Generator(fakes.flat(fakes.mixing(answer), logit), fakes.VOCABULARY).generate(
            [request], config, seed=0
        )
        assert 1 <= lost.nfe <= 5 + 4, "as many evaluations as masks and steps"
    for size in (7, 8, 9):
        numbers = {n: type(NUMBERS[n])(NUMBERS[n] * (0.9 + 0.01 * size)) for n in strategy_parameters(name)}
        changed = dataclasses.replace(config, steps=size, temperature=0.1 * size, **numbers)
        generator = Generator(fakes.mixing(answer), fakes.VOCABULARY)
        (other,) = generator.generate([text_request([-1] * size)], changed, seed=size)
        assert (other.example.segments[0].codes >= 0).all()
    assert not fakes.TRACES


CORRELATED = np.array([[[0.02, 0.10], [0.20, 0.03]], [[0.25, 0.05], [0.05, 0.30]]])
INDEPENDENT = np.einsum("i,j,k->ijk", [0.2, 0.8], [0.5, 0.5], [0.7, 0.3])
COUNT = 4000


SAMPLE = jax.jit(sampler.sample)


def frequencies(denoise, config):
    request = text_request([-1, -1, -1])
    row = assemble(fakes.VOCABULARY, [request], 5)
    rows = jax.tree.map(lambda x: jnp.broadcast_to(x, (COUNT, *x.shape)), row)
    state = initial_state(rows, request_keys(np.uint32(0), request_words([request] * COUNT)), fakes.MASK)
    rules = dataclasses.replace(config.rules(fakes.VOCABULARY), eos_id=None)
    final, _ = SAMPLE(denoise, config.strategy_function, rules, state)
    codes = np.asarray(final.sequence.tokens)[:, 2:5] - fakes.TEXT_IDS.start
    return np.array([(codes == c).all(axis=1).mean() for c in itertools.product((0, 1), repeat=3)]).reshape(2, 2, 2)


@pytest.mark.parametrize("name", ["random", "first_hitting", "entropy_bound", "given"])
def test_one_token_at_a_time_is_a_sample_of_the_joint_distribution(name):
    config = OneProgram(strategy=name, steps=3, **({"entropy_bound": 0.0} if name == "entropy_bound" else {}))
    five_deviations = 5 * np.sqrt(CORRELATED * (1 - CORRELATED) / COUNT)
    assert (np.abs(frequencies(fakes.joint(CORRELATED), config) - CORRELATED) < five_deviations).all()


@pytest.mark.parametrize("name", ["ancestral", "remdm_cap", "remdm_loop"])
def test_orders_blind_to_the_tokens_leave_independent_ones_as_they_are(name):
    config = OneProgram(strategy=name, steps=12, **{n: NUMBERS[n] for n in strategy_parameters(name)})
    five_deviations = 5 * np.sqrt(INDEPENDENT * (1 - INDEPENDENT) / COUNT)
    assert (np.abs(frequencies(fakes.joint(INDEPENDENT), config) - INDEPENDENT) < five_deviations).all()


def exact(name, p):
    """The distribution of answers under a strategy that looks at the drawn tokens, by enumerating all draws."""
    result = np.zeros(p.shape)

    def go(known, probability):
        masked = [i for i in range(3) if i not in known]
        if not masked:
            result[tuple(known[i] for i in range(3))] += probability
            return
        weight = p
        for place, code in known.items():
            weight = weight * np.eye(2)[code].reshape([-1 if axis == place else 1 for axis in range(3)])
        weight = weight / weight.sum()
        marginal = [weight.sum(axis=tuple(a for a in range(3) if a != i)) for i in range(3)]
        step = 3 - len(masked)
        for draws in itertools.product((0, 1), repeat=len(masked)):
            drawn = dict(zip(masked, draws, strict=True))
            chance = math.prod(marginal[i][d] for i, d in drawn.items())
            confidence = {i: np.float32(marginal[i][drawn.get(i, 0)]) for i in range(3)}
            time = {"t": 1 - step / 3, "s": 1 - (step + 1) / 3}
            chosen = ORACLES[name]({"candidates": masked, "confidence": confidence, "asked": [0, 1, 2], **time})
            go(known | {i: drawn[i] for i in chosen}, probability * chance)

    go({}, 1.0)
    return result


@pytest.mark.parametrize("name", ["confidence", "threshold", "factor"])
def test_orders_that_look_at_the_tokens_sample_what_their_definition_says(name):
    config = OneProgram(strategy=name, steps=3, **{n: NUMBERS[n] for n in strategy_parameters(name)})
    expected = exact(name, CORRELATED)
    assert np.abs(expected - CORRELATED).max() > 0.01
    five_deviations = 5 * np.sqrt(expected * (1 - expected) / COUNT) + 1e-6
    assert (np.abs(frequencies(fakes.joint(CORRELATED), config) - expected) < five_deviations).all()


def test_a_given_order_is_followed():
    config = GenerationConfig(strategy="given", order=(2, 0, 1), steps=3)
    request = text_request([-1, 3, -1, -1])
    (path,) = Generator(fakes.mixing(), fakes.VOCABULARY).trajectories([request], config, seed=0)
    known = [np.flatnonzero(state.example.segments[0].codes >= 0).tolist() for state in path]
    assert known == [[1], [1, 3], [0, 1, 3], [0, 1, 2, 3]]
    others = [text_request([-1] * masks + [1] * (17 - masks)) for masks in (16, 2)]
    with pytest.raises(ValueError, match="order has 3 indices, and the requests have 2, 16 masked codes"):
        Generator(fakes.mixing(), fakes.VOCABULARY).generate(others, config, seed=0)


def test_the_cosine_grid_reveals_few_at_first():
    config = GenerationConfig(strategy="confidence", grid="cosine", steps=4, stop_at_eos=False)
    (path,) = Generator(fakes.mixing(), fakes.VOCABULARY).trajectories([text_request([-1] * 16)], config, seed=0)
    left = [int((state.example.segments[0].codes < 0).sum()) for state in path]
    shares = [math.cos(math.pi / 2 * step / 4) for step in range(4)]
    expected = [16]
    for now, then in itertools.pairwise(shares):
        expected.append(math.floor(expected[-1] * then / now))
    assert left == [*expected, 0] and expected[1] == 14


def test_the_help_names_the_strategies_of_the_table_and_no_others():
    words = re.sub(r"[^\w-]+", " ", tyro.extras.get_parser(GenerationConfig).format_help())
    listed = re.search(r"--strategy STR .*? each step reveals (.*?) or a trained policy", words)
    assert listed is not None
    assert listed[1].split() == list(STRATEGIES)


def test_a_strategy_takes_its_own_parameters_and_no_others():
    assert GenerationConfig().strategy in STRATEGIES
    for name in STRATEGIES:
        chosen = GenerationConfig(strategy=name, **{n: NUMBERS[n] for n in strategy_parameters(name)}).strategy_function
        assert chosen.func is STRATEGIES[name]
        assert chosen.keywords == {n: NUMBERS[n] for n in strategy_parameters(name)}
    require_used_fields(GenerationConfig(strategy="leftmost", threshold=0.5), GenerationConfig())
    with pytest.raises(ValueError, match="threshold is a parameter of threshold or leftmost, not of random"):
        require_used_fields(GenerationConfig(strategy="random", threshold=0.5), GenerationConfig())
    with pytest.raises(ValueError, match=r"no strategy 'best'; there are random, .*remdm_loop"):
        GenerationConfig(strategy="best")
