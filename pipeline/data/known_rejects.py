"""The rejects of an earlier part of a run in compact form: sorted hashes, 9 bytes a reject.

Every process that makes batches looks each sample up here. The hashes have 64 bits: of 10^10 samples looked up among
10^7 rejects, one is taken for a reject by mistake with a probability of 0.5 %.
"""

from __future__ import annotations

import hashlib
from array import array

import numpy as np

from pipeline.data.order import name_key

# As ``plan.reject_key``: an id, or a position with the attempt.
Key = str | tuple[int, int]


def key_hash(key: Key) -> int:
    """64 bits that are the same in every process."""
    return name_key(key if isinstance(key, str) else f"\0visit {key[0]} {key[1]}")


class KnownRejects:
    """Key → reason. Arrays alone: in Ray's object store all processes of a machine read the same memory."""

    def __init__(self, hashes: np.ndarray, codes: np.ndarray, reasons: tuple[str, ...]) -> None:
        """hashes: uint64, sorted, each once. codes: uint8, index into ``reasons`` of each."""
        self._hashes = hashes
        self._codes = codes
        self._reasons = reasons

    def __len__(self) -> int:
        return len(self._hashes)

    def reason(self, key: Key) -> str | None:
        """The reason of a reject, None for what is not one."""
        if not len(self._hashes):
            return None
        wanted = np.uint64(key_hash(key))
        place = int(np.searchsorted(self._hashes, wanted))
        found = place < len(self._hashes) and self._hashes[place] == wanted
        return self._reasons[self._codes[place]] if found else None

    def __repr__(self) -> str:
        """Equal for equal rejects, in every process: part of a stream's key."""
        digest = hashlib.blake2b(self._hashes.tobytes() + self._codes.tobytes(), digest_size=16)
        digest.update("\0".join(self._reasons).encode())
        return f"KnownRejects({len(self)}, {digest.hexdigest()})"


class Collector:
    """Takes rejects one by one; of several of one key the last holds."""

    def __init__(self) -> None:
        self._hashes, self._codes = array("Q"), array("B")
        self._reasons: dict[str, int] = {}

    def add(self, key: Key, reason: str) -> None:
        """Takes a reject. There are at most 256 reasons."""
        self._codes.append(self._reasons.setdefault(reason, len(self._reasons)))
        self._hashes.append(key_hash(key))

    def rejects(self) -> KnownRejects:
        """All that were added."""
        latest_first = np.frombuffer(self._hashes, np.uint64)[::-1] if self._hashes else np.zeros(0, np.uint64)
        hashes, places = np.unique(latest_first, return_index=True)
        codes = np.array(self._codes, np.uint8)[::-1][places]
        return KnownRejects(hashes, codes, tuple(self._reasons))


NONE_KNOWN = Collector().rejects()
