"""Order is arithmetic: the task of a step, the variant of a batch, the row of a position.

Everything here is a pure function of integers: a run can start at any step at the same cost, and no order is ever
stored. Hashing is splitmix64; large permutations are Feistel networks, in constant memory.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib

import numpy as np

# Rounds of the Feistel network. Four are a strong permutation in theory; the halves of 17 bits are short.
_ROUNDS = 6
# Largest size whose permutation is held whole, in 4 bytes a row.
_SHUFFLED_SIZE = 1 << 16
# Number of rows above which substitutes come from near the bad row: any other would be in a row group of its own.
MANY_ROWS = 200_000_000
# Rows of a neighbourhood, and the first attempts that are made in it: all of its rows may be bad.
_NEAR_ROWS = 64
_NEAR_ATTEMPTS = 4
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MASK = (1 << 64) - 1
_SALT_TASK, _SALT_VARIANT, _SALT_EPOCH, _SALT_SUBSTITUTE, _SALT_SAMPLE, SALT_EXACT = range(1, 7)


def _splitmix(x: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):
        x = x + _GOLDEN
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))


def mix(*words) -> np.ndarray:
    """A 64-bit hash of integers (Python ints or integer arrays, broadcast against each other)."""
    state = np.uint64(0)
    for word in words:
        if isinstance(word, int):
            word = np.uint64(word & _MASK)
        state = _splitmix(np.atleast_1d(np.asarray(word)).astype(np.uint64) ^ state)
    return state


def mix_int(*words: int) -> int:
    """``mix`` of single integers: the same value without the cost of arrays."""
    state = 0
    for word in words:
        state = (((word ^ state) & _MASK) + int(_GOLDEN)) & _MASK
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK
        state ^= state >> 31
    return state


def name_key(name: str) -> int:
    """A stable 64-bit integer for a name or an id."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little")


def uniform(*words) -> np.ndarray:
    """Uniform float64 in [0, 1), one for each hashed tuple."""
    return (mix(*words) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def tasks_at(seed: int, steps: np.ndarray, *, probabilities: np.ndarray) -> np.ndarray:
    """Task index of each step: a single draw from the multinomial (paper section 3.1, Algorithm 1).

    probabilities: (tasks,), or (steps, tasks) if they change over time.
    """
    edges = np.cumsum(probabilities, axis=-1)
    edges = edges / edges[..., -1:]
    draws = uniform(seed, _SALT_TASK, np.asarray(steps))
    # A task of probability 0 has no room between its edges; the last edge is 1, which no draw reaches.
    return (edges <= draws[:, None]).sum(-1)


def variants_at(seed: int, task: str, batches: np.ndarray, *, num_variants: int) -> np.ndarray:
    """Variant index of each of a task's batches, uniform."""
    draws = uniform(seed, _SALT_VARIANT, name_key(task), np.asarray(batches))
    return np.minimum((draws * num_variants).astype(np.int64), num_variants - 1)


def permute(positions: np.ndarray, *, size: int, key: np.ndarray | int) -> np.ndarray:
    """A keyed permutation of [0, size) at the given positions, int64. key: one, or one for each position."""
    positions = np.atleast_1d(np.asarray(positions, np.int64))
    keys, which = np.unique(np.broadcast_to(mix(key), positions.shape), return_inverse=True)
    if size > _SHUFFLED_SIZE:
        return _walk(positions.astype(np.uint64), size=np.uint64(size), key=keys[which]).astype(np.int64)
    out = np.empty_like(positions)
    for number, one in enumerate(keys.tolist()):
        mine = which == number
        out[mine] = _shuffled(size, one)[positions[mine]]
    return out


@functools.lru_cache(maxsize=32)
def _shuffled(size: int, key: int) -> np.ndarray:
    """The whole permutation of a small size, every one of them equally likely: the order of random numbers."""
    return np.argsort(mix(key, np.arange(size)), kind="stable").astype(np.int32)


def _walk(value: np.ndarray, *, size: np.uint64, key: np.ndarray) -> np.ndarray:
    """A Feistel network over the next even number of bits, applied until a value lands inside (cycle walking)."""
    half = np.uint64(-(-(int(size) - 1).bit_length() // 2))
    out, active = value.copy(), np.ones(value.shape, bool)
    while active.any():
        out[active] = _feistel(out[active], half=half, key=key[active])
        active = out >= size
    return out


def _feistel(value: np.ndarray, *, half: np.uint64, key: np.ndarray) -> np.ndarray:
    mask = (np.uint64(1) << half) - np.uint64(1)
    left, right = value >> half, value & mask
    for r in range(_ROUNDS):
        left, right = right, left ^ (mix(key, r, right) & mask)
    return (left << half) | right


def substitutes_of(num_rows: int) -> dict[str, str]:
    """The part of a data set's fingerprint that tells how substitutes are drawn, if not from all rows."""
    return {"substitutes": f"of {_NEAR_ROWS} rows"} if num_rows > MANY_ROWS else {}


@dataclasses.dataclass(frozen=True)
class Order:
    """The visiting order of one task over the rows of its data set: each epoch is a permutation of all rows.

    A batch is therefore a fair sample however the manifest is sorted.
    """

    seed: int
    task: str
    num_rows: int

    def rows(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(row, epoch) of each position of the task's endless sequence, both int64."""
        epochs, offsets = np.divmod(np.asarray(positions, np.int64), self.num_rows)
        key = mix(self.seed, name_key(self.task), _SALT_EPOCH, epochs)
        return permute(offsets, size=self.num_rows, key=key), epochs

    def substitute(self, position: int, attempt: int, *, row: int) -> int:
        """The row that replaces a bad one; depends only on the position and the attempt. row: of the position."""
        draw = mix_int(self.seed, name_key(self.task), _SALT_SUBSTITUTE, position, attempt)
        start, place = row - row % _NEAR_ROWS, row % _NEAR_ROWS
        near = min(_NEAR_ROWS, self.num_rows - start)
        if self.num_rows <= MANY_ROWS or attempt >= _NEAR_ATTEMPTS or near == 1:
            return draw % self.num_rows
        return start + (place + 1 + draw % (near - 1)) % near

    def generator(self, sample_id: str, epoch: int) -> np.random.Generator:
        """The random numbers of one visit of one sample: crops, prompts, drops."""
        key = mix_int(self.seed, _SALT_SAMPLE, name_key(self.task), name_key(sample_id), epoch)
        return np.random.Generator(np.random.Philox(key=key))
