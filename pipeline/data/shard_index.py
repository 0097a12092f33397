"""The index of a folder of shards: what all of them depend on, and the rows, size and digests of each.

``index.json`` has what all depend on, and the digest of ``shards.arrow``, a line a shard, which processes map: at 10^7
shards it takes 0.1 s and no memory to open. ``rejects.jsonl`` is for people.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.commands import command
from pipeline.data.order import substitutes_of
from pipeline.errors import RequestError
from pipeline.files import sha256_of, whole_file, write_json

# Version of the layout of the files.
FORMAT = 4
# An earlier one, whose shards are the same and whose index.json holds all of their entries.
_ENTRIES_IN_JSON = 3
_ENTRIES, _REJECTS = "shards.arrow", "rejects.jsonl"
_SCHEMA = pa.schema(
    [
        ("file", pa.string()),
        ("rows", pa.int64()),
        ("bytes", pa.int64()),
        ("sha256", pa.string()),
        ("words", pa.string()),
    ]
)
_ENTRIES_PER_BATCH = 4096


def write_index(folder: Path, header: dict, entries: Iterable[dict]) -> None:
    """Writes the index of finished shards, index.json last. entries: in order, with their "rejects"."""
    with (
        whole_file(folder / _ENTRIES) as table,
        whole_file(folder / _REJECTS) as rejects,
        open(rejects, "w") as lines,
        pa.ipc.new_file(str(table), _SCHEMA) as writer,
    ):
        held: list[dict] = []
        for entry in entries:
            lines.writelines(json.dumps(reject) + "\n" for reject in entry["rejects"])
            held.append({name: entry[name] for name in _SCHEMA.names})
            if len(held) == _ENTRIES_PER_BATCH:
                writer.write_batch(pa.RecordBatch.from_pylist(held, schema=_SCHEMA))
                held.clear()
        writer.write_batch(pa.RecordBatch.from_pylist(held, schema=_SCHEMA))
    write_json(folder / "index.json", header | {"entries": sha256_of(folder / _ENTRIES)})


def same_shards(found: dict, header: dict) -> bool:
    """Whether shards with the header ``found`` are those of another one; of an earlier format they may be."""
    return found | ({"format": FORMAT} if found.get("format") == _ENTRIES_IN_JSON else {}) == header


def read_index(folder: Path) -> dict:
    """What the shards of a finished preprocessing run depend on.

    Raises RequestError if there is none or it cannot be read.
    """
    try:
        index = json.loads((Path(folder) / "index.json").read_text())
        found = index.get("format")
    except FileNotFoundError as e:
        raise RequestError(f"shards {folder}: expected index.json; let {command('preprocess')} finish first") from e
    except (ValueError, AttributeError) as e:
        raise RequestError(f"shards {folder}: index.json cannot be read: {e}") from e
    if found not in (FORMAT, _ENTRIES_IN_JSON):
        raise RequestError(
            f"shards {folder}: expected format {FORMAT}, found {found}; run {command('preprocess')} into another folder"
        )
    index["fingerprint"] |= substitutes_of(index["fingerprint"]["num_rows"])
    return index


class ShardEntries:
    """The rows, size and digests of each shard of a folder, mapped from disk.

    starts: the first row of each shard, and the number of all. Raises RequestError if the entries cannot be read or are
    not those of the index.
    """

    def __init__(self, folder: Path, index: dict) -> None:
        self._table = _table(Path(folder), index)
        # Searched without a copy of the whole table: 8 bytes a shard.
        self.starts = np.cumsum(np.append(0, self._table["rows"].to_numpy()))

    def __len__(self) -> int:
        return len(self._table)

    def __getitem__(self, number: int) -> dict:
        if not 0 <= number < len(self):
            raise IndexError(number)
        return self._table.slice(number, 1).to_pylist()[0]


def _table(folder: Path, index: dict) -> pa.Table:
    if index["format"] == _ENTRIES_IN_JSON:
        return pa.Table.from_pylist(index["shards"], schema=_SCHEMA)
    path = folder / _ENTRIES
    try:
        table = pa.ipc.open_file(pa.memory_map(str(path))).read_all()
        if table.schema != _SCHEMA or pc.sum(table["rows"]).as_py() != index["fingerprint"]["num_rows"]:
            raise pa.ArrowInvalid("its rows are not those of index.json")
    except (OSError, pa.ArrowInvalid) as e:
        raise RequestError(f"shards {path}: cannot be read: {e}; run {command('preprocess')} again") from e
    return table


def damaged_shards(folder: Path) -> list[str]:
    """Files of a folder of shards whose checksums do not match. Reads all of them."""
    folder, bad = Path(folder), []
    index = read_index(folder)
    if index["format"] == FORMAT and sha256_of(folder / _ENTRIES) != index["entries"]:
        return [_ENTRIES]
    entries = ShardEntries(folder, index)
    for number in range(len(entries)):
        entry = entries[number]
        path = folder / entry["file"]
        if not has_size(path, entry) or sha256_of(path) != entry["sha256"]:
            bad.append(entry["file"])
    return bad


def has_size(path: Path, entry: dict) -> bool:
    """Whether a shard exists and has the size of its index entry."""
    return path.exists() and path.stat().st_size == entry["bytes"]
