"""Table 1 of Complete(d)P, cell by cell as the paper prints it, and its effect on a network."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fakes import run
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st

from trimask.diffusion.optimizer import OptimizerConfig, adamw
from trimask.diffusion.parametrization import (
    MODULES,
    PARAMETER_CLASSES,
    PARAMETRIZATIONS,
    Family,
    ModuleMultipliers,
    Multipliers,
    ParametrizationConfig,
    parameter_modules,
    parameter_multipliers,
)
from trimask.diffusion.transformer import Transformer, TransformerConfig
from trimask.tokenizers.sequence import Example, assemble, stack_rows
from trimask.tokenizers.vocabulary import Vocabulary

VOCABULARY = Vocabulary(text_size=70, codebook_sizes={"image": (50,)})
BASE = TransformerConfig(num_layers=1, width=32, num_heads=2, mlp_width=96, attention_bias=True)
TARGET = dataclasses.replace(BASE, num_layers=3, width=128, num_heads=8, mlp_width=192)
"""Four times as wide, but the MLP twice; three times as deep."""
N, MLP, L, A = 4, 2, 3, 0.75
FROM_BASE = ParametrizationConfig(base_width=32, base_layers=1, base_mlp_width=96, alpha=A)

# Written as exponents of (m_N, m_L), independently of the code: class → init variance, learning rate, ε, weight decay.
PAPER = {
    "input_embedding": [(0, 0), (0, 0), (-1, 0), (0, 0)],
    "hidden_weight": [(-1, 0), (-1, A - 1), (-1, -A), (1, 0)],
    "hidden_bias_or_norm": [(0, 0), (0, A - 1), (-1, -A), (0, 0)],
    "qk_norm": [(0, 0), (0, A - 1), (0, -A), (0, 0)],
    "final_norm": [(0, 0), (0, 0), (0, 0), (0, 0)],
    "unembedding": [(-2, 0), (-1, 0), (0, 0), (1, 0)],
}
COMPLETEP = PAPER | {
    "input_embedding": [(0, 0), (0, 0), (0, 0), (0, 0)],
    "qk_norm": [(0, 0), (0, A - 1), (-1, -A), (0, 0)],
    "unembedding": [(0, 0), (0, 0), (0, 0), (1, 0)],
}
MUP = {
    "input_embedding": [(0, 0), (0, 0), (-1, 0), (0, 0)],
    "hidden_weight": [(-1, 0), (-1, 0), (-1, 0), (1, 0)],
    "hidden_bias_or_norm": [(0, 0), (0, 0), (-1, 0), (0, 0)],
    "qk_norm": [(0, 0), (0, 0), (-1, 0), (0, 0)],
    "final_norm": [(0, 0), (0, 0), (0, 0), (0, 0)],
    "unembedding": [(-2, 0), (-1, 0), (0, 0), (1, 0)],
}
PRINTED = {
    "completed_p": (PAPER, (0, 0), (0, -A)),
    "completep": (COMPLETEP, (-1, 0), (0, -A)),
    "mup": (MUP, (0, 0), (0, 0)),
}
"""Column of the paper's table → exponents of its rows, of the factor on the logits, and of that on the residual."""
COLUMNS = ("init_variance", "learning_rate", "epsilon", "weight_decay")


def build(config=TARGET, parametrization=FROM_BASE, seed=0):
    return Transformer(config, VOCABULARY, parametrization, key=jax.random.key(seed))


def shape_of(*options):
    """A network of abstract arrays, for tests that need only its parameters' names and multipliers."""
    return nnx.eval_shape(lambda: build(*options))


def by_path(tree):
    """Path → leaf of a tree."""
    leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda x: isinstance(x, Multipliers))
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


@pytest.mark.parametrize("kind", PRINTED)
def test_every_cell_of_a_printed_column_is_the_papers(kind):
    table, (rows, logits, residual) = PARAMETRIZATIONS[kind](4.0, 3.0, A), PRINTED[kind]
    for name, cells in rows.items():
        for column, (width, depth) in zip(COLUMNS, cells, strict=True):
            assert getattr(table.rows[name], column) == pytest.approx(4.0**width * 3.0**depth), (name, column)
    for factor, (width, depth) in ((table.logits, logits), (table.residual, residual)):
        assert factor == pytest.approx(4.0**width * 3.0**depth)
    assert set(table.rows) == set(rows) == set(PARAMETER_CLASSES)


def test_the_standard_table_has_one_learning_rate_and_variances_of_the_fan_in():
    table = PARAMETRIZATIONS["standard"](4.0, 3.0, A)
    assert (table.residual, table.logits) == (1.0, 1.0)
    for name, row in table.rows.items():
        assert row.init_variance == (0.25 if name in ("hidden_weight", "unembedding") else 1.0)
        assert row.learning_rate == row.epsilon == row.weight_decay == 1.0


@pytest.mark.parametrize("kind", PARAMETRIZATIONS)
def test_at_the_base_every_table_is_one_and_networks_are_alike(kind):
    assert all(
        row == PARAMETRIZATIONS[kind](1.0, 1.0, A).rows["final_norm"]
        for row in PARAMETRIZATIONS[kind](1.0, 1.0, A).rows.values()
    )
    at_base = dataclasses.replace(FROM_BASE, kind=kind)
    here, plain = build(BASE, at_base), build(BASE, ParametrizationConfig(kind="standard"))
    assert all(leaf == Multipliers() for leaf in by_path(parameter_multipliers(here)).values())
    for a, b in zip(jax.tree.leaves(nnx.state(here)), jax.tree.leaves(nnx.state(plain)), strict=True):
        np.testing.assert_array_equal(a, b)
    np.testing.assert_array_equal(run(here, batch()).logits, run(plain, batch()).logits)


FAN_IN = {"down": MLP, "place_scale": 1}
"""m_N of tensors that depart from the width's ratio: the MLP's, and one that has the same shape at every width."""


def test_every_parameter_learns_by_the_row_of_its_class_at_its_own_fan_in():
    model = shape_of()
    modules, multipliers = by_path(parameter_modules(model)), by_path(parameter_multipliers(model))
    assert set(modules) == set(multipliers) and set(modules.values()) == set(MODULES)
    for path, of in multipliers.items():
        module = modules[path]
        n = FAN_IN.get(module, N)
        expected = [n**width * L**depth for width, depth in PAPER[MODULES[module]]]
        assert [of.learning_rate, of.epsilon, of.weight_decay] == pytest.approx(expected[1:]), path
        assert of.beta1 == of.beta2 == 1.0


def test_initial_weights_have_the_variance_of_their_class():
    networks = (build(config) for config in (BASE, TARGET))
    base, target = (by_path(jax.device_get(nnx.to_pure_dict(nnx.state(network)))) for network in networks)
    for path, module in by_path(parameter_modules(shape_of())).items():
        if MODULES[module] in ("hidden_bias_or_norm", "qk_norm", "final_norm"):
            np.testing.assert_array_equal(target[path], np.ones_like(target[path]) * target[path].reshape(-1)[0])
            continue
        if path in base:
            n, exponent = FAN_IN.get(module, N), PAPER[MODULES[module]][0][0]
            # The smallest tensors have 100 elements; ratios to be told apart are powers of 2.
            assert np.var(target[path]) / np.var(base[path]) == pytest.approx(n**exponent, rel=0.4), path


def test_grouped_keys_and_values_keep_the_fan_in_of_the_width():
    grouped = dataclasses.replace(TARGET, num_kv_heads=2)
    multipliers, modules = (by_path(f(shape_of(grouped))) for f in (parameter_multipliers, parameter_modules))
    for path, module in modules.items():
        if module in ("key", "value", "query"):
            assert multipliers[path].learning_rate == pytest.approx(N**-1 * L ** (A - 1))


def test_fixed_attention_width_does_not_follow_the_width():
    """Both networks have four heads of size 16, so the output projection's fan-in is that of the base network."""
    fixed = dataclasses.replace(TARGET, num_heads=4, head_size=16)
    parametrization = dataclasses.replace(FROM_BASE, base_heads=4)
    of = by_path(parameter_multipliers(shape_of(fixed, parametrization)))["blocks/0/attention/out"]
    assert of.weight_decay == 1.0 and of.learning_rate == pytest.approx(L ** (A - 1))


def batch(seed=0):
    rng = np.random.default_rng(seed)
    example = Example.of_task(
        VOCABULARY.tasks["text_to_image"],
        {"text": rng.integers(0, 70, 6), "image": rng.integers(0, 50, (3, 5))},
    )
    return jax.tree.map(jnp.asarray, stack_rows([assemble(VOCABULARY, [example], 24)]))


def test_residual_branches_are_scaled():
    """With m_L^−α moved into the output projections by hand, a network without multipliers computes the same."""
    deep = dataclasses.replace(TARGET, num_layers=2)
    scaled, plain = build(deep), build(deep, dataclasses.replace(FROM_BASE, base_layers=2))
    for a, b in zip(scaled.blocks, plain.blocks, strict=True):
        b.attention.out[...] = 2**-A * a.attention.out[...]
        b.mlp.down[...] = 2**-A * a.mlp.down[...]
    np.testing.assert_allclose(run(scaled, batch()).logits, run(plain, batch()).logits, atol=1e-5)


def test_a_logit_multiplier_is_completeps_and_a_tied_heads():
    flat = dataclasses.replace(TARGET, num_layers=1)
    untied = build(flat, dataclasses.replace(FROM_BASE, kind="completep"))
    seen = run(untied, batch())
    np.testing.assert_allclose(seen.logits, seen.hidden @ untied.unembedding[...] / N, rtol=1e-4, atol=1e-6)
    for kind, factor in (("completed_p", 1 / N), ("standard", 1.0)):
        tied = build(dataclasses.replace(flat, tied_unembedding=True), dataclasses.replace(FROM_BASE, kind=kind))
        seen = run(tied, batch())
        expected = factor * seen.hidden @ tied.embedding[...].T
        np.testing.assert_allclose(seen.logits, expected, rtol=1e-4, atol=1e-4)


def test_initial_logits_shrink_with_the_root_of_the_width():
    def rms(width):
        config = dataclasses.replace(BASE, width=width, num_heads=width // 16, mlp_width=3 * width)
        networks = [build(config, ParametrizationConfig(base_width=32), seed) for seed in range(4)]
        logits = np.array([run(network, batch()).logits for network in networks])
        return np.sqrt(np.mean(logits**2))

    assert rms(128) / rms(32) == pytest.approx(4**-0.5, rel=0.1)


EVERYTHING = ModuleMultipliers(
    learning_rate=Family(of={"query": 3.0, "unembedding": 5.0}, depth=(1.0, 4.0)),
    beta1=Family(of={"query": 0.5}),
    beta2=Family(of={"query": 0.25}),
    epsilon=Family(of={"query": 7.0}),
    weight_decay=Family(of={"query": 0.0, "final_norm": 0.0}),
    init=Family(of={"query": 2.0, "mlp_norm": 9.0}),
    residual=Family(of={"mlp": 0.5}, depth=(2.0, 8.0)),
)


def test_module_multipliers_come_on_top_of_the_table():
    tuned = dataclasses.replace(FROM_BASE, multipliers=EVERYTHING)
    of, table = (by_path(parameter_multipliers(shape_of(TARGET, p))) for p in (tuned, FROM_BASE))
    for block in range(3):
        path, depth = f"blocks/{block}/attention/query", 4 ** ((block + 0.5) / 3)
        assert of[path].learning_rate == pytest.approx(3 * depth * table[path].learning_rate)
        assert (of[path].beta1, of[path].beta2) == (0.5, 0.25)
        assert of[path].epsilon == pytest.approx(7 * table[path].epsilon)
        assert of[path].weight_decay == 0.0
        path = f"blocks/{block}/mlp/up"
        assert of[path].learning_rate == pytest.approx(depth * table[path].learning_rate)
    assert of["unembedding"].learning_rate == pytest.approx(5 * table["unembedding"].learning_rate)
    assert of["embedding"] == table["embedding"]


def test_initial_weights_have_multipliers_of_their_own():
    plain = build()
    scaled = build(parametrization=dataclasses.replace(FROM_BASE, multipliers=EVERYTHING))
    for a, b in zip(scaled.blocks, plain.blocks, strict=True):
        np.testing.assert_allclose(a.attention.query[...], 2 * b.attention.query[...], rtol=1e-6)
        np.testing.assert_array_equal(a.attention.key[...], b.attention.key[...])
        np.testing.assert_array_equal(a.mlp_norm.scale[...], b.mlp_norm.scale[...])


def test_a_residual_multiplier_is_one_on_its_branch_at_the_start_and_in_training():
    """Compares two networks: ζ in the last matrices, as implemented, and ζ in the forward pass, written out here."""
    factors = {"attention": [2 * 4 ** ((block + 0.5) / 2) for block in range(2)]}
    factors["mlp"] = [0.5 * factor for factor in factors["attention"]]
    residual = ModuleMultipliers(residual=EVERYTHING.residual)
    deep = dataclasses.replace(BASE, num_layers=2)
    ours, plain = build(deep, ParametrizationConfig(multipliers=residual)), build(deep, ParametrizationConfig())

    def forward(model, sequence):
        h, positions, segments = model.embed(sequence, None)
        for block, attention, mlp in zip(model.blocks, *factors.values(), strict=True):
            attended, _ = block.attention(block.attention_norm(h), positions, segments, None, None)
            h = h + attention * attended
            h = h + mlp * block.mlp(block.mlp_norm(h))
        return model.unembed(model.final_norm(h))

    config = OptimizerConfig(learning_rate=1e-2, epsilon=1e-4, weight_decay=0.5, clip_norm=1e9)
    trained = []
    for model, function in ((ours, lambda m, s: m(s).logits), (plain, forward)):
        graph, state = nnx.split(model)
        parameters, multipliers = nnx.to_pure_dict(state), parameter_multipliers(model)
        transform = adamw(config.hyperparameters(multipliers))

        def loss(parameters, graph=graph, function=function):
            return jnp.mean(jnp.square(function(nnx.merge(graph, nnx.State(parameters)), batch()) - 1.0))

        @jax.jit
        def train(parameters, loss=loss, transform=transform):
            def step(carry, _):
                parameters, moments = carry
                value, gradients = jax.value_and_grad(loss)(parameters)
                update, moments = transform.update(gradients, moments, parameters)
                return (jax.tree.map(jnp.subtract, parameters, update), moments), value

            return jax.lax.scan(step, (parameters, transform.init(parameters)), length=5)[1]

        trained.append(train(parameters))
    # Adam divides by small roots, which magnifies rounding.
    np.testing.assert_allclose(*trained, rtol=1e-3)
    assert trained[0][-1] < 0.9 * trained[0][0]


@given(st.lists(st.floats(0.1, 10), min_size=2, max_size=5), st.floats(0, 1))
def test_depth_is_interpolated_between_its_values(depth, place):
    family = Family(depth=tuple(depth))
    assert min(depth) * (1 - 1e-9) <= family.at("query", place) <= max(depth) * (1 + 1e-9)
    assert family.at("query", 0.0) == pytest.approx(depth[0])
    assert family.at("query", 1.0) == pytest.approx(depth[-1])
    assert family.at("query", None) == 1.0


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ModuleMultipliers(epsilon=Family(of={"qery": 1.0})), r"multipliers\.epsilon has unknown modules qery"),
        (lambda: ModuleMultipliers(residual=Family(of={"query": 1.0})), "known are attention, mlp"),
        (lambda: Family(depth=(1.0, 0.0)), "must be positive"),
        (lambda: ParametrizationConfig(alpha=0.3), r"alpha must lie in \[0\.5, 1\], got 0\.3"),
        (lambda: ParametrizationConfig(base_width=0), "base_width must be at least 1"),
        (
            lambda: build(TARGET, ParametrizationConfig(base_width=40)),
            "heads 8 at width 128 would be 2.5",
        ),
    ],
)
def test_what_cannot_be_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
