"""Pictures ↔ codes by vector quantisation of patches.

A picture is cut into square patches of side p, in reading order; each is coded as the index of its nearest codeword:

    codes[r, c] = argmin_k ‖pixels[rp:(r+1)p, cp:(c+1)p] − codeword_k‖²

Patches and codewords are bytes, so distances are exact; among equally near codewords the first is taken.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Any, ClassVar

import numpy as np
from jaxtyping import Int, UInt8

from trimask.tokenizers.codebook import check_codes, fit_codebook, nearest_codeword
from trimask.tokenizers.codec import ArrayFile, Files, StoredTokenizer
from trimask.tokenizers.storage.ranges import Checked, Seed, Size, whole


@dataclass(frozen=True, kw_only=True)
class PatchConfig(Checked):
    """Configuration of a patch codec and of fitting its codebook."""

    patch_side: Annotated[int, whole(1, 4096)] = 2
    """Side of a square patch in pixels; each patch is one code."""
    codebook_size: Size = 128
    """Largest number of codewords; there are fewer if the pictures have fewer distinct patches."""
    max_patches: Size = 30_000
    """Number of patches, drawn at random, on which k-means is fitted; all of them if there are fewer."""
    seed: Seed = 0
    """Seed of the random patches and of k-means."""


class PatchCodec(StoredTokenizer):
    """A codec for grey or colour pictures of any size whose sides are multiples of the patch side."""

    kind: ClassVar[str] = "patch"
    config_type = PatchConfig
    modality: ClassVar[str] = "image"

    def __init__(self, config: PatchConfig, codebook: UInt8[np.ndarray, "codewords side side channels"]):
        self.config = config
        self.codebook = codebook.copy()
        self.codebook.flags.writeable = False

    @classmethod
    def fit(cls, images: UInt8[np.ndarray, "batch height width channels"], config: PatchConfig) -> "PatchCodec":
        """Fits a codebook by k-means on the patches of these pictures. Raises ValueError if there are none."""
        if not len(images):
            raise ValueError("no pictures to fit a codebook on")
        patches = _patches(images, config.patch_side)
        vectors = patches.reshape(-1, patches.shape[-1])
        means = fit_codebook(vectors, config.codebook_size, config.seed, config.max_patches)
        # Rounding can make two means equal; a duplicate codeword would never be used.
        codewords = np.unique(np.rint(means).astype(np.uint8), axis=0)
        side = config.patch_side
        return cls(config, codewords.reshape(-1, side, side, images.shape[-1]))

    @property
    def codebook_sizes(self) -> tuple[int, ...]:
        """Number of codewords of the single codebook."""
        return (len(self.codebook),)

    def encode(self, media: UInt8[np.ndarray, "batch height width channels"]) -> Int[np.ndarray, "batch rows columns"]:
        """Index of the nearest codeword of every patch. Raises ValueError for pictures of other channels or sides."""
        batch, *shape = media.shape
        rows, columns = self.code_shape(tuple(shape))
        patches = _patches(media, self.config.patch_side)
        return nearest_codeword(patches, self._vectors).reshape(batch, rows, columns)

    def decode(self, codes: Int[np.ndarray, "batch rows columns"]) -> UInt8[np.ndarray, "batch height width channels"]:
        """Pictures put together from the codewords. Raises ValueError for codes outside the codebook."""
        check_codes(codes, len(self.codebook))
        patches = self.codebook[codes]
        return patches.transpose(0, 1, 3, 2, 4, 5).reshape(len(codes), *self.media_shape(codes.shape[1:]))

    def code_shape(self, media_shape: tuple[int, ...]) -> tuple[int, ...]:
        """(height, width, channels) → (rows, columns)."""
        height, width, channels = media_shape
        if channels != self.codebook.shape[-1]:
            raise ValueError(f"image must have {self.codebook.shape[-1]} channels, got {channels}")
        _check_sides(height, width, self.config.patch_side)
        return height // self.config.patch_side, width // self.config.patch_side

    def media_shape(self, code_shape: tuple[int, ...]) -> tuple[int, ...]:
        """(rows, columns) → (height, width, channels)."""
        rows, columns = code_shape
        side = self.config.patch_side
        return rows * side, columns * side, self.codebook.shape[-1]

    @classmethod
    def _files(cls, config: PatchConfig) -> Files:
        return {"codebook.npy": ArrayFile("uint8", (None, config.patch_side, config.patch_side, None))}

    @classmethod
    def _from_files(cls, config: PatchConfig, content: dict[str, Any]) -> "PatchCodec":
        return cls(config, content["codebook.npy"])

    @property
    def _content(self) -> dict[str, np.ndarray]:
        return {"codebook.npy": self.codebook}

    @cached_property
    def _vectors(self) -> UInt8[np.ndarray, "codewords dim"]:
        return self.codebook.reshape(len(self.codebook), -1)


def patches_as_images(
    images: UInt8[np.ndarray, "batch height width channels"], side: int
) -> UInt8[np.ndarray, "patches {side} {side} channels"]:
    """Every patch as a picture of its own, which is enough for `PatchCodec.fit`."""
    return _patches(images, side).reshape(-1, side, side, images.shape[-1])


def _patches(
    images: UInt8[np.ndarray, "batch height width channels"], side: int
) -> UInt8[np.ndarray, "batch patches dim"]:
    batch, height, width, channels = images.shape
    _check_sides(height, width, side)
    cut = images.reshape(batch, height // side, side, width // side, side, channels)
    return cut.transpose(0, 1, 3, 2, 4, 5).reshape(batch, -1, side * side * channels)


def _check_sides(height: int, width: int, side: int) -> None:
    if height < 1 or width < 1 or height % side or width % side:
        raise ValueError(f"image side must be a multiple of {side}, got {height}×{width}")
