"""Opening prepared data: errors name missing or damaged files, and tokenizers of other data are refused."""

import json
import shutil

import numpy as np
import pytest

from trimask.diffusion.data.plan import Job
from trimask.diffusion.data.prepared import Prepared
from trimask.diffusion.data.prepared_folder import PreparedFolder
from trimask.diffusion.data.verification import Damaged
from trimask.tokenizers import media


@pytest.fixture
def copy(prepared, tmp_path):
    """Path of a copy of the prepared folder, which a test may change."""
    return shutil.copytree(prepared.folder, tmp_path / "copy")


def test_a_folder_without_a_manifest_is_refused(copy):
    (copy / "manifest.json").unlink()
    with pytest.raises(FileNotFoundError, match="no prepared data here; make it with `trimask prepare"):
        Prepared(copy)


def test_tokenizers_of_other_data_are_refused(copy):
    manifest = json.loads((copy / "manifest.json").read_text())
    manifest["tokenizers"]["text"] = "other"
    (copy / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(
        ValueError, match=r"tokenizers are not those that the data were made with: .* the manifest says .*other"
    ):
        Prepared(copy)


def test_unknown_datasets_and_splits_are_refused_with_the_known_ones(prepared):
    with pytest.raises(ValueError, match="no dataset 'draw', only drawn, spoken, sums"):
        prepared.dataset("draw")
    with pytest.raises(ValueError, match="sums has no split 'later', only train, validation, test"):
        prepared.examples("sums", "later")


def test_a_missing_shard_is_named(copy):
    shard = PreparedFolder(copy).shard(Job("sums", 0), "train")
    shard.unlink()
    with pytest.raises(Damaged, match=f"block-00000.json: damaged: {shard}: no such file"):
        Prepared(copy).examples("sums", "train")


def test_errors_of_tokenizers_name_the_missing_modality(copy, prepared, tmp_path):
    with pytest.raises(ValueError, match="no codec for 'melody'; there are audio, image"):
        prepared.tokenizers.codec("melody")
    with pytest.raises(FileNotFoundError, match="no such tokenizers folder"):
        media.load_tokenizers(tmp_path / "nowhere")
    shutil.rmtree(copy / "tokenizers/text")
    with pytest.raises(ValueError, match="holds no text tokenizer, only audio, image"):
        media.load_tokenizers(copy / "tokenizers")


def test_texts_and_media_are_encoded_by_the_tokenizer_of_their_modality(prepared):
    tokenizers = prepared.tokenizers
    texts = ["one", "12+34=46"]
    encoded = tokenizers.encode("text", texts)
    assert [codes.tolist() for codes in encoded] == [codes.tolist() for codes in tokenizers.text.encode_batch(texts)]
    picture = np.zeros((4, 6, 1), np.uint8)
    (codes,) = tokenizers.encode("image", [picture])
    assert np.array_equal(codes, tokenizers.codec("image").encode(picture[None])[0])


@pytest.mark.parametrize("shape", [None, [], [4, 6], [4, 6, 1, 1], [4, 8, 1], [4, 6, 3], [-4, 6, 1], [4, 7, 1]])
def test_a_plan_whose_shapes_contradict_the_codes_is_refused(copy, shape):
    content = json.loads((copy / "plan.json").read_text())
    assert content["media_shapes"]["drawn"] == [4, 6, 1]
    content["media_shapes"] = {"spoken": content["media_shapes"]["spoken"]}
    if shape is not None:
        content["media_shapes"]["drawn"] = shape
    (copy / "plan.json").write_text(json.dumps(content))
    with pytest.raises(
        ValueError, match=r"plan\.json: damaged: image of shape .* of drawn have no codes of shape \(2, 3\)"
    ):
        _ = Prepared(copy).plan
