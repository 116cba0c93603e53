"""Rewards: the paper's formulas, and what they must prefer."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trimask.sampling_rl.reward import RewardConfig


def reward(right, nfe, length, **options):
    return RewardConfig(**options)(np.array([right]), np.array([nfe]), np.array([length])).item()


def test_a_right_answer_is_worth_less_the_more_evaluations_it_took():
    assert [reward(1.0, nfe, 4, alpha=2.0) for nfe in (1, 2, 4, 9)] == [1, 9 / 16, 1 / 16, 1 / 16]
    assert reward(0.5, 3, 4, alpha=1.0) == 0.25


def test_added_up_a_wrong_answer_is_worth_more_if_it_is_quick():
    assert [reward(0.0, nfe, 4, kind="additive", alpha=2.0) for nfe in (1, 4)] == [-0.5, -2.0]
    assert reward(1.0, 4, 4, kind="additive", alpha=2.0) == -1.0


@given(st.floats(0, 1), st.integers(1, 99), st.integers(1, 64), st.floats(0, 10))
def test_multiplied_rewards_lie_between_nothing_and_being_right(right, nfe, length, alpha):
    assert 0 <= reward(right, nfe, length, alpha=alpha) <= right
    assert reward(right, nfe, length, alpha=0.0) == right


def test_speed_cannot_count_for_less_than_nothing():
    with pytest.raises(ValueError, match="alpha must be finite"):
        RewardConfig(alpha=-1.0)
