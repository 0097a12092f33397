"""The files of a run: cut back on resume, exact numbers."""

import json
import os
import tracemalloc

import numpy as np
import pytest

from pipeline.train.telemetry import step_log
from pipeline.train.telemetry.step_log import StepLog, cut_back, to_json_values


def steps(path) -> list[int]:
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


def write_lines(path, *lines: str) -> None:
    path.write_text("".join(lines))


def line(step: int) -> str:
    return json.dumps({"step": step, "loss": step / 3}) + "\n"


def test_lines_up_to_the_step_are_kept_as_they_are(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write_lines(path, *(line(s) for s in range(1, 8)))
    before = path.read_text().splitlines()
    cut_back(path, keep_steps=4)
    assert path.read_text().splitlines() == before[:4] and path.read_text().endswith("\n")
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


@pytest.mark.parametrize("torn", ['{"step": 3, "lo', '{"step":', "\0\0\0\0", "[1, 2]\n", '{"loss": 1}\n', "3\n"])
def test_lines_that_are_no_steps_are_dropped(tmp_path, torn):
    path = tmp_path / "metrics.jsonl"
    write_lines(path, line(1), line(2), torn)
    cut_back(path, keep_steps=10)
    assert steps(path) == [1, 2]


def test_a_whole_last_line_without_its_end_is_kept(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write_lines(path, line(1), line(2).rstrip("\n"))
    with_log = StepLog(path, keep_steps=5)
    with_log.write({"step": 3})
    with_log.close()
    assert steps(path) == [1, 2, 3]


def test_bytes_that_are_no_text_are_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(line(1).encode() + b'{"step": 2, "\xff\xfe')
    cut_back(path, keep_steps=5)
    assert steps(path) == [1]


@pytest.mark.parametrize("keep", [0, 1, 500, 2999, 3000, 5000])
@pytest.mark.parametrize("end", [b"", b"\0" * 300_000, b'{"step": 3001, "x', b"\n\n3\n"])
def test_a_long_file_is_cut_at_the_right_line(tmp_path, keep, end):
    """Lines longer and shorter than a block that is read, the file longer than several."""
    path = tmp_path / "samples.jsonl"
    lines = [json.dumps({"step": s, "ids": "i" * (200_000 if s % 1000 == 1 else 300)}) + "\n" for s in range(1, 3001)]
    path.write_bytes("".join(lines).encode() + end)
    assert cut_back(path, keep_steps=keep) == 3000
    assert path.read_text() == "".join(lines[:keep])


def test_cutting_back_reads_the_end_alone(tmp_path):
    """A run of a million steps starts as soon as one of ten: a hole of a gigabyte before the last lines is not read."""
    path = tmp_path / "metrics.jsonl"
    with open(path, "wb") as file:
        file.seek(1 << 30)
        file.write(("\n" + "".join(map(line, range(7, 12)))).encode())
    began = tracemalloc.start() or tracemalloc.get_traced_memory()[0]
    assert cut_back(path, keep_steps=9) == 11
    peak = tracemalloc.get_traced_memory()[1] - began
    tracemalloc.stop()
    assert peak < 1 << 20 and path.stat().st_size == (1 << 30) + 1 + sum(len(line(s)) for s in (7, 8, 9))


def test_no_file_is_no_error(tmp_path):
    cut_back(tmp_path / "none.jsonl", keep_steps=5)
    assert not list(tmp_path.iterdir())


def test_after_a_resume_each_step_stands_once(tmp_path):
    path = tmp_path / "metrics.jsonl"
    first = StepLog(path, keep_steps=0)
    for step in range(1, 8):
        first.write({"step": step, "run": 1})
    first.close()
    second = StepLog(path, keep_steps=5)
    for step in range(6, 10):
        second.write({"step": step, "run": 2})
    second.close()
    assert steps(path) == list(range(1, 10))
    assert [json.loads(text)["run"] for text in path.read_text().splitlines()] == [1] * 5 + [2] * 4
    assert (first.last_step, second.last_step) == (0, 7)


def test_a_new_run_starts_with_nothing(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write_lines(path, line(1))
    StepLog(path, keep_steps=0).close()
    assert path.read_text() == ""


def test_a_line_is_there_for_a_reader_at_once(tmp_path):
    log = StepLog(tmp_path / "metrics.jsonl", keep_steps=0)
    log.write({"step": 1})
    assert steps(tmp_path / "metrics.jsonl") == [1]
    log.close()


def test_sync_reaches_the_disk(tmp_path, monkeypatch):
    synced = []
    log = StepLog(tmp_path / "metrics.jsonl", keep_steps=0)
    monkeypatch.setattr(step_log.os, "fsync", lambda fd: synced.append(os.fstat(fd).st_size))
    log.write({"step": 1})
    log.sync()
    log.close()
    assert synced == [len('{"step": 1}\n')]


# --- numbers ---


@pytest.mark.parametrize("value", [0.1, 1 / 3, 1e-45, 3.4e38, -0.0, 2.3025851])
def test_single_float32_come_back_bit_for_bit(value):
    exact = np.float32(value)
    back = np.float32(json.loads(json.dumps(to_json_values(exact))))
    assert back.tobytes() == exact.tobytes()


def test_plain_values():
    import jax.numpy as jnp

    found = to_json_values(
        {"loss": jnp.float32(0.1), "load": np.array([1 / 3, 2.0], np.float32), "moe": {"n": np.int32(3)}}
    )
    assert found == {"loss": float(np.float32(0.1)), "load": [0.3333333, 2.0], "moe": {"n": 3}}
    assert to_json_values(np.array([[1 / 3, 2.0], [0.5, 1.0]])) == [[0.3333333, 2.0], [0.5, 1.0]]
    assert type(found["moe"]["n"]) is int and to_json_values(np.bool_(True)) is True
    json.dumps(found)
