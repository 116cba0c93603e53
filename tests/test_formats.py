"""Files of earlier versions: former names are read, and fields added later change nothing where a file lacks them."""

import dataclasses
import json
from dataclasses import dataclass, field
from typing import get_type_hints

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from trimask.configs.studies import STUDIES
from trimask.diffusion.data.manifest import Manifest
from trimask.diffusion.data.prepare_config import PrepareConfig
from trimask.diffusion.evaluation.results import Evaluation
from trimask.diffusion.loss import LossConfig
from trimask.diffusion.parametrization import Family
from trimask.diffusion.pretraining.description import RunDescription
from trimask.diffusion.run.checkpoint import Checkpoints, Retention
from trimask.diffusion.run.metrics import read_metrics
from trimask.diffusion.sampling.learned import PolicyDescription
from trimask.sampling_rl.train_policy import PolicyTrainConfig
from trimask.tokenizers import codec
from trimask.tokenizers.image import PatchCodec, PatchConfig
from trimask.tokenizers.storage import configuration
from trimask.tokenizers.storage.formats import RENAMED, added_field

ROOTS = [RunDescription, PrepareConfig, Manifest, Evaluation, PolicyDescription, PolicyTrainConfig]


@dataclass(frozen=True, kw_only=True)
class Inner:
    size: int = 3
    limit: int | None = added_field(as_before=7, default=None)


@dataclass(frozen=True, kw_only=True)
class Outer:
    inner: Inner = Inner()
    kinds: dict[str, Inner] = field(default_factory=dict)
    speed: float = 1.0
    shape: Inner = added_field(as_before=Inner(size=1), default=Inner(size=2))


def classes(kind, found):
    """All dataclasses that occur in the type of a field, recursively."""
    if dataclasses.is_dataclass(kind) and kind not in found:
        found.add(kind)
        for inner in get_type_hints(kind).values():
            classes(inner, found)
    for inner in getattr(kind, "__args__", ()):
        classes(inner, found)
    return found


def test_every_former_field_leads_to_one_that_is_there():
    presets = [type(preset()) for study in STUDIES.values() for preset in study.presets.values()]
    known = {kind.__name__: kind for root in [*ROOTS, *presets, PatchConfig] for kind in classes(root, set())}
    former = {name: path for name, path in RENAMED.items() if name[0].isupper()}
    assert "LossConfig.rows" in former
    for name, path in former.items():
        kind = known[name.partition(".")[0]]
        assert name.partition(".")[2] not in get_type_hints(kind)
        assert path.partition(".")[0] in get_type_hints(kind)


def test_a_field_that_is_as_before_is_not_written_and_one_that_is_not_is():
    before = Outer(inner=Inner(limit=7), kinds={"a": Inner(size=4, limit=7)}, shape=Inner(size=1))
    assert configuration.to_dict(before) == {
        "inner": {"size": 3},
        "kinds": {"a": {"size": 4}},
        "speed": 1.0,
    }
    assert configuration.to_dict(Outer())["inner"] == {"size": 3, "limit": None}
    assert configuration.to_dict(Outer())["shape"] == {"size": 2, "limit": None}


@pytest.mark.parametrize(
    "config", [Outer(), Outer(inner=Inner(limit=7), shape=Inner(size=1)), Outer(kinds={"a": Inner()})]
)
def test_what_is_written_is_read_again(config):
    assert configuration.from_dict(json.loads(json.dumps(configuration.to_dict(config))), Outer, "here") == config


def test_a_file_without_a_later_field_is_read_as_before_whatever_the_default_is():
    assert configuration.from_dict({"inner": {}}, Outer, "here") == Outer(inner=Inner(limit=7), shape=Inner(size=1))
    assert configuration.from_dict({"shape": {"size": 5}}, Outer, "here").shape == Inner(size=5, limit=7)


def test_former_fields_are_read_wherever_their_class_is(monkeypatch):
    assert configuration.from_dict({"rows": 5, "columns": 9}, LossConfig, "here") == LossConfig(
        tile_positions=5, tile_ids=9
    )
    monkeypatch.setitem(RENAMED, "Inner.length", "size")
    monkeypatch.setitem(RENAMED, "Outer.pace", "inner.size")
    found = configuration.from_dict({"pace": 8, "kinds": {"a": {"length": 6}}}, Outer, "here")
    assert (found.inner.size, found.kinds["a"].size) == (8, 6)


def test_an_unknown_field_is_refused_with_the_nearest_one():
    with pytest.raises(ValueError, match="here: not a Outer: unknown field 'sped', did you mean 'speed'"):
        configuration.from_dict({"sped": 1.0}, Outer, "here")
    with pytest.raises(ValueError, match="unknown field 'zzz', known are size, limit"):
        configuration.from_dict({"inner": {"zzz": 1}}, Outer, "here")


def test_checkpoints_are_read_by_former_names_whole_and_in_part(tmp_path, monkeypatch):
    """All shapes differ, so that no leaf can be mistaken for another."""
    weights = {"old": np.arange(3), "list": [np.zeros(2, int), np.full(5, 7)]}
    saved = jax.tree.map(jnp.asarray, {"weights": weights, "old": np.ones(4, int)})
    with Checkpoints(tmp_path, Retention()) as checkpoints:
        checkpoints.save(2, saved, notes={}, metrics={"learning_rate": 0.5})
    monkeypatch.setitem(RENAMED, "parameter.old", "new")
    zeros = {
        "weights": {"new": np.zeros(3, int), "list": [np.zeros(2, int), np.zeros(5, int)]},
        "new": np.zeros(4, int),
    }
    like = jax.tree.map(jnp.asarray, zeros)
    with Checkpoints(tmp_path) as checkpoints:
        tree = checkpoints.restore(2, like).tree
    with Checkpoints(tmp_path) as checkpoints:
        part = checkpoints.restore(2, {"weights": like["weights"]}, is_part=True).tree
        assert checkpoints.best("largest_learning_rate") == 2
    assert list(part) == ["weights"]
    for found in (tree, part):
        np.testing.assert_array_equal(found["weights"]["new"], np.arange(3))
        np.testing.assert_array_equal(found["weights"]["list"][1], np.full(5, 7))
    np.testing.assert_array_equal(tree["new"], np.ones(4))


def test_multipliers_know_parameters_by_former_names(monkeypatch):
    monkeypatch.setitem(RENAMED, "parameter.wq", "query")
    assert Family(of={"wq": 2.0, "key": 3.0}).of == {"query": 2.0, "key": 3.0}


def test_metrics_are_read_by_former_names(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "learning_rate": 0.5}\n')
    assert read_metrics(tmp_path) == [{"step": 1, "largest_learning_rate": 0.5}]
    with pytest.raises(FileNotFoundError, match="no such file; `trimask train` writes it"):
        read_metrics(tmp_path / "none")


def test_a_codec_of_a_former_kind_and_field_keeps_its_fingerprint_and_its_bytes(tmp_path, monkeypatch):
    fitted = PatchCodec.fit(np.arange(96, dtype=np.uint8).reshape(2, 4, 12, 1), PatchConfig(codebook_size=5))
    fields = dataclasses.asdict(fitted.config)
    said = {"kind": "tiles", "config": {"side": fields.pop("patch_side"), **fields}}
    codec.write_folder(tmp_path / "old", said, {"codebook.npy": fitted.codebook})
    monkeypatch.setitem(RENAMED, "codec.tiles", "patch")
    monkeypatch.setitem(RENAMED, "PatchConfig.side", "patch_side")
    loaded = codec.load_tokenizer(tmp_path / "old")
    assert loaded.config == fitted.config
    assert (
        loaded.fingerprint
        == json.loads((tmp_path / "old/config.json").read_text())["fingerprint"]
        != fitted.fingerprint
    )
    loaded.save(tmp_path / "new")
    for path in (tmp_path / "old").iterdir():
        assert path.read_bytes() == (tmp_path / "new" / path.name).read_bytes()


def test_an_unknown_field_of_a_codec_is_refused_with_the_nearest_one(tmp_path):
    content = {"codebook.npy": np.zeros((1, 2, 2, 1), np.uint8)}
    codec.write_folder(tmp_path, {"kind": "patch", "config": {"patch_sid": 2}}, content)
    with pytest.raises(ValueError, match="unknown field 'patch_sid', did you mean 'patch_side'"):
        codec.load_tokenizer(tmp_path)
