"""The scripts that benchmarks run in a Python with other code, run here beside what stands in for that code."""

import dataclasses
import itertools
import json
import re
import runpy
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fakes
import jax
import numpy as np
import pytest
from numpy_torch import Tensor, Torch, tensor

from trimask.diffusion.transformer import Transformer, TransformerConfig
from trimask.scripts import benchmark
from trimask.scripts.benchmarks.sample import _llada_weights
from trimask.tokenizers.sequence import padding_rows

SPEC = {"width": 16, "heads": 2, "layers": 2, "mlp_width": 24, "vocabulary": fakes.VOCABULARY.size, "length": 6}
SPEC |= {"mask_id": fakes.MASK, "warmup": 1, "repeats": 3, "dtype": "float32", "compiled": False}
TRAIN = SPEC | {"tokens": np.zeros((4, 6), int).tolist()}
ROLLOUT = SPEC | {"policy_width": 8, "policy_heads": 4, "policy_mlp_width": 20, "prompts": [[1, 2], [3, 4], [5, 6]]}
SAMPLE = SPEC | {"rotary_base": 5e5, "norm_epsilon": 1e-4, "longest": 40, "prompts": [[1, 2], [3, 4], [5, 6]]}


@pytest.fixture(autouse=True)
def clock(monkeypatch):
    """The scripts' clock, which goes on by a second at every look."""
    seconds = itertools.count()
    stand_in = SimpleNamespace(**vars(time) | {"perf_counter": lambda: float(next(seconds))})
    monkeypatch.setitem(sys.modules, "time", stand_in)


@pytest.fixture(autouse=True)
def restored(monkeypatch):
    """Restores sys.path and sys.modules after a test."""
    known = set(sys.modules)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield
    for name in sys.modules.keys() - known:
        if name.split(".")[0] in ("model", "md4", "clu"):
            del sys.modules[name]


@pytest.fixture
def torch(monkeypatch) -> Torch:
    """Stand-in for PyTorch, which the scripts import."""
    monkeypatch.setattr(Tensor, "calls", [])
    torch = Torch()
    for name, module in torch.modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    return torch


@pytest.fixture
def objects(monkeypatch, tmp_path, capsys):
    """Runs a script with a spec and other arguments: the objects that it prints."""

    def run(script: str, spec: dict, *arguments: str) -> list[Any]:
        (tmp_path / "spec.json").write_text(json.dumps(spec))
        monkeypatch.setattr(sys, "argv", [script, str(tmp_path / "spec.json"), *arguments])
        run_script(script, "__main__")
        return [json.loads(line) for line in capsys.readouterr().out.splitlines()]

    return run


def run_script(script: str, name: str = "script") -> SimpleNamespace:
    """Runs a script and returns the names that it defines."""
    path = Path(benchmark.__file__).parent / "benchmarks" / "peers" / script
    return SimpleNamespace(**runpy.run_path(str(path), run_name=name))


def test_the_network_in_pytorch_is_ours(torch):
    """It computes the same logits as our network without an embedding of coordinates, with the same weights."""
    size = TransformerConfig(width=16, num_heads=2, num_layers=2, mlp_width=24, place_embedding=False)
    ours = Transformer(size, fakes.VOCABULARY, key=jax.random.key(0))
    theirs = run_script("torch_train.py").Model(SPEC)
    weights = {name.removeprefix("model.transformer."): tensor(w) for name, w in _llada_weights(ours).items()}
    theirs.embedding.weight, theirs.unembedding.weight = weights["wte.weight"], weights["ff_out.weight"]
    for number, block in enumerate(theirs.blocks):
        prefix = f"blocks.{number}."
        own = {n.removeprefix(prefix).removesuffix(".weight"): w for n, w in weights.items() if n.startswith(prefix)}
        block.query_key_value.weight = tensor(np.concatenate([own[f"{name}_proj"] for name in "qkv"]))
        block.gate_up.weight = tensor(np.concatenate([own["ff_proj"], own["up_proj"]]))
        block.out.weight, block.down.weight = own["attn_out"], own["ff_out"]
    tokens = np.arange(12).reshape(2, 6)
    rows = dataclasses.replace(
        padding_rows(fakes.VOCABULARY, (2,), 6), tokens=tokens, segment=np.ones((2, 6), np.int32)
    )
    logits = theirs.unembedding(theirs(tensor(tokens)))
    np.testing.assert_allclose(logits, fakes.run(ours, rows).logits, atol=1e-4)  # of numbers about 1, in float32


def test_the_loss_in_pytorch_is_the_weighted_sum_over_masked_positions(torch):
    """The loss is per token, and does not depend on whether logits of other positions are computed."""
    script, logits = run_script("torch_train.py"), np.random.default_rng(1).normal(size=(8, 8))
    model = torch.nn.Embedding(8, 8)
    shapes: list[tuple[int, ...]] = []
    model.weight, model.unembedding = tensor(logits), lambda hidden: shapes.append(hidden.shape) or hidden
    clean, is_masked = tensor([[1, 2, 3], [4, 5, 6]]), tensor([[True, False, True], [False, True, False]])
    nll = np.log(np.exp(logits[7]).sum()) - logits[7]
    expected = (2 * nll[1] + 2 * nll[3] + 3 * nll[5]) / 6
    for only_masked in (False, True):
        loss = script.loss_of(model, clean, is_masked, tensor([[2.0], [3.0]]), 7, only_masked)
        assert loss == pytest.approx(expected)
    assert shapes == [(2, 3, 8), (3, 8)]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_whole_steps_in_pytorch_are_timed(torch, objects, dtype):
    cases = objects("torch_train.py", TRAIN | {"dtype": dtype, "compiled": True})
    codes = [f"PyTorch, {of} logits{how}" for of in ("all", "masked") for how in ("", ", compiled")]
    assert cases == [{"code": code, "seconds": [1.0] * 3} for code in codes]
    of_block, begin = 8, [("seed", 0), {"lr": 1e-3, "foreach": True}]
    step = [{"enabled": dtype == "bfloat16"}, "backward", ("clip", 3 + 2 * of_block, 1.0), "step", "zero_grad"]
    # item() waits for the device; without it the clock would show when steps were dispatched.
    steps = 4 * [*step, ("lerp", 0.005), "item"]
    plain = [*begin, *steps, "reset"]
    whole, masked = ([*begin, ("compile", is_dynamic), *steps, "reset"] for is_dynamic in (False, True))
    assert torch.calls == [*plain, *whole, *plain, *masked]
    torch.calls.clear()
    objects("torch_train.py", TRAIN | {"dtype": dtype})
    assert torch.calls == 2 * plain


def test_rows_in_pytorch_are_masked_at_times_apart(torch):
    """The times of four rows are a quarter apart, from one uniform draw, and 0.001 at least."""
    drawn, seen = iter([[0.1], np.full((4, 6), 0.5), [0.0], np.full((4, 6), 0.0005)]), []

    def seeing(function, dynamic):
        return lambda model, clean, *masks: seen.append(masks[:2]) or function(model, clean, *masks)

    torch.rand, torch.compile = lambda *shape, device: tensor(next(drawn)), seeing
    run_script("torch_train.py").seconds_of_steps(TRAIN | {"repeats": 1}, False, True, "cpu")
    (first, weight), (second, least) = seen
    assert first.tolist() == [[x] * 6 for x in (False, False, True, True)] and second.all()
    np.testing.assert_allclose(1 / weight, np.array([[0.1], [0.35], [0.6], [0.85]]))
    np.testing.assert_allclose(1 / least, np.array([[0.001], [0.25], [0.5], [0.75]]))


def test_the_weights_in_pytorch_are_averaged(torch):
    """The average starts at the initial weights; the stand-in's optimizer adds 1 to each weight in a step."""
    averages, lerp = [], torch._foreach_lerp_
    torch._foreach_lerp_ = lambda average, *rest: averages.append(average) or lerp(average, *rest)
    run_script("torch_train.py").seconds_of_steps(TRAIN | {"repeats": 1}, False, False, "cpu")
    scale_of_norm = averages[0][-2]
    np.testing.assert_allclose(scale_of_norm, 1 + 0.005 + 0.005 * (2 - 0.005), rtol=1e-6)


@pytest.mark.parametrize(("opened", "evaluations"), [("all", 3), ("all of a row", 3 + 2 + 1), ("none", 3 * 6)])
def test_episodes_in_pytorch_leave_out_rows_that_are_done(torch, opened, evaluations):
    seen = []

    def network(tokens):
        seen.append(tokens.tolist())
        return tensor(9.0 * np.eye(SPEC["vocabulary"])[np.full(tokens.shape, 4)])

    def policy(confidence, is_masked):
        is_wanted = np.full(confidence.shape, opened != "none")
        is_wanted[1:] &= opened == "all"
        return tensor(np.where(is_wanted, 50.0, -50.0))

    prompts = tensor(ROLLOUT["prompts"])
    assert run_script("torch_rollout.py").episodes(network, policy, prompts, ROLLOUT) == evaluations
    masked = [[*prompt, *[fakes.MASK] * 6] for prompt in ROLLOUT["prompts"]]
    rounds = {"all": [masked], "all of a row": [masked, masked[1:], masked[2:]], "none": [masked] * 6}
    assert seen == rounds[opened]


def test_episodes_in_pytorch_keep_what_is_open(torch):
    """A policy that opens the first two masked positions; the network says 4 at first, then 5."""
    said, seen = iter((4, 5, 6)), []

    def network(tokens):
        seen.append(tokens.tolist())
        return tensor(9.0 * np.eye(SPEC["vocabulary"])[np.full(tokens.shape, next(said))])

    def policy(confidence, is_masked):
        np.testing.assert_allclose(confidence, 1 / (1 + np.exp(-9) * (SPEC["vocabulary"] - 1)), rtol=1e-6)
        return tensor(np.where(is_masked & (np.cumsum(is_masked, axis=1) <= 2), 50.0, -50.0))

    assert run_script("torch_rollout.py").episodes(network, policy, tensor([[1, 2]]), ROLLOUT) == 3
    assert [row[2:6] for (row,) in seen] == [[fakes.MASK] * 4, [4, 4, fakes.MASK, fakes.MASK], [4, 4, 5, 5]]


def test_rollouts_in_pytorch_are_timed(torch, objects):
    torch.rand_like = lambda x: tensor(np.zeros(x.shape))
    assert objects("torch_rollout.py", ROLLOUT) == [{"results": [[1.0, 3]] * 3}]
    seed, layer, layers, first, of_policy, second = torch.calls
    options = {"batch_first": True, "norm_first": True}
    assert seed == ("seed", 0) and first == second == "eval"
    assert layer == ((16, 2, 36, 0.0, "gelu"), options)
    assert layers[0][1:] == (2,) and layers[1] == {"enable_nested_tensor": False}
    assert of_policy == ((8, 4, 20, 0.0, "gelu"), options)


def test_networks_of_rollouts_in_pytorch_compute_logits(torch):
    """The stand-in's layers change nothing."""
    script, rng = run_script("torch_rollout.py"), np.random.default_rng(0)
    denoiser, policy = script.Denoiser(ROLLOUT), script.Policy(ROLLOUT)
    tokens, confidence, is_masked = rng.integers(0, 9, (2, 6)), rng.random((2, 6)), rng.random((2, 6)) < 0.5
    expected = denoiser.embedding.weight[tokens] @ denoiser.unembedding.weight.T
    np.testing.assert_allclose(np.asarray(denoiser(tensor(tokens))), np.asarray(expected), rtol=1e-5)
    opened = np.asarray(policy(tensor(confidence), tensor(is_masked)))
    assert (opened == -2).all(), "12 % of the positions at first"
    policy.output.weight[...] = 1.0
    weight, bias, status = (np.asarray(x) for x in (policy.input.weight, policy.input.bias, policy.status.weight))
    seen = confidence[..., None] * weight[:, 0] + bias + status[1 * is_masked]
    opened = np.asarray(policy(tensor(confidence), tensor(is_masked)))
    np.testing.assert_allclose(opened, seen.sum(-1) - 2, rtol=1e-5, atol=1e-5)


LLADA = {
    "Fast-dLLM/llada/model/configuration_llada.py": "from types import SimpleNamespace as LLaDAConfig",
    "Fast-dLLM/llada/model/modeling_llada.py": """
import torch

class LLaDAModelLM(torch.nn.Module):
    device = "nowhere"

    def __init__(self, config, init_params):
        super().__init__()
        self.config = config

    def load_state_dict(self, weights, strict):
        assert not strict
        torch.calls.append({name: weight.tolist() for name, weight in weights.items()})
        return sorted({"bias", "scale"} - weights.keys()), sorted(weights.keys() - {"bias", "scale"})

    def to(self, dtype, device):
        torch.calls.append((dtype, device, vars(self.config)))
        self.device = device
        return self
""",
    "Fast-dLLM/llada/generate.py": """
import torch

def made(name):
    def generate(model, row, **how):
        assert row.shape == (1, 2)
        torch.calls.append((name, how))
        return torch.cat([row, row + 10], dim=1), 7
    return generate

generate, generate_with_prefix_cache, generate_with_dual_cache = map(made, ("plain", "prefix", "dual"))
""",
    "LLaDA/generate.py": """
import torch

def generate(model, prompts, **how):
    torch.calls.append(("LLaDA", how))
    return torch.cat([prompts, prompts + 20], dim=1)
""",
}


def write_files(folder: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


def test_other_code_generates_with_the_weights_and_settings_given(torch, objects, tmp_path):
    write_files(tmp_path, LLADA)
    np.savez(tmp_path / "weights.npz", bias=[1.0, 2.0], scale=[3.0])
    how = {"length": 4, "block": 2, "steps": 3}
    cases = [{"code": "LLaDA", "rows": 3, "cache": "none", **how}]
    cases += [{"code": "Fast-dLLM", "rows": 2, "cache": cache, **how} for cache in ("none", "prefix", "dual")]
    spec = SAMPLE | {"cases": cases, "checkouts": {name: str(tmp_path / name) for name in ("LLaDA", "Fast-dLLM")}}
    found = objects("llada_generate.py", spec, str(tmp_path / "weights.npz"))
    llada, fast = [[1, 2, 21, 22], [3, 4, 23, 24], [5, 6, 25, 26]], [[1, 2, 11, 12], [3, 4, 13, 14]]
    assert found == [{"seconds": [1.0] * 3, "tokens": tokens} for tokens in (llada, fast, fast, fast)]
    network = {"d_model": 16, "n_heads": 2, "n_layers": 2, "mlp_hidden_size": 24, "rope_theta": 5e5}
    network |= {"vocab_size": SPEC["vocabulary"], "embedding_size": SPEC["vocabulary"], "max_sequence_length": 40}
    network |= {"rms_norm_eps": 1e-4, "activation_type": "silu", "block_type": "llama", "layer_norm_type": "rms"}
    network |= {"rope": True, "weight_tying": False, "include_bias": False, "init_device": "cpu"}
    network |= {"attention_dropout": 0.0, "residual_dropout": 0.0, "embedding_dropout": 0.0}
    settings = {"steps": 3, "gen_length": 4, "block_length": 2, "mask_id": fakes.MASK}
    runs = 1 + SAMPLE["repeats"]
    assert torch.calls == [
        "eval",
        {"bias": [1.0, 2.0], "scale": [3.0]},
        ("float32", "cpu", network),
        *[("LLaDA", settings)] * runs,
        *[(name, settings) for name in ("plain", "prefix", "dual") for _ in range(runs * 2)],  # a row each
    ]


@pytest.mark.parametrize(
    ("weights", "fault"),
    [
        ({"bias": [1.0]}, "missing ['scale'], unknown []"),
        ({"bias": [1.0], "scale": [1.0], "new": [1.0]}, "missing [], unknown ['new']"),
    ],
)
def test_a_checkout_with_other_weights_is_refused(torch, objects, tmp_path, weights, fault):
    write_files(tmp_path, LLADA)
    np.savez(tmp_path / "weights.npz", **weights)
    spec = SAMPLE | {"cases": [], "checkouts": {"Fast-dLLM": str(tmp_path / "Fast-dLLM")}}
    with pytest.raises(ValueError, match=re.escape(f"this checkout's model has other weights: {fault}")):
        objects("llada_generate.py", spec, str(tmp_path / "weights.npz"))


MD4 = {
    "clu/__init__.py": "",
    "md4/__init__.py": "",
    "md4/configs/md4/openwebtext.py": """
from types import SimpleNamespace

class Config(SimpleNamespace):
    def update(self, **changes):
        vars(self).update(changes)

def get_config():
    return Config(learning_rate=1e-3, num_train_steps=100, warmup_steps=10, learning_rate_schedule="cosine", seed=5,
                  ema_rate=0.25, num_microbatches=2, feature_dim=64, num_heads=12, n_layers=12, vocab_size=1)
""",
    "md4/utils.py": "import jax\nget_rng = jax.random.key",
    "md4/train.py": """
import jax
import jax.numpy as jnp
from clu import metric_writers
from md4 import input_pipeline, input_pipeline_v2

def get_learning_rate(step, *, base_learning_rate, num_steps, warmup_steps, schedule_type):
    assert (num_steps, warmup_steps, schedule_type) == (100, 10, "cosine")
    return base_learning_rate * step

def create_train_state(config, rng, shape, schedule):
    sizes = [config.vocab_size, *config.data_shape, config.n_layers, config.num_heads, config.feature_dim, *shape]
    state = {"sizes": jnp.array(sizes), "rng": jax.random.key_data(rng), "rate": schedule(0.0), "step": jnp.zeros(())}
    return "model", "optimizer", state, "metrics"

def train_step(model, optimizer, state, batch, schedule, metrics, ema_rate, num_microbatches):
    assert (model, optimizer, metrics, ema_rate, num_microbatches) == ("model", "optimizer", "metrics", 0.25, 2)
    step = state["step"] + jax.lax.psum(1.0, "batch")
    return state | {"step": step, "rate": schedule(step)}, batch["text"].sum()
""",
}
MD4_SIZES = {"layers": 2, "heads": 4, "width": 24, "length": 3, "tokens": [[1, 2, 3], [4, 5, 6]]}


@pytest.mark.skipif(not hasattr(jax, "pmap"), reason="MD4's Python has an older JAX, with pmap")
def test_the_step_of_md4_is_its_own_at_our_sizes(tmp_path, monkeypatch):
    write_files(tmp_path, MD4)
    asked, pmap = [], jax.pmap
    monkeypatch.setattr(jax, "pmap", lambda step, *how, **more: asked.append((how, more)) or pmap(step, *how))
    step, state = run_script("md4_train.py").step_and_state(SPEC | MD4_SIZES | {"md4": str(tmp_path)})
    assert asked == [(("batch",), {"donate_argnums": 0, "devices": jax.local_devices()[:1]})]
    assert state["sizes"].tolist() == [[SPEC["vocabulary"], 3, 2, 4, 6, 2, 3]]
    assert state["rng"].tolist() == [jax.random.key_data(jax.random.key(5)).tolist()]
    text = {"text": np.array([MD4_SIZES["tokens"]], np.int32)}
    state, metrics = step(step(state, text)[0], text)
    assert state["step"] == 2 and state["rate"] == pytest.approx(2e-3) and metrics == 21


@pytest.mark.skipif(not hasattr(jax, "pmap"), reason="MD4's Python has an older JAX, with pmap")
def test_steps_of_md4_are_timed(objects, tmp_path, monkeypatch):
    write_files(tmp_path, MD4)
    spec, waited = SPEC | MD4_SIZES | {"md4": str(tmp_path)}, []
    monkeypatch.setattr(jax, "block_until_ready", lambda x: waited.append(float(x[0]["step"][0])))
    assert objects("md4_train.py", spec) == [{"code": "MD4", "seconds": [1.0] * 3}]
    assert waited == [1, 2, 3, 4]
    with pytest.raises(ValueError, match="MD4 has no choice of dtype, it computes in float32; got bfloat16"):
        objects("md4_train.py", spec | {"dtype": "bfloat16"})
