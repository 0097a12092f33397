"""Runs decoders in a separate process, because damaged media can crash them or make them hang.

A child that dies or passes its deadline is replaced, and its sample is tried once more: a loaded machine may be the
cause. ``child.Child`` is the process itself.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import json
import os
import threading
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np

from pipeline.data.media.child import MAX_TOGETHER, NUM_SLOTS, Child, Died
from pipeline.data.media.clip import MediaFile, media_file
from pipeline.data.media.errors import Reject
from pipeline.data.media.storage import confirm_readable
from pipeline.data.spec import DataSetSpec, DecodeLimits
from pipeline.errors import DataError, RequestError

# Times that a sample is tried before it is a reject.
_TRIES = 2
# Consecutive samples that may kill their process. Beyond it, the decoder or the machine is at fault, not the media.
_MAX_DEATHS_IN_A_ROW = 32
# CPU seconds of decoding that are asked for together: enough to make little of waking two processes for them.
_TOGETHER_S = 0.05


@functools.lru_cache(maxsize=4)
def shared(limits: DecodeLimits) -> DecodeProcess:
    """The decode process of this process: all its sources use it in turn."""
    return DecodeProcess(limits)


class DecodeProcess:
    """Decodes in a child process, started at the first request. cpu_s: CPU seconds its requests have cost so far."""

    def __init__(self, limits: DecodeLimits | None = None):
        self.limits = limits or DecodeLimits()
        self.cpu_s = 0.0
        self._lock = threading.Lock()
        self._child: Child | None = None
        self._deaths = 0
        self._slot = 0
        self._early: list[_Early] = []
        # Number of files that are asked for one at a time, since one of them ends the child.
        self._alone = 0
        # Decode function → CPU seconds of a request: a mean in which the latest ones weigh most.
        self._mean_s: dict[str, float] = {}

    def decode(self, row: dict, data_set: DataSetSpec, modality: str, *, next_rows: Iterable[dict] = ()) -> np.ndarray:
        """``clip.decode_media`` of a manifest row, read-only and good until the fourth request after this one.

        next_rows: whose files will be wanted after this one, probably; some of them are decoded with it. The array is
        then good until the next request.
        Raises as ``decode_media`` does; also Reject for a file that crashes or hangs the decoder.
        """
        file = media_file(row, data_set, modality)
        try:
            return self.decode_file(file, next_files=_files(next_rows, data_set, modality))
        except (DataError, RequestError) as e:
            raise type(e)(f"data set {data_set.name!r}, row {row.get('id')!r}: {e}") from e

    def decode_file(self, file: MediaFile, *, next_files: Iterable[MediaFile] = ()) -> np.ndarray:
        """A file as ``decode`` gives it; errors name no row."""
        with self._lock:
            found = self._take_early(file) or self._decode_together(file, next_files)
            if found is not None:
                return self._result(found.answer, found.array, file.decode)
        return self._reliably({"what": "decode", "file": _file_json(file)}, file.path, file.decode)

    def _take_early(self, file: MediaFile) -> _Early | None:
        """What was decoded together with another file; those before it are not wanted any more."""
        for number, early in enumerate(self._early):
            if early.file == file:
                del self._early[: number + 1]
                return early
        return None

    def _decode_together(self, file: MediaFile, next_files: Iterable[MediaFile]) -> _Early | None:
        """Decodes a file, and those after it for the next calls. None where it is to be decoded alone: decoding takes
        long, or one of them ends the child, and which one is found by asking for one at a time."""
        self._alone, alone = max(0, self._alone - 1), self._alone > 0
        number = min(MAX_TOGETHER, int(_TOGETHER_S / max(self._mean_s.get(file.decode, _TOGETHER_S), 1e-6)))
        files = [file, *itertools.islice(next_files, number - 1)] if number > 1 and not alone else []
        if len(files) < 2:
            return None
        self._early = []
        slots = range(NUM_SLOTS, NUM_SLOTS + len(files))
        requests = [{"what": "decode", "file": _file_json(f), "slot": s} for f, s in zip(files, slots, strict=True)]
        try:
            answers = self._ask(requests)
        except Died:
            self._alone = len(files) - 1
            return None
        arrays = [self._array(slot, answer) for slot, answer in zip(slots, answers, strict=True)]
        self._early = [_Early(*found) for found in zip(files, answers, arrays, strict=True)]
        if any(answer["grown"] for answer in answers):
            self._end_child()
        return self._early.pop(0)

    def probe(self, path: str, modality: str) -> dict[str, float]:
        """``probe.probe`` of a file."""
        return self._reliably({"what": "probe", "path": path, "modality": modality}, path, "probe")

    def close(self) -> None:
        """Ends the child; the next request starts another."""
        with self._lock:
            self._end_child()

    def _reliably(self, request: dict, path: str, name: str) -> Any:
        with self._lock:
            slot = self._slot = (self._slot + 1) % NUM_SLOTS
            for attempt in range(1, _TRIES + 1):
                try:
                    (answer,) = self._ask([request | {"slot": slot}])
                except Died as death:
                    self._count_death(path, death.how)
                    # A file system that hangs looks like a decoder that hangs, and would hang this process too.
                    if isinstance(death.how, Reject) and os.path.isfile(path):
                        confirm_readable(path)
                    if attempt == _TRIES:
                        raise death.how from None
                    continue
                array = self._array(slot, answer)
                if answer["grown"]:
                    self._end_child()
                return self._result(answer, array, name)

    def _count_death(self, path: str, how: Reject | DataError) -> None:
        self._deaths += 1
        if self._deaths >= _TRIES * _MAX_DEATHS_IN_A_ROW:
            raise DataError(
                f"the decoders died of {_MAX_DEATHS_IN_A_ROW} samples in a row, the last {path} ({how}); is a decoder "
                "broken, or memory short?"
            )

    def _ask(self, requests: list[dict]) -> list[dict]:
        """The child's answers. Raises Died, after which the next request has a fresh child."""
        if self._child is None or not self._child.alive:
            self._end_child()
            self._child = Child(self.limits)
        try:
            answers = self._child.ask_together(requests)
        # Also if interrupted before the answer: the next request must not take it for its own.
        except BaseException:
            self._end_child()
            raise
        if any("short_of_memory" in answer for answer in answers):
            # Memory that an older process has kept counts against its limit: the next try has a fresh one.
            self._end_child()
            raise Died(Reject("out_of_memory", "decoding takes more memory than cluster.decode_memory_mb"))
        return answers

    def _array(self, slot: int, answer: dict) -> np.ndarray | None:
        """The array of an answer, if it has one; a view of memory that stays when the child ends."""
        assert self._child is not None
        return self._child.array(slot, answer["shape"], np.dtype(answer["dtype"])) if "shape" in answer else None

    def _result(self, answer: dict, array: np.ndarray | None, name: str) -> Any:
        """name: of what has answered."""
        self._deaths = 0
        spent_s = answer["cpu_s"]
        self.cpu_s += spent_s
        self._mean_s[name] = self._mean_s.get(name, spent_s) * 7 / 8 + spent_s / 8
        if "reject" in answer:
            raise Reject(*answer["reject"])
        if "wrong_request" in answer:
            raise RequestError(answer["wrong_request"])
        if "failed" in answer:
            raise DataError(answer["failed"])
        return answer["values"] if array is None else array

    def _end_child(self) -> None:
        if self._child is not None:
            child, self._child = self._child, None
            child.end()


class _Early(NamedTuple):
    """A file that was decoded together with one before it, and the child's answer."""

    file: MediaFile
    answer: dict
    array: np.ndarray | None


def _files(rows: Iterable[dict], data_set: DataSetSpec, modality: str) -> Iterator[MediaFile]:
    """The files of rows that name one."""
    for row in rows:
        with contextlib.suppress(Reject):
            yield media_file(row, data_set, modality)


def _file_json(file: MediaFile) -> dict:
    """A file as ``decode_worker`` reads it."""
    settings, schemes = _settings_json(file.settings), list(file.schemes)
    return {"path": file.path, "part": vars(file.part), "decode": file.decode, "settings": settings, "schemes": schemes}


@functools.lru_cache(maxsize=64)
def _settings_json(settings: Any) -> str:
    """Settings as JSON text, which the child keeps parsed: they are the same for all files of a data set."""
    kind = type(settings)
    return json.dumps({"type": f"{kind.__module__}:{kind.__qualname__}", "values": dataclasses.asdict(settings)})
