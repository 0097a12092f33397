"""The demo corpus at 24 rows a set: what its rows promise is in its files."""

import os
import shutil
import threading

import av
import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipeline.data import demo
from pipeline.data.demo import digits, emoji, moving, sound
from pipeline.errors import RequestError

LIMIT = 24
SPLITS = {
    "digits": ("train", "held_out"),
    "emoji": ("train", "held_out_siblings", "held_out_unseen"),
    "moving_digits": ("train", "held_out"),
}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return demo.build(tmp_path_factory.mktemp("demo"), num_processes=2, progress=False, limit=LIMIT)


@pytest.fixture
def own_corpus(corpus, tmp_path):
    return shutil.copytree(corpus, tmp_path / "corpus")


def build(root):
    return demo.build(root, num_processes=1, progress=False, limit=LIMIT)


def rows(corpus, name, split):
    return pq.read_table(corpus / name / f"{split}.parquet").to_pylist()


def all_rows(corpus, name):
    return [row for split in SPLITS[name] for row in rows(corpus, name, split)]


def times(root):
    return {path: path.stat().st_mtime_ns for path in root.rglob("*") if path.is_file() and path.name != ".lock"}


def decode(path):
    """Grey frames (T, H, W), the frames' times in seconds, and the waveform."""
    with av.open(str(path)) as container:
        frames = list(container.decode(video=0))
    with av.open(str(path)) as container:
        assert container.streams.audio[0].rate == sound.SAMPLE_RATE_HZ
        wave = np.concatenate([frame.to_ndarray()[0] for frame in container.decode(audio=0)])
    pictures = np.stack([frame.to_ndarray(format="gray") for frame in frames])
    return pictures, [float(frame.time) for frame in frames], wave


@pytest.mark.parametrize(
    ("name", "columns"),
    [
        ("digits", ["id", "image", "text", "labels", "source_digit"]),
        ("emoji", ["id", "image", "text", "labels", "family"]),
        ("moving_digits", ["id", "video", "text", "labels", "source_digit"]),
    ],
)
def test_manifests_have_their_columns_unique_ids_and_files(corpus, name, columns):
    for split in SPLITS[name]:
        schema = pq.read_schema(corpus / name / f"{split}.parquet")
        assert schema.names == columns
        assert str(schema.field("text").type) == str(schema.field("labels").type) == "list<element: string>"
    found = all_rows(corpus, name)
    # Rounded in each split.
    assert abs(len(found) - LIMIT) <= 1
    assert len({row["id"] for row in found}) == len(found)
    assert all((corpus / name / row[columns[1]]).is_file() for row in found)


def test_digits_and_moving_digits_share_a_split_by_source_digit(corpus):
    sources = {
        name: {split: {row["source_digit"] for row in rows(corpus, name, split)} for split in SPLITS[name]}
        for name in ("digits", "moving_digits")
    }
    assert sources["digits"] == sources["moving_digits"]
    assert sources["digits"]["train"].isdisjoint(sources["digits"]["held_out"])


def test_digit_images_are_light_on_their_ground(corpus):
    for row in all_rows(corpus, "digits"):
        image = np.asarray(Image.open(corpus / "digits" / row["image"]))
        assert image.shape == (64, 64) and image.dtype == np.uint8
        assert (image[:12] == digits.BACKGROUND).all() and image.max() > 200
        assert row["text"] == [] and row["labels"][0] in digits.NAMES


def test_emoji_images_are_drawings_on_grey(corpus):
    for row in all_rows(corpus, "emoji"):
        image = np.asarray(Image.open(corpus / "emoji" / row["image"]).convert("RGB"))
        assert image.shape == (128, 128, 3)
        assert (image[0, 0] == 160).all() and image.min() < 128
        assert row["labels"] == [] and row["text"]


def test_limited_emojis_keep_siblings_of_the_held_out(corpus):
    train = {emoji.look_of(row["text"][0]) for row in rows(corpus, "emoji", "train")}
    assert {emoji.look_of(row["text"][0]) for row in rows(corpus, "emoji", "held_out_siblings")} <= train


def test_videos_have_their_frames_times_and_sound(corpus):
    for row in all_rows(corpus, "moving_digits"):
        pictures, seconds, wave = decode(corpus / "moving_digits" / row["video"])
        assert pictures.shape == (34, 64, 64)
        np.testing.assert_allclose(seconds, np.arange(34) / 16, atol=1e-6)
        # The last AAC frame may be filled up.
        assert 34_000 <= len(wave) <= 35_024
        assert np.sqrt((wave**2).mean()) > 0.01


@pytest.mark.parametrize("place", range(8))
def test_digit_moves_in_its_labelled_direction(corpus, place):
    row = all_rows(corpus, "moving_digits")[place]
    pictures = decode(corpus / "moving_digits" / row["video"])[0].astype(float)
    spectra = np.fft.fft2(pictures - pictures.mean((1, 2), keepdims=True))
    correlation = np.fft.ifft2(spectra[1:] * spectra[:-1].conj()).real
    best = correlation.reshape(33, -1).argmax(1)
    shifts = (np.stack(np.unravel_index(best, (64, 64)), 1) + 32) % 64 - 32
    along = shifts @ np.array(moving.DIRECTIONS[row["labels"][1]])
    restarts = along < 0
    assert 1.5 <= along[~restarts].mean() <= 2.6 and along[~restarts].min() >= 1
    # A whole way of 24 pixels, less the step of that frame; 34 frames hold two to four ways.
    assert 1 <= restarts.sum() <= 4 and (np.abs(along[restarts] + 22) <= 1).all()
    assert np.abs(shifts).sum() == np.abs(along).sum(), "no movement across the direction"


def test_captions_name_digit_and_direction(corpus):
    for row in all_rows(corpus, "moving_digits"):
        assert len(set(row["text"])) == 3
        for caption in row["text"]:
            assert set(row["labels"]) <= set(caption.split())


def test_second_build_changes_nothing(own_corpus):
    before = times(own_corpus)
    build(own_corpus)
    assert times(own_corpus) == before


def test_build_writes_only_what_is_missing(own_corpus):
    video = own_corpus / "moving_digits" / rows(own_corpus, "moving_digits", "train")[0]["video"]
    content = video.read_bytes()
    video.unlink()
    (own_corpus / "complete.json").unlink()
    half_written = own_corpus / "digits" / "images" / ".0000.png.1.partial"
    half_written.write_bytes(b"half")
    before = times(own_corpus)
    build(own_corpus)
    after = times(own_corpus)
    assert video.read_bytes() == content
    assert set(after) - set(before) == {video, own_corpus / "complete.json"}
    assert not half_written.exists()
    assert all(after[path] == when for path, when in before.items() if path in after)


def test_damaged_manifest_is_rebuilt(own_corpus):
    manifest = own_corpus / "digits" / "train.parquet"
    content = manifest.read_bytes()
    manifest.write_bytes(content[:100])
    build(own_corpus)
    assert manifest.read_bytes() == content


def test_manifests_and_media_are_the_same_in_another_build(corpus, tmp_path):
    other = demo.build(tmp_path, num_processes=1, progress=False, limit=LIMIT)
    for path in corpus.rglob("*.*"):
        if path.is_file():
            assert (other / path.relative_to(corpus)).read_bytes() == path.read_bytes(), path


def test_builds_of_the_same_folder_wait_for_each_other(own_corpus, monkeypatch):
    (own_corpus / "complete.json").unlink()
    at_work, most = [], []
    inner = demo._build

    def watched(*args, **options):
        at_work.append(1)
        most.append(len(at_work))
        inner(*args, **options)
        at_work.pop()

    monkeypatch.setattr(demo, "_build", watched)
    threads = [threading.Thread(target=build, args=(own_corpus,)) for _ in range(3)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert most == [1]


def test_failure_in_a_worker_names_the_file(tmp_path, monkeypatch):
    monkeypatch.setattr(emoji, "load", lambda: {tmp_path / "1F600.svg": ["grinning face"]})
    with pytest.raises(RuntimeError, match=r"could not build emoji/images/1F600\.png"):
        build(tmp_path)


def test_missing_package_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "find_spec", lambda name: None if name == "resvg_py" else object())
    with pytest.raises(ImportError, match=r"resvg_py: run pip install 'imp-pretrain\[demo\]'"):
        build(tmp_path)


def test_a_cache_that_cannot_be_written_is_named(tmp_path, monkeypatch):
    (tmp_path / "cache").write_text("no folder")
    monkeypatch.setenv("IMP_CACHE", str(tmp_path / "cache"))
    with pytest.raises(
        RequestError, match=r"IMP_CACHE: the demo corpus in .*cache/demo-v\d+: expected a folder that can"
    ):
        build(demo.cache_dir())


def test_other_version_is_refused(tmp_path):
    (tmp_path / "version.txt").write_text("0\n")
    with pytest.raises(ValueError, match="holds version 0"):
        build(tmp_path)


def test_plain_output_is_a_line_for_each_set(own_corpus, capsys):
    os.remove(own_corpus / "complete.json")
    demo.build(own_corpus, num_processes=1, limit=LIMIT)
    assert [line.split(": ")[1] for line in capsys.readouterr().out.splitlines()] == list(SPLITS)


def test_cache_dir_follows_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("IMP_CACHE", str(tmp_path))
    assert demo.cache_dir() == tmp_path / f"demo-v{demo.VERSION}"
    monkeypatch.delenv("IMP_CACHE")
    assert demo.cache_dir().parts[-3:] == (".cache", "imp", f"demo-v{demo.VERSION}")
