"""Tables that each benchmark writes of made-up times; and the codes that it compares compute the same."""

import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from madeup import magnitudes, written

from trimask.scripts.benchmarks import attention, checkpoint, data, loss, rollout, sample, train
from trimask.scripts.benchmarks.timing import Timing

MIB = 2**20


def table_of(module, name, arguments, cases, tmp_path, monkeypatch, function="_cases"):
    """The Markdown that `run` writes, with `function` giving these cases."""
    monkeypatch.setattr(module, function, lambda *_: cases)
    module.run(arguments)
    machine, _, *table = (tmp_path / f"{name}.md").read_text().splitlines()
    assert machine.endswith(f"jax {jax.__version__}") and f"{jax.device_count()} device(s)" in machine
    return "\n".join(table)


def test_the_table_of_losses(tmp_path, monkeypatch):
    case = loss.Case
    cases = [
        case(3000, "tiles", Timing(0.0124, 1.26, 3 * MIB)),
        case(3000, "all logits", Timing(2.5, 0.04, None), speedup=201.6129, memory_ratio=None),
        case(3000, "masked logits", Timing(0.1, 2.0, 2000 * MIB), speedup=8.0645, memory_ratio=666.6667),
    ]
    arguments = loss.Arguments(out=tmp_path, vocabularies=(3000,))
    assert table_of(loss, "loss", arguments, cases, tmp_path, monkeypatch) == written(
        """
        | ids | code | ms | ours faster | MiB beside | ours smaller | s to compile |
        | --- | --- | --- | --- | --- | --- | --- |
        | 3,000 | tiles | 12.4 |  | 3.0 |  | 1.3 |
        | 3,000 | all logits | 2,500.0 | ×201.61 |  |  | 0.0 |
        | 3,000 | masked logits | 100.0 | ×8.06 | 2,000.0 | ×666.67 | 2.0 |
        """
    )


def test_the_table_of_attention(tmp_path, monkeypatch):
    cases = [
        attention.Case(2048, 4, "plain", Timing(0.0124, 1.26, 3 * MIB), 1.5e12),
        attention.Case(2048, 4, "splash", Timing(2.5, 0.04, None), 2e9),
    ]
    arguments = attention.Arguments(out=tmp_path, lengths=(2048,), examples=(4,))
    assert table_of(attention, "attention", arguments, cases, tmp_path, monkeypatch) == written(
        """
        | length | examples | code | ms | GFLOP/s | MiB beside | s to compile |
        | --- | --- | --- | --- | --- | --- | --- |
        | 2,048 | 4 | plain | 12.4 | 1,500 | 3 | 1.3 |
        | 2,048 | 4 | splash | 2,500.0 | 2 |  | 0.0 |
        """
    )


@pytest.mark.parametrize(("peak", "share"), [(None, ""), (3.0, "50.0%")])
def test_the_table_of_training_steps(tmp_path, monkeypatch, peak, share):
    sizes = {"size": "128x2", "parameters": 1000, "vocabulary": 4096}
    cases = [train.Case(**sizes, code="trimask", seconds=0.25, tokens_per_second=4.0, flops_per_second=1.5e12)]
    cases.append(
        train.Case(
            **sizes,
            code="PyTorch",
            seconds=1.5,
            tokens_per_second=3.0,
            flops_per_second=1.5e12,
            compile_seconds=2.26,
            temporary_bytes=5 * MIB,
            speedup=6.0,
        )
    )
    arguments = train.Arguments(out=tmp_path, sizes=("128x2",), vocabularies=(4096,), peak_tflops=peak)
    assert table_of(train, "train", arguments, cases, tmp_path, monkeypatch) == written(
        f"""
        | network | code | ms | ours faster | GFLOP/s | MFU | MiB | compile s |
        | --- | --- | --- | --- | --- | --- | --- | --- |
        | 128x2, 4,096 ids | trimask | 250 |  | 1,500 | {share} |  |  |
        | 128x2, 4,096 ids | PyTorch | 1,500 | ×6.00 | 1,500 | {share} | 5 | 2.3 |
        """
    )


def test_the_table_of_samples_has_other_code_under_ours(tmp_path, monkeypatch):
    def case(code, size, parameters, length, **rest):
        numbers = {"seconds": 1.0, "tokens_per_second": 1234.56, "evaluations": 32, "milliseconds_per_evaluation": 7.89}
        return sample.Case(code, size, parameters, length, 8, 2, "dual", **numbers, **rest)

    cases = [
        case("LLaDA", "64x1", 2000, 64, speedup=2.345, same_tokens=0.9876, parted_at=0.00012),
        case("trimask", "64x2", 3000, 64),
        case("trimask", "64x1", 2000, 64),
        case("trimask", "64x1", 2000, 32),
        case("Fast-dLLM", "64x1", 2000, 32, speedup=3.0, same_tokens=1.0),
    ]
    arguments = sample.Arguments(out=tmp_path, sizes=("64x1",))
    table = table_of(sample, "sample", arguments, cases, tmp_path, monkeypatch, "_cases_of_size")
    assert table == written(
        """
        | code | size | parameters | length | block | rows | cache | NFE | tokens/s | ms/NFE | ours faster | \\
        same tokens | parted at |
        | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |
        | trimask | 64x1 | 2,000 | 32 | 8 | 2 | dual | 32 | 1,234.6 | 7.9 |  |  |  |
        | Fast-dLLM | 64x1 | 2,000 | 32 | 8 | 2 | dual | 32 | 1,234.6 | 7.9 | ×3.00 | 100.0% |  |
        | trimask | 64x1 | 2,000 | 64 | 8 | 2 | dual | 32 | 1,234.6 | 7.9 |  |  |  |
        | LLaDA | 64x1 | 2,000 | 64 | 8 | 2 | dual | 32 | 1,234.6 | 7.9 | ×2.35 | 98.8% | 1.2e-04 |
        | trimask | 64x2 | 3,000 | 64 | 8 | 2 | dual | 32 | 1,234.6 | 7.9 |  |  |  |
        """
    )


def test_the_table_of_rollouts(tmp_path, monkeypatch):
    class Setting:
        def __init__(self, arguments):
            self.in_one_loop, self.in_torch = "loop", lambda python: [(4.0, 8, 80)] * 3

        def vector(self):
            return "vector"

        def synchronous(self):
            return "synchronous"

        def in_environments(self, environments, number):
            return environments, number

    def timed(play, number):
        name = play if isinstance(play, str) else play(number)[0]
        slow = {"loop": 1, "vector": 2, "synchronous": 8}[name]
        # The first is not counted, and of three the median is.
        return {0: 1e9, 1: 1.0, 2: 2.0, 3: 50.0}[number] * slow, 2000, 20_000

    monkeypatch.setattr(rollout, "_timed", timed)
    monkeypatch.setattr(rollout, "_Setting", Setting)
    rollout.run(rollout.Arguments(out=tmp_path, repeats=3, python=Path(sys.executable)))
    assert (tmp_path / "rollout.md").read_text().split("\n\n")[1].strip() == written(
        """
        | code | episodes/s | evaluations/s | evaluations per episode | ours faster |
        | --- | --- | --- | --- | --- |
        | rollout | 1,000.0 | 10,000.0 | 10.0 |  |
        | vector environment | 500.0 | 5,000.0 | 10.0 | ×2.00 |
        | SyncVectorEnv | 125.0 | 1,250.0 | 10.0 | ×8.00 |
        | PyTorch | 2.0 | 20.0 | 10.0 | ×500.00 |
        """
    )


def test_the_table_of_batches(tmp_path, monkeypatch):
    cases = [data.Case("sums", 65_536, 0.98765, "2 processes", 0.012345, 1_234_567.8)]
    prepared = SimpleNamespace(manifest=SimpleNamespace(datasets=["sums"]))
    monkeypatch.setattr(data, "Prepared", lambda _: prepared)
    arguments = data.Arguments(out=tmp_path, data=tmp_path, tokens=(65_536,))
    assert table_of(data, "data", arguments, cases, tmp_path, monkeypatch) == written(
        """
        | dataset | batch | filled | way | ms | tokens/s |
        | --- | --- | --- | --- | --- | --- |
        | sums | 65,536 | 98.8% | 2 processes | 12.35 | 1,234,568 |
        """
    )


def test_the_table_of_checkpoints_which_is_also_printed(tmp_path, monkeypatch, capsys):
    case = checkpoint.Case("64x1", 1_250_000, 19 * MIB, 2000 * MIB, 0.125, 1234.5, 2.0)
    arguments = checkpoint.Arguments(out=tmp_path, sizes=("64x1",))
    assert table_of(checkpoint, "checkpoint", arguments, case, tmp_path, monkeypatch, "_case") == written(
        """
        | size | parameters | state MiB | on disk MiB | held up s | written s | restored s |
        | --- | --- | --- | --- | --- | --- | --- |
        | 64x1 | 1.2M | 19 | 2,000 | 0.12 | 1,234.50 | 2.00 |
        """
    )
    assert "1,234.50" in capsys.readouterr().out


@pytest.mark.parametrize(("dtype", "atol"), [("float32", 1e-5), ("bfloat16", 1e-3)])
def test_the_ways_to_compute_a_loss_are_the_same_loss(tmp_path, monkeypatch, dtype, atol):
    """Each with its gradients; of 12 positions, a third for each modality, 3 are masked."""
    asked = {}

    def timed(functions, repeats):
        asked.update(functions, repeats=repeats)
        timings = (Timing(2.0, 1.0, 8), Timing(4.0, 1.0, 20), Timing(6.0, 1.0, None))
        return dict(zip(functions, timings, strict=True))

    monkeypatch.setattr(loss, "timed", timed)
    arguments = loss.Arguments(
        out=tmp_path, tokens=12, width=8, masked=0.25, tile_positions=4, tile_ids=8, repeats=7, dtype=dtype
    )
    cases = loss._cases(arguments, 30)
    assert [(case.vocabulary, case.code, case.speedup, case.memory_ratio) for case in cases] == [
        (30, "tiles", None, None),
        (30, "masked logits", 2.0, 2.5),
        (30, "all logits", 3.0, None),
    ]
    assert asked.pop("repeats") == 7
    (tiles, given), *others = asked.values()
    hidden, matrix, clean, bounds, is_masked, weight = given
    assert (hidden.shape, matrix.shape, int(is_masked.sum())) == ((12, 8), (8, 30), 3)
    assert magnitudes([hidden, matrix, weight]) == pytest.approx([76.0665, 68.1140, 1.16504], rel=1e-4)
    assert clean.tolist() == [9, 6, 7, 6, 13, 10, 16, 12, 21, 25, 26, 23]
    assert np.flatnonzero(is_masked).tolist() == [0, 1, 8]
    assert bounds.tolist() == [[first, first + 10] for first in (0, 10, 20) for _ in range(4)]
    assert ((weight * 12 >= 0.5) & (weight * 12 < 2)).all()
    assert float(matrix.std()) == pytest.approx(8**-0.5, rel=0.2)
    value, gradients = tiles(*given)
    for function, same in others:
        assert same is given
        other, of_other = function(*given)
        assert float(other) == pytest.approx(float(value), rel=1e-5)
        for ours, theirs in zip(gradients, of_other, strict=True):
            np.testing.assert_allclose(ours, theirs, atol=atol)


def test_attention_is_timed_with_its_gradients_over_as_many_tokens_at_any_length(tmp_path, monkeypatch):
    asked = {}

    def timed(functions, repeats):
        asked.update(functions, repeats=repeats)
        return {name: Timing(0.5, 1.0, None) for name in functions}

    monkeypatch.setattr(attention, "timed", timed)
    arguments = attention.Arguments(
        out=tmp_path, tokens=32, heads=4, kv_heads=2, head_size=8, lengths=(16,), examples=(2,), repeats=7
    )
    (case,) = attention._cases(arguments, 16, 2)
    assert case.flops_per_second == 3 * 4 * 2 * 16**2 * 4 * 8 / 0.5 and asked.pop("repeats") == 7
    ((function, given),) = asked.values()
    assert [x.shape for x in given] == [(2, 16, number, 8) for number in (4, 2, 2)]
    assert magnitudes(given) == pytest.approx([791.679, 418.447, 431.305], rel=1e-4)
    # The second example has no say in the gradients of the first: those of the first alone are the same.
    first = [x[:, :8] for x in given]
    segment = jnp.zeros((2, 8), int)

    def loss(query, key, value):
        attended = attention.attend(query, key, value, segment, segment, "plain")
        return (attended**2).sum()

    for ours, theirs in zip(function(*given), jax.grad(loss, argnums=(0, 1, 2))(*first), strict=True):
        np.testing.assert_allclose(ours[:, :8], theirs, atol=1e-4)
    assert len(attention._cases(arguments, 64, 2)) == 1, "a row at least"
