"""Sound files: rate, channels, cuts, and reasons."""

import dataclasses

import numpy as np
import pytest
import soundfile

from pipeline.data.media import audio
from pipeline.data.media.audio import decode_audio, to_mono
from pipeline.data.media.errors import Reject
from pipeline.data.spec import AudioSpec
from pipeline.export.hub import decoding_imp

SPEC = AudioSpec()


def reject(path, **cut) -> Reject:
    with pytest.raises(Reject) as caught:
        decode_audio(str(path), SPEC, **cut)
    return caught.value


@pytest.mark.parametrize("rate_hz", [16_000, 44_100, 48_000, 8_000])
def test_any_rate_becomes_16_khz(tmp_path, write_wav, peak_hz, rate_hz):
    wave = decode_audio(write_wav(tmp_path / "a.wav", hz=(1000,), rate_hz=rate_hz), SPEC)
    assert wave.dtype == np.float32 and wave.shape == (16_000,)
    assert abs(peak_hz(wave, 16_000) - 1000) <= 1
    assert abs(np.abs(wave[1000:-1000]).max() - 0.5) < 0.02


def test_stereo_is_the_mean_of_its_channels(tmp_path, write_wav, peak_hz):
    left = decode_audio(write_wav(tmp_path / "l.wav", hz=(500,)), SPEC)
    right = decode_audio(write_wav(tmp_path / "r.wav", hz=(3000,)), SPEC)
    both = decode_audio(write_wav(tmp_path / "b.wav", hz=(500, 3000)), SPEC)
    assert both.ndim == 1
    np.testing.assert_allclose(both, (left + right) / 2, atol=1e-3)


def test_at_the_wanted_rate_samples_pass_as_they_are(tmp_path):
    samples = np.random.default_rng(0).uniform(-1, 1, 5000).astype(np.float32)
    soundfile.write(tmp_path / "a.wav", samples, 16_000, subtype="FLOAT")
    assert (decode_audio(str(tmp_path / "a.wav"), SPEC) == samples).all()


@pytest.mark.parametrize("name", ["a.flac", "a.ogg", "a.mp3"])
def test_other_formats(tmp_path, peak_hz, name):
    seconds = np.arange(44_100) / 44_100
    soundfile.write(tmp_path / name, 0.5 * np.sin(2 * np.pi * 700 * seconds), 44_100)
    assert abs(peak_hz(decode_audio(str(tmp_path / name), SPEC), 16_000) - 700) <= 2


def mp3_without_a_count(path, seconds_of: list[tuple[str, float]], mode: str) -> str:
    """Writes an MP3 of silence and noise without the header that has the number of its frames."""
    rng = np.random.default_rng(0)
    parts = {"noise": lambda n: rng.uniform(-0.5, 0.5, n), "silence": np.zeros}
    sound = np.concatenate([parts[what](int(44_100 * seconds)) for what, seconds in seconds_of])
    soundfile.write(path, sound, 44_100, bitrate_mode=mode, compression_level=0.5)
    data = path.read_bytes()
    header = b"Xing" if mode == "VARIABLE" else b"Info"
    assert header in data[:200]
    path.write_bytes(data[data.index(b"\xff\xfb", data.index(header)) :])
    return str(path)


@pytest.mark.parametrize("mode", ["VARIABLE", "CONSTANT"])
def test_an_mp3_whose_frames_are_not_counted_is_read_to_its_end(tmp_path, mode):
    path = mp3_without_a_count(tmp_path / "a.mp3", [("noise", 0.5), ("silence", 4.0), ("noise", 0.5)], mode)
    wave = decode_audio(path, SPEC)
    assert abs(len(wave) - 5 * 16_000) < 2_000
    loud = np.abs(wave[: 16_000 * 4 // 10]).mean(), np.abs(wave[16_000 * 47 // 10 : 16_000 * 49 // 10]).mean()
    assert min(loud) > 0.1 > 0.01 > np.abs(wave[16_000 : 16_000 * 4]).mean()
    assert abs(len(decode_audio(path, SPEC, start_s=4.6)) - 0.4 * 16_000) < 2_000
    settings = dataclasses.asdict(SPEC)
    assert (decoding_imp.waveform(path, settings, 0.0) == wave).all()


def test_words_of_a_tag_are_no_count_of_frames(tmp_path):
    mp3_without_a_count(tmp_path / "a.mp3", [("noise", 0.5), ("silence", 4.0), ("noise", 0.5)], "VARIABLE")
    text = b"\0Further Info: Xing" + bytes(5000)
    tag = b"TXXX" + len(text).to_bytes(4, "big") + bytes(2) + text
    size = bytes([0, 0, len(tag) >> 7, len(tag) & 127])
    tagged = tmp_path / "b.mp3"
    tagged.write_bytes(b"ID3\3\0\0" + size + tag + (tmp_path / "a.mp3").read_bytes())
    wave = decode_audio(str(tagged), SPEC)
    assert abs(len(wave) - 5 * 16_000) < 2_000 and np.abs(wave[16_000 * 47 // 10 : 16_000 * 49 // 10]).mean() > 0.1
    assert (decoding_imp.waveform(str(tagged), dataclasses.asdict(SPEC), 0.0) == wave).all()
    assert (decode_audio(tagged.read_bytes(), SPEC) == wave).all()
    # A counted one is known by its header alone, behind a tag too.
    counted = tmp_path / "c.mp3"
    soundfile.write(counted, np.zeros(44_100), 44_100, bitrate_mode="VARIABLE")
    behind = b"ID3\3\0\0" + size + tag + counted.read_bytes()
    assert b"Xing" in audio._first_frame(behind) and b"Xing" not in audio._first_frame(tagged.read_bytes())


def test_cuts(tmp_path):
    ramp = np.linspace(0, 1, 16_000 * 20, dtype=np.float32)
    soundfile.write(tmp_path / "a.wav", ramp, 16_000, subtype="FLOAT")
    path = str(tmp_path / "a.wav")
    assert (decode_audio(path, SPEC, start_s=1.5, end_s=2.25) == ramp[24_000:36_000]).all()
    assert (decode_audio(path, SPEC, start_s=19.5) == ramp[312_000:]).all()
    # At most one spectrogram: 128 x 1024 samples.
    assert (decode_audio(path, SPEC) == ramp[:131_072]).all()
    assert (decode_audio(path, SPEC, start_s=1.0, end_s=100.0) == ramp[16_000 : 16_000 + 131_072]).all()


def test_nothing_in_the_cut(tmp_path, write_wav):
    path = write_wav(tmp_path / "a.wav", hz=(500,))
    late = reject(path, start_s=2.0)
    assert late.reason == "no_sound" and late.detail == "1.00 s of sound, asked from 2.00 s"
    assert reject(path, start_s=0.5, end_s=0.5).reason == "no_sound"
    assert reject(path, start_s=0.5, end_s=0.2).reason == "no_sound"


@pytest.mark.parametrize("start_s", [float("nan"), -1.0])
def test_a_start_that_is_no_time_is_rejected(tmp_path, write_wav, start_s):
    """A manifest can hold anything; whatever it holds, a row is read from its place or rejected, never an error."""
    reject(write_wav(tmp_path / "a.wav", hz=(500,), seconds=3.0), start_s=start_s)


@pytest.mark.parametrize("peak", [1e13, -3e38, np.inf, np.nan])
def test_bytes_that_are_no_samples_are_rejected(tmp_path, peak):
    samples = np.sin(np.arange(16_000, dtype=np.float32))
    soundfile.write(tmp_path / "loud.wav", 2**31 * samples, 16_000, subtype="FLOAT")
    assert len(decode_audio(str(tmp_path / "loud.wav"), SPEC)) == 16_000
    samples[5000] = peak
    soundfile.write(tmp_path / "a.wav", samples, 16_000, subtype="FLOAT")
    assert reject(tmp_path / "a.wav").reason == "not_decodable"


def test_files_that_are_no_sound(tmp_path, write_wav):
    (tmp_path / "text.wav").write_bytes(b"no sound at all")
    assert reject(tmp_path / "text.wav").reason == "not_decodable"
    (tmp_path / "half.flac").write_bytes(b"fLaC" + bytes(100))
    assert reject(tmp_path / "half.flac").reason == "not_decodable"
    soundfile.write(tmp_path / "none.wav", np.zeros((0, 1)), 16_000)
    assert reject(tmp_path / "none.wav").reason == "no_sound"


def test_a_truncated_wav_gives_what_is_there_or_a_reason(tmp_path, write_wav):
    content = (tmp_path / "a.wav").parent.joinpath("a.wav")
    write_wav(content, hz=(500,), rate_hz=16_000)
    whole, data = decode_audio(str(content), SPEC), content.read_bytes()
    content.write_bytes(data[: len(data) // 2])
    half = decode_audio(str(content), SPEC)
    assert 0 < len(half) < len(whole) and (half == whole[: len(half)]).all()
    content.write_bytes(data[:30])
    assert reject(content).reason == "not_decodable"


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_samples_that_are_not_finite_are_rejected(tmp_path, value):
    samples = np.zeros(1000, np.float32)
    samples[500] = value
    soundfile.write(tmp_path / "a.wav", samples, 16_000, subtype="FLOAT")
    assert reject(tmp_path / "a.wav").reason == "not_decodable"


def test_a_cut_before_resampling_keeps_its_length():
    samples = np.zeros((48_000 * 3, 2), np.float32)
    assert to_mono(samples[:48_000], rate=48_000, spec=SPEC).shape == (16_000,)


def test_a_cut_reads_no_more_than_it_needs(tmp_path, monkeypatch):
    """Ten seconds of a long recording: a whole one does not fit into memory."""
    soundfile.write(tmp_path / "a.wav", np.zeros(16_000 * 600, np.int16), 16_000)
    counts, read = [], soundfile.SoundFile.read
    monkeypatch.setattr(
        soundfile.SoundFile, "read", lambda self, frames=-1, **k: (counts.append(frames), read(self, frames, **k))[1]
    )
    assert len(decode_audio(str(tmp_path / "a.wav"), SPEC, start_s=500.0)) == SPEC.num_samples
    assert counts == [SPEC.num_samples]


def test_the_cap_on_duration(tmp_path, write_wav):
    path = write_wav(tmp_path / "a.wav", hz=(500,), seconds=3.0)
    short = dataclasses.replace(SPEC, max_duration_s=2.5)
    for decoder in ("soundfile", "pyav"):
        with pytest.raises(Reject, match=r"too_long: 3 s, at most 2\.5"):
            decode_audio(path, short, decoder=decoder)


def test_what_soundfile_cannot_read_is_left_to_the_other(tmp_path, write_video, peak_hz):
    """The audio column may name AAC, or a video."""
    path = write_video(tmp_path / "a.mp4", sound_hz=700)
    wave = decode_audio(path, SPEC)
    assert abs(peak_hz(wave, 16_000) - 700) <= 2
    assert (wave == decode_audio(path, SPEC, decoder="pyav")).all()
