"""AdamW against NumPy, multipliers class by class, and schedules in tokens."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from trimask.diffusion.optimizer import OptimizerConfig, adamw
from trimask.diffusion.parametrization import Multipliers, standard

CONFIG = OptimizerConfig(
    learning_rate=0.1, beta1=0.8, beta2=0.9, epsilon=1e-3, weight_decay=0.05, clip_norm=1e9,
    horizon_tokens=1000, warmup_tokens=100, final_fraction=0.1,
)  # fmt: skip
CLASSES = {"a": "hidden_weight", "b": "final_norm"}


def steps(transform, parameters, gradients, rate):
    """Parameters after applying u · (−rate) for each gradient."""
    state = transform.init(parameters)
    for gradient in gradients:
        updates, state = transform.update(gradient, state, parameters)
        parameters = {name: parameters[name] - rate * updates[name] for name in parameters}
    return parameters


def numpy_adamw(p, gradients, rate, multipliers):
    """The equation at the head of optimizer.py."""
    m = v = np.zeros_like(p)
    for t, g in enumerate(gradients, 1):
        m, v = 0.8 * m + 0.2 * g, 0.9 * v + 0.1 * g**2
        u = (m / (1 - 0.8**t)) / (np.sqrt(v / (1 - 0.9**t)) + 1e-3 * multipliers.epsilon)
        p = p - rate * multipliers.learning_rate * (u + 0.05 * multipliers.weight_decay * p)
    return p


@pytest.fixture
def problem():
    rng = np.random.default_rng(0)
    draw = lambda: {"a": rng.normal(size=(3, 2)).astype(np.float32), "b": rng.normal(size=4).astype(np.float32)}  # noqa: E731
    return draw(), [draw() for _ in range(6)]


def test_every_multiplier_acts_on_its_class_alone(problem):
    parameters, gradients = problem
    special = Multipliers(learning_rate=0.5, epsilon=30.0, weight_decay=4.0)
    table = {**standard(), "hidden_weight": special}
    after = steps(adamw(CONFIG, CLASSES, table), parameters, gradients, 0.1)
    for name, multipliers in (("a", special), ("b", Multipliers())):
        expected = numpy_adamw(parameters[name], [g[name] for g in gradients], 0.1, multipliers)
        np.testing.assert_allclose(after[name], expected, rtol=1e-5, atol=1e-6)


def test_without_multipliers_it_is_optax_adamw(problem):
    parameters, gradients = problem
    ours = steps(adamw(CONFIG, CLASSES, standard()), parameters, gradients, 0.1)
    reference, theirs = optax.adamw(0.1, 0.8, 0.9, 1e-3, weight_decay=0.05), parameters
    state = reference.init(theirs)
    for gradient in gradients:
        updates, state = reference.update(gradient, state, theirs)
        theirs = optax.apply_updates(theirs, updates)
    for name in parameters:
        np.testing.assert_allclose(ours[name], theirs[name], rtol=1e-5, atol=1e-6)


def test_gradients_are_clipped_to_a_global_norm(problem):
    parameters, (gradient, *_) = problem
    clipped = OptimizerConfig(epsilon=1.0, weight_decay=0.0, clip_norm=0.01)
    transform = adamw(clipped, CLASSES, standard())
    updates, _ = transform.update(gradient, transform.init(parameters), parameters)
    # With ε = 1 ≫ |g| the first update is g itself.
    norm = np.sqrt(sum(np.sum(np.square(u)) for u in updates.values()))
    assert norm == pytest.approx(0.01, rel=0.02)


def test_the_learning_rate_follows_tokens():
    at = [float(CONFIG.learning_rate_at(jnp.asarray(t, jnp.float32))) for t in (0, 50, 100, 550, 1000, 2000)]
    middle = 0.1 * (0.1 + 0.9 * 0.5)
    np.testing.assert_allclose(at, [0, 0.05, 0.1, middle, 0.01, 0.01], rtol=1e-5)


def test_the_average_forgets_its_start_quickly():
    decays = [float(CONFIG.ema_decay_at(jnp.asarray(s))) for s in (0, 10, 10**6)]
    np.testing.assert_allclose(decays, [0.1, 11 / 20, 0.995], rtol=1e-6)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"warmup_tokens": 10, "horizon_tokens": 10}, "10 of 10"),
        ({"beta2": 1.0}, "beta2 must lie in"),
        ({"learning_rate": 0.0}, "must be positive"),
    ],
)
def test_impossible_recipes_are_refused(bad, message):
    with pytest.raises(ValueError, match=message):
        OptimizerConfig(**bad)
