"""From manifest rows to prepared items: threads that each have a decode process, ahead of the model."""

from __future__ import annotations

import collections
import dataclasses
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import numpy as np

from pipeline.credentials import redacted
from pipeline.data.captions import caption_fault
from pipeline.data.media.clip import MediaFile, source_path
from pipeline.data.media.errors import Reject
from pipeline.data.media.part import Part
from pipeline.data.media.process import DecodeProcess
from pipeline.data.modalities import TEXT
from pipeline.embed.folder import Embedded
from pipeline.embed.preparations import Preparation
from pipeline.export import Encoder
from pipeline.export.inputs import Input

# Maximum characters of a text, as recipes have it by default.
_MAX_CHARACTERS = 100_000
# Maximum characters of a stored caption.
_MAX_CAPTION = 200
# Maximum rows that are decoded ahead of the model, and their bytes.
_ROWS_AHEAD = 512
_BYTES_AHEAD = 512 << 20

Samples = list[dict[str, np.ndarray]]
T = TypeVar("T")
R = TypeVar("R")


@dataclasses.dataclass
class Prepared:
    """An item with the samples of each of its preparations: its windows in time. A reject has none."""

    item: Embedded
    samples: list[tuple[Preparation, Samples]]

    @property
    def num_bytes(self) -> int:
        return sum(array.nbytes for _, found in self.samples for sample in found for array in sample.values())


class Decoders:
    """A decode process for each thread that asks."""

    def __init__(self) -> None:
        self._own = threading.local()
        self._all: list[DecodeProcess] = []
        self._lock = threading.Lock()

    def decode(self, file: MediaFile) -> np.ndarray:
        """The canonical clip of a file, good until the fourth request of the same thread. Raises Reject, DataError."""
        found = getattr(self._own, "process", None)
        if found is None:
            found = self._own.process = DecodeProcess()
            with self._lock:
                self._all.append(found)
        return found.decode_file(file)

    def close(self) -> None:
        """Ends the processes."""
        for process in self._all:
            process.close()

    def __enter__(self) -> Decoders:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def file_of(
    encoder: Encoder,
    one: Input,
    path: str,
    *,
    times: tuple[float | None, float | None],
    schemes: tuple[str, ...],
    column: str = "",
) -> MediaFile:
    """A file as an input of the model has it decoded."""
    modality, settings = encoder.modality(one)
    part = Part(column or one.modality, times[0] or 0.0, times[1], one.clip_s)
    return MediaFile(path, part, modality.decode, settings, schemes)


class RowPreparer:
    """Makes the items of a manifest row: one of each modality that it has a file of, and one of each text."""

    def __init__(
        self,
        encoder: Encoder,
        chosen: Mapping[str, Sequence[Preparation]],
        decoders: Decoders,
        *,
        schemes: tuple[str, ...],
        clips: int,
    ) -> None:
        self._encoder, self._chosen, self._decoders = encoder, chosen, decoders
        self._schemes, self._clips = schemes, clips

    def __call__(self, row: dict) -> list[Prepared]:
        """The items of a row. Raises DataError if storage cannot be reached."""
        found = []
        for modality, chosen in self._chosen.items():
            if modality == TEXT:
                found += [self._text(row, text, chosen) for text in row.get("text") or ()]
            elif (one := self._media(row, modality, chosen)) is not None:
                found.append(one)
        return found

    def _media(self, row: dict, modality: str, chosen: Sequence[Preparation]) -> Prepared | None:
        columns = self._encoder.modality(chosen[0].one)[0].columns_of(modality)
        if not any(row.get(column) for column in columns):
            return None
        path, column = source_path(row, columns)
        item = Embedded(row["id"], modality, redacted(path), _caption(row), chosen[0].one.data_set)
        item.start_s, item.end_s = row.get("start_s"), row.get("end_s")
        times, samples = (item.start_s, item.end_s), []
        try:
            for preparation in chosen:
                one = preparation.one
                file = file_of(self._encoder, one, path, times=times, schemes=self._schemes, column=column)
                clip = self._decoders.decode(file)
                samples.append((preparation, list(self._encoder.media_samples(clip, one, self._clips))))
        except Reject as e:
            item.reject, item.detail, samples = e.reason, e.detail, []
        return Prepared(item, samples)

    def _text(self, row: dict, text: str, chosen: Sequence[Preparation]) -> Prepared:
        item = Embedded(row["id"], TEXT, text[:_MAX_CHARACTERS], None, chosen[0].one.data_set)
        if fault := caption_fault(text, self._encoder.tokenizer, max_characters=_MAX_CHARACTERS):
            item.reject, item.detail = fault
            return Prepared(item, [])
        return Prepared(item, [(p, [self._encoder.text_sample(text, p.one)]) for p in chosen])


def _caption(row: dict) -> str | None:
    """Words that tell a person what an item is."""
    words = row.get("text") or row.get("labels") or ()
    return ", ".join(words)[:_MAX_CAPTION] or None


def in_order(
    rows: Iterable[T], make: Callable[[T], R], size_of: Callable[[R], int], *, threads: int | None = None
) -> Iterator[R]:
    """``make`` of every row, in order, by several threads that work ahead within bounds of rows and bytes.

    size_of: bytes of a result; the largest so far bounds the rows ahead. Before the first each thread has one, and one
    more waits.
    """
    threads = threads or len(os.sched_getaffinity(0))
    waiting: collections.deque[Future] = collections.deque()
    largest, ahead = 1, 0
    with ThreadPoolExecutor(threads, thread_name_prefix="decode") as pool:
        try:
            for row in rows:
                waiting.append(pool.submit(make, row))
                while len(waiting) >= max(threads + 1, ahead):
                    result = waiting.popleft().result()
                    largest = max(largest, size_of(result))
                    ahead = min(_ROWS_AHEAD, _BYTES_AHEAD // largest)
                    yield result
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()
