"""The file and the part of it that a manifest row names."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from pipeline.data.media.clip import decode_media
from pipeline.data.media.errors import Reject


@pytest.fixture(scope="module")
def row(tmp_path_factory, write_video, write_wav) -> dict:
    folder = tmp_path_factory.mktemp("clip")
    return {
        "video": write_video(folder / "a.mp4", sound_hz=1000),
        "audio": write_wav(folder / "a.wav", hz=(3000,)),
    }


def test_sound_comes_from_the_sound_file_where_there_is_one(row, make_data_set, peak_hz):
    data_set = make_data_set()
    rate = data_set.audio.sample_rate_hz
    assert abs(peak_hz(decode_media(row, data_set, "audio"), rate) - 3000) <= 5
    for empty in (None, ""):
        assert abs(peak_hz(decode_media(row | {"audio": empty}, data_set, "audio"), rate) - 1000) <= 5


def test_start_and_end_hold_for_video_and_sound(row, make_data_set, frame_numbers):
    data_set, cut = make_data_set(), row | {"start_s": 0.25, "end_s": 0.5}
    assert frame_numbers(decode_media(cut, data_set, "video")) == [6, 9]
    assert len(decode_media(cut, data_set, "audio")) == 4000
    whole = decode_media(row | {"start_s": None, "end_s": None}, data_set, "video")
    assert (whole == decode_media(row, data_set, "video")).all() and len(whole) == 8


def test_frames_that_are_resized_stay_uint8(row, make_data_set):
    frames = decode_media(row, make_data_set(), "video")
    assert frames.shape[1:] == (32, 32, 3) and frames.dtype == np.uint8


@pytest.mark.parametrize("modality", ["image", "video", "audio"])
@pytest.mark.parametrize("empty", [{}, {"image": None, "video": None, "audio": None}])
def test_a_row_without_its_media(make_data_set, modality, empty):
    with pytest.raises(Reject, match="no_media"):
        decode_media(empty, make_data_set(), modality)


@pytest.mark.parametrize("modality", ["image", "video", "audio"])
def test_paths_that_hold_nothing(tmp_path, make_data_set, modality):
    (tmp_path / "empty").touch()
    (tmp_path / "file").write_bytes(b"x")
    for name, reason in (
        ("missing", "missing_file"),
        (".", "missing_file"),
        ("empty", "empty_file"),
        ("file/below", "missing_file"),
    ):
        with pytest.raises(Reject, match=reason):
            decode_media({modality: str(tmp_path / name)}, make_data_set(), modality)


def test_media_from_another_file_system(row, make_data_set, frame_numbers, peak_hz):
    import fsspec

    for column, path in row.items():
        with fsspec.open(f"memory://clip/{column}", "wb") as f:
            f.write(Path(path).read_bytes())
    there, data_set = {column: f"memory://clip/{column}" for column in row}, make_data_set(schemes=("memory",))
    for modality in ("video", "audio"):
        assert (decode_media(there, data_set, modality) == decode_media(row, data_set, modality)).all()


STORES = {"file", "gcs", "gs", "hf", "http", "https", "s3"}


@pytest.mark.parametrize(
    ("fields", "more"),
    [
        ({"manifest": "/data/m.parquet"}, set()),
        ({"manifest": "abfs://box/m.parquet", "held_out": {"h": "hdfs://there/h.parquet"}}, {"abfs", "hdfs"}),
        ({"manifest": "s3://box/m.parquet", "schemes": ("ftp",)}, {"ftp"}),
    ],
)
def test_schemes_are_those_of_stores_of_the_manifests_and_of_the_recipe(make_data_set, fields, more):
    assert set(make_data_set(**fields).allowed_schemes) == STORES | more


@pytest.mark.parametrize(
    ("uri", "reason"),
    [
        ("ftp://host/a.png", "unknown_scheme: 'ftp', allowed are file, gcs, "),
        ("memory://a", "unknown_scheme: 'memory'"),
        ("github://owner:repository@main/a.png", "unknown_scheme: 'github'"),
        ("nonsense://a", "unknown_scheme: 'nonsense'"),
        ("S3://bucket/a", "unknown_scheme: 'S3'"),
        ("://a", "unknown_scheme: ''"),
        ("simplecache::https://host/a.png", "unknown_scheme: 'simplecache'"),
        ("zip://a.png::file:///archive.zip", "unknown_scheme: 'zip'"),
        ("https://host/a.png::zip://b", "unknown_scheme: 'zip'"),
        ("data:image/png;base64,AAAA", "missing_file"),
        ("s3://", "bad_uri: no file can have the address s3://"),
        ("s3://two words/a", "bad_uri"),
        ("gs:///a", "bad_uri"),
        ("https://", "bad_uri"),
        ("https://two words.org/a", "bad_uri"),
        ("http://host:99999/a", "bad_uri"),
        ("hf://a", "bad_uri"),
    ],
)
def test_a_row_cannot_choose_what_runs_to_read_it(make_data_set, uri, reason):
    """None of these is tried: trying takes seconds and ends in an error that stops the run."""
    with pytest.raises(Reject) as caught:
        decode_media({"image": uri}, make_data_set(), "image")
    assert str(caught.value).startswith(reason)


@pytest.mark.parametrize("modality", ["image", "video", "audio"])
def test_files_beyond_the_cap_on_bytes(row, make_data_set, modality):
    spec = dataclasses.replace(getattr(make_data_set(), modality), max_bytes=100)
    with pytest.raises(Reject, match=r"too_large: \d+ bytes, at most 100"):
        decode_media(row | {"image": row["video"]}, dataclasses.replace(make_data_set(), **{modality: spec}), modality)
