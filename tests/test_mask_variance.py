"""The study of masks' variance: its formulas against all masks of made-up gradients, its gradients against JAX's."""

import csv
import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree
from madeup import MadeUp

from trimask.diffusion.cross_entropy import cross_entropy, restrict
from trimask.diffusion.data.batches import BatchConfig
from trimask.diffusion.pretraining.description import TrainConfig
from trimask.diffusion.schedule import SCHEDULES, ScheduleConfig
from trimask.diffusion.studies import mask_variance
from trimask.diffusion.studies.mask_variance import (
    WAYS,
    Gradients,
    Moments,
    Variance,
    Variances,
    at_times,
    by_counts,
    coefficients,
    examples_of,
    root_of_second_moment,
    variances,
)
from trimask.diffusion.studies.trainings import trained_until
from trimask.tokenizers.sequence import Example, Segment, assemble

N = 4
SUBSETS = [frozenset(s) for size in range(N + 1) for s in itertools.combinations(range(N), size)]


@pytest.fixture(scope="module")
def population():
    """Gradients of all sets of masked tokens of 3 examples: [example, set, 5]; nothing is masked in the first."""
    gradients = np.random.default_rng(0).normal(size=(3, len(SUBSETS), 5)) + np.arange(5)
    gradients[:, 0] = 0
    return gradients


@pytest.fixture(scope="module")
def moments(population):
    """The exact moments of the population."""
    sizes = np.array([len(s) for s in SUBSETS])
    complement = [SUBSETS.index(frozenset(range(N)) - s) for s in SUBSETS]
    of_size = [sizes == count for count in range(N + 1)]
    means = np.stack([population[:, chosen].mean(axis=(0, 1)) for chosen in of_size])
    products = (population * population[:, complement]).sum(axis=-1)
    return Moments(
        np.array([(population[:, chosen] ** 2).sum(axis=-1).mean() for chosen in of_size]),
        np.array([products[:, chosen].mean() for chosen in of_size]),
        means @ means.T,
    )


@pytest.mark.parametrize("name", WAYS)
@pytest.mark.parametrize("kind", SCHEDULES)
def test_the_variance_is_that_over_all_examples_times_and_masks(population, moments, kind, name):
    drawn, stratified, pairs = WAYS[name]
    schedule = ScheduleConfig(kind=kind, min_share=0.02)
    masks = at_times(schedule, "elbo", N) if drawn == "times" else by_counts(schedule, "elbo", N, pairs=pairs)
    sizes = np.array([len(s) for s in SUBSETS])
    complement = [SUBSETS.index(frozenset(range(N)) - s) for s in SUBSETS]
    within = np.array([1 / (sizes == count).sum() for count in sizes])  # all sets of a size are equally likely
    of_node, squares = [], []
    for p, w, other, counts in zip(*masks[:3], masks.counts.T, strict=True):
        probability = counts[sizes] * within
        estimate = w * population
        if pairs:
            estimate = (estimate + other * population[:, complement]) / 2
        of_node.append(np.einsum("esd,s->d", estimate, probability) / len(population))
        squares.append(p * np.einsum("esd,s->", estimate**2, probability) / len(population))
    p, of_node = masks.probability, np.array(of_node)
    between = (p * (of_node**2).sum(axis=1)).sum() if stratified else ((p @ of_node) ** 2).sum()
    expected = (2 if pairs else 1) * (sum(squares) - between)
    assert coefficients(masks, stratified=stratified, pairs=pairs).times(moments) == pytest.approx(expected, rel=1e-6)
    # The mean is the bound's gradient, Σ_l E G_l / l, for every way to mask.
    bound = sum(population[:, sizes == count].mean(axis=(0, 1)) / count for count in range(1, N + 1))
    np.testing.assert_allclose(p @ of_node, bound, rtol=0.1 if drawn == "times" else 1e-6)


def test_a_pair_of_opposite_gradients_has_no_variance():
    masks = by_counts(ScheduleConfig(), "unweighted", N, pairs=True)
    constant = Moments(np.full(N + 1, 1.0), np.full(N + 1, -1.0), np.zeros((N + 1, N + 1)))
    assert coefficients(masks, stratified=False, pairs=True).times(constant) == pytest.approx(0, abs=1e-12)
    assert coefficients(masks, stratified=False, pairs=False).times(constant) == pytest.approx(1)


def test_flat_weights_of_counts_have_the_mean_of_random_times():
    for kind in SCHEDULES:
        one = at_times(ScheduleConfig(kind=kind, min_share=1e-5), "unweighted", N)
        other = by_counts(ScheduleConfig(kind=kind), "unweighted", N, pairs=False)
        means = [masks.counts @ (masks.probability * masks.weight) for masks in (one, other)]
        np.testing.assert_allclose(means[0][1:], means[1][1:], rtol=5e-3)


def test_ways_that_would_change_the_objective_are_left_out(moments):
    for kind, weighting, expected in (
        ("cosine_md4", "unweighted", 4),
        ("cosine_md4", "elbo", 8),
        ("linear", "unweighted", 8),
    ):
        assert len(variances([moments] * 3, ScheduleConfig(kind=kind), weighting, "plain")) == expected


@pytest.fixture(scope="module")
def measured(prepared, loaded):
    """State of a short training, the gradients of 3 examples, and these examples."""
    train = loaded.description.train
    train = dataclasses.replace(
        train,
        batch=BatchConfig(tokens=120, weights={"spoken": 0.0, "sums": 0.0}),
        optimizer=dataclasses.replace(train.optimizer, horizon_tokens=1000),
    )
    pretraining, opened, state = trained_until(train, prepared.folder, 0.5)
    examples = examples_of(opened, "text_to_image", 3)
    return pretraining, state, Gradients(pretraining, state, examples), examples


def test_the_gradients_are_those_of_the_loss_at_masked_tokens(measured, monkeypatch):
    pretraining, state, gradients, examples = measured
    row = jax.tree.map(jnp.asarray, assemble(pretraining.vocabulary, [examples[0]], examples[0].length))
    n, where = gradients.n, np.flatnonzero(row.is_target)

    def of_all(parameters):
        """Cross-entropy of all targets, with all of them masked."""
        tokens = jnp.where(row.is_target, pretraining.vocabulary.mask_id, row.tokens)
        output = pretraining.denoise(parameters, jax.tree.map(lambda x: x[None], row.replace(tokens=tokens)))
        allowed = pretraining.vocabulary.allowed_ids(row.modality, row.coordinates)
        nll, _ = cross_entropy(restrict(output.logits, allowed[None]), row.tokens[None])
        return nll[0, where].sum()

    expected = np.asarray(ravel_pytree(jax.grad(of_all)(state.parameters))[0], np.float64)
    root = np.asarray(root_of_second_moment(pretraining, state), np.float64)
    assert len(root) == len(expected) and (root > 0).all()
    for metric, scaled in enumerate((expected, expected / root)):
        assert gradients.squares[metric, 0, n] == pytest.approx(scaled @ scaled, rel=1e-3)
    assert (gradients.squares[..., 0] == 0).all() and (gradients.squares[..., 1:] > 0).all()
    assert (np.abs(gradients.products[..., [0, n]]) == 0).all()
    bound = np.sqrt(gradients.squares * gradients.squares[..., ::-1])
    assert gradients.products.shape == (2, 3, n + 1) and (np.abs(gradients.products).mean() <= bound.mean())


def test_masks_and_complements_of_one_size_are_averaged(measured, monkeypatch):
    pretraining, state, _, examples = measured

    def of_example(_, n, *__):
        sizes = np.arange(1, n + 1)
        both = np.stack([sizes, n - sizes], axis=-1).astype(np.float32)  # every number is the size of its mask
        return np.stack([both] * 2), np.stack([sizes * 1.0] * 2), np.stack([both[..., None]] * 2)

    monkeypatch.setattr(mask_variance, "_of_example", of_example)
    gradients = Gradients(pretraining, state, examples)
    sizes = np.arange(gradients.n + 1)
    np.testing.assert_allclose(gradients.squares, np.broadcast_to(sizes, gradients.squares.shape))
    np.testing.assert_allclose(gradients.products[..., 1:], np.broadcast_to(sizes[1:], (2, 3, gradients.n)))
    np.testing.assert_allclose(gradients.moments(1, np.ones(3)).means, np.outer(sizes, sizes))


def test_moments_are_means_over_different_examples(measured):
    gradients = measured[2]
    sketches = np.random.default_rng(0).normal(size=(3, 4, 7)).astype(np.float32)
    products = mask_variance._products(sketches)
    for e, f, count, m in itertools.product(range(3), range(3), range(4), range(4)):
        assert products[e, f, count, m] == pytest.approx(float(sketches[e, count] @ sketches[f, m]), rel=1e-4, abs=1e-5)
    often = np.array([2.0, 0.0, 1.0])
    moments = gradients.moments(0, often)
    np.testing.assert_allclose(moments.squares, often @ gradients.squares[0] / 3)
    between = gradients._products_of_means[0]
    np.testing.assert_allclose(moments.means, (between[0, 2] + between[2, 0]) / 2)


def test_a_sketch_keeps_inner_products_in_expectation(measured, monkeypatch):
    """With all coordinates it is exact; with 64 of them within a few standard deviations."""
    pretraining, state, whole, examples = measured
    assert Gradients.num_parameters(state) <= mask_variance._SKETCH
    monkeypatch.setattr(mask_variance, "_SKETCH", 64)
    mask_variance._of_example.clear_cache()
    small = Gradients(pretraining, state, examples)
    mask_variance._of_example.clear_cache()
    ones = np.ones(3)
    big, little = (each.moments(0, ones).means for each in (whole, small))
    norms = np.sqrt(np.outer(whole.squares[0].mean(axis=0), whole.squares[0].mean(axis=0)))
    assert 0 < np.abs(big - little).max() < 5 * (norms / 64**0.5).max()
    np.testing.assert_array_equal(whole.squares, small.squares)


def test_all_that_is_written(tmp_path, monkeypatch):
    def outcome(trial):
        found = [
            Variance(schedule, weighting, metric, masks, value, 0.5 if masks != "times" else 1.0, (0.4, 0.625))
            for metric in mask_variance.METRICS
            for weighting in ("elbo", "unweighted")
            for schedule, value in (("linear", 3.0), ("polynomial", 3.75 if weighting == "elbo" else 9.0))
            for masks in ("times", "times, pairs", "counts")
        ]
        return Variances(int(100 * trial.moment), 9, found)

    trials = MadeUp(tmp_path, outcome)
    config = mask_variance.MaskVariance(
        base=TrainConfig(), tasks=("text_to_image",), schedules=("linear", "polynomial")
    )
    drawn = {}
    monkeypatch.setattr(
        mask_variance, "draw_intervals", lambda path, panels, *_, columns: drawn.update({path.name: panels})
    )
    report = mask_variance.study(config, trials)
    assert set(drawn) == {"elbo.png", "unweighted.png"} and list(drawn["elbo.png"]) == [
        f"text_to_image at {moment}, {metric} metric" for moment in ("10%", "100%") for metric in ("Adam", "plain")
    ]
    half = (0.5, 0.4, 0.625)
    ways = {"times, pairs": half, "counts": half}
    assert drawn["elbo.png"]["text_to_image at 10%, Adam metric"] == {"linear": ways, "polynomial 2": ways}
    with (tmp_path / "variances.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * 2 * 2 * 2 * 3 and rows[0] == {
        **{"moment": "0.1", "task": "text_to_image", "step": "10", "targets": "9", "schedule": "linear"},
        **{"weighting": "elbo", "metric": "plain", "masks": "times", "value": "3.0", "ratio": "1.0"},
        **{"low": "0.4", "high": "0.625"},
    }
    assert "| task | at | schedule | times, pairs | counts |" in report
    assert "| text_to_image | 100% | linear | 0.50 (0.40–0.62) | 0.50 (0.40–0.62) |" in report
    assert "| task | at | metric | polynomial 2 |" in report and "| text_to_image | 10% | Adam | 1.25 |" in report
    assert report.count("## ") == 4 and "95 % intervals by a bootstrap over 50 examples" in report


def test_examples_of_different_sizes_are_refused(measured):
    pretraining, state, _, _ = measured
    texts = [Example("text", (Segment("text", np.zeros(size, int)),)) for size in (2, 3)]
    with pytest.raises(ValueError, match="all examples of a task must have as many targets, got 2 to 3"):
        Gradients(pretraining, state, texts)


def test_an_unknown_task_is_refused(prepared):
    with pytest.raises(ValueError, match="no dataset has the task 'image_to_video'; there are text, "):
        examples_of(prepared, "image_to_video", 3)
