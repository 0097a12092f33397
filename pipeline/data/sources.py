"""Clips of a data set by row number: the interface, and clips decoded from media. ``shards.ShardSource`` has the other
implementation."""

from __future__ import annotations

import collections
import functools
from collections.abc import Iterable
from typing import Protocol

import numpy as np

from pipeline.credentials import redacted
from pipeline.data.manifest import Manifest
from pipeline.data.media.clip import Clip
from pipeline.data.media.process import DecodeProcess, shared
from pipeline.data.modalities import MEDIA
from pipeline.data.spec import DataSetSpec, DecodeLimits


class Source(Protocol):
    """The rows of a data set, in the order of its manifest."""

    num_rows: int

    @property
    def fingerprint(self) -> dict:
        """Digests of the manifest's rows (``columns.Fingerprint``)."""

    @property
    def cpu_s(self) -> float:
        """CPU seconds that clips have cost in other processes so far."""

    def id(self, row: int) -> str: ...

    def media_path(self, row: int) -> str:
        """The media files of a row, for people to read: without credentials."""

    def text_and_labels(self, row: int) -> tuple[list[str], list[str]]: ...

    def clip(self, row: int, *, next_rows: Iterable[int] = ()) -> Clip:
        """A decoded row. Raises Reject for bad media. next_rows: that will be asked for after it, probably."""


class DecodedCache:
    """Decoded media of this process, least recently used first out: a small data set is decoded once a process.

    Shared by all streams of the process, so that tasks on the same files share them too.
    """

    def __init__(self, max_bytes: int = 0):
        self.max_bytes = max_bytes
        self._bytes = 0
        self._arrays: collections.OrderedDict[tuple, np.ndarray] = collections.OrderedDict()

    def __contains__(self, key: tuple) -> bool:
        return key in self._arrays

    def get(self, key: tuple) -> np.ndarray | None:
        if key in self._arrays:
            self._arrays.move_to_end(key)
        return self._arrays.get(key)

    def put(self, key: tuple, array: np.ndarray) -> None:
        """Keeps a copy."""
        if array.nbytes > self.max_bytes or key in self._arrays:
            return
        self._arrays[key] = array.copy()
        self._bytes += array.nbytes
        while self._bytes > self.max_bytes:
            self._bytes -= self._arrays.popitem(last=False)[1].nbytes


_CACHE = DecodedCache()


class MediaSource:
    """Decodes the media of a manifest's rows on demand, in the decode process of this process.

    manifest: to read instead of the data set's training manifest. columns: of the manifest that are needed; all by
    default. decoders: another decode process, with limits of its own.
    """

    def __init__(
        self,
        data_set: DataSetSpec,
        *,
        modalities: tuple[str, ...],
        manifest: str | None = None,
        columns: Iterable[str] | None = None,
        cache_bytes: int = 0,
        limits: DecodeLimits | None = None,
        decoders: DecodeProcess | None = None,
    ):
        self.data_set = data_set
        self.modalities = modalities
        self.manifest = Manifest(
            manifest or data_set.manifest,
            media=data_set.media_columns,
            columns=columns,
            known=None if manifest else data_set.index,
        )
        self.num_rows = self.manifest.num_rows
        # A sample needs its row several times: id, media, text and labels.
        self._record = functools.lru_cache(maxsize=16)(self.manifest.row)
        self._cache = _CACHE
        self._cache.max_bytes = max(self._cache.max_bytes, cache_bytes)
        self.decoders = decoders or shared(limits or DecodeLimits())

    @property
    def fingerprint(self) -> dict:
        return self.manifest.fingerprint

    @property
    def cpu_s(self) -> float:
        return self.decoders.cpu_s

    def id(self, row: int) -> str:
        return self._record(row)["id"]

    def media_path(self, row: int) -> str:
        record = self._record(row)
        return redacted(" ".join(record[c] for c in (*MEDIA, *self.manifest.media) if record.get(c)))

    def text_and_labels(self, row: int) -> tuple[list[str], list[str]]:
        record = self._record(row)
        return list(record.get("text") or ()), list(record.get("labels") or ())

    def clip(self, row: int, *, next_rows: Iterable[int] = ()) -> Clip:
        # The files of a clip that has several are not those of one modality one after another.
        next_rows = next_rows if len(self.modalities) == 1 else ()
        media = {modality: self.media(row, modality, next_rows=next_rows) for modality in self.modalities}
        text, labels = self.text_and_labels(row)
        return Clip(id=self.id(row), media=media, text=tuple(text), labels=tuple(labels))

    def media(self, row: int, modality: str, *, next_rows: Iterable[int] = ()) -> np.ndarray:
        """One modality of a row's clip, cached if there is room; good until the fourth one after it is decoded."""
        key = self._key(row, modality)
        array = self._cache.get(key)
        if array is None:
            records = (self._record(r) for r in next_rows if self._key(r, modality) not in self._cache)
            array = self.decoders.decode(self._record(row), self.data_set, modality, next_rows=records)
            self._cache.put(key, array)
        return array

    def _key(self, row: int, modality: str) -> tuple:
        return (self.manifest.uri, modality, self.data_set.settings(modality), self.data_set.clip_s, row)
