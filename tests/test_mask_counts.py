"""Masks by counts: their distribution against integrals, their draws, and the sets of masked tokens."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fakes import VOCABULARY
from scipy.integrate import quad
from scipy.special import gammaln

from trimask.diffusion.mask_counts import cumulative_counts, draw_counts, draw_uniform_counts, random_subsets
from trimask.diffusion.masking import CONDITIONAL, JOINT, JOINT_TWICE, MaskingConfig, forward_process
from trimask.diffusion.schedule import SCHEDULES, ScheduleConfig
from trimask.tokenizers.sequence import Example, Segment, assemble, stack_rows

compiled_process = jax.jit(forward_process, static_argnums=(2, 3))


def probabilities(table, n):
    return np.diff(table[n, : n + 1], prepend=0.0)


@pytest.mark.parametrize("n", [1, 7, 60])
@pytest.mark.parametrize("kind", SCHEDULES)
def test_counts_are_those_of_independent_masks_at_a_random_time(kind, n):
    config = ScheduleConfig(kind=kind)

    def binomial(t, count):
        s = float(config.masked_share(jnp.float32(t)))
        return math.comb(n, count) * s**count * (1 - s) ** (n - count)

    drawn = probabilities(cumulative_counts(config, 64), n)
    for count in {0, 1, n // 2, n}:
        assert drawn[count] == pytest.approx(quad(binomial, 0, 1, args=(count,), epsrel=1e-6, limit=200)[0], rel=2e-3)


@pytest.mark.parametrize("power", [0.5, 1.0, 3.0])
def test_counts_of_a_power_have_a_closed_form(power):
    count, n, a = np.arange(301), 300, 1 / power
    # ∫ Bin(l; n, t^power) dt = a · C(n, l) · B(l + a, n − l + 1)
    logs = gammaln(n + 1) - gammaln(count + 1) + gammaln(count + a) - gammaln(n + 1 + a)
    table = cumulative_counts(ScheduleConfig(kind="polynomial", power=power), n)
    np.testing.assert_allclose(probabilities(table, n), a * np.exp(logs), rtol=3e-3)


@pytest.mark.parametrize("least", [0, 1])
@pytest.mark.parametrize("kind", SCHEDULES)
def test_draws_are_the_quantiles_of_the_distribution_and_say_its_probabilities(kind, least):
    table, n, size = cumulative_counts(ScheduleConfig(kind=kind), 12), 9, 100_000
    shares = jnp.asarray((np.arange(size) + 0.5) / size, jnp.float32)
    numbers = jnp.full(size, n), jnp.asarray(table[None], jnp.float32), jnp.zeros(size, jnp.int32)
    counts, probability = map(np.asarray, draw_counts(shares, *numbers, least))
    expected = probabilities(table, n)
    expected[:least] = 0
    expected /= expected.sum()
    assert (np.diff(counts) >= 0).all()
    np.testing.assert_allclose(np.bincount(counts, minlength=n + 1) / size, expected, atol=3e-5)
    np.testing.assert_allclose(probability, expected[counts], rtol=1e-5)
    if kind == "linear":  # needs no table
        uniform, probability_of_each = map(np.asarray, draw_uniform_counts(shares, numbers[0], least))
        assert (uniform != counts).mean() < 1e-4
        np.testing.assert_allclose(probability_of_each, 1 / (n + 1 - least), rtol=1e-6)


def test_uniform_counts_stay_within_the_targets_at_any_length():
    last = jnp.float32(1 - 2**-24)
    for n in (0, 1, 5000, 1_000_003):
        shares, number = jnp.array([0.0, last]), jnp.array([n, n])
        for least in (0, 1):
            counts, probability = draw_uniform_counts(shares, number, least)
            assert counts.tolist() == [min(least, n), n] and np.isfinite(np.asarray(probability)).all()


def test_without_targets_nothing_is_drawn():
    table = jnp.asarray(cumulative_counts(ScheduleConfig(), 4)[None], jnp.float32)
    counts, probability = draw_counts(jnp.array([0.0, 0.99]), jnp.array([0, 0]), table, jnp.array([0, 0]), 1)
    assert counts.tolist() == [0, 0] and not np.isnan(np.asarray(probability)).any()


@pytest.mark.parametrize(("kind", "largest"), [("linear", 1.0), ("cosine_md4", 1.6)])
def test_the_largest_weight_is_about_the_number_of_targets(kind, largest):
    table = cumulative_counts(ScheduleConfig(kind=kind), 64)
    for n in range(1, 65):
        of_masked = probabilities(table, n)[1:]
        weights = of_masked.sum() / (np.arange(1, n + 1) * of_masked)
        assert weights.max() <= largest * n * (1 + 1e-4)


def test_every_group_has_a_random_set_of_its_size():
    is_target = jnp.array([[False, True, True, True, True, True, True, False]])
    group, size = jnp.array([[0, 2, 2, 3, 2, 3, 2, 0]]), jnp.array([[9, 2, 2, 1, 2, 1, 2, 9]])
    draw = jax.vmap(lambda key: random_subsets(key, is_target, group, size)[0])
    sets = np.asarray(draw(jax.random.split(jax.random.key(0), 12_000)))
    assert not sets[:, [0, 7]].any()
    for number, members, expected in ((2, [1, 2, 4, 6], 6), (1, [3, 5], 2)):
        chosen, often = np.unique(sets[:, members], axis=0, return_counts=True)
        assert len(chosen) == expected and (chosen.sum(axis=1) == number).all()
        np.testing.assert_allclose(often / len(sets), 1 / expected, atol=5 * (0.25 / len(sets)) ** 0.5)


def rows_of(*lengths):
    """A row that holds one text of each length."""
    texts = [Example("text", (Segment("text", np.arange(length) % 6),)) for length in lengths]
    return assemble(VOCABULARY, texts, 2 * len(lengths) + sum(lengths))


def test_every_example_of_a_packed_row_has_a_count_of_its_own_and_all_are_evenly_spread():
    batch = stack_rows([rows_of(8, 3, 5)] * 32)
    noised = compiled_process(jax.random.key(0), batch, VOCABULARY, MaskingConfig(counts=True))
    segment, is_masked, is_target = (np.asarray(x) for x in (batch.segment, noised.is_masked, noised.is_target))
    shares = []
    for number, length in enumerate((8, 3, 5), 1):
        counts = (is_masked & (segment == number)).sum(axis=1)
        weights = np.asarray(noised.weight)[(segment == number) & is_target].reshape(32, length)
        assert counts.min() >= 1
        np.testing.assert_allclose(weights, np.broadcast_to((length / counts)[:, None], weights.shape), rtol=1e-5)
        shares += (counts / length).tolist()
    assert len({tuple(row) for row in is_masked[:, :].tolist()}) > 16
    assert np.mean(shares) == pytest.approx(np.mean([(n + 1) / (2 * n) for n in (8, 3, 5)]), abs=0.05)


@pytest.fixture(scope="module")
def pairs():
    """Rows of a picture given a text of 4 tokens, one in each."""
    codes = {"text": np.arange(4), "image": np.arange(9).reshape(3, 3) % 5}
    pair = Example.of_task(VOCABULARY.tasks["text_to_image"], codes)
    return stack_rows([assemble(VOCABULARY, [pair], 18)] * 64)


@pytest.mark.parametrize("complementary", [False, True])
def test_two_sides_have_one_count_together_or_one_each(pairs, complementary):
    own = {"image": ScheduleConfig(kind="polynomial", power=3.0)}
    config = MaskingConfig(counts=True, complementary=complementary, joint_probability=0.8, schedules=own)
    noised = compiled_process(jax.random.key(1), pairs, VOCABULARY, config)
    halves = np.asarray(noised.is_masked).reshape(-1, 64, 18)
    weights, mode = np.asarray(noised.weight).reshape(-1, 64, 18), np.asarray(noised.mode)[:64, 0]
    least = 0 if complementary else 1

    def expected(n, count, kind):
        config = own.get(kind, ScheduleConfig())
        p = probabilities(cumulative_counts(config, 18), n)
        p[:least] = 0
        return 0 if count == 0 else p.sum() / (count * p[count])

    assert set(mode) >= {CONDITIONAL, JOINT, JOINT_TWICE}
    for row in range(64):
        text, image = halves[0, row, 2:6], halves[0, row, 7:16]
        in_text, in_image = text.sum(), image.sum()
        if mode[row] == JOINT:
            assert in_text + in_image >= least
            weight = expected(13, in_text + in_image, "image")
            np.testing.assert_allclose(weights[0, row, 2:16][[0, -1]], weight, rtol=1e-4)
        elif mode[row] == JOINT_TWICE:
            assert min(in_text, in_image) >= least
            np.testing.assert_allclose(weights[0, row, 2], expected(4, in_text, "text"), rtol=1e-4)
            np.testing.assert_allclose(weights[0, row, 15], expected(9, in_image, "image"), rtol=1e-4)
        else:
            assert not text.any()
        if complementary:
            assert (halves[1, row, 7:16] == ~image).all()
    assert np.isfinite(weights).all()


def test_a_schedule_of_an_unknown_modality_is_refused(pairs):
    config = dataclasses.replace(MaskingConfig(), schedules={"video": ScheduleConfig()})
    with pytest.raises(ValueError, match="noise schedules for unknown video; there are text, image, audio"):
        compiled_process(jax.random.key(0), pairs, VOCABULARY, config)
