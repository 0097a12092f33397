"""One rank of a run, from its start or its last checkpoint to its end. Knows nothing of Ray: queues come in."""

from __future__ import annotations

import contextlib

from pipeline.train.rank import QueueMaker, Rank
from pipeline.train.spec import RunSpec
from pipeline.train.step_gate import StepGate
from pipeline.train.summary import summarize


def train(
    spec: RunSpec,
    make_queues: QueueMaker,
    *,
    rank: int = 0,
    gate: StepGate | None = None,
    start_step: int | None = None,
) -> dict:
    """Runs one rank to the end of the run, or until its gate says stop. Returns its summary (``summary.summarize``).

    start_step: of the checkpoint to go on from, which all ranks must agree on; None: the newest.
    Raises RequestError if the devices, the disk or the source of ``init.from`` cannot serve the run; DataError if
    the data end it, its state saved.
    """
    with contextlib.closing(Rank(spec, rank=rank, gate=gate or StepGate(), start_step=start_step)) as it:
        it.open(make_queues)
        return summarize(it, it.run())
