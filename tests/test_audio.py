"""The mel codec: log-mel frames, residual vector quantisation, Griffin–Lim."""

import dataclasses

import librosa
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trimask.tokenizers import audio
from trimask.tokenizers.audio import MelCodec, MelConfig
from trimask.tokenizers.quality import log_mel_distance_db

RATE = 8000


def _tones(num_clips: int, samples: int, seed: int = 0) -> np.ndarray:
    """Harmonic tones of random pitch, loudness and length that fade in and out, followed by silence, similar to
    words.
    """
    generator = np.random.default_rng(seed)
    time = np.arange(samples) / RATE
    clips = []
    for _ in range(num_clips):
        pitch, loudness, length = generator.uniform([90, 0.1, 0.2], [300, 0.9, 0.8])
        harmonics = sum(np.sin(2 * np.pi * pitch * n * time) / n for n in range(1, 8))
        phase = np.clip(time / (length * samples / RATE), 0, 1)
        clips.append(loudness / 3 * np.sin(np.pi * phase) * harmonics)
    return np.array(clips, np.float32)


CONFIG = MelConfig(codebook_size=32, num_codebooks=3)


@pytest.fixture(scope="module")
def fitted() -> MelCodec:
    return MelCodec.fit(_tones(60, 4800), CONFIG)


def _features(codec: MelCodec, waveform: np.ndarray) -> np.ndarray:
    """Oracle: the module's equation for one clip, spectrum by spectrum."""
    config = codec.config
    side = (config.window - config.hop) // 2
    padded = np.pad(waveform.astype(np.float64), (side, side + config.samples_per_frame))
    hann = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(config.window) / config.window)
    filters = librosa.filters.mel(sr=config.sample_rate_hz, n_fft=config.window, n_mels=config.num_mels, norm=None)
    num_spectra = -(-len(waveform) // config.samples_per_frame) * config.spectra_per_frame
    moments = []
    for start in range(0, num_spectra * config.hop, config.hop):
        spectrum = np.abs(np.fft.rfft(hann * padded[start : start + config.window]))
        moments.append(np.log(1 + filters @ spectrum / config.floor))
    return np.array(moments).reshape(-1, config.spectra_per_frame * config.num_mels)


@pytest.mark.parametrize("samples", [4800, 1650, 7])
def test_each_code_is_nearest_to_what_the_codebooks_before_left_over(fitted, samples):
    waveforms = _tones(2, samples, seed=1)
    codes = fitted.encode(waveforms)
    assert codes.shape == (2, -(-samples // 400), 3)
    for clip, waveform in enumerate(waveforms):
        for frame, residual in enumerate(_features(fitted, waveform)):
            for stage, codebook in enumerate(fitted.codebooks):
                distances = np.sum((residual - codebook) ** 2, axis=1)
                # Features are float32 inside: a codeword as near to within rounding is as good.
                assert distances[codes[clip, frame, stage]] <= distances.min() * (1 + 1e-4) + 1e-4
                residual = residual - codebook[codes[clip, frame, stage]]


def test_a_codec_has_the_sample_rate_that_it_was_fitted_with(fitted):
    """A tone of 1,000 Hz falls into the mel band that contains it at that sample rate."""
    slow = MelCodec(dataclasses.replace(CONFIG, sample_rate_hz=4000), fitted.codebooks)
    assert (fitted.sample_rate_hz, slow.sample_rate_hz) == (RATE, 4000)
    tone = np.sin(2 * np.pi * 1000 * np.arange(4800) / RATE).astype(np.float32)[None]
    assert not np.array_equal(fitted.encode(tone), slow.encode(tone))


def test_filters_that_do_not_tell_all_bands_apart_make_no_noise():
    """Some of 64 bands on 101 frequencies are equal; an inverse that distinguished them would amplify errors."""
    waveforms = _tones(20, 4800)
    codec = MelCodec.fit(waveforms, MelConfig(codebook_size=8, num_codebooks=1, num_mels=64))
    back = codec.decode(codec.encode(waveforms))
    assert 0.5 < back.std() / waveforms.std() < 2
    assert log_mel_distance_db(waveforms, back, RATE).mean() < 10


def test_equally_near_codewords_resolve_to_the_lowest_index(fitted):
    codebooks = tuple(np.repeat(codebook[:4], 2, axis=0) for codebook in fitted.codebooks)
    codes = MelCodec(CONFIG, codebooks).encode(_tones(3, 4000))
    assert np.all(codes % 2 == 0)
    assert codes.max() > 0


def test_a_further_codebook_never_makes_a_frame_worse(fitted):
    waveforms = _tones(4, 4800, seed=2)
    codes = fitted.encode(waveforms)
    features = np.stack([_features(fitted, waveform) for waveform in waveforms])
    errors = [np.sum(features**2, axis=-1)]
    for stage, codebook in enumerate(fitted.codebooks):
        features = features - codebook[codes[..., stage]]
        errors.append(np.sum(features**2, axis=-1))
        assert np.all(errors[-1] <= errors[-2] + 1e-2)  # float32 rounding of squared sums of thousands
    assert errors[0].mean() > 5 * errors[1].mean() > 6 * errors[3].mean()


@pytest.mark.parametrize("samples", [400, 1999, 4800])
def test_silence_costs_one_code_and_is_silence_again(fitted, samples):
    codes = fitted.encode(np.zeros((2, samples), np.float32))
    assert not codes.any()
    np.testing.assert_array_equal(fitted.decode(codes), 0)


def test_silence_after_a_sound_stays_silent(fitted):
    waveform = np.pad(_tones(1, 2000), ((0, 0), (0, 4000)))
    decoded = fitted.decode(fitted.encode(waveform))
    assert np.abs(decoded[:, :2000]).max() > 0.05
    assert np.abs(decoded[:, 2800:]).max() < 1e-3


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 30), st.integers(1, 9000))
def test_lengths_are_whole_frames_and_long_enough(fitted, frames, samples):
    assert fitted.media_shape((frames, 3)) == (frames * 400,)
    num_frames, _ = fitted.code_shape((samples,))
    assert num_frames * 400 >= samples > (num_frames - 1) * 400


def test_a_clip_of_whole_frames_ends_with_the_decoded_one(fitted):
    assert fitted.encode(_tones(1, 800)).shape == (1, 2, 3)
    assert fitted.decode(np.ones((1, 2, 3), np.int32)).shape == (1, 800)


def test_trailing_silence_changes_no_earlier_code(fitted):
    waveform = _tones(1, 2800)
    longer = np.pad(waveform, ((0, 0), (0, 1600)))
    codes, longer_codes = fitted.encode(waveform), fitted.encode(longer)
    np.testing.assert_array_equal(longer_codes[:, :7], codes)


def test_decoding_is_the_same_every_time_whatever_the_random_state(fitted):
    codes = fitted.encode(_tones(2, 2400))
    np.random.seed(1)  # noqa: NPY002 - the global state is what must not matter
    first = fitted.decode(codes)
    np.random.seed(2)  # noqa: NPY002
    np.testing.assert_array_equal(fitted.decode(codes), first)


def test_decoded_tones_sound_like_the_originals(fitted):
    originals = _tones(6, 4800, seed=3)
    decoded = fitted.decode(fitted.encode(originals))
    distances = log_mel_distance_db(originals, decoded, RATE)
    to_another = log_mel_distance_db(originals, np.roll(decoded, 1, axis=0), RATE)
    assert np.all(distances < 0.6 * to_another)
    loudness = np.sqrt(np.mean(decoded**2, axis=1) / np.mean(originals**2, axis=1))
    assert np.all((loudness > 0.7) & (loudness < 1.4))


def test_decoded_sound_never_exceeds_full_scale(fitted):
    loudest = np.argmax(fitted.codebooks[0].sum(axis=1))
    codes = np.zeros((1, 6, 3), np.int32)
    codes[..., 0] = loudest
    louder = tuple(codebook * 1.5 for codebook in fitted.codebooks)
    assert np.abs(MelCodec(CONFIG, louder).decode(codes)).max() == 1


def test_clips_of_few_frames_have_short_codebooks():
    waveforms = np.concatenate([np.zeros((5, 400), np.float32), _tones(2, 400)])
    codec = MelCodec.fit(waveforms, MelConfig())
    # Silence and two tones; each is its own codeword, so nothing is left over but silence.
    assert codec.codebook_sizes == (3, 1)
    assert not codec.encode(waveforms)[..., 1].any()


def test_codebooks_have_the_size_asked_for_silence_included(fitted):
    assert fitted.codebook_sizes == (32, 32, 32)


def test_fitting_on_no_clips_is_refused():
    with pytest.raises(ValueError, match="no clips"):
        MelCodec.fit(np.zeros((0, 800), np.float32), CONFIG)


def test_fitting_on_nothing_but_silence_gives_the_codeword_of_silence():
    assert MelCodec.fit(np.zeros((2, 800), np.float32), MelConfig()).codebook_sizes == (1, 1)


def test_another_number_of_codebooks_is_refused(fitted):
    with pytest.raises(ValueError, match="codes must be of 3 codebooks, got 2"):
        fitted.decode(np.zeros((1, 4, 2), np.int32))


def test_a_clip_without_samples_is_refused(fitted):
    with pytest.raises(ValueError, match="at least one sample"):
        fitted.encode(np.zeros((1, 0), np.float32))


def test_a_sample_that_is_no_number_is_refused(fitted):
    with pytest.raises(ValueError, match="finite"):
        fitted.encode(np.full((1, 400), np.nan, np.float32))


@pytest.mark.parametrize(
    ("settings_", "message"),
    [
        ({"hop": 0}, "hop must be at least 1, got 0"),
        ({"num_codebooks": 0}, "num_codebooks must be at least 1, got 0"),
        ({"codebook_size": 1}, "codebook_size must be at least 2"),
        ({"window": 255}, "window must be .* even number, got 255"),
        ({"window": 100}, "window must be at least 2·hop"),
        ({"num_mels": 102}, "num_mels must be at most 101, the frequencies of a window of 200 samples, got 102"),
        ({"floor": 0.0}, "floor must be positive, got 0.0"),
        ({"griffin_lim_iterations": 0}, "griffin_lim_iterations must be at least 1, got 0"),
    ],
)
def test_nonsensical_settings_are_refused(settings_, message):
    with pytest.raises(ValueError, match=message):
        MelConfig(**settings_)


@pytest.mark.parametrize("most", [1, 101 * 5 * 3, 101 * 5 * 13])
def test_codes_do_not_depend_on_how_much_is_heard_at_a_time(monkeypatch, most):
    waveforms = np.random.default_rng(0).uniform(-0.5, 0.5, (5, 2100)).astype(np.float32)
    codec = MelCodec.fit(waveforms, MelConfig(codebook_size=9))
    codes = codec.encode(waveforms)
    monkeypatch.setattr(audio, "_MAX_SPECTRUM_VALUES", most)
    np.testing.assert_array_equal(codec.encode(waveforms), codes)


def test_bands_that_hear_nothing_are_refused():
    waveforms = np.random.default_rng(0).uniform(-0.5, 0.5, (2, 2000)).astype(np.float32)
    with pytest.raises(
        ValueError, match=r"\d+ of num_mels 100 bands hold no frequency of a window of 200 samples at 44100"
    ):
        MelCodec.fit(waveforms, MelConfig(num_mels=100, sample_rate_hz=44_100))
