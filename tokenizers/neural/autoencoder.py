"""Learned codecs as networks: an encoder, a quantiser and a decoder, with their weights as named arrays.

Media are float32 in [-1, 1]: pictures [batch, height, width, channels], sounds [batch, samples].
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from trimask.tokenizers.neural.picture_network import PictureDecoder, PictureEncoder, PictureNetworkConfig
from trimask.tokenizers.neural.quantizers import Quantized, Quantizer, QuantizerConfig
from trimask.tokenizers.neural.sound_network import SoundDecoder, SoundEncoder, SoundNetworkConfig
from trimask.tokenizers.storage.ranges import Checked


@dataclass(frozen=True, kw_only=True)
class PictureCodecConfig(Checked):
    """Network and quantiser of a learned codec for pictures."""

    network: PictureNetworkConfig = PictureNetworkConfig()
    """Shape of the network."""
    quantizer: QuantizerConfig = QuantizerConfig()
    """How latent vectors become codes."""

    def __post_init__(self):
        super().__post_init__()
        if self.quantizer.num_codebooks != 1:
            raise ValueError(
                "pictures have one code for each position, so num_codebooks must be 1, got "
                f"{self.quantizer.num_codebooks}"
            )


@dataclass(frozen=True, kw_only=True)
class SoundCodecConfig(Checked):
    """Network and quantiser of a learned codec for sounds."""

    network: SoundNetworkConfig = SoundNetworkConfig()
    """Shape of the network."""
    quantizer: QuantizerConfig = QuantizerConfig(kind="vq", num_codebooks=2)
    """How latent vectors become codes."""

    @property
    def sample_rate_hz(self) -> int:
        """Sample rate of every waveform in Hz."""
        return self.network.sample_rate_hz

    @property
    def samples_per_frame(self) -> int:
        """Number of waveform samples that one code frame covers."""
        return self.network.samples_per_frame


class Autoencoder(nnx.Module):
    """Encoder, quantiser and decoder of one configuration."""

    def __init__(self, config: PictureCodecConfig | SoundCodecConfig, *, rngs: nnx.Rngs):
        if isinstance(config, PictureCodecConfig):
            self.encoder: Any = PictureEncoder(config.network, rngs=rngs)
            self.decoder: Any = PictureDecoder(config.network, rngs=rngs)
        else:
            self.encoder = SoundEncoder(config.network, rngs=rngs)
            self.decoder = SoundDecoder(config.network, rngs=rngs)
        self.quantizer = Quantizer(config.quantizer, config.network.latent_width, rngs=rngs)

    def __call__(
        self, media: Float[Array, "batch ..."], num_used: Int[Array, " batch"] | None = None
    ) -> tuple[Float[Array, "batch ..."], Quantized]:
        """Reconstructed media, and what the quantiser made of their latent vectors.

        Media use their first `num_used` codebooks alone; None: all.
        """
        latents = self.encoder(media)
        if num_used is not None:
            num_used = num_used.reshape(-1, *(1,) * (latents.ndim - 2))
        quantized = self.quantizer.quantize(latents, num_used)
        return self.decoder(quantized.latents), quantized

    def encode(self, media: Float[Array, "batch ..."]) -> Int[Array, "batch ... codebooks"]:
        """Codes of media."""
        return self.quantizer.quantize(self.encoder(media)).codes

    def decode(self, codes: Int[Array, "batch ... codebooks"]) -> Float[Array, "batch ..."]:
        """Media of codes."""
        return self.decoder(self.quantizer.lookup(codes))


def named_arrays(state: nnx.State) -> dict[str, np.ndarray]:
    """Arrays of an autoencoder's state by their path, such as encoder.levels.0.1.norms.0.scale."""
    return {".".join(map(str, path)): np.asarray(leaf) for path, leaf in _flat(nnx.to_pure_dict(state))}


def shapes_of_arrays(config: PictureCodecConfig | SoundCodecConfig) -> dict[str, tuple[int, ...]]:
    """Shapes of all arrays of an autoencoder with this configuration, by name."""
    state = nnx.state(nnx.eval_shape(lambda: Autoencoder(config, rngs=nnx.Rngs(0))))
    return {".".join(map(str, path)): leaf.shape for path, leaf in _flat(nnx.to_pure_dict(state))}


def with_arrays(
    config: PictureCodecConfig | SoundCodecConfig, arrays: Mapping[str, np.ndarray]
) -> tuple[nnx.GraphDef, nnx.State]:
    """Graph and state of an autoencoder with these arrays, by the names that `named_arrays` gives them."""
    graph, state = nnx.split(nnx.eval_shape(lambda: Autoencoder(config, rngs=nnx.Rngs(0))))
    pure = nnx.to_pure_dict(state)
    for path, _ in _flat(pure):
        inner = pure
        for part in path[:-1]:
            inner = inner[part]
        inner[path[-1]] = jax.numpy.asarray(arrays[".".join(map(str, path))])
    nnx.replace_by_pure_dict(state, pure)
    return graph, state


def _flat(tree: Mapping[Any, Any], path: tuple[Any, ...] = ()) -> list[tuple[tuple[Any, ...], Any]]:
    """Path and leaf of every array of nested dictionaries."""
    found = []
    for name, value in tree.items():
        found += _flat(value, (*path, name)) if isinstance(value, Mapping) else [((*path, name), value)]
    return found
