"""The forward process and the objective against the exact bound of a toy model."""

import dataclasses
import itertools
import math
from functools import partial
from types import SimpleNamespace

import fakes
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from trimask.diffusion.loss import LossConfig, loss_and_metrics, loss_scale
from trimask.diffusion.masking import (
    CONDITIONAL,
    JOINT,
    JOINT_TWICE,
    UNCONDITIONAL,
    MaskingConfig,
    draw_is_masked,
    forward_process,
)
from trimask.tokenizers.sequence import Example, Segment, assemble, stack_rows
from trimask.tokenizers.vocabulary import Vocabulary

at_times = partial(MaskingConfig, counts=False)
"""Masks at random times; those by counts are tested in test_mask_counts.py."""

TEXT_LENGTH = 3
compiled_process = jax.jit(forward_process, static_argnums=(2, 3))


def noised_by(key, batch, vocabulary, config):
    """The forward process, compiled, as NumPy arrays."""
    return arrays_of(compiled_process(jax.random.key(key), batch, vocabulary, config))


def arrays_of(tree):
    fields = {field.name: getattr(tree, field.name) for field in dataclasses.fields(tree)}
    return SimpleNamespace(
        **{
            name: arrays_of(part) if dataclasses.is_dataclass(part) else np.asarray(part)
            for name, part in fields.items()
        }
    )


@pytest.fixture(scope="module")
def vocabulary():
    return Vocabulary(text_size=2, codebook_sizes={"image": (5,)})


@pytest.fixture(scope="module")
def toy(vocabulary):
    """A model that is a table: logits of every position for each of the 2³ subsets of masked text positions."""
    logits = np.random.default_rng(0).normal(size=(2**TEXT_LENGTH, TEXT_LENGTH, vocabulary.size)).astype(np.float32)
    codes = np.array([1, 0, 2])
    row = assemble(vocabulary, [Example("text", (Segment("text", codes),))], 5)
    return jnp.asarray(logits), row


def table_logits(table, sequence, vocabulary):
    """The table's logits at the text positions 2, 3, 4 of rows [task, begin, text × 3]."""
    is_masked = sequence.tokens[:, 2:] == vocabulary.mask_id
    subset = jnp.sum(is_masked * 2 ** jnp.arange(TEXT_LENGTH), axis=1)
    return jnp.pad(table[subset], ((0, 0), (2, 0), (0, 0)))


def exact_bound(table, row, vocabulary):
    """NELBO in nats per token: Σ_M (|M|−1)! (L−|M|)! / L! · Σ_{i∈M} −log p(x_i | M masked), for every schedule."""
    text = vocabulary.text_range
    total = 0.0
    for masked in itertools.product([0, 1], repeat=TEXT_LENGTH):
        size = sum(masked)
        if size == 0:
            continue
        coefficient = math.factorial(size - 1) * math.factorial(TEXT_LENGTH - size) / math.factorial(TEXT_LENGTH)
        logits = np.asarray(table[sum(bit << i for i, bit in enumerate(masked))], np.float64)[:, text.start : text.stop]
        log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        for i in np.flatnonzero(masked):
            total -= coefficient * log_p[i, row.tokens[2 + i] - text.start]
    return total / TEXT_LENGTH


def estimate(key, table, row, vocabulary, config, rows):
    batch = jax.tree.map(lambda x: jnp.broadcast_to(x, (rows, *x.shape)), row)
    noised = forward_process(key, batch, vocabulary, config)
    logits = table_logits(table, noised.sequence, vocabulary)
    scale = loss_scale(LossConfig(), {"text": float(len(noised.clean) * TEXT_LENGTH)}, vocabulary)
    return loss_and_metrics(logits, jnp.eye(vocabulary.size), noised, scale, vocabulary, LossConfig())


@pytest.mark.parametrize(
    ("name", "counts", "complementary"),
    [
        *((name, False, True) for name in fakes.MASKINGS),
        *((name, True, True) for name in ("linear", "cosine_mdlm", "by modality")),
        ("linear", False, False),
        ("linear", True, False),
        ("cosine_mdlm", True, False),
        ("by modality", True, False),
    ],
)
def test_the_loss_is_an_unbiased_estimate_of_the_exact_bound(toy, vocabulary, name, counts, complementary):
    table, row = toy
    config = dataclasses.replace(fakes.MASKINGS[name], complementary=complementary, counts=counts)
    run = jax.jit(jax.vmap(lambda key: estimate(key, table, row, vocabulary, config, 512)[0]))
    values = np.asarray(run(jax.random.split(jax.random.key(1), 100)))
    standard_error = values.std(ddof=1) / len(values) ** 0.5
    exact = exact_bound(table, row, vocabulary)
    # The ends that are cut off change it by up to 2·min_share; 4 standard errors are a false alarm in 16,000.
    cut_off = 0 if counts else 2 * config.schedule.min_share * exact
    assert abs(values.mean() - exact) < 4 * standard_error + cut_off
    assert standard_error < 0.01 * exact


def test_devices_that_share_the_rows_have_equal_work(toy, vocabulary):
    """Each of 8 devices has 8 of 64 rows. If times were evenly spread in row order, the ratio would be 1.8."""
    _, row = toy
    batch = jax.tree.map(lambda x: jnp.broadcast_to(x, (64, *x.shape)), row)
    masks = jax.jit(jax.vmap(lambda key: forward_process(key, batch, vocabulary, at_times()).is_masked))
    shares = np.asarray(masks(jax.random.split(jax.random.key(4), 200))).reshape(200, 8, -1).sum(-1)
    assert (shares.max(1) / shares.mean(1)).mean() < 1.35


def test_the_reported_bound_does_not_depend_on_what_is_trained_on(toy, vocabulary):
    table, row = toy
    batch = jax.tree.map(lambda x: jnp.broadcast_to(x, (64, *x.shape)), row)
    other = LossConfig(weighting="unweighted", modality_weights={"text": 3.0}, z_loss=0.1)

    @jax.jit
    def both(key):
        noised = forward_process(key, batch, vocabulary, at_times())
        logits, matrix = table_logits(table, noised.sequence, vocabulary), jnp.eye(vocabulary.size)
        return [
            loss_and_metrics(
                logits, matrix, noised, loss_scale(config, {"text": 192.0}, vocabulary), vocabulary, config
            )
            for config in (LossConfig(), other)
        ]

    (plain, metrics), (changed, other_metrics) = both(jax.random.key(3))
    assert float(metrics["bits/text"]) == float(other_metrics["bits/text"])
    assert np.isclose(float(metrics["bits/text"]) * np.log(2), float(plain), rtol=1e-5)
    assert not np.isclose(float(plain), float(changed), rtol=1e-2)


def test_a_token_is_masked_with_the_given_probability():
    probability = jnp.array([[0.0, 0.2, 0.7, 1.0]])
    draw = jax.jit(jax.vmap(lambda key: draw_is_masked(key, jnp.ones((1, 4), bool), probability)))
    masked = np.asarray(draw(jax.random.split(jax.random.key(0), 4000)))
    # Five standard deviations of a share of 4,000 draws are 0.04.
    np.testing.assert_allclose(masked.mean(axis=(0, 1)), probability[0], atol=0.04)


@pytest.fixture(scope="module")
def pairs(vocabulary):
    """Rows of text → image, 2 text and 4 image tokens each."""
    rng = np.random.default_rng(1)
    codes = [{"text": rng.integers(0, 2, 2), "image": rng.integers(0, 5, (2, 2))} for _ in range(300)]
    rows = [assemble(vocabulary, [Example.of_task(vocabulary.tasks["text_to_image"], c)], 9) for c in codes]
    return stack_rows(rows)


def test_a_condition_is_never_masked_and_carries_no_loss(vocabulary, pairs):
    config = at_times(joint_probability=0.0, drop_probability=0.0, complementary=True)
    noised = noised_by(0, pairs, vocabulary, config)
    twice = np.concatenate([pairs.is_condition] * 2)
    assert not (noised.is_masked & twice).any() and not (noised.is_target & twice).any()
    assert (noised.sequence.tokens[twice] == noised.clean[twice]).all()
    assert (noised.sequence.tokens[noised.sequence.modality == 0] != vocabulary.mask_id).all()


def test_a_dropped_condition_is_hidden_without_loss(vocabulary, pairs):
    config = at_times(joint_probability=0.0, drop_probability=1.0)
    noised = noised_by(0, pairs, vocabulary, config)
    assert (noised.sequence.tokens[pairs.is_condition] == vocabulary.mask_id).all()
    assert not noised.is_masked[pairs.is_condition].any() and not noised.is_target[pairs.is_condition].any()


def test_a_prompt_is_whole_or_hidden_and_never_a_target(vocabulary):
    """Both examples of a row are texts; only the first has a prompt, so only it can be without its condition."""
    codes = {"text": np.array([1, 0, 1, 2])}
    examples = [Example.of_task(vocabulary.tasks["text"], codes, num_given) for num_given in (2, 0)]
    rows = stack_rows([assemble(vocabulary, examples, 13)] * 64)
    for joint, drop, hidden in ((1.0, 0.0, {0}), (0.0, 1.0, {2}), (0.3, 0.5, {0, 2})):
        noised = noised_by(1, rows, vocabulary, at_times(joint_probability=joint, drop_probability=drop))
        is_hidden = noised.sequence.tokens[:, 2:4] == vocabulary.mask_id
        assert set(is_hidden.sum(axis=1).tolist()) == hidden
        np.testing.assert_array_equal(noised.mode[:, 2], np.where(is_hidden[:, 0], UNCONDITIONAL, CONDITIONAL))
        assert (noised.mode[:, 6:12] == CONDITIONAL).all()
        assert not noised.is_target[:, 2:4].any() and noised.is_masked[:, 4:6].any()


def test_modes_come_as_often_as_configured(vocabulary, pairs):
    batch = jax.tree.map(lambda x: np.tile(x, (10, *[1] * (x.ndim - 1))), pairs)
    config = at_times(joint_probability=0.3, drop_probability=0.2)
    noised = noised_by(4, batch, vocabulary, config)
    is_joint = (noised.is_target & batch.is_condition).any(axis=1)
    hidden = ((noised.sequence.tokens == vocabulary.mask_id) | ~batch.is_condition).all(axis=1)
    assert abs(float(is_joint.mean()) - 0.3) < 0.04  # five standard deviations of 3,000 draws
    assert abs(float((hidden & ~is_joint).mean()) - 0.2) < 0.04
    shares = [(noised.mode[:, 0] == mode).mean() for mode in (CONDITIONAL, JOINT, JOINT_TWICE, UNCONDITIONAL)]
    np.testing.assert_allclose(shares, [0.5, 0.15, 0.15, 0.2], atol=0.04)
    np.testing.assert_array_equal(is_joint, np.isin(noised.mode[:, 0], (JOINT, JOINT_TWICE)))


def test_half_of_the_joint_examples_are_masked_at_one_time_and_half_at_two(vocabulary, pairs):
    batch = jax.tree.map(lambda x: np.tile(x, (10, *[1] * (x.ndim - 1))), pairs)
    noised = noised_by(5, batch, vocabulary, at_times(joint_probability=1.0, drop_probability=0.0))
    times = 1 / noised.weight  # linear schedule: w = 1/t
    text, image = times[:, 2], times[:, -1]
    assert batch.is_condition[:, 2].all() and batch.is_target[:, -1].all()
    is_one, is_two = (noised.mode[:, 0] == mode for mode in (JOINT, JOINT_TWICE))
    assert (is_one | is_two).all() and abs(is_one.mean() - 0.5) < 0.05  # five standard deviations of 3,000 pairs
    np.testing.assert_array_equal(text[is_one], image[is_one])
    assert abs(np.corrcoef(text[is_two], image[is_two])[0, 1]) < 0.13 and abs(text[is_two].mean() - 0.5) < 0.05


def test_bits_of_joint_examples_are_those_of_both_sides_together(vocabulary):
    """A fair coin is told sixteen times by the text and once by the picture: one bit, known once a token is seen."""
    task, rng = vocabulary.tasks["text_to_image"], np.random.default_rng(2)
    coins = rng.integers(0, 2, 4000)
    codes = [{"text": np.full(16, coin), "image": np.full((1, 1), coin)} for coin in coins]
    rows = stack_rows([assemble(vocabulary, [Example.of_task(task, c)], 20) for c in codes])

    def estimates(config):
        noised = compiled_process(jax.random.key(7), rows, vocabulary, config)
        is_known = ((noised.sequence.tokens != vocabulary.mask_id) & (rows.modality > 0)).any(axis=1, keepdims=True)
        first = jnp.array([0, vocabulary.text_range.start, vocabulary.ranges[2].start])[rows.modality]
        sure = 40 * jax.nn.one_hot(rows.tokens, vocabulary.size)
        coin = 40 * (jax.nn.one_hot(first, vocabulary.size) + jax.nn.one_hot(first + 1, vocabulary.size))
        logits, matrix = jnp.where(is_known[..., None], sure, coin), jnp.eye(vocabulary.size)
        return loss_and_metrics(logits, matrix, noised, jnp.ones(3), vocabulary, LossConfig(tile_positions=8192))[1]

    metrics = jax.jit(estimates, static_argnums=0)(at_times(joint_probability=0.6, drop_probability=0.2))
    # With two times the sum would be 1/2 + 1/17, and with hidden conditions the picture's own bit would be counted.
    assert float(metrics["bits/joint/text_to_image"]) * 17 == pytest.approx(1.0, abs=0.15)
    assert float(metrics["bits/task/text_to_image"]) == pytest.approx(0.0, abs=1e-6)


def test_every_modality_is_masked_by_its_own_schedule(vocabulary, pairs):
    config = dataclasses.replace(fakes.MASKINGS["by modality"], joint_probability=1.0, drop_probability=0.0)
    masks = jax.vmap(lambda key, batch: forward_process(key, batch, vocabulary, config).is_masked, (0, None))
    share = np.asarray(jax.jit(masks)(jax.random.split(jax.random.key(6), 10), pairs)).mean(axis=(0, 1))
    text, image = (share[(pairs.modality[0] == n) & (pairs.is_condition | pairs.is_target)[0]] for n in (1, 2))
    # ∫ t³ dt and ∫ t dt; five standard deviations of 3,000 examples.
    np.testing.assert_allclose(text, 1 / 4, atol=0.04)
    np.testing.assert_allclose(image, 1 / 2, atol=0.04)


def test_every_example_of_a_packed_row_has_one_time_and_all_are_spread_evenly(vocabulary):
    examples = [Example("text", (Segment("text", np.array([0, 1])),))] * 3
    rows = stack_rows([assemble(vocabulary, examples, 14)] * 8)
    noised = noised_by(0, rows, vocabulary, at_times())
    times = np.asarray(1 / noised.weight)  # linear schedule: w = 1/t
    per_example = []
    for row, segment in zip(times, np.asarray(rows.segment), strict=True):
        for number in (1, 2, 3):
            values = row[segment == number]
            np.testing.assert_allclose(values, values[0], rtol=1e-6)
            per_example.append(values[0])
    gaps = np.diff(np.sort(per_example))
    np.testing.assert_allclose(gaps, 1 / 24, rtol=0.01)


def test_a_pair_of_complementary_masks_predicts_every_target_once(vocabulary, pairs):
    noised = noised_by(0, pairs, vocabulary, at_times(complementary=True))
    first, second = np.split(noised.is_masked, 2)
    assert (first ^ second == noised.is_target[:300]).all()


def test_a_batch_without_a_modality_gives_a_finite_loss(vocabulary, pairs):
    @jax.jit
    def of_nothing(key, batch):
        noised = forward_process(key, batch, vocabulary, at_times())
        nowhere = jnp.zeros_like(noised.is_target)
        nothing = dataclasses.replace(noised, is_target=nowhere, is_masked=nowhere)
        logits, matrix = jnp.zeros((300, 9, vocabulary.size)), jnp.eye(vocabulary.size)
        scale = loss_scale(LossConfig(), {"text": 600.0}, vocabulary)
        return loss_and_metrics(logits, matrix, nothing, scale, vocabulary, LossConfig())

    loss, metrics = of_nothing(jax.random.key(0), pairs)
    assert float(loss) == 0 and np.isnan(float(metrics["bits/image"]))


@pytest.mark.parametrize(
    ("text", "about", "ids"), [(8191, 4096, 4096), (8192, 4096, 4112), (300, 4096, 304), (8192, 1, 16)]
)
def test_the_largest_range_is_a_whole_number_of_tiles(text, about, ids):
    vocabulary = Vocabulary(text_size=text, codebook_sizes={"image": (5,)})  # text has one more: EOS
    assert LossConfig(tile_ids=about).ids_of_tile(vocabulary) == ids
