"""The environments: Gymnasium's contract, and that they are the sampler, no more and no less."""

import copy
import dataclasses
import warnings
from functools import partial
from multiprocessing.reduction import ForkingPickler
from pathlib import Path

import fakes
import gymnasium
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fakes import MASK, TEXT_IDS, VOCABULARY, text_request
from gymnasium import wrappers
from gymnasium.error import ResetNeeded
from gymnasium.utils.env_checker import check_env, data_equivalence
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from gymnasium.wrappers.vector import RecordEpisodeStatistics

from trimask.diffusion.sampling import sampler
from trimask.diffusion.sampling.generation_config import GenerationConfig
from trimask.diffusion.sampling.guidance import generation_denoiser
from trimask.diffusion.sampling.learned import LearnedStrategy
from trimask.diffusion.sampling.policy import PolicyConfig, new_policy_parameters, policy_logits
from trimask.diffusion.sampling.state import Choice, initial_state
from trimask.diffusion.sampling.strategies import STRATEGIES
from trimask.sampling_rl import environment
from trimask.sampling_rl.environment import UnmaskingEnv, UnmaskingVectorEnv
from trimask.sampling_rl.episode_batch import UnmaskingConfig
from trimask.sampling_rl.problems import Problem, ProblemSet
from trimask.sampling_rl.reward import RewardConfig
from trimask.sampling_rl.rollout import gather_asked, scatter_asked
from trimask.tokenizers.sequence import Example, assemble, disassemble, stack_rows

NAME = "trimask/Unmasking-v0"


def media(modality, codes):
    return Example.of_task(
        VOCABULARY.tasks[f"text_to_{modality}"], {"text": np.array([1, 2]), modality: np.array(codes)}
    )


REQUESTS = [
    text_request([1, -1, -1, 2, -1, -1, -1]),
    text_request([-1] * 3),
    media("audio", [[-1, -1], [2, -1], [-1, -1]]),
    media("image", [[-1, -1, -1], [0, -1, -1]]),
]


def rightness(problems, examples):
    """Share of the asked tokens that are revealed."""
    asked = [problem.length for problem in problems]
    masked = [sum((segment.codes < 0).sum() for segment in example.segments) for example in examples]
    return 1 - np.array(masked) / np.array(asked)


def problems_of(*requests, grade=rightness):
    return ProblemSet("some", VOCABULARY, [Problem(request, {}) for request in requests], grade)


PROBLEMS = problems_of(*REQUESTS)
EVERYTHING = np.ones(PROBLEMS.length, bool)
# Few kinds, because each is compiled.
HOT = UnmaskingConfig(block_length=3, temperature=20.0, inputs=("confidence", "top"), num_top=2)
GUIDED = UnmaskingConfig(guidance=1.5, temperature=1.0, stop_at_eos=False)


@pytest.fixture(autouse=True)
def no_warnings():
    """Turns Gymnasium's warnings into errors."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def make(**options):
    return gymnasium.make(NAME, **({"problems": PROBLEMS, "denoise": fakes.mixing()} | options))


def make_vec(num_envs, **options):
    return gymnasium.make_vec(NAME, num_envs, **({"problems": PROBLEMS, "denoise": fakes.mixing()} | options))


@pytest.mark.parametrize("config", [UnmaskingConfig(), HOT])
def test_gymnasium_has_nothing_to_complain_of(config):
    check_env(make(config=config).unwrapped)


def odd_places_only(keys, seen, memory):
    """A strategy that never reveals even positions, so that they are given up."""
    return Choice(jnp.broadcast_to(jnp.arange(seen.is_masked.shape[1]) % 2 == 1, seen.is_masked.shape)), memory


@pytest.mark.parametrize(
    ("strategy", "config"),
    [
        (STRATEGIES["random"], UnmaskingConfig(temperature=1.0, steps=3)),
        (partial(STRATEGIES["threshold"], threshold=0.6), UnmaskingConfig()),
        (STRATEGIES["confidence"], HOT),
        (odd_places_only, dataclasses.replace(HOT, temperature=0.0)),
        (partial(STRATEGIES["entropy_bound"], entropy_bound=0.5), GUIDED),
    ],
)
def test_an_environment_that_a_strategy_drives_is_the_sampler(strategy, config):
    @jax.jit
    def act(state, seen):
        choice, _ = strategy(sampler.step_keys(state)[1], seen, None)
        return gather_asked(choice.reveal, state.is_asked, PROBLEMS.length)

    alone = UnmaskingEnv(PROBLEMS, fakes.mixing(), config=config)
    found, keys = [], []
    for number in range(4):
        alone.reset(seed=7 + number, options={"problem": number})
        keys.append(alone.state.keys)
        ended = False
        while not ended:
            *_, ended, _, info = alone.step(act(alone.state, alone.sampler_observation)[0])
        found.append((info["tokens"].tolist(), info["nfe"], info["gave_up"]))

    together = UnmaskingVectorEnv(PROBLEMS, fakes.mixing(), num_envs=4, config=config)
    together.reset(seed=7, options={"problem": range(4)})
    first = {}
    while len(first) < 4:
        *_, infos = together.step(act(together.state, together.sampler_observation))
        for row in np.flatnonzero(infos.get("_final_info", [])):
            info = infos["final_info"]
            first.setdefault(row, (info["tokens"][row].tolist(), info["nfe"][row], info["gave_up"][row]))
    assert [first[row] for row in range(4)] == found

    # The sampler, with rows that are longer.
    rows = stack_rows([assemble(VOCABULARY, [request], 17) for request in REQUESTS])
    guidance = config.guidance_settings
    sample = jax.jit(partial(sampler.sample, generation_denoiser(fakes.mixing(), VOCABULARY, guidance), strategy))
    final, _ = sample(alone.rules, initial_state(jax.tree.map(jnp.asarray, rows), jnp.concatenate(keys), MASK))
    for number, (tokens, nfe, gave_up) in enumerate(found):
        (example,) = disassemble(VOCABULARY, jax.tree.map(lambda x, row=number: np.asarray(x[row]), final.sequence))
        asked = REQUESTS[number].segments[-1].codes < 0
        expected = example.segments[-1].codes[asked].tolist()
        assert tokens == expected + [-1] * (PROBLEMS.length - len(expected))
        assert nfe == final.nfe[number] and gave_up == expected.count(-1)


EVERY = ("confidence", "top", "margin", "entropy", "hidden")
SEES_ALL = PolicyConfig(inputs=EVERY, num_top=3, hidden_size=VOCABULARY.size, width=8, mlp_width=8, num_heads=1)


def learned(config, only):
    """A policy with random weights that looks at one of its inputs, and sometimes reveals too little in time."""
    rng = np.random.default_rng(1)
    shapes = jax.eval_shape(partial(new_policy_parameters, config, block_length=3), jax.random.key(0))
    parameters = jax.tree.map(lambda leaf: 0.5 * rng.normal(size=leaf.shape).astype(leaf.dtype), shapes)
    parameters["output"]["bias"] -= 2
    sizes = {"top": config.num_top, "hidden": config.hidden_size}
    of_feature = np.repeat(config.inputs, [sizes.get(name, 1) for name in config.inputs])
    parameters["input"]["kernel"] *= (of_feature == only)[:, None]
    return LearnedStrategy(config, parameters, is_forced=False)


@jax.jit
def acted(policy, state, seen):
    """Action and logits of the policy at the asked positions, from the sampler's observation."""
    ranks, logits = policy.act(sampler.step_keys(state)[1], seen)
    return gather_asked(ranks > 0, state.is_asked, PROBLEMS.length), gather_asked(
        logits, state.is_asked, PROBLEMS.length
    )


@jax.jit
def judged(policy, shown):
    """Logits of the policy from nothing but the observations of agents."""
    parts = [jnp.asarray(shown[name]) for name in policy.config.inputs]
    features = jnp.concatenate([x if x.ndim == 3 else x[..., None] for x in parts], axis=-1)
    is_masked, is_asked = (jnp.asarray(shown[name]).astype(bool) for name in ("is_masked", "is_asked"))
    steps = jnp.round(shown["progress"][:, 0] * is_asked.sum(axis=-1)).astype(jnp.int32)
    logits = policy_logits(policy.config, policy.parameters, features, is_masked, is_asked, steps)
    return jnp.where(is_asked, logits, 0.0)


@jax.jit
def sampled(policy, rules, state):
    """Final state of the sampler with the policy, and the logits of every step."""

    def act(keys, seen, logits):
        ranks, new = policy.act(keys, seen)
        step = jnp.where(seen.in_block.any(axis=-1), seen.steps_taken, 1 << 30)
        new = gather_asked(new, seen.is_asked, PROBLEMS.length)
        return Choice(ranks > 0), logits.at[jnp.arange(len(step)), step].set(new, mode="drop")

    denoise = generation_denoiser(fakes.mixing(), VOCABULARY, None)
    return sampler.sample(denoise, act, rules, state, jnp.zeros((len(state.step), 8, PROBLEMS.length)))


@pytest.mark.parametrize("block_length", [None, 3])
@pytest.mark.parametrize("only", EVERY)
def test_an_environment_that_a_policy_drives_is_the_sampler(only, block_length):
    """Tokens and evaluations are equal, and the logits of every step, also those from what agents observe."""
    policy, asked = learned(SEES_ALL, only), UnmaskingConfig.of_policy(SEES_ALL, block_length=block_length)
    alone = UnmaskingEnv(PROBLEMS, fakes.mixing(), config=asked)
    together = UnmaskingVectorEnv(PROBLEMS, fakes.mixing(), num_envs=4, config=asked)
    shown_together, _ = together.reset(seed=7, options={"problem": range(4)})
    rows = stack_rows([assemble(VOCABULARY, [request], 17) for request in REQUESTS])
    begun = initial_state(jax.tree.map(jnp.asarray, rows), together.state.keys, MASK)
    # The rules of the policy's own training, whatever the environment's are.
    rules = SEES_ALL.extended_rules(GenerationConfig(temperature=0.0, block_length=block_length).rules(VOCABULARY))
    rules = dataclasses.replace(rules, gives_up_after=block_length or PROBLEMS.length)
    final, logits = sampled(policy, rules, begun)

    expected = []
    for number in range(4):
        (example,) = disassemble(VOCABULARY, jax.tree.map(lambda x, row=number: np.asarray(x[row]), final.sequence))
        codes = example.segments[-1].codes[REQUESTS[number].segments[-1].codes < 0].tolist()
        padded = codes + [-1] * (PROBLEMS.length - len(codes))
        expected.append((padded, int(final.nfe[number]), codes.count(-1)))
    assert 0 < sum(gave_up for *_, gave_up in expected) < 18, "some positions are given up, and some are revealed"
    is_equal = partial(np.testing.assert_allclose, atol=1e-4)  # rows of another length are summed in another order

    for number in range(4):
        shown, _ = alone.reset(seed=7 + number, options={"problem": number})
        ended, step = False, 0
        while not ended:
            bits, found = acted(policy, alone.state, alone.sampler_observation)
            agents = judged(policy, {name: value[None] for name, value in shown.items()})
            is_equal(found[0], logits[number, step])
            is_equal(agents[0], logits[number, step])
            shown, _, ended, _, info = alone.step(bits[0])
            assert shown in alone.observation_space
            step += 1
        assert (info["tokens"].tolist(), info["nfe"], info["gave_up"]) == expected[number]

    first: dict = {}
    while len(first) < 4:
        bits, found = acted(policy, together.state, together.sampler_observation)
        agents, steps = judged(policy, shown_together), np.asarray(together.state.step)
        for row in set(range(4)) - set(first):
            is_equal(found[row], logits[row, steps[row]])
            is_equal(agents[row], logits[row, steps[row]])
        shown_together, _, ended, _, infos = together.step(bits)
        assert infos["_gave_up"].all() and shown_together in together.observation_space
        for row in np.flatnonzero(ended):
            info = infos["final_info"]
            first.setdefault(row, (info["tokens"][row].tolist(), info["nfe"][row], info["gave_up"][row]))
    assert [first[row] for row in range(4)] == expected


def test_a_batch_is_its_environments_one_by_one():
    """Observations, rewards, ends and infos, through several episodes of Gymnasium's own vector environment."""
    alone = partial(UnmaskingEnv, PROBLEMS, fakes.mixing(), config=HOT)
    slow = SyncVectorEnv([alone] * 4, autoreset_mode=AutoresetMode.SAME_STEP)
    quick = make_vec(4, config=HOT)
    assert quick.metadata["autoreset_mode"] == AutoresetMode.SAME_STEP
    assert (quick.observation_space, quick.single_observation_space) == (
        slow.observation_space,
        slow.single_observation_space,
    )
    assert (quick.action_space, quick.single_action_space) == (slow.action_space, slow.single_action_space)
    assert data_equivalence(quick.reset(seed=5), slow.reset(seed=5), exact=True)
    quick.action_space.seed(0)
    ends = np.zeros(4, int)
    for _ in range(20):
        actions = quick.action_space.sample() & quick.action_space.sample()
        new, old = quick.step(actions), slow.step(actions)
        assert data_equivalence(new, old, exact=True)
        assert new[0] in quick.observation_space
        ends += new[2]
    assert ends.min() >= 2
    for seed in (None, [4, None, 4, 5]):
        assert data_equivalence(quick.reset(seed=seed), slow.reset(seed=seed), exact=True)


def episode(env, **reset):
    """Every observation, reward and info of an episode of random actions."""
    path = [env.reset(**reset)]
    rng = np.random.default_rng(0)
    while len(path[-1]) == 2 or not path[-1][2]:
        path.append(env.step(rng.integers(0, 2, PROBLEMS.length)))
    return path


def test_blocks_longer_than_what_is_asked_are_full_diffusion():
    rules = [UnmaskingConfig(block_length=length).episode_rules(VOCABULARY, 6) for length in (None, 4, 99)]
    assert [of_length.gives_up_after for of_length in rules] == [6, 4, 6]


def test_a_seed_fixes_the_problem_and_what_is_drawn():
    env = make(config=HOT)
    paths = [episode(env, seed=seed) for seed in (1, 2, 1)]
    assert data_equivalence(paths[0], paths[2], exact=True) and not data_equivalence(paths[0], paths[1])
    assert {env.reset(seed=seed)[1]["problem"] for seed in range(20)} == {0, 1, 2, 3}
    chosen = [episode(env, seed=seed, options={"problem": 2})[-1][-1] for seed in (1, 1, 2)]
    assert [info["problem"] for info in chosen] == [2, 2, 2]
    tokens = [info["tokens"].tolist() for info in chosen]
    assert tokens[0] == tokens[1] != tokens[2]
    # The next episode is another, and follows from the seed as well.
    env.reset(seed=1)
    after = episode(env)
    env.reset(seed=1)
    assert data_equivalence(after, episode(env), exact=True) and not data_equivalence(after, paths[0])


def counting():
    """A denoiser, and the number of rows of each of its passes."""
    rows = []

    def denoise(sequence, positions=None, cache=None):
        jax.debug.callback(lambda tokens: rows.append(len(tokens)), sequence.tokens)
        return fakes.mixing()(sequence, positions, cache)

    return denoise, rows


def test_every_pass_is_of_rows_with_masks_and_counted():
    denoise, passes = counting()
    env = make(denoise=denoise)
    nfe = [episode(env, seed=seed)[-1][-1]["nfe"] for seed in range(3)]
    jax.effects_barrier()
    assert passes == [1] * sum(nfe) and sum(nfe) > 3

    denoise, passes = counting()
    envs = make_vec(4, denoise=denoise)
    envs.reset(seed=0)
    envs.action_space.seed(0)
    spent = 0
    for _ in range(10):
        *_, infos = envs.step(envs.action_space.sample())
        spent += infos["final_info"]["nfe"].sum() if "final_info" in infos else 0
    jax.effects_barrier()
    # Every row of every pass was used, except those of the last pass, which no step has used yet.
    assert passes == [4] * 11 and spent + infos["nfe"].sum() == 4 * 10 and spent > 0


def test_everything_is_compiled_once():
    traces = []

    def denoise(sequence, positions=None, cache=None):
        traces.append(len(sequence.tokens))
        return fakes.mixing()(sequence, positions, cache)

    env = make(denoise=denoise)
    for number in range(4):
        episode(env, options={"problem": number})
    assert traces == [1]


def test_observations_are_of_what_is_asked_in_the_order_of_the_row():
    logits = np.random.default_rng(0).normal(size=(11, VOCABULARY.size)).astype(np.float32)
    problems = problems_of(text_request([1, -1, -1, 2, -1]), text_request([3, -1, 3, 3, 3, 3, 3, 3, 3]))
    config = UnmaskingConfig(inputs=("top",), num_top=2, sees_beyond=False, block_length=3)
    env = make(problems=problems, denoise=fakes.fake(jnp.asarray(logits)), config=config)
    seen, info = env.reset(options={"problem": 0})
    text = np.exp(logits[:, TEXT_IDS.start : TEXT_IDS.stop])
    top = np.sort(text / text.sum(axis=-1, keepdims=True), axis=-1)[:, ::-1][:, :2]
    # Asked for are positions 3, 4 and 6; blocks of three positions begin at the first of them.
    np.testing.assert_allclose(seen["top"], [top[3], top[4], [0, 0]], rtol=1e-5)
    assert (seen["is_masked"].tolist(), seen["in_block"].tolist()) == ([1, 1, 1], [1, 1, 0])
    assert seen["progress"] == [0] and info["tokens"].tolist() == [-1, -1, -1]
    best = logits[:, TEXT_IDS.start : TEXT_IDS.stop].argmax(axis=-1)
    seen, *_, info = env.step(np.array([0, 1, 1]))
    np.testing.assert_allclose(seen["top"], [top[3], [0, 0], [0, 0]], rtol=1e-5)
    assert (seen["is_masked"].tolist(), seen["in_block"].tolist()) == ([1, 0, 1], [1, 1, 0])
    assert seen["progress"] == [np.float32(1 / 3)] and info["tokens"].tolist() == [-1, best[4], -1]
    seen, *_ = env.reset(options={"problem": 1})
    assert (seen["is_masked"].tolist(), seen["in_block"].tolist()) == ([1, 0, 0], [1, 0, 0])
    assert seen["top"][1:].max() == 0 and seen["is_asked"].tolist() == [1, 0, 0]


def test_agents_see_the_masks_of_later_blocks_unless_they_are_to_see_their_block_alone():
    for sees_beyond, seen in ((True, [1, 1, 1, 1, 1]), (False, [1, 1, 0, 0, 0])):
        env = make(config=dataclasses.replace(HOT, sees_beyond=sees_beyond))
        shown, _ = env.reset(seed=0, options={"problem": 2})  # two tokens of the first block, and three of the second
        assert (shown["confidence"] > 0).tolist() == (shown["top"][:, 1] > 0).tolist() == seen
        assert shown["in_block"].tolist() == [1, 1, 0, 0, 0]


def test_what_a_policy_takes_as_input_is_what_is_observed_for_it():
    policy = PolicyConfig(inputs=("top", "margin"), num_top=3, sees_beyond=False)
    config = UnmaskingConfig.of_policy(policy, block_length=4)
    assert (config.inputs, config.num_top, config.sees_beyond, config.block_length) == (("top", "margin"), 3, False, 4)
    # A policy's num_top says nothing unless top is an input.
    assert UnmaskingConfig.of_policy(PolicyConfig(num_top=50)) == UnmaskingConfig()
    with pytest.raises(ValueError, match="num_top has no effect without the input top and must be 8, got 2"):
        UnmaskingConfig(num_top=2)
    with pytest.raises(ValueError, match="inputs must be at least one, each once"):
        UnmaskingConfig(inputs=("margin", "margin"))


def test_bits_of_other_tokens_have_no_effect():
    env = make(config=HOT)
    env.reset(options={"problem": 2})  # two tokens of the first block of three positions, and three of the second
    tokens = []
    for bits, masked in (("01111", "10111"), ("01100", "10111"), ("10000", "00111"), ("11100", "00011")):
        seen, *_, info = env.step(np.array(list(bits), int))
        assert "".join(map(str, seen["is_masked"])) == masked
        tokens.append([code for code in info["tokens"].tolist() if code >= 0])
    assert [len(some) for some in tokens] == [1, 1, 2, 3] and tokens[0] == tokens[1]
    assert tokens[2][1:] == tokens[1] and tokens[3][:2] == tokens[2]
    env.reset(options={"problem": 1})  # three tokens
    seen, _, terminated, truncated, _ = env.step(np.array([0, 0, 0, 1, 1]))
    assert not terminated and not truncated and seen["is_masked"].tolist() == [1, 1, 1, 0, 0]


def test_places_of_what_is_asked_and_of_the_row_are_inverse():
    is_asked = jnp.array([[False, True, True, False, True], [False, False, False, True, False]])
    bits = jnp.array([[True, False, True], [True, True, True]])
    placed = scatter_asked(bits, is_asked)
    assert placed.tolist() == [[False, True, False, False, True], [False, False, False, True, False]]
    assert gather_asked(jnp.arange(5, 15).reshape(2, 5), is_asked, 3).tolist() == [[6, 7, 9], [13, 0, 0]]
    assert gather_asked(placed, is_asked, 3).tolist() == [[True, False, True], [True, False, False]]


@pytest.mark.parametrize(("config", "steps"), [(UnmaskingConfig(), 5), (HOT, 3 + 3)])
def test_what_is_not_revealed_in_time_is_given_up_which_ends_the_episode(config, steps):
    """The limit is a rule of the problem and is observed: no agent may bootstrap from the value of what is left."""
    env = make(config=config)
    env.reset(options={"problem": 2})
    path = [env.step(0 * EVERYTHING)]
    while not any(path[-1][2:4]):
        path.append(env.step(0 * EVERYTHING))
    seen, reward, terminated, truncated, info = path[-1]
    assert len(path) == info["nfe"] == steps
    # What a block before left is still seen as masked.
    assert all(before["is_masked"].tolist() == [1] * 5 for before, *_ in path[:-1])
    assert (terminated, truncated, reward, info["right"], info["tokens"].tolist()) == (True, False, 0, 0, [-1] * 5)
    # In blocks of three positions, two of which are asked in the first.
    assert [step[-1]["gave_up"] for step in path] == [0] * (steps - 1) + [5] if config != HOT else [0, 0, 2, 2, 2, 5]
    last = dict.fromkeys(seen, 0) | {"progress": np.float32(steps / 5), "is_asked": 1}
    assert {name: value.max() for name, value in seen.items()} == last
    assert seen in env.observation_space
    # A token revealed in the last step of a block counts, and the answer is judged with what is missing.
    env.reset(options={"problem": 2})
    for step in range(steps):
        _, reward, terminated, truncated, info = env.step(np.array([step == 2, 0, 0, 0, 0]))
    assert terminated and not truncated and info["right"] == pytest.approx(1 / 5) and info["gave_up"] == 4
    assert info["tokens"][0] >= 0 and reward == pytest.approx(1 / 5 * 1 / 5)


def test_the_reward_comes_at_the_end_from_the_problems_and_the_evaluations():
    judged = []

    def grade(problems, examples):
        judged.extend(zip(problems, examples, strict=True))
        return np.full(len(problems), 0.5)

    problems = problems_of(*REQUESTS, grade=grade)
    env = make(problems=problems, reward=RewardConfig(alpha=2.0))
    env.reset(options={"problem": 3})
    rewards = [env.step(np.array(bits))[1] for bits in ([1, 1, 0, 0, 0], [0, 0, 0, 0, 0])]
    assert rewards == [0, 0] and judged == []
    _, reward, terminated, truncated, info = env.step(np.array([0, 0, 1, 1, 1]))
    assert (terminated, truncated, info["nfe"], info["right"]) == (True, False, 3, 0.5)
    assert reward == pytest.approx(0.5 * ((5 - 3 + 1) / 5) ** 2)
    ((problem, example),) = judged
    assert problem is problems.problems[3]
    assert example.segments[1].codes.reshape(-1).tolist() == np.insert(info["tokens"], 3, 0).tolist()
    # With guidance a step is two evaluations, and rewards are any function of them.
    numbers = []

    def reward_of(right, nfe, length):
        numbers.append((right.tolist(), nfe.tolist(), length.tolist()))
        return -nfe

    envs = make_vec(4, problems=problems, reward=reward_of, config=GUIDED)
    envs.reset(options={"problem": [1, 0, 1, 2]})
    actions = np.ones((4, 5), int)
    actions[2] = 0
    seen, rewards, terminated, *_ = envs.step(actions)
    assert rewards.tolist() == [-2, -2, 0, -2] and terminated.tolist() == [True, True, False, True]
    np.testing.assert_allclose(seen["progress"][:, 0], [0, 0, 1 / 3, 0])
    assert numbers == [([0.5] * 3, [2] * 3, [3, 5, 5])]


@pytest.mark.parametrize(
    ("modality", "codes"), [("audio", [[2, 3], [0, 1], [1, 0]]), ("image", [[4, 0, 1], [2, 2, 3]])]
)
def test_pictures_and_sounds_are_tokens_too(modality, codes):
    request = media(modality, np.full(np.shape(codes), -1))
    answer = assemble(VOCABULARY, [media(modality, codes)], request.length).tokens
    env = make(problems=problems_of(request), denoise=fakes.mixing(answer, is_sure=True), render_mode="ansi")
    env.reset(seed=0)
    assert env.render() == f"text: 1 2\n{modality}: _ _ _ _ _ _"
    *_, info = env.step(np.array([1, 0, 1, 1, 1, 1]))
    flat = np.reshape(codes, -1).tolist()
    assert info["tokens"].tolist() == [flat[0], -1, *flat[2:]]
    assert env.render() == f"text: 1 2\n{modality}: {flat[0]} _ {' '.join(map(str, flat[2:]))}"
    _, _, terminated, _, info = env.step(np.ones(6, int))
    assert terminated and info["tokens"].tolist() == flat


def test_wrappers_work():
    env = wrappers.RecordEpisodeStatistics(wrappers.FlattenObservation(make(max_episode_steps=2)))
    seen, _ = env.reset(seed=0)
    assert seen.shape == (4 * PROBLEMS.length + 1,) and seen in env.observation_space
    env.step(0 * EVERYTHING)
    *_, truncated, info = env.step(0 * EVERYTHING)
    assert truncated and info["episode"]["l"] == 2 and "right" not in info
    env = wrappers.RecordEpisodeStatistics(make())
    env.reset()
    *_, terminated, _, info = env.step(EVERYTHING)
    assert terminated and info["episode"]["r"] == info["right"] == 1

    envs = RecordEpisodeStatistics(make_vec(4))
    envs.reset(seed=0)
    for _ in range(2):
        *_, infos = envs.step(np.stack([EVERYTHING] * 4))
    assert infos["episode"]["r"].tolist() == [1] * 4 and infos["episode"]["l"].tolist() == [1] * 4


QUESTIONS = {"checkpoint": 7, "split": "test", "max_problems": 3, "config": HOT, "reward": RewardConfig(alpha=2.0)}


@pytest.mark.parametrize("kind", [make, partial(make_vec, 2)], ids=["single", "vector"])
def test_an_environment_of_a_run_is_pickled_by_its_arguments(loaded, prepared, monkeypatch, kind):
    monkeypatch.setattr(environment, "load", fakes.opening(loaded, Path("runs/tiny"), 7))
    env = kind(problems=None, denoise=None, run="runs/tiny", **QUESTIONS).unwrapped
    assert (env.episodes.problems.name, len(env.episodes.problems.problems)) == ("sums text test", 3)
    pickled = bytes(ForkingPickler.dumps(env))
    assert len(pickled) < 4_000, "the model's weights are not in it"
    other = ForkingPickler.loads(pickled)
    assert other.episodes is not env.episodes and type(other) is type(env)
    assert (other.episodes.config, other.episodes.reward) == (HOT, RewardConfig(alpha=2.0))
    assert (other.observation_space, other.action_space) == (env.observation_space, env.action_space)
    assert (other.episodes.problems.name, len(other.episodes.problems.problems)) == ("sums text test", 3)
    elsewhere = kind(problems=None, denoise=None, run="runs/tiny", data=str(prepared.folder), task="audio_to_text",
                     checkpoint=7, judge="exact_match")  # fmt: skip
    assert elsewhere.unwrapped.episodes.problems.name == "spoken audio_to_text train"


def test_an_environment_that_was_given_a_model_is_not_pickled_but_copied():
    def denoise(sequence, positions=None, cache=None):
        return fakes.mixing()(sequence, positions, cache)

    for env in (make(denoise=denoise), make_vec(2, denoise=denoise), make()):
        with pytest.raises(TypeError, match=r"given `denoise` cannot be pickled .* run=FOLDER"):
            ForkingPickler.dumps(env)
    env = make(config=HOT)
    env.reset(seed=3)
    env.step(np.array([1, 0, 1, 0, 0]))
    twin = copy.deepcopy(env)
    rest = [env.step(EVERYTHING), env.step(EVERYTHING)]
    assert data_equivalence([twin.step(EVERYTHING), twin.step(EVERYTHING)], rest, exact=True)


@pytest.mark.parametrize(
    ("given", "got"),
    [
        ({"problems": None, "denoise": None}, "nothing"),
        ({"denoise": None}, "problems"),
        ({"run": "runs/tiny"}, "problems, denoise, run"),
        ({"split": "test"}, "problems, denoise, split"),
        ({"checkpoint": 7}, "problems, denoise, checkpoint"),
        ({"problems": None, "denoise": None, "task": "text"}, "task"),
    ],
    ids=str,
)
def test_an_environment_is_of_problems_and_a_model_or_of_a_run(given, got):
    for kind in (make, partial(make_vec, 2)):
        with pytest.raises(ValueError, match=f"give `problems` and `denoise`, or `run`, .*; got {got}$"):
            kind(**given)


@pytest.mark.parametrize(
    ("action", "message"),
    [
        (np.ones(4, int), r"an action is an array \(5,\) of 0 and 1, got one of shape \(4,\)"),
        (1, r"got one of shape \(\)"),
        (np.array([0, 1, 2, 0, 0]), "got one with .*2"),
        (np.full(5, np.nan), "got one with .*nan"),
    ],
)
def test_what_is_no_action_is_refused(action, message):
    env = UnmaskingEnv(PROBLEMS, fakes.mixing())
    env.reset(seed=0)
    with pytest.raises(ValueError, match=message):
        env.step(action)
    with pytest.raises(ValueError, match=r"an action is an array \(4, 5\) of 0 and 1, got one of shape \(5,\)"):
        make_vec(4).step(EVERYTHING)


def test_there_is_no_step_before_and_after_an_episode():
    for env in (UnmaskingEnv(PROBLEMS, fakes.mixing()), make_vec(1)):
        with pytest.raises(ResetNeeded, match="reset the environment first"):
            env.step(np.ones(env.action_space.shape, int))
    env = UnmaskingEnv(PROBLEMS, fakes.mixing())
    env.reset()
    env.step(EVERYTHING)
    with pytest.raises(ResetNeeded, match="it is over"):
        env.step(EVERYTHING)
    env.reset()
    env.step(EVERYTHING)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"problems": 1}, "reset takes one option, problem; got problems"),
        ({"problem": 4}, r"problem must lie in \[0, 4\), got 4"),
        ({"problem": -1}, "got -1"),
        ({"problem": 1.5}, r"or one for each of 2 rows, got 1\.5"),
        ({"problem": [1, 2, 3]}, r"or one for each of 2 rows, got \[1, 2, 3\]"),
    ],
)
def test_impossible_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        make_vec(2).reset(options=options)
    with pytest.raises(ValueError, match="a seed for each of 2 sub-environments, got 3"):
        make_vec(2).reset(seed=[1, 2, 3])


@pytest.mark.parametrize(
    "bad", [{"num_top": 0}, {"block_length": 0}, {"temperature": -1.0}, {"guidance": -2.0}], ids=str
)
def test_impossible_settings_are_refused(bad):
    ((name, value),) = bad.items()
    with pytest.raises(ValueError, match=f"{name} must .*{value}"):
        UnmaskingConfig(**bad)


@pytest.mark.parametrize(
    "other",
    [
        {"strategy": "random"},
        {"threshold": 0.5},
        {"cache": "dual"},
        {"max_nfe": 3},
        {"patience": 2},
        {"grid": "cosine"},
    ],
    ids=str,
)
def test_settings_that_an_agent_takes_the_place_of_are_refused(other):
    (*_, (name, value)) = other.items()
    with pytest.raises(ValueError, match=f"{name} has no effect in an environment .*got {value!r}"):
        UnmaskingConfig(**other)
