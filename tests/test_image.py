"""The patch codec: vector quantisation of patches of pictures."""

import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from trimask.tokenizers.image import PatchCodec, PatchConfig

UNHURRIED = settings(deadline=None, max_examples=50)  # a busy machine is no failure


def _random_images(seed: int, shape: tuple[int, ...]) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def _codec(codewords: int, side: int, channels: int) -> PatchCodec:
    """A codec of random codewords, without fitting."""
    config = PatchConfig(patch_side=side, codebook_size=codewords)
    return PatchCodec(config, _random_images(0, (codewords, side, side, channels)))


@UNHURRIED
@given(st.data())
def test_each_code_is_the_first_of_the_nearest_codewords(data):
    # Few pixel values, so that equally near codewords are common.
    few = st.sampled_from([0, 1, 254, 255]).map(np.uint8)
    codebook = data.draw(arrays(np.uint8, (5, 2, 2, 3), elements=few))
    images = data.draw(arrays(np.uint8, (2, 4, 6, 3), elements=few))
    codes = PatchCodec(PatchConfig(patch_side=2, codebook_size=5), codebook).encode(images)
    for batch, row, column in np.ndindex(2, 2, 3):
        patch = images[batch, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2].astype(int)
        distances = [int(np.sum((patch - codeword) ** 2)) for codeword in codebook.astype(int)]
        assert codes[batch, row, column] == distances.index(min(distances))


@UNHURRIED
@given(arrays(np.int32, (2, 3, 5), elements=st.integers(0, 10)))
def test_codes_survive_decoding_and_encoding(codes):
    codec = _codec(codewords=11, side=2, channels=1)
    np.testing.assert_array_equal(codec.encode(codec.decode(codes)), codes)


def test_decoding_lays_each_codeword_where_its_code_stands():
    codec = _codec(codewords=6, side=3, channels=2)
    codes = np.arange(6, dtype=np.int32).reshape(1, 2, 3)
    image = codec.decode(codes)
    assert image.shape == (1, 6, 9, 2)
    for row, column in np.ndindex(2, 3):
        np.testing.assert_array_equal(
            image[0, 3 * row : 3 * row + 3, 3 * column : 3 * column + 3],
            codec.codebook[codes[0, row, column]],
        )


def test_one_codec_serves_pictures_of_every_size():
    codec = PatchCodec.fit(_random_images(0, (3, 8, 8, 3)), PatchConfig(codebook_size=9))
    for height, width in [(2, 2), (4, 10), (16, 6)]:
        codes = codec.encode(_random_images(1, (2, height, width, 3)))
        assert codes.shape == (2, height // 2, width // 2)
        assert codec.decode(codes).shape == (2, height, width, 3)


def test_pictures_of_few_patches_are_reproduced_exactly_without_a_warning():
    images = np.zeros((3, 4, 4, 1), np.uint8)
    images[1, :2, :2] = 9
    images[2, 2:, 2:] = 200
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        codec = PatchCodec.fit(images, PatchConfig(codebook_size=64))
    assert codec.codebook_sizes == (3,)
    np.testing.assert_array_equal(codec.decode(codec.encode(images)), images)


def test_no_two_codewords_are_equal():
    # Pixels 0 and 1 only: k-means' real-valued centres round to the same few patches.
    images = np.random.default_rng(0).integers(0, 2, (20, 6, 6, 1), np.uint8)
    codec = PatchCodec.fit(images, PatchConfig(patch_side=3, codebook_size=120))
    assert len(np.unique(codec.codebook.reshape(-1, 9), axis=0)) == codec.codebook_sizes[0] < 120


def test_more_codewords_reproduce_better():
    images = _random_images(0, (20, 8, 8, 1))
    errors = []
    for size in [1, 4, 64]:
        codec = PatchCodec.fit(images, PatchConfig(codebook_size=size))
        assert codec.codebook_sizes == (size,)
        errors.append(np.mean((codec.decode(codec.encode(images)).astype(float) - images) ** 2))
    assert errors[0] > 1.2 * errors[1] > 1.2**2 * errors[2]


def test_frequent_patches_get_the_codewords():
    images = np.zeros((100, 2, 2, 1), np.uint8)
    images[:49], images[49:98], images[98], images[99] = 10, 60, 110, 111
    codec = PatchCodec.fit(images, PatchConfig(codebook_size=2))
    # Unweighted, the clusters would be {10, 60} and {110, 111}; by frequency those two join the 60: 61.98.
    np.testing.assert_array_equal(codec.codebook[:, 0, 0, 0], [10, 62])


def test_seed_decides_which_patches_are_seen():
    images = _random_images(0, (10, 8, 8, 1))
    few = [PatchCodec.fit(images, PatchConfig(codebook_size=4, max_patches=30, seed=seed)) for seed in (0, 0, 1)]
    assert few[0].fingerprint == few[1].fingerprint
    assert not np.array_equal(few[0].codebook, few[2].codebook)


@pytest.mark.parametrize(("height", "width"), [(5, 4), (4, 7), (0, 4)])
def test_a_side_that_is_no_multiple_of_the_patch_is_refused(height, width):
    codec = _codec(codewords=3, side=2, channels=1)
    images = np.zeros((1, height, width, 1), np.uint8)
    with pytest.raises(ValueError, match=f"image side must be a multiple of 2, got {height}×{width}"):
        codec.encode(images)
    with pytest.raises(ValueError, match="image side must be a multiple of 2"):
        PatchCodec.fit(images, PatchConfig())


def test_another_number_of_channels_is_refused():
    with pytest.raises(ValueError, match="image must have 3 channels, got 1"):
        _codec(codewords=3, side=2, channels=3).encode(np.zeros((1, 2, 2, 1), np.uint8))


def test_fitting_on_no_pictures_is_refused():
    with pytest.raises(ValueError, match="no pictures"):
        PatchCodec.fit(np.zeros((0, 4, 4, 1), np.uint8), PatchConfig())


@pytest.mark.parametrize("field", ["patch_side", "codebook_size", "max_patches"])
def test_nonsensical_settings_are_refused(field):
    with pytest.raises(ValueError, match=f"{field} must be at least 1, got 0"):
        PatchConfig(**{field: 0})
