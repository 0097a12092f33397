"""The journal of rejects: appended and fsynced before a substitute is used, read first on resume.

One line for each reject: as in ``plan.Row``, with task and step. A reject with a transient reason holds for its
position and attempt alone, every other one for all visits of its sample.
"""

from __future__ import annotations

import io
import json
import operator
import os
import sys
from collections.abc import Callable
from pathlib import Path

from pipeline.data.plan import Row, reject_key
from pipeline.errors import DataError, one_line
from pipeline.train.reject_limit import Draws

_REJECT = {"id": str, "data_set": str, "source": str, "reason": str, "detail": str}
_RECORD = _REJECT | {"task": str, "step": int}
_VISIT = ("position", "attempt")
_fields, _KINDS = operator.itemgetter(*_RECORD), tuple(_RECORD.values())


class Quarantine:
    """The journal file of one rank: ``quarantine/rank-N.jsonl`` in the run directory."""

    def __init__(self, run_dir: Path, *, rank: int) -> None:
        self._path = Path(run_dir) / "quarantine" / f"rank-{rank}.jsonl"
        self._file: io.FileIO | None = None
        self._written: set[tuple] = set()

    def record(self, row: Row, *, step: int, data_set: str) -> Draws:
        """Returns the row's draws once its rejects are on disk. Raises DataError if the journal cannot be written."""
        found = {(row.task, reject_key(r)): r for r in row.rejects if not r.get("journalled")}
        new = {key: r | {"task": row.task, "step": step} for key, r in found.items() if key not in self._written}
        if new:
            self._append(list(new.values()))
            self._written |= new.keys()
        return Draws.of(data_set, good=len(row.ids), rejects=row.rejects)

    def _append(self, records: list[dict]) -> None:
        lines = "".join(json.dumps(record) + "\n" for record in records).encode()
        try:
            if self._file is None:
                self._file = _open_to_append(self._path)
            if (written := self._file.write(lines)) != len(lines):
                raise OSError(f"only {written} of {len(lines)} bytes were written")
            os.fsync(self._file.fileno())
        except OSError as e:
            raise DataError(
                f"the journal of rejects, {self._path}, cannot be written: {one_line(e)}; free some space or mend the "
                "storage, and run the same command again"
            ) from e


def _open_to_append(path: Path) -> io.FileIO:
    """An unbuffered file, at the end of its last whole line: a line that a kill cut off was never used."""
    path.parent.mkdir(parents=True, exist_ok=True)
    file = open(path, "a+b", buffering=0)
    file.truncate(_whole_lines(file))
    return file


def _whole_lines(file: io.FileIO) -> int:
    """The number of bytes of a file up to the end of its last whole line."""
    end = file.seek(0, os.SEEK_END)
    while end:
        start = max(0, end - (1 << 16))
        file.seek(start)
        found = file.read(end - start).rfind(b"\n")
        if found >= 0:
            return start + found + 1
        end = start
    return 0


def read_journal(run_dir: Path, *, warn: Callable[[str], None] = lambda line: None) -> list[dict]:
    """Every reject on record, of all ranks. warn: takes a line on damaged ones. Raises DataError if it cannot be read.

    A last line without an end (a kill in the middle of a write) was never used.
    """
    folder, records = Path(run_dir) / "quarantine", []
    try:
        names = sorted(n for n in os.listdir(folder) if n.startswith("rank-") and n.endswith(".jsonl"))
        for name in names:
            found, damaged = _read_file(folder / name)
            records += found
            if damaged:
                warn(
                    f"{folder / name}: {len(damaged)} lines are damaged, the first is line {damaged[0]}; their "
                    "rejects are found anew, and batches may differ from those before"
                )
    except FileNotFoundError:
        return []
    except OSError as e:
        raise DataError(f"the journal of rejects, {folder}, cannot be read: {one_line(e)}; mend the storage") from e
    return records


def _read_file(path: Path) -> tuple[list[dict], list[int]]:
    """(the records of a file, the numbers of its damaged lines)."""
    records, damaged = [], []
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if not line.endswith(b"\n"):
                break
            try:
                records.append(_checked(json.loads(line)))
            except (ValueError, KeyError, TypeError, RecursionError):
                damaged.append(number)
    return records, damaged


def _checked(record: dict) -> dict:
    kinds = tuple(map(type, _fields(record)))
    if kinds != _KINDS or ("position" in record and any(type(record[name]) is not int for name in _VISIT)):
        raise TypeError(f"expected {_RECORD}, found {kinds}")
    return record


def known_bad(run_dir: Path) -> dict[str, dict[str | tuple[int, int], dict]]:
    """Task → ``plan.reject_key`` → reject, as the streams take it.

    By task: a video without sound is bad for one task and good for another.
    """
    out: dict[str, dict] = {}
    for record in read_journal(run_dir, warn=_warn):
        reject = {name: record[name] for name in (*_REJECT, *_VISIT) if name in record}
        out.setdefault(record["task"], {})[reject_key(reject)] = reject
    return out


def _warn(line: str) -> None:
    print(f"warning: {line}", file=sys.stderr, flush=True)
