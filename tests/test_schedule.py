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

from trimask.diffusion.schedule import SCHEDULES, ScheduleConfig, low_discrepancy_shares, stratified_times
from trimask.tokenizers.storage import configuration

TIMES = jnp.linspace(0.01, 0.99, 50)
TEXT = jnp.ones(50, jnp.int32)


@pytest.fixture(params=fakes.SCHEDULES)
def config(request):
    return fakes.SCHEDULES[request.param]


@pytest.fixture
def schedule(config):
    return config.build(VOCABULARY)


def of_modalities(share, times):
    """Shares of every modality at these times."""
    modality = jnp.arange(len(VOCABULARY.modalities))[:, None]
    return np.asarray(share(*jnp.broadcast_arrays(jnp.asarray(times, jnp.float32), modality)), np.float64)


def test_the_kept_share_falls_from_one_to_zero(schedule):
    kept = of_modalities(schedule.keep_probability, np.linspace(0, 1, 300))
    np.testing.assert_allclose(kept[:, [0, -1]], [[1.0, 0.0]] * len(kept), atol=1e-6)
    assert (kept >= -1e-6).all() and (kept <= 1).all() and (np.diff(kept) <= 0).all()


def test_what_is_not_kept_is_masked(schedule):
    kept, masked = (of_modalities(share, TIMES) for share in (schedule.keep_probability, schedule.mask_probability))
    np.testing.assert_allclose(kept + masked, 1.0, atol=1e-6)


def test_weights_are_finite_and_not_negative_at_all_times_that_are_drawn(config, schedule):
    times = np.linspace(config.min_time, 1 - config.min_time, 300)
    for weight in (schedule.weight, schedule.complementary_weight):
        weights = of_modalities(weight, times)
        assert np.isfinite(weights).all() and (weights >= 0).all() and weights[:, 150].all()


@pytest.mark.parametrize("masked", [1, 2, 4])
def test_every_set_of_masked_tokens_weighs_as_much_as_in_the_bound(schedule, masked):
    """For every schedule ∫ w(t) (1 − α)^m α^(n−m) dt = (m − 1)! (n − m)! / n!; also with α and 1 − α exchanged."""
    times = (np.arange(20_000) + 0.5) / 20_000
    shares = [of_modalities(share, times) for share in (schedule.mask_probability, schedule.keep_probability)]
    weights = [of_modalities(weight, times) for weight in (schedule.weight, schedule.complementary_weight)]
    exact = math.factorial(masked - 1) * math.factorial(4 - masked) / math.factorial(4)
    for weight, share in zip(weights, shares, strict=True):
        integral = (weight * share**masked * (1 - share) ** (4 - masked)).mean(axis=1)
        np.testing.assert_allclose(integral, exact, rtol=1e-3)  # float32 near the ends


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
    schedule, t = ScheduleConfig(kind=kind, power=3.0).build(VOCABULARY), np.asarray(TIMES, np.float64)
    np.testing.assert_allclose(schedule.keep_probability(TIMES, TEXT), alpha(t), atol=1e-6)
    np.testing.assert_allclose(schedule.slope(TIMES, TEXT), -derivative(t), rtol=1e-4, atol=1e-6)
    # float32 loses digits where α or 1 − α, of order 1e-6 and up, is small.
    np.testing.assert_allclose(schedule.weight(TIMES, TEXT), -derivative(t) / (1 - alpha(t)), rtol=0.1)
    np.testing.assert_allclose(schedule.complementary_weight(TIMES, TEXT), -derivative(t) / alpha(t), rtol=0.1)


def test_a_masked_share_that_is_given_loses_no_digits():
    times = jnp.array([1e-3, 2e-3, 0.5])
    given = fakes.MaskedShares().build(VOCABULARY)
    rounded = ScheduleConfig(kind="polynomial", power=3.0).build(VOCABULARY)
    weights = given.weight(times, TEXT[:3])
    np.testing.assert_allclose(weights, 3 / times, rtol=1e-5)
    assert not np.allclose(rounded.weight(times, TEXT[:3]), weights, rtol=0.05)


def test_times_are_uniform_over_batches_and_evenly_spread_within_one():
    share = jnp.arange(8) / 8
    one = jnp.sort(stratified_times(jnp.array(0.3), share, 1e-3))
    np.testing.assert_allclose(jnp.diff(one), 0.998 / 8, rtol=1e-3)
    offsets = jax.random.uniform(jax.random.key(0), (4000,))
    first = jax.vmap(lambda offset: stratified_times(offset, share, 1e-3))(offsets)[:, 0]
    assert float(first.min()) >= 1e-3 and float(first.max()) <= 1 - 1e-3
    np.testing.assert_allclose(np.histogram(first, 4, (0, 1))[0] / 4000, 0.25, atol=0.035)  # five deviations


@pytest.mark.parametrize("bad", [{"power": 0.0}, {"min_time": 0.5}, {"min_time": 0.0}])
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
