"""Clips from media by row, and the cache of what was decoded."""

import dataclasses

import numpy as np
import pytest
from PIL import Image

from pipeline.data import sources
from pipeline.data.media.errors import Reject
from pipeline.data.media.process import DecodeProcess
from pipeline.data.sources import DecodedCache, MediaSource


@pytest.fixture(autouse=True)
def cache(monkeypatch) -> DecodedCache:
    """The process-wide cache, empty again for each test."""
    monkeypatch.setattr(sources, "_CACHE", DecodedCache())
    return sources._CACHE


@pytest.fixture
def data_set(tmp_path, write_manifest, make_data_set):
    for number in range(3):
        Image.new("RGB", (32, 32), (number, 0, 0)).save(tmp_path / f"{number}.png")
    rows = [{"id": f"id-{i}", "image": f"{i}.png", "text": [f"t{i}"], "labels": None} for i in range(3)]
    rows.append({"id": "bad", "image": "none.png", "text": None, "labels": ["x"]})
    return make_data_set(write_manifest(tmp_path / "m.parquet", rows))


def test_a_clip_is_its_row(tmp_path, data_set):
    source = MediaSource(data_set, modalities=("image",))
    clip = source.clip(2)
    assert source.num_rows == 4 and source.id(2) == clip.id == "id-2"
    assert clip.text == ("t2",) and clip.labels == () and list(clip.media) == ["image"]
    assert clip.media["image"].shape == (32, 32, 3) and (clip.media["image"] == [2, 0, 0]).all()
    assert source.media_path(2) == f"{tmp_path}/2.png"


def test_bad_media_raise_a_reject(data_set):
    with pytest.raises(Reject, match="missing_file"):
        MediaSource(data_set, modalities=("image",)).clip(3)


def test_only_what_is_asked_for_is_decoded(data_set):
    clip = MediaSource(data_set, modalities=()).clip(3)
    assert not clip.media and clip.labels == ("x",) and clip.text == ()


def test_another_manifest_than_the_training_one(tmp_path, data_set, write_manifest):
    held_out = write_manifest(tmp_path / "held_out.parquet", [{"id": "other", "image": "1.png"}])
    assert MediaSource(data_set, modalities=("image",), manifest=held_out).id(0) == "other"


def count_decodes(monkeypatch) -> list[tuple[str, str]]:
    calls, decode = [], DecodeProcess.decode

    def counted(self, record, data_set, modality, **named):
        calls.append((record["id"], modality))
        return decode(self, record, data_set, modality, **named)

    monkeypatch.setattr(DecodeProcess, "decode", counted)
    return calls


def test_what_is_cached_is_decoded_once(data_set, monkeypatch):
    calls = count_decodes(monkeypatch)
    first = MediaSource(data_set, modalities=("image",), cache_bytes=10_000)
    again = MediaSource(data_set, modalities=("image",), cache_bytes=10_000)
    assert (first.clip(0).media["image"] == again.clip(0).media["image"]).all() and calls == [("id-0", "image")]
    other = dataclasses.replace(data_set, image=dataclasses.replace(data_set.image, short_side=16))
    assert MediaSource(other, modalities=("image",)).clip(0).media["image"].shape == (16, 16, 3)
    assert len(calls) == 2


def test_without_a_cache_everything_is_decoded_again(data_set, monkeypatch):
    calls = count_decodes(monkeypatch)
    source = MediaSource(data_set, modalities=("image",))
    source.clip(0), source.clip(0)
    assert len(calls) == 2


def test_the_cache_drops_the_least_recently_used():
    cache = DecodedCache(max_bytes=30)
    for name in "abc":
        cache.put((name,), np.full(10, ord(name), np.uint8))
    assert cache.get(("a",))[0] == ord("a")
    cache.put(("d",), np.zeros(10, np.uint8))
    assert cache.get(("b",)) is None
    assert all(cache.get((name,)) is not None for name in "acd")
    cache.put(("huge",), np.zeros(31, np.uint8))
    assert cache.get(("huge",)) is None and cache.get(("a",)) is not None
    cache.put(("wide",), np.zeros(25, np.uint8))
    assert [cache.get((name,)) is None for name in "acd"] == [True] * 3 and cache.get(("wide",)) is not None
