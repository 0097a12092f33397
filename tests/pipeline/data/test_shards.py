"""Preprocessed shards give the same clips as the media they were made from."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from pipeline.data.batches import SampleMaker
from pipeline.data.media.clip import Clip
from pipeline.data.media.errors import Reject
from pipeline.data.sample_tokens import View
from pipeline.data.shard_index import FORMAT, ShardEntries, damaged_shards, read_index, same_shards, write_index
from pipeline.data.shards import (
    ShardSource,
    decode_settings,
    encode_rows,
    open_source,
    write_shard,
)
from pipeline.data.sources import MediaSource
from pipeline.data.spec import AUDIO_PRESETS, AudioSpec, DataSetSpec, ImageSpec, TokenSpec, VideoSpec
from pipeline.errors import DataError, RequestError

NUM_ROWS, BAD = 7, (2, 6)


def preprocess(data_set: DataSetSpec, folder: Path, *, modalities: tuple[str, ...], rows_per_shard: int = 3):
    """A folder of shards as ``ShardSource`` reads it; returns the data set that reads it, and the rejects."""
    folder.mkdir()
    source = MediaSource(data_set, modalities=modalities)
    entries, rejects = [], []
    for number, start in enumerate(range(0, source.num_rows, rows_per_shard)):
        table, bad = encode_rows(source, range(start, min(start + rows_per_shard, source.num_rows)))
        entries.append(write_shard(table, folder / f"shard-{number:05d}.arrow") | {"rejects": bad})
        rejects += bad
    described = {"modalities": list(modalities), "settings": decode_settings(data_set)}
    index = {"format": FORMAT, "fingerprint": source.manifest.fingerprint} | described
    write_index(folder, index, entries)
    return dataclasses.replace(data_set, shards=str(folder)), rejects


@pytest.fixture(scope="module")
def images(tmp_path_factory, write_manifest, make_data_set) -> DataSetSpec:
    folder = tmp_path_factory.mktemp("images")
    rows = []
    for number in range(NUM_ROWS):
        Image.new("RGB", (32 + number, 40), (30 * number, 1, 2)).save(folder / f"{number}.png")
        if number in BAD:
            (folder / f"{number}.png").write_bytes(b"damaged")
        rows.append({"id": f"id-{number}", "image": f"{number}.png", "text": [f"text {number}"] * (number % 3)})
        rows[-1]["labels"] = ["ü", "b"] if number % 2 else None
    return make_data_set(write_manifest(folder / "m.parquet", rows))


@pytest.fixture(scope="module")
def image_shards(tmp_path_factory, images) -> DataSetSpec:
    return preprocess(images, tmp_path_factory.mktemp("shards") / "images", modalities=("image",))[0]


def outcome(source, row: int) -> Clip | str:
    try:
        return source.clip(row)
    except Reject as e:
        return e.reason


def assert_equal_sources(found, wanted) -> None:
    assert found.num_rows == wanted.num_rows
    for row in range(wanted.num_rows):
        assert found.id(row) == wanted.id(row) and found.media_path(row) == wanted.media_path(row)
        one, other = outcome(found, row), outcome(wanted, row)
        if isinstance(one, str) or isinstance(other, str):
            assert one == other
            continue
        assert (one.id, one.text, one.labels) == (other.id, other.text, other.labels)
        assert one.media.keys() == other.media.keys()
        for modality, a in one.media.items():
            b = other.media[modality]
            assert a.dtype == b.dtype and a.shape == b.shape and (a == b).all()


def test_clips_and_rejects_equal_those_of_the_media(images, image_shards):
    source = open_source(image_shards, modalities=("image",))
    assert isinstance(source, ShardSource) and isinstance(open_source(images, modalities=("image",)), MediaSource)
    assert_equal_sources(source, MediaSource(images, modalities=("image",)))
    for row in BAD:
        with pytest.raises(Reject, match="not_decodable"):
            source.clip(row)
        assert source.id(row) == f"id-{row}"


@pytest.mark.parametrize("rows_per_shard", [1, 7, 100])
def test_the_size_of_shards_changes_nothing(tmp_path, images, rows_per_shard):
    data_set, rejects = preprocess(images, tmp_path / "s", modalities=("image",), rows_per_shard=rows_per_shard)
    assert_equal_sources(ShardSource(data_set, modalities=("image",)), MediaSource(images, modalities=("image",)))
    assert [r["id"] for r in rejects] == ["id-2", "id-6"]
    assert set(rejects[0]) == {"id", "source", "reason", "detail"}


@pytest.fixture(scope="module")
def videos(tmp_path_factory, write_manifest, write_video, make_data_set) -> DataSetSpec:
    """Three videos, the second without a sound track."""
    folder = tmp_path_factory.mktemp("videos")
    for number, sound_hz in enumerate((500, None, 2000)):
        write_video(folder / f"{number}.mp4", sound_hz=sound_hz, num_frames=18)
    return make_data_set(
        write_manifest(folder / "m.parquet", [{"id": f"id-{i}", "video": f"{i}.mp4"} for i in range(3)])
    )


@pytest.fixture(scope="module")
def video_shards(tmp_path_factory, videos) -> DataSetSpec:
    return preprocess(videos, tmp_path_factory.mktemp("shards") / "videos", modalities=("video", "audio"))[0]


def test_video_and_sound(videos, video_shards):
    both = ("video", "audio")
    assert_equal_sources(ShardSource(video_shards, modalities=both), MediaSource(videos, modalities=both))


def test_a_task_on_frames_sees_the_videos_without_sound(videos, video_shards):
    """The shards hold frames and sound for other tasks too; a task on frames alone has the same samples."""
    only = ("video",)
    assert_equal_sources(ShardSource(video_shards, modalities=only), MediaSource(videos, modalities=only))


def test_arrays_are_mapped_not_copied(image_shards):
    image = ShardSource(image_shards, modalities=("image",)).clip(0).media["image"]
    assert not image.flags.owndata and isinstance(image.base.base, pa.Buffer)


def test_words_that_cannot_be_used_are_rejected_alike(
    tmp_path, write_raw_manifest, make_data_set, make_task, tokenizer
):
    """Empty, a megabyte, not UTF-8: text and labels reach a task through shards as they do from the manifest."""
    Image.new("RGB", (32, 32)).save(tmp_path / "0.png")
    texts = [[b"a cat"], [b"caf\xe9"], [b"\xff", b"a cat"], [], None, [None], [b" "], [b"x" * 1_000_000]]
    labels = [[b"red"], [b"red"], [b"\xe9"], [b"red"], [b"red", None, b"\xe9"], [], [b""], None]
    rows = [
        {"id": f"{i}-".encode() + b"\xe9", "image": b"0.png", "text": text, "labels": label}
        for i, (text, label) in enumerate(zip(texts, labels, strict=True))
    ]
    media = make_data_set(write_raw_manifest(tmp_path / "m.parquet", rows), classes=("red",))
    shards, rejects = preprocess(media, tmp_path / "shards", modalities=("image",))
    assert rejects == []
    captions = make_task(objective="nce", modalities=("image", "text"), text_length=8)
    prompts = dataclasses.replace(captions, text="labels", positives="labels")

    def outcomes(source, task) -> list:
        maker = SampleMaker(task, media, tokenizer=tokenizer, tokens=TokenSpec())
        found = []
        for row in range(source.num_rows):
            try:
                arrays = maker.arrays(source.clip(row), View(task.variants[0], rng=np.random.default_rng(row)))
                found.append((source.id(row), arrays["text/tokens"].tolist(), arrays["positive_ids"].tolist()))
            except Reject as e:
                found.append((source.id(row), e.reason, e.detail))
        return found

    sources = [MediaSource(media, modalities=("image",)), ShardSource(shards, modalities=("image",))]
    wanted = {captions: (1, "bad_text"), prompts: (2, "bad_text")}
    for task, (row, reason) in wanted.items():
        one, other = (outcomes(source, task) for source in sources)
        assert one == other and one[row][:2] == (f"{row}-\\xe9", reason)
    reasons = [o[1] if isinstance(o[1], str) else None for o in outcomes(sources[1], captions)]
    assert reasons == [None, "bad_text", None, "no_text", "no_text", "no_text", "no_text", "text_too_long"]
    reasons = [o[1] if isinstance(o[1], str) else None for o in outcomes(sources[1], prompts)]
    assert reasons == [None, None, "bad_text", None, None, "no_label", "no_label", "no_label"]


def test_decode_settings_name_what_clips_depend_on(make_data_set):
    assert decode_settings(make_data_set(audio=AudioSpec())) == {
        "image": [32, "pillow", 100_000_000, 256 << 20],
        "video": [8.0, 32, 8, "pyav", 4096**2, 8 << 30, 14_400.0, 1_000_000],
        # One spectrogram, starting with any frame of a second of video.
        "audio": [16_000, 131_072 + 16_000, "soundfile", 8 << 30, 14_400.0],
    }
    audiomae = make_data_set(audio=AUDIO_PRESETS["audiomae"])
    assert decode_settings(audiomae)["audio"][:2] == [16_000, 1023 * 160 + 400 + 16_000]


@pytest.mark.parametrize(
    ("modality", "change"),
    [
        ("image", {"image": ImageSpec(short_side=48)}),
        ("video", {"video": VideoSpec(fps=12.0, short_side=32, max_frames=8)}),
        ("audio", {"audio": AudioSpec(num_frames=64)}),
        ("audio", {"audio": AUDIO_PRESETS["audiomae"]}),
    ],
)
def test_other_settings_are_refused(image_shards, video_shards, modality, change):
    shards = image_shards if modality == "image" else video_shards
    changed = dataclasses.replace(shards, **change)
    with pytest.raises(RequestError, match=rf"data_sets\.toy\.{modality}: the shards in .+ were made with \[.+says \["):
        ShardSource(changed, modalities=(modality,))


def test_settings_that_clips_do_not_depend_on_may_change(video_shards):
    transform = {"fft_length": 512, "window": "symmetric", "power": 2, "mel_scale": "htk", "preemphasis": 0.97}
    audio = dataclasses.replace(video_shards.audio, mean=-4.0, std=2.0, num_mels=16, **transform)
    changed = dataclasses.replace(video_shards, image=ImageSpec(short_side=99), audio=audio)
    assert ShardSource(changed, modalities=("video", "audio")).num_rows == 3


def test_a_modality_that_was_not_preprocessed(image_shards):
    with pytest.raises(RequestError, match=r"expected audio, video in .+, found only image; run .+ again"):
        ShardSource(image_shards, modalities=("image", "video", "audio"))


def test_preprocessing_that_did_not_finish(tmp_path):
    with pytest.raises(RequestError, match=r"expected index\.json; let python jobs/preprocess\.py finish first"):
        read_index(tmp_path)
    (tmp_path / "index.json").write_text('{"shards": [')
    with pytest.raises(RequestError, match=r"index\.json cannot be read"):
        read_index(tmp_path)


@pytest.mark.parametrize("damage", ["truncate", "remove"])
def test_a_damaged_shard_stops_the_run(tmp_path, images, damage):
    data_set, _ = preprocess(images, tmp_path / "s", modalities=("image",))
    path = tmp_path / "s" / "shard-00001.arrow"
    if damage == "truncate":
        path.write_bytes(path.read_bytes()[:-1])
    else:
        path.unlink()
    source = ShardSource(data_set, modalities=("image",))
    assert source.clip(0).id == "id-0"
    with pytest.raises(DataError, match=r"shard-00001\.arrow: expected \d+ bytes, found another size"):
        source.clip(3)


def test_a_shard_is_whole_or_absent(tmp_path, images):
    table, _ = encode_rows(MediaSource(images, modalities=("image",)), range(3))
    entry = write_shard(table, tmp_path / "shard-00000.arrow")
    assert [p.name for p in tmp_path.iterdir()] == ["shard-00000.arrow"]
    assert entry["rows"] == 3 and entry["bytes"] == (tmp_path / "shard-00000.arrow").stat().st_size
    assert len(entry["sha256"]) == 64 and write_shard(table, tmp_path / "again.arrow")["sha256"] == entry["sha256"]


def test_one_flipped_bit_is_found(tmp_path, images):
    preprocess(images, tmp_path / "s", modalities=("image",))
    assert damaged_shards(tmp_path / "s") == []
    path = tmp_path / "s" / "shard-00001.arrow"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    assert damaged_shards(tmp_path / "s") == ["shard-00001.arrow"]


@pytest.mark.parametrize("change", ["another shard", "other order", "noise"])
def test_a_shard_that_is_not_the_listed_one_stops_the_run(tmp_path, images, change):
    """As when a folder was put together from two runs of preprocessing: equal sizes, other rows."""
    data_set, _ = preprocess(images, tmp_path / "s", modalities=("image",))
    first, second = (tmp_path / "s" / f"shard-0000{n}.arrow" for n in (0, 1))
    if change == "another shard":
        second.write_bytes(first.read_bytes())
    elif change == "other order":
        table, _ = encode_rows(MediaSource(images, modalities=("image",)), range(3, 6))
        write_shard(table.take([1, 0, 2]), second)
    else:
        second.write_bytes(bytes(second.stat().st_size))
    index = read_index(tmp_path / "s")
    entries = [entry | {"rejects": []} for entry in ShardEntries(tmp_path / "s", index)]
    entries[1]["bytes"] = second.stat().st_size
    write_index(tmp_path / "s", index, entries)
    source = ShardSource(data_set, modalities=("image",))
    assert source.id(0) == "id-0"
    with pytest.raises(DataError, match=r"shard-00001\.arrow: .+ preprocess it again"):
        source.id(3)


def test_a_row_costs_no_look_at_the_others_of_its_shard(tmp_path, images, monkeypatch):
    data_set, _ = preprocess(images, tmp_path / "s", modalities=("image",), rows_per_shard=NUM_ROWS)
    read, open_file = [], pa.ipc.open_file

    class Counted:
        def __init__(self, source):
            self._reader = open_file(source)
            self.schema = self._reader.schema

        def read_all(self):
            return self._reader.read_all()

        def get_batch(self, number):
            read.append(number)
            return self._reader.get_batch(number)

    monkeypatch.setattr(pa.ipc, "open_file", Counted)
    assert ShardSource(data_set, modalities=("image",)).id(5) == "id-5" and read == [5]


def test_shards_of_an_older_form_are_refused(tmp_path):
    (tmp_path / "index.json").write_text('{"format": 1}')
    with pytest.raises(RequestError, match=r"expected format 4, found 1; run .+ into another folder"):
        read_index(tmp_path)


def test_the_index_is_mapped_and_rejects_are_beside_it(tmp_path, images):
    data_set, rejects = preprocess(images, tmp_path / "s", modalities=("image",))
    index = read_index(tmp_path / "s")
    entries = ShardEntries(tmp_path / "s", index)
    assert len(entries) == 3 and entries.starts.tolist() == [0, 3, 6, 7] and "shards" not in index
    lines = (tmp_path / "s" / "rejects.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == rejects
    path = tmp_path / "s" / "shards.arrow"
    content = bytearray(path.read_bytes())
    content[content.index(b"shard-00001")] ^= 1
    path.write_bytes(bytes(content))
    assert damaged_shards(tmp_path / "s") == ["shards.arrow"]
    path.write_bytes(bytes(content)[:100])
    with pytest.raises(RequestError, match=r"shards\.arrow: cannot be read: .*; run .* again"):
        ShardSource(data_set, modalities=("image",))


def test_shards_whose_entries_are_in_json_are_read_and_their_job_goes_on(tmp_path, images):
    """As an earlier version wrote them."""
    data_set, _ = preprocess(images, tmp_path / "s", modalities=("image",))
    index = read_index(tmp_path / "s")
    entries = list(ShardEntries(tmp_path / "s", index))
    before = {key: index[key] for key in ("fingerprint", "modalities", "settings")} | {"format": 3}
    (tmp_path / "s" / "shards.arrow").unlink()
    (tmp_path / "s" / "index.json").write_text(json.dumps(before | {"shards": entries, "rejects": []}))
    assert_equal_sources(ShardSource(data_set, modalities=("image",)), MediaSource(images, modalities=("image",)))
    assert damaged_shards(tmp_path / "s") == []
    assert same_shards(before, before | {"format": FORMAT}) and not same_shards(before | {"format": 2}, before)
