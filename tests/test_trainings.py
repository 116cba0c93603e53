"""A training as a trial: it trains as a run does, is measured on validation, and shares its compiled programs."""

import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import pytest

from trimask.diffusion.data.batches import BatchConfig, Batches
from trimask.diffusion.optimizer import OptimizerConfig
from trimask.diffusion.parametrization import Family, ModuleMultipliers, ParametrizationConfig
from trimask.diffusion.pretraining.description import TrainConfig
from trimask.diffusion.pretraining.train_run import train
from trimask.diffusion.pretraining.training_step import Pretraining
from trimask.diffusion.run.step_loop import LoopConfig
from trimask.diffusion.sde import SDEScaling
from trimask.diffusion.studies import trainings
from trimask.diffusion.studies.trainings import (
    HeldOutLoss,
    as_sde_base,
    at_batch,
    at_shape,
    make_room_for,
    outcome_of,
    with_learning_rate,
)
from trimask.diffusion.transformer import TransformerConfig

CONFIG = TrainConfig(
    model=TransformerConfig(num_layers=1, width=16, num_heads=2, mlp_width=16),
    optimizer=OptimizerConfig(horizon_tokens=900, warmup_tokens=100, learning_rate=1e-2),
    batch=BatchConfig(tokens=120, weights={"spoken": 0.0, "sums": 0.0}),
)


MULTIPLIERS = ModuleMultipliers(init=Family(of={"query": 2.0}), learning_rate=Family(of={"down": 0.5}))


def with_multipliers(config):
    return dataclasses.replace(config, parametrization=ParametrizationConfig(multipliers=MULTIPLIERS))


@pytest.fixture(scope="module", autouse=True)
def held_out_tokens():
    """Fewer held-out tokens per batch, since evaluation takes most of a trial."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainings, "_HELD_OUT_TOKENS", 512)
        yield


@pytest.fixture(scope="module")
def outcome(prepared):
    return outcome_of(CONFIG, prepared.folder)


@pytest.mark.parametrize("multipliers", [ModuleMultipliers(), MULTIPLIERS], ids=["plain", "multipliers"])
def test_a_trial_trains_as_a_run_does(prepared, tmp_path, multipliers):
    config = dataclasses.replace(
        CONFIG,
        parametrization=ParametrizationConfig(multipliers=multipliers),
        loop=LoopConfig(log_every=1),
        sde=SDEScaling(base_batch_tokens=70.0, base_horizon_tokens=400),
    )
    loaded = train(tmp_path, prepared.folder, config)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    trial = outcome_of(config, prepared.folder)
    assert trial.steps == loaded.step == len(trial.curve)
    for (*point, _), line in zip(trial.curve, lines, strict=True):
        assert point == pytest.approx([line["tokens"], line["loss"]], rel=1e-4)
    held_out = HeldOutLoss(Pretraining(config, prepared.tokenizers.vocabulary), prepared, config.batch)
    assert trial.loss == pytest.approx(held_out(loaded.parameters), rel=1e-4)
    assert trial.curve[-1][2] == pytest.approx(held_out(loaded.parameters, 2), rel=1e-4) != trial.loss


def test_complements_do_not_change_the_scale_of_the_held_out_loss(prepared):
    """Of a model without knowledge, whose loss is about the logarithm of the number of ids under every mask."""
    losses = []
    for complementary in (False, True):
        masking = dataclasses.replace(CONFIG.masking, complementary=complementary)
        pretraining = Pretraining(dataclasses.replace(CONFIG, masking=masking), prepared.tokenizers.vocabulary)
        nothing = jax.tree.map(jnp.zeros_like, pretraining.init().parameters)
        losses.append(HeldOutLoss(pretraining, prepared, CONFIG.batch)(nothing))
    assert losses[1] == pytest.approx(losses[0], rel=0.1)


def test_the_loss_is_measured_on_the_validation_split_with_fixed_masks(prepared, outcome):
    again = outcome_of(CONFIG, prepared.folder)
    assert (again.loss, again.last_loss, again.curve) == (outcome.loss, outcome.last_loss, outcome.curve)
    other = outcome_of(dataclasses.replace(CONFIG, seed=1), prepared.folder)
    assert other.loss != outcome.loss and other.loss == pytest.approx(outcome.loss, rel=0.2)


def test_training_lowers_it(prepared, outcome):
    untrained = outcome_of(with_learning_rate(CONFIG, 1e-9), prepared.folder)
    assert outcome.loss < 0.97 * untrained.loss


def test_a_trial_of_one_step_has_an_outcome(prepared, monkeypatch):
    made_room = []
    monkeypatch.setattr(trainings, "make_room_for", made_room.append)
    monkeypatch.setattr(Batches, "num_steps", lambda *_: 1)
    trial = outcome_of(CONFIG, prepared.folder)
    assert trial.steps == len(trial.curve) == len(made_room) == 1 and math.isfinite(trial.loss)


def test_numbers_alone_compile_nothing_new(prepared):
    outcome_of(CONFIG, prepared.folder)
    before = Pretraining.update._cache_size()
    other = dataclasses.replace(with_learning_rate(CONFIG, 1e-3), seed=3, sde=SDEScaling(base_batch_tokens=50.0))
    outcome_of(with_multipliers(other), prepared.folder)
    assert Pretraining.update._cache_size() == before


def test_the_ninth_program_makes_room(prepared, monkeypatch):
    """A known program clears no caches."""
    let_go = []
    monkeypatch.setattr(trainings, "_compiled", set())
    monkeypatch.setattr(jax, "clear_caches", lambda: let_go.append(len(trainings._compiled)))
    vocabulary = prepared.tokenizers.vocabulary
    nine = [Pretraining(dataclasses.replace(CONFIG, accumulate=parts), vocabulary) for parts in range(1, 10)]
    for number in (*range(8), 3, 8, 3):
        make_room_for(nine[number])
    assert let_go == [0] and trainings._compiled == {nine[8], nine[3]}


def test_a_run_that_diverges_is_not_saved_by_an_average_that_is_still_finite(prepared, monkeypatch):
    trained = trainings._train
    monkeypatch.setattr(trainings, "_train", lambda *given: (trained(*given)[0], [[1.0, math.inf, 2.0]]))
    outcome = outcome_of(CONFIG, prepared.folder)
    assert outcome.loss == outcome.last_loss == math.inf


def test_a_run_that_diverges_has_an_infinite_loss(prepared):
    wild = dataclasses.replace(CONFIG, optimizer=dataclasses.replace(CONFIG.optimizer, learning_rate=1e30))
    assert outcome_of(wild, prepared.folder).loss == math.inf


def test_another_shape_is_transferred_from_the_bases():
    wide = at_shape(CONFIG, "mup", width=32, layers=3)
    assert (wide.model.width, wide.model.num_heads, wide.model.num_layers, wide.model.mlp_width) == (32, 4, 3, 32)
    assert wide.parametrization == ParametrizationConfig(
        kind="mup", base_width=16, base_layers=1, base_heads=2, base_mlp_width=16
    )
    with pytest.raises(ValueError, match="num_heads 2 at width 16 cannot be scaled to a whole number at width 20"):
        at_shape(CONFIG, "mup", width=20)


def test_another_batch_is_transferred_from_the_tuned_one(prepared):
    tuned = as_sde_base(CONFIG, prepared.folder)
    tokens = Batches(prepared, CONFIG.batch, 0).mean_tokens(8)
    assert tuned.sde == SDEScaling(base_batch_tokens=tokens, base_horizon_tokens=900)
    larger = at_batch(tuned, 240, 1800, 2)
    assert (larger.batch.tokens, larger.optimizer.horizon_tokens, larger.seed) == (240, 1800, 2)
    assert larger.optimizer.learning_rate == tuned.optimizer.learning_rate and larger.sde == tuned.sde
