"""Noise schedules: one battery for every kind in the table, and their formulas."""

import math
import re

import fakes
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tyro
from fakes import VOCABULARY

from trimask.diffusion.masking import MaskingConfig
from trimask.diffusion.schedule import SCHEDULES, ScheduleConfig, low_discrepancy_shares, stratified
from trimask.tokenizers.storage import configuration

TIMES = jnp.linspace(0.01, 0.99, 50)
TEXT = jnp.ones(50, jnp.int32)
MIN_SHARE = ScheduleConfig().min_share


@pytest.fixture(params=fakes.MASKINGS)
def schedule(request):
    return fakes.MASKINGS[request.param].schedule_of(VOCABULARY)


def of_everyone(**fields):
    """The schedule of these fields for all modalities."""
    return MaskingConfig(schedule=ScheduleConfig(**fields)).schedule_of(VOCABULARY)


def of_modalities(share, times):
    """Shares of every modality at these times."""
    modality = jnp.arange(len(VOCABULARY.modalities))[:, None]
    return np.asarray(share(*jnp.broadcast_arrays(jnp.asarray(times, jnp.float32), modality)), np.float64)


def test_the_masked_share_rises_from_zero_to_one(schedule):
    masked = of_modalities(schedule.mask_probability, np.linspace(0, 1, 300))
    np.testing.assert_allclose(masked[:, [0, -1]], [[0.0, 1.0]] * len(masked), atol=1e-6)
    assert (masked >= 0).all() and (masked <= 1 + 1e-6).all() and (np.diff(masked) >= 0).all()


@pytest.mark.parametrize("kind", SCHEDULES)
def test_the_time_of_a_masked_share_is_when_the_share_is_reached(kind):
    shares, config = jnp.array([1e-3, 0.1, 0.5, 0.9, 0.999]), ScheduleConfig(kind=kind, power=3.0)
    np.testing.assert_allclose(config.masked_share(config.time_of(shares)), shares, rtol=1e-5)


def test_times_cover_the_same_masked_shares_under_every_schedule(schedule):
    times = of_modalities(schedule.times, np.linspace(0, 1, 300))
    masked = np.stack([of_modalities(schedule.mask_probability, row)[m] for m, row in enumerate(times)])
    np.testing.assert_allclose(masked[:, [0, -1]], [[MIN_SHARE, 1 - MIN_SHARE]] * len(times), rtol=1e-4)
    np.testing.assert_allclose(np.diff(times), np.diff(times)[:, :1] * np.ones(299), rtol=1e-3)  # uniform times


@pytest.mark.parametrize("masked", [1, 2, 4])
def test_every_set_of_masked_tokens_weighs_as_much_as_in_the_bound(schedule, masked):
    """The mean of w(t) s^m (1 − s)^(n−m) is the same for every schedule, and so with s and 1 − s exchanged.

    It is ∫ s^(m−1) (1 − s)^(n−m) ds over [ε, 1 − ε], divided by 1 − 2ε, of which at most 2ε is not the bound's
    (m − 1)! (n − m)! / n!. The sum is a midpoint rule in float32.
    """
    share_of_times = (np.arange(20_000) + 0.5) / 20_000
    times = of_modalities(schedule.times, share_of_times)
    s = np.stack([of_modalities(schedule.mask_probability, row)[m] for m, row in enumerate(times)])
    grid = MIN_SHARE + (1 - 2 * MIN_SHARE) * share_of_times
    exact = (grid ** (masked - 1) * (1 - grid) ** (4 - masked)).mean()
    bound = math.factorial(masked - 1) * math.factorial(4 - masked) / math.factorial(4)
    assert exact == pytest.approx(bound, rel=5 * MIN_SHARE)
    for weight, share in ((schedule.weight, s), (schedule.complementary_weight, 1 - s)):
        weights = np.stack([of_modalities(weight, row)[m] for m, row in enumerate(times)])
        integral = (weights * share**masked * (1 - share) ** (4 - masked)).mean(axis=1)
        np.testing.assert_allclose(integral, exact, rtol=1e-4)


LARGEST = {"linear": (1000, 1000), "cosine_md4": (1528, 68), "cosine_mdlm": (68, 1528), "polynomial": (61, 1939)}
"""Kind → largest weight, and largest weight of the complement, as the module's docstring says."""


@pytest.mark.parametrize("kind", SCHEDULES)
def test_the_largest_weights_are_those_at_the_ends(kind):
    schedule = of_everyone(kind=kind)
    ends = schedule.times(jnp.array([0.0, 1.0]), TEXT[:2])
    weights = schedule.weight(ends, TEXT[:2])[0], schedule.complementary_weight(ends, TEXT[:2])[1]
    np.testing.assert_allclose(weights, LARGEST[kind], rtol=0.01)


@pytest.mark.parametrize(
    ("kind", "alpha", "derivative"),
    [
        ("linear", lambda t: 1 - t, lambda t: -np.ones_like(t)),
        ("cosine_md4", lambda t: 1 - np.cos(np.pi / 2 * (1 - t)), lambda t: -np.pi / 2 * np.sin(np.pi / 2 * (1 - t))),
        ("cosine_mdlm", lambda t: np.cos(np.pi / 2 * t), lambda t: -np.pi / 2 * np.sin(np.pi / 2 * t)),
        ("polynomial", lambda t: 1 - t**3, lambda t: -3 * t**2),
    ],
)
def test_values_and_weights_follow_the_formulas(kind, alpha, derivative):
    schedule = of_everyone(kind=kind, power=3.0)
    times = schedule.times(jnp.linspace(0, 1, 50), TEXT)
    t = np.asarray(times, np.float64)
    np.testing.assert_allclose(schedule.mask_probability(times, TEXT), 1 - alpha(t), rtol=1e-5)
    np.testing.assert_allclose(schedule.slope(times, TEXT), -derivative(t), rtol=1e-4)
    width = (t[-1] - t[0]) / 0.998
    np.testing.assert_allclose(schedule.weight(times, TEXT), -derivative(t) * width / (1 - alpha(t)), rtol=1e-4)
    # float32 holds 1 − s to 6e-8, which is 6e-5 of the smallest.
    np.testing.assert_allclose(schedule.complementary_weight(times, TEXT), -derivative(t) * width / alpha(t), rtol=5e-4)


def test_stratified_numbers_are_uniform_over_batches_and_evenly_spread_within_one():
    share = jnp.arange(8) / 8
    one = jnp.sort(stratified(jnp.array(0.3), share))
    np.testing.assert_allclose(jnp.diff(one), 1 / 8, rtol=1e-3)
    offsets = jax.random.uniform(jax.random.key(0), (4000,))
    first = jax.vmap(lambda offset: stratified(offset, share))(offsets)[:, 0]
    assert float(first.min()) >= 0 and float(first.max()) < 1
    np.testing.assert_allclose(np.histogram(first, 4, (0, 1))[0] / 4000, 0.25, atol=0.035)  # five deviations


@pytest.mark.parametrize("bad", [{"power": 0.0}, {"min_share": 0.5}, {"min_share": 0.0}])
def test_impossible_schedules_are_refused(bad):
    with pytest.raises(ValueError, match=str(next(iter(bad.values())))):
        ScheduleConfig(**bad)


def test_the_help_has_the_formula_of_every_kind():
    text = re.sub(r"\{[^}]*\}", "", tyro.extras.get_parser(ScheduleConfig).format_help())
    assert [kind for kind in SCHEDULES if f"({kind})" not in text] == [], "the docstring of ScheduleConfig.kind"


def test_an_unknown_kind_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match=f"file: .*{'.*'.join(SCHEDULES)}"):
        configuration.from_dict({"kind": "none"}, ScheduleConfig, "file")


def test_shares_of_consecutive_numbers_are_spread_by_the_golden_ratio():
    every = jnp.ones(4, bool)
    np.testing.assert_allclose(low_discrepancy_shares(jnp.arange(1, 5), every), [0.5, 0.0, 0.75, 0.25])
    # Two positions of number 1, of which one is counted, and one of number 2, which comes first.
    numbers, is_counted = jnp.array([1, 1, 2]), jnp.array([False, True, True])
    np.testing.assert_allclose(low_discrepancy_shares(numbers, is_counted), [0.5, 0.5, 0.0])
