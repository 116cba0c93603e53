"""Sound ↔ codes by residual vector quantisation of log-mel frames, decoded with Griffin–Lim.

With S the magnitude spectrogram, M the mel filters and ε the floor, the features of a spectrum are

    f = log(1 + M S / ε),        inverse:  S ≈ max(0, M⁺ ε (exp f − 1))

so digital silence is exactly the zero vector. A code frame stacks a few consecutive spectra. Each codebook codes the
residual of the ones before it:

    r₀ = f,   codes_i = argmin_k ‖r_i − c_ik‖²,   r_{i+1} = r_i − c_i,codes_i,   f̂ = Σ_i c_i,codes_i

Codeword 0 of every codebook is the zero vector, so silence is coded as code 0 and decoded as silence, and a further
codebook never increases the error of a frame. Griffin–Lim (Griffin & Lim 1984; with momentum, Perraudin et al. 2013)
starts from zero phase, so the decoded waveform depends on the codes alone.
"""

import warnings
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from typing import Annotated, Any, ClassVar

import librosa  # loads its parts on first use
import numpy as np
from jaxtyping import Float, Float32, Int

from trimask.tokenizers.codebook import check_codes, fit_codebook, nearest_codeword
from trimask.tokenizers.codec import ArrayFile, Files, StoredTokenizer
from trimask.tokenizers.storage.ranges import Checked, Positive, Seed, Size, whole

_MAX_SPECTRUM_VALUES = 1 << 24
"""Largest number of complex spectrum values computed at a time: 128 MiB."""


@dataclass(frozen=True, kw_only=True)
class MelConfig(Checked):
    """Configuration of a mel codec and of fitting its codebooks."""

    sample_rate_hz: Size = 8000
    """Sample rate of every waveform in Hz; the codec does not resample."""
    window: Annotated[int, whole(2, 1 << 15)] = 200
    """Length of the Hann window of one spectrum, in samples."""
    hop: Size = 80
    """Distance between consecutive spectra, in samples."""
    num_mels: Size = 40
    """Number of mel bands between 0 Hz and half the sample rate."""
    spectra_per_frame: Size = 5
    """Number of consecutive spectra stacked in one code frame."""
    floor: Positive = 0.01
    """ε in log(1 + mel magnitude / ε); magnitudes well below it count as silence."""
    codebook_size: Annotated[int, whole(2, 1 << 24)] = 256
    """Largest number of codewords per codebook; there are fewer if the clips have fewer distinct frames."""
    num_codebooks: Annotated[int, whole(1, 999)] = 2
    """Number of residual codebooks, and so of codes per frame."""
    griffin_lim_iterations: Annotated[int, whole(1, 10_000)] = 32
    """Number of Griffin–Lim iterations (phase reconstruction) in decoding."""
    max_frames: Size = 30_000
    """Number of code frames, drawn at random, on which k-means is fitted; all of them if there are fewer."""
    seed: Seed = 0
    """Seed of the random frames and of k-means."""

    def __post_init__(self):
        super().__post_init__()
        if self.window < 2 * self.hop or (self.window - self.hop) % 2:
            raise ValueError(f"window must be at least 2·hop and differ from it by an even number, got {self.window}")
        if self.num_mels > self.window // 2 + 1:
            raise ValueError(
                f"num_mels must be at most {self.window // 2 + 1}, the frequencies of a window of {self.window} "
                f"samples, got {self.num_mels}"
            )

    @property
    def samples_per_frame(self) -> int:
        """Number of waveform samples that one code frame covers."""
        return self.hop * self.spectra_per_frame


class MelCodec(StoredTokenizer):
    """A codec for mono sound of any length; a clip that ends within a code frame is padded with silence."""

    kind: ClassVar[str] = "mel"
    config_type = MelConfig
    modality: ClassVar[str] = "audio"

    def __init__(self, config: MelConfig, codebooks: tuple[Float32[np.ndarray, "_ dim"], ...]):
        self.config = config
        self.codebooks = tuple(codebook.copy() for codebook in codebooks)
        for codebook in self.codebooks:
            codebook.flags.writeable = False

    @classmethod
    def fit(cls, waveforms: Float32[np.ndarray, "batch samples"], config: MelConfig) -> "MelCodec":
        """Fits the codebooks one after another, each by k-means on the residual of the ones before.

        Raises ValueError if there are no clips, or mel bands that contain no frequency of the window.
        """
        if not len(waveforms):
            raise ValueError("no clips to fit codebooks on")
        empty = int((cls(config, ())._filters <= 0).all(axis=1).sum())
        if empty:
            raise ValueError(
                f"{empty} of num_mels {config.num_mels} bands hold no frequency of a window of {config.window} samples "
                f"at {config.sample_rate_hz} Hz; give fewer bands or a longer window"
            )
        features = cls(config, ())._features(waveforms)
        residual = features.reshape(1, -1, features.shape[-1])
        codebooks = []
        for _ in range(config.num_codebooks):
            codebooks.append(_fit_with_silence(residual[0], config))
            residual = residual - codebooks[-1][nearest_codeword(residual, codebooks[-1])]
        return cls(config, tuple(codebooks))

    @property
    def sample_rate_hz(self) -> int:
        """Sample rate of the waveforms in Hz."""
        return self.config.sample_rate_hz

    @property
    def codebook_sizes(self) -> tuple[int, ...]:
        """Number of codewords of each residual codebook, coarsest first."""
        return tuple(len(codebook) for codebook in self.codebooks)

    def encode(self, media: Float32[np.ndarray, "batch samples"]) -> Int[np.ndarray, "batch frames codebooks"]:
        """Codes of mono waveforms in [-1, 1]. Raises ValueError for NaN and infinite samples."""
        residual = self._features(media)
        codes = np.empty((*residual.shape[:2], len(self.codebooks)), np.int32)
        for stage, codebook in enumerate(self.codebooks):
            codes[..., stage] = nearest_codeword(residual, codebook)
            residual = residual - codebook[codes[..., stage]]
        return codes

    def decode(self, codes: Int[np.ndarray, "batch frames codebooks"]) -> Float32[np.ndarray, "batch samples"]:
        """Waveforms of these codes. Raises ValueError for another number of codebooks, or codes outside them."""
        batch, frames, num_codebooks = codes.shape
        if num_codebooks != len(self.codebooks):
            raise ValueError(f"codes must be of {len(self.codebooks)} codebooks, got {num_codebooks}")
        features = np.zeros((batch, frames, self.codebooks[0].shape[1]), np.float32)
        for stage, codebook in enumerate(self.codebooks):
            check_codes(codes[..., stage], len(codebook))
            features += codebook[codes[..., stage]]
        return self._waveforms(features)

    def code_shape(self, media_shape: tuple[int, ...]) -> tuple[int, ...]:
        """(samples,) → (frames, codebooks)."""
        (samples,) = media_shape
        if samples < 1:
            raise ValueError("waveform must have at least one sample")
        return -(-samples // self.config.samples_per_frame), self.config.num_codebooks

    def media_shape(self, code_shape: tuple[int, ...]) -> tuple[int, ...]:
        """(frames, codebooks) → (samples,)."""
        return (code_shape[0] * self.config.samples_per_frame,)

    @classmethod
    def _files(cls, config: MelConfig) -> Files:
        codebook = ArrayFile("float32", (None, config.num_mels * config.spectra_per_frame))
        return {f"codebook_{stage:03}.npy": codebook for stage in range(config.num_codebooks)}

    @classmethod
    def _from_files(cls, config: MelConfig, content: dict[str, Any]) -> "MelCodec":
        return cls(config, tuple(content[name] for name in sorted(content)))

    @property
    def _content(self) -> dict[str, np.ndarray]:
        return {f"codebook_{stage:03}.npy": codebook for stage, codebook in enumerate(self.codebooks)}

    def _features(self, waveforms: Float32[np.ndarray, "batch samples"]) -> Float32[np.ndarray, "batch frames dim"]:
        config = self.config
        batch, samples = waveforms.shape
        frames, _ = self.code_shape((samples,))
        if not np.isfinite(waveforms).all():
            raise ValueError("waveform must be finite, got NaN or infinity")
        # Spectrum i is centred on its hop, so a code frame sees equally far to both sides.
        side = (config.window - config.hop) // 2
        padding = frames * config.samples_per_frame - samples
        padded = np.pad(waveforms, ((0, 0), (side, side + padding)))
        # A few clips at a time, or a few frames of a long clip, so that spectra take little memory.
        values_per_frame = config.spectra_per_frame * len(self._filters[0])
        clips_at_once = max(1, _MAX_SPECTRUM_VALUES // (frames * values_per_frame))
        frames_at_once = max(1, min(frames, _MAX_SPECTRUM_VALUES // values_per_frame))
        features = np.empty((batch, frames, config.spectra_per_frame * config.num_mels), np.float32)
        for clip, frame in product(range(0, batch, clips_at_once), range(0, frames, frames_at_once)):
            part = slice(clip, clip + clips_at_once), slice(frame, frame + frames_at_once)
            stop = min(frame + frames_at_once, frames) * config.samples_per_frame - config.hop + config.window
            samples_of_part = padded[part[0], frame * config.samples_per_frame : stop]
            spectra = librosa.stft(samples_of_part, n_fft=config.window, hop_length=config.hop, center=False)
            logs = np.log1p(np.matmul(self._filters, np.abs(spectra)) / config.floor).swapaxes(1, 2)
            features[part] = logs.reshape(len(samples_of_part), -1, features.shape[-1])
        return features

    def _waveforms(self, features: Float32[np.ndarray, "batch frames dim"]) -> Float32[np.ndarray, "batch samples"]:
        config = self.config
        batch, frames, _ = features.shape
        mels = np.expm1(features).reshape(batch, -1, config.num_mels).swapaxes(1, 2) * config.floor
        waveforms = librosa.griffinlim(
            np.maximum(np.matmul(self._inverse_filters, mels), 0).astype(np.float32),
            n_iter=config.griffin_lim_iterations,
            hop_length=config.hop,
            n_fft=config.window,
            center=False,
            init=None,
        )
        side = (config.window - config.hop) // 2
        return np.clip(waveforms[:, side : side + frames * config.samples_per_frame], -1, 1)

    @cached_property
    def _filters(self) -> Float32[np.ndarray, "mels frequencies"]:
        config = self.config
        with warnings.catch_warnings(action="ignore"):  # warns of empty filters, which `fit` refuses
            return librosa.filters.mel(sr=config.sample_rate_hz, n_fft=config.window, n_mels=config.num_mels, norm=None)

    @cached_property
    def _inverse_filters(self) -> Float[np.ndarray, "frequencies mels"]:
        # Bands narrower than a frequency bin may be nearly equal; rcond keeps the inverse from amplifying errors.
        return np.linalg.pinv(self._filters, rcond=0.01)


def _fit_with_silence(
    vectors: Float32[np.ndarray, "count dim"], config: MelConfig
) -> Float32[np.ndarray, "codewords dim"]:
    """Fits a codebook whose first codeword is the zero vector."""
    sounding = vectors[vectors.any(axis=1)]
    codewords = fit_codebook(sounding, config.codebook_size - 1, config.seed, config.max_frames)
    return np.concatenate([np.zeros((1, vectors.shape[1])), codewords]).astype(np.float32)
