"""The lock of a run directory: a lock on a file, or in a bucket an object that names its holder, who renews it.

In a bucket, a holder on this machine is alive or dead as its process is, at once. One elsewhere shows by its renewals
that it lives: when they stop for ``_LEASE_S``, it counts as dead, and a process that waits takes its place. A holder
that finds another one in the object ends its process. It may have been frozen, and its workers not: each process of a
run writes below the run directory only while the object names the run's holder (``ObjectStore.guard``).
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path

from pipeline.errors import EXIT_FAILED, RequestError, one_line
from pipeline.stopping import end_process
from pipeline.store.ownership import folder_of
from pipeline.store.path import ObjectPath
from pipeline.waiting import say, waiting_for

# Seconds between two renewals, and without one until a holder counts as dead.
_RENEW_S = 5.0
_LEASE_S = 60.0
# Seconds after which a new holder looks again: a server that ignores conditions may have taken two.
_SETTLE_S = 0.5
_POLL_S = 0.5
# Seconds between two looks at a folder, and looks at which it must be another one.
_LOOK_S, _LOOKS = 5.0, 3
# Errors of file systems without locks, as network ones may be mounted.
_NO_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK)


class FolderLock:
    """The lock of a run directory on a disk, held from the start of this object to ``close`` or the process's end.

    lost: called once the folder was deleted, moved or unmounted; ends this process by default. What is written to its
    path from then on lies elsewhere, beside no recipe. Raises RequestError while another process holds it.
    """

    def __init__(self, path: Path, *, lost: Callable[[], None] | None = None) -> None:
        self._folder, self._lost = path.parent, lost or self._end
        self._file = open(path, "w")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as e:
            self._file.close()
            raise RequestError(
                f"--run-dir {self._folder}: another process is training there; wait for it or stop it"
            ) from e
        except OSError as e:
            if e.errno not in _NO_LOCKS:
                raise
            say(f"warning: the storage of {self._folder} has no locks: a second run there would not be refused")
        # Open, so that no other folder gets its number.
        self._descriptor = os.open(self._folder, os.O_RDONLY)
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="lock", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Lets go of the lock."""
        self._closed.set()
        # Storage that hangs may hold its look.
        self._thread.join(_LOOK_S)
        os.close(self._descriptor)
        self._file.close()

    def _watch(self) -> None:
        looks = 0
        while not self._closed.wait(_LOOK_S):
            looks = looks + 1 if self._is_another() else 0
            if looks == _LOOKS:
                return self._lost()

    def _is_another(self) -> bool:
        """Whether the path leads to another folder, or to none. Storage that does not answer tells nothing."""
        try:
            return not os.path.samestat(os.stat(self._folder), os.fstat(self._descriptor))
        except (FileNotFoundError, NotADirectoryError):
            return True
        except OSError:
            return False

    def _end(self) -> None:
        say(
            f"failed: {self._folder} was deleted, moved or unmounted during the run, which ends; the same command with "
            "--run-dir where it is now goes on from its newest checkpoint"
        )
        end_process(EXIT_FAILED)


class ObjectLock:
    """The lock, held from the start of this object to ``close``.

    lost: called if another process has taken the lock; ends this one by default. Raises RequestError while another
    process holds it.
    """

    def __init__(self, path: ObjectPath, *, lost: Callable[[], None] | None = None) -> None:
        self._path, self._lost = path, lost or self._end
        self._me = {"owner": uuid.uuid4().hex, "host": socket.gethostname(), "process": _process(os.getpid())}
        self._renewals = 0
        with waiting_for(f"the lock of {path.parent}, which a process elsewhere held"):
            self._take()
        path.store.guard(folder_of(path), lock=path.key, owner=self._me["owner"])
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._renew, name="lock", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Lets go of the lock."""
        self._closed.set()
        self._thread.join()
        self._path.store.unguard(folder_of(self._path))
        try:
            if self._holder() == self._me["owner"]:
                self._path.unlink()
        except OSError as e:
            # It runs out by itself.
            say(f"warning: the lock of {self._path.parent} stays for {_LEASE_S:g} s: {one_line(e)}")

    def _take(self) -> None:
        first, since = None, time.monotonic()
        while True:
            found, version = self._path.store.versioned(self._path.key)
            if found is None or _is_dead_here(found) or time.monotonic() - since >= _LEASE_S:
                self._path.store.replace(self._path.key, self._content(), version)
                time.sleep(_SETTLE_S)
                # Refused or not: if an answer gets lost, the write that follows is refused because of the first one.
                if self._holder() == self._me["owner"]:
                    return
                first, since = None, time.monotonic()
                continue
            if _is_alive_here(found) or first not in (None, found):
                raise RequestError(
                    f"--run-dir {self._path.parent}: another process is training there ({_name(found)}); wait for it "
                    "or stop it"
                )
            first = found
            time.sleep(_POLL_S)

    def _content(self) -> bytes:
        self._renewals += 1
        return json.dumps(self._me | {"renewals": self._renewals}).encode()

    def _holder(self) -> str | None:
        return _parsed(self._path.store.get(self._path.key)).get("owner")

    def _renew(self) -> None:
        while not self._closed.wait(_RENEW_S):
            try:
                found, version = self._path.store.versioned(self._path.key)
                if _parsed(found).get("owner") != self._me["owner"]:
                    return self._lost()
                # A process that was frozen since it looked must not take back what another has taken meanwhile. Where
                # the last renewal was refused, the server gives another version than it takes: without a condition.
                if _parsed(found).get("renewals") == self._renewals:
                    self._path.store.replace(self._path.key, self._content(), version)
                else:
                    self._path.store.put(self._path.key, self._content())
            except OSError:
                # Out of reach for all, and the holder is seen when it is back.
                continue

    def _end(self) -> None:
        line = f"failed: another process has taken over {self._path.parent}; this one ends, its saved state is safe"
        say(line)
        end_process(EXIT_FAILED)


def _process(pid: int) -> list[str] | None:
    """A process, so that no other is mistaken for it: machine, namespace, number and start; None if there is none."""
    try:
        machine = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        namespace = os.readlink("/proc/self/ns/pid")
        started = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    # A zombie holds nothing.
    return None if started[0] in "ZX" else [machine, namespace, str(pid), started[19]]


def _parsed(content: bytes | None) -> dict:
    try:
        value = json.loads(content or b"")
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def _is_here(process: object) -> bool:
    own = _process(os.getpid())
    return isinstance(process, list) and len(process) == 4 and own is not None and process[:2] == own[:2]


def _is_dead_here(content: bytes) -> bool:
    process = _parsed(content).get("process")
    return _is_here(process) and _process(int(process[2])) != process


def _is_alive_here(content: bytes) -> bool:
    process = _parsed(content).get("process")
    return _is_here(process) and _process(int(process[2])) == process


def _name(content: bytes) -> str:
    found = _parsed(content)
    process = found.get("process")
    return f"host {found.get('host')}" + (f", process {process[2]}" if isinstance(process, list) else "")
