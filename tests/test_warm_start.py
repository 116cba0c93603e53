"""Starting from another run: old ids keep their meaning, new ones keep initial values, anything else is refused."""

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from trimask.diffusion.data.batches import BatchConfig
from trimask.diffusion.optimizer import OptimizerConfig
from trimask.diffusion.parametrization import ParametrizationConfig
from trimask.diffusion.pretraining.description import TrainConfig
from trimask.diffusion.pretraining.train_run import train
from trimask.diffusion.pretraining.trained_model import load
from trimask.diffusion.pretraining.training_step import Pretraining
from trimask.diffusion.pretraining.warm_start import (
    grown_parameters,
    new_ids,
    new_ranges,
    require_grown,
    require_same_model,
)
from trimask.diffusion.run.step_loop import LoopConfig
from trimask.diffusion.transformer import TransformerConfig
from trimask.tokenizers.sequence import Example, Segment, assemble, stack_rows
from trimask.tokenizers.text import TextTokenizer
from trimask.tokenizers.vocabulary import Vocabulary

OLD = Vocabulary(text_size=5, codebook_sizes={"image": (4, 3)})
NEW = Vocabulary(text_size=7, codebook_sizes={"audio": (6,), "image": (4, 3)})
MODEL = TransformerConfig(num_layers=1, width=16, num_heads=2, mlp_width=16)


def pretraining(vocabulary: Vocabulary, seed: int = 0, **options) -> Pretraining:
    return Pretraining(TrainConfig(model=dataclasses.replace(MODEL, **options), seed=seed), vocabulary)


def example(vocabulary: Vocabulary):
    """A text with EOS at its end and a picture of two codebooks, one code of each unknown, with padding after."""
    text = np.array([0, 4, 3, vocabulary.eos_code])
    image = np.array([[3, 2], [0, -1], [-1, 1]])
    segments = (Segment("text", text, 2), Segment("image", image))
    return jax.tree.map(jnp.asarray, stack_rows([assemble(vocabulary, [Example("text_to_image", segments)], 17)]))


def test_ids_are_mapped_by_what_they_mean():
    mapping = new_ids(OLD, NEW)
    assert mapping.shape == (OLD.size,) and len(set(mapping)) == OLD.size
    for name in OLD.special_tokens:
        assert mapping[OLD.special_tokens.index(name)] == NEW.special_tokens.index(name)
    codes = np.arange(5)
    np.testing.assert_array_equal(mapping[OLD.to_ids("text", codes)], NEW.to_ids("text", codes))
    assert mapping[OLD.eos_id] == NEW.eos_id
    codes = np.stack([np.arange(3), np.arange(3)], axis=-1)
    np.testing.assert_array_equal(mapping[OLD.to_ids("image", codes)], NEW.to_ids("image", codes))
    assert [NEW.ranges[there].modality for there in new_ranges(OLD, NEW)] == [r.modality for r in OLD.ranges]


@pytest.mark.parametrize("options", [{}, {"tied_unembedding": True}])
def test_old_sequences_have_the_logits_they_had_over_the_old_ids(options):
    old, new = pretraining(OLD, **options), pretraining(NEW, seed=1, **options)
    parameters = old.init().parameters
    after = grown_parameters(parameters, new.init().parameters, OLD, NEW)
    logits = jax.jit(old.denoise)(parameters, example(OLD)).logits
    new_logits = jax.jit(new.denoise)(after, example(NEW)).logits
    # Sums over the width in another order: float32 rounding only.
    np.testing.assert_allclose(new_logits[..., new_ids(OLD, NEW)], logits, rtol=1e-5, atol=1e-5)


def test_new_rows_are_as_initialised_and_no_two_alike():
    fresh = pretraining(NEW, seed=1).init().parameters
    after = grown_parameters(pretraining(OLD).init().parameters, fresh, OLD, NEW)
    is_new = np.setdiff1d(np.arange(NEW.size), new_ids(OLD, NEW))
    assert len(is_new) == NEW.size - OLD.size > 0
    for rows, initial in ((after["embedding"], fresh["embedding"]), (after["unembedding"].T, fresh["unembedding"].T)):
        np.testing.assert_array_equal(rows[is_new], initial[is_new])
        assert len(np.unique(np.asarray(rows[is_new]), axis=0)) == len(is_new)
        assert np.abs(np.asarray(rows[is_new])).min(axis=-1).max() > 0


def test_every_parameter_whose_shape_changes_is_mapped_and_every_other_taken_over():
    old, fresh = pretraining(OLD).init().parameters, pretraining(NEW, seed=1).init().parameters
    after = grown_parameters(old, fresh, OLD, NEW)
    assert jax.tree.map(jnp.shape, after) == jax.tree.map(jnp.shape, fresh)
    taken = jax.tree.map(lambda a, b: a.shape != b.shape or bool((a == b).all()), old, after)
    assert jax.tree.all(taken)
    changed = jax.tree.map(lambda a, b: a.shape != b.shape, old, fresh)
    assert sum(jax.tree.leaves(changed)) == 4


def test_the_same_vocabulary_changes_nothing():
    parameters = pretraining(OLD).init().parameters
    after = grown_parameters(parameters, pretraining(OLD, seed=1).init().parameters, OLD, OLD)
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), parameters, after))


def test_another_network_is_refused_with_the_difference():
    wider = TrainConfig(model=dataclasses.replace(MODEL, width=32))
    with pytest.raises(ValueError, match=r"runs/a: .*its model.*model\.width: 16 → 32"):
        require_same_model(TrainConfig(model=MODEL), wider, Path("runs/a"))


def test_another_parametrization_is_another_network():
    deeper = TrainConfig(model=MODEL, parametrization=ParametrizationConfig(base_layers=2))
    with pytest.raises(ValueError, match=r"parametrization\.base_layers: None → 2"):
        require_same_model(TrainConfig(model=MODEL), deeper, Path("runs/a"))


@pytest.fixture
def tokenizers(prepared, tmp_path) -> tuple[Path, Path]:
    """The folder of a run's tokenizers, and a copy."""
    folders = tmp_path / "run" / "tokenizers", tmp_path / "data" / "tokenizers"
    for folder in folders:
        prepared.tokenizers.save(folder)
    return folders


def edit_text(folder: Path, change) -> None:
    """Applies `change` to the token → id map of a text tokenizer."""
    content = json.loads((folder / "text" / "tokenizer.json").read_text())
    change(content["model"]["vocab"])
    content["model"]["merges"] = []
    TextTokenizer(json.dumps(content)).save(folder / "text")


def test_a_grown_text_tokenizer_is_taken_and_one_that_moved_a_token_refused(tokenizers):
    old, new = tokenizers
    require_grown(old, new)
    edit_text(new, lambda vocabulary: vocabulary.update(seventeen=len(vocabulary)))
    require_grown(old, new)
    edit_text(new, lambda vocabulary: vocabulary.update({"!": vocabulary["$"], "$": vocabulary["!"]}))
    with pytest.raises(ValueError, match=r"must be those of .*run, .*text id \d+: '!' → '\$'; text id \d+: '\$' → '!'"):
        require_grown(old, new)


def test_of_many_moved_tokens_three_are_named_and_the_rest_counted(tokenizers):
    old, new = tokenizers

    def turn(vocabulary):
        letters = [name for name in vocabulary if len(name) == 1][:4]
        vocabulary.update(zip(letters, [vocabulary[name] for name in letters[1:] + letters[:1]], strict=True))

    edit_text(new, turn)
    with pytest.raises(ValueError, match="1 more text ids") as error:
        require_grown(old, new)
    assert str(error.value).count("text id ") == 3


def test_a_codec_that_is_missing_or_another_is_refused_by_name(tokenizers):
    old, new = tokenizers
    shutil.rmtree(new / "image")
    with pytest.raises(ValueError, match=r"codec of image: [0-9a-f]{16} → absent"):
        require_grown(old, new)
    shutil.copytree(new / "audio", new / "image")
    with pytest.raises(ValueError, match=r"codec of image: ([0-9a-f]{16}) → (?!\1)[0-9a-f]{16}"):
        require_grown(old, new)
    shutil.rmtree(old / "image")  # then it is a new modality
    require_grown(old, new)


def test_a_new_run_starts_from_the_average_of_another_and_says_so(prepared, tmp_path):
    only_sums = BatchConfig(tokens=120, weights={"drawn": 0.0, "spoken": 0.0})
    config = TrainConfig(
        model=MODEL,
        batch=only_sums,
        loop=LoopConfig(checkpoint_every=1, keep_last=3),
        optimizer=OptimizerConfig(horizon_tokens=300, warmup_tokens=0),
    )
    first, second = tmp_path / "first", tmp_path / "second"
    source = train(first, prepared.folder, config)
    assert source.step >= 3
    still = dataclasses.replace(
        config, seed=7, optimizer=OptimizerConfig(horizon_tokens=100, warmup_tokens=0, learning_rate=1e-30)
    )
    train(second, prepared.folder, still, init_from=first)
    loaded = load(second)
    # The average of what it started from and what a step that small made of it: rounding only.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), loaded.parameters, source.parameters)
    assert loaded.description.init_from == str(first) and loaded.description.init_step == source.step
    shutil.rmtree(first)
    assert train(second, prepared.folder, still, init_from=first).step == loaded.step  # what it has is enough
    with pytest.raises(ValueError, match=r"init_from: .*first → None"):
        train(second, prepared.folder, still)
