"""The job of making the shards of one data set, shard by shard."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

from pipeline.credentials import redacted
from pipeline.data.captions import CaptionCount
from pipeline.data.media.process import DecodeLimits
from pipeline.data.shard_index import FORMAT, has_size
from pipeline.data.shards import decode_settings, encode_rows, write_shard
from pipeline.data.sources import MediaSource
from pipeline.data.spec import DataSetSpec
from pipeline.files import write_json


@dataclasses.dataclass(frozen=True)
class ShardJob:
    """Decodes a data set into a folder of shards; travels to the processes that make them.

    max_characters: of captions; None if no task uses them.
    """

    data_set: DataSetSpec
    modalities: tuple[str, ...]
    folder: Path
    fingerprint: dict
    limits: DecodeLimits
    rows_per_shard: int
    max_characters: int | None = None

    @property
    def num_rows(self) -> int:
        return self.fingerprint["num_rows"]

    @property
    def num_shards(self) -> int:
        return -(-self.num_rows // self.rows_per_shard)

    def source(self) -> MediaSource:
        return MediaSource(self.data_set, modalities=self.modalities, limits=self.limits)

    def header(self) -> dict:
        """Everything that the shards depend on; a folder with another header is refused."""
        return {
            "format": FORMAT,
            "manifest": redacted(self.data_set.manifest),
            "rows": self.num_rows,
            "fingerprint": self.fingerprint,
            "rows_per_shard": self.rows_per_shard,
            "modalities": list(self.modalities),
            "settings": decode_settings(self.data_set),
        }

    def make(self, number: int) -> dict:
        """Writes a shard and its entry. Returns the entry."""
        rows = range(number * self.rows_per_shard, min((number + 1) * self.rows_per_shard, self.num_rows))
        table, rejects = encode_rows(self.source(), rows)
        entry = write_shard(table, self._path(number, "arrow")) | {"rejects": rejects}
        if self.max_characters is not None:
            count = CaptionCount(self.max_characters)
            for texts in table["text"].to_pylist():
                count.add(texts)
            entry["captions"] = {"rows_without": count.rows_without, "unusable": dict(count.unusable)}
        # The entry is written after its shard: a shard without one is made again.
        write_json(self._path(number, "json"), entry)
        return entry

    def finished(self) -> dict[int, int]:
        """Number → rows of the shards that an earlier try has finished."""
        entries = ((number, self.entry(number)) for number in range(self.num_shards))
        return {number: entry["rows"] for number, entry in entries if entry is not None}

    def entry(self, number: int) -> dict | None:
        """The entry of a shard, with its rejects; None if it is not finished."""
        path = self._path(number, "json")
        entry = json.loads(path.read_text()) if path.exists() else None
        return entry if entry and has_size(self._path(number, "arrow"), entry) else None

    def _path(self, number: int, kind: str) -> Path:
        return self.folder / f"shard-{number:05d}.{kind}"
