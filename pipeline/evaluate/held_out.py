"""Features of a manifest's rows: decoded by several threads, each with a decode process, while the model works.

No value depends on the other rows, on their order or on the number of threads (``export.features``).
"""

from __future__ import annotations

import collections
import concurrent.futures
import contextlib
import dataclasses
import threading
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from pipeline.data.media.errors import Reject
from pipeline.data.media.process import DecodeProcess
from pipeline.data.sample_tokens import View, evaluation_tokens
from pipeline.data.sources import MediaSource
from pipeline.data.spec import DataSetSpec, DecodeLimits, TokenSpec, Variant
from pipeline.export.features import Pools, pooled
from pipeline.host_memory import machine_cpus

# Maximum decode processes of an evaluation: the threads that ask them share this process's interpreter.
_MAX_THREADS = 16
# Images or frames that a thread decodes before it hands them over.
_CHUNK = 16
# Chunks that each thread may be ahead of the model.
_AHEAD = 2


@dataclasses.dataclass(frozen=True)
class Side:
    """One kind of media as a measurement prepares it. embedder: the model's name for its layers."""

    modality: str
    embedder: str
    data_set: DataSetSpec
    variant: Variant


class Row(NamedTuple):
    """A row that could be decoded. number: in its manifest."""

    number: int
    id: str
    labels: tuple[str, ...]
    texts: tuple[str, ...]


# Arrays of each window of a row.
Samples = list[dict[str, np.ndarray]]


@dataclasses.dataclass(frozen=True)
class HeldOut:
    """The features of a manifest's rows, sorted by id.

    features: (rows, clips, width) float32. rejected: the number of rows with bad media, left out of every metric.
    """

    rows: list[Row]
    features: np.ndarray
    rejected: int = 0

    @property
    def numbers(self) -> list[int]:
        """The rows' places in the manifest."""
        return [row.number for row in self.rows]

    @property
    def labels(self) -> list[tuple[str, ...]]:
        """The labels of each row."""
        return [row.labels for row in self.rows]

    @property
    def texts(self) -> list[tuple[str, ...]]:
        """The texts of each row, usable or not."""
        return [row.texts for row in self.rows]

    def take(self, chosen: Sequence[int]) -> HeldOut:
        """Some of the rows, in the order given."""
        return HeldOut([self.rows[i] for i in chosen], self.features[np.asarray(chosen, np.int64)], self.rejected)


def joined(parts: Sequence[HeldOut]) -> HeldOut:
    """Several parts of a manifest as one, sorted by id."""
    rows = [row for part in parts for row in part.rows]
    # Parts without rows have no width.
    features = np.concatenate([part.features for part in parts if part.rows] or [parts[0].features])
    whole = HeldOut(rows, features, sum(part.rejected for part in parts))
    return whole.take(sorted(range(len(rows)), key=lambda i: (rows[i].id, rows[i].number)))


def pooled_rows(
    model: Pools,
    side: Side,
    manifest: str,
    *,
    rows: Sequence[int],
    limits: DecodeLimits,
    sizes: TokenSpec,
    clips: int = 1,
) -> HeldOut:
    """The features of some rows of a manifest. clips: windows of a row, evenly spaced. sizes: the model's patches."""
    kept: list[Row] = []

    def samples(found: Iterator[tuple[Row, Samples] | None]) -> Iterator[dict]:
        for one in found:
            if one is not None:
                kept.append(one[0])
                yield from one[1]

    views = [View(side.variant, window=(i, clips)) for i in range(clips)]
    with contextlib.closing(_Decoders(side, manifest, limits)) as decoders:
        features = pooled(model, side.embedder, samples(decoders.rows(rows, views, sizes)))
    features = features.reshape(len(kept), clips, -1) if kept else np.zeros((0, clips, 0), np.float32)
    return joined([HeldOut(kept, features, len(rows) - len(kept))])


class _Decoders:
    """Threads that make the samples of rows, in order."""

    def __init__(self, side: Side, manifest: str, limits: DecodeLimits) -> None:
        self._side, self._manifest, self._limits = side, manifest, limits
        self._here = threading.local()
        self._processes: list[DecodeProcess] = []
        # The first source makes this machine's copy of the rows, which those of other threads then open.
        self._unused = [self._open()]

    def rows(self, rows: Sequence[int], views: list[View], sizes: TokenSpec) -> Iterator[tuple[Row, Samples] | None]:
        """Each row with its samples, None for a reject."""
        step = max(1, _CHUNK // (len(views) * max(1, self._side.variant.num_frames)))
        chunks = (rows[i : i + step] for i in range(0, len(rows), step))
        threads = max(1, min(machine_cpus(), _MAX_THREADS, len(rows) // (2 * step)))
        with concurrent.futures.ThreadPoolExecutor(threads, thread_name_prefix="evaluate-decode") as pool:
            waiting: collections.deque[concurrent.futures.Future] = collections.deque()
            try:
                for chunk in chunks:
                    waiting.append(pool.submit(self._chunk, chunk, views, sizes))
                    if len(waiting) > _AHEAD * threads:
                        yield from waiting.popleft().result()
                while waiting:
                    yield from waiting.popleft().result()
            finally:
                pool.shutdown(cancel_futures=True)

    def _chunk(self, rows: Sequence[int], views: list[View], sizes: TokenSpec) -> list[tuple[Row, Samples] | None]:
        if not hasattr(self._here, "source"):
            try:
                self._here.source = self._unused.pop()
            except IndexError:
                self._here.source = self._open()
        return [self._row(self._here.source, int(row), views, sizes) for row in rows]

    def _row(self, source: MediaSource, row: int, views: list[View], sizes: TokenSpec) -> tuple[Row, Samples] | None:
        """A row without labels or text is no reject: a sample is its media alone."""
        name, data_set = self._side.modality, self._side.data_set
        try:
            clip = source.clip(row)
            modality, settings = data_set.modality(name), data_set.settings(name)
            samples = [evaluation_tokens(clip.media[name], modality, settings, view, sizes) for view in views]
        except Reject:
            return None
        # Tokens may be a view of memory that the decode process uses again.
        owned = [{name: np.array(array) for name, array in sample.items()} for sample in samples]
        return Row(row, clip.id, clip.labels, clip.text), owned

    def _open(self) -> MediaSource:
        decoders = DecodeProcess(self._limits)
        self._processes.append(decoders)
        name = self._side.modality
        return MediaSource(self._side.data_set, modalities=(name,), manifest=self._manifest, decoders=decoders)

    def close(self) -> None:
        """Ends the decode processes."""
        for process in self._processes:
            process.close()


def sample_of(num_rows: int, max_rows: int | None) -> Sequence[int]:
    """All rows, or some drawn once and for all by the number of rows."""
    if max_rows is None or max_rows >= num_rows:
        return range(num_rows)
    return np.sort(np.random.default_rng(num_rows).choice(num_rows, max_rows, replace=False)).tolist()
