"""Dataset of each training step."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from trimask.diffusion.data.mixture import Mixture, WeightSchedule


def constant(weights):
    return WeightSchedule(np.array(weights), np.array(weights), np.inf, np.inf)


@given(
    st.lists(st.floats(0.1, 5), min_size=3, max_size=3),
    st.lists(st.floats(50, 500), min_size=3, max_size=3),
    st.integers(0, 99),
)
def test_shares_of_tokens_follow_the_weights(weights, batch_tokens, seed):
    mixture = Mixture(constant(weights), np.array(batch_tokens), [seed])
    tokens = mixture.visits(3000) * batch_tokens
    np.testing.assert_allclose(tokens / tokens.sum(), np.array(weights) / sum(weights), atol=0.01)


def test_every_step_is_exact_in_expectation_over_seeds():
    batch_tokens = np.array([100.0, 300.0])
    counts = np.zeros(2)
    for seed in range(2000):
        counts[Mixture(constant([1.0, 1.0]), batch_tokens, [seed]).choice(17)[0]] += 1
    # p ∝ 1/100 : 1/300; five standard deviations of 2,000 draws are 0.05.
    assert abs(counts[0] / 2000 - 0.75) < 0.05


def test_weights_move_linearly_between_two_numbers_of_tokens():
    span = WeightSchedule(np.array([1.0, 0.0]), np.array([1.0, 3.0]), 10_000.0, 30_000.0)
    np.testing.assert_allclose(span.at(0.0), [1, 0])
    np.testing.assert_allclose(span.at(20_000.0), [1 - 0.375, 0.375])
    np.testing.assert_allclose(span.at(1e9), [0.25, 0.75])
    mixture = Mixture(span, np.array([10.0, 20.0]), [0])
    assert (mixture.choices(1000) == 0).all()  # 10 tokens a step: the span begins at step 1,000
    steps = mixture.num_steps(60_000)
    late = mixture.choices(steps)[mixture.num_steps(30_000) :]
    tokens = np.bincount(late, minlength=2) * [10, 20]
    np.testing.assert_allclose(tokens / tokens.sum(), [0.25, 0.75], atol=0.01)


def test_the_steps_of_a_horizon_have_its_number_of_tokens():
    mixture = Mixture(constant([2.0, 1.0, 1.0]), np.array([90.0, 100.0, 40.0]), [3])
    for tokens in (7_777, 400_000):
        held = (mixture.visits(mixture.num_steps(tokens)) * [90, 100, 40]).sum()
        assert abs(held - tokens) < 300  # three batches


def test_the_dataset_of_a_step_does_not_depend_on_the_order_of_queries():
    forwards, backwards = (Mixture(constant([1.0, 2.0]), np.array([5.0, 7.0]), [1]) for _ in range(2))
    asked = [forwards.choice(step) for step in range(5000)]
    assert [backwards.choice(step) for step in reversed(range(5000))] == asked[::-1]


def test_a_visit_is_the_number_of_earlier_steps_of_the_dataset():
    mixture = Mixture(constant([1.0, 2.0]), np.array([5.0, 7.0]), [1])
    seen = [0, 0]
    for step in range(2100):
        number, visit = mixture.choice(step)
        assert visit == seen[number]
        seen[number] += 1


def test_the_number_of_steps_comes_nearest_to_the_tokens_and_is_at_least_one():
    mixture = Mixture(constant([1.0]), np.array([10.0]), [0])
    assert [mixture.num_steps(tokens) for tokens in (1, 10, 14, 15, 16, 20, 24, 26)] == [1, 1, 1, 2, 2, 2, 2, 3]


@given(st.lists(st.floats(0.1, 5), min_size=3, max_size=3), st.integers(0, 99), st.integers(1, 1000))
def test_constant_weights_are_planned_at_once_as_they_would_be_step_by_step(weights, seed, steps):
    batch_tokens = np.array([50.0, 70.5, 333.0])
    never = WeightSchedule(np.array(weights), np.array(weights), 1e300, 1e300)
    at_once, one_by_one = (Mixture(span, batch_tokens, [seed]) for span in (constant(weights), never))
    np.testing.assert_array_equal(at_once.choices(steps), one_by_one.choices(steps))
    np.testing.assert_array_equal(at_once.visits(steps), one_by_one.visits(steps))
    assert at_once.num_steps(90_000) == one_by_one.num_steps(90_000)
    np.testing.assert_array_equal(at_once._tokens, one_by_one._tokens)
