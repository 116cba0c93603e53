"""AdamW compared with NumPy and with optax; factors per parameter; schedules and weight average."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from trimask.diffusion.optimizer import OptimizerConfig, adamw, update_average
from trimask.diffusion.parametrization import Multipliers

CONFIG = OptimizerConfig(
    learning_rate=0.1, beta1=0.8, beta2=0.9, epsilon=1e-3, weight_decay=0.05, clip_norm=1e9,
    horizon_tokens=1000, warmup_tokens=100, final_fraction=0.1,
)  # fmt: skip
UNIT = {"a": Multipliers(), "b": Multipliers()}


def steps(transform, parameters, gradients):
    """Parameters after p ← p − update for each gradient."""
    state, update = transform.init(parameters), jax.jit(transform.update)
    for gradient in gradients:
        updates, state = update(gradient, state, parameters)
        parameters = {name: parameters[name] - updates[name] for name in parameters}
    return parameters


def numpy_adamw(p, gradients, of):
    """The equation at the head of optimizer.py, with a parameter's own values, in float64."""
    beta1, beta2 = 0.8**of.beta1, 0.9**of.beta2
    m = v = np.zeros(p.shape)
    for t, g in enumerate(gradients, 1):
        m, v = beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * np.square(g, dtype=float)
        u = (m / (1 - beta1**t)) / (np.sqrt(v / (1 - beta2**t)) + 1e-3 * of.epsilon)
        p = p - 0.1 * of.learning_rate * (u + 0.05 * of.weight_decay * p)
    return p


def drawn(rng):
    return {"a": rng.normal(size=(3, 2)).astype(np.float32), "b": rng.normal(size=4).astype(np.float32)}


@pytest.fixture
def problem():
    """Parameters, and gradients that are small enough for ε to matter."""
    rng = np.random.default_rng(0)
    return drawn(rng), [jax.tree.map(lambda g: 1e-2 * g, drawn(rng)) for _ in range(6)]


@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(Multipliers)])
def test_every_multiplier_acts_on_its_parameter_alone(problem, name):
    parameters, gradients = problem
    special = Multipliers(**{name: 3.0})
    after = steps(adamw(CONFIG.hyperparameters({**UNIT, "a": special})), parameters, gradients)
    for leaf, of in (("a", special), ("b", Multipliers())):
        expected = numpy_adamw(parameters[leaf], [g[leaf] for g in gradients], of)
        np.testing.assert_allclose(after[leaf], expected, rtol=1e-4, atol=1e-5)
    unspecial = numpy_adamw(parameters["a"], [g["a"] for g in gradients], Multipliers())
    assert np.abs(after["a"] - unspecial).max() > 1e-3


def test_with_unit_multipliers_it_is_optax_adamw_over_a_hundred_steps():
    rng = np.random.default_rng(0)
    parameters, gradients = drawn(rng), [drawn(rng) for _ in range(100)]
    usual = OptimizerConfig(learning_rate=1e-3, beta2=0.999, weight_decay=0.1, clip_norm=2.0)
    ours = steps(adamw(usual.hyperparameters(UNIT)), parameters, gradients)
    reference = optax.chain(optax.clip_by_global_norm(2.0), optax.adamw(1e-3, 0.9, 0.999, 1e-8, weight_decay=0.1))
    state, theirs = reference.init(parameters), parameters
    for gradient in gradients:
        updates, state = reference.update(gradient, state, theirs)
        theirs = optax.apply_updates(theirs, updates)
    for name in parameters:
        assert np.abs(ours[name] - parameters[name]).max() > 1e-2
        np.testing.assert_allclose(ours[name], theirs[name], rtol=0, atol=1e-6)


def test_gradients_are_clipped_to_a_global_norm(problem):
    parameters, (gradient, *_) = problem
    clipped = OptimizerConfig(learning_rate=1.0, epsilon=1.0, weight_decay=0.0, clip_norm=1e-3)
    transform = adamw(clipped.hyperparameters(UNIT))
    updates, _ = transform.update(gradient, transform.init(parameters), parameters)
    # With ε = 1 ≫ |g| the first update is g itself.
    norm = np.sqrt(sum(np.sum(np.square(u)) for u in updates.values()))
    assert norm == pytest.approx(1e-3, rel=0.01)


def rates(config, *tokens):
    return [float(config.learning_rate_fraction(jnp.float32(t))) for t in tokens]


def test_the_cosine_follows_tokens():
    middle = 0.1 + 0.9 * 0.5
    np.testing.assert_allclose(rates(CONFIG, 0, 50, 100, 550, 1000, 2000), [0, 0.5, 1, middle, 0.1, 0.1], rtol=1e-5)


def test_a_constant_rate_stays():
    config = dataclasses.replace(CONFIG, schedule="constant")
    np.testing.assert_allclose(rates(config, 0, 50, 100, 550, 1000, 2000), [0, 0.5, 1, 1, 1, 1], rtol=1e-6)
    np.testing.assert_allclose(rates(dataclasses.replace(config, warmup_tokens=0), 0, 1), [1, 1])


def test_warmup_takes_at_most_a_quarter_of_a_short_run():
    for schedule in ("cosine", "constant", "warmup_stable_decay"):
        short = dataclasses.replace(CONFIG, schedule=schedule, warmup_tokens=5000)
        np.testing.assert_allclose(rates(short, 0, 125, 250), [0, 0.5, 1], rtol=1e-6)


@pytest.mark.parametrize(("decay_tokens", "start"), [(None, 800), (400, 600), (900, 100)])
def test_warmup_stable_decay_falls_at_the_end(decay_tokens, start):
    config = dataclasses.replace(CONFIG, schedule="warmup_stable_decay", decay_tokens=decay_tokens)
    expected = [0, 0.5, 1, 1, 0.55, 0.1, 0.1]
    at = rates(config, 0, 50, 100, start, (start + 1000) // 2, 1000, 2000)
    np.testing.assert_allclose(at, expected, rtol=1e-5)


def test_the_average_weighs_each_step_by_its_age_and_forgets_the_start():
    values, average = [5.0, 2.0, 4.0], jnp.float32(100.0)
    for step, value in enumerate(values, 1):
        average = update_average(average, jnp.float32(value), jnp.float32(0.9), jnp.int32(step))
    weights = np.array([0.9**2, 0.9, 1])
    assert float(average) == pytest.approx(values @ weights / weights.sum(), rel=1e-5)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"beta2": 1.0}, "beta2 must lie in"),
        ({"learning_rate": 0.0}, "learning_rate must be positive"),
        ({"weight_decay": -1.0}, "weight_decay must not be negative"),
        ({"decay_tokens": 10}, "is only for the schedule warmup_stable_decay, not for cosine"),
        ({"schedule": "warmup_stable_decay", "decay_tokens": 1_960_000}, r"must lie in \[1, 1950000\]"),
    ],
)
def test_impossible_recipes_are_refused(bad, message):
    with pytest.raises(ValueError, match=message):
        OptimizerConfig(**bad)
