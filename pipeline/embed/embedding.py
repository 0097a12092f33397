"""The loop of an embedding job: prepared items in, whole parts out, with the model busy in between.

Samples of one preparation go through the model by 64, as evaluation does it: ``Features`` gives each the same bits in
any company, so no vector depends on where batches or parts begin.
"""

from __future__ import annotations

import dataclasses
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np

from pipeline.embed.decoding import Prepared
from pipeline.embed.folder import Embedded
from pipeline.embed.preparations import Preparation
from pipeline.export import Encoder
from pipeline.export.choices import FEATURES
from pipeline.export.features import BATCH

# Batches that are with the model at a time: the next one is put together while one is computed.
_BATCHES_AHEAD = 2
# Parts that wait for a batch to fill; beyond it, batches are closed as they are.
_MAX_OPEN_PARTS = 4


@dataclasses.dataclass
class Part:
    """A part in the making. waiting: vectors that are still to come. whole: whether all its rows have."""

    name: tuple[int, int]
    items: list[Embedded] = dataclasses.field(default_factory=list)
    waiting: int = 0
    whole: bool = False


@dataclasses.dataclass
class _Batch:
    """Samples of one preparation, with the items that they are windows of, and these items' parts."""

    samples: list[dict[str, np.ndarray]] = dataclasses.field(default_factory=list)
    owners: list[tuple[Embedded, Part]] = dataclasses.field(default_factory=list)


class Embedder:
    """Takes the items of parts in order, and gives the parts back in order, with their vectors."""

    def __init__(self, encoder: Encoder) -> None:
        self._encoder = encoder
        self._open: deque[Part] = deque()
        self._batches: dict[Preparation, _Batch] = {}
        self._running: deque[tuple[Future, _Batch]] = deque()
        self._model = ThreadPoolExecutor(1, thread_name_prefix="model")

    def parts(self, rows: Iterable[tuple[tuple[int, int], bool, Sequence[Prepared]]]) -> Iterator[Part]:
        """rows: (part's name, whether it is the part's last row, items) → the parts, as they become whole."""
        try:
            for name, last, items in rows:
                if not self._open or self._open[-1].whole:
                    self._open.append(Part(name))
                part = self._open[-1]
                for prepared in items:
                    self._add(prepared, part)
                part.whole = last
                if len(self._open) > _MAX_OPEN_PARTS:
                    self._close_batches()
                yield from self._finished()
            self._close_batches()
            while self._running:
                self._receive()
            yield from self._finished()
        finally:
            self._model.shutdown(cancel_futures=True)

    def _add(self, prepared: Prepared, part: Part) -> None:
        part.items.append(prepared.item)
        for preparation, samples in prepared.samples:
            batch = self._batches.setdefault(preparation, _Batch())
            batch.samples += samples
            batch.owners.append((prepared.item, part))
            part.waiting += 1
            if len(batch.samples) >= BATCH:
                self._send(preparation)

    def _send(self, preparation: Preparation) -> None:
        while len(self._running) >= _BATCHES_AHEAD:
            self._receive()
        batch = self._batches.pop(preparation)
        self._running.append((self._model.submit(self._vectors, preparation, batch), batch))

    def _close_batches(self) -> None:
        for preparation in list(self._batches):
            self._send(preparation)

    def _vectors(self, preparation: Preparation, batch: _Batch) -> dict[str, np.ndarray]:
        """Space → (items, K)."""
        features = self._encoder.model.features(preparation.one.embedder, batch.samples)
        features = features.reshape(len(batch.owners), -1, features.shape[-1])
        return {
            space: features.mean(1) if space == FEATURES else self._encoder.vectors(features, one)
            for space, one in preparation.spaces
        }

    def _receive(self) -> None:
        future, batch = self._running.popleft()
        vectors = future.result()
        for row, (item, part) in enumerate(batch.owners):
            item.vectors.update({space: found[row] for space, found in vectors.items()})
            part.waiting -= 1

    def _finished(self) -> Iterator[Part]:
        while self._running and self._running[0][0].done():
            self._receive()
        while self._open and self._open[0].whole and not self._open[0].waiting:
            yield self._open.popleft()


def written(parts: Iterable[Part], write: Callable[[Part], None]) -> Iterator[Part]:
    """The parts, each after it has been written by a thread: a slow disk keeps nobody waiting but the next parts."""
    waiting: deque[tuple[Part, Future]] = deque()
    with ThreadPoolExecutor(1, thread_name_prefix="write") as writer:
        for part in parts:
            waiting.append((part, writer.submit(write, part)))
            while waiting and (waiting[0][1].done() or len(waiting) > _MAX_OPEN_PARTS):
                done, future = waiting.popleft()
                future.result()
                yield done
        for done, future in waiting:
            future.result()
            yield done


@dataclasses.dataclass
class Tally:
    """What a job has done. embedded: items by modality. rejected: by reason, with an example of each."""

    embedded: Counter[str] = dataclasses.field(default_factory=Counter)
    rejected: Counter[str] = dataclasses.field(default_factory=Counter)
    examples: dict[str, str] = dataclasses.field(default_factory=dict)

    def add(self, items: Iterable[Embedded]) -> None:
        for item in items:
            if item.reject is None:
                self.embedded[item.modality] += 1
            else:
                self.rejected[item.reject] += 1
                self.examples.setdefault(item.reject, f"{item.source or item.id}: {item.detail}")

    def lines(self) -> list[str]:
        """Lines for people."""
        done = ", ".join(f"{count:,} {name}" for name, count in sorted(self.embedded.items())) or "nothing"
        found = [f"embedded: {done}"]
        for reason, count in self.rejected.most_common():
            found.append(f"rejected: {reason} {count:,}, e.g. {self.examples[reason]}")
        return found
