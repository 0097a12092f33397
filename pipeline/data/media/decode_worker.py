"""The process that ``process.DecodeProcess`` starts: requests on standard input, answers on standard output.

Run as a module, ``python -m pipeline.data.media.decode_worker FILES LIMITS``, both JSON: the file numbers of the clock
and the slots, and ``process.DecodeLimits``. It ends when its parent does.
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

import numpy as np

from pipeline.data.media.clip import open_media
from pipeline.data.media.errors import Reject
from pipeline.data.media.probe import probe
from pipeline.data.media.storage import confirm_readable, local_path_or_bytes
from pipeline.data.spec import AudioSpec, DataSetSpec, ImageSpec, VideoSpec
from pipeline.errors import DataError, RequestError, one_line
from pipeline.host_memory import keep_freed_memory

# A clip or two; what is larger goes back to the system.
_KEPT_BYTES = 64 << 20
# Larger files that are not on this machine are not read only to be looked at.
_PROBED_BYTES = 256 << 20
_OF_CAPS = ("too_large", "too_long", "bad_times")


class Worker:
    def __init__(self, clock: int, slots: list[int], limits: dict):
        self._clock, self._slots, self._limits = clock, slots, limits
        self._mapped: list[mmap.mmap | None] = [None] * len(slots)
        self._first_rss = None

    def answer(self, line: bytes) -> dict:
        """The answer to one request. Whatever a decoder raises has become a Reject before it is here."""
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
        # A row may hold anything.
        except Exception as e:
            out = {"reject": ["not_decodable", f"{type(e).__name__}: {one_line(e)[:120]}"]}
        return out | {"cpu_s": time.process_time() - began, "grown": self._has_grown()}

    def _decode(self, request: dict) -> dict:
        decode = open_media(request["row"], _data_set(request["specs"]), request["modality"])
        try:
            with self._deadline():
                array = decode()
        except Reject as e:
            source = decode.args[0]
            # Damage, or storage that fails in the middle of a file?
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
        (path,) = request["row"].values()
        source = local_path_or_bytes(path, max_bytes=_PROBED_BYTES)
        with self._deadline():
            return {"values": probe(source, request["modality"])}

    @contextlib.contextmanager
    def _deadline(self):
        """The kernel ends this process at the deadline, even while a decoder holds the interpreter lock."""
        os.pwrite(self._clock, struct.pack("d", time.monotonic()), 0)
        signal.setitimer(signal.ITIMER_REAL, self._limits["timeout_s"])
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            os.pwrite(self._clock, struct.pack("d", 0.0), 0)

    def _has_grown(self) -> bool:
        """Whether decoders have kept more memory than they should: the parent then starts a fresh process."""
        rss = _status_bytes("RssAnon")  # without the shared slots
        if self._first_rss is None:
            self._first_rss = rss
        # An old process must have room for what a fresh one can decode.
        return rss - self._first_rss > min(self._limits["recycle_bytes"], self._limits["memory_bytes"] // 4)


@functools.lru_cache(maxsize=64)
def _data_set(text: str) -> DataSetSpec:
    """A data set as far as decoding knows it, from ``process._specs_json``."""
    found = json.loads(text)
    values = {
        name: kind(**{k: tuple(v) if isinstance(v, list) else v for k, v in found[name].items()})
        for name, kind in {"image": ImageSpec, "video": VideoSpec, "audio": AudioSpec}.items()
    }
    return DataSetSpec(name="", manifest="", held_out={}, schemes=tuple(found["schemes"]), **values)


def _status_bytes(key: str) -> int:
    """A line of /proc/self/status in bytes; 0 where there is no such file."""
    try:
        with open("/proc/self/status", encoding="ascii") as file:
            return next((int(line.split()[1]) << 10 for line in file if line.startswith(key + ":")), 0)
    except OSError:
        return 0


def _limit_memory(memory_bytes: int) -> None:
    """An absurd header asks for absurd memory: the request fails here instead of the machine."""
    now = _status_bytes("VmData")
    if now:
        resource.setrlimit(resource.RLIMIT_DATA, (now + memory_bytes, resource.RLIM_INFINITY))


def main() -> None:
    (clock, *slots), limits = json.loads(sys.argv[1]), json.loads(sys.argv[2])
    # Libraries print; only answers go to the parent, and what is said of a start that fails.
    answers, nowhere = os.fdopen(os.dup(1), "wb", buffering=0), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    # These go to whole groups of processes; the parent decides what they mean, and this one ends with it.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    keep_freed_memory(_KEPT_BYTES)
    _limit_memory(limits["memory_bytes"])
    worker = Worker(clock, slots, limits)
    os.dup2(nowhere, 2)
    answers.write(b"ready\n")
    for line in sys.stdin.buffer:
        answers.write(json.dumps(worker.answer(line)).encode() + b"\n")


if __name__ == "__main__":
    main()
