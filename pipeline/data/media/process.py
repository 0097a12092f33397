"""Runs decoders in a separate process, because damaged media can crash them or make them hang.

A child that dies or passes its deadline is replaced, and its sample is tried once more: a loaded machine may be the
cause. ``child.Child`` is the process itself.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import threading
from typing import Any

import numpy as np

from pipeline.data.media.child import NUM_SLOTS, Child, Died
from pipeline.data.media.clip import MediaFile, media_file
from pipeline.data.media.errors import Reject
from pipeline.data.media.storage import confirm_readable
from pipeline.data.spec import DataSetSpec, DecodeLimits
from pipeline.errors import DataError, RequestError

# Times that a sample is tried before it is a reject.
_TRIES = 2
# Consecutive samples that may kill their process. Beyond it, the decoder or the machine is at fault, not the media.
_MAX_DEATHS_IN_A_ROW = 32


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

    def decode(self, row: dict, data_set: DataSetSpec, modality: str) -> np.ndarray:
        """``clip.decode_media`` of a manifest row, read-only and good until the fourth request after this one.

        Raises as ``decode_media`` does; also Reject for a file that crashes or hangs the decoder.
        """
        file = media_file(row, data_set, modality)
        try:
            return self.decode_file(file)
        except (DataError, RequestError) as e:
            raise type(e)(f"data set {data_set.name!r}, row {row.get('id')!r}: {e}") from e

    def decode_file(self, file: MediaFile) -> np.ndarray:
        """A file as ``decode`` gives it; errors name no row."""
        return self._reliably({"what": "decode", "file": _file_json(file)}, file.path)

    def probe(self, path: str, modality: str) -> dict[str, float]:
        """``probe.probe`` of a file."""
        return self._reliably({"what": "probe", "path": path, "modality": modality}, path)

    def close(self) -> None:
        """Ends the child; the next request starts another."""
        with self._lock:
            self._end_child()

    def _reliably(self, request: dict, path: str) -> Any:
        with self._lock:
            self._slot = (self._slot + 1) % NUM_SLOTS
            for attempt in range(1, _TRIES + 1):
                try:
                    answer = self._ask(request | {"slot": self._slot})
                except Died as death:
                    self._count_death(path, death.how)
                    # A file system that hangs looks like a decoder that hangs.
                    if os.path.isfile(path):
                        confirm_readable(path)
                    if attempt == _TRIES:
                        raise death.how from None
                    continue
                self._deaths = 0
                return self._result(answer)

    def _count_death(self, path: str, how: Reject | DataError) -> None:
        self._deaths += 1
        if self._deaths >= _TRIES * _MAX_DEATHS_IN_A_ROW:
            raise DataError(
                f"the decoders died of {_MAX_DEATHS_IN_A_ROW} samples in a row, the last {path} ({how}); is a decoder "
                "broken, or memory short?"
            )

    def _ask(self, request: dict) -> dict:
        """The child's answer. Raises Died, after which the next request has a fresh child."""
        if self._child is None or not self._child.alive:
            self._end_child()
            self._child = Child(self.limits)
        try:
            answer = self._child.ask(request)
        # Also if interrupted before the answer: the next request must not take it for its own.
        except BaseException:
            self._end_child()
            raise
        if "short_of_memory" in answer:
            # Memory that an older process has kept counts against its limit: the next try has a fresh one.
            self._end_child()
            raise Died(Reject("out_of_memory", "decoding takes more memory than cluster.decode_memory_mb"))
        return answer

    def _result(self, answer: dict) -> Any:
        self.cpu_s += answer["cpu_s"]
        try:
            if "reject" in answer:
                raise Reject(*answer["reject"])
            if "wrong_request" in answer:
                raise RequestError(answer["wrong_request"])
            if "failed" in answer:
                raise DataError(answer["failed"])
            if "values" in answer:
                return answer["values"]
            assert self._child is not None
            return self._child.array(self._slot, answer["shape"], np.dtype(answer["dtype"]))
        finally:
            if answer["grown"]:
                self._end_child()

    def _end_child(self) -> None:
        if self._child is not None:
            child, self._child = self._child, None
            child.end()


def _file_json(file: MediaFile) -> dict:
    """A file as ``decode_worker`` reads it."""
    part = dataclasses.asdict(file.part)
    settings, schemes = _settings_json(file.settings), list(file.schemes)
    return {"path": file.path, "part": part, "decode": file.decode, "settings": settings, "schemes": schemes}


@functools.lru_cache(maxsize=64)
def _settings_json(settings: Any) -> str:
    """Settings as JSON text, which the child keeps parsed: they are the same for all files of a data set."""
    kind = type(settings)
    return json.dumps({"type": f"{kind.__module__}:{kind.__qualname__}", "values": dataclasses.asdict(settings)})
