"""The contract of tokenizers and codecs: one battery for every kind in the table, and for the folders they are saved
in.
"""

import importlib
import json
import tempfile
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from flax import nnx

from trimask.tokenizers import codec
from trimask.tokenizers.audio import MelCodec, MelConfig
from trimask.tokenizers.image import PatchCodec, PatchConfig
from trimask.tokenizers.media import MediaTokenizers
from trimask.tokenizers.neural.autoencoder import Autoencoder, PictureCodecConfig, SoundCodecConfig, named_arrays
from trimask.tokenizers.neural.neural_codec import NeuralCodec, NeuralPictureCodec, NeuralSoundCodec
from trimask.tokenizers.neural.picture_network import PictureNetworkConfig
from trimask.tokenizers.neural.quantizers import QuantizerConfig
from trimask.tokenizers.neural.sound_network import SoundNetworkConfig
from trimask.tokenizers.storage.weights import write_weights
from trimask.tokenizers.text import TextTokenizer


def _patch_codec() -> PatchCodec:
    images = np.random.default_rng(0).integers(0, 256, (5, 6, 9, 2), np.uint8)
    return PatchCodec.fit(images, PatchConfig(patch_side=3, codebook_size=7))


def _mel_codec() -> MelCodec:
    waveforms = np.random.default_rng(0).uniform(-0.5, 0.5, (3, 2000)).astype(np.float32)
    return MelCodec.fit(waveforms, MelConfig(num_mels=12, codebook_size=6))


def _text_tokenizer() -> TextTokenizer:
    return TextTokenizer.fit(["seven times seventy-seven"], 270)


def _neural_codec(kind: type[NeuralCodec], config: PictureCodecConfig | SoundCodecConfig) -> NeuralCodec:
    """A codec with random weights, in a file that lives as long as the tests."""
    arrays = named_arrays(nnx.state(Autoencoder(config, rngs=nnx.Rngs(0))))
    return kind(config, write_weights(Path(tempfile.mkdtemp(dir=_FOLDER.name)) / "weights.safetensors", arrays))


_FOLDER = tempfile.TemporaryDirectory(prefix="trimask-tests-weights-")
_PICTURE_CODEC = PictureCodecConfig(
    network=PictureNetworkConfig(channels=2, patch=1, widths=(4, 6, 8), blocks=1, attention_heads=2),
    quantizer=QuantizerConfig(kind="vq", codebook_size=7, dimensions=3),
)
_SOUND_CODEC = SoundCodecConfig(
    network=SoundNetworkConfig(window=64, hop=20, spectra_per_frame=5, num_mels=12, width=8, blocks=1),
    quantizer=QuantizerConfig(levels=(3, 2), num_codebooks=2),
)
MAKERS = {
    "patch": _patch_codec,
    "mel": _mel_codec,
    "text": _text_tokenizer,
    "neural_image": partial(_neural_codec, NeuralPictureCodec, _PICTURE_CODEC),
    "neural_audio": partial(_neural_codec, NeuralSoundCodec, _SOUND_CODEC),
}
"""Kind → a small tokenizer of that kind."""
MEDIA = {
    "patch": np.random.default_rng(1).integers(0, 256, (4, 12, 3, 2), np.uint8),
    "mel": np.random.default_rng(1).uniform(-0.5, 0.5, (4, 1300)).astype(np.float32),
    "neural_image": np.random.default_rng(1).integers(0, 256, (4, 12, 4, 2), np.uint8),
    "neural_audio": np.random.default_rng(1).uniform(-0.5, 0.5, (4, 1300)).astype(np.float32),
}
"""Kind of codec → a batch of media for it."""
IDEMPOTENT = {"patch": True, "mel": False, "neural_image": False, "neural_audio": False}
"""Kind of codec → whether media made of codes have those codes."""


def example_of(kind, table, what):
    """Looks up a codec kind in one of this file's tables."""
    if kind not in table:
        pytest.fail(f"codec.CODECS has a kind {kind!r}, of which this file has no {what}")
    return table[kind]


@pytest.fixture(params=codec.CODECS)
def stored(request, tmp_path):
    """A tokenizer of each kind, and the folder in which it was saved."""
    tokenizer = example_of(request.param, MAKERS, "MAKERS")()
    folder = tmp_path / "runs" / request.param
    tokenizer.save(folder)
    return tokenizer, folder


@pytest.fixture(params=[kind for kind in codec.CODECS if kind != "text"])
def media_codec(request):
    return example_of(request.param, MAKERS, "MAKERS")(), example_of(request.param, MEDIA, "MEDIA")


@pytest.mark.parametrize("kind", codec.CODECS)
def test_the_table_names_the_class_of_each_kind(kind):
    module, name = codec.CODECS[kind]
    assert getattr(importlib.import_module(module), name).kind == kind


def test_load_gives_back_the_same_kind_and_fingerprint(stored):
    tokenizer, folder = stored
    loaded = codec.load_tokenizer(folder)
    assert type(loaded) is type(tokenizer)
    assert isinstance(loaded, codec.Stored)
    assert loaded.fingerprint == tokenizer.fingerprint


def test_a_saved_folder_is_the_same_bytes_after_load_and_save(stored, tmp_path):
    _, folder = stored
    codec.load_tokenizer(folder).save(tmp_path / "again")
    files = sorted(path.name for path in folder.iterdir())
    assert len(files) >= 2
    assert files == sorted(path.name for path in (tmp_path / "again").iterdir())
    for name in files:
        assert (folder / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


def test_fitting_twice_gives_the_same_fingerprint(stored):
    tokenizer, _ = stored
    assert MAKERS[tokenizer.kind]().fingerprint == tokenizer.fingerprint


def test_loaded_codec_encodes_and_decodes_as_before(media_codec, tmp_path):
    fitted, media = media_codec
    fitted.save(tmp_path)
    loaded = codec.load_tokenizer(tmp_path)
    assert isinstance(loaded, codec.MediaCodec)
    assert loaded.codebook_sizes == fitted.codebook_sizes
    np.testing.assert_array_equal(loaded.encode(media), fitted.encode(media))
    np.testing.assert_array_equal(loaded.decode(fitted.encode(media)), fitted.decode(fitted.encode(media)))


def test_shapes_are_announced_truthfully(media_codec):
    fitted, media = media_codec
    codes = fitted.encode(media)
    assert codes.dtype == np.int32
    assert codes.shape[1:] == fitted.code_shape(media.shape[1:]) and codes.ndim == 3
    decoded = fitted.decode(codes)
    assert decoded.dtype == media.dtype
    assert decoded.shape[1:] == fitted.media_shape(codes.shape[1:])
    assert fitted.code_shape(decoded.shape[1:]) == codes.shape[1:]


def any_codes(fitted, batch, shape):
    """Random codes; with several codebooks, one column for each."""
    sizes = np.resize(fitted.codebook_sizes, shape)
    return np.random.default_rng(2).integers(0, sizes, (batch, *shape), np.int32)


def test_codes_are_in_the_range_of_their_codebook(media_codec):
    fitted, media = media_codec
    codes = fitted.encode(media)
    sizes = np.resize(fitted.codebook_sizes, codes.shape[1:])
    assert len(fitted.codebook_sizes) in (1, codes.shape[-1])
    assert (codes >= 0).all() and (codes < sizes).all()


def test_all_codes_can_be_decoded_and_come_back_where_that_is_promised(media_codec):
    fitted, media = media_codec
    shape = fitted.code_shape(media.shape[1:])
    codes = any_codes(fitted, 5, shape)
    decoded = fitted.decode(codes)
    assert decoded.shape == (5, *fitted.media_shape(shape)) and decoded.dtype == media.dtype
    assert (fitted.encode(decoded) == codes).all() == example_of(fitted.kind, IDEMPOTENT, "IDEMPOTENT")


@pytest.mark.parametrize("shape", [(12,), (2, 2, 3)])
def test_codes_that_are_not_2d_are_refused_in_words(shape):
    class Odd(PatchCodec):
        kind = "odd"

        def encode(self, media):
            return np.zeros((len(media), *shape), np.int32)

    fitted = _patch_codec()
    tokenizers = MediaTokenizers(_text_tokenizer(), {"image": Odd(fitted.config, fitted.codebook)})
    with pytest.raises(ValueError, match=rf"'image', odd, gives codes of shape \({shape[0]},.*must be 2-D"):
        tokenizers.encode("image", list(MEDIA["patch"]))


@pytest.mark.parametrize("rows", [slice(0, 1), slice(1, 4), slice(3, 4)])
def test_a_medium_does_not_depend_on_its_batch_mates(media_codec, rows):
    fitted, media = media_codec
    codes = fitted.encode(media)
    np.testing.assert_array_equal(fitted.encode(media[rows]), codes[rows])
    np.testing.assert_array_equal(fitted.decode(codes[rows]), fitted.decode(codes)[rows])


def test_codes_outside_the_codebook_are_refused(media_codec):
    fitted, media = media_codec
    codes = fitted.encode(media)
    for wrong in (-1, fitted.codebook_sizes[-1]):
        codes.flat[-1] = wrong
        with pytest.raises(ValueError, match=f"codes must be from 0 to .* {wrong}"):
            fitted.decode(codes)


def test_fingerprint_tells_apart_kind_setting_name_type_shape_and_value_but_not_order():
    array = np.arange(6, dtype=np.int16)

    def fingerprint(kind, config, content):
        return codec.fingerprint({"kind": kind, "config": config}, content)

    fingerprints = [
        fingerprint("a", {"x": 1, "y": 2}, {"f.npy": array}),
        fingerprint("b", {"x": 1, "y": 2}, {"f.npy": array}),
        fingerprint("a", {"x": 1, "y": 3}, {"f.npy": array}),
        fingerprint("a", {"x": 1, "y": 2}, {"g.npy": array}),
        fingerprint("a", {"x": 1, "y": 2}, {"f.npy": array.view(np.uint16)}),
        fingerprint("a", {"x": 1, "y": 2}, {"f.npy": array.reshape(2, 3)}),
        fingerprint("a", {"x": 1, "y": 2}, {"f.npy": array[::-1]}),
        fingerprint("a", {"x": 1, "y": 2}, {"f.npy": array, "g.npy": array}),
    ]
    assert len(set(fingerprints)) == len(fingerprints)
    assert all(len(one) == 16 for one in fingerprints)
    assert fingerprint("a", {"y": 2, "x": 1}, {"g.npy": array, "f.npy": array}) == fingerprints[-1]


def test_fingerprint_changes_with_any_codeword_and_setting():
    patch = _patch_codec()
    codebook = patch.codebook.copy()
    codebook[-1, -1, -1, -1] ^= 1
    reseeded = PatchConfig(patch_side=3, codebook_size=7, seed=1)
    mel = _mel_codec()
    codebooks = [each.copy() for each in mel.codebooks]
    codebooks[1][-1, -1] += 1e-3
    fingerprints = [
        patch.fingerprint,
        PatchCodec(patch.config, codebook).fingerprint,
        PatchCodec(reseeded, patch.codebook).fingerprint,
        mel.fingerprint,
        MelCodec(mel.config, tuple(codebooks)).fingerprint,
        MelCodec(mel.config, mel.codebooks[::-1]).fingerprint,
    ]
    assert len(set(fingerprints)) == len(fingerprints)


def test_codewords_cannot_be_changed_behind_the_fingerprint():
    with pytest.raises(ValueError, match="read-only"):
        _patch_codec().codebook[0] = 0
    with pytest.raises(ValueError, match="read-only"):
        _mel_codec().codebooks[0][0] = 0


def test_a_codec_keeps_its_codewords_when_the_arrays_it_was_made_of_change():
    patch, mel = _patch_codec(), _mel_codec()
    codebook, codebooks = patch.codebook.copy(), tuple(each.copy() for each in mel.codebooks)
    made = PatchCodec(patch.config, codebook), MelCodec(mel.config, codebooks)
    codebook += 1
    codebooks[0][:] += 1
    assert [each.fingerprint for each in made] == [patch.fingerprint, mel.fingerprint]


def read_all(folder):
    """Loads a tokenizer, and reads the weights that it would read with the first medium."""
    loaded = codec.load_tokenizer(folder)
    return loaded._network if isinstance(loaded, NeuralCodec) else loaded


def test_a_changed_byte_in_any_file_is_noticed(stored):
    _, folder = stored
    for path in folder.iterdir():
        if path.name != "config.json":
            content = path.read_bytes()
            path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
            with pytest.raises(ValueError, match=folder.name):
                read_all(folder)
            path.write_bytes(content)
    read_all(folder)


def test_a_file_cut_short_or_missing_is_named(stored):
    _, folder = stored
    for path in folder.iterdir():
        content = path.read_bytes()
        path.write_bytes(content[:40])
        with pytest.raises(ValueError, match=str(folder)):
            read_all(folder)
        path.unlink()
        with pytest.raises(FileNotFoundError, match=path.name):
            read_all(folder)
        path.write_bytes(content)


def test_a_folder_of_another_kind_is_refused(tmp_path):
    _text_tokenizer().save(tmp_path)
    with pytest.raises(ValueError, match="kind 'text', expected 'patch'"):
        PatchCodec.load(tmp_path)


def test_an_unknown_kind_is_refused_with_the_known_ones(tmp_path):
    _text_tokenizer().save(tmp_path)
    config = tmp_path / "config.json"
    config.write_text(config.read_text().replace('"kind": "text"', '"kind": "smell"'))
    with pytest.raises(ValueError, match=f"'smell', known are {', '.join(codec.CODECS)}"):
        codec.load_tokenizer(tmp_path)


@pytest.mark.parametrize("content", ["[]", "{}", '{"kind": 3}', "not json", '{"kind": "text", "config": {}}'])
def test_a_malformed_description_is_refused_with_its_path(tmp_path, content):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ValueError, match=r"config\.json(: not a|, line 1: not strict)"):
        codec.load_tokenizer(tmp_path)


@pytest.mark.parametrize("name", ["../secret.npy", "/etc/passwd", "", ".."])
def test_files_outside_the_folder_are_never_read(tmp_path, name):
    _text_tokenizer().save(tmp_path)
    config = tmp_path / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"files": [name]}))
    with pytest.raises(ValueError, match="a file name must consist of letters"):
        codec.load_tokenizer(tmp_path)


def test_pickled_arrays_are_refused(tmp_path):
    _patch_codec().save(tmp_path)
    np.save(tmp_path / "codebook.npy", np.array([{"an": "object"}]), allow_pickle=True)
    with pytest.raises(ValueError, match=r"codebook\.npy: not readable"):
        codec.load_tokenizer(tmp_path)


def test_the_files_of_a_tokenizer_are_listed_in_order_whatever_order_they_come_in(tmp_path):
    codec.write_folder(tmp_path, {"kind": "patch", "config": {}}, {"b.txt": "two", "a.npy": np.arange(3)})
    assert json.loads((tmp_path / "config.json").read_text())["files"] == ["a.npy", "b.txt"]
    assert (tmp_path / "b.txt").read_text() == "two" and np.load(tmp_path / "a.npy").tolist() == [0, 1, 2]
