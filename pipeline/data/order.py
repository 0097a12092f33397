"""Order is arithmetic: which task a step runs, which variant a batch has, which row a position means.

Everything here is a pure function of integers, so a run can start anywhere at the cost of starting at zero, and no
order is ever stored. Hashing is splitmix64; permutations are Feistel networks, in constant memory.
"""

from __future__ import annotations

import dataclasses
import hashlib

import numpy as np

_ROUNDS = 4
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MASK = (1 << 64) - 1
_SALT_TASK, _SALT_VARIANT, _SALT_WINDOWS, _SALT_WITHIN, _SALT_SUBSTITUTE, _SALT_SAMPLE, SALT_EXACT = range(1, 8)


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

    probabilities: (tasks,), or (steps, tasks) where they change over time.
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


def permute(positions: np.ndarray, *, size: int | np.ndarray, key, inverse: bool = False) -> np.ndarray:
    """A keyed bijection of [0, size) at the given positions: a Feistel network, walked until it lands inside.

    size and key may be arrays, one for each position. inverse: the position that maps to each value.
    """
    value = np.atleast_1d(np.asarray(positions)).astype(np.uint64)
    size = np.broadcast_to(np.asarray(size, np.uint64), value.shape)
    key = np.broadcast_to(mix(key), value.shape)
    half = np.ceil(np.log2(np.maximum(size, 4).astype(np.float64)) / 2).astype(np.uint64)
    # The only value of a size of 1 is where it belongs.
    out, active = value.copy(), size > 1
    while active.any():
        out[active] = _feistel(out[active], half=half[active], key=key[active], inverse=inverse)
        active = out >= size
    return out.astype(np.int64)


def _feistel(value: np.ndarray, *, half: np.ndarray, key: np.ndarray, inverse: bool) -> np.ndarray:
    mask = (np.uint64(1) << half) - np.uint64(1)
    left, right = value >> half, value & mask
    for r in reversed(range(_ROUNDS)) if inverse else range(_ROUNDS):
        if inverse:
            left, right = right ^ (mix(key, r, left) & mask), left
        else:
            left, right = right, left ^ (mix(key, r, right) & mask)
    return (left << half) | right


@dataclasses.dataclass(frozen=True)
class Order:
    """The visiting order of one task over the rows of its data set.

    Rows are cut into windows of neighbours; an epoch visits the windows in a permuted order and permutes within each,
    so reads stay inside one window at a time. Epochs differ.
    """

    seed: int
    task: str
    num_rows: int
    window: int = 8192

    def rows(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(row, epoch) of each position of the task's endless sequence, both int64."""
        positions = np.asarray(positions, np.int64)
        epochs, offsets = np.divmod(positions, self.num_rows)
        window = min(self.window, self.num_rows)
        num_windows = -(-self.num_rows // window)
        short = self.num_rows - (num_windows - 1) * window
        key = mix(self.seed, name_key(self.task), epochs.astype(np.uint64))
        # The last window may be short, and the permutation may put it anywhere: what comes after it moves forward.
        short_slot = permute(
            np.full(offsets.shape, num_windows - 1), size=num_windows, key=mix(key, _SALT_WINDOWS), inverse=True
        )
        before = offsets < short_slot * window
        inside = ~before & (offsets < short_slot * window + short)
        slots = np.where(before, offsets // window, np.where(inside, short_slot, (offsets - short) // window + 1))
        starts = np.where(slots <= short_slot, slots * window, (slots - 1) * window + short)
        chosen = permute(slots, size=num_windows, key=mix(key, _SALT_WINDOWS))
        sizes = np.where(chosen == num_windows - 1, short, window)
        within = permute(offsets - starts, size=sizes, key=mix(key, _SALT_WITHIN, chosen))
        return chosen * window + within, epochs

    def substitute(self, position: int, attempt: int) -> int:
        """The row that stands in for a bad one: depends on the position and the attempt alone."""
        return mix_int(self.seed, name_key(self.task), _SALT_SUBSTITUTE, position, attempt) % self.num_rows

    def generator(self, sample_id: str, epoch: int) -> np.random.Generator:
        """The random numbers of one visit of one sample: crops, prompts, drops."""
        key = mix_int(self.seed, _SALT_SAMPLE, name_key(self.task), name_key(sample_id), epoch)
        return np.random.Generator(np.random.Philox(key=key))
