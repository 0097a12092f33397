"""Embeddings equal the export's own to the bit, whole whatever is killed, with a line for every wrong request."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.cli import main
from pipeline.embed import folder as folders
from pipeline.embed.decoding import in_order
from pipeline.embed.inputs import NamedInput, open_inputs
from pipeline.embed.job import Request, embed
from pipeline.embed.listing import write_listing
from pipeline.errors import DataError, RequestError

# Each item goes through decoding and the model several times.
pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[3]
ARGUMENTS = {"image": "images", "video": "videos", "audio": "audio", "text": "texts"}
SPACES = ["audio_vision", "text_vision"]


@pytest.mark.parametrize(
    ("modality", "data_set", "spaces"),
    [
        ("image", "digits", ["text_vision"]),
        ("video", "moving", SPACES),
        ("audio", "moving", ["audio_vision"]),
    ],
)
def test_vectors_are_those_of_the_export_to_the_bit(held_out, encoder, read_items, modality, data_set, spaces):
    items = [row for row in read_items(held_out) if row["modality"] == modality]
    assert len(items) == 10 and all(row["prepared_as"] == data_set and row["reject"] is None for row in items)
    assert [space for space in SPACES if items[0][space] is not None] == spaces
    for space in spaces:
        given = {ARGUMENTS[modality]: [row["source"] for row in items]}
        expected = encoder.embed(**given, space=space, data_set=data_set)[ARGUMENTS[modality]]
        np.testing.assert_array_equal(np.array([row[space] for row in items], np.float32), expected)


def test_texts_are_embedded_as_their_own_data_set_cuts_them(held_out, encoder, read_items):
    texts = [row for row in read_items(held_out) if row["modality"] == "text"]
    assert {row["prepared_as"] for row in texts} == {"moving"} and len(texts) > 10
    values = [row["source"] for row in texts]
    expected = encoder.embed(texts=values, space="text_vision", data_set="moving")["texts"]
    np.testing.assert_array_equal(np.array([row["text_vision"] for row in texts], np.float32), expected)


def test_a_folder_of_any_files_becomes_items_and_rejects_with_their_reasons(
    exported, media, tmp_path, read_items, capsys
):
    folder = media(tmp_path / "media")
    embed(Request(run=exported, out=folder / "out", inputs=(str(folder),)))
    items = read_items(folder / "out")
    found = {(row["id"], row["modality"]): row["reject"] for row in items}
    assert len(found) == len(items) == 5 + 1 + 2 * 2 + 2
    assert found["broken.png", "image"] == "not_decodable" and found["empty.txt", "text"] == "no_text"
    assert found["a digit.txt", "text"] is None
    assert sum(name.startswith("more/") for name, _ in found) == 4
    rejected = [row for row in items if row["reject"]]
    assert len(rejected) == 2 and all(row["detail"] and row["text_vision"] is None for row in rejected)
    (folder / "later.txt").write_text("later")
    embed(Request(run=exported, out=folder / "out", inputs=(str(folder),)))
    assert "embed files added since into another --out" in capsys.readouterr().out


def test_parts_and_their_size_change_no_bit(exported, held_out, toy_corpus, tmp_path, read_items, monkeypatch):
    monkeypatch.setattr(folders, "ROWS_PER_PART", 3)
    manifest = toy_corpus / "moving_digits/held_out.parquet"
    for index in (1, 0):
        embed(Request(run=exported, out=tmp_path, inputs=(str(manifest),), data_sets=("moving",), shard=(index, 2)))
    assert len(folders.parts(tmp_path)) == 4
    assert read_items(tmp_path) == [row for row in read_items(held_out) if row["prepared_as"] == "moving"]


def test_features_and_clips_are_those_of_the_export(exported, encoder, held_out, toy_corpus, tmp_path, read_items):
    manifest = toy_corpus / "moving_digits/held_out.parquet"
    embed(Request(run=exported, out=tmp_path, inputs=(str(manifest),), clips=2, features=True))
    items = [row for row in read_items(tmp_path) if row["modality"] == "video"]
    for space in ("features", "text_vision"):
        paths = [row["source"] for row in items]
        expected = encoder.embed(videos=paths, space=space, clips=2)["videos"]
        np.testing.assert_array_equal(np.array([row[space] for row in items], np.float32), expected)


@pytest.mark.slow
def test_a_job_that_is_killed_again_and_again_loses_and_doubles_no_row(
    exported, toy_corpus, tmp_path, read_items, capsys
):
    """Kills at any moment of the work, each after one more part: the parts in the end are those of a whole job."""
    rows = pq.read_table(toy_corpus / "digits/held_out.parquet").to_pylist()
    many = [
        {"id": f"{i}", "image": str(toy_corpus / "digits" / rows[i % len(rows)]["image"])}
        for i in range(4 * folders.ROWS_PER_PART + 7)
    ]
    manifest = tmp_path / "many.parquet"
    pq.write_table(pa.Table.from_pylist(many), manifest)
    command = [sys.executable, str(ROOT / "jobs/embed.py"), "--run", str(exported), "--input", str(manifest)]
    out = tmp_path / "killed"
    for kill in range(2):
        job = subprocess.Popen([*command, "--out", str(out)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while job.poll() is None and len(folders.parts(out)) <= kill:
            time.sleep(0.005)
        os.kill(job.pid, signal.SIGKILL)
        job.wait()
        assert 0 < len(folders.parts(out)) < 5
    assert main(["embed", *command[2:], "--out", str(out)]) == 0 and "rows/s" in capsys.readouterr().out
    assert [row["id"] for row in read_items(out)] == [row["id"] for row in many]
    vectors = np.array([row["text_vision"] for row in read_items(out)], np.float32)
    np.testing.assert_array_equal(vectors, vectors[np.arange(len(many)) % len(rows)])
    assert main(["embed", *command[2:], "--out", str(out)]) == 0 and "all parts were there" in capsys.readouterr().out


def test_decoding_runs_ahead_in_order_and_no_further_than_its_bounds():
    started = []

    def make(number: int) -> int:
        started.append(number)
        return number

    found = in_order(iter(range(100)), make, lambda _: 512 << 20, threads=2)
    assert next(found) == 0
    # Each result takes all the bytes that may be ahead: only the threads' own are in the making, and stay so.
    time.sleep(0.1)
    assert len(started) <= 4
    assert [*found] == list(range(1, 100)) and sorted(started) == list(range(100))


def test_a_listing_is_bounded_by_pieces_and_knows_no_order_of_creation(tmp_path, monkeypatch):
    monkeypatch.setattr("pipeline.embed.listing._SORTED_AT_ONCE", 2)
    monkeypatch.setattr("pipeline.embed.listing._ROWS_AT_ONCE", 2)
    for name in ("b.png", "a.PNG", "c.wav", "sub/d.mp4", "sub/deep/e.txt"):
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / name).write_text("x")
    counts = write_listing(str(tmp_path / "in"), tmp_path / "list.parquet", leave_out=tmp_path / "out")
    assert counts == {"image": 2, "video": 1, "audio": 1, "text": 1}
    rows = pq.read_table(tmp_path / "list.parquet").to_pylist()
    assert {row["id"] for row in rows} == {"b.png", "a.PNG", "c.wav", "sub/d.mp4", "sub/deep/e.txt"}
    assert [row["id"] for row in rows][-1] == "sub/deep/e.txt" and rows[-1]["text"] == ["x"]


def _fails(capsys, *arguments: str) -> str:
    assert main(list(arguments)) == 2
    # A slow machine says what it waits for.
    (line,) = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("waiting for")]
    assert line.startswith("error: ")
    return line


def test_wrong_requests_are_one_line_and_exit_2(exported, media, tmp_path, capsys):
    out, empty = ("--out", str(tmp_path / "out")), tmp_path / "empty"
    empty.mkdir()
    (empty / "notes.csv").write_text("1")
    run = ("embed", "--run", str(exported))
    assert "expected a run directory" in _fails(capsys, "embed", "--run", str(tmp_path / "no"), *out)
    assert "names no held-out sets" in _fails(capsys, *run, *out)
    assert "expected images, videos" in _fails(capsys, *run, *out, "--input", str(empty))
    assert "found another file" in _fails(capsys, *run, *out, "--input", str(empty / "notes.csv"))
    assert "found nothing there" in _fails(capsys, *run, *out, "--input", str(tmp_path / "nowhere"))
    folder = media(tmp_path / "media")
    plain = tmp_path / "plain.parquet"
    pq.write_table(pa.table({"id": ["a"], "text": ["one"]}), plain)
    assert "column 'text': expected a list of strings" in _fails(capsys, *run, *out, "--input", str(plain))
    pq.write_table(pa.table({"id": ["a"], "text": ["one"], "image": ["a.png"]}), plain)
    open_inputs([NamedInput(str(plain))], tmp_path, ("image", "text"))
    assert "column 'text' is left out: expected a list of strings, found string" in capsys.readouterr().err
    assert "no data set pets" in _fails(capsys, *run, *out, "--input", str(folder), "--data-set", "pets")
    damaged = tmp_path / "damaged.parquet"
    damaged.write_bytes(b"PAR1 not really")
    assert "expected a Parquet file" in _fails(capsys, *run, *out, "--input", str(damaged))


def test_a_damaged_export_and_another_request_for_a_folder_are_one_line(exported, held_out, run_dir, tmp_path, capsys):
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(exported, copy)
    (copy / "model.safetensors").write_bytes(b"short")
    line = _fails(capsys, "embed", "--run", str(copy), "--input", str(tmp_path), "--out", str(tmp_path / "out"))
    assert "bytes that were exported" in line
    line = _fails(capsys, "embed", "--run", str(run_dir), "--out", str(held_out), "--clips", "2")
    assert "of another request (clips differ)" in line


def test_a_folder_whose_files_all_fail_is_a_failure_with_every_reject_stored(exported, tmp_path, read_items):
    (tmp_path / "in").mkdir()
    (tmp_path / "in/a.png").write_bytes(b"no picture")
    with pytest.raises(DataError, match="none of the items"):
        embed(Request(run=exported, out=tmp_path / "out", inputs=(str(tmp_path / "in"),)))
    assert [row["reject"] for row in read_items(tmp_path / "out")] == ["not_decodable"]


def test_data_sets_that_prepare_a_modality_differently_must_be_named(encoder):
    import dataclasses

    from pipeline.embed.preparations import preparations

    (one,) = [i for i in encoder.config.inputs if i.modality == "image" and i.pair]
    other = dataclasses.replace(one, data_set="pets", settings=dataclasses.replace(one.settings, short_side=64))
    both = dataclasses.replace(encoder.config, inputs=(*encoder.config.inputs, other))
    changed = type(encoder)(encoder.model, both, encoder.tokenizer, encoder._modalities)
    with pytest.raises(RequestError, match="digits, pets"):
        preparations(changed, "image", (), ("text_vision",))
    (chosen,) = preparations(changed, "image", ("moving", "pets"), ("text_vision",))
    assert chosen.one == other
