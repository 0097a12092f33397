"""Videos whose every frame tells its number: which frames a clip takes, sound tracks, and damaged files."""

import dataclasses
import re
import struct
from pathlib import Path

import av
import numpy as np
import pytest

from pipeline.data.media import container, video
from pipeline.data.media.audio import decode_audio
from pipeline.data.media.errors import Reject
from pipeline.data.media.video import decode_video
from pipeline.data.spec import AudioSpec, VideoSpec

AUDIO = AudioSpec()


def spec(fps: float = 8.0, *, max_frames: int = 16, short_side: int = 64) -> VideoSpec:
    return VideoSpec(fps=fps, short_side=short_side, max_frames=max_frames)


def decode_sound_track(source, wanted: AudioSpec, **cut):
    return decode_audio(source, wanted, decoder="pyav", **cut)


def reject(decode, path, *arguments, **cut) -> Reject:
    with pytest.raises(Reject) as caught:
        decode(str(path), *arguments, **cut)
    return caught.value


@pytest.fixture(scope="module")
def clip(tmp_path_factory, write_video) -> str:
    """One second: 24 frames, a tone of 1 kHz."""
    return write_video(tmp_path_factory.mktemp("video") / "clip.mp4", sound_hz=1000)


# --- frames ---


@pytest.mark.parametrize(
    ("fps", "cut", "expected"),
    [
        (8.0, {}, [0, 3, 6, 9, 12, 15, 18, 21]),
        (12.0, {}, list(range(0, 24, 2))),
        # Frame n is shown from n / 24 s: at i / 10 s the last shown is floor(2.4 i).
        (10.0, {}, [0, 2, 4, 7, 9, 12, 14, 16, 19, 21]),
        # More pictures than the video has: each shown twice, at most 16 in all.
        (48.0, {}, [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7]),
        (8.0, {"start_s": 0.5}, [12, 15, 18, 21]),
        (8.0, {"end_s": 0.5}, [0, 3, 6, 9]),
        (8.0, {"start_s": 0.25, "end_s": 0.75}, [6, 9, 12, 15]),
        (8.0, {"start_s": 0.05, "end_s": 0.55}, [1, 4, 7, 10]),
        (8.0, {"start_s": 0.5, "end_s": 99.0}, [12, 15, 18, 21]),
    ],
)
def test_frames_at_the_asked_times(clip, frame_numbers, fps, cut, expected):
    assert frame_numbers(decode_video(clip, spec(fps), **cut)) == expected


@pytest.mark.parametrize("decoder", ["pyav", "decord"])
@pytest.mark.parametrize(
    ("fps", "cut", "expected"),
    [
        (10.0, {"start_s": 0.25, "end_s": 0.75}, [6, 8, 10, 13, 15]),
        (8.0, {}, [0, 3, 6, 9, 12, 15, 18, 21]),
        (48.0, {"start_s": 0.9}, [21, 22, 22, 23]),
    ],
)
def test_both_decoders_agree(clip, frame_numbers, decoder, fps, cut, expected):
    wanted = dataclasses.replace(spec(fps), decoder=decoder)
    assert frame_numbers(decode_video(clip, wanted, **cut)) == expected


def test_a_clip_has_at_most_max_frames(clip, frame_numbers):
    assert frame_numbers(decode_video(clip, spec(max_frames=3))) == [0, 3, 6]
    assert frame_numbers(decode_video(clip, spec(max_frames=3), start_s=0.5)) == [12, 15, 18]


def test_the_short_side_is_resized(tmp_path, write_video):
    path = write_video(tmp_path / "a.mp4", height=64, width=128)
    assert decode_video(path, spec(short_side=32)).shape == (8, 32, 64, 3)
    assert decode_video(path, spec(short_side=64)).shape == (8, 64, 128, 3)


@pytest.mark.parametrize("width", [16, 24, 32, 48, 96, 144])
def test_widths_that_one_decoder_cannot_read(tmp_path, write_video, frame_numbers, width):
    path = write_video(tmp_path / "a.mp4", width=width, num_frames=12)
    frames = decode_video(path, spec(short_side=min(width, 64)))
    assert frames.shape[1:] == (64, width, 3) and frame_numbers(frames) == [0, 3, 6, 9]


def test_bytes_from_another_file_system(clip, frame_numbers, peak_hz):
    content = Path(clip).read_bytes()
    assert frame_numbers(decode_video(content, spec())) == [0, 3, 6, 9, 12, 15, 18, 21]
    assert abs(peak_hz(decode_sound_track(content, AUDIO), 16_000) - 1000) <= 2


def test_times_of_a_variable_frame_rate():
    shown_s = np.array([0.0, 0.1, 0.5, 0.6, 1.0])
    # The last frame lasts as long as the median: (0.1 + 0.4) / 2 = 0.25 s, so 1.25 s in all.
    assert video.frame_indices(shown_s, spec(4.0), 0.0, None).tolist() == [0, 1, 2, 3, 4]
    assert video.frame_indices(shown_s, spec(10.0), 0.0, 0.8).tolist() == [0, 1, 1, 1, 1, 2, 3, 3]
    assert video.frame_indices(shown_s, spec(4.0), 0.75, None).tolist() == [3, 4]


@pytest.mark.parametrize("cut", [{"start_s": 1.5}, {"start_s": 0.5, "end_s": 0.5}, {"start_s": 0.5, "end_s": 0.25}])
def test_nothing_in_the_cut(clip, cut):
    assert reject(decode_video, clip, spec(), **cut).reason == "no_frames"


@pytest.mark.parametrize("num_frames", [1, 2, 3])
def test_the_shortest_videos_show_their_first_frame(tmp_path, write_video, frame_numbers, num_frames):
    """At 8 frames a second the first is due at 0 s, however soon the video ends."""
    path = write_video(tmp_path / "a.mp4", num_frames=num_frames, fps=25)
    assert frame_numbers(decode_video(path, spec())) == [0]


def test_a_long_video_costs_no_more_than_its_clip(tmp_path, write_video, frame_numbers, monkeypatch):
    """A film does not fit in memory, and an hour before the clip must not be decoded."""
    path = write_video(tmp_path / "a.mp4", num_frames=480)
    decoded = []
    monkeypatch.setattr(video, "frames", lambda *a: (decoded.append(f) or f for f in container.frames(*a)))
    assert frame_numbers(decode_video(path, spec(max_frames=4))) == [0, 3, 6, 9]
    # The clip ends with frame 9; the next due time ends it.
    assert len(decoded) <= 12
    decoded.clear()
    assert frame_numbers(decode_video(path, spec(max_frames=4), start_s=15.0)) == [(360 + 3 * i) % 28 for i in range(4)]
    # From the key frame before (every 8 frames in this file) to the end of the clip.
    assert len(decoded) <= 8 + 12


@pytest.mark.parametrize(
    ("matrix", "top_left", "bottom_left"),
    [
        # As the camera's rows lie: the left half is black, the right half white.
        ((1, 0, 0, 1), 0, 0),
        # A quarter turn clockwise: left goes to the top.
        ((0, 1, -1, 0), 0, 255),
        ((-1, 0, 0, -1), 255, 255),
        ((0, -1, 1, 0), 255, 0),
    ],
)
def test_phones_turn_their_videos_in_the_container(tmp_path, matrix, top_left, bottom_left):
    path = tmp_path / "a.mp4"
    with av.open(str(path), "w") as file:
        stream = file.add_stream("libx264", rate=8, options={"preset": "ultrafast"})
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
        picture = np.zeros((64, 64, 3), np.uint8)
        picture[:, 32:] = 255
        for frame in (av.VideoFrame.from_ndarray(picture, format="rgb24"), None):
            file.mux(stream.encode(frame))
    content = bytearray(path.read_bytes())
    # The matrix of the track's header, in 16.16 fixed point (ISO 14496-12, 8.3.2).
    start, (a, b, c, d) = content.find(b"tkhd") + 4 + 40, matrix
    content[start : start + 20] = struct.pack(">5i", a << 16, b << 16, 0, c << 16, d << 16)
    path.write_bytes(content)
    (found,) = decode_video(str(path), spec())
    assert abs(int(found[8, 8, 0]) - top_left) < 8 and abs(int(found[56, 8, 0]) - bottom_left) < 8


@pytest.mark.parametrize(
    ("cap", "reason"),
    [
        ({"max_pixels": 64 * 64 - 1}, "too_large"),
        ({"max_duration_s": 0.9}, "too_long"),
        ({"max_source_frames": 23}, "too_long"),
    ],
)
@pytest.mark.parametrize("decoder", ["pyav", "decord"])
def test_caps(clip, decoder, cap, reason):
    assert len(decode_video(clip, dataclasses.replace(spec(), decoder=decoder, max_pixels=64 * 64))) == 8
    assert reject(decode_video, clip, dataclasses.replace(spec(), decoder=decoder, **cap)).reason == reason


@pytest.mark.parametrize("decoder", ["pyav", "decord"])
def test_a_thin_strip_may_not_grow_without_end(tmp_path, write_video, decoder):
    path = write_video(tmp_path / "a.mp4", height=16, width=1000)
    wanted = dataclasses.replace(spec(short_side=256), decoder=decoder, max_pixels=100_000)
    assert reject(decode_video, path, wanted).reason == "too_large"


def test_a_cut_of_a_long_sound_track_is_where_it_should_be(tmp_path, write_video, peak_hz):
    """Half a second found by seeking is the same sound as in a reading of everything."""
    path = write_video(tmp_path / "a.mp4", num_frames=96, sound_hz=1000)
    whole = decode_sound_track(path, AudioSpec(num_frames=64), num_samples=64_000)
    part = decode_sound_track(path, AUDIO, start_s=2.25, end_s=2.75)
    assert len(part) == 8000
    np.testing.assert_allclose(part[100:-100], whole[36_100:43_900], atol=1e-4)


# --- sound tracks ---


def test_sound_track(clip, peak_hz):
    wave = decode_sound_track(clip, AUDIO)
    assert wave.dtype == np.float32 and wave.ndim == 1
    # AAC packets of 1024 samples at 48 kHz are 341 at 16 kHz.
    assert abs(len(wave) - 16_000) <= 342
    assert abs(peak_hz(wave, 16_000) - 1000) <= 2 and abs(np.abs(wave[4000:12000]).max() - 0.5) < 0.05


def test_sound_track_cuts(clip, peak_hz):
    wave = decode_sound_track(clip, AUDIO, start_s=0.25, end_s=0.75)
    assert len(wave) == 8000 and abs(peak_hz(wave, 16_000) - 1000) <= 2
    # Resampling sees silence beyond a cut: its first and last samples differ.
    np.testing.assert_allclose(wave[100:-100], decode_sound_track(clip, AUDIO)[4100:11900], atol=1e-4)
    assert len(decode_sound_track(clip, AudioSpec(num_frames=4, hop_length=512))) == 2048
    assert reject(decode_sound_track, clip, AUDIO, start_s=3.0).reason == "no_sound"


def test_no_sound_track(tmp_path, write_video):
    path = write_video(tmp_path / "a.mp4")
    assert reject(decode_sound_track, path, AUDIO).reason == "no_sound"
    assert len(decode_video(path, spec())) == 8


def test_a_sound_file_has_no_frames(tmp_path, write_wav):
    path = write_wav(tmp_path / "a.wav", hz=(500,))
    assert reject(decode_video, path, spec()).reason in ("no_frames", "not_decodable")


# --- damage ---


@pytest.mark.parametrize("content", [b"not a video", bytes(5000), b"\0\0\0\x20ftypisom" + bytes(100)])
def test_other_bytes_are_rejected(tmp_path, content):
    (tmp_path / "a.mp4").write_bytes(content)
    assert reject(decode_video, tmp_path / "a.mp4", spec()).reason in ("not_decodable", "no_frames")
    assert reject(decode_sound_track, tmp_path / "a.mp4", AUDIO).reason in ("not_decodable", "no_sound")


@pytest.mark.parametrize("share", [0.1, 0.5, 0.95])
def test_a_video_without_its_index_is_rejected(tmp_path, clip, share):
    content = Path(clip).read_bytes()
    (tmp_path / "a.mp4").write_bytes(content[: int(share * len(content))])
    assert reject(decode_video, tmp_path / "a.mp4", spec()).reason == "not_decodable"
    assert reject(decode_sound_track, tmp_path / "a.mp4", AUDIO).reason in ("not_decodable", "no_sound")


@pytest.fixture(scope="module")
def cut_short(tmp_path_factory, write_video):
    """Videos with their index at the start, cut off at shares of their length."""
    folder = tmp_path_factory.mktemp("cut")
    content = Path(write_video(folder / "whole.mp4", num_frames=48, sound_hz=1000, moov_first=True)).read_bytes()
    paths = {}
    for percent in (30, 50, 70, 80, 90):
        paths[percent] = folder / f"{percent}.mp4"
        paths[percent].write_bytes(content[: percent * len(content) // 100])
    return paths


@pytest.mark.parametrize("percent", [30, 50, 70, 80, 90])
def test_a_video_cut_short_gives_its_first_frames_or_a_reason(cut_short, frame_numbers, percent):
    try:
        numbers = frame_numbers(decode_video(str(cut_short[percent]), spec()))
    except Reject as e:
        assert e.reason == "not_decodable"
    else:
        assert numbers == [3 * i % 28 for i in range(len(numbers))]


@pytest.mark.parametrize("decode", [lambda p: decode_video(p, spec()), lambda p: decode_sound_track(p, AUDIO)])
def test_details_of_a_reject_do_not_tell_the_time(tmp_path, clip, decode):
    damaged = bytearray(Path(clip).read_bytes())
    damaged[200:2000] = np.random.default_rng(0).bytes(1800)
    (tmp_path / "a.mp4").write_bytes(damaged)
    with pytest.raises(Reject) as caught:
        decode(str(tmp_path / "a.mp4"))
    assert not re.search(r"\d\d:\d\d:\d\d|0x[0-9a-f]{6}", caught.value.detail)


def outcome(path: Path) -> str:
    try:
        return f"{len(decode_video(str(path), spec()))} frames"
    except Reject as e:
        return e.reason


def test_damage_is_judged_the_same_every_time(cut_short):
    """A run that resumes must meet the same rejects: the order of its samples depends on them."""
    # Cut inside a frame: whether the decoder's threads notice in time is a matter of luck.
    for percent in (70, 90):
        assert len({outcome(cut_short[percent]) for _ in range(60)}) == 1


def test_a_damaged_frame_never_crashes(tmp_path, clip):
    content, rng = np.frombuffer(Path(clip).read_bytes(), np.uint8), np.random.default_rng(0)
    for start in range(200, len(content) - 400, 1500):
        damaged = content.copy()
        damaged[start : start + 200] = rng.integers(0, 256, 200)
        (tmp_path / "a.mp4").write_bytes(damaged.tobytes())
        for decode, wanted in ((decode_video, spec()), (decode_sound_track, AUDIO)):
            try:
                found = decode(str(tmp_path / "a.mp4"), wanted)
            except Reject:
                continue
            assert found.size and np.isfinite(found).all()
