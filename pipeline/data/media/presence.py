"""Checks that media files exist, without reading them, within a time limit."""

from __future__ import annotations

import queue
import threading
import time

import pyarrow as pa
import pyarrow.fs

from pipeline.data.media.storage import MEMBER, NO_NAME, check_store, file_info, resolve_filesystem

_THREADS = 8


def present(paths: list[str], *, timeout_s: float) -> list[bool | None]:
    """Whether each file exists; None if storage did not answer in time, or not clearly."""
    found: list[bool | None] = [None] * len(paths)
    asked: queue.SimpleQueue = queue.SimpleQueue()
    answers: queue.SimpleQueue = queue.SimpleQueue()
    for item in enumerate(paths):
        asked.put(item)
    for _ in range(min(_THREADS, len(paths))):
        # A server that never answers must not keep the process either.
        threading.Thread(target=_ask, args=(asked, answers), name="presence", daemon=True).start()
    end = time.monotonic() + timeout_s
    for _ in paths:
        try:
            number, answer = answers.get(timeout=max(0.0, end - time.monotonic()))
        except queue.Empty:
            break
        found[number] = answer
    return found


def _ask(asked: queue.SimpleQueue, answers: queue.SimpleQueue) -> None:
    while True:
        try:
            number, path = asked.get_nowait()
        except queue.Empty:
            return
        answers.put((number, _is_there(path)))


def _is_there(path: str) -> bool | None:
    member = MEMBER.fullmatch(path)
    try:
        filesystem, inner = resolve_filesystem(member[1] if member else path)
        if file_info(filesystem, inner).type == pyarrow.fs.FileType.File:
            return True
        check_store(filesystem, inner)
    except (pa.ArrowInvalid, UnicodeEncodeError):  # no file can have such a name
        return False
    # Other failures are reported when the file is read.
    except Exception as e:
        return False if isinstance(e, OSError) and e.errno in NO_NAME else None
    return False
