"""Observe, reveal, strategies and requests, against fake denoisers that know the answer."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trimask.diffusion.sampling import loop
from trimask.diffusion.sampling.guidance import guided, restricted
from trimask.diffusion.sampling.loop import Choice, Observation
from trimask.diffusion.sampling.requests import GenerationConfig, Generator, request_keys
from trimask.diffusion.sampling.strategies import STRATEGIES, threshold, with_progress
from trimask.diffusion.transformer import Output
from trimask.tokenizers.sequence import Example, Segment, assemble, direct, stack
from trimask.tokenizers.vocabulary import Vocabulary

VOCABULARY = Vocabulary(text_size=6, codebook_sizes={"image": (5,), "audio": (3, 4)})
EVERY_STRATEGY = pytest.mark.parametrize("name", STRATEGIES)


def output(logits):
    return Output(logits, logits, ())


def fake(logits_of_row):
    """A denoiser that gives each row fixed logits [seq, vocab], whatever it sees."""

    def denoise(sequence, positions=None, cache=None):
        return output(jnp.broadcast_to(logits_of_row, (*sequence.tokens.shape, logits_of_row.shape[-1])))

    return denoise


def text_request(codes):
    return Example("text", (Segment("text", np.array(codes)),))


def begin(requests, length, **options):
    rows = jax.tree.map(jnp.asarray, stack([assemble(VOCABULARY, [r], length) for r in requests]))
    return loop.start(rows, request_keys(requests, 0), VOCABULARY.mask_id, **options)


def knows(answer):
    """A denoiser sure of the given row of ids."""
    return fake(20.0 * jax.nn.one_hot(jnp.asarray(answer), VOCABULARY.size))


def observation(confidence, is_masked, step=0, num_steps=3):
    confidence, is_masked = jnp.asarray(confidence, jnp.float32), jnp.asarray(is_masked)
    zero = jnp.zeros_like(confidence)
    return Observation(
        proposal=zero.astype(jnp.int32),
        confidence=confidence,
        entropy=zero,
        margin=zero,
        is_masked=is_masked,
        in_block=jnp.ones_like(is_masked),
        modality=zero.astype(jnp.int32),
        step=jnp.asarray(step),
        num_steps=jnp.asarray(num_steps),
        commit_confidence=zero,
        num_passes=1,
    )


def choose(name, seen, threshold=0.6):
    keys = jax.random.split(jax.random.key(0), seen.is_masked.shape[0])
    return np.asarray(STRATEGIES[name](threshold)(keys, seen, None)[0].reveal)


@EVERY_STRATEGY
def test_a_denoiser_that_knows_the_answer_gets_it(name):
    request = text_request([1, -1, -1, 4, -1])
    answer = assemble(VOCABULARY, [text_request([1, 5, 0, 4, 2])], 8).tokens
    final = loop.sample(knows(answer), STRATEGIES[name](0.9), VOCABULARY.mask_id, begin([request], 8, num_steps=3))
    np.testing.assert_array_equal(final.sequence.tokens[0], answer)
    assert int(final.nfe[0]) == (1 if name == "threshold" else 3)


@EVERY_STRATEGY
@settings(deadline=None, max_examples=30)
@given(
    st.integers(1, 6),
    st.lists(
        st.lists(st.tuples(st.sampled_from([0.1, 0.5, 0.6, 0.9]), st.booleans()), min_size=5, max_size=5),
        min_size=2,
        max_size=2,
    ),
)
def test_only_masked_positions_are_revealed_and_the_last_step_reveals_all_of_an_even_share(name, steps, rows):
    confidence, is_masked = np.array([[c for c, _ in r] for r in rows]), np.array([[m for _, m in r] for r in rows])
    for step in range(steps):
        chosen = choose(name, observation(confidence, is_masked, step, steps))
        assert not (chosen & ~is_masked).any()
        assert (chosen.any(axis=1) == is_masked.any(axis=1)).all()
        is_masked = is_masked & ~chosen
    assert name == "threshold" or not is_masked.any()


@settings(deadline=None, max_examples=50)
@given(
    st.lists(st.tuples(st.sampled_from([0.2, 0.4, 0.4, 0.8]), st.booleans()), min_size=6, max_size=6), st.integers(0, 2)
)
def test_confidence_equals_a_sort_with_ties_to_the_lowest_position(row, step):
    confidence, is_masked = [c for c, _ in row], [m for _, m in row]
    count = -(-sum(is_masked) // (3 - step))
    expected = sorted((i for i in range(6) if is_masked[i]), key=lambda i: (-confidence[i], i))[:count]
    chosen = choose("confidence", observation([confidence], [is_masked], step))
    assert np.flatnonzero(chosen[0]).tolist() == sorted(expected)


@settings(deadline=None, max_examples=50)
@given(st.lists(st.tuples(st.sampled_from([0.2, 0.59, 0.6, 0.8]), st.booleans()), min_size=6, max_size=6))
def test_threshold_equals_its_definition(row):
    confidence, is_masked = [np.float32(c) for c, _ in row], [m for _, m in row]
    masked = [i for i in range(6) if is_masked[i]]
    expected = [i for i in masked if confidence[i] >= np.float32(0.6)] or sorted(
        masked, key=lambda i: (-confidence[i], i)
    )[:1]
    assert np.flatnonzero(choose("threshold", observation([confidence], [is_masked]))[0]).tolist() == expected


def test_random_order_reveals_every_position_equally_often():
    keys = jax.random.split(jax.random.key(0), 3000)
    seen = observation(np.tile([0.9, 0.1, 0.1, 0.1], (3000, 1)), np.tile([True, True, False, True], (3000, 1)))
    chosen = STRATEGIES["random"](0.0)(keys, seen, None)[0].reveal
    np.testing.assert_allclose(chosen.mean(axis=0), [1 / 3, 1 / 3, 0, 1 / 3], atol=0.045)  # five deviations


def test_progress_is_forced_only_where_nothing_was_chosen():
    def nothing_in_row_0(keys, seen, memory):
        reveal = jnp.zeros_like(seen.is_masked).at[1, 0].set(True)
        return Choice(reveal, jnp.zeros_like(reveal)), memory

    seen = observation([[0.1, 0.7, 0.7], [0.1, 0.7, 0.9]], [[True, True, True], [True, True, True]])
    choice, _ = with_progress(nothing_in_row_0)(jax.random.split(jax.random.key(0), 2), seen, None)
    np.testing.assert_array_equal(choice.reveal, [[False, True, False], [True, False, False]])


def test_reveal_writes_nothing_but_what_was_chosen_and_remasks_only_what_was_revealed():
    state = begin([text_request([1, -1, -1])], 5)
    seen = observation([[0.5] * 5], np.asarray(state.is_masked))
    everything = jnp.ones_like(state.is_masked)
    after = loop.reveal(state, seen, Choice(everything, everything), VOCABULARY.mask_id)
    # Task and boundary stay; the given text is masked again; the two masks take the proposal, 0.
    expected = [*np.asarray(state.sequence.tokens[0, :2]), VOCABULARY.mask_id, 0, 0]
    np.testing.assert_array_equal(after.sequence.tokens[0], expected)
    np.testing.assert_array_equal(after.is_masked[0], [False, False, True, False, False])
    np.testing.assert_array_equal(after.commit_confidence[0], [1, 1, 0, 0.5, 0.5])


def test_evaluations_are_counted_only_while_a_row_has_masks():
    requests = [text_request([1, -1, 3]), text_request([-1, -1, -1]), text_request([1, 2, 3])]
    answer = assemble(VOCABULARY, [text_request([1, 2, 3])], 5).tokens
    strategy = STRATEGIES["confidence"](0.0)
    final = loop.sample(knows(answer), strategy, VOCABULARY.mask_id, begin(requests, 5, num_steps=3))
    assert final.nfe.tolist() == [1, 3, 0]
    both = guided(knows(answer), 1.0, VOCABULARY.mask_id)
    final = loop.sample(both, strategy, VOCABULARY.mask_id, begin(requests, 5, num_steps=3))
    assert final.nfe.tolist() == [2, 6, 0]


def test_observation_reports_probabilities_before_temperature():
    logits = jnp.log(jnp.array([0.1, 0.2, 0.7, 0.0]) + 1e-30)
    state = begin([text_request([-1, -1])], 4, temperature=3.0)
    keys = jax.random.split(jax.random.key(3), 1)
    seen = loop.observe(keys, fake(logits), state)
    p = np.array([0.1, 0.2, 0.7, 0.0])
    np.testing.assert_allclose(seen.confidence[0], p[np.asarray(seen.proposal[0])], rtol=1e-5)
    np.testing.assert_allclose(seen.entropy[0], -(p[:3] * np.log(p[:3])).sum(), rtol=1e-5)
    np.testing.assert_allclose(seen.margin[0], 0.5, rtol=1e-5)


def test_tokens_are_drawn_with_the_tempered_probabilities():
    logits, count = jnp.log(jnp.array([0.1, 0.2, 0.7])), 4000
    state = begin([text_request([-1])] * count, 3, temperature=2.0)
    proposal = loop.observe(jax.random.split(jax.random.key(0), count), fake(logits), state).proposal[:, 2]
    tempered = np.array([0.1, 0.2, 0.7]) ** 0.5
    np.testing.assert_allclose(np.bincount(proposal) / count, tempered / tempered.sum(), atol=0.04)  # five deviations


def test_zero_temperature_takes_the_most_probable_token():
    state = begin([text_request([-1])], 3)
    assert (
        loop.observe(jax.random.split(jax.random.key(0), 1), fake(jnp.array([0.0, 0.1, 0.0])), state).proposal[0, 2]
        == 1
    )


def test_only_ids_of_the_positions_own_range_can_come_out():
    everything_else = 5.0 * jax.random.normal(jax.random.key(0), (VOCABULARY.size,))
    codes = {"text": np.array([1, 2]), "audio": np.full((3, 2), -1)}
    request = direct(VOCABULARY.tasks["text_to_audio"], codes)
    generator = Generator(fake(everything_else), VOCABULARY, rows=2)
    answer = generator.generate([request], GenerationConfig(steps=2, temperature=5.0), seed=0)[0]
    audio = answer.example.segments[1].codes
    assert audio.shape == (3, 2) and (audio >= 0).all() and (audio < [3, 4]).all()


def test_restricted_logits_follow_the_positions_asked_for():
    rows = begin([text_request([-1, -1])], 4).sequence
    asked = jnp.array([[3]])
    seen = restricted(lambda s, p, c: output(jnp.zeros((1, p.shape[1], VOCABULARY.size))), VOCABULARY)(rows, asked)
    text = VOCABULARY.ranges[1]
    np.testing.assert_array_equal(np.flatnonzero(seen.logits[0, 0] == 0), np.arange(text.start, text.stop))


def test_guidance_moves_away_from_the_logits_without_the_condition():
    def denoise(sequence, positions=None, cache=None):
        hidden = (sequence.tokens == VOCABULARY.mask_id) & sequence.is_condition
        return output(jnp.where(hidden.any(axis=1)[:, None, None], 1.0, 3.0) * jnp.ones((2, 11, 4)))

    codes = {"text": np.array([1, 2]), "audio": np.full((3, 2), -1)}
    state = begin([direct(VOCABULARY.tasks["text_to_audio"], codes)], 11)
    seen = guided(denoise, 2.0, VOCABULARY.mask_id)(state.sequence)
    np.testing.assert_allclose(seen.logits, 1.0 + 3 * (3.0 - 1.0))
    assert seen.logits.shape == (1, 11, 4) and seen.num_passes == 2


def request_of(rng):
    return text_request(np.where(rng.random(5) < 0.5, -1, rng.integers(0, 6, 5)))


def noisy_denoiser():
    """Logits that depend on all tokens of the row, exactly representable so that batches cannot matter."""
    table = jax.random.randint(jax.random.key(7), (VOCABULARY.size, VOCABULARY.size), -8, 8) / 4

    def denoise(sequence, positions=None, cache=None):
        row = table[sequence.tokens].sum(axis=1, keepdims=True)
        return output(jnp.broadcast_to(row + table[sequence.tokens], (*sequence.tokens.shape, VOCABULARY.size)))

    return denoise


@EVERY_STRATEGY
def test_an_answer_depends_on_seed_and_request_but_not_on_the_batch(name):
    rng = np.random.default_rng(0)
    requests = [request_of(rng) for _ in range(9)]
    config = GenerationConfig(strategy=name, steps=3, threshold=0.5, temperature=20.0)
    generator = Generator(noisy_denoiser(), VOCABULARY, rows=4)
    together = [a.example.segments[0].codes.tolist() for a in generator.generate(requests, config, seed=5)]
    alone = [generator.generate([r], config, seed=5)[0].example.segments[0].codes.tolist() for r in requests]
    assert together == alone
    backwards = [a.example.segments[0].codes.tolist() for a in generator.generate(requests[::-1], config, seed=5)]
    assert together == backwards[::-1]
    other = [a.example.segments[0].codes.tolist() for a in generator.generate(requests, config, seed=6)]
    assert together != other


def test_equal_requests_get_different_answers():
    requests = [text_request([-1] * 5)] * 6
    answers = Generator(noisy_denoiser(), VOCABULARY, rows=4).generate(
        requests, GenerationConfig(temperature=20.0), seed=0
    )
    assert len({tuple(a.example.segments[0].codes.tolist()) for a in answers}) > 1


def test_the_trajectory_ends_at_the_answer_and_reveals_step_by_step():
    request, config = text_request([-1, 3, -1, -1, -1]), GenerationConfig(steps=2)
    generator = Generator(noisy_denoiser(), VOCABULARY, rows=3)
    states = [e.segments[0].codes.tolist() for e in generator.trajectories([request], config, seed=4)[0]]
    assert [row.count(-1) for row in states] == [4, 2, 0]
    assert states[-1] == generator.generate([request], config, seed=4)[0].example.segments[0].codes.tolist()


def test_prompts_of_one_bucket_do_not_recompile():
    traces = []

    def counting(sequence, positions=None, cache=None):
        traces.append(sequence.tokens.shape)
        return output(jnp.zeros((*sequence.tokens.shape, VOCABULARY.size)))

    generator = Generator(counting, VOCABULARY, rows=2, bucket=8)
    for size in (3, 4, 6):
        generator.generate([text_request([-1] * size)], GenerationConfig(), seed=size)
    assert set(traces) == {(2, 8)}
    once = len(traces)
    generator.generate([text_request([-1] * 5)] * 5, GenerationConfig(), seed=1)
    assert len(traces) == once


@pytest.mark.parametrize("bad", [{"steps": 0}, {"temperature": -1.0}, {"threshold": 1.5}, {"guidance": -0.1}])
def test_impossible_settings_are_refused(bad):
    with pytest.raises(ValueError, match=str(next(iter(bad.values())))):
        GenerationConfig(**bad)


def test_a_threshold_of_one_still_finishes():
    state = begin([text_request([-1] * 4)], 6)
    final = loop.sample(fake(jnp.zeros(VOCABULARY.size)), threshold(1.0), VOCABULARY.mask_id, state)
    assert int(final.nfe[0]) == 4
