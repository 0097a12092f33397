"""Blocks: consecutive batches of one task and one rank, the unit in which streams decode."""

from __future__ import annotations

import dataclasses

import pyarrow as pa

from pipeline.data.batches import BatchMaker
from pipeline.data.stream_spec import StreamSpec
from pipeline.data.wire import failure_to_arrow, to_arrow
from pipeline.errors import DataError, RequestError
from pipeline.host_memory import keep_freed_memory

MAX_BLOCK_BYTES = 64 << 20
# Minimum number of batches of a full block: Ray Data spends some 10 ms on a block, whatever it holds.
_MIN_ROWS = 4

# One maker a stream and process, made for its first block: tasks that share a process keep their decoders here.
_MAKERS: dict[str, BatchMaker] = {}


@dataclasses.dataclass(frozen=True)
class Block:
    """The batches start .. stop - 1 of a task, one rank's part of each."""

    task: str
    start: int
    stop: int
    rank: int

    def description(self) -> pa.Table:
        """The block as a table of one row, which a decoder makes it from."""
        return pa.table({name: [value] for name, value in vars(self).items()})

    @classmethod
    def described(cls, table: pa.Table) -> Block:
        """The block of a description."""
        (values,) = table.to_pylist()
        return cls(**values)


def make_block(spec: StreamSpec, block: Block, *, world_size: int) -> pa.Table:
    """Decodes a block. An error of data or request becomes a table that raises it where it is read."""
    try:
        maker = _maker_of(spec)
        batches = range(block.start, block.stop)
        return to_arrow([maker.row(batch, rank=block.rank, world_size=world_size) for batch in batches])
    except (DataError, RequestError) as e:
        return failure_to_arrow(e, task=block.task, batch=block.start, rank=block.rank)


def _maker_of(spec: StreamSpec) -> BatchMaker:
    if spec.key not in _MAKERS:
        keep_freed_memory(4 * MAX_BLOCK_BYTES)
        _MAKERS[spec.key] = spec.maker()
    return _MAKERS[spec.key]


def rows_per_block(spec: StreamSpec, *, block_steps: int, row_bytes: int, max_bytes: int) -> int:
    """Batches of a full block: those of ``block_steps`` steps of the run, within a bound in bytes."""
    rows = max(round(spec.share * block_steps), _MIN_ROWS)
    return max(1, min(rows, min(max_bytes, MAX_BLOCK_BYTES) // row_bytes))


def bytes_of_row(spec: StreamSpec, *, world_size: int = 1) -> int:
    """Size of a rank's part of the largest batch: vision tokens and spectrograms; what else it holds is small."""
    frames, height, width = spec.tokens.vision_patch
    audio = 4 * spec.data_set.audio.num_frames * spec.data_set.audio.num_mels if "audio" in spec.task.modalities else 0
    own = {name: 4 * count * embedder.num_values for name, (count, embedder) in spec.data_set.own_patches.items()}
    audio += sum(own.get(name, 0) for name in spec.task.modalities)
    sizes = []
    for variant in spec.task.variants:
        token = 3 * height * width * (frames if variant.num_frames else 1)
        samples = variant.global_batch_size // world_size
        sizes.append(samples * (variant.num_vision_tokens * token + audio))
    return max(1, *sizes)
