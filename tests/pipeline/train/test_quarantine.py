"""The journal of rejects: written before it is used, and read after a kill."""

import dataclasses
import json
import os
import resource

import pyarrow.parquet as pq
import pytest

from pipeline.data.known_rejects import NONE_KNOWN
from pipeline.data.plan import Row
from pipeline.errors import DataError
from pipeline.report import quarantine_table
from pipeline.report.quarantine_table import write_table
from pipeline.train import quarantine
from pipeline.train.quarantine import Quarantine, journal_files, known_bad, read_journal


def reject(sample_id: str, data_set: str = "pets", **fields) -> dict:
    defaults = {"source": f"/media/{sample_id}.png", "reason": "not_decodable", "detail": "torn"}
    return {"id": sample_id, "data_set": data_set} | defaults | fields


def row(*rejects: dict, drawn: int = 4, task: str = "pet_text") -> Row:
    return Row(task, 0, 0, "v", [f"good-{i}" for i in range(drawn)], list(rejects), {})


def journal(run_dir, rank: int = 0) -> Quarantine:
    return Quarantine(run_dir, rank=rank)


def records(run_dir) -> list[dict]:
    return [record for path in journal_files(run_dir) for _, record in read_journal(path)]


def known(run_dir, task: str = "pet_text") -> set:
    """The ids, among all that these tests use, that the streams of a task are told of."""
    bad = known_bad(run_dir).get(task, NONE_KNOWN)
    found = {name for name in "abcdefxyz" if bad.reason(name)}
    assert len(found) == len(bad)
    return found


def lines(run_dir, rank: int = 0) -> list[str]:
    path = run_dir / "quarantine" / f"rank-{rank}.jsonl"
    return path.read_text().splitlines() if path.exists() else []


def test_a_reject_is_on_disk_when_record_returns(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr("pipeline.store.log.os.fsync", lambda fd: synced.append(os.fstat(fd).st_size))
    journal(tmp_path).record(row(reject("a"), reject("b")), step=7, data_set="pets")
    found = [json.loads(line) for line in lines(tmp_path)]
    assert found == [reject("a") | {"task": "pet_text", "step": 7}, reject("b") | {"task": "pet_text", "step": 7}]
    assert synced == [(tmp_path / "quarantine" / "rank-0.jsonl").stat().st_size]


def test_nothing_is_written_without_rejects(tmp_path):
    journal(tmp_path).record(row(), step=0, data_set="pets")
    assert not (tmp_path / "quarantine").exists() and records(tmp_path) == [] and known_bad(tmp_path) == {}


def test_a_reject_is_listed_once(tmp_path):
    first = journal(tmp_path)
    first.record(row(reject("a")), step=1, data_set="pets")
    first.record(row(reject("a"), reject("b")), step=2, data_set="pets")
    # After a resume the streams say which they were told of.
    known = [reject(name, journalled=True) for name in "ba"]
    journal(tmp_path).record(row(*known), step=3, data_set="pets")
    assert [json.loads(line)["id"] for line in lines(tmp_path)] == ["a", "b"]


def test_a_reject_met_twice_in_one_row_is_listed_once(tmp_path):
    journal(tmp_path).record(row(reject("a"), reject("a")), step=1, data_set="pets")
    assert len(lines(tmp_path)) == 1


def test_equal_ids_of_two_tasks_are_two_rejects(tmp_path):
    """A sample that is bad for one task may serve another, also on the same data set."""
    both = journal(tmp_path)
    both.record(row(reject("a")), step=1, data_set="pets")
    both.record(dataclasses.replace(row(reject("a", "cars")), task="car_text"), step=2, data_set="cars")
    assert set(known_bad(tmp_path)) == {"pet_text", "car_text"}
    assert known(tmp_path) == known(tmp_path, "car_text") == {"a"}


def test_known_bad_is_what_the_streams_had_found(tmp_path):
    odd = "'quotes' \" ü \u2028 \n end"
    rejects = [reject("a", detail=odd), reject("b", reason="missing_file"), reject(odd, reason="too_long"), reject("")]
    journal(tmp_path).record(row(*rejects), step=1, data_set="pets")
    found = known_bad(tmp_path)["pet_text"]
    assert {r["id"]: found.reason(r["id"]) for r in rejects} == {r["id"]: r["reason"] for r in rejects}
    assert len(found) == 4 and found.reason("c") is found.reason((0, 0)) is None


def test_journals_of_all_ranks_are_read(tmp_path):
    for rank, name in enumerate("ab"):
        journal(tmp_path, rank).record(row(reject(name)), step=rank, data_set="pets")
    assert [r["id"] for r in records(tmp_path)] == ["a", "b"]
    assert known(tmp_path) == {"a", "b"}


@pytest.fixture
def torn(tmp_path):
    """A run that was killed while it wrote its second reject."""
    journal(tmp_path).record(row(reject("a"), reject("b")), step=1, data_set="pets")
    path = tmp_path / "quarantine" / "rank-0.jsonl"
    path.write_bytes(path.read_bytes()[:-30])
    return tmp_path


def test_a_torn_last_line_is_ignored(torn):
    assert [r["id"] for r in records(torn)] == ["a"] and known(torn) == {"a"}


def test_what_follows_a_torn_line_is_not_lost(torn):
    journal(torn).record(row(reject("b"), reject("c")), step=2, data_set="pets")
    assert known(torn) == {"a", "b", "c"}


def test_lines_are_read_alike_with_and_without_the_short_cut(tmp_path, monkeypatch):
    """The pattern of a plain line takes nothing that a JSON reader would not, and reads the same in it."""
    whole = json.dumps(reject("a", position=3, attempt=0) | {"task": "pet_text", "step": 7}).encode()
    changes = [b"\x00", b"\x7f", b"\\", b'"', b"0", b"-", b" ", b"\xc3", b"\r", b",", b"}", b"7" * 30]
    damaged = [whole[:i] + c + whole[i + cut :] for i in range(len(whole)) for c in changes for cut in (0, 1)]
    differ = [line for line in damaged if _outcome(line + b"\n") != _outcome(line + b" \n")]
    assert quarantine._PLAIN_LINE.fullmatch(whole + b"\n") and not differ


def _outcome(line: bytes) -> object:
    try:
        return quarantine._known(line)
    except (ValueError, KeyError, TypeError) as e:
        return "damaged" if isinstance(e, ValueError) else type(e)


def test_what_a_rank_remembers_is_bounded(tmp_path, monkeypatch):
    """A reject that was forgotten is listed again, and read once."""
    monkeypatch.setattr(quarantine, "_MAX_WRITTEN", 2)
    small = journal(tmp_path)
    for name in "abcca":
        small.record(row(reject(name)), step=1, data_set="pets")
    assert [json.loads(line)["id"] for line in lines(tmp_path)] == ["a", "b", "c", "a"]
    assert len(small._written) == 2 and known(tmp_path) == set("abc")


def hung(sample_id: str, position: int, attempt: int = 0) -> dict:
    return reject(sample_id, reason="hung", detail="no end", position=position, attempt=attempt)


def test_a_transient_reject_is_listed_for_each_visit_that_found_it(tmp_path):
    first, visits = journal(tmp_path), [hung("a", 3), hung("a", 9), hung("b", 9, 1)]
    first.record(row(*visits), step=1, data_set="pets")
    first.record(row(hung("a", 9)), step=2, data_set="pets")
    assert len(lines(tmp_path)) == 3
    found = known_bad(tmp_path)["pet_text"]
    assert len(found) == 3 and all(found.reason(visit) == "hung" for visit in ((3, 0), (9, 0), (9, 1)))
    assert found.reason("a") is found.reason((3, 1)) is found.reason((1, 9)) is None


def test_a_torn_line_is_cut_off_before_the_next(torn):
    """It may be all of a line but its end: what was not read on resume must not be read by the one after."""
    path = torn / "quarantine" / "rank-0.jsonl"
    path.write_bytes(path.read_bytes().splitlines(keepends=True)[0] + json.dumps(reject("z")).encode())
    journal(torn).record(row(reject("b")), step=2, data_set="pets")
    assert [json.loads(line)["id"] for line in lines(torn)] == ["a", "b"]
    # Whatever the length of the torn line is.
    path.write_bytes(b"x" * 200_000)
    journal(torn).record(row(reject("c")), step=3, data_set="pets")
    assert [json.loads(line)["id"] for line in lines(torn)] == ["c"]


@pytest.mark.parametrize(
    "damage",
    [
        b"\x00" * 40,
        b"\xff\xfe{",
        b"[1, 2]",
        b"{}",
        b'{"id": 3}',
        b"null",
        b"[" * 100_000,
        json.dumps(reject("x") | {"task": "pet_text", "step": "7"}).encode(),
        json.dumps(hung("x", 1) | {"task": "pet_text", "step": 7, "attempt": None}).encode(),
        b"",
    ],
)
def test_damaged_lines_are_named_and_lose_themselves_alone(tmp_path, capsys, damage):
    journal(tmp_path).record(row(reject("a"), reject("b")), step=1, data_set="pets")
    path = tmp_path / "quarantine" / "rank-0.jsonl"
    first, second = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(first + damage + b"\n" + second)
    assert known(tmp_path) == {"a", "b"}
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"warning: {path}: 1 lines are damaged, the first is line 2; ")


def instead_of_the_folder(run_dir):
    (run_dir / "quarantine").write_text("a file")


def instead_of_the_file(run_dir):
    (run_dir / "quarantine" / "rank-0.jsonl").mkdir(parents=True)


@pytest.mark.parametrize("damage", [instead_of_the_folder, instead_of_the_file])
def test_a_journal_that_is_no_file_is_a_fault_of_the_storage(tmp_path, damage):
    damage(tmp_path)
    with pytest.raises(DataError, match=r"journal of rejects, .*quarantine.*, cannot be read: "):
        known_bad(tmp_path)
    with pytest.raises(DataError, match=r"journal of rejects, .*rank-0\.jsonl, cannot be written: "):
        journal(tmp_path).record(row(reject("a")), step=1, data_set="pets")


def test_a_journal_on_a_full_disk_is_a_fault_of_the_storage(tmp_path):
    """No file may grow beyond 400 bytes: the second reject is cut in its middle."""
    full, limits = journal(tmp_path), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (400, limits[1]))
    try:
        full.record(row(reject("a")), step=1, data_set="pets")
        with pytest.raises(DataError, match=r"rank-0\.jsonl, cannot be written: (\[Errno 27\]|only \d+ of \d+ bytes)"):
            full.record(row(reject("b", detail="x" * 300)), step=2, data_set="pets")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert known(tmp_path) == {"a"}
    journal(tmp_path).record(row(reject("c")), step=2, data_set="pets")
    assert known(tmp_path) == {"a", "c"}


# --- what was drawn ---


def test_every_sample_counts_once_whenever_its_reject_was_found(tmp_path):
    """Of a batch of four, one row was met bad twice, one was known before; a substitute was bad too."""
    bad = [reject("a"), reject("a"), reject("c", substitute=True), reject("b", source="", journalled=True)]
    draws = journal(tmp_path).record(row(*bad, drawn=4), step=1, data_set="pets")
    assert draws[:3] == ("pets", 4, 3)
    assert [record["id"] for record in records(tmp_path)] == ["a", "c"] and "substitute" not in lines(tmp_path)[1]
    assert draws.examples == (*["/media/a.png (not_decodable)"] * 2, "b (not_decodable)")
    assert journal(tmp_path).record(row(drawn=4), step=2, data_set="pets") == ("pets", 4, 0, ())


# --- the table ---


def test_the_table_holds_each_reject_once_in_order_of_the_steps(tmp_path, monkeypatch):
    """Whatever the order of journals and lines, a resume's among them, and however many rows are written at once."""
    monkeypatch.setattr(quarantine_table, "_GROUP_ROWS", 2)
    for rank, steps in enumerate([{"a": 5, "b": 9, "c": 7}, {"d": 8, "a": 3, "e": 2}]):
        for name, step in steps.items():
            journal(tmp_path, rank).record(row(reject(name, detail="ü" * step)), step=step, data_set="pets")
    journal(tmp_path).record(row(reject("a", reason="no_text")), step=4, data_set="pets")
    with open(tmp_path / "quarantine" / "rank-0.jsonl", "ab") as file:
        file.write(b"damaged\n")
    found = pq.read_table(write_table(tmp_path)).to_pylist()
    assert [(r["id"], r["step"]) for r in found] == [("e", 2), ("a", 3), ("a", 4), ("c", 7), ("d", 8), ("b", 9)]
    assert [r["reason"] for r in found if r["id"] == "a"] == ["not_decodable", "no_text"]
    assert all(r["detail"] == "ü" * r["step"] for r in found if r["reason"] != "no_text")


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
