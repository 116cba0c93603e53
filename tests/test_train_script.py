"""trimask train: where its defaults come from, and what it says of the recipe before the first step."""

import dataclasses
import json
import shutil
from pathlib import Path

import jax.numpy as jnp
import pytest

from trimask.configs.presets import preset
from trimask.diffusion.data.batches import BatchConfig, DatasetUse
from trimask.diffusion.optimizer import OptimizerConfig
from trimask.diffusion.parametrization import Family, ModuleMultipliers
from trimask.diffusion.pretraining.description import TrainConfig, load_description, transferred_config
from trimask.diffusion.pretraining.train_run import train
from trimask.diffusion.pretraining.trained_model import load
from trimask.diffusion.sampling.generation_config import GenerationConfig
from trimask.diffusion.schedule import ScheduleConfig
from trimask.diffusion.sde import SDEScaling
from trimask.diffusion.transformer import TransformerConfig
from trimask.scripts import train as train_script
from trimask.tokenizers.storage import configuration

CONFIG = TrainConfig(
    model=TransformerConfig(num_layers=1, width=16, num_heads=2),
    optimizer=OptimizerConfig(horizon_tokens=900, warmup_tokens=100, learning_rate=1e-2),
    batch=BatchConfig(tokens=120, weights={"spoken": 0.0, "sums": 0.0}),
)
PICTURES = ("--batch.weights", "spoken", "0", "sums", "0")
"""One dataset, and so one row length to compile."""


@pytest.fixture(scope="module")
def tuned(prepared, tmp_path_factory):
    """A small run whose hyperparameters other runs take over."""
    folder = tmp_path_factory.mktemp("tuned")
    train(folder, prepared.folder, CONFIG)
    return folder


def test_a_larger_run_is_transferred_from_the_tuned_one(prepared, tuned, tmp_path, capsys):
    arguments = [str(tmp_path), "--data", str(prepared.folder), "--tuned-at", str(tuned)]
    shape = ["--model.width", "32", "--model.num-layers", "2", "--loop.log-every", "1"]
    train_script.main([*arguments, *shape, "--batch.tokens", "480", "--optimizer.horizon-tokens", "3600"])
    description, source = load_description(tmp_path), load_description(tuned)
    model, parametrization = description.train.model, description.train.parametrization
    assert (model.num_heads, model.size_of_head) == (4, 8)  # more heads, of the tuned size
    assert description.train.batch.weights == source.train.batch.weights
    assert (parametrization.base_width, parametrization.base_layers) == (16, 1)
    assert (parametrization.base_heads, parametrization.base_mlp_width) == (2, 64)
    sde = description.train.sde
    assert sde == SDEScaling(base_batch_tokens=source.batch_tokens, base_horizon_tokens=900)
    kappa = description.batch_tokens / source.batch_tokens * 4**-0.44
    assert description.kappa == pytest.approx(kappa) and 1.5 < kappa < 2.5
    assert description.train.optimizer.learning_rate == 1e-2
    assert description.optimizer.learning_rate == pytest.approx(1e-2 * kappa**0.5)
    # The announced learning rate is used: the logged one, over the fraction of its peak at these tokens, is the peak.
    line = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-2])
    rate = description.train.optimizer.learning_rate_fraction(jnp.float32(line["tokens"]))
    assert line["largest_learning_rate"] == pytest.approx(1e-2 * kappa**0.5 * float(rate), rel=1e-5)
    printed = capsys.readouterr().out
    assert f"Hyperparameters, at κ = {kappa:.4g}" in printed and f"{description.optimizer.beta2:.5g}" in printed
    assert "The critical batch is not known" in printed and "Training data" in printed
    # The run says all of it itself, so the same command resumes and another run can be transferred on.
    assert load(tmp_path).step == description.num_steps
    assert (
        transferred_config(description).parametrization == parametrization
        and transferred_config(description).sde == sde
    )


def test_at_the_tuned_shape_batch_and_horizon_nothing_changes(tuned):
    config, description = transferred_config(load_description(tuned)), load_description(tuned)
    assert config.sde.kappa(description.batch_tokens, 900) == 1.0
    assert config.model.base(config.parametrization) == dataclasses.replace(
        CONFIG.model, head_size=8, mlp_width=config.model.base(config.parametrization).mlp_width
    )


@pytest.mark.parametrize(
    ("batch", "said"),
    [
        (225.0, "The critical batch, 450 tokens, is 2 times the batch."),
        (450.0, "The critical batch, 450 tokens, is 1 times the batch."),
        (900.0, "Note: the batch is 2 times the critical batch, 450 tokens: with fewer than 2 steps the loss will be"),
    ],
)
def test_the_distance_from_the_critical_batch_is_said(tuned, capsys, batch, said):
    description = load_description(tuned)
    config = dataclasses.replace(description.train, sde=SDEScaling(critical_steps=2.0))
    train_script._print_recipe(dataclasses.replace(description, train=config, batch_tokens=batch))
    assert said in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("limit, often", [(7.0, ["drawn"]), (7.9, []), (0.1, ["drawn", "sums"])])
def test_datasets_that_are_seen_too_often_are_named(capsys, limit, often):
    use = [DatasetUse("drawn", 20, 300, 5, 7.5), DatasetUse("sums", 10, 90, 3, 2.0)]
    train_script._print_use(
        dataclasses.replace(CONFIG, batch=dataclasses.replace(CONFIG.batch, warn_epochs=limit)), use
    )
    printed = " ".join(capsys.readouterr().out.split())
    note = f"Note: {' and '.join(often)} will be repeated more than {limit:g} times (batch.warn_epochs), and may"
    assert (note in printed) == bool(often) and ("Note" in printed) == bool(often)
    assert "drawn" in printed and "7.5" in printed and "300" in printed


def test_a_modality_gets_a_schedule_of_its_own_by_a_flag_of_its_name(prepared, tmp_path):
    words = ["--data", str(prepared.folder), "--model.num-layers", "1", "--model.width", "16", "--model.num-heads", "2"]
    words += ["--optimizer.horizon-tokens", "100", "--batch.tokens", "120", "--masking.schedule.kind", "cosine_md4"]
    train_script.main(
        [str(tmp_path / "run"), *words, "--masking.schedules.image.kind", "polynomial", "--masking.counts"]
    )
    masking = load_description(tmp_path / "run").train.masking
    assert masking.schedules == {"image": ScheduleConfig(kind="polynomial")} and masking.counts
    kinds = [config.kind for config in masking.schedule_of(prepared.tokenizers.vocabulary).of_modality]
    assert kinds.count("polynomial") == 1 and set(kinds) == {"polynomial", "cosine_md4"}
    with pytest.raises(ValueError, match="noise schedules for unknown video; there are text, "):
        train_script.main([str(tmp_path / "other"), *words, "--masking.schedules.video.kind", "polynomial"])


@pytest.mark.parametrize("flag", ["--tuned-at", "--init-from"])
def test_weights_that_change_in_training_are_of_the_run_that_had_them(tuned, tmp_path, flag):
    """No weights are defaults of flags, which could then not name others; `_default_batch` has the whole mixture."""
    description, weights = load_description(tuned), {"weights": {"drawn": 2.0}, "task_weights": {"text": 3.0}}
    batch = dataclasses.replace(CONFIG.batch, **weights, final_weights={"drawn": 1.0}, anneal_tokens=(100, 200))
    config = dataclasses.replace(description.train, batch=batch)
    configuration.save(tmp_path / "config.json", dataclasses.replace(description, train=config))
    taken = train_script._defaults(preset(None), [flag, str(tmp_path)])
    assert taken.batch == BatchConfig(tokens=120) and taken.optimizer == CONFIG.optimizer
    usual = train_script._default_batch([flag, str(tmp_path)], None)
    assert usual == (batch if flag == "--tuned-at" else preset(None).train.batch)


def test_found_multipliers_are_taken_from_their_file(prepared, tmp_path):
    found = ModuleMultipliers(learning_rate=Family(of={"query": 2.0}, depth=(1.0, 2.0)))
    configuration.save(tmp_path / "multipliers.json", found)
    arguments = [
        str(tmp_path / "run"),
        "--data",
        str(prepared.folder),
        "--multipliers",
        str(tmp_path / "multipliers.json"),
    ]
    shape = ["--model.width", "16", "--model.num-heads", "2", "--model.num-layers", "1", "--batch.tokens", "120"]
    train_script.main(
        [*arguments, *shape, "--optimizer.horizon-tokens", "300", "--optimizer.warmup-tokens", "10", *PICTURES]
    )
    assert load_description(tmp_path / "run").train.parametrization.multipliers == found


def test_tuned_at_goes_with_no_other_source_of_values(tuned, prepared, tmp_path):
    with pytest.raises(ValueError, match="cannot be combined with --preset or --init-from"):
        train_script.main([str(tmp_path), "--data", str(prepared.folder), "--tuned-at", str(tuned), "--preset", "tiny"])


def test_a_width_that_heads_do_not_divide_is_refused(tuned, prepared, tmp_path):
    with pytest.raises(ValueError, match="num_heads 2 at width 16 cannot be scaled to a whole number at width 20"):
        train_script.main(
            [str(tmp_path), "--data", str(prepared.folder), "--tuned-at", str(tuned), "--model.width", "20"]
        )


def test_what_goes_on_from_weights_has_no_base(tuned, prepared, tmp_path):
    train_script.main(
        [
            str(tmp_path),
            "--data",
            str(prepared.folder),
            "--init-from",
            str(tuned),
            "--optimizer.horizon-tokens",
            "300",
            *PICTURES,
        ]
    )
    assert load_description(tmp_path).kappa == 1.0


def test_the_same_command_resumes_though_the_run_it_was_made_after_is_longer_by_now(prepared, tuned, tmp_path):
    """With --tuned-at and --init-from; only an explicit horizon extends a run."""
    source = shutil.copytree(tuned, tmp_path / "source")
    commands = [
        [str(tmp_path / flag.strip("-")), "--data", str(prepared.folder), flag, str(source)]
        for flag in ("--tuned-at", "--init-from")
    ]
    for command in commands:
        train_script.main(command)
    before = [load_description(Path(folder)) for folder, *_ in commands]
    longer = load_description(source)
    optimizer = dataclasses.replace(longer.train.optimizer, horizon_tokens=2 * longer.train.optimizer.horizon_tokens)
    train = dataclasses.replace(longer.train, optimizer=optimizer)
    first = longer.train.optimizer.horizon_tokens
    longer = dataclasses.replace(longer, train=train, first_horizon_tokens=first)
    configuration.save(source / "config.json", longer)
    for command in commands:
        train_script.main(command)
    assert [load_description(Path(folder)) for folder, *_ in commands] == before


def test_how_answers_are_sampled_stays_unless_it_is_said(prepared, tuned, tmp_path):
    run, command = tmp_path, [str(tmp_path), "--data", str(prepared.folder), "--tuned-at", str(tuned)]
    train_script.main(command)
    description = load_description(run)
    chosen = {"text": GenerationConfig(strategy="margin", steps=3)}
    train = dataclasses.replace(description.train, generation=chosen)
    configuration.save(run / "config.json", dataclasses.replace(description, train=train))
    train_script.main(command)
    assert load_description(run).train.generation == chosen
    train_script.main([*command, "--loop.log-every", "3"])
    assert load_description(run).train.generation == chosen
