"""Learned codecs as tokenizers: media ↔ codes by the networks that `trimask train-tokenizer` trains.

The last bits of a convolution depend on the device, the number of threads and the shape of the batch, and a last bit
may decide which of two codewords is nearer. So every medium is encoded in a batch of the one size that `rows_at_once`
gives for its shape (the last batch is padded), and on CPUs by one thread. On one kind of device and with the same
versions, codes are then functions of the medium alone.
"""

from collections.abc import Callable
from functools import cached_property
from typing import Any, ClassVar, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Float32, Int, Shaped, UInt8

from trimask.tokenizers.codebook import check_codes
from trimask.tokenizers.codec import Files, StoredTokenizer
from trimask.tokenizers.neural.autoencoder import (
    Autoencoder,
    PictureCodecConfig,
    SoundCodecConfig,
    shapes_of_arrays,
    with_arrays,
)
from trimask.tokenizers.storage.weights import WeightFile

_FILE = "weights.safetensors"
_MOST_ROWS = 64
_NUMBERS_AT_ONCE = 1 << 20
"""Largest number of numbers of a batch of media, unless a single medium has more."""

_T = TypeVar("_T", bound="NeuralCodec")


def rows_at_once(media_shape: tuple[int, ...]) -> int:
    """Number of media of this shape that are coded at once, a power of two."""
    most = _NUMBERS_AT_ONCE // int(np.prod(media_shape))
    return 1 << max(0, min(most, _MOST_ROWS).bit_length() - 1)


class NeuralCodec(StoredTokenizer):
    """What learned codecs of all modalities have in common. Weights are read when a medium is coded first."""

    config: Any

    def __init__(self, config: Any, weights: WeightFile):
        self.config, self.weights = config, weights
        self._programs: dict[Any, Callable[..., Any]] = {}

    @property
    def codebook_sizes(self) -> tuple[int, ...]:
        """Number of codewords of each codebook, coarsest first."""
        return self.config.quantizer.codebook_sizes

    @classmethod
    def _files(cls, config: Any) -> Files:
        return {_FILE: WeightFile}

    @classmethod
    def _from_files(cls: type[_T], config: Any, content: dict[str, Any]) -> _T:
        return cls(config, content[_FILE])

    @property
    def _content(self) -> dict[str, WeightFile]:
        return {_FILE: self.weights}

    @cached_property
    def _network(self) -> tuple[nnx.GraphDef, nnx.State]:
        return with_arrays(self.config, self.weights.read(shapes_of_arrays(self.config)))

    def _run(
        self, method: Callable[..., jax.Array], rows: Shaped[np.ndarray, "batch ..."], size: int
    ) -> Shaped[np.ndarray, "batch ..."]:
        """`method(autoencoder, rows)`, `size` rows at a time; the last ones are repeated to fill the last batch."""
        graph, state = self._network
        parts = []
        for first in range(0, len(rows), size):
            part = rows[first : first + size]
            padded = np.concatenate([part, np.repeat(part[-1:], size - len(part), axis=0)])
            key = method, padded.shape, padded.dtype
            if key not in self._programs:
                self._programs[key] = _compiled(graph, method, state, padded)
            parts.append(np.asarray(self._programs[key](state, padded))[: len(part)])
        return np.concatenate(parts)


def _compiled(
    graph: nnx.GraphDef, method: Callable[..., jax.Array], state: nnx.State, rows: np.ndarray
) -> Callable[..., jax.Array]:
    """The method compiled for rows of this shape, for one thread on CPUs."""
    options: dict[str, str | bool] | None = None
    if jax.default_backend() == "cpu":
        options = {"xla_cpu_multi_thread_eigen": False}

    def run(state, rows):
        return method(nnx.merge(graph, state), rows)

    return jax.jit(run).lower(state, rows).compile(compiler_options=options)


class NeuralPictureCodec(NeuralCodec):
    """A learned codec for pictures whose sides are multiples of its stride."""

    kind: ClassVar[str] = "neural_image"
    config_type = PictureCodecConfig
    modality: ClassVar[str] = "image"

    def encode(self, media: UInt8[np.ndarray, "batch height width channels"]) -> Int[np.ndarray, "batch rows columns"]:
        """Codes of pictures. Raises ValueError for pictures of other channels or sides."""
        batch, *shape = media.shape
        rows, columns = self.code_shape(tuple(shape))
        if not batch:
            return np.zeros((0, rows, columns), np.int32)
        return self._run(_codes_of_pictures, media, rows_at_once(tuple(shape)))[..., 0]

    def decode(self, codes: Int[np.ndarray, "batch rows columns"]) -> UInt8[np.ndarray, "batch height width channels"]:
        """Pictures of codes. Raises ValueError for codes outside the codebook."""
        check_codes(codes, self.codebook_sizes[0])
        shape = self.media_shape(codes.shape[1:])
        if not len(codes):
            return np.zeros((0, *shape), np.uint8)
        return self._run(_pictures_of_codes, codes[..., None], rows_at_once(shape))

    def code_shape(self, media_shape: tuple[int, ...]) -> tuple[int, ...]:
        """(height, width, channels) → (rows, columns)."""
        network, (height, width, channels) = self.config.network, media_shape
        if channels != network.channels:
            raise ValueError(f"image must have {network.channels} channels, got {channels}")
        if height < 1 or width < 1 or height % network.stride or width % network.stride:
            raise ValueError(f"image side must be a multiple of {network.stride}, got {height}×{width}")
        return height // network.stride, width // network.stride

    def media_shape(self, code_shape: tuple[int, ...]) -> tuple[int, ...]:
        """(rows, columns) → (height, width, channels)."""
        network, (rows, columns) = self.config.network, code_shape
        return rows * network.stride, columns * network.stride, network.channels


class NeuralSoundCodec(NeuralCodec):
    """A learned codec for mono sound of any length; a clip that ends within a code frame is padded with silence."""

    kind: ClassVar[str] = "neural_audio"
    config_type = SoundCodecConfig
    modality: ClassVar[str] = "audio"

    @property
    def sample_rate_hz(self) -> int:
        """Sample rate of the waveforms in Hz."""
        return self.config.sample_rate_hz

    def encode(self, media: Float32[np.ndarray, "batch samples"]) -> Int[np.ndarray, "batch frames codebooks"]:
        """Codes of mono waveforms in [-1, 1]. Raises ValueError for NaN and infinite samples."""
        batch, samples = media.shape
        frames, codebooks = self.code_shape((samples,))
        if not np.isfinite(media).all():
            raise ValueError("waveform must be finite, got NaN or infinity")
        if not batch:
            return np.zeros((0, frames, codebooks), np.int32)
        length = frames * self.config.samples_per_frame
        padded = np.pad(media, ((0, 0), (0, length - samples)))
        return self._run(Autoencoder.encode, padded, rows_at_once((length,)))

    def decode(self, codes: Int[np.ndarray, "batch frames codebooks"]) -> Float32[np.ndarray, "batch samples"]:
        """Waveforms of codes. Raises ValueError for another number of codebooks, or codes outside them."""
        if codes.shape[-1] != len(self.codebook_sizes):
            raise ValueError(f"codes must be of {len(self.codebook_sizes)} codebooks, got {codes.shape[-1]}")
        for stage, size in enumerate(self.codebook_sizes):
            check_codes(codes[..., stage], size)
        shape = self.media_shape(codes.shape[1:])
        if not len(codes):
            return np.zeros((0, *shape), np.float32)
        return self._run(_sounds_of_codes, codes, rows_at_once(shape))

    def code_shape(self, media_shape: tuple[int, ...]) -> tuple[int, ...]:
        """(samples,) → (frames, codebooks)."""
        (samples,) = media_shape
        if samples < 1:
            raise ValueError("waveform must have at least one sample")
        return -(-samples // self.config.samples_per_frame), self.config.quantizer.num_codebooks

    def media_shape(self, code_shape: tuple[int, ...]) -> tuple[int, ...]:
        """(frames, codebooks) → (samples,)."""
        return (code_shape[0] * self.config.samples_per_frame,)


def from_pixels(pictures: UInt8[jax.Array, "..."]) -> jax.Array:
    """Pictures in [-1, 1]."""
    return pictures.astype(jnp.float32) / 127.5 - 1


def to_pixels(pictures: jax.Array) -> jax.Array:
    """Pictures as whole numbers from 0 to 255."""
    return jnp.clip(jnp.round((pictures + 1) * 127.5), 0, 255).astype(jnp.uint8)


def _codes_of_pictures(autoencoder: Autoencoder, pictures: jax.Array) -> jax.Array:
    return autoencoder.encode(from_pixels(pictures))


def _pictures_of_codes(autoencoder: Autoencoder, codes: jax.Array) -> jax.Array:
    return to_pixels(autoencoder.decode(codes))


def _sounds_of_codes(autoencoder: Autoencoder, codes: jax.Array) -> jax.Array:
    return jnp.clip(autoencoder.decode(codes), -1, 1)
