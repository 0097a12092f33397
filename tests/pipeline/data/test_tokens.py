"""Tokens and positions against arrays written out by hand, spectrograms against librosa and the Kaldi definition."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.data.spec import AUDIO_PRESETS, AudioSpec, TokenSpec
from pipeline.data.tokens import choose_tokens, grid_positions, kept_tokens, log_mel, patchify, spectrogram_tokens

VISION = TokenSpec().vision_positions
AUDIO = TokenSpec().audio_positions


def test_patches_come_in_time_row_column_order():
    # 2 frames of 2 x 4 pixels, pixel value = 100 frame + 10 row + column, colour c adds 0.c as an integer: 10 x + c.
    t, y, x, c = np.meshgrid(range(2), range(2), range(4), range(3), indexing="ij")
    frames = 1000 * t + 100 * y + 10 * x + c
    patches = patchify(frames, (1, 1, 2))
    expected = [
        [0, 1, 2, 10, 11, 12],
        [20, 21, 22, 30, 31, 32],
        [100, 101, 102, 110, 111, 112],
        [120, 121, 122, 130, 131, 132],
        [1000, 1001, 1002, 1010, 1011, 1012],
        [1020, 1021, 1022, 1030, 1031, 1032],
        [1100, 1101, 1102, 1110, 1111, 1112],
        [1120, 1121, 1122, 1130, 1131, 1132],
    ]
    assert patches.tolist() == expected


def test_values_of_a_tubelet_come_in_time_row_column_colour_order():
    frames = np.arange(2 * 2 * 4 * 3).reshape(2, 2, 4, 3)
    left, right = patchify(frames, (2, 2, 2))
    assert left.tolist() == [0, 1, 2, 3, 4, 5, 12, 13, 14, 15, 16, 17, 24, 25, 26, 27, 28, 29, 36, 37, 38, 39, 40, 41]
    assert (right - left == 6).all()


def test_sizes_of_the_paper():
    video = np.zeros((16, 256, 256, 3), np.uint8)
    assert patchify(video, (4, 16, 16)).shape == (1024, 3072) and patchify(video, (4, 16, 16)).dtype == np.uint8
    assert patchify(video[:1], (1, 16, 16)).shape == (256, 768)


@pytest.mark.parametrize("shape", [(3, 16, 16, 3), (4, 17, 16, 3), (4, 16, 15, 3)])
def test_what_cannot_be_cut_is_refused(shape):
    with pytest.raises(ValueError, match=f"{shape[0]}x{shape[1]}x{shape[2]} cannot be cut into patches of 4x16x16"):
        patchify(np.zeros(shape), (4, 16, 16))


def axis_ids(grid: tuple[int, ...], buckets: tuple[int, ...], axis: int) -> list[int]:
    return sorted(set(grid_positions(grid, buckets)[:, axis].tolist()))


def test_positions_are_spread_over_the_tables():
    assert axis_ids((4, 16, 8), VISION, 0) == [0, 4, 8, 12]
    assert axis_ids((4, 16, 8), VISION, 1) == list(range(0, 32, 2))
    assert axis_ids((4, 16, 8), VISION, 2) == [0, 4, 8, 12, 16, 20, 24, 28]
    assert axis_ids((4, 32, 32), VISION, 1) == list(range(32))
    assert axis_ids((1, 16, 16), VISION, 0) == [0]
    # 14 columns at 224 pixels, where floating point would round: floor(32 i / 14).
    assert axis_ids((1, 14, 14), VISION, 2) == [0, 2, 4, 6, 9, 11, 13, 16, 18, 20, 22, 25, 27, 29]
    assert axis_ids((8, 8), AUDIO, 0) == list(range(0, 64, 8)) and axis_ids((8, 8), AUDIO, 1) == list(range(8))


def test_positions_come_in_the_order_of_patches():
    positions = grid_positions((2, 1, 3), (16, 32, 32))
    assert positions.dtype == np.int32
    assert positions.tolist() == [[0, 0, 0], [0, 0, 10], [0, 0, 21], [8, 0, 0], [8, 0, 10], [8, 0, 21]]


def test_a_grid_larger_than_its_tables_is_refused():
    with pytest.raises(ValueError, match="33 tokens, 32 positions"):
        grid_positions((4, 33, 32), VISION)


@given(data=st.data(), buckets=st.integers(1, 64))
@settings(max_examples=50, deadline=None)
def test_positions_are_distinct_and_inside_the_table(data, buckets):
    count = data.draw(st.integers(1, buckets))
    ids = grid_positions((count,), (buckets,))[:, 0]
    assert ids[0] == 0 and ids[-1] < buckets and (np.diff(ids) > 0).all()


def test_drop_keeps_the_floor_of_the_rate():
    assert [kept_tokens(256, rate) for rate in (0, 0.25, 0.5, 0.75)] == [256, 192, 128, 64]
    # 0.25 x 25 = 6.25; (1 - 0.9) x 10 is 0.9999999999999998 in floating point and means 1.
    assert kept_tokens(25, 0.75) == 6 and kept_tokens(10, 0.9) == 1 and kept_tokens(3, 0.7) == 0


@given(num=st.integers(1, 100), rate=st.sampled_from([0.25, 0.5, 0.75, 0.9]), seed=st.integers(0, 1000))
@settings(max_examples=50, deadline=None)
def test_drop_keeps_so_many_tokens_in_order(num, rate, seed):
    kept = choose_tokens(num, drop_rate=rate, rng=np.random.default_rng(seed))
    assert len(kept) == kept_tokens(num, rate) and (np.diff(kept) > 0).all()
    assert not len(kept) or (kept[0] >= 0 and kept[-1] < num)


def test_drop_is_uniform():
    rng, counts = np.random.default_rng(0), np.zeros(16)
    for _ in range(2000):
        counts[choose_tokens(16, drop_rate=0.75, rng=rng)] += 1
    # Each token stays in a quarter of 2000 draws: 500, standard deviation 19.4.
    assert np.abs(counts - 500).max() < 5 * 19.4


def test_kept_patches_are_those_of_all_patches():
    frames = np.random.default_rng(0).integers(0, 256, (8, 32, 48, 3), np.uint8)
    everything, keep = patchify(frames, (4, 16, 16)), np.array([0, 3, 4, 11])
    assert (patchify(frames, (4, 16, 16), keep=keep) == everything[keep]).all()
    place = np.zeros((4, 3072), np.uint8)
    assert patchify(frames, (4, 16, 16), keep=keep, out=place) is place and (place == everything[keep]).all()
    # One patch of one frame is the frame as it lies in memory, and still a copy.
    assert not np.shares_memory(patchify(frames[:4, :16, :16], (4, 16, 16)), frames)


def tone_and_noise(num_samples: int, *, offset: float = 0.0) -> np.ndarray:
    """(num_samples,) float32 at 16 kHz."""
    seconds = np.arange(num_samples) / 16_000
    noise = 0.1 * np.random.default_rng(0).standard_normal(num_samples)
    return (np.sin(2 * np.pi * 440 * seconds) + noise + offset).astype(np.float32)


# Kaldi's frame without what it does to the samples before the window, which librosa does not do.
BARE_FRAME = {"remove_dc": False, "preemphasis": 0.0, "pad_value": None, "num_frames": 96}


@pytest.mark.parametrize(
    "spec",
    [AudioSpec(), AudioSpec(frame_length=400, hop_length=160, num_frames=96, num_mels=64, min_hz=20, max_hz=8000)],
)
def test_log_mel_equals_librosa(spec):
    """The documented transform: magnitudes (power 1), Hann, no centring, under librosa's own Slaney filters; librosa
    compiles for a while."""
    import librosa

    spec = dataclasses.replace(spec, mel_scale="slaney")
    waveform = tone_and_noise(spec.num_samples)
    padded = np.pad(waveform, (0, spec.frame_length))
    expected = librosa.feature.melspectrogram(
        y=padded,
        sr=spec.sample_rate_hz,
        n_fft=spec.frame_length,
        hop_length=spec.hop_length,
        center=False,
        power=1.0,
        n_mels=spec.num_mels,
        fmin=spec.min_hz,
        fmax=spec.max_hz,
    )
    expected = np.log(expected.T[: spec.num_frames] + 1e-6)
    found = log_mel(waveform, spec)
    assert found.dtype == np.float32 and found.shape == (spec.num_frames, spec.num_mels)
    np.testing.assert_allclose(found, expected, atol=1e-4)


def in_librosas_place(waveform: np.ndarray, spec: AudioSpec) -> np.ndarray:
    """librosa puts a window shorter than the transform in its middle, Kaldi at its start."""
    lead = (spec.fft_length - spec.frame_length) // 2
    return np.pad(waveform, (lead, spec.fft_length))


def test_settings_between_the_presets_equal_librosa():
    """A window shorter than the transform, symmetric, squared, with a floor, under librosa's own filters."""
    import librosa

    spec = dataclasses.replace(AUDIO_PRESETS["audiomae"], mel_scale="slaney", num_mels=64, **BARE_FRAME)
    waveform = tone_and_noise(spec.num_samples)
    expected = librosa.feature.melspectrogram(
        y=in_librosas_place(waveform, spec),
        sr=16_000,
        n_fft=512,
        win_length=400,
        hop_length=160,
        window=np.hanning(400),
        center=False,
        power=2.0,
        n_mels=64,
        fmin=20.0,
        fmax=8000.0,
    )
    expected = np.log(np.maximum(expected.T[: spec.num_frames], 2.0**-23))
    np.testing.assert_allclose(log_mel(waveform, spec), expected, atol=1e-4)


def htk_filters() -> np.ndarray:
    """(257, 128) float64, filter by filter: Kaldi's for 128 bands of 512 points from 20 to 8000 Hz at 16 kHz."""

    def mel(hz: float) -> float:
        return 1127.0 * np.log(1.0 + hz / 700.0)

    edges = np.linspace(mel(20.0), mel(8000.0), 130)
    out = np.zeros((257, 128))
    for band, (left, centre, right) in enumerate(zip(edges, edges[1:], edges[2:], strict=False)):
        # Kaldi leaves out the last point, half the rate.
        for point in range(256):
            here = mel(point * 16_000 / 512)
            if left < here <= centre:
                out[point, band] = (here - left) / (centre - left)
            elif centre < here < right:
                out[point, band] = (right - here) / (right - centre)
    return out


def assert_close_in_float32(found: np.ndarray, expected: np.ndarray) -> None:
    """Log energies within 1e-4, beside what float32 resolves of a quiet band in a loud frame.

    The transform's rounding is a share of the largest amplitude in the frame.
    """
    assert found.dtype == np.float32
    amplitude, wanted = np.exp(found.astype(np.float64) / 2), np.exp(expected / 2)
    resolved = np.finfo(np.float32).eps * wanted.max(axis=-1, keepdims=True)
    assert (np.abs(amplitude - wanted) <= 1e-4 / 2 * wanted + resolved).all()


def test_the_spectrum_of_audiomae_equals_librosa():
    import librosa

    spec = dataclasses.replace(AUDIO_PRESETS["audiomae"], **BARE_FRAME)
    waveform = tone_and_noise(spec.num_samples)
    spectrum = librosa.stft(
        in_librosas_place(waveform, spec),
        n_fft=512,
        win_length=400,
        hop_length=160,
        window=np.hanning(400),
        center=False,
    )
    power = np.abs(spectrum[:, : spec.num_frames].T) ** 2
    assert_close_in_float32(log_mel(waveform, spec), np.log(np.maximum(power @ htk_filters(), 2.0**-23)))


def kaldi_filter_bank(waveform: np.ndarray) -> np.ndarray:
    """(frames that the sound fills whole, 128) float64: Kaldi's definition with AudioMAE's options, frame by frame."""
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(400) / 399)
    filters, rows = htk_filters(), []
    for start in range(0, len(waveform) - 400 + 1, 160):
        frame = waveform[start : start + 400].astype(np.float64)
        frame -= frame.mean()
        emphasised = [frame[i] - 0.97 * frame[max(0, i - 1)] for i in range(400)]
        power = np.abs(np.fft.rfft(emphasised * window, 512)) ** 2
        rows.append([np.log(max(energy, np.finfo(np.float32).eps)) for energy in power @ filters])
    return np.array(rows)


@pytest.mark.parametrize("seconds", [10.0, 11.0])
def test_audiomae_is_kaldis_filter_bank(seconds):
    """Ten seconds are 998 whole frames, and zeros follow; eleven are more than 1024."""
    waveform = tone_and_noise(round(16_000 * seconds), offset=0.2)
    expected = kaldi_filter_bank(waveform)[:1024]
    found = log_mel(waveform, AUDIO_PRESETS["audiomae"])
    assert found.shape == (1024, 128) and len(expected) == (998 if seconds == 10 else 1024)
    assert_close_in_float32(found[: len(expected)], expected)
    assert (found[len(expected) :] == 0).all()
    # No point of the transform lies in the fourth band.
    np.testing.assert_allclose(found[: len(expected), 3], np.log(2.0**-23), rtol=1e-6)


def test_audiomae_does_not_hear_a_constant():
    spec = AUDIO_PRESETS["audiomae"]
    waveform = 0.1 * tone_and_noise(spec.num_samples)
    np.testing.assert_allclose(log_mel(waveform + np.float32(0.5), spec), log_mel(waveform, spec), atol=1e-3)


def test_audiomae_tokens():
    """(x - mean) / (2 std) with the constants of AudioSet, 64 x 8 patches, each at a position of its own."""
    spec = AUDIO_PRESETS["audiomae"]
    assert spec.grid == (64, 8) and spec.num_samples == 1023 * 160 + 400
    tokens = spectrogram_tokens(np.zeros(0, np.float32), spec)
    assert tokens.shape == (512, 256) and tokens.dtype == np.float32
    np.testing.assert_allclose(tokens, 4.2677393 / (2 * 4.5689974), rtol=1e-6)
    assert grid_positions(spec.grid, AUDIO).tolist() == [[i, j] for i in range(64) for j in range(8)]


@pytest.mark.parametrize("num_samples", [0, 1, 399, 400, 559, 560, 163_920, 164_079, 164_080, 200_000])
def test_audiomae_counts_whole_frames(num_samples):
    mel = log_mel(tone_and_noise(num_samples), AUDIO_PRESETS["audiomae"])
    whole = max(0, min(1024, (num_samples - 400) // 160 + 1))
    assert (mel[:whole] != 0).any(axis=1).all() and (mel[whole:] == 0).all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"fft_length": 256}, "fft_length 256 is shorter than frame_length 400"),
        ({"sample_rate_hz": 8000}, "expected min_hz < max_hz <= sample_rate_hz / 2; found 20, 8000 and 4000"),
        ({"min_hz": 9000.0}, "found 9000, 8000 and 8000"),
        ({"log_floor": 0.0}, "log_offset and log_floor are both 0"),
        ({"window": "hamming"}, r"window: expected one of \('periodic', 'symmetric'\), found 'hamming'"),
        ({"power": 3}, r"power: expected one of \(1, 2\), found 3"),
        ({"mel_scale": "bark"}, "mel_scale: expected one of .+, found 'bark'"),
    ],
)
def test_contradictory_settings_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(AUDIO_PRESETS["audiomae"], **changes)


def test_the_defaults_are_the_release():
    assert AUDIO_PRESETS["imp"] == AudioSpec()
    assert AUDIO_PRESETS["imp"].mel_scale == "htk"
    spec = AudioSpec()
    assert spec.num_samples == 131_072 and spec.grid == (8, 8)
    assert spectrogram_tokens(np.zeros(spec.num_samples, np.float32), spec).shape == (64, 256)


def test_white_noise_has_the_level_of_filters_of_height_one():
    """Noise of 0.1 under a Hann window: bins of 0.1 sqrt(3/8 2048) sqrt(pi)/2 = 2.46 on average. Centres lie 20.7 mels
    apart, so a triangle's area is 20.7 (700 + Hz) / 1127 Hz, at 7.8 Hz a bin; a mean logarithm is a little below."""
    noise = 0.1 * np.random.default_rng(0).standard_normal(131_072)
    low, high = 1127 * np.log(1 + np.array([80, 7600]) / 700)
    centre = np.linspace(low, high, 130)[1:-1]
    bins = (high - low) / 129 * 700 * np.exp(centre / 1127) / 1127 / (16_000 / 2048)
    expected = np.log(0.1 * np.sqrt(3 / 8 * 2048) * np.sqrt(np.pi) / 2 * bins).mean()
    found = log_mel(noise.astype(np.float32), AUDIO_PRESETS["imp"]).mean()
    assert expected == pytest.approx(2.68, abs=0.01)
    assert expected - 0.06 < found < expected


def test_a_tone_is_in_its_mel_band_and_silence_at_the_floor():
    spec = AudioSpec(num_frames=16)
    silence = log_mel(np.zeros(0, np.float32), spec)
    np.testing.assert_allclose(silence, np.log(1e-6), atol=1e-5)
    seconds = np.arange(spec.num_samples) / spec.sample_rate_hz
    low, high = (log_mel(np.sin(2 * np.pi * hz * seconds).astype(np.float32), spec)[4].argmax() for hz in (500, 4000))
    mels = {hz: 1127 * np.log(1 + hz / 700) for hz in (80, 500, 4000, 7600)}
    band = {hz: (mels[hz] - mels[80]) / (mels[7600] - mels[80]) * (spec.num_mels + 1) - 1 for hz in (500, 4000)}
    assert abs(low - band[500]) <= 1 and abs(high - band[4000]) <= 1


def test_a_short_sound_is_padded_with_silence_at_its_end():
    spec = AudioSpec(num_frames=16)
    wave = np.random.default_rng(0).standard_normal(4 * spec.hop_length).astype(np.float32)
    mel = log_mel(wave, spec)
    np.testing.assert_allclose(mel[4:], np.log(1e-6), atol=1e-5)
    assert mel[:4].min() > -8
    assert (mel == log_mel(np.pad(wave, (0, spec.num_samples)), spec)).all()


def test_spectrogram_patches_come_in_time_frequency_order():
    spec = AudioSpec(num_frames=32, num_mels=32, mean=-3.0, std=2.0)
    wave = np.random.default_rng(1).standard_normal(spec.num_samples).astype(np.float32)
    mel = (log_mel(wave, spec) + 3.0) / 2.0
    tokens = spectrogram_tokens(wave, spec)
    assert tokens.shape == (4, 256) and tokens.dtype == np.float32 and tokens.flags["C_CONTIGUOUS"]
    for number, (time, frequency) in enumerate([(0, 0), (0, 16), (16, 0), (16, 16)]):
        np.testing.assert_allclose(
            tokens[number].reshape(16, 16), mel[time : time + 16, frequency : frequency + 16], atol=1e-5
        )
