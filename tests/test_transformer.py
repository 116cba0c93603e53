"""The network: what may and may not influence a position, and that its options do what they say."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from trimask.diffusion.parametrization import (
    MODULES,
    Family,
    ModuleMultipliers,
    ParametrizationConfig,
    Site,
    parameter_modules,
)
from trimask.diffusion.transformer import (
    RMSNorm,
    Transformer,
    TransformerConfig,
    num_parameters,
    product,
    rotate,
    sinusoids,
)
from trimask.tokenizers.sequence import assemble, direct, stack
from trimask.tokenizers.vocabulary import Vocabulary

VOCABULARY = Vocabulary(text_size=7, codebook_sizes={"image": (5,), "audio": (3, 4)})
CONFIG = TransformerConfig(num_layers=2, width=16, num_heads=4)
LLADA = dataclasses.replace(CONFIG, qk_norm=False, rotary_base=500_000.0, place_embedding=False)
DREAM = dataclasses.replace(LLADA, num_kv_heads=2, attention_bias=True, rotary_base=1e6, shifted_logits=True)


def build(config=CONFIG, seed=0):
    return Transformer(config, VOCABULARY, key=jax.random.key(seed))


def pair(seed=0):
    rng = np.random.default_rng(seed)
    return direct(
        VOCABULARY.tasks["text_to_audio"],
        {"text": rng.integers(0, 7, 3), "audio": np.stack([rng.integers(0, 3, 2), rng.integers(0, 4, 2)], 1)},
    )


def rows(*packed, length):
    return jax.tree.map(jnp.asarray, stack([assemble(VOCABULARY, list(p), length) for p in packed]))


@pytest.mark.parametrize("config", [CONFIG, DREAM], ids=["ours", "dream"])
def test_padding_never_changes_logits(config):
    model = build(config)
    short, long = rows([pair()], length=10), rows([pair()], length=15)
    np.testing.assert_allclose(model(short).logits, model(long).logits[:, :10], atol=1e-5)


def test_packed_examples_do_not_see_each_other():
    model = build()
    together = model(rows([pair(1), pair(2)], length=20)).logits
    alone = model(rows([pair(2)], length=10)).logits
    np.testing.assert_allclose(together[:, 10:], alone, atol=1e-5)


def test_every_position_of_an_example_sees_every_other():
    model, batch = build(), rows([pair()], length=10)
    base = model(batch).logits
    for position in range(10):
        changed = batch.replace(tokens=batch.tokens.at[0, position].add(1))
        assert (jnp.abs(model(changed).logits - base).max(axis=-1) > 1e-6).all()


def test_two_masked_positions_differ_by_place_and_codebook():
    codes = {"text": np.array([1]), "audio": np.full((3, 2), -1)}
    batch = rows([direct(VOCABULARY.tasks["text_to_audio"], codes)], length=10)
    no_rotary = dataclasses.replace(CONFIG, rotary_base=None)
    hidden = build(no_rotary)(batch).hidden[0, 4:]
    distances = jnp.linalg.norm(hidden[:, None] - hidden[None], axis=-1)
    assert (distances + jnp.eye(6) > 1e-2).all()


def test_without_place_and_rotary_masked_positions_of_a_segment_are_alike():
    codes = {"text": np.array([1]), "audio": np.full((3, 2), -1)}
    batch = rows([direct(VOCABULARY.tasks["text_to_audio"], codes)], length=10)
    blind = dataclasses.replace(CONFIG, rotary_base=None, place_embedding=False)
    np.testing.assert_allclose(
        build(blind)(batch).hidden[0, 4:], jnp.tile(build(blind)(batch).hidden[0, 4], (6, 1)), atol=1e-5
    )


@pytest.mark.parametrize("config", [CONFIG, LLADA, DREAM], ids=["ours", "llada", "dream"])
def test_logits_asked_for_at_positions_are_those_of_the_full_pass(config):
    model, batch = build(config), rows([pair(1)], [pair(2)], length=10)
    asked = jnp.array([[4, 7, 8], [0, 5, 9]])
    full = model(batch)
    part = model(batch, asked)
    np.testing.assert_allclose(part.logits, jnp.take_along_axis(full.logits, asked[..., None], axis=1), atol=1e-5)
    np.testing.assert_allclose(part.hidden, jnp.take_along_axis(full.hidden, asked[..., None], axis=1), atol=1e-5)


@pytest.mark.parametrize("config", [CONFIG, LLADA, DREAM], ids=["ours", "llada", "dream"])
def test_a_fresh_cache_gives_the_logits_of_a_full_pass(config):
    model, batch = build(config), rows([pair(1)], [pair(2)], length=10)
    asked = jnp.array([[4, 5, 6], [7, 8, 9]])
    full = model(batch)
    np.testing.assert_allclose(
        model(batch, asked, full.cache).logits, jnp.take_along_axis(full.logits, asked[..., None], axis=1), atol=1e-5
    )


def test_with_a_cache_only_asked_positions_are_seen_afresh():
    model, batch = build(), rows([pair(1)], length=10)
    asked, cache = jnp.array([[4, 5]]), model(batch).cache
    elsewhere = batch.replace(tokens=batch.tokens.at[0, 8].add(1))
    inside = batch.replace(tokens=batch.tokens.at[0, 5].add(1))
    base = model(batch, asked, cache).logits
    np.testing.assert_array_equal(model(elsewhere, asked, cache).logits, base)
    assert jnp.abs(model(inside, asked, cache).logits - base).max() > 1e-4


def test_shifted_logits_are_those_of_the_position_before():
    batch = rows([pair()], length=10)
    plain, shifted = build(LLADA), build(dataclasses.replace(LLADA, shifted_logits=True))
    np.testing.assert_allclose(shifted(batch).logits[:, 1:], plain(batch).logits[:, :-1], atol=1e-6)


def test_grouped_queries_with_repeated_keys_equal_full_attention():
    full, grouped = build(LLADA), build(dataclasses.replace(LLADA, num_kv_heads=2))
    for a, b in zip(full.blocks, grouped.blocks, strict=True):
        for name in ("query", "out"):
            getattr(b.attention, name)[...] = getattr(a.attention, name)[...]
        for name in ("key", "value"):
            getattr(b.attention, name)[...] = getattr(a.attention, name)[...][:, ::2]
            getattr(a.attention, name)[...] = jnp.repeat(getattr(a.attention, name)[...][:, ::2], 2, axis=1)
        b.mlp = a.mlp
    grouped.embedding, grouped.unembedding = full.embedding, full.unembedding
    batch = rows([pair()], length=10)
    np.testing.assert_allclose(full(batch).logits, grouped(batch).logits, atol=1e-5)


def test_a_tied_head_has_no_unembedding_of_its_own():
    tied = build(dataclasses.replace(CONFIG, tied_unembedding=True))
    saved = VOCABULARY.size * CONFIG.width
    assert num_parameters(nnx.state(build())) - num_parameters(nnx.state(tied)) == saved
    output = tied(rows([pair()], length=10))
    np.testing.assert_allclose(output.logits, output.hidden @ tied.embedding[...].T, atol=1e-4)


def test_bfloat16_computes_in_bfloat16_and_answers_in_float32():
    batch = rows([pair()], length=10)
    half = build(dataclasses.replace(CONFIG, compute_dtype="bfloat16"))(batch)
    assert half.logits.dtype == half.hidden.dtype == jnp.float32
    assert half.cache[0][0].dtype == jnp.bfloat16
    # bfloat16 has 8 bits of mantissa: errors of a few per cent of the logits' scale.
    np.testing.assert_allclose(half.logits, build()(batch).logits, atol=0.15)


def test_every_parameter_names_its_module_and_every_module_occurs():
    biased = dataclasses.replace(CONFIG, attention_bias=True)
    modules = jax.tree.leaves(parameter_modules(build(biased)))
    assert len(modules) == len(jax.tree.leaves(nnx.state(build(biased))))
    assert set(modules) == set(MODULES)


def test_rotation_makes_scores_depend_on_distance_only():
    rng = np.random.default_rng(0)
    q, k = jnp.asarray(rng.normal(size=(2, 1, 1, 1, 8)), jnp.float32)

    def score(i, j):
        return jnp.sum(rotate(q, jnp.array([[i]]), 100.0) * rotate(k, jnp.array([[j]]), 100.0))

    np.testing.assert_allclose(score(3, 7), score(13, 17), rtol=1e-4)
    assert abs(float(score(3, 7) - score(3, 8))) > 1e-3
    np.testing.assert_allclose(jnp.linalg.norm(rotate(q, jnp.array([[5]]), 100.0)), jnp.linalg.norm(q), rtol=1e-5)


def test_the_norm_follows_its_formula():
    norm = RMSNorm(3, 0.5, "final_norm", Site(ParametrizationConfig(), 1.0, 1.0))
    norm.scale[...] = jnp.array([1.0, 2.0, 3.0])
    x = np.array([[1.0, -2.0, 2.0]])
    np.testing.assert_allclose(norm(jnp.asarray(x, jnp.float32)), x / np.sqrt(3.0 + 0.5) * [1, 2, 3], rtol=1e-6)


def test_neighbouring_places_have_dissimilar_sinusoids():
    features = sinusoids(jnp.arange(8), 32)
    unit = features / jnp.linalg.norm(features, axis=-1, keepdims=True)
    assert float((unit @ unit.T - jnp.eye(8)).max()) < 0.9


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"width": 30, "num_heads": 4}, "multiple of num_heads, got 30 and 4"),
        ({"num_heads": 4, "num_kv_heads": 3}, "4/3"),
        ({"width": 12, "num_heads": 4}, "even head size, got 3"),
        ({"num_layers": 0}, "at least 1"),
    ],
)
def test_impossible_shapes_are_refused(bad, message):
    with pytest.raises(ValueError, match=message):
        TransformerConfig(**bad)


@pytest.mark.parametrize("remat", ["none", "block"])
def test_scanned_blocks_are_the_same_function_with_the_same_gradients(remat):
    multipliers = ModuleMultipliers(residual=Family(depth=(0.5, 2.0)))
    parametrization = ParametrizationConfig(base_width=8, base_layers=1, multipliers=multipliers)
    batch = rows([pair(1)], [pair(2)], length=10)

    def outcome(config):
        model = Transformer(config, VOCABULARY, parametrization, key=jax.random.key(0))
        graph, state = nnx.split(model)
        loss = jax.value_and_grad(lambda state: jnp.sum(jnp.sin(nnx.merge(graph, state)(batch).logits)))
        return *loss(state), model(batch).cache

    unrolled = outcome(dataclasses.replace(CONFIG, num_layers=3))
    scanned = outcome(dataclasses.replace(CONFIG, num_layers=3, blocks="scanned", remat=remat))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), unrolled, scanned)


def test_scanned_blocks_are_one_program_however_many():
    def products(num_layers):
        graph, state = nnx.split(build(dataclasses.replace(CONFIG, num_layers=num_layers, blocks="scanned")))
        step = jax.jit(lambda state, batch: nnx.merge(graph, state)(batch).logits)
        return step.lower(state, rows([pair()], length=10)).as_text().count("dot_general")

    assert products(2) == products(5)


@pytest.mark.parametrize(("x_shape", "weight_shape", "axes"), [((2, 3, 5), (5, 4, 2), 1), ((2, 3, 4, 2), (4, 2, 5), 2)])
def test_a_product_is_the_sum_over_its_axes_with_the_gradients_of_it(x_shape, weight_shape, axes):
    rng = np.random.default_rng(0)
    x, weight = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in (x_shape, weight_shape))

    def outcome(product):
        return product(x, weight), *jax.grad(lambda *xw: jnp.sum(jnp.sin(product(*xw))), argnums=(0, 1))(x, weight)

    plain = outcome(lambda x, weight: jnp.tensordot(x, weight, axes))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
        plain,
        outcome(lambda x, weight: product(x, weight, axes)),
    )


def test_gradients_of_weights_are_summed_in_float32_whatever_the_type_of_activations():
    ones = jnp.ones((1, 1024, 1), jnp.bfloat16)
    weight = jnp.ones((1, 1))
    gradient = jax.grad(lambda weight: product(ones, weight).sum())(weight)
    with_one_more = jnp.concatenate([ones, ones[:, :1]], axis=1)
    assert jax.grad(lambda weight: product(with_one_more, weight).sum())(weight) - gradient == 1  # bfloat16 has 8 bits
