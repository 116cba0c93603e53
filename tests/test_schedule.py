"""Noise schedules against their formulas."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from trimask.diffusion.schedule import (
    ScheduleConfig,
    alpha_derivative,
    complementary_elbo_weight,
    elbo_weight,
    stratified_times,
)

KINDS = ["linear", "cosine_md4", "cosine_mdlm", "polynomial"]
TIMES = jnp.linspace(0.01, 0.99, 50)


@pytest.mark.parametrize("kind", KINDS)
def test_alpha_falls_from_one_to_zero(kind):
    alpha = ScheduleConfig(kind=kind).alpha
    np.testing.assert_allclose(alpha(jnp.array([0.0, 1.0])), [1.0, 0.0], atol=1e-6)
    assert (jnp.diff(alpha(TIMES)) < 0).all()


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
    config, t = ScheduleConfig(kind=kind, power=3.0), np.asarray(TIMES, np.float64)
    np.testing.assert_allclose(config.alpha(TIMES), alpha(t), atol=1e-6)
    np.testing.assert_allclose(alpha_derivative(config.alpha, TIMES), derivative(t), rtol=1e-4, atol=1e-6)
    # float32 loses digits where α or 1 − α, of order 1e-6 and up, is small.
    np.testing.assert_allclose(elbo_weight(config.alpha, TIMES), -derivative(t) / (1 - alpha(t)), rtol=0.1)
    np.testing.assert_allclose(complementary_elbo_weight(config.alpha, TIMES), -derivative(t) / alpha(t), rtol=0.1)


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
