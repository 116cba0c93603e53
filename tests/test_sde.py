"""The SDE rule: each value by its formula, and the stationary behaviour of a noisy optimizer that it keeps."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trimask.diffusion.optimizer import OptimizerConfig, adamw, averaged
from trimask.diffusion.parametrization import Multipliers
from trimask.diffusion.sde import SDEScaling, rescaled

BASE = OptimizerConfig(
    learning_rate=1e-2, beta1=0.9, beta2=0.98, epsilon=1e-6, weight_decay=0.1, clip_norm=2.0, ema_decay=0.99
)


def test_every_value_follows_its_rule():
    at = rescaled(BASE, 4.0)
    assert at.learning_rate == pytest.approx(2e-2)
    assert (at.beta1, at.beta2, at.ema_decay) == pytest.approx((0.9**4, 0.98**4, 0.99**4))
    assert at.epsilon == pytest.approx(0.5e-6)
    assert at.weight_decay == pytest.approx(0.2)
    assert at.clip_norm == pytest.approx(1.0)
    assert (at.warmup_tokens, at.horizon_tokens) == (BASE.warmup_tokens, BASE.horizon_tokens)


@pytest.mark.parametrize(("gamma", "expected"), [(0.44, 8 * 16**-0.44), (1.0, 0.5), (0.0, 8.0)])
def test_kappa_is_the_ratio_of_batches_over_a_power_of_that_of_horizons(gamma, expected):
    sde = SDEScaling(base_batch_tokens=100.0, base_horizon_tokens=1000, gamma=gamma)
    assert sde.kappa(800.0, 16_000) == pytest.approx(expected)


def test_without_a_base_nothing_changes():
    assert SDEScaling().kappa(123.0, 456) == 1.0
    assert rescaled(BASE, 1.0) == BASE


@given(st.floats(0.01, 100), st.floats(0.01, 100))
def test_rescaling_twice_is_rescaling_once(first, second):
    twice, once = rescaled(rescaled(BASE, first), second), rescaled(BASE, first * second)
    for name in ("learning_rate", "beta1", "beta2", "epsilon", "weight_decay", "clip_norm", "ema_decay"):
        assert getattr(twice, name) == pytest.approx(getattr(once, name), rel=1e-9)


def test_the_critical_batch_is_the_horizon_over_the_critical_steps():
    assert SDEScaling(critical_steps=200.0).critical_batch(10_000) == 50.0
    assert SDEScaling().critical_batch(10_000) is None


@pytest.mark.parametrize("bad", [{"gamma": 1.5}, {"base_batch_tokens": 0.0}, {"critical_steps": -1.0}])
def test_impossible_bases_are_refused(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        SDEScaling(**bad)


def noisy_descent(optimizer: OptimizerConfig, batch: int, steps: int, key):
    """Mean square of parameter and of average at the end of AdamW on ½p², its gradient noise of variance 100/batch."""
    knobs = optimizer.knobs(Multipliers())
    transform = adamw(knobs)
    start = jnp.full(4000, 1.0)

    def step(carry, number_and_key):
        p, average, state = carry
        number, noise_key = number_and_key
        gradient = p + 10 * jax.random.normal(noise_key, p.shape) / batch**0.5
        update, state = transform.update(gradient, state, p)
        p = p - update
        return (p, averaged(average, p, knobs.ema_decay, number), state), None

    numbers = jnp.arange(1, steps + 1)
    (p, average, _), _ = jax.lax.scan(
        step, (start, start, transform.init(start)), (numbers, jax.random.split(key, steps))
    )
    return float(jnp.mean(p**2)), float(jnp.mean(average**2))


def test_a_noisy_optimizer_ends_the_same_at_every_batch_only_with_the_whole_rule():
    """The claim on the smallest problem there is, 4,000 noisy quadratics at fixed B·S; Monte-Carlo error about 3 %."""
    base = OptimizerConfig(learning_rate=3e-3, epsilon=1.0, weight_decay=1.0, clip_norm=1e9, ema_decay=0.98)
    reference = noisy_descent(base, 16, 800, jax.random.key(0))
    for kappa in (0.25, 4.0):
        batch, steps = int(16 * kappa), int(800 / kappa)
        whole = noisy_descent(rescaled(base, kappa), batch, steps, jax.random.key(1))
        np.testing.assert_allclose(whole, reference, rtol=0.1)
        unscaled = noisy_descent(base, batch, steps, jax.random.key(1))
        assert abs(unscaled[0] / reference[0] - 1) > 0.3
