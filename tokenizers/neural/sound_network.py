"""Encoder and decoder of sounds, which work at the rate of spectra and are cheap for it.

    waveform → log-mel → ConvNeXt … → fold in time → latents
    latents → unfold in time → ConvNeXt … → magnitudes and phases → waveform

The decoder ends in an inverse short-time Fourier transform (Vocos, arXiv 2306.00814): it predicts the logarithm of the
magnitude and the phase of every frequency. A ConvNeXt block is x + γ · W₂ gelu(W₁ norm(depthwise convolution of x))
(arXiv 2201.03545, in one dimension).
"""

from dataclasses import dataclass
from typing import Annotated

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from trimask.tokenizers.neural.spectra import log_mels, waveforms
from trimask.tokenizers.storage.ranges import Checked, Positive, Size, whole

_KERNEL = 7
"""Number of spectra that a depthwise convolution sees."""
_LARGEST_LOG_MAGNITUDE = 7.0
"""Largest logarithm of a magnitude that the decoder gives, so that no exponential overflows."""


@dataclass(frozen=True, kw_only=True)
class SoundNetworkConfig(Checked):
    """Shape of the network, and the spectra that it works on."""

    sample_rate_hz: Size = 8000
    """Sample rate of every waveform in Hz."""
    window: Annotated[int, whole(2, 1 << 15)] = 320
    """Length of the Hann window of one spectrum, in samples."""
    hop: Size = 80
    """Distance between consecutive spectra, in samples."""
    spectra_per_frame: Size = 5
    """Number of consecutive spectra that one latent vector stands for."""
    num_mels: Size = 64
    """Number of mel bands that the encoder sees."""
    floor: Positive = 1e-3
    """Smallest mel magnitude; smaller ones count as silence."""
    width: Size = 128
    """Number of channels."""
    blocks: Size = 5
    """Number of ConvNeXt blocks of the encoder, and of the decoder."""

    def __post_init__(self):
        super().__post_init__()
        if self.window < 2 * self.hop or (self.window - self.hop) % 2:
            raise ValueError(f"window must be at least 2·hop and differ from it by an even number, got {self.window}")

    @property
    def samples_per_frame(self) -> int:
        """Number of samples of a waveform that one latent vector stands for."""
        return self.hop * self.spectra_per_frame

    @property
    def latent_width(self) -> int:
        """Number of numbers of a latent vector."""
        return self.width


class SoundEncoder(nnx.Module):
    """Waveforms → latent vectors."""

    def __init__(self, config: SoundNetworkConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.first = nnx.Linear(config.num_mels, config.width, rngs=rngs)
        self.blocks = nnx.List([_ConvNeXt(config.width, rngs) for _ in range(config.blocks)])
        self.down = nnx.Linear(config.width * config.spectra_per_frame, config.width, rngs=rngs)
        self.norm = nnx.RMSNorm(config.width, rngs=rngs)

    def __call__(self, waveforms: Float[Array, "batch samples"]) -> Float[Array, "batch frames dim"]:
        c = self.config
        mels = log_mels(waveforms, c.sample_rate_hz, c.window, c.hop, c.num_mels, c.floor)
        x = self.first(mels / -np.log(c.floor))
        for block in self.blocks:
            x = block(x)
        folded = x.reshape(len(x), -1, c.spectra_per_frame * c.width)
        return self.norm(self.down(folded))


class SoundDecoder(nnx.Module):
    """Latent vectors → waveforms."""

    def __init__(self, config: SoundNetworkConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.up = nnx.Linear(config.width, config.width * config.spectra_per_frame, rngs=rngs)
        self.blocks = nnx.List([_ConvNeXt(config.width, rngs) for _ in range(config.blocks)])
        self.norm = nnx.RMSNorm(config.width, rngs=rngs)
        self.last = nnx.Linear(config.width, 2 * (config.window // 2 + 1), rngs=rngs)

    def __call__(self, latents: Float[Array, "batch frames dim"]) -> Float[Array, "batch samples"]:
        c = self.config
        x = self.up(latents).reshape(len(latents), -1, c.width)
        for block in self.blocks:
            x = block(x)
        log_magnitudes, phases = jnp.split(self.last(self.norm(x)).astype(jnp.float32), 2, axis=-1)
        magnitudes = jnp.exp(jnp.minimum(log_magnitudes, _LARGEST_LOG_MAGNITUDE))
        spectra = jax.lax.complex(magnitudes * jnp.cos(phases), magnitudes * jnp.sin(phases))
        return waveforms(spectra, c.window, c.hop)


class _ConvNeXt(nnx.Module):
    """x + γ · W₂ gelu(W₁ norm(depthwise convolution of x))."""

    def __init__(self, width: int, rngs: nnx.Rngs):
        normal = jax.random.normal(rngs.params(), (_KERNEL, width))
        self.kernel = nnx.Param(normal / _KERNEL**0.5)
        self.norm = nnx.RMSNorm(width, rngs=rngs)
        self.up = nnx.Linear(width, 3 * width, rngs=rngs)
        self.down = nnx.Linear(3 * width, width, rngs=rngs)
        self.scale = nnx.Param(jnp.full(width, 0.1))

    def __call__(self, x: Float[Array, "batch spectra dim"]) -> Float[Array, "batch spectra dim"]:
        # A sum of shifted products: XLA's depthwise convolution is slow on CPUs.
        half, kernel = _KERNEL // 2, self.kernel[...].astype(x.dtype)
        padded = jnp.pad(x, ((0, 0), (half, half), (0, 0)))
        y = sum(padded[:, k : k + x.shape[1]] * kernel[k] for k in range(_KERNEL))
        return x + self.scale[...].astype(x.dtype) * self.down(jax.nn.gelu(self.up(self.norm(y))))
