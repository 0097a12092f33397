"""The journal of rejects: written before it is used, read after a kill, and the limit that stops a run."""

import dataclasses
import json
import os

import pyarrow.parquet as pq
import pytest

from pipeline.data.plan import Row
from pipeline.errors import DataError
from pipeline.train import quarantine
from pipeline.train.quarantine import Quarantine, known_bad, read_journal
from pipeline.train.quarantine_table import write_table


def reject(sample_id: str, data_set: str = "pets", **fields) -> dict:
    defaults = {"source": f"/media/{sample_id}.png", "reason": "not_decodable", "detail": "torn"}
    return {"id": sample_id, "data_set": data_set} | defaults | fields


def row(*rejects: dict, drawn: int = 4, task: str = "pet_text") -> Row:
    return Row(task, 0, 0, "v", [f"good-{i}" for i in range(drawn)], list(rejects), {})


def journal(run_dir, rank: int = 0, **limits: float) -> Quarantine:
    return Quarantine(run_dir, rank=rank, limits=limits or {"pets": 0.5})


def lines(run_dir, rank: int = 0) -> list[str]:
    path = run_dir / "quarantine" / f"rank-{rank}.jsonl"
    return path.read_text().splitlines() if path.exists() else []


def test_a_reject_is_on_disk_when_record_returns(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(quarantine.os, "fsync", lambda fd: synced.append(os.fstat(fd).st_size))
    journal(tmp_path).record(row(reject("a"), reject("b")), step=7, data_set="pets")
    found = [json.loads(line) for line in lines(tmp_path)]
    assert found == [reject("a") | {"task": "pet_text", "step": 7}, reject("b") | {"task": "pet_text", "step": 7}]
    assert synced == [(tmp_path / "quarantine" / "rank-0.jsonl").stat().st_size]


def test_nothing_is_written_without_rejects(tmp_path):
    journal(tmp_path).record(row(), step=0, data_set="pets")
    assert not (tmp_path / "quarantine").exists() and read_journal(tmp_path) == [] and known_bad(tmp_path) == {}


def test_a_reject_is_listed_once(tmp_path):
    first = journal(tmp_path)
    first.record(row(reject("a")), step=1, data_set="pets")
    first.record(row(reject("a"), reject("b")), step=2, data_set="pets")
    journal(tmp_path).record(row(reject("b"), reject("a")), step=3, data_set="pets")
    assert [json.loads(line)["id"] for line in lines(tmp_path)] == ["a", "b"]


def test_a_reject_met_twice_in_one_row_is_listed_once(tmp_path):
    journal(tmp_path).record(row(reject("a"), reject("a")), step=1, data_set="pets")
    assert len(lines(tmp_path)) == 1


def test_equal_ids_of_two_tasks_are_two_rejects(tmp_path):
    """What is bad for one task may serve another, also on the same data set."""
    both = journal(tmp_path, pets=0.5, cars=0.5)
    both.record(row(reject("a")), step=1, data_set="pets")
    both.record(dataclasses.replace(row(reject("a", "cars")), task="car_text"), step=2, data_set="cars")
    assert known_bad(tmp_path) == {"pet_text": {"a": reject("a")}, "car_text": {"a": reject("a", "cars")}}


def test_known_bad_is_what_the_streams_had_found(tmp_path):
    rejects = [reject("a", detail="'quotes' ü \u2028 \n end"), reject("b", reason="missing_file")]
    journal(tmp_path).record(row(*rejects), step=1, data_set="pets")
    assert known_bad(tmp_path) == {"pet_text": {r["id"]: r for r in rejects}}


def test_journals_of_all_ranks_are_read(tmp_path):
    for rank, name in enumerate("ab"):
        journal(tmp_path, rank).record(row(reject(name)), step=rank, data_set="pets")
    assert [r["id"] for r in read_journal(tmp_path)] == ["a", "b"]
    journal(tmp_path).record(row(reject("b")), step=3, data_set="pets")
    assert len(lines(tmp_path)) == 1


@pytest.fixture
def torn(tmp_path):
    """A run that was killed while it wrote its second reject."""
    journal(tmp_path).record(row(reject("a"), reject("b")), step=1, data_set="pets")
    path = tmp_path / "quarantine" / "rank-0.jsonl"
    path.write_bytes(path.read_bytes()[:-30])
    return tmp_path


def test_a_torn_last_line_is_ignored(torn):
    assert [r["id"] for r in read_journal(torn)] == ["a"] and set(known_bad(torn)["pet_text"]) == {"a"}


def test_what_follows_a_torn_line_is_not_lost(torn):
    journal(torn).record(row(reject("b"), reject("c")), step=2, data_set="pets")
    assert set(known_bad(torn)["pet_text"]) == {"a", "b", "c"}


# --- the limit ---


def test_too_many_rejects_stop_the_run_with_examples(tmp_path):
    limited = journal(tmp_path, pets=0.1)
    limited.record(row(reject("a"), drawn=179), step=1, data_set="pets")
    with pytest.raises(DataError) as caught:
        limited.record(row(*(reject(f"x{i}") for i in range(25)), drawn=0), step=2, data_set="pets")
    assert str(caught.value) == (
        "data set pets: 26 of 205 samples were bad, more than max_reject_fraction = 0.1. For example: "
        "/media/x0.png (not_decodable); /media/x1.png (not_decodable); /media/x2.png (not_decodable). "
        "Mend the data, or raise max_reject_fraction"
    )
    # What stopped the run is on record too.
    assert len(lines(tmp_path)) == 26


def test_as_many_as_the_limit_are_allowed(tmp_path):
    limited = journal(tmp_path, pets=0.1)
    limited.record(row(*(reject(f"x{i}") for i in range(20)), drawn=180), step=1, data_set="pets")
    assert limited.counts == {"pets": {"drawn": 200, "rejected": 20}}
    with pytest.raises(DataError, match="21 of 201"):
        limited.record(row(reject("y"), drawn=0), step=2, data_set="pets")


def test_a_share_of_few_says_nothing(tmp_path):
    journal(tmp_path, pets=0.0).record(row(*(reject(f"x{i}") for i in range(190)), drawn=9), step=1, data_set="pets")


def test_known_rejects_count_again(tmp_path):
    """A substitute is a substitute, whenever its reason was found: half of what this data set gives is bad."""
    limited = journal(tmp_path, pets=0.4)
    with pytest.raises(DataError, match="100 of 200"):
        for step in range(100):
            limited.record(row(reject("a"), drawn=1), step=step, data_set="pets")


def test_data_sets_are_counted_apart(tmp_path):
    both = journal(tmp_path, pets=0.1, cars=0.1)
    both.record(row(drawn=1000), step=1, data_set="pets")
    with pytest.raises(DataError, match=r"data set cars: 30 of 230 .* a \(no_text\)"):
        both.record(row(*[reject("a", "cars", source="", reason="no_text")] * 30, drawn=200), step=2, data_set="cars")


# --- the table ---


def test_table(tmp_path):
    journal(tmp_path).record(row(reject("a")), step=1, data_set="pets")
    journal(tmp_path, 1).record(row(reject("b")), step=5, data_set="pets")
    table = pq.read_table(write_table(tmp_path))
    assert table.to_pylist() == [
        reject("a") | {"task": "pet_text", "step": 1},
        reject("b") | {"task": "pet_text", "step": 5},
    ]
    assert [p.name for p in tmp_path.iterdir() if p.is_file()] == ["quarantine.parquet"]


def test_table_without_rejects(tmp_path):
    table = pq.read_table(write_table(tmp_path))
    assert table.num_rows == 0 and table.schema.names == [
        "id",
        "data_set",
        "source",
        "reason",
        "detail",
        "task",
        "step",
    ]


def test_table_lists_what_two_ranks_found_once(tmp_path):
    ranks = [journal(tmp_path, rank) for rank in range(2)]
    for rank in ranks:
        rank.record(row(reject("a")), step=1, data_set="pets")
    assert pq.read_table(write_table(tmp_path)).num_rows == 1
