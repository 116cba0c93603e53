"""Attention: all implementations compute the same sums over the same positions."""

import inspect
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_mesh import run_on_eight_devices

from trimask.diffusion import attention
from trimask.diffusion.attention import attend, kernel_for, splash_attention
from trimask.diffusion.pretraining.description import TrainConfig
from trimask.diffusion.pretraining.training_step import Pretraining
from trimask.diffusion.transformer import TransformerConfig
from trimask.tokenizers.sequence import TokenRows
from trimask.tokenizers.vocabulary import Vocabulary


def inputs(asked=128, length=256, heads=4, kv_heads=2, size=16):
    """Queries, keys, values and segments of two rows: one with three examples, one with an example and padding."""
    rng = np.random.default_rng(0)
    shapes = ((asked, heads), (length, kv_heads), (length, kv_heads))
    q, k, v = (jnp.asarray(rng.normal(size=(2, *shape, size)), jnp.float32) for shape in shapes)
    segment = jnp.stack([jnp.arange(length) * 3 // length + 1, jnp.arange(length) < 100]).astype(jnp.int32)
    return q, k, v, segment[:, :asked], segment


def by_hand(q, k, v, own, segment):
    """The definition of attention, one query and one head at a time."""
    q, k, v, own, segment = map(np.asarray, (q, k, v, own, segment))
    out, group = np.zeros_like(q), q.shape[2] // k.shape[2]
    for row, i, head in np.ndindex(*q.shape[:3]):
        seen = segment[row] == own[row, i]
        scores = k[row, seen, head // group] @ q[row, i, head] / np.sqrt(q.shape[-1])
        weights = np.exp(scores - scores.max())
        out[row, i, head] = weights / weights.sum() @ v[row, seen, head // group]
    return out


@pytest.mark.parametrize("kernel", [attend, partial(splash_attention, interpret=True)], ids=["plain", "splash"])
def test_attention_is_the_softmax_over_the_example(kernel):
    given = inputs()
    np.testing.assert_allclose(kernel(*given), by_hand(*given), atol=1e-5)


@pytest.mark.parametrize("kernel", [attend, partial(splash_attention, interpret=True)], ids=["plain", "splash"])
def test_gradients_are_those_that_jax_derives(kernel):
    *qkv, own, segment = inputs()
    is_seen = own[:, None, :, None] == segment[:, None, None, :]

    def gradients(kernel):
        return jax.jit(jax.grad(lambda qkv: jnp.sum(jnp.sin(kernel(*qkv)))))(qkv)

    derived = gradients(partial(jax.nn.dot_product_attention, mask=is_seen))
    for ours, theirs in zip(gradients(lambda *qkv: kernel(*qkv, own, segment)), derived, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_on_a_mesh_the_kernel_for_tpus_has_its_rows_and_heads():
    result = run_on_eight_devices(
        """
        import jax, numpy as np
        from functools import partial
        from test_attention import inputs
        from trimask.diffusion.attention import attend, splash_attention
        from trimask.diffusion.mesh import MeshConfig, use_mesh
        given = [np.concatenate([x, x]) for x in inputs(asked=128, length=128)]
        with use_mesh(MeshConfig(fsdp=2, tensor=2).over(jax.devices())):
            out = jax.jit(partial(splash_attention, interpret=True))(*given)
        np.testing.assert_allclose(out, attend(*given), atol=1e-5)
        print("same")
        """
    )
    assert result.stdout.strip() == "same", result.stderr


@pytest.mark.parametrize(
    ("platform", "dtype", "asked", "length", "head", "chosen"),
    [
        ("cpu", "bfloat16", 128, 128, 64, "plain"),
        ("gpu", "bfloat16", 13, 14, 64, "plain"),
        ("gpu", "bfloat16", 12, 14, 64, "cudnn"),
        ("gpu", "bfloat16", 128, 128, 60, "plain"),
        ("gpu", "bfloat16", 128, 128, 256, "plain"),
        ("gpu", "float32", 128, 128, 64, "plain"),
        ("tpu", "float32", 128, 256, 60, "splash"),
        ("tpu", "bfloat16", 100, 128, 64, "plain"),
        ("tpu", "bfloat16", 128, 100, 64, "plain"),
    ],
)
def test_a_kernel_is_chosen_where_it_takes_the_shapes(platform, dtype, asked, length, head, chosen):
    assert kernel_for(platform, jnp.dtype(dtype), asked, length, head) == chosen


def test_what_is_asked_for_is_called(monkeypatch):
    *qkv, own, segment = inputs()
    monkeypatch.setattr(jax.nn, "dot_product_attention", lambda *_, implementation, **__: implementation)
    monkeypatch.setattr(attention, "splash_attention", lambda *_: "splash")
    monkeypatch.setattr(attention, "plain_attention", lambda *_: "plain")
    attend = inspect.unwrap(attention.attend)  # what comes back is no array
    for kernel in ("plain", "cudnn", "splash"):
        monkeypatch.setattr(attention, "kernel_for", lambda *_, kernel=kernel: kernel)
        assert attend(*qkv, own, segment, "kernel") == kernel
        assert attend(*qkv, own, segment) == "plain"


def test_a_training_step_with_kernels_is_a_program_for_tpus(monkeypatch):
    """Lowered only, since there is no TPU here: with the kernel once in the forward and twice in the backward pass."""
    model = TransformerConfig(num_layers=2, width=128, num_heads=1, attention="kernel", compute_dtype="bfloat16")
    vocabulary = Vocabulary(text_size=50, codebook_sizes={})
    pretraining = Pretraining(TrainConfig(model=model), vocabulary, mean_targets={"text": 200.0})
    numbers = jax.ShapeDtypeStruct((2, 128), jnp.int32)
    batch = TokenRows(
        tokens=numbers,
        modality=numbers,
        coordinates=jax.ShapeDtypeStruct((2, 128, 2), jnp.int32),
        segment=numbers,
        is_condition=jax.ShapeDtypeStruct((2, 128), jnp.bool_),
    )
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    arguments = pretraining.hyperparameters, pretraining.loss_scale, pretraining.key, pretraining.abstract(), batch
    traced = Pretraining.update.trace(pretraining, *arguments)
    program = traced.lower(lowering_platforms=("tpu",)).as_text()
    assert program.count("tpu_custom_call") == 3  # which all layers call
