"""Decoders run in a process of their own, because the worst media crash them or never let them return.

The parent sends one request a line and waits; arrays come back in shared memory. A process that dies or passes its
deadline is replaced, and its sample is tried once more: a loaded machine may be to blame.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import mmap
import os
import select
import signal
import struct
import subprocess
import sys
import tempfile
import threading
import time

import numpy as np

from pipeline.data.media.clip import source_path
from pipeline.data.media.errors import Reject
from pipeline.data.media.storage import confirm_readable
from pipeline.data.spec import AudioSpec, DataSetSpec, DecodeLimits, ImageSpec, VideoSpec
from pipeline.errors import DataError, RequestError

# Pieces of shared memory in which arrays come back in turn: a clip holds up to three at once.
NUM_SLOTS = 4
_TRIES = 2
# Samples in a row that may kill their process: after more it is the decoder or the machine, not the media.
_MOST_DEATHS_IN_A_ROW = 32
_START_TIMEOUT_S = 120.0
# The process ends itself at the deadline (a timer of the kernel's); the parent steps in only where that did not work.
_GRACE_S = 5.0


@functools.lru_cache(maxsize=4)
def shared(limits: DecodeLimits) -> DecodeProcess:
    """The decode process of this process: all its sources use it in turn."""
    return DecodeProcess(limits)


class DecodeProcess:
    """Decodes in a child process, started at the first request. cpu_s: what its requests have cost so far."""

    def __init__(self, limits: DecodeLimits | None = None):
        self.limits, self.cpu_s = limits or DecodeLimits(), 0.0
        self._lock, self._child, self._deaths, self._slot = threading.Lock(), None, 0, 0

    def decode(self, row: dict, data_set: DataSetSpec, modality: str) -> np.ndarray:
        """``clip.decode_media`` of a manifest row, read-only and good until the fourth request after this one.

        Raises as ``decode_media`` does; also Reject for what crashes or hangs.
        """
        media = {c: row.get(c) for c in ("image", "video", "audio", "start_s", "end_s")}
        specs = _specs_json(data_set.image, data_set.video, data_set.audio, data_set.allowed_schemes)
        try:
            return self._reliably({"what": "decode", "row": media, "modality": modality, "specs": specs})
        except (DataError, RequestError) as e:
            raise type(e)(f"data set {data_set.name!r}, row {row.get('id')!r}: {e}") from e

    def probe(self, path: str, modality: str) -> dict[str, float]:
        """``probe.probe`` of a file."""
        return self._reliably({"what": "probe", "row": {modality: path}, "modality": modality})

    def close(self) -> None:
        """Ends the child; the next request starts another."""
        with self._lock:
            self._end_child()

    def _reliably(self, request: dict):
        with self._lock:
            self._slot = (self._slot + 1) % NUM_SLOTS
            line = json.dumps(request | {"slot": self._slot}).encode() + b"\n"
            for _ in range(_TRIES):
                answer, death = self._ask(line)
                if death is None:
                    self._deaths = 0
                    return self._result(answer)
                self._count_death(request, death)
                # A file system that hangs looks like a decoder that hangs.
                path, _ = source_path(request["row"], request["modality"])
                if os.path.isfile(path):
                    confirm_readable(path)
        raise death

    def _count_death(self, request: dict, how: Reject | DataError) -> None:
        self._deaths += 1
        if self._deaths >= _TRIES * _MOST_DEATHS_IN_A_ROW:
            raise DataError(
                f"the decoders died of {_MOST_DEATHS_IN_A_ROW} samples in a row, the last {request['row']} "
                f"({how}); is a decoder broken, or memory short?"
            )

    def _ask(self, line: bytes) -> tuple[dict | None, Reject | DataError | None]:
        """(the child's answer, None), or (None, how it died)."""
        if self._child is None or self._child.poll() is not None:
            self._start()
        answer, killed = b"", False
        try:
            self._child.stdin.write(line)
            answer, killed = self._read_line()
        except BrokenPipeError:
            pass
        except BaseException:
            # Interrupted while an answer is under way: the next request must not take it for its own.
            self._end_child()
            raise
        if not answer:
            return None, self._death(killed)
        answer = json.loads(answer)
        if "short_of_memory" in answer:
            # What an older process has kept counts against its limit: the next try has a fresh one.
            self._end_child()
            return None, Reject("out_of_memory", "decoding takes more memory than cluster.decode_memory_mb")
        return answer, None

    def _read_line(self) -> tuple[bytes, bool]:
        """(one line of the child, False); empty where it died, with True where it was killed at its deadline."""
        out = b""
        while not out.endswith(b"\n"):
            if _readable(self._child.stdout, 1.0):
                part = os.read(self._child.stdout.fileno(), 1 << 16)
                if not part:
                    return b"", False
                out += part
            elif self._decoding_s() > self.limits.timeout_s + _GRACE_S:
                self._child.kill()
                return b"", True
        return out, False

    def _decoding_s(self) -> float:
        """For how long the child has been decoding; 0 while it does not."""
        (began,) = struct.unpack("d", os.pread(self._clock.fileno(), 8, 0))
        return time.monotonic() - began if began else 0.0

    def _death(self, killed: bool) -> Reject | DataError:
        """How the child ended. killed: by this process, at the deadline."""
        decoding, code = self._decoding_s() > 0, self._child.wait()
        self._end_child()
        if killed or code == -signal.SIGALRM:
            return Reject("hung", f"no end after {self.limits.timeout_s:g} s")
        how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        if not decoding:
            # Reading storage, or handing over the array: no decoder was at work.
            return DataError(f"the decode process ended with {how} while it was not decoding; is memory short?")
        return Reject("crashed", f"the decode process ended with {how}")

    def _result(self, answer: dict):
        self.cpu_s += answer["cpu_s"]
        try:
            if "reject" in answer:
                raise Reject(*answer["reject"])
            if "wrong_request" in answer:
                raise RequestError(answer["wrong_request"])
            if "failed" in answer:
                raise DataError(answer["failed"])
            return answer["values"] if "values" in answer else self._array(answer["shape"], np.dtype(answer["dtype"]))
        finally:
            if answer["grown"]:
                self._end_child()

    def _array(self, shape: list[int], dtype: np.dtype) -> np.ndarray:
        size, file = int(np.prod(shape)) * dtype.itemsize, self._slots[self._slot]
        if os.fstat(file.fileno()).st_size < size:
            raise DataError("the decode process sent less than it said")
        mapped = self._mapped[self._slot]
        if mapped is None or len(mapped) < size:
            # Arrays of the old mapping keep it alive.
            mapped = self._mapped[self._slot] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        return np.frombuffer(mapped, dtype, count=size // dtype.itemsize).reshape(shape)

    def _start(self) -> None:
        try:
            self._start_child()
        except OSError as e:
            raise DataError(f"the decode process did not start: {e}") from e

    def _start_child(self) -> None:
        self._end_child()
        # When the current decoding began, 0 between two; then the slots.
        self._clock, *self._slots = files = [_memory_file() for _ in range(1 + NUM_SLOTS)]
        self._mapped = [None] * NUM_SLOTS
        os.pwrite(self._clock.fileno(), struct.pack("d", 0.0), 0)
        numbers, limits = [f.fileno() for f in files], json.dumps(dataclasses.asdict(self.limits))
        errors = tempfile.TemporaryFile()
        self._child = subprocess.Popen(
            # -P: a queue.py in the working directory must not stand for the library's.
            [sys.executable, "-P", "-m", "pipeline.data.media.decode_worker", json.dumps(numbers), limits],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            bufsize=0,
            pass_fds=numbers,
            # What this process can import, the child can; decoders are many processes of one thread.
            env=os.environ | {"PYTHONPATH": os.pathsep.join(p or os.getcwd() for p in sys.path)} | _ONE_THREAD,
        )
        ready = _readable(self._child.stdout, _START_TIMEOUT_S) and os.read(self._child.stdout.fileno(), 64)
        if ready != b"ready\n":
            if ready != b"":  # neither ready nor about to end
                self._child.kill()
            code = self._child.wait()
            errors.seek(0)
            said = errors.read().decode(errors="replace").strip().splitlines() or ["nothing"]
            raise DataError(f"the decode process did not start: exit code {code}, it said: {said[-1]}")
        errors.close()

    def _end_child(self) -> None:
        if self._child is not None:
            self._child.kill()
            self._child.wait()
            self._child.stdin.close()
            self._child.stdout.close()
            for file in (self._clock, *self._slots):
                file.close()
            self._child = None


_ONE_THREAD = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}


def _readable(pipe, timeout_s: float) -> bool:
    """Whether there is something to read, or the other end is closed. poll takes any file number, select only 1,023."""
    poll = select.poll()
    poll.register(pipe, select.POLLIN)
    return bool(poll.poll(1000 * timeout_s))


def _memory_file():
    try:
        return os.fdopen(os.memfd_create("decoded"), "r+b", buffering=0)
    except (AttributeError, OSError):  # other systems than Linux, and sandboxes that forbid it
        return tempfile.TemporaryFile(buffering=0)


@functools.lru_cache(maxsize=64)
def _specs_json(image: ImageSpec, video: VideoSpec, audio: AudioSpec, schemes: tuple[str, ...]) -> str:
    """What decoding depends on of a data set."""
    specs = {"image": image, "video": video, "audio": audio}
    return json.dumps({name: dataclasses.asdict(spec) for name, spec in specs.items()} | {"schemes": schemes})
