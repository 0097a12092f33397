"""The journal of rejects: appended and fsynced before a substitute is used, read first on resume.

One line for each reject: as in ``plan.Row``, with task and step. A reject with a transient reason holds for its
position and attempt alone, every other one for all visits of its sample.
"""

from __future__ import annotations

import itertools
import json
import operator
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

from pipeline.data.known_rejects import Collector, Key, KnownRejects
from pipeline.data.plan import Row, reject_key
from pipeline.errors import DataError, one_line
from pipeline.store.log import Log, open_log
from pipeline.store.path import run_path
from pipeline.train.reject_limit import Draws

T = TypeVar("T")
_REJECT = {"id": str, "data_set": str, "source": str, "reason": str, "detail": str}
_RECORD = _REJECT | {"task": str, "step": int}
_VISIT = ("position", "attempt")
# A line as ``json.dumps`` writes it, without escapes: nearly all are such, and a third of the time to read.
_TEXT, _NUMBER = rb'[^"\\\x00-\x1f\x7f-\xff]*', rb"(?:0|[1-9][0-9]*)"
_PLAIN_LINE = re.compile(
    rb'\{"id": "(%(text)s)", "data_set": "%(text)s", "source": "%(text)s", "reason": "(%(text)s)", "detail": "%(text)s"'
    rb'(?:, "position": (%(number)s), "attempt": (%(number)s))?, "task": "(%(text)s)", "step": %(number)s\}\n'
    % {b"text": _TEXT, b"number": _NUMBER}
)
# Maximum number of rejects that a rank remembers having written; the journal then lists one of them again.
_MAX_WRITTEN = 1 << 20
_fields, _KINDS = operator.itemgetter(*_RECORD), tuple(_RECORD.values())


class Quarantine:
    """The journal file of one rank: ``quarantine/rank-N.jsonl`` in the run directory."""

    def __init__(self, run_dir: Path, *, rank: int) -> None:
        self._path = run_path(run_dir) / "quarantine" / f"rank-{rank}.jsonl"
        self._log: Log | None = None
        # Hashes, the oldest first: a long run of bad data must not fill the memory.
        self._written: dict[int, None] = {}

    def record(self, row: Row, *, step: int, data_set: str) -> Draws:
        """Returns the row's draws once its rejects are on disk. Raises DataError if the journal cannot be written."""
        found = {hash((row.task, reject_key(r))): r for r in row.rejects if not r.get("journalled")}
        where = {"task": row.task, "step": step}
        new = {key: _stored(reject) | where for key, reject in found.items() if key not in self._written}
        if new:
            self._append(list(new.values()))
            self._written |= dict.fromkeys(new)
            for key in list(itertools.islice(self._written, max(0, len(self._written) - _MAX_WRITTEN))):
                del self._written[key]
        return Draws.of(data_set, samples=len(row.ids), rejects=row.rejects)

    def _append(self, records: list[dict]) -> None:
        lines = "".join(json.dumps(record) + "\n" for record in records).encode()
        try:
            if self._log is None:
                self._log = open_log(self._path)
            self._log.append(lines)
            self._log.sync()
        except OSError as e:
            raise DataError(
                f"the journal of rejects, {self._path}, cannot be written: {one_line(e)}; free some space or mend the "
                "storage, and run the same command again"
            ) from e


def _stored(reject: dict) -> dict:
    """The part of a reject that holds for later visits too."""
    return {name: reject[name] for name in (*_REJECT, *_VISIT) if name in reject}


def journal_files(run_dir: Path) -> list[Path]:
    """The journals of all ranks, sorted by name. Raises DataError if they cannot be listed."""
    folder = run_path(run_dir) / "quarantine"
    try:
        names = sorted(path.name for path in folder.iterdir())
    except FileNotFoundError:
        return []
    except OSError as e:
        raise _unreadable(folder, e) from e
    return [folder / name for name in names if name.startswith("rank-") and name.endswith(".jsonl")]


def read_journal(path: Path) -> Iterator[tuple[int, dict]]:
    """Yields (place of its line in bytes, record) of every reject in a journal, one at a time: there may be millions.

    Damaged lines are left out. Raises DataError if the file cannot be read.
    """
    return _parsed(path, _record, warn=lambda line: None)


def known_bad(run_dir: Path) -> dict[str, KnownRejects]:
    """Task → the rejects on record, of all ranks, as its stream takes them. Warns of damaged lines.

    By task: a video without sound is bad for one task and good for another.
    """
    found: dict[str, Collector] = {}
    for path in journal_files(run_dir):
        for _, (task, key, reason) in _parsed(path, _known, warn=_warn):
            if task not in found:
                found[task] = Collector()
            found[task].add(key, reason)
    return {task: collector.rejects() for task, collector in found.items()}


def _parsed(path: Path, parse: Callable[[bytes], T], *, warn: Callable[[str], None]) -> Iterator[tuple[int, T]]:
    """Yields (place, what ``parse`` makes of the line there), but for damaged lines. warn: takes a line on those.

    A last line without an end (a kill in the middle of a write) was never used.
    """
    place, damaged = 0, []
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if not line.endswith(b"\n"):
                    break
                try:
                    parsed = parse(line)
                except (ValueError, KeyError, TypeError, RecursionError):
                    damaged.append(number)
                else:
                    yield place, parsed
                place += len(line)
    except OSError as e:
        raise _unreadable(path, e) from e
    if damaged:
        warn(
            f"{path}: {len(damaged)} lines are damaged, the first is line {damaged[0]}; their rejects are found anew, "
            "and batches may differ from those before"
        )


def _known(line: bytes) -> tuple[str, Key, str]:
    """(task, ``reject_key``, reason) of a line. Raises what ``_record`` raises."""
    if match := _PLAIN_LINE.fullmatch(line):
        name, reason, position, attempt, task = match.groups()
        key = name.decode() if position is None else (int(position), int(attempt))
        return task.decode(), key, reason.decode()
    record = _record(line)
    return record["task"], reject_key(record), record["reason"]


def _record(line: bytes) -> dict:
    record = json.loads(line)
    kinds = tuple(map(type, _fields(record)))
    if kinds != _KINDS or ("position" in record and any(type(record[name]) is not int for name in _VISIT)):
        raise TypeError(f"expected {_RECORD}, found {kinds}")
    return record


def _unreadable(path: Path, error: OSError) -> DataError:
    return DataError(f"the journal of rejects, {path}, cannot be read: {one_line(error)}; mend the storage")


def _warn(line: str) -> None:
    print(f"warning: {line}", file=sys.stderr, flush=True)
