"""The journal of rejects: appended and fsynced before a substitute is used, read first on resume."""

from __future__ import annotations

import json
import os
from pathlib import Path

from pipeline.data.plan import Row
from pipeline.errors import DataError

# Below this many draws a share says nothing.
_FEWEST_DRAWS = 200


class Quarantine:
    """One journal file a rank: ``quarantine/rank-N.jsonl`` in the run directory.

    limits: data set → largest share of draws that may be rejects.
    """

    def __init__(self, run_dir: Path, *, rank: int, limits: dict[str, float]):
        self._path = Path(run_dir) / "quarantine" / f"rank-{rank}.jsonl"
        self._limits, self._file = limits, None
        self._known = {(r["task"], r["id"]) for r in read_journal(run_dir)}
        self.counts = {name: {"drawn": 0, "rejected": 0} for name in limits}

    def record(self, row: Row, *, step: int, data_set: str) -> None:
        """Raises DataError when a data set rejects more than its limit."""
        count = self.counts[data_set]
        count["drawn"] += len(row.ids) + len(row.rejects)
        count["rejected"] += len(row.rejects)
        new = {r["id"]: r for r in row.rejects if (row.task, r["id"]) not in self._known}
        if new:
            self._append([{**r, "task": row.task, "step": step} for r in new.values()])
            self._known |= {(row.task, name) for name in new}
        if count["drawn"] >= _FEWEST_DRAWS and count["rejected"] > self._limits[data_set] * count["drawn"]:
            self._stop(data_set, count, row)

    def _append(self, records: list[dict]) -> None:
        if self._file is None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            torn = self._path.exists() and not self._path.read_bytes().endswith(b"\n")
            self._file = open(self._path, "a", encoding="utf-8")
            if torn:
                self._file.write("\n")  # a kill in the middle of a line: the next one starts afresh
        for record in records:
            self._file.write(json.dumps(record) + "\n")
        self._file.flush()
        os.fsync(self._file.fileno())

    def _stop(self, data_set: str, count: dict, row: Row) -> None:
        examples = "; ".join(f"{r['source'] or r['id']} ({r['reason']})" for r in row.rejects[:3])
        raise DataError(
            f"data set {data_set}: {count['rejected']} of {count['drawn']} samples were bad, more than "
            f"max_reject_fraction = {self._limits[data_set]:g}. For example: {examples or 'see quarantine/'}. "
            "Mend the data, or raise max_reject_fraction"
        )


def read_journal(run_dir: Path) -> list[dict]:
    """Every reject on record, of all ranks; a torn last line (a kill in the middle of a write) was never used."""
    records = []
    for path in sorted((Path(run_dir) / "quarantine").glob("rank-*.jsonl")):
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                records.append(json.loads(line))
            except ValueError:
                continue
    return records


def known_bad(run_dir: Path) -> dict[str, dict[str, dict]]:
    """Task → id → reject, as the streams take it: a video without sound is bad for one task and serves another."""
    out: dict[str, dict[str, dict]] = {}
    for record in read_journal(run_dir):
        reject = {k: record[k] for k in ("id", "data_set", "source", "reason", "detail")}
        out.setdefault(record["task"], {})[record["id"]] = reject
    return out
