"""The child process of ``process.DecodeProcess``: one request a line, arrays back in shared memory."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import mmap
import os
import select
import signal
import struct
import subprocess
import sys
import tempfile
import time
from typing import IO, Any

import numpy as np

from pipeline.data.media.errors import Reject
from pipeline.data.spec import DecodeLimits
from pipeline.errors import DataError

# Pieces of shared memory in which arrays come back, used in turn: a clip holds up to three arrays.
NUM_SLOTS = 4
# Maximum number of requests that are asked together; their pieces of memory come after the others.
MAX_TOGETHER = 16
# Seconds that the child may take to start.
_START_TIMEOUT_S = 120.0
# Seconds past the deadline, or past the end of its answers, after which the parent kills the child. The child normally
# ends itself by a kernel timer.
_GRACE_S = 5.0
# The child has one thread: a machine runs many of them.
_ONE_THREAD = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}


class Child:
    """A running child process. Raises DataError if it does not start."""

    def __init__(self, limits: DecodeLimits):
        self._limits = limits
        # When the current decoding began, 0 in between; the child writes it.
        self._clock = _memory_file()
        self._slots = [_memory_file() for _ in range(NUM_SLOTS + MAX_TOGETHER)]
        self._mapped: list[mmap.mmap | None] = [None] * len(self._slots)
        os.pwrite(self._clock.fileno(), struct.pack("d", 0.0), 0)
        with tempfile.TemporaryFile() as errors:
            try:
                self._process = self._start(errors)
            except OSError as e:
                raise DataError(f"the decode process did not start: {e}") from e
            self._wait_until_ready(errors)

    def _start(self, errors: IO[bytes]) -> subprocess.Popen:
        numbers = [file.fileno() for file in (self._clock, *self._slots)]
        arguments = [json.dumps(numbers), json.dumps(dataclasses.asdict(self._limits))]
        # The child can import whatever this process can.
        path = os.pathsep.join(p or os.getcwd() for p in sys.path)
        return subprocess.Popen(
            # -P: a queue.py in the working directory must not shadow the standard library's.
            [sys.executable, "-P", "-m", "pipeline.data.media.decode_worker", *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            bufsize=0,
            pass_fds=numbers,
            # A group of its own, which ends as one.
            process_group=0,
            env=os.environ | {"PYTHONPATH": path} | _ONE_THREAD,
        )

    def _wait_until_ready(self, errors: IO[bytes]) -> None:
        ready = _readable(self._out, _START_TIMEOUT_S) and os.read(self._out.fileno(), 64)
        if ready == b"ready\n":
            return
        if ready != b"":  # neither ready nor about to end
            self._kill()
        code = self._process.wait()
        errors.seek(0)
        output = errors.read().decode(errors="replace").strip().splitlines() or ["none"]
        self.end()
        raise DataError(f"the decode process did not start: exit code {code}, last line of its output: {output[-1]}")

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    @property
    def _out(self) -> IO[bytes]:
        assert self._process.stdout is not None
        return self._process.stdout

    def ask(self, request: dict) -> dict:
        """The answer to a request. Raises ``Died`` if the child ends first."""
        (answer,) = self.ask_together([request])
        return answer

    def ask_together(self, requests: list[dict]) -> list[dict]:
        """The answers to requests that wake each process once. Raises ``Died`` if the child ends before the last."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(b"".join(json.dumps(request).encode() + b"\n" for request in requests))
            lines = self._read_lines(len(requests))
        except BrokenPipeError:
            lines = []
        if not lines:
            raise Died(self._how_it_died(killed=False))
        return [json.loads(line) for line in lines]

    def _read_lines(self, number: int) -> list[bytes]:
        """Lines from the child; none if it ended. Raises ``Died`` if it had to be killed at a limit."""
        text, reads_since = b"", time.monotonic()
        while text.count(b"\n") < number:
            decoding_s = self._decoding_s()
            if _readable(self._out, 1.0):
                part = os.read(self._out.fileno(), 1 << 16)
                if not part:
                    return []
                text, reads_since = text + part, time.monotonic()
            elif not self.alive:
                # A process that a decoder has forked keeps the pipe open.
                return []
            elif decoding_s:
                reads_since = time.monotonic()
                if decoding_s > self._limits.timeout_s + _GRACE_S:
                    self._kill()
                    raise Died(self._how_it_died(killed=True))
            elif time.monotonic() - reads_since > self._limits.storage_s:
                self._kill()
                raise Died(_too_slow(self._limits.storage_s))
        return text.splitlines()

    def _decoding_s(self) -> float:
        """Seconds that the current decoding has lasted; 0 while nothing is decoded."""
        (began,) = struct.unpack("d", os.pread(self._clock.fileno(), 8, 0))
        return time.monotonic() - began if began else 0.0

    def _how_it_died(self, *, killed: bool) -> Reject | DataError:
        """killed: by this process, at the deadline."""
        if killed:
            return Reject("hung", f"no end after {self._limits.timeout_s:g} s")
        decoding = self._decoding_s() > 0
        try:
            code = self._process.wait(_GRACE_S)
        except subprocess.TimeoutExpired:
            # A decoder has closed all files of the process, the pipe among them.
            self._kill()
            code = self._process.wait()
        if code == -signal.SIGALRM:
            return Reject("hung", f"no end after {self._limits.timeout_s:g} s")
        how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        if not decoding:
            # It was reading storage or handing over the array: no decoder is to blame.
            return DataError(f"the decode process ended with {how} while it was not decoding; is memory short?")
        return Reject("crashed", f"the decode process ended with {how}")

    def array(self, slot: int, shape: list[int], dtype: np.dtype[Any]) -> np.ndarray:
        """The array in a slot, read-only, good until the slot is used again."""
        count = math.prod(shape)
        size, file = count * dtype.itemsize, self._slots[slot]
        if os.fstat(file.fileno()).st_size < size:
            raise DataError("the decode process sent a shorter array than it announced")
        mapped = self._mapped[slot]
        if mapped is None or len(mapped) < size:
            # Arrays of the old mapping keep it alive.
            mapped = self._mapped[slot] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        return np.frombuffer(mapped, dtype, count=count).reshape(shape)

    def _kill(self) -> None:
        """Kills the process and the programs that decoders have started, also once it has ended itself."""
        with contextlib.suppress(OSError):
            os.killpg(self.pid, signal.SIGKILL)

    def end(self) -> None:
        """Kills the process and closes its files; arrays already read stay valid."""
        self._kill()
        # A network file system that hangs holds even a killed process.
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(_GRACE_S)
        for file in (self._process.stdin, self._process.stdout, self._clock, *self._slots):
            assert file is not None
            file.close()


def _too_slow(limit_s: float) -> DataError:
    return DataError(
        f"storage: its file did not come within {limit_s:g} s, a quarter of cluster.stall_timeout_s; "
        "mend the storage, or leave out the row"
    )


class Died(Exception):
    """The child ended before it answered. how: the error that this is for the sample or the run."""

    def __init__(self, how: Reject | DataError):
        super().__init__(str(how))
        self.how = how


def _readable(pipe: IO[bytes], timeout_s: float) -> bool:
    """Whether a pipe has data or is closed at the other end. poll takes any file number, select only up to 1,023."""
    poll = select.poll()
    poll.register(pipe, select.POLLIN)
    return bool(poll.poll(1000 * timeout_s))


def _memory_file() -> IO[bytes]:
    try:
        return os.fdopen(os.memfd_create("decoded"), "r+b", buffering=0)
    except (AttributeError, OSError):  # not Linux, or a sandbox that forbids it
        return tempfile.TemporaryFile(buffering=0)
