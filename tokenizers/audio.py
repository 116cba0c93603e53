"""Sound ↔ codes by residual vector quantisation of log-mel frames; decoded with Griffin–Lim.

With S the magnitude spectrogram, M the mel filters and ε the floor, the features of a moment are

    f = log(1 + M S / ε),        back:  S ≈ max(0, M⁺ ε (exp f − 1))

so digital silence is exactly the zero vector. A code frame stacks a few consecutive moments. Each codebook
codes what the ones before it left over:

    r₀ = f,   codes_i = argmin_k ‖r_i − c_ik‖²,   r_{i+1} = r_i − c_i,codes_i,   f̂ = Σ_i c_i,codes_i

Codeword 0 of every codebook is the zero vector: silence costs one code and is silence again, and a further
codebook never makes a frame worse. Griffin–Lim (Griffin & Lim 1984; with momentum, Perraudin et al. 2013)
starts from zero phase, so that a clip's waveform depends on nothing but its codes.
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

_MOST_NUMBERS = 1 << 24
"""Of spectra that are held at a time: 128 MiB."""


@dataclass(frozen=True, kw_only=True)
class MelConfig(Checked):
    """What a code of sound covers, and how codebooks are fitted."""

    sample_rate_hz: Size = 8000
    """Of every waveform this codec sees; nothing is resampled."""
    window: Annotated[int, whole(2, 1 << 15)] = 200
    """Samples under the Hann window of one spectrum."""
    hop: Size = 80
    """Samples from one spectrum to the next."""
    num_mels: Size = 40
    """Mel bands from 0 Hz to half the sample rate."""
    spectra_per_frame: Size = 5
    """Consecutive spectra that one code frame stacks."""
    floor: Positive = 0.01
    """ε: mel magnitudes well below it are taken for silence."""
    codebook_size: Annotated[int, whole(2, 1 << 24)] = 256
    """Codewords per codebook, at most; fewer where the clips have fewer distinct frames."""
    num_codebooks: Annotated[int, whole(1, 999)] = 2
    """Codes per frame."""
    griffin_lim_iterations: Annotated[int, whole(1, 10_000)] = 32
    """Rounds of phase reconstruction in decoding."""
    max_frames: Size = 30_000
    """Code frames that k-means sees, drawn at random from all."""
    seed: Seed = 0
    """Of the draw and of k-means."""

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
        return self.hop * self.spectra_per_frame


class MelCodec(StoredTokenizer):
    """Mono sound of any length; a clip that ends within a code frame is padded with silence."""

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
        """Fits the codebooks one after another, each by k-means on what the ones before leave over."""
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
        return self.config.sample_rate_hz

    @property
    def codebook_sizes(self) -> tuple[int, ...]:
        return tuple(len(codebook) for codebook in self.codebooks)

    def encode(self, media: Float32[np.ndarray, "batch samples"]) -> Int[np.ndarray, "batch frames codebooks"]:
        residual = self._features(media)
        codes = np.empty((*residual.shape[:2], len(self.codebooks)), np.int32)
        for stage, codebook in enumerate(self.codebooks):
            codes[..., stage] = nearest_codeword(residual, codebook)
            residual = residual - codebook[codes[..., stage]]
        return codes

    def decode(self, codes: Int[np.ndarray, "batch frames codebooks"]) -> Float32[np.ndarray, "batch samples"]:
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
    def _of(cls, config: MelConfig, content: dict[str, Any]) -> "MelCodec":
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
        # Spectrum i is centred on its hop: a code frame sees as much to its left as to its right.
        side = (config.window - config.hop) // 2
        silence_to_the_end = frames * config.samples_per_frame - samples
        padded = np.pad(waveforms, ((0, 0), (side, side + silence_to_the_end)))
        # Some clips at a time, or of a long one some frames, so that spectra take little memory.
        each = config.spectra_per_frame * len(self._filters[0])
        clips, some = max(1, _MOST_NUMBERS // (frames * each)), max(1, min(frames, _MOST_NUMBERS // each))
        features = np.empty((batch, frames, config.spectra_per_frame * config.num_mels), np.float32)
        for clip, frame in product(range(0, batch, clips), range(0, frames, some)):
            here = slice(clip, clip + clips), slice(frame, frame + some)
            stop = min(frame + some, frames) * config.samples_per_frame - config.hop + config.window
            heard = padded[here[0], frame * config.samples_per_frame : stop]
            spectra = librosa.stft(heard, n_fft=config.window, hop_length=config.hop, center=False)
            logs = np.log1p(np.matmul(self._filters, np.abs(spectra)) / config.floor).swapaxes(1, 2)
            features[here] = logs.reshape(len(heard), -1, features.shape[-1])
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
        with warnings.catch_warnings(action="ignore"):  # of empty filters, which fitting refuses
            return librosa.filters.mel(sr=config.sample_rate_hz, n_fft=config.window, n_mels=config.num_mels, norm=None)

    @cached_property
    def _inverse_filters(self) -> Float[np.ndarray, "frequencies mels"]:
        # Bands narrower than the step of frequencies may be the same; to tell them apart would multiply codes' errors.
        return np.linalg.pinv(self._filters, rcond=0.01)


def _fit_with_silence(
    vectors: Float32[np.ndarray, "count dim"], config: MelConfig
) -> Float32[np.ndarray, "codewords dim"]:
    """A codebook of these vectors whose first codeword is the zero vector."""
    sounding = vectors[vectors.any(axis=1)]
    codewords = fit_codebook(sounding, config.codebook_size - 1, config.seed, config.max_frames)
    return np.concatenate([np.zeros((1, vectors.shape[1])), codewords]).astype(np.float32)
