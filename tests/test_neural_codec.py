"""Learned codecs: networks of the announced shapes, codes that depend on the medium alone, weights read late."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from trimask.tokenizers.codec import load_tokenizer
from trimask.tokenizers.neural import neural_codec
from trimask.tokenizers.neural.autoencoder import (
    Autoencoder,
    PictureCodecConfig,
    SoundCodecConfig,
    named_arrays,
    shapes_of_arrays,
    with_arrays,
)
from trimask.tokenizers.neural.neural_codec import NeuralPictureCodec, NeuralSoundCodec, rows_at_once
from trimask.tokenizers.neural.picture_network import (
    PictureDecoder,
    PictureEncoder,
    PictureNetworkConfig,
    fold,
    unfold,
)
from trimask.tokenizers.neural.quantizers import QuantizerConfig
from trimask.tokenizers.neural.sound_network import SoundDecoder, SoundEncoder, SoundNetworkConfig
from trimask.tokenizers.storage.weights import write_weights

PICTURES = PictureCodecConfig(
    network=PictureNetworkConfig(channels=1, patch=2, widths=(4, 6), blocks=1), quantizer=QuantizerConfig(levels=(3, 2))
)
SOUNDS = SoundCodecConfig(
    network=SoundNetworkConfig(window=64, hop=20, spectra_per_frame=3, num_mels=12, width=8, blocks=1),
    quantizer=QuantizerConfig(kind="vq", codebook_size=5, dimensions=3, num_codebooks=2),
)


@pytest.fixture(params=[PICTURES, SOUNDS], ids=["pictures", "sounds"])
def codec(request, tmp_path):
    kind = NeuralPictureCodec if request.param is PICTURES else NeuralSoundCodec
    arrays = named_arrays(nnx.state(Autoencoder(request.param, rngs=nnx.Rngs(3))))
    return kind(request.param, write_weights(tmp_path / "w.safetensors", arrays))


def media_for(codec, number):
    draw = np.random.default_rng(number)
    if isinstance(codec, NeuralPictureCodec):
        return draw.integers(0, 256, (number, 8, 12, 1), np.uint8)
    return draw.uniform(-0.5, 0.5, (number, 180)).astype(np.float32)


def test_folding_moves_squares_into_channels_and_back():
    x = jnp.arange(2 * 4 * 6 * 3.0).reshape(2, 4, 6, 3)
    folded = fold(x, 2)
    assert folded.shape == (2, 2, 3, 12)
    np.testing.assert_array_equal(folded[1, 1, 2], x[1, 2:4, 4:6].reshape(-1))
    np.testing.assert_array_equal(unfold(folded, 2), x)


@pytest.mark.parametrize("heads", [0, 2])
def test_a_picture_network_has_the_stride_that_it_says(heads):
    config = PictureNetworkConfig(channels=3, patch=1, widths=(4, 6, 8), blocks=1, attention_heads=heads)
    networks = PictureEncoder(config, rngs=nnx.Rngs(0)), PictureDecoder(config, rngs=nnx.Rngs(1))
    encode, decode = (jax.jit(network.__call__) for network in networks)
    x = jax.random.normal(jax.random.key(0), (2, 8, 12, 3))
    latents = encode(x)
    assert config.stride == 4 and latents.shape == (2, 2, 3, 8) and decode(latents).shape == x.shape
    # With attention a corner sees the whole picture, without it its surroundings alone.
    far = jax.random.normal(jax.random.key(1), (1, 48, 48, 3))
    near = jnp.concatenate([far, far.at[0, -1, -1].add(1.0)])
    change = (lambda both: both[1:] - both[:1])(encode(near))
    assert bool(jnp.abs(change[0, 0, 0]).max() > 0) == bool(heads) and jnp.abs(change[0, -1, -1]).max() > 0


def test_a_sound_network_has_the_frames_that_it_says():
    config = SOUNDS.network
    networks = SoundEncoder(config, rngs=nnx.Rngs(0)), SoundDecoder(config, rngs=nnx.Rngs(1))
    encode, decode = (jax.jit(network.__call__) for network in networks)
    x = 0.1 * jax.random.normal(jax.random.key(0), (2, 300))
    latents = encode(x)
    assert config.samples_per_frame == 60 and latents.shape == (2, 5, 8) and decode(latents).shape == x.shape
    assert np.isfinite(decode(100 * latents)).all()


def test_weights_have_names_that_lead_back(codec):
    model = Autoencoder(codec.config, rngs=nnx.Rngs(3))
    arrays = named_arrays(nnx.state(model))
    assert {name: array.shape for name, array in arrays.items()} == shapes_of_arrays(codec.config)
    again = nnx.merge(*with_arrays(codec.config, arrays))
    for name, array in named_arrays(nnx.state(again)).items():
        np.testing.assert_array_equal(array, arrays[name])
    if isinstance(codec, NeuralSoundCodec):
        assert "quantizer.codewords" in arrays and "encoder.blocks.0.up.kernel" in arrays


def test_codes_are_those_of_the_network(codec):
    media = media_for(codec, 3)
    model = Autoencoder(codec.config, rngs=nnx.Rngs(3))
    x = neural_codec.from_pixels(jnp.asarray(media)) if isinstance(codec, NeuralPictureCodec) else jnp.asarray(media)
    codes = np.asarray(jax.jit(model.encode)(x))
    np.testing.assert_array_equal(codec.encode(media), codes[..., 0] if codes.ndim == 4 else codes)
    made = jax.jit(model.decode)(jnp.asarray(codes))
    if isinstance(codec, NeuralPictureCodec):
        made = np.asarray(neural_codec.to_pixels(made)).astype(int)
        assert np.abs(codec.decode(codes[..., 0]).astype(int) - made).max() <= 1
    else:
        np.testing.assert_allclose(codec.decode(codes), np.clip(made, -1, 1), atol=1e-5)


def test_a_medium_has_its_codes_whatever_is_encoded_with_it(codec):
    """One program for every number of media of a shape."""
    media = media_for(codec, 70)
    codes = codec.encode(media)
    for part in (slice(0, 1), slice(3, 68), slice(69, 70)):
        np.testing.assert_array_equal(codec.encode(media[part]), codes[part])
    codec.decode(codes)
    codec.decode(codes[:1])
    assert len(codec._programs) == 2
    assert codec.encode(media[:0]).shape == (0, *codes.shape[1:])
    assert codec.decode(codes[:0]).shape == (0, *codec.media_shape(codes.shape[1:]))


@pytest.mark.parametrize(
    ("shape", "rows"), [((28, 28, 1), 64), ((256, 256, 3), 4), ((4096, 4096, 3), 1), ((8000,), 64), ((240_000,), 4)]
)
def test_large_media_are_coded_a_few_at_a_time(shape, rows):
    assert rows_at_once(shape) == rows


def test_weights_are_read_when_a_medium_is_coded_first(codec, tmp_path, monkeypatch):
    codec.save(tmp_path / "saved")
    (tmp_path / "w.safetensors").unlink()
    read = []
    original = neural_codec.WeightFile.read
    monkeypatch.setattr(neural_codec.WeightFile, "read", lambda *given: read.append(1) or original(*given))
    loaded = load_tokenizer(tmp_path / "saved")
    assert loaded.fingerprint == codec.fingerprint and loaded.codebook_sizes == codec.codebook_sizes and not read
    loaded.save(tmp_path / "again")
    assert not read and (tmp_path / "again/weights.safetensors").samefile(tmp_path / "saved/weights.safetensors")
    loaded.encode(media_for(codec, 2))
    loaded.decode(loaded.encode(media_for(codec, 2)))
    assert len(read) == 1


def test_what_a_codec_cannot_code_is_refused(codec):
    if isinstance(codec, NeuralPictureCodec):
        with pytest.raises(ValueError, match="must have 1 channels, got 3"):
            codec.encode(np.zeros((1, 8, 8, 3), np.uint8))
        with pytest.raises(ValueError, match="multiple of 4, got 8×10"):
            codec.encode(np.zeros((1, 8, 10, 1), np.uint8))
    else:
        with pytest.raises(ValueError, match="must be finite"):
            codec.encode(np.full((1, 60), np.nan, np.float32))
        with pytest.raises(ValueError, match="must be of 2 codebooks, got 3"):
            codec.decode(np.zeros((1, 2, 3), np.int32))


def test_configurations_that_make_no_codec_are_refused():
    with pytest.raises(ValueError, match="num_codebooks must be 1, got 2"):
        dataclasses.replace(PICTURES, quantizer=QuantizerConfig(num_codebooks=2))
    with pytest.raises(ValueError, match="widths must name at least one level"):
        PictureNetworkConfig(widths=())
    with pytest.raises(ValueError, match=r"attention_heads must divide .* 64; got 3"):
        PictureNetworkConfig(attention_heads=3)
    with pytest.raises(ValueError, match=r"window must be at least 2·hop .* got 100"):
        SoundNetworkConfig(window=100, hop=80)
