"""The containers that FFmpeg may detect: sound and pictures in one file, never lists of other files."""

from __future__ import annotations

from pathlib import Path

import av
import pytest

from pipeline.data.media.audio import decode_audio
from pipeline.data.media.container import FORMATS
from pipeline.data.media.errors import Reject
from pipeline.data.media.probe import probe
from pipeline.data.media.video import decode_video
from pipeline.data.spec import AudioSpec, VideoSpec

PLAYLIST = "#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:10,\nother.mp4\n#EXT-X-ENDLIST\n"
MPD = """<?xml version="1.0"?>
<MPD xmlns="urn:mpeg:dash:schema:mpd:2011" type="static" mediaPresentationDuration="PT1S"
 profiles="urn:mpeg:dash:profile:isoff-main:2011"><Period><AdaptationSet>
<Representation id="1" mimeType="video/mp4" bandwidth="1"><BaseURL>other.mp4</BaseURL></Representation>
</AdaptationSet></Period></MPD>"""
SDP = "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 5004 RTP/AVP 96\na=rtpmap:96 H264/90000\n"
SRT = "1\n00:00:01,000 --> 00:00:02,000\nhello\n\n2\n00:00:03,000 --> 00:00:04,000\nhello\n"
ASS = "[Script Info]\nScriptType: v4.00+\n[Events]\nFormat: Start, End, Text\nDialogue: 0:00:01.00,0:00:02.00,hi\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory, write_video) -> Path:
    """A film that the lists in the same folder name."""
    folder = tmp_path_factory.mktemp("lists")
    write_video(folder / "other.mp4", sound_hz=500)
    return folder


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("list.ffconcat", "ffconcat version 1.0\nfile other.mp4\n"),
        ("list.mp4", "ffconcat version 1.0\nfile other.mp4\n"),
        ("list.m3u8", PLAYLIST),
        ("playlist.mp4", PLAYLIST),
        ("text.srt", SRT),
        ("text.mp4", SRT),
        ("text.ass", ASS),
        ("text.vtt", "WEBVTT\n\n00:01.000 --> 00:02.000\nhello\n"),
        ("list.mpd", MPD),
        ("session.sdp", SDP),
        ("picture%d.png", "\x89PNG\r\n\x1a\n"),
    ],
)
def test_lists_of_files_and_texts_are_no_media(folder, name, content):
    path = folder / name
    path.write_text(content, encoding="latin1")
    for source in (str(path), path.read_bytes()):
        for decoder in ("pyav", "decord"):
            with pytest.raises(Reject, match=r"not_decodable: PyAV: (none of the formats|damaged)"):
                decode_video(source, VideoSpec(decoder=decoder))
        for decoder in ("pyav", "soundfile"):
            with pytest.raises(Reject, match=r"not_decodable: .*PyAV"):
                decode_audio(source, AudioSpec(), decoder=decoder)
        assert probe(source, "video") == {}


def test_the_listed_formats_are_there_and_none_opens_another_file():
    there = {name for names in av.formats_available for name in names.split(",")}
    assert set(FORMATS) <= there
    assert not set(FORMATS) & {"concat", "hls", "dash", "image2", "sdp", "rtp", "rtsp", "lavfi", "srt", "ass", "tee"}


def test_a_codec_without_a_decoder_is_named_as_that(folder):
    content = (folder / "other.mp4").read_bytes().replace(b"avc1", b"zzzz")
    with pytest.raises(Reject, match="not_decodable: PyAV: no decoder for the codec of its video stream"):
        decode_video(content, VideoSpec())


@pytest.mark.parametrize("content", [bytes(3000), b"<html>404</html>", b"\x01", b"RIFF\0\0\0\0WAVE"])
@pytest.mark.parametrize("ending", ["wav", "flac", "mp3", "ogg", "m4a"])
def test_what_is_no_sound_is_said_plainly(tmp_path, content, ending):
    path = tmp_path / f"a.{ending}"
    path.write_bytes(content)
    with pytest.raises(Reject) as caught:
        decode_audio(str(path), AudioSpec())
    assert caught.value.reason == "not_decodable"
    assert "soundfile" in caught.value.detail
    assert not any(word in caught.value.detail for word in ("exist", "Errno", str(tmp_path), "system"))
