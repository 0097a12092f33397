"""Hashes that come more than once among any number of them, in bounded memory: sorted pieces, parted on disk."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np

# Hashes in memory between two sorts.
_PIECE = 1 << 21
# Parts on disk, by the first bits of the hash; each is sorted in memory, 10^7 entries of 10^10 different hashes.
_PART_BITS = 10
# A hash of one piece: the number of its first place among all hashes, and its count there.
_ENTRY = np.dtype([("hash", np.uint64), ("first", np.int64), ("count", np.int64)])


class Repeated:
    """Counts hashes as they come. folder: for what does not fit into memory; made by the caller, who removes it.

    Of a hash that a piece holds many times one entry is kept, so that a single one, however often, takes no room.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._held: list[np.ndarray] = []
        self._num_held = 0
        self._last: np.ndarray | None = None
        self._on_disk = False
        self.num_hashes = 0
        self.any_in_a_piece = False

    def add(self, hashes: np.ndarray) -> None:
        """Takes the next hashes, uint64."""
        self._held.append(hashes)
        self._num_held += len(hashes)
        if self._num_held >= _PIECE:
            self._end_piece()

    def _end_piece(self) -> None:
        """Sorts the hashes that are held, and puts the piece before on disk."""
        if self._last is not None:
            self._spill(self._last)
        hashes, self._held = np.concatenate([np.empty(0, np.uint64), *self._held]), []
        order = np.argsort(hashes)
        entries = np.empty(len(hashes), _ENTRY)
        entries["hash"], entries["first"], entries["count"] = hashes[order], order + self.num_hashes, 1
        self.num_hashes += len(hashes)
        self._num_held = 0
        self._last = self._merged(entries)
        self.any_in_a_piece = self.any_in_a_piece or len(self._last) < len(entries)

    def _merged(self, entries: np.ndarray) -> np.ndarray:
        """One entry a hash, of sorted ones. Marks all places but the first."""
        if not len(entries):
            return entries
        starts = np.flatnonzero(np.append(True, entries["hash"][1:] != entries["hash"][:-1]))
        if len(starts) == len(entries):
            return entries
        firsts = np.minimum.reduceat(entries["first"], starts)
        runs = np.diff(np.append(starts, len(entries)))
        self._mark(entries["first"][entries["first"] != np.repeat(firsts, runs)])
        merged = entries[starts]
        merged["first"], merged["count"] = firsts, np.add.reduceat(entries["count"], starts)
        return merged

    def _mark(self, places: np.ndarray) -> None:
        """Sets the bits of places in a file with a bit a hash; what is not set takes no room."""
        if not len(places):
            return
        path, size = self._folder / "later", -(-self.num_hashes // 8)
        with open(path, "ab") as file:
            os.truncate(path, max(file.tell(), size))
        bits = np.memmap(path, np.uint8, "r+")
        np.bitwise_or.at(bits, places >> 3, np.left_shift(1, places & 7).astype(np.uint8))
        bits.flush()

    def _spill(self, entries: np.ndarray) -> None:
        self._on_disk = True
        shift = np.uint64(64 - _PART_BITS)
        ends = np.searchsorted(entries["hash"] >> shift, np.arange(1 << _PART_BITS, dtype=np.uint64), side="right")
        for part, rows in enumerate(np.split(entries, ends[:-1])):
            if len(rows):
                with open(self._folder / f"part-{part}", "ab") as file:
                    file.write(rows.tobytes())

    def entries(self) -> Iterator[np.ndarray]:
        """All hashes, each in one entry with its count, in several arrays with the fields hash, first and count.

        To be called once; after it ``later`` is complete.
        """
        self._end_piece()
        if not self._on_disk:
            yield self._last
            return
        self._spill(self._last)
        for path in self._folder.glob("part-*"):
            found = np.fromfile(path, _ENTRY)
            yield self._merged(found[np.argsort(found["hash"])])

    def later(self, start: int, stop: int) -> np.ndarray:
        """For places from start to stop: whether an earlier one has the same hash. Bool."""
        path, first = self._folder / "later", start // 8
        content = b""
        if path.exists():
            with open(path, "rb") as file:
                file.seek(first)
                content = file.read(-(-stop // 8) - first)
        bits = np.zeros(-(-stop // 8) - first, np.uint8)
        bits[: len(content)] = np.frombuffer(content, np.uint8)
        return np.unpackbits(bits, bitorder="little")[start - 8 * first : stop - 8 * first].astype(bool)
