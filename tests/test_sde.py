"""The SDE rule: each value by its formula, and the stationary behaviour of a noisy optimizer, which the rule
preserves.
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trimask.diffusion.optimizer import Hyperparameters, OptimizerConfig, adamw, update_average
from trimask.diffusion.parametrization import Multipliers
from trimask.diffusion.sde import SDEScaling, rescaled

BASE = OptimizerConfig(
    learning_rate=1e-2, beta1=0.9, beta2=0.98, epsilon=1e-6, weight_decay=0.1, clip_norm=2.0, ema_decay=0.99
)


def test_every_value_follows_its_rule():
    at = rescaled(BASE, 4.0, batch_ratio=9.0)
    assert at.learning_rate == pytest.approx(2e-2)
    assert (at.beta1, at.beta2, at.ema_decay) == pytest.approx((0.9**4, 0.98**4, 0.99**4))
    assert at.epsilon == pytest.approx(0.5e-6)
    assert at.weight_decay == pytest.approx(0.2)
    assert at.clip_norm == pytest.approx(2 / 3)  # by the batch alone
    assert (at.warmup_tokens, at.horizon_tokens) == (BASE.warmup_tokens, BASE.horizon_tokens)


@pytest.mark.parametrize("kappa", [0.3, 1.0, 5.0])
def test_a_rescaled_step_is_that_of_adamw_with_the_papers_values(kappa):
    """Clipping, AdamW and the weight average are written out in NumPy, each value by the rule."""
    rng = np.random.default_rng(0)
    start, gradients = rng.normal(size=4), 0.02 * rng.normal(size=(5, 4))
    p, average, m, v = start.copy(), start.copy(), np.zeros(4), np.zeros(4)
    beta1, beta2, rho = 0.9**kappa, 0.98**kappa, 0.99**kappa
    base = dataclasses.replace(BASE, clip_norm=0.04, epsilon=1e-3)
    weights = 0.0
    for t, g in enumerate(gradients, 1):
        g = g * min(1.0, 0.04 / (2 * kappa) ** 0.5 / np.linalg.norm(g))
        m, v = beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g**2
        direction = m / (1 - beta1**t) / (np.sqrt(v / (1 - beta2**t)) + 1e-3 / kappa**0.5)
        p = p - 1e-2 * kappa**0.5 * (direction + 0.1 * kappa**0.5 * p)
        weights = rho * weights + 1
        average = average + (p - average) / weights
    hyperparameters = rescaled(base, kappa, batch_ratio=2 * kappa).hyperparameters(Multipliers())
    transform, ours = adamw(hyperparameters), jnp.float32(start)
    state, our_average = transform.init(ours), ours
    for t, g in enumerate(gradients, 1):
        update, state = transform.update(jnp.float32(g), state, ours)
        ours = ours - update
        our_average = update_average(our_average, ours, hyperparameters.ema_decay, jnp.int32(t))
    np.testing.assert_allclose(ours, p, rtol=1e-5)
    np.testing.assert_allclose(our_average, average, rtol=1e-5)


@pytest.mark.parametrize(("gamma", "expected"), [(0.44, 8 * 16**-0.44), (1.0, 0.5), (0.0, 8.0)])
def test_kappa_is_the_ratio_of_batches_over_a_power_of_that_of_horizons(gamma, expected):
    sde = SDEScaling(base_batch_tokens=100.0, base_horizon_tokens=1000, gamma=gamma)
    assert sde.kappa(800.0, 16_000) == pytest.approx(expected)


def test_without_a_base_nothing_changes():
    assert SDEScaling().kappa(123.0, 456) == 1.0
    assert SDEScaling().rescale(BASE, 123.0, 456) == BASE


def test_a_longer_horizon_changes_all_but_the_clipping_threshold():
    sde = SDEScaling(base_batch_tokens=100.0, base_horizon_tokens=1000, gamma=0.5)
    at = sde.rescale(BASE, 400.0, 4000)
    assert at == rescaled(BASE, 4 * 4**-0.5, batch_ratio=4.0)
    assert at.clip_norm == BASE.clip_norm / 2 and at.learning_rate == pytest.approx(BASE.learning_rate * 2**0.5)


@given(st.floats(0.01, 100), st.floats(0.01, 100))
def test_rescaling_twice_is_rescaling_once(first, second):
    twice, once = rescaled(rescaled(BASE, first, first), second, second), rescaled(BASE, *[first * second] * 2)
    for name in ("learning_rate", "beta1", "beta2", "epsilon", "weight_decay", "clip_norm", "ema_decay"):
        assert getattr(twice, name) == pytest.approx(getattr(once, name), rel=1e-9)


def test_the_critical_batch_is_the_horizon_over_the_critical_steps():
    assert SDEScaling(critical_steps=200.0).critical_batch(10_000) == 50.0
    assert SDEScaling().critical_batch(10_000) is None


@pytest.mark.parametrize("bad", [{"gamma": 1.5}, {"base_batch_tokens": 0.0}, {"critical_steps": -1.0}])
def test_impossible_bases_are_refused(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        SDEScaling(**bad)


@partial(jax.jit, static_argnums=(1, 2))
def noisy_descent(hyperparameters: Hyperparameters, batch: int, steps: int, key):
    """Mean square of parameter and weight average at the end of AdamW on ½p², with gradient noise of variance
    100/batch.
    """
    transform = adamw(hyperparameters)
    start = jnp.full(4000, 1.0)

    def step(carry, number_and_key):
        p, average, state = carry
        number, noise_key = number_and_key
        gradient = p + 10 * jax.random.normal(noise_key, p.shape) / batch**0.5
        update, state = transform.update(gradient, state, p)
        p = p - update
        return (p, update_average(average, p, hyperparameters.ema_decay, number), state), None

    numbers = jnp.arange(1, steps + 1)
    (p, average, _), _ = jax.lax.scan(
        step, (start, start, transform.init(start)), (numbers, jax.random.split(key, steps))
    )
    return jnp.mean(p**2), jnp.mean(average**2)


def test_a_noisy_optimizer_ends_the_same_at_every_batch_only_with_the_whole_rule():
    """The claim on a minimal problem: 4,000 noisy quadratics at fixed B·S; the Monte Carlo error is about 3 %."""
    base = OptimizerConfig(learning_rate=3e-3, epsilon=1.0, weight_decay=1.0, clip_norm=1e9, ema_decay=0.98)
    reference = noisy_descent(base.hyperparameters(Multipliers()), 16, 800, jax.random.key(0))
    for kappa in (0.25, 4.0):
        batch, steps = int(16 * kappa), int(800 / kappa)
        whole = noisy_descent(
            rescaled(base, kappa, kappa).hyperparameters(Multipliers()), batch, steps, jax.random.key(1)
        )
        np.testing.assert_allclose(whole, reference, rtol=0.1)
        unscaled = noisy_descent(base.hyperparameters(Multipliers()), batch, steps, jax.random.key(1))
        assert abs(unscaled[0] / reference[0] - 1) > 0.3
