"""Queues without Ray: each row is made in this process when it is asked for, by the code that makes it in a stream."""

from __future__ import annotations

import time
from collections.abc import Mapping

from pipeline.data.known_rejects import NONE_KNOWN, KnownRejects
from pipeline.data.plan import Arrival, Row
from pipeline.data.run_data import DataSpec
from pipeline.data.spec import DecodeLimits
from pipeline.data.stream_spec import StreamSpec


class DirectQueue:
    """The rows of one task in order, for the only rank of a run."""

    def __init__(self, stream: StreamSpec) -> None:
        self._maker, self._next = stream.maker(), stream.start

    def next(self) -> Row:
        """Makes the next row."""
        row = self._maker.row(self._next, rank=0, world_size=1)
        self._next += 1
        return row

    def arrival(self) -> Arrival:
        """It was made here, a moment ago."""
        return Arrival(now := time.perf_counter(), now)

    def awaits(self) -> str:
        """Says what the next row waits for."""
        return "decoding"

    def close(self) -> None:
        """Does nothing: no row is made ahead."""

    def join(self, timeout_s: float) -> bool:
        """Waits for nothing."""
        return True


def direct_queues(
    data: DataSpec,
    batches: Mapping[str, tuple[int, int]],
    *,
    seed: int,
    known_bad: Mapping[str, KnownRejects] | None = None,
    cache_bytes: int = 0,
    limits: DecodeLimits | None = None,
) -> dict[str, DirectQueue]:
    """Task → its queue. batches: task → its batches (start, stop). known_bad: of ``quarantine.known_bad``."""
    return {
        name: DirectQueue(
            StreamSpec(
                task=data.tasks[name],
                data_set=data.data_sets[data.tasks[name].data_set],
                tokens=data.tokens,
                tokenizer=data.tokenizer,
                seed=seed,
                fingerprint=data.fingerprints[data.tasks[name].data_set],
                start=start,
                stop=stop,
                share=0.0,
                known_bad=(known_bad or {}).get(name, NONE_KNOWN),
                cache_bytes=cache_bytes,
                limits=limits or DecodeLimits(),
            )
        )
        for name, (start, stop) in batches.items()
    }
