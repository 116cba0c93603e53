"""The transformer: which inputs influence a position, and the effects of its options."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fakes import run
from flax import nnx

from trimask.diffusion.parametrization import (
    MODULES,
    Family,
    ModuleMultipliers,
    ParametrizationConfig,
    parameter_modules,
)
from trimask.diffusion.transformer import Transformer, TransformerConfig, num_parameters
from trimask.tokenizers.sequence import Example, assemble, stack_rows
from trimask.tokenizers.vocabulary import Vocabulary

VOCABULARY = Vocabulary(text_size=7, codebook_sizes={"image": (5,), "audio": (3, 4)})
CONFIG = TransformerConfig(num_layers=2, width=16, num_heads=4)
LLADA = dataclasses.replace(CONFIG, qk_norm=False, rotary_base=500_000.0, place_embedding=False)
DREAM = dataclasses.replace(LLADA, num_kv_heads=2, attention_bias=True, rotary_base=1e6, shifted_logits=True)


def build(config=CONFIG, seed=0):
    return Transformer(config, VOCABULARY, key=jax.random.key(seed))


def pair(seed=0):
    rng = np.random.default_rng(seed)
    return Example.of_task(
        VOCABULARY.tasks["text_to_audio"],
        {"text": rng.integers(0, 7, 3), "audio": np.stack([rng.integers(0, 3, 2), rng.integers(0, 4, 2)], 1)},
    )


def rows(*packed, length):
    return jax.tree.map(jnp.asarray, stack_rows([assemble(VOCABULARY, list(p), length) for p in packed]))


@pytest.mark.parametrize("config", [CONFIG, DREAM], ids=["ours", "dream"])
def test_padding_never_changes_logits(config):
    model = build(config)
    short, long = rows([pair()], length=10), rows([pair()], length=15)
    np.testing.assert_allclose(run(model, short).logits, run(model, long).logits[:, :10], atol=1e-5)


def test_packed_examples_do_not_see_each_other():
    model = build()
    together = run(model, rows([pair(1), pair(2)], length=20)).logits
    alone = run(model, rows([pair(2)], length=10)).logits
    np.testing.assert_allclose(together[:, 10:], alone, atol=1e-5)


def test_every_position_of_an_example_sees_every_other():
    model, batch = build(), rows([pair()], length=10)
    base = run(model, batch).logits
    for position in range(10):
        changed = batch.replace(tokens=batch.tokens.at[0, position].add(1))
        assert (jnp.abs(run(model, changed).logits - base).max(axis=-1) > 1e-6).all()


def test_two_masked_positions_differ_by_place_and_codebook():
    codes = {"text": np.array([1]), "audio": np.full((3, 2), -1)}
    batch = rows([Example.of_task(VOCABULARY.tasks["text_to_audio"], codes)], length=10)
    no_rotary = dataclasses.replace(CONFIG, rotary_base=None)
    hidden = run(build(no_rotary), batch).hidden[0, 4:]
    distances = jnp.linalg.norm(hidden[:, None] - hidden[None], axis=-1)
    assert (distances + jnp.eye(6) > 1e-2).all()


def test_without_place_and_rotary_masked_positions_of_a_segment_are_alike():
    codes = {"text": np.array([1]), "audio": np.full((3, 2), -1)}
    batch = rows([Example.of_task(VOCABULARY.tasks["text_to_audio"], codes)], length=10)
    blind = dataclasses.replace(CONFIG, rotary_base=None, place_embedding=False)
    hidden = run(build(blind), batch).hidden[0, 4:]
    np.testing.assert_allclose(hidden, jnp.tile(hidden[0], (6, 1)), atol=1e-5)


@pytest.mark.parametrize("config", [CONFIG, LLADA, DREAM], ids=["ours", "llada", "dream"])
def test_logits_asked_for_at_positions_are_those_of_the_full_pass(config):
    model, batch = build(config), rows([pair(1)], [pair(2)], length=10)
    asked = jnp.array([[4, 7, 8], [0, 5, 9]])
    full = run(model, batch)
    part = run(model, batch, asked)
    np.testing.assert_allclose(part.logits, jnp.take_along_axis(full.logits, asked[..., None], axis=1), atol=1e-5)
    np.testing.assert_allclose(part.hidden, jnp.take_along_axis(full.hidden, asked[..., None], axis=1), atol=1e-5)


@pytest.mark.parametrize("config", [CONFIG, LLADA, DREAM], ids=["ours", "llada", "dream"])
def test_a_fresh_cache_gives_the_logits_of_a_full_pass(config):
    model, batch = build(config), rows([pair(1)], [pair(2)], length=10)
    asked = jnp.array([[4, 5, 6], [7, 8, 9]])
    full = run(model, batch)
    np.testing.assert_allclose(
        run(model, batch, asked, full.cache).logits,
        jnp.take_along_axis(full.logits, asked[..., None], axis=1),
        atol=1e-5,
    )


def test_with_a_cache_only_asked_positions_are_seen_afresh():
    model, batch = build(), rows([pair(1)], length=10)
    asked, cache = jnp.array([[4, 5]]), run(model, batch).cache
    elsewhere = batch.replace(tokens=batch.tokens.at[0, 8].add(1))
    inside = batch.replace(tokens=batch.tokens.at[0, 5].add(1))
    base = run(model, batch, asked, cache).logits
    np.testing.assert_array_equal(run(model, elsewhere, asked, cache).logits, base)
    assert jnp.abs(run(model, inside, asked, cache).logits - base).max() > 1e-4


def test_shifted_logits_are_those_of_the_position_before():
    batch = rows([pair()], length=10)
    plain, shifted = build(LLADA), build(dataclasses.replace(LLADA, shifted_logits=True))
    np.testing.assert_allclose(run(shifted, batch).logits[:, 1:], run(plain, batch).logits[:, :-1], atol=1e-6)


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
    np.testing.assert_allclose(run(full, batch).logits, run(grouped, batch).logits, atol=1e-5)


def test_a_tied_head_has_no_unembedding_of_its_own():
    tied = build(dataclasses.replace(CONFIG, tied_unembedding=True))
    saved = VOCABULARY.size * CONFIG.width
    assert num_parameters(nnx.state(build())) - num_parameters(nnx.state(tied)) == saved
    output = run(tied, rows([pair()], length=10))
    np.testing.assert_allclose(output.logits, output.hidden @ tied.embedding[...].T, atol=1e-4)


def test_bfloat16_computes_in_bfloat16_and_answers_in_float32():
    batch = rows([pair()], length=10)
    half = run(build(dataclasses.replace(CONFIG, compute_dtype="bfloat16")), batch)
    assert half.logits.dtype == half.hidden.dtype == jnp.float32
    assert half.cache[0][0].dtype == jnp.bfloat16
    # bfloat16 has 8 bits of mantissa: errors of a few per cent of the logits' scale.
    np.testing.assert_allclose(half.logits, run(build(), batch).logits, atol=0.15)


def test_every_parameter_names_its_module_and_every_module_occurs():
    biased = dataclasses.replace(CONFIG, attention_bias=True)
    modules = jax.tree.leaves(parameter_modules(build(biased)))
    assert len(modules) == len(jax.tree.leaves(nnx.state(build(biased))))
    assert set(modules) == set(MODULES)


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


def test_scanned_blocks_are_the_same_function_with_the_same_gradients():
    multipliers = ModuleMultipliers(residual=Family(depth=(0.5, 2.0)))
    parametrization = ParametrizationConfig(base_width=8, base_layers=1, multipliers=multipliers)
    batch = rows([pair(1)], [pair(2)], length=10)

    def outcome(**changes):
        config = dataclasses.replace(CONFIG, **changes)
        graph, state = nnx.split(Transformer(config, VOCABULARY, parametrization, key=jax.random.key(0)))

        def loss(state):
            seen = nnx.merge(graph, state)(batch)
            return jnp.sum(jnp.sin(seen.logits)), seen.cache

        return jax.jit(jax.value_and_grad(loss, has_aux=True))(state)

    unrolled = outcome()
    for remat in ("none", "block"):
        scanned = outcome(blocks="scanned", remat=remat)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), unrolled, scanned)


def test_scanned_blocks_are_one_program_however_many():
    def products(num_layers):
        graph, state = nnx.split(build(dataclasses.replace(CONFIG, num_layers=num_layers, blocks="scanned")))
        step = jax.jit(lambda state, batch: nnx.merge(graph, state)(batch).logits)
        return step.lower(state, rows([pair()], length=10)).as_text().count("dot_general")

    assert products(2) == products(5)


def test_a_network_is_computed_in_another_way_and_stays_what_it_is():
    ways = {"attention": "kernel", "blocks": "scanned", "remat": "block"}
    other = TransformerConfig(num_layers=7, width=64, compute_dtype="bfloat16", **ways)
    assert CONFIG.computed_as(other) == dataclasses.replace(CONFIG, **ways)
