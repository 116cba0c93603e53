"""A training that is judged: its bounds and scores are those of `trimask evaluate` on the validation split."""

import dataclasses
import math

import pytest

from trimask.diffusion.data.splits import VALIDATION
from trimask.diffusion.evaluation.evaluate import evaluate
from trimask.diffusion.evaluation.evaluate_config import EvaluateConfig
from trimask.diffusion.pretraining.train_run import train
from trimask.diffusion.sampling.generation_config import GenerationConfig
from trimask.diffusion.studies.judged_trainings import JudgedTraining, judged_training


def test_it_is_trained_and_evaluated_as_by_the_commands(prepared, loaded, tmp_path):
    base = loaded.description.train
    settings = {"image": GenerationConfig(steps=2), "text": GenerationConfig(temperature=0.0, steps=2)}
    config = dataclasses.replace(
        base,
        optimizer=dataclasses.replace(base.optimizer, horizon_tokens=2000, warmup_tokens=0),
        batch=dataclasses.replace(base.batch, tokens=120),
        generation=settings,
        seed=3,
    )
    trial = JudgedTraining(train=config, samplings={"one": settings, "none": {}}, examples=6, draws=2)
    found = judged_training(trial, prepared.folder)
    run = train(tmp_path / "run", prepared.folder, config)
    expected, _ = evaluate(
        run,
        prepared,
        EvaluateConfig(
            splits=(VALIDATION,), max_examples=6, bound_samples=2, judges={"text_to_image": ("label", "frechet")}
        ),
    )
    bounds = {bound.task: bound.bits_per_token for bound in expected.bounds if bound.task}
    assert found.bits == pytest.approx(bounds, rel=1e-6)
    scores = {f"{score.task} {score.judge}": score.value for score in expected.scores}
    assert {name for name in found.judged["one"] if "audio" in name and "_to_audio" in name} == set()
    assert found.judged["one"].items() <= scores.items() and "text_to_image frechet" in found.judged["one"]
    assert found.judged["none"] == {} and found.steps == run.step and found.epochs == run.description.epochs
    assert found.num_parameters == run.num_parameters and found.seconds > 0


@pytest.mark.parametrize("tokens", [120, 4096])  # in an early step, and in the only one
def test_a_training_that_diverges_has_infinite_bounds_and_no_scores(prepared, loaded, tokens):
    base = loaded.description.train
    optimizer = dataclasses.replace(
        base.optimizer, horizon_tokens=2000, warmup_tokens=0, learning_rate=1e30, clip_norm=1e30
    )
    batch = dataclasses.replace(base.batch, tokens=tokens)
    config = dataclasses.replace(base, optimizer=optimizer, batch=batch)
    trial = JudgedTraining(train=config, samplings={"one": {}}, examples=6, draws=2)
    found = judged_training(trial, prepared.folder)
    assert {"text_to_image", "audio_to_text", "text"} <= found.bits.keys() and set(found.bits.values()) == {math.inf}
    assert found.judged == {"one": {}} and found.num_parameters == loaded.num_parameters
