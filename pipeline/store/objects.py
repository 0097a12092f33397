"""Objects of a bucket on S3 or Google Cloud Storage: whole reads and writes, listings, deletion.

tensorstore speaks to both, as it does for Orbax; it finds credentials as the providers' own tools do. Temporary errors
are retried for about a minute; then, and at once when access is denied, a ``StoreError`` is raised.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import math
import os
import re
import time
from collections.abc import Iterable, Iterator
from typing import Any

from pipeline.errors import one_line
from pipeline.store.whole_listing import whole_listing

SCHEMES = ("s3", "gs")
# Pauses between two tries grow to the longest one: about a minute in all.
_RETRIES = {"max_retries": 12, "initial_delay": "250ms", "max_delay": "8s"}
# Maximum seconds for one request with its retries.
_REQUEST_S = 600.0
# Seconds for which a look at the lock of a folder holds.
_CHECKED_S = 1.0
# Maximum number of objects that are read or deleted at a time.
_AT_A_TIME = 32
_DENIED = re.compile(r"PERMISSION_DENIED|UNAUTHENTICATED|AccessDenied|InvalidAccessKeyId|SignatureDoesNotMatch|\b403\b")
_NO_BUCKET = re.compile(r"NoSuchBucket|NOT_FOUND|Failed to resolve aws_region")
# Parts of a message that repeat the server's whole answer.
_DETAIL = re.compile(r"\s*\[\w+='.*", re.DOTALL)


class StoreError(OSError):
    """A store that cannot be used. refused: waiting does not help, the request must change."""

    def __init__(self, message: str, *, refused: bool = False) -> None:
        super().__init__(message)
        self.refused = refused


class LostLockError(StoreError):
    """A write below a folder whose lock another process has taken."""


@dataclasses.dataclass
class _Guard:
    """What is written below a folder is written for a holder of its lock alone."""

    lock: str
    owner: str
    checked_at: float = -math.inf


class ObjectStore:
    """The objects of one bucket, by their keys."""

    def __init__(self, scheme: str, bucket: str) -> None:
        self.uri = f"{scheme}://{bucket}"
        # Imported here: runs on a disk, and exported models, do without.
        import tensorstore

        self._ts = tensorstore
        self._spec, retries = _spec(scheme, bucket)
        self.context = tensorstore.Context({retries: _RETRIES})
        self._guards: dict[str, _Guard] = {}
        self._listing = whole_listing if scheme == "gs" else lambda make: make()
        try:
            self._objects = tensorstore.KvStore.open(self._spec, context=self.context).result()
        except ValueError as e:
            raise self._error(e) from None

    def guard(self, prefix: str, *, lock: str, owner: str) -> None:
        """From now on what is written below a prefix raises LostLockError unless ``owner`` is named in ``lock``.

        Looked up before each write, so one that a frozen process had under way may still arrive. Checkpoints survive
        that: their names are new, and ``run.json`` counts only with the files that it lists.
        """
        self._guards[prefix] = _Guard(lock, owner)

    def unguard(self, prefix: str) -> None:
        """Ends ``guard``."""
        self._guards.pop(prefix, None)

    def owner(self, prefix: str) -> str | None:
        """The owner for whom this process writes below a prefix; None without ``guard``."""
        guard = self._guards.get(prefix)
        return guard and guard.owner

    def check_owner(self, key: str) -> None:
        """Raises LostLockError if another process has taken the lock of a folder that holds the key."""
        for prefix, guard in list(self._guards.items()):
            if not key.startswith(prefix) or key == guard.lock or time.monotonic() - guard.checked_at < _CHECKED_S:
                continue
            now = time.monotonic()
            if guard.owner.encode() not in (self.get(guard.lock) or b""):
                raise LostLockError(f"another process has taken over {self.uri}/{prefix.rstrip('/')}")
            guard.checked_at = now

    def get(self, key: str) -> bytes | None:
        """An object's content, None if it is missing."""
        return self.versioned(key)[0]

    def versioned(self, key: str) -> tuple[bytes | None, bytes]:
        """(an object's content or None, its version for ``replace``)."""
        found = self._wait(self._objects.read(key))
        return found.value if found.state == "value" else None, found.stamp.generation

    def get_many(self, keys: Iterable[str]) -> Iterator[bytes]:
        """Yields the contents of objects in their order; a few are read ahead. Raises FileNotFoundError."""
        waiting: collections.deque[tuple[str, Any]] = collections.deque()
        for key in keys:
            waiting.append((key, self._objects.read(key)))
            if len(waiting) >= _AT_A_TIME:
                yield self._found(*waiting.popleft())
        while waiting:
            yield self._found(*waiting.popleft())

    def _found(self, key: str, future: Any) -> bytes:
        found = self._wait(future)
        if found.state != "value":
            raise FileNotFoundError(f"{self.uri}/{key} is missing")
        return found.value

    def put(self, key: str, content: bytes) -> None:
        """Stores an object, whole or not at all; it is durable when this returns."""
        self.check_owner(key)
        self._wait(self._objects.write(key, content))

    def replace(self, key: str, content: bytes, version: bytes) -> None:
        """Stores an object if it still has a version.

        Some servers ignore the condition, and an answer may get lost: a caller that must know reads the object again.
        """
        self._wait(self._objects.write(key, content, if_equal=version))

    def names(self, prefix: str) -> list[str]:
        """The keys that begin with a prefix, sorted."""
        try:
            found = self._listing(lambda: self._wait(self._objects.list(self._range(prefix))))
        except ValueError as e:
            raise self._error(e) from None
        # Some servers list from the beginning.
        return sorted(key for key in map(bytes.decode, found) if key.startswith(prefix))

    def delete(self, keys: Iterable[str]) -> None:
        """Deletes objects one batch after the other, in order; missing ones count as deleted."""
        keys = list(keys)
        for start in range(0, len(keys), _AT_A_TIME):
            self.check_owner(keys[start])
            for future in [self._objects.write(key, None) for key in keys[start : start + _AT_A_TIME]]:
                self._wait(future)

    def base(self, prefix: str) -> dict:
        """The spec of the keys below a prefix, to open with ``context``: for formats that tensorstore keeps there."""
        return self._spec | {"path": prefix}

    def _range(self, prefix: str) -> Any:
        # The first key after all that begin with the prefix.
        return self._ts.KvStore.KeyRange(prefix, prefix[:-1] + chr(ord(prefix[-1]) + 1)) if prefix else None

    def _wait(self, future: Any) -> Any:
        try:
            return future.result(timeout=_REQUEST_S)
        except ValueError as e:
            raise self._error(e) from None
        except TimeoutError:
            raise StoreError(f"{self.uri}: no answer for {_REQUEST_S:g} s") from None

    def _error(self, error: ValueError) -> StoreError:
        text = str(error)
        if _DENIED.search(text):
            why = "access denied; check the credentials of this machine and the permissions of the bucket"
            return StoreError(f"{self.uri}: {why}", refused=True)
        if _NO_BUCKET.search(text):
            return StoreError(f"{self.uri}: no such bucket; make it or name another", refused=True)
        return StoreError(f"{self.uri}: {one_line(ValueError(_DETAIL.sub('', text)), limit=300)}")


def _spec(scheme: str, bucket: str) -> tuple[dict, str]:
    """(tensorstore's spec of a bucket, the name of its retries), by the variables of AWS's tools."""
    if scheme == "gs":
        return {"driver": "gcs", "bucket": bucket}, "gcs_request_retries"
    spec: dict = {"driver": "s3", "bucket": bucket}
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
    if endpoint:
        spec |= {"endpoint": endpoint.rstrip("/"), "aws_region": region or "us-east-1"}
    elif region:
        spec["aws_region"] = region
    if os.environ.get("AWS_ACCESS_KEY_ID"):
        # The whole chain would complain of files that are missing.
        spec["aws_credentials"] = {"type": "environment"}
    return spec, "s3_request_retries"


@functools.lru_cache(maxsize=16)
def open_store(scheme: str, bucket: str) -> ObjectStore:
    """A bucket, opened once a process."""
    return ObjectStore(scheme, bucket)
