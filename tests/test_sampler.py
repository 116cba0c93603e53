"""Observe, reveal, blocks, rounds and requests; against fake denoisers, and against a network where caches matter."""

import dataclasses
import itertools

import fakes
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fakes import MASK, VOCABULARY, begin, text_request
from jax.tree_util import Partial

from trimask.diffusion.masking import MaskingConfig
from trimask.diffusion.sampling import sampler
from trimask.diffusion.sampling.generation_config import GenerationConfig
from trimask.diffusion.sampling.generator import Generator
from trimask.diffusion.sampling.guidance import Guidance, guided, restricted
from trimask.diffusion.sampling.state import Choice, Rules
from trimask.diffusion.sampling.strategies import STRATEGIES
from trimask.diffusion.schedule import COSINE, LINEAR, ScheduleConfig
from trimask.diffusion.transformer import Transformer, TransformerConfig
from trimask.tokenizers.sequence import Example, Segment, assemble

RULES = Rules(mask_id=MASK)
EOS = VOCABULARY.eos_code
CACHED = {"strategy": "threshold", "threshold": 0.2, "block_length": 4, "cache": "dual", "refresh_every": 100}
enter_blocks, reveal, sample = map(jax.jit, (sampler.enter_blocks, sampler.reveal, sampler.sample))


@jax.jit
def observe(logits, state, rules):
    """Observation of a state by a denoiser with these logits."""
    keys = jax.random.split(jax.random.key(0), len(state.step))
    return sampler.observe(keys, fakes.fake(logits), state, rules)[0]


def codes(answer):
    return answer.example.segments[-1].codes.reshape(-1).tolist()


@pytest.fixture(scope="module")
def network():
    """A transformer with large random weights, so that its choices differ and depend on its input.

    It has two layers, since keys and values of the first depend only on their own token, and are never out of date.
    """
    model = Transformer(TransformerConfig(num_layers=2, width=32, num_heads=2), VOCABULARY, key=jax.random.key(0))
    model.unembedding[...] = 3.0 * jax.random.normal(jax.random.key(1), model.unembedding.shape)
    for block in model.blocks:
        block.attention.out[...] *= 10.0
    return lambda sequence, positions=None, cache=None: model(sequence, positions, cache)


def test_reveal_writes_nothing_but_what_was_chosen_and_remasks_only_what_was_asked():
    before = enter_blocks(begin([text_request([1, -1, -1, -1])], 8), RULES)
    seen = observe(jnp.zeros(VOCABULARY.size), before, RULES)
    once = reveal(before, seen, Choice(jnp.ones((1, 8), bool).at[0, 4].set(False)), RULES)
    first = int(fakes.TEXT_IDS.start)
    assert once.is_masked[0].tolist() == [False] * 4 + [True] + [False] * 3
    assert (np.asarray(once.sequence.tokens[0, [3, 5]]) == np.asarray(seen.proposal[0, [3, 5]])).all()
    assert once.sequence.tokens[0, 2] == first + 1 and once.nfe == 1
    seen = observe(jnp.zeros(VOCABULARY.size), once, RULES)
    everything = jnp.ones((1, 8), bool)
    again = reveal(once, seen, Choice(~everything, everything), RULES)
    # The given text and the row's task and boundary stay; the two revealed are masked again.
    assert again.is_masked[0].tolist() == [False] * 3 + [True] * 3 + [False] * 2
    assert again.sequence.tokens[0].tolist() == [
        *once.sequence.tokens[0, :3].tolist(),
        MASK,
        MASK,
        MASK,
        *once.sequence.tokens[0, 6:].tolist(),
    ]
    np.testing.assert_allclose(again.commit_confidence[0], [1, 1, 1, 0, 0, 0, 1, 1])


def test_evaluations_are_counted_only_while_a_row_has_masks():
    requests = [text_request([1, -1, 3]), text_request([-1, -1, -1]), text_request([1, 2, 3])]
    answer = assemble(VOCABULARY, [text_request([1, 2, 3])], 5).tokens
    rules = dataclasses.replace(RULES, num_steps=3)
    strategy = Partial(STRATEGIES["confidence"])
    final, _ = sample(fakes.knows(answer), strategy, rules, begin(requests, 5))
    assert final.nfe.tolist() == final.step.tolist() == [1, 3, 0] and final.is_done.all()
    both = Partial(guided(fakes.knows(answer), Guidance(1.0), MASK))
    final, _ = sample(both, strategy, rules, begin(requests, 5))
    assert final.nfe.tolist() == [2, 6, 0]


def test_blocks_are_filled_from_left_to_right_and_share_the_steps():
    request = text_request([1, -1, -1, -1, 2, -1, -1, -1])
    config = GenerationConfig(block_length=3, steps=6, stop_at_eos=False)
    (path,) = Generator(fakes.mixing(), VOCABULARY).trajectories([request], config, seed=0)
    masked = [np.flatnonzero(state.example.segments[0].codes < 0).tolist() for state in path]
    assert masked[0] == [1, 2, 3, 5, 6, 7] and masked[-1] == []
    for before, after in itertools.pairwise(masked):
        start = min(before) - (min(before) - 1) % 3  # blocks begin at the first asked position
        assert set(before) - set(after) <= set(range(start, start + 3))
    # Six steps over three blocks are two each: ⌈3/2⌉ and the rest of positions 1–3; 5 and 6; 7.
    assert [len(m) for m in masked] == [6, 4, 3, 2, 1, 0]


@pytest.mark.parametrize("steps", [3, 5, 7, 12])
def test_steps_over_blocks_add_up_to_the_plan(steps):
    config = GenerationConfig(block_length=3, steps=steps, stop_at_eos=False)
    (answer,) = Generator(fakes.mixing(), VOCABULARY).generate([text_request([-1] * 12)], config, seed=0)
    assert answer.nfe == max(steps, 4)


def test_what_is_given_up_stays_masked_and_costs_nothing_more():
    def nothing_at_odd_places(keys, seen, memory):
        return Choice(jnp.broadcast_to(jnp.arange(16) % 2 == 0, seen.is_masked.shape)), memory

    rules = Rules(mask_id=MASK, block_length=4, gives_up_after=3, eos_id=VOCABULARY.eos_id)
    state, _ = sample(fakes.mixing(), Partial(nothing_at_odd_places), rules, begin([text_request([-1] * 8)], 16))
    # Positions 2 to 9; in each block of four the odd ones are given up after three steps.
    assert state.is_done.all() and state.nfe.item() == state.step.item() == 6
    assert np.flatnonzero(np.asarray(state.sequence.tokens[0]) == MASK).tolist() == [3, 5, 7, 9]


def test_an_end_behind_what_was_given_up_ends_nothing():
    logits = jnp.zeros((8, VOCABULARY.size)).at[4, VOCABULARY.eos_id].set(9.0)
    rules = Rules(mask_id=MASK, gives_up_after=1, eos_id=VOCABULARY.eos_id)

    def only(chosen, keys, seen, memory):
        return Choice(chosen), memory

    for places, masked in (((4,), [2, 3, 5, 6]), ((2, 3, 4), [])):
        strategy = Partial(only, np.isin(np.arange(8), places)[None])
        state, _ = sample(fakes.fake(logits), strategy, rules, begin([text_request([-1] * 5)], 8))
        assert np.flatnonzero(np.asarray(state.sequence.tokens[0]) == MASK).tolist() == masked


def test_the_largest_probabilities_and_hidden_states_are_seen_where_there_are_masks():
    logits = jax.random.normal(jax.random.key(0), (8, VOCABULARY.size))
    state = enter_blocks(begin([text_request([-1, 1, -1, -1])], 8), RULES)
    rules = dataclasses.replace(RULES, num_top=2, shows_hidden=True, block_length=3)
    seen = observe(logits, state, rules)
    shown = np.isin(np.arange(8), [2, 4])  # of the first block of three
    p = np.sort(np.asarray(jax.nn.softmax(logits)), axis=-1)[:, ::-1][:, :2]
    np.testing.assert_allclose(seen.top[0], np.where(shown[:, None], p, 0), rtol=1e-5)
    np.testing.assert_allclose(seen.hidden[0], np.where(shown[:, None], logits, 0), rtol=1e-6)
    seen = observe(logits, state, RULES)
    assert seen.top is None and seen.hidden is None


@pytest.mark.parametrize("options", [{"max_nfe": 3, "block_length": 2}, {"strategy": "given", "order": (0, 1)}])
def test_a_request_that_cannot_be_kept_is_refused_before_any_is_answered(options):
    def never(*_):
        raise AssertionError("the model was asked")

    requests = [text_request([-1] * 2), text_request([-1] * 20)]
    with pytest.raises(ValueError, match=r"10 blocks take at least 10|order has 2 indices, and the requests have 20"):
        Generator(never, VOCABULARY).generate(requests, GenerationConfig(**options), seed=0)


def test_patience_waits_while_remasking_has_nothing_masked():
    config = GenerationConfig(strategy="remdm_cap", remask=0.3, steps=40, patience=30, temperature=0.0)
    answer = assemble(VOCABULARY, [text_request([0, 1])], 8).tokens
    (found,) = Generator(fakes.knows(answer), VOCABULARY).generate([text_request([-1, -1])], config, seed=0)
    states = Generator(fakes.knows(answer), VOCABULARY).trajectories([text_request([-1, -1])], config, seed=0)[0]
    assert len(states) == 41 and found.nfe < 30


def test_a_text_is_over_at_its_first_eos():
    # Position 1 of five is EOS with certainty; the others may be anything.
    logits = jnp.zeros((8, VOCABULARY.size)).at[3, VOCABULARY.eos_id].set(9.0).at[2, fakes.TEXT_IDS.start + 4].set(9.0)
    request = text_request([-1] * 5)
    stopping = GenerationConfig(strategy="first_hitting", temperature=1.0)
    to_the_end = dataclasses.replace(stopping, stop_at_eos=False)
    generator = Generator(fakes.fake(logits), VOCABULARY)
    for seed in range(4):
        (answer,) = generator.generate([request], stopping, seed)
        (path,) = generator.trajectories([request], stopping, seed)
        assert codes(answer)[:2] == [4, EOS] and answer.nfe == len(path) - 1
        assert generator.generate([request], to_the_end, seed)[0].nfe == 5
        # Only when nothing before it is masked: what stands there may still be anything.
        before, after = (state.example.segments[0].codes for state in path[-2:])
        assert before[0] < 0 or before[1] < 0
        rest = np.flatnonzero(before[2:] < 0) + 2
        assert (after[rest] == EOS).all() and (after[2:][before[2:] >= 0] == before[2:][before[2:] >= 0]).all()
    assert {generator.generate([request], stopping, seed)[0].nfe for seed in range(8)} > {5}
    given = generator.generate([text_request([-1, -1, -1, 2, -1])], stopping, seed=0)[0]
    assert codes(given)[:2] == [4, EOS] and codes(given)[3] == 2 and given.nfe == 4  # a hole before what is given


def test_the_end_of_a_description_is_not_the_end_of_a_picture():
    logits = jnp.zeros(VOCABULARY.size).at[VOCABULARY.eos_id].set(9.0)
    both = Example("text_to_image", (Segment("text", np.full(4, -1)), Segment("image", np.full((2, 2), -1))))
    for strategy in ("given", "first_hitting"):
        config = GenerationConfig(strategy=strategy, steps=8, temperature=1.0)
        (answer,) = Generator(fakes.fake(logits), VOCABULARY).generate([both], config, seed=0)
        assert answer.example.segments[0].codes.tolist() == [EOS] * 4
        assert (answer.example.segments[1].codes >= 0).all() and answer.nfe >= 4


def test_no_requests_have_no_answers():
    assert Generator(fakes.mixing(), VOCABULARY).generate([], GenerationConfig(), seed=0) == []


def test_patience_reveals_a_block_whose_proposals_stay_the_same():
    answer = assemble(VOCABULARY, [text_request([0, 1, 2, 3, 4, 0])], 8).tokens
    request = text_request([-1] * 6)
    for patience, nfe in ((1, 1), (2, 2), (4, 4), (9, 6)):
        config = GenerationConfig(steps=6, temperature=0.0, patience=patience)
        (found,) = Generator(fakes.knows(answer), VOCABULARY).generate([request], config, seed=0)
        assert (codes(found), found.nfe) == ([0, 1, 2, 3, 4, 0], nfe)


def test_the_budget_of_evaluations_is_kept():
    request = text_request([-1] * 8)
    options = {"strategy": "first_hitting", "stop_at_eos": False}
    generator = Generator(fakes.mixing(), VOCABULARY)
    for length, budget, nfe in ((None, 3, 3), (4, 5, 4), (None, 99, 8), (4, 8, 8)):
        config = GenerationConfig(block_length=length, max_nfe=budget, **options)
        (answer,) = generator.generate([request], config, seed=0)
        assert answer.nfe == nfe and min(codes(answer)) >= 0
    # A step that begins to be guided costs two where the one before cost one.
    config = GenerationConfig(guidance=1.0, guidance_interval=(0.0, 0.5), max_nfe=5, **options)
    (answer,) = generator.generate([spoken(6)], config, seed=0)
    assert answer.nfe <= 5 and min(codes(answer)) >= 0
    with pytest.raises(ValueError, match="max_nfe is 3, and 4 blocks take at least 4 evaluations"):
        generator.generate([text_request([-1]), request], GenerationConfig(block_length=2, max_nfe=3), seed=0)


def test_only_ids_of_the_positions_own_range_can_come_out():
    everything_else = 5.0 * jax.random.normal(jax.random.key(0), (VOCABULARY.size,))
    request = Example.of_task(
        VOCABULARY.tasks["text_to_audio"], {"text": np.array([1, 2]), "audio": np.full((3, 2), -1)}
    )
    config = GenerationConfig(steps=2, temperature=5.0)
    (answer,) = Generator(fakes.fake(everything_else), VOCABULARY).generate([request], config, seed=0)
    audio = answer.example.segments[1].codes
    assert audio.shape == (3, 2) and (audio >= 0).all() and (audio < [3, 4]).all()


def test_restricted_logits_follow_the_positions_asked_for():
    rows = begin([text_request([-1, -1])], 4).sequence
    seen = restricted(fakes.fake(jnp.zeros(VOCABULARY.size)), VOCABULARY)(rows, jnp.array([[3]]))
    np.testing.assert_array_equal(
        np.flatnonzero(seen.logits[0, 0] == 0), np.arange(fakes.TEXT_IDS.start, fakes.TEXT_IDS.stop)
    )


def of_condition(sequence, positions=None, cache=None):
    """A denoiser with logits 3 where the condition is given and 1 where it is masked."""
    hidden = ((sequence.tokens == MASK) & sequence.is_condition).any(axis=1)
    full = jnp.where(hidden[:, None, None], 1.0, 3.0) * jnp.ones((*sequence.tokens.shape, 4))
    return fakes.output(fakes.at(full, positions))


def spoken(masked):
    audio = np.where(np.arange(6).reshape(3, 2) < masked, -1, 1)
    return Example.of_task(VOCABULARY.tasks["text_to_audio"], {"text": np.array([1, 2]), "audio": audio})


def test_guidance_moves_away_from_the_logits_without_the_condition():
    state = begin([spoken(6)], 11)
    seen = guided(of_condition, Guidance(2.0), MASK)(state.sequence)
    np.testing.assert_allclose(seen.logits, 1.0 + 3 * (3.0 - 1.0))
    assert seen.logits.shape == (1, 11, 4) and seen.num_passes.tolist() == [2]


def test_guidance_of_an_interval_costs_nothing_outside_of_it():
    rows = begin([spoken(1), spoken(3), spoken(6)], 11).sequence
    some = guided(of_condition, Guidance(2.0, (0.3, 0.5)), MASK)(rows)
    assert some.num_passes.tolist() == [1, 2, 1]
    np.testing.assert_allclose(some.logits[:, 0, 0], [3, 7, 3])
    batches = []

    def counting(sequence, positions=None, cache=None):
        jax.debug.callback(lambda rows: batches.append(len(rows)), sequence.tokens)
        return of_condition(sequence, positions, cache)

    none = jax.jit(lambda rows: guided(counting, Guidance(2.0, (0.6, 0.9)), MASK)(rows).num_passes)(rows)
    jax.effects_barrier()
    assert none.tolist() == [1, 1, 1] and 6 not in batches


def requests_of(count, length=5):
    rng = np.random.default_rng(0)
    return [text_request(np.where(rng.random(length) < 0.5, -1, rng.integers(0, 6, length))) for _ in range(count)]


@pytest.mark.parametrize("name", ["random", "threshold", "remdm_cap"])
def test_an_answer_depends_on_seed_and_request_but_not_on_the_batch(name):
    requests = requests_of(5)
    config = GenerationConfig(strategy=name, steps=3, threshold=0.5, temperature=20.0)
    generator = Generator(fakes.mixing(), VOCABULARY, rows=2)

    def answers(requests, seed=5):
        return [(codes(a), a.nfe) for a in generator.generate(requests, config, seed)]

    together = answers(requests)
    assert together == [answers([request])[0] for request in requests]
    assert together == answers(requests[::-1])[::-1]
    assert together != answers(requests, seed=6)
    assert len({str(answer) for answer, _ in answers([text_request([-1] * 5)] * 6)}) > 1, "equal requests"


def test_other_shapes_and_smaller_batches_change_no_answer():
    config = GenerationConfig(strategy="factor", block_length=4)
    requests = [r for length in (5, 14) for r in requests_of(2, length)]
    many = Generator(fakes.mixing(), VOCABULARY, rows=4, bucket=16).generate(requests, config, seed=1)
    few = Generator(fakes.mixing(), VOCABULARY, rows=1, bucket=8).generate(requests, config, seed=1)
    assert [(codes(a), a.nfe) for a in many] == [(codes(a), a.nfe) for a in few]
    for a, b in zip(many, few, strict=True):
        np.testing.assert_allclose(a.log_probs, b.log_probs, rtol=1e-5, atol=1e-6)


def test_finished_rows_leave_the_batch():
    shapes = []

    def counting(sequence, positions=None, cache=None):
        jax.debug.callback(lambda rows: shapes.append(len(rows)), sequence.tokens)
        return fakes.mixing()(sequence, positions, cache)

    # One mask in seven rows and eight masks in one, one per step.
    requests = [text_request([-1, *[0] * 7])] * 7 + [text_request([-1] * 8)]
    config = GenerationConfig(strategy="first_hitting", stop_at_eos=False)
    answers = Generator(counting, VOCABULARY, rows=8).generate(requests, config, seed=0)
    jax.effects_barrier()
    assert shapes == [8, *[1] * 7] and [a.nfe for a in answers] == [1] * 7 + [8]


@pytest.mark.parametrize("cache", ["none", "dual"])
def test_watching_is_generating(network, cache):
    requests = requests_of(2, 12)
    config = GenerationConfig(**{**CACHED, "cache": cache})
    generator = Generator(network if cache == "dual" else fakes.mixing(), VOCABULARY)
    paths = generator.trajectories(requests, config, seed=4)
    answers = generator.generate(requests, config, seed=4)
    for path, answer in zip(paths, answers, strict=True):
        assert codes(path[-1]) == codes(answer) and len(path) == answer.nfe + 1
        np.testing.assert_allclose(path[-1].log_probs, answer.log_probs, rtol=1e-5, atol=1e-6)
        masks = [(state.example.segments[0].codes < 0).sum() for state in path]
        assert all(b < a for a, b in itertools.pairwise(masks))


@pytest.mark.parametrize(
    ("strategy", "more"), [("remdm_cap", {"remask": 0.9, "stop_at_eos": False}), ("given", {"temperature": 5.0})]
)
def test_an_answer_says_in_which_step_each_token_was_revealed_for_good(strategy, more):
    """What was masked again counts from the next time; what an EOS ends is revealed with it."""
    config = GenerationConfig(strategy=strategy, steps=12, **more)
    generator = Generator(fakes.mixing(), VOCABULARY)
    requests = [text_request([1, *[-1] * 12])] * 8
    paths, answers = (ask(requests, config, 0) for ask in (generator.trajectories, generator.generate))
    remasked, ended = [], []
    for path, answer in zip(paths, answers, strict=True):
        is_masked = np.stack([state.example.segments[0].codes[1:] < 0 for state in path])
        expected = [np.flatnonzero(place)[-1] + 1 for place in is_masked.T]
        assert answer.steps.tolist() == path[-1].steps.tolist() == expected
        assert all(((state.steps == 0) == masked).all() for state, masked in zip(path, is_masked, strict=True))
        remasked.append((is_masked[1:] & ~is_masked[:-1]).any())
        ended.append(expected.count(expected[-1]) > 1)
    assert any(remasked) if strategy == "remdm_cap" else any(ended)


@pytest.mark.parametrize(("cache", "guidance"), [("prefix", 0.0), ("dual", 1.5)])
def test_a_cache_that_is_always_refreshed_is_none(network, cache, guidance):
    text = Example.of_task(VOCABULARY.tasks["text_to_audio"], {"text": np.array([1, 2]), "audio": np.full((5, 2), -1)})
    config = GenerationConfig(strategy="factor", block_length=8, guidance=guidance, temperature=0.7)
    generator = Generator(network, VOCABULARY)
    plain = generator.generate([text], config, seed=2)
    exact = generator.generate([text], dataclasses.replace(config, cache=cache, refresh_every=1), seed=2)
    assert [(codes(a), a.nfe) for a in plain] == [(codes(a), a.nfe) for a in exact]


def test_a_cached_row_is_what_it_is_alone(network):
    """Rows that finish their block early wait and change nothing for others, apart from the rounding of batches."""
    requests = [text_request([-1] * 12), *requests_of(1, 12)]
    config = GenerationConfig(**CACHED, temperature=0.0)
    generator = Generator(network, VOCABULARY)
    together = generator.generate(requests, config, seed=0)
    assert len({answer.nfe for answer in together}) > 1
    for request, answer in zip(requests, together, strict=True):
        (alone,) = generator.generate([request], config, seed=0)
        assert (codes(alone), alone.nfe) == (codes(answer), answer.nfe)
        np.testing.assert_allclose(alone.log_probs, answer.log_probs, atol=1e-4)


def test_a_dual_cache_computes_the_block_and_a_prefix_cache_what_follows_until_it_is_refreshed():
    asked = []

    def counting(sequence, positions=None, cache=None):
        if cache is not None:
            jax.debug.callback(lambda p: asked.append(p.shape[1]), positions)
        return fakes.mixing()(sequence, positions, cache)

    # Blocks of 6, 6 and 2 positions, with 14, 8 and 2 positions from their first one on; a token in every pass.
    request = text_request([-1] * 14)
    config = GenerationConfig(strategy="first_hitting", block_length=6, stop_at_eos=False)
    (plain,) = Generator(counting, VOCABULARY).generate([request], config, seed=0)
    for cache, refresh_every, lengths, passes in (
        ("dual", 99, {6}, 5 + 5 + 1),
        ("dual", 3, {6}, 4 + 4 + 1),
        ("prefix", 99, {6, 8, 16}, 5 + 5 + 1),
    ):
        asked.clear()
        cached = dataclasses.replace(config, cache=cache, refresh_every=refresh_every)
        (answer,) = Generator(counting, VOCABULARY).generate([request], cached, seed=0)
        jax.effects_barrier()
        assert set(asked) == lengths and len(asked) == passes
        assert codes(answer) == codes(plain), "of a network that sees every token afresh, a cache changes nothing"


def test_a_real_network_gives_the_same_answers_in_any_batch(network):
    requests = requests_of(2, 9)
    config = GenerationConfig(strategy="entropy", steps=4, temperature=1.0)
    one_by_one = [Generator(network, VOCABULARY).generate([r], config, seed=0)[0] for r in requests]
    together = Generator(network, VOCABULARY, rows=8, bucket=16).generate(requests, config, seed=0)
    assert [codes(a) for a in together] == [codes(a) for a in one_by_one]


@pytest.mark.parametrize(
    "bad",
    [
        {"steps": 0},
        {"temperature": -1.0},
        {"threshold": 1.5},
        {"guidance": -0.1},
        {"top_p": 0.0},
        {"top_k": 0},
        {"min_p": 2.0},
        {"loop_from": 0.01},
        {"guidance_interval": (0.5, 0.5)},
        {"cache": "dual", "guidance_interval": (0.0, 0.5)},
        {"order": (0, 2)},
        {"max_nfe": 0},
        {"patience": 0},
        {"remask": 1.5},
        {"block_length": 0},
        {"refresh_every": 0},
        {"factor": -0.5},
    ],
    ids=str,
)
def test_impossible_settings_are_refused(bad):
    value = next(iter(bad.values()))
    with pytest.raises(ValueError, match=str(value).replace("(", r"\(").replace(")", r"\)")):
        GenerationConfig(**bad)


def test_an_example_with_nothing_to_fill_stays_as_it_is():
    example = Example("text", (Segment("text", np.array([1, 2, 3])),))
    (answer,) = Generator(fakes.mixing(), VOCABULARY).generate([example], GenerationConfig(), seed=0)
    assert codes(answer) == [1, 2, 3] and answer.nfe == 0 and not len(answer.log_probs)


def test_the_plan_follows_the_schedule_with_which_the_requested_modality_was_trained():
    own = {"image": ScheduleConfig(kind="polynomial", power=3.0)}
    trained = MaskingConfig(schedule=ScheduleConfig(kind="cosine_mdlm"), schedules=own).schedule_of(VOCABULARY)
    how = GenerationConfig(steps=4)
    assert how.grid == "trained" and how.rules(VOCABULARY, trained).grid == trained
    for grid, expected in (("linear", LINEAR), ("cosine", COSINE)):
        assert dataclasses.replace(how, grid=grid).rules(VOCABULARY, trained).grid == expected
    left = 1 - jnp.array([0.0, 0.25, 0.5])
    text, image = (VOCABULARY.modalities.index(name) for name in ("text", "image"))
    for modality, share in ((text, 1 - np.cos(np.pi / 2 * left)), (image, np.asarray(left) ** 3)):
        planned = sampler._left(trained, jnp.full(3, modality), 1 - left)
        np.testing.assert_allclose(planned, share, rtol=1e-5)
