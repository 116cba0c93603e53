"""Rewards: one battery for every kind in the table, and the paper's formulas."""

import inspect
import re

import fakes
import numpy as np
import pytest
import tyro

from trimask.sampling_rl import reward as module
from trimask.sampling_rl.problems import Problem, ProblemSet
from trimask.sampling_rl.reward import REWARDS, RewardConfig
from trimask.tokenizers.sequence import Example, Segment
from trimask.tokenizers.storage import configuration

RIGHT, NFE, LENGTH = (0.0, 0.25, 0.5, 1.0), range(1, 70), range(1, 65)
EPISODES = np.meshgrid(RIGHT, NFE, LENGTH, indexing="ij")
"""All combinations of grades, numbers of evaluations and numbers of asked tokens."""


@pytest.fixture(params=[(kind, alpha) for kind in REWARDS for alpha in (0.0, 0.3, 1.0, 10.0)], ids=str)
def config(request):
    kind, alpha = request.param
    return RewardConfig(kind=kind, alpha=alpha)


@pytest.fixture
def rewards(config):
    """Rewards of all those episodes."""
    return config(*(x.reshape(-1) for x in EPISODES)).reshape(EPISODES[0].shape)


def test_it_does_not_rise_with_evaluations(rewards):
    assert (np.diff(rewards, axis=1) <= 0).all()


def test_it_rises_with_rightness(rewards):
    assert (np.diff(rewards, axis=0) > 0).all()


def test_speed_is_worth_something_unless_alpha_is_zero(config, rewards):
    of_right = rewards[-1]
    at_once, one_by_one = of_right[0], np.array([of_right[length - 1, length - 1] for length in LENGTH])
    assert (one_by_one[1:] < at_once[1:]).all() == (config.alpha > 0)
    assert (rewards == EPISODES[0]).all() == (config.alpha == 0)


def test_every_episode_has_a_finite_reward_of_its_own(config, rewards):
    assert np.isfinite(rewards).all()
    assert config(np.zeros(0), np.zeros(0, int), np.zeros(0, int)).shape == (0,)
    for at in [(3, 0, 0), (2, 40, 7), (0, 5, 63)]:
        (alone,) = config(*(x[at].reshape(1) for x in EPISODES))
        assert alone == pytest.approx(rewards[at], rel=1e-12)  # powers of many numbers may be rounded differently


def reward(right, nfe, length, **options):
    return RewardConfig(**options)(np.array([right]), np.array([nfe]), np.array([length])).item()


def test_a_right_answer_is_worth_less_the_more_evaluations_it_took():
    assert [reward(1.0, nfe, 4, alpha=2.0) for nfe in (1, 2, 4, 9)] == [1, 9 / 16, 1 / 16, 1 / 16]
    assert reward(0.5, 3, 4, alpha=1.0) == 0.25


def test_added_up_a_wrong_answer_is_worth_more_if_it_is_quick():
    assert [reward(0.0, nfe, 4, kind="additive", alpha=2.0) for nfe in (1, 4)] == [-0.5, -2.0]
    assert reward(1.0, 4, 4, kind="additive", alpha=2.0) == -1.0


@pytest.mark.parametrize("alpha", [0.0, 0.3, 10.0])
def test_multiplied_rewards_lie_between_nothing_and_being_right(alpha):
    rewards = RewardConfig(alpha=alpha)(*(x.reshape(-1) for x in EPISODES))
    assert (rewards >= 0).all() and (rewards <= EPISODES[0].reshape(-1)).all()


def test_speed_cannot_count_for_less_than_nothing():
    with pytest.raises(ValueError, match=r"alpha must not be negative, got -1\.0"):
        RewardConfig(alpha=-1.0)


def test_every_reward_of_the_module_is_in_the_table_and_in_the_help():
    functions = [f for f in vars(module).values() if inspect.isfunction(f) and f.__module__ == module.__name__]
    public = [f.__name__ for f in functions if f.__name__[0] != "_"]
    assert [name for name in public if name not in REWARDS] == [], "no line in REWARDS"
    text = re.sub(r"\{[^}]*\}", "", tyro.extras.get_parser(RewardConfig).format_help())
    text = " ".join(re.findall(r"[^\s│]+", text))
    assert [kind for kind in REWARDS if f"{kind} is" not in text] == [], "the docstring of RewardConfig.kind"


def test_an_unknown_kind_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match=f"file: .*{'.*'.join(REWARDS)}"):
        configuration.from_dict({"kind": "none"}, RewardConfig, "file")


def test_problems_that_ask_for_nothing_are_refused():
    empty = Problem(Example("text", (Segment("text", np.array([1])),)), {})
    with pytest.raises(ValueError, match="sums has a problem that asks for no tokens"):
        ProblemSet("sums", fakes.VOCABULARY, [empty], lambda *_: [])
    with pytest.raises(ValueError, match="sums has no problems"):
        ProblemSet("sums", fakes.VOCABULARY, [], lambda *_: [])
