"""The process that ``child.Child`` starts: requests on standard input, answers on standard output.

Run as a module, ``python -m pipeline.data.media.decode_worker FILES LIMITS``, both JSON: the file numbers of the clock
and the slots, and ``spec.DecodeLimits``. It ends when its parent does.
"""

from __future__ import annotations

import contextlib
import functools
import json
import mmap
import os
import resource
import signal
import struct
import sys
import time
from collections.abc import Iterator
from typing import Any

import numpy as np

from pipeline.data.media.clip import MediaFile, open_media
from pipeline.data.media.errors import Reject
from pipeline.data.media.part import Part
from pipeline.data.media.probe import probe
from pipeline.data.media.storage import confirm_readable, local_path_or_bytes
from pipeline.data.modalities import load
from pipeline.errors import DataError, RequestError, one_line
from pipeline.host_memory import keep_freed_memory

# Bytes of freed memory that stay in the process: a clip or two.
_KEPT_BYTES = 64 << 20
# Maximum bytes of a remote file that is downloaded just to be probed.
_PROBED_BYTES = 256 << 20
# Reasons that say nothing about the state of the storage.
_OF_CAPS = ("too_large", "too_long", "bad_times")


class Worker:
    """Answers requests. clock, slots: file numbers of the shared memory."""

    def __init__(self, clock: int, slots: list[int], limits: dict):
        self._clock = clock
        self._slots = slots
        self._limits = limits
        self._mapped: list[mmap.mmap | None] = [None] * len(slots)
        self._statm = _open_statm()
        self._first_bytes: int | None = None
        self._pid = os.getpid()

    def answer(self, line: bytes) -> dict:
        """The answer to one request. Exceptions of decoders have already become Rejects."""
        began, request = time.process_time(), json.loads(line)
        try:
            out = self._decode(request) if request["what"] == "decode" else self._probe(request)
        except Reject as e:
            out = {"reject": [e.reason, e.detail]}
        except RequestError as e:
            out = {"wrong_request": str(e)}
        except DataError as e:
            out = {"failed": str(e)}
        except MemoryError:
            out = {"short_of_memory": True}
        except OSError as e:
            out = {"failed": f"the decode process: {e}"}
        # A row may hold any values, and a decoder may raise what ends a process (sys.exit, a panic of Rust).
        except BaseException as e:
            out = {"reject": ["not_decodable", f"{type(e).__name__}: {one_line(e, limit=120)}"]}
        return out | {"cpu_s": time.process_time() - began, "grown": self._has_grown()}

    def _decode(self, request: dict) -> dict:
        decode = open_media(_media_file(request["file"]))
        try:
            with self._deadline():
                array = decode()
        except Reject as e:
            source = decode.args[0]
            # Tells damage from storage that failed in the middle of a file.
            if e.reason not in _OF_CAPS and isinstance(source, str):
                confirm_readable(source)
            raise
        target = np.frombuffer(self._memory(request["slot"], array.nbytes), array.dtype, count=array.size)
        target.reshape(array.shape)[...] = array
        return {"shape": array.shape, "dtype": array.dtype.str}

    def _memory(self, slot: int, size: int) -> mmap.mmap:
        """A slot's shared memory, with room for ``size`` bytes."""
        mapped = self._mapped[slot]
        if mapped is None or len(mapped) < size:
            os.ftruncate(self._slots[slot], size)
            mapped = self._mapped[slot] = mmap.mmap(self._slots[slot], size)
        return mapped

    def _probe(self, request: dict) -> dict:
        source = local_path_or_bytes(request["path"], max_bytes=_PROBED_BYTES)
        with self._deadline():
            return {"values": probe(source, request["modality"])}

    @contextlib.contextmanager
    def _deadline(self) -> Iterator[None]:
        """Lets the kernel end this process at the deadline, even while a decoder holds the GIL."""
        os.pwrite(self._clock, struct.pack("d", time.monotonic()), 0)
        signal.setitimer(signal.ITIMER_REAL, self._limits["timeout_s"])
        try:
            yield
        finally:
            if os.getpid() != self._pid:
                # A decoder has forked, and its child has come back: the answer is its parent's alone.
                os._exit(1)
            signal.setitimer(signal.ITIMER_REAL, 0)
            os.pwrite(self._clock, struct.pack("d", 0.0), 0)

    def _has_grown(self) -> bool:
        """Whether decoders have kept too much memory, so that the parent starts a fresh process."""
        now = self._own_bytes()
        if self._first_bytes is None:
            self._first_bytes = now
        # An old process must be able to decode whatever a fresh one can.
        return now - self._first_bytes > min(self._limits["recycle_bytes"], self._limits["memory_bytes"] // 4)

    def _own_bytes(self) -> int:
        """Resident memory without the shared slots; 0 where the system does not tell."""
        if self._statm is None:
            return 0
        resident, shared = os.pread(self._statm, 256, 0).split()[1:3]
        return (int(resident) - int(shared)) * mmap.PAGESIZE


def _media_file(file: dict) -> MediaFile:
    """The file of a request, as ``process._file_json`` wrote it."""
    return MediaFile(
        path=file["path"],
        part=Part(**file["part"]),
        decode=file["decode"],
        settings=_settings(file["settings"]),
        schemes=tuple(file["schemes"]),
    )


@functools.lru_cache(maxsize=64)
def _settings(text: str) -> Any:
    found = json.loads(text)
    values = {name: tuple(v) if isinstance(v, list) else v for name, v in found["values"].items()}
    return load(found["type"])(**values)


def _open_statm() -> int | None:
    """The file with this process's memory in pages, which is read after every request: open once."""
    try:
        return os.open("/proc/self/statm", os.O_RDONLY)
    except OSError:
        return None


def _status_bytes(key: str) -> int:
    """A line of /proc/self/status in bytes; 0 on systems without that file."""
    try:
        with open("/proc/self/status", encoding="ascii") as file:
            return next((int(line.split()[1]) << 10 for line in file if line.startswith(key + ":")), 0)
    except OSError:
        return 0


def _limit_memory(memory_bytes: int) -> None:
    """Caps the memory of this process: a damaged header may ask for any amount."""
    now = _status_bytes("VmData")
    if now:
        resource.setrlimit(resource.RLIMIT_DATA, (now + memory_bytes, resource.RLIM_INFINITY))


def main() -> None:
    (clock, *slots), limits = json.loads(sys.argv[1]), json.loads(sys.argv[2])
    # Libraries may print to stdout. Redirect it: the parent must see only answers, and on stderr a failed start.
    answers, nowhere = os.fdopen(os.dup(1), "wb", buffering=0), os.open(os.devnull, os.O_RDWR)
    os.dup2(nowhere, 1)
    # A program that a decoder starts may read what is on its stdin: it must find no requests there.
    requests = os.dup(0)
    os.dup2(nowhere, 0)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    # These signals reach the whole process group. The parent decides what they mean; this process ends with it.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    keep_freed_memory(_KEPT_BYTES)
    _limit_memory(limits["memory_bytes"])
    worker = Worker(clock, slots, limits)
    os.dup2(nowhere, 2)
    answers.write(b"ready\n")
    for lines in _lines_together(requests):
        answers.write(b"".join(json.dumps(worker.answer(line)).encode() + b"\n" for line in lines))
    # Programs and threads that decoders have started would outlive the parent.
    with contextlib.suppress(OSError):
        os.killpg(os.getpid(), signal.SIGKILL)
    os._exit(0)


def _lines_together(file: int) -> Iterator[list[bytes]]:
    """The lines of a pipe, those together that have been written together."""
    rest = b""
    while text := os.read(file, 1 << 16):
        *lines, rest = (rest + text).split(b"\n")
        yield lines


if __name__ == "__main__":
    main()
