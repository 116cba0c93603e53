"""Detection of a diverging loss, and its report."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

from trimask.diffusion.run.divergence import LossWatch, divergence_error, first_non_finite


def watched(losses, factor=10.0, recent=None) -> tuple[LossWatch, list[str | None]]:
    watch = LossWatch(factor, recent)
    return watch, [watch.fault({"loss": loss}) for loss in losses]


def test_the_mean_is_that_of_the_first_fifty_losses_and_then_a_running_one():
    losses = np.random.default_rng(0).uniform(1, 3, 80)
    mean = losses[:50].mean()
    for loss in losses[50:]:
        mean = 0.98 * mean + 0.02 * loss
    watch, faults = watched(losses)
    np.testing.assert_allclose(watch.recent["mean"], mean, rtol=1e-12)
    assert watch.recent["steps"] == 80 and set(faults) == {None}


def test_a_loss_is_a_fault_just_above_the_limit_and_not_just_below():
    assert watched([2.0] * 50 + [19.9])[1][-1] is None
    assert "loss 20.1 is more than 10 times the recent mean of 2" in watched([2.0] * 50 + [20.1])[1][-1]
    assert watched([2.0] * 50 + [5.1], factor=2.5)[1][-1] is not None


def test_the_metric_that_is_compared_can_be_another_than_the_loss():
    watch = LossWatch(10.0, metric="per_target")
    faults = [watch.fault({"loss": loss, "per_target": 2.0}) for loss in [2.0] * 50 + [1000.0]]
    assert set(faults) == {None}
    assert "per_target 30 is more than 10 times" in str(watch.fault({"loss": 1.0, "per_target": 30.0}))


def test_a_spike_does_not_raise_the_limit():
    watch, _ = watched([2.0] * 50 + [1000.0])
    assert watch.recent == {"mean": 2.0, "steps": 50}


@pytest.mark.parametrize("losses", [[2.0] * 49 + [1000.0], [0.0] * 60 + [5.0], [-3.0] * 60 + [5.0]])
def test_there_is_no_limit_at_first_nor_where_losses_are_not_positive(losses):
    assert watched(losses)[1][-1] is None


def test_without_a_factor_only_what_is_not_finite_is_a_fault():
    assert watched([2.0] * 60 + [1e9, float("inf")], factor=None)[1][-2:] == [None, "loss is inf"]


def test_a_gradient_that_is_not_finite_is_a_fault_at_any_step():
    assert LossWatch(None).fault({"loss": 1.0, "gradient_norm": float("nan")}) == "gradient_norm is nan"


def test_a_watch_remembers_all_of_an_earlier_one_even_through_json():
    losses = [*np.random.default_rng(1).uniform(1, 3, 70), 25.0]
    first, _ = watched(losses[:60])
    second, faults = watched(losses[60:], recent=json.loads(json.dumps(first.recent)))
    whole, all_faults = watched(losses)
    assert second.recent == whole.recent and faults == all_faults[60:] and faults[-1] is not None


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_an_array_that_is_not_finite_is_named(dtype):
    state = {"a": [jnp.ones(3, dtype), jnp.asarray([1, jnp.nan], dtype)], "n": jnp.ones((), jnp.int32)}
    assert first_non_finite(state) == "a/1 is not finite"
    assert first_non_finite({"a": jnp.ones(3, dtype), "n": jnp.ones((), jnp.int32)}) is None


def test_the_report_is_strict_json_and_names_batch_and_last_checkpoint(tmp_path):
    (tmp_path / "checkpoints" / "40").mkdir(parents=True)
    metrics = {"loss": float("nan"), "bits/image": 2.5}
    batch = {"dataset": "drawn", "ids": [["a", "b"], ["c"]]}
    error = divergence_error(tmp_path, 47, "loss is nan", LossWatch(10.0, {"mean": 1.5, "steps": 47}), metrics, batch)
    assert "stopped at step 47: loss is nan; the last good checkpoint is of step 40, and diverged-" in str(error)

    def refuse(constant):
        raise AssertionError(constant)

    content = json.loads((tmp_path / "diverged-step-47.json").read_text(), parse_constant=refuse)
    assert content["batch"] == batch and content["recent_mean"] == 1.5 and content["step"] == 47
    assert content["metrics"] == {"loss": "nan", "bits/image": 2.5}
