"""Clips of a data set by row number, decoded from its media. ``shards.ShardSource`` gives the same from shards."""

from __future__ import annotations

import collections
import functools

import numpy as np

from pipeline.credentials import redacted
from pipeline.data.manifest import Manifest
from pipeline.data.media.clip import Clip, num_samples
from pipeline.data.media.process import DecodeLimits, shared
from pipeline.data.spec import DataSetSpec


class DecodedCache:
    """Decoded media of this process, least recently used first out: a small data set is decoded once a process.

    Shared by all streams of the process, so that tasks on the same files share them too.
    """

    def __init__(self, max_bytes: int = 0):
        self.max_bytes, self._bytes = max_bytes, 0
        self._arrays: collections.OrderedDict[tuple, np.ndarray] = collections.OrderedDict()

    def get(self, key: tuple) -> np.ndarray | None:
        if key in self._arrays:
            self._arrays.move_to_end(key)
        return self._arrays.get(key)

    def put(self, key: tuple, array: np.ndarray) -> None:
        """Keeps a copy."""
        if array.nbytes > self.max_bytes or key in self._arrays:
            return
        self._arrays[key], self._bytes = array.copy(), self._bytes + array.nbytes
        while self._bytes > self.max_bytes:
            self._bytes -= self._arrays.popitem(last=False)[1].nbytes


_CACHE = DecodedCache()


class MediaSource:
    """Decodes the media of a manifest's rows on demand, in the decode process of this process.

    manifest: another one than the data set's training manifest.
    """

    def __init__(
        self,
        data_set: DataSetSpec,
        *,
        modalities: tuple[str, ...],
        manifest: str | None = None,
        cache_bytes: int = 0,
        limits: DecodeLimits | None = None,
    ):
        self.data_set, self.modalities = data_set, modalities
        self.manifest = Manifest(manifest or data_set.manifest)
        self.num_rows = self.manifest.num_rows
        # A sample asks for its row several times: id, media, words.
        self._record = functools.lru_cache(maxsize=16)(self.manifest.row)
        self._cache = _CACHE
        self._cache.max_bytes = max(self._cache.max_bytes, cache_bytes)
        self.decoders = shared(limits or DecodeLimits())

    @property
    def fingerprint(self) -> dict:
        return self.manifest.fingerprint

    def id(self, row: int) -> str:
        return self._record(row)["id"]

    def where(self, row: int) -> str:
        """The media files of a row, for a reader of the quarantine list: without credentials."""
        record = self._record(row)
        return redacted(" ".join(record[c] for c in ("image", "video", "audio") if record.get(c)))

    def words(self, row: int) -> tuple[list[str], list[str]]:
        """(text, labels) of a row."""
        record = self._record(row)
        return list(record.get("text") or ()), list(record.get("labels") or ())

    def clip(self, row: int) -> Clip:
        """Raises Reject where the row's media are bad."""
        arrays = {modality: self.media(row, modality) for modality in self.modalities}
        text, labels = self.words(row)
        return Clip(id=self.id(row), text=tuple(text), labels=tuple(labels), **arrays)

    def media(self, row: int, modality: str) -> np.ndarray:
        """One modality of a row's clip, from the cache where it is there; good until the fourth after it is decoded."""
        key = (self.manifest.uri, modality, getattr(self.data_set, modality), num_samples(self.data_set), row)
        array = self._cache.get(key)
        if array is None:
            array = self.decoders.decode(self._record(row), self.data_set, modality)
            self._cache.put(key, array)
        return array
