"""Preprocessed data sets: canonical clips in Arrow IPC files, memory-mapped. Everything after the clip is shared.

A folder of shards holds ``shard-00000.arrow`` ... and their index (``shard_index.py``). Rejected rows keep their place,
with a reason for each bad modality, so that the order over a data set and the rejects of each task are the same as with
its media.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pyarrow as pa

from pipeline.commands import command
from pipeline.data.columns import Fingerprint, normalise
from pipeline.data.media.audio import num_samples
from pipeline.data.media.clip import Clip
from pipeline.data.media.errors import Reject
from pipeline.data.modalities import MEDIA
from pipeline.data.shard_index import ShardEntries, has_size, read_index
from pipeline.data.sources import MediaSource, Source
from pipeline.data.spec import DataSetSpec, DecodeLimits
from pipeline.errors import DataError, RequestError, one_line
from pipeline.files import sha256_of, whole_file

_TENSOR = pa.struct([("dtype", pa.string()), ("shape", pa.list_(pa.int64())), ("data", pa.large_binary())])
# Key of the digest of a shard's ids, texts and labels in its schema.
_WORDS = b"words"
# Maximum number of shards that a source keeps mapped.
_KEPT_SHARDS = 256
_REJECT = pa.struct([("modality", pa.string()), ("reason", pa.string()), ("detail", pa.string())])
SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("source", pa.string()),
        ("rejects", pa.list_(_REJECT)),
        ("text", pa.list_(pa.string())),
        ("labels", pa.list_(pa.string())),
        *((m, _TENSOR) for m in MEDIA),
    ]
)


def schema_for(modalities: tuple[str, ...]) -> pa.Schema:
    """SCHEMA with a column for each modality that the recipe adds."""
    added = (pa.field(m, _TENSOR) for m in modalities if m not in MEDIA)
    return pa.schema([*SCHEMA, *added])


def open_source(
    data_set: DataSetSpec,
    *,
    modalities: tuple[str, ...],
    columns: Iterable[str] | None = None,
    cache_bytes: int = 0,
    limits: DecodeLimits | None = None,
) -> Source:
    """The data set's shards if the recipe names them, its media otherwise. columns: as ``MediaSource`` has them."""
    if data_set.shards:
        return ShardSource(data_set, modalities=modalities)
    return MediaSource(data_set, modalities=modalities, columns=columns, cache_bytes=cache_bytes, limits=limits)


def decode_settings(data_set: DataSetSpec) -> dict:
    """Settings that canonical clips and their rejects depend on, by modality: shards made with others are refused."""
    image = data_set.image
    video = data_set.video
    audio = data_set.audio
    samples = num_samples(audio, clip_s=data_set.clip_s)
    added = {a.name: json.loads(json.dumps(dataclasses.astuple(a.settings))) for a in data_set.added}
    return {
        "image": [image.short_side, image.decoder, image.max_pixels, image.max_bytes],
        "video": [
            *(video.fps, video.short_side, video.max_frames, video.decoder),
            *(video.max_pixels, video.max_bytes, video.max_duration_s, video.max_source_frames),
        ],
        "audio": [audio.sample_rate_hz, samples, audio.decoder, audio.max_bytes, audio.max_duration_s],
        **added,
    }


def encode_rows(source: MediaSource, rows: range) -> tuple[pa.Table, list[dict]]:
    """Decodes rows into a table of ``schema_for``; also the rejects, one for each bad modality of a row."""
    schema = schema_for(source.modalities)
    columns = {name: [] for name in schema.names}
    rejects = []
    for row in rows:
        text, labels = source.text_and_labels(row)
        path = source.media_path(row)
        record = {"id": source.id(row), "source": path, "text": text, "labels": labels, "rejects": []}
        for modality in source.modalities:
            try:
                record[modality] = encode_tensor(source.media(row, modality))
            except Reject as e:
                record["rejects"].append({"modality": modality, "reason": e.reason, "detail": e.detail})
                rejects.append({"id": record["id"], "source": record["source"], "reason": e.reason, "detail": e.detail})
        for name in columns:
            columns[name].append(record.get(name))
    return pa.table(columns, schema=schema), rejects


def encode_tensor(array: np.ndarray | None) -> dict | None:
    """An array as a value of a media column."""
    if array is None:
        return None
    return {"dtype": array.dtype.str, "shape": array.shape, "data": np.ascontiguousarray(array).tobytes()}


def write_shard(table: pa.Table, path: Path) -> dict:
    """Writes one IPC file, one record batch a row, so that readers map single rows. Returns its index entry."""
    words = _words(table)
    table = table.replace_schema_metadata({_WORDS: words})
    with whole_file(path) as temporary:
        with pa.OSFile(str(temporary), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
            writer.write_table(table, max_chunksize=1)
        digest = sha256_of(temporary)
    entry = {"file": path.name, "rows": table.num_rows, "bytes": path.stat().st_size, "sha256": digest}
    return entry | {"words": words}


def _words(table: pa.Table) -> str:
    """A digest of a shard's ids, texts and labels."""
    fingerprint = Fingerprint()
    for batch in table.to_batches():
        fingerprint.update(normalise(batch, ["id", "text", "labels"]))
    return hashlib.blake2b(repr(fingerprint.digests()).encode(), digest_size=16).hexdigest()


class ShardSource:
    """Random access to the clips of a folder of shards, through the page cache."""

    def __init__(self, data_set: DataSetSpec, *, modalities: tuple[str, ...]):
        self.data_set = data_set
        self.modalities = modalities
        self.folder = Path(data_set.shards)
        self.index = read_index(self.folder)
        missing = set(modalities) - set(self.index["modalities"])
        if missing:
            raise RequestError(
                f"data_sets.{data_set.name}.shards: expected {', '.join(sorted(missing))} in {self.folder}, found only "
                f"{', '.join(self.index['modalities'])}; run {command('preprocess')} again"
            )
        for modality in modalities:
            found, asked = self.index["settings"][modality], decode_settings(data_set)[modality]
            if found != asked:
                raise RequestError(
                    f"data_sets.{data_set.name}.{modality}: the shards in {self.folder} were made with {found}, the "
                    f"recipe says {asked}; run {command('preprocess')} again or set the recipe back"
                )
        self._entries = ShardEntries(self.folder, self.index)
        self._starts = self._entries.starts
        self.num_rows = int(self._starts[-1])
        self._open = functools.lru_cache(maxsize=_KEPT_SHARDS)(self._open_file)

    def _open_file(self, number: int) -> pa.RecordBatchFileReader:
        """Raises DataError if a shard differs from its index entry in size or in the digest it holds.

        Checksums are left to ``damaged_shards``: reading every shard whole would cost more than decoding the media.
        """
        entry = self._entries[number]
        path = self.folder / entry["file"]
        if not has_size(path, entry):
            raise DataError(f"shard {path}: expected {entry['bytes']} bytes, found another size; preprocess it again")
        try:
            reader = pa.ipc.open_file(pa.memory_map(str(path)))
        except pa.ArrowInvalid as e:
            raise DataError(f"shard {path}: cannot be read: {one_line(e, limit=200)}; preprocess it again") from e
        if (reader.schema.metadata or {}).get(_WORDS) != entry["words"].encode():
            raise DataError(f"shard {path}: its ids or words are not those in index.json; preprocess it again")
        return reader

    def _record(self, row: int) -> pa.RecordBatch:
        number = int(np.searchsorted(self._starts, row, side="right")) - 1
        return self._open(number).get_batch(row - int(self._starts[number]))

    @property
    def fingerprint(self) -> dict:
        return self.index["fingerprint"]

    @property
    def cpu_s(self) -> float:
        """0: shards are read in this process."""
        return 0.0

    def id(self, row: int) -> str:
        return self._record(row)["id"][0].as_py()

    def media_path(self, row: int) -> str:
        return self._record(row)["source"][0].as_py()

    def text_and_labels(self, row: int) -> tuple[list[str], list[str]]:
        return _text_and_labels(self._record(row))

    def clip(self, row: int, *, next_rows: Iterable[int] = ()) -> Clip:
        """Raises Reject if one of this task's modalities is bad, as decoding it would."""
        record = self._record(row)
        rejects = {r["modality"]: r for r in record["rejects"][0].as_py()}
        media = {}
        for modality in self.modalities:
            if modality in rejects:
                raise Reject(rejects[modality]["reason"], rejects[modality]["detail"])
            media[modality] = _array(record[modality][0])
        text, labels = _text_and_labels(record)
        return Clip(id=record["id"][0].as_py(), media=media, text=tuple(text), labels=tuple(labels))


def _text_and_labels(record: pa.RecordBatch) -> tuple[list[str], list[str]]:
    return record["text"][0].as_py(), record["labels"][0].as_py()


def _array(tensor: pa.StructScalar) -> np.ndarray:
    dtype, shape = np.dtype(tensor["dtype"].as_py()), tensor["shape"].as_py()
    return np.frombuffer(tensor["data"].as_buffer(), dtype).reshape(shape)
