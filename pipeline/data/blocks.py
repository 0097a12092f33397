"""A stream as a finite list of blocks.

A block holds consecutive batches of one rank. Blocks are dealt to the ranks in turn, so block b belongs to rank
b mod world_size.
"""

from __future__ import annotations

import math

import pyarrow as pa

from pipeline.data.batches import BatchMaker
from pipeline.data.stream_spec import StreamSpec
from pipeline.data.wire import failure_to_arrow, to_arrow
from pipeline.errors import DataError, RequestError
from pipeline.host_memory import keep_freed_memory

MAX_BLOCK_BYTES = 64 << 20
# Minimum CPU seconds a block should take to make: Ray Data spends some 20 ms on a block, whatever it holds.
MIN_BLOCK_S = 0.25

# One maker a stream and process, made for its first block: tasks that share a process keep their decoders here.
_MAKERS: dict[str, BatchMaker] = {}


def maker_of(spec: StreamSpec) -> BatchMaker:
    """Returns this process's maker of a stream."""
    if spec.key not in _MAKERS:
        keep_freed_memory(4 * MAX_BLOCK_BYTES)
        _MAKERS[spec.key] = spec.maker()
    return _MAKERS[spec.key]


class Blocks:
    """Arithmetic of a stream's blocks, and the block of a number.

    A turn gives each rank one block of the same batches. The first turns are small and double up to
    ``rows_per_block``, so that the first batch of a stream does not wait for a whole block.
    """

    def __init__(self, spec: StreamSpec, *, world_size: int, rows_per_block: int):
        self.spec = spec
        self.world_size = world_size
        self.rows_per_block = rows_per_block
        # Turns of less than ``rows_per_block`` batches, and the batches of them all: 1 + 2 + 4 + ...
        self._small_turns = (rows_per_block - 1).bit_length()
        self._small_rows = (1 << self._small_turns) - 1

    @property
    def num_blocks(self) -> int:
        count = self.spec.stop - self.spec.start
        if count <= self._small_rows:
            return count.bit_length() * self.world_size
        full = -(-(count - self._small_rows) // self.rows_per_block)
        return (self._small_turns + full) * self.world_size

    def edge(self, turn: int) -> int:
        """The first batch of a turn; of the turn after the last one, the end of the stream."""
        small = min(turn, self._small_turns)
        before = (1 << small) - 1 + (turn - small) * self.rows_per_block
        return min(self.spec.start + before, self.spec.stop)

    def rows(self, block: int) -> tuple[range, int]:
        """Returns (the batches of a block, its rank)."""
        turn, rank = divmod(block, self.world_size)
        return range(self.edge(turn), self.edge(turn + 1)), rank

    def table(self, block: int) -> pa.Table:
        """Makes a block. An error of data or request becomes a table that raises it where it is read."""
        batches, rank = self.rows(block)
        try:
            maker = maker_of(self.spec)
            return to_arrow([maker.row(batch, rank=rank, world_size=self.world_size) for batch in batches])
        except (DataError, RequestError) as e:
            return failure_to_arrow(e)


def rows_per_block(spec: StreamSpec, *, block_steps: int, row_s: float | None = None) -> int:
    """Batches of a full block: those of ``block_steps`` steps of the run, within the bound in bytes.

    Ray serves the streams in turn, one block each, so blocks that last for equally many steps give each stream its due.
    row_s: measured CPU seconds of a row; with it a block is also worth what Ray spends on it.
    """
    rows = round(spec.share * block_steps)
    if row_s:
        rows = max(rows, math.ceil(MIN_BLOCK_S / row_s))
    return max(1, min(rows, MAX_BLOCK_BYTES // block_bytes(spec, 1)))


def block_bytes(spec: StreamSpec, rows: int) -> int:
    """Size of a full block: its vision tokens and spectrograms; what else a batch holds is small."""
    frames, height, width = spec.tokens.vision_patch
    audio = 4 * spec.data_set.audio.num_frames * spec.data_set.audio.num_mels if "audio" in spec.task.modalities else 0
    own = {name: 4 * count * embedder.num_values for name, (count, embedder) in spec.data_set.own_patches.items()}
    audio += sum(own.get(name, 0) for name in spec.task.modalities)
    sizes = []
    for variant in spec.task.variants:
        token = 3 * height * width * (frames if variant.num_frames else 1)
        sizes.append(variant.global_batch_size * (variant.num_vision_tokens * token + audio))
    return rows * max(sizes)
