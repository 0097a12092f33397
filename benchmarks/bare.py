"""A whole run in this process, without Ray: what the benchmarks that train share."""

from __future__ import annotations

import contextlib
import io
import tempfile
from collections.abc import Iterator
from pathlib import Path

from pipeline import recipe as recipes
from pipeline.corpus import build_corpus
from pipeline.data.batches import BatchMaker, SampleMaker
from pipeline.data.plan import Row, TaskPlan
from pipeline.data.shards import open_source
from pipeline.data.spec import TaskSpec
from pipeline.data.tokenizer import Tokenizer
from pipeline.evaluate.trained_model import TrainedModel
from pipeline.plan import plan
from pipeline.train.run import train
from pipeline.train.spec import RunSpec

_CACHE_BYTES = 2 << 30


class DirectQueue:
    """Makes each row of a task when it is asked for, through the same code as a stream's process."""

    def __init__(self, spec: RunSpec, task: TaskSpec, *, stop: int):
        data_set = spec.data.data_sets[task.data_set]
        samples = SampleMaker(
            task,
            data_set,
            tokenizer=Tokenizer(spec.data.tokenizer) if spec.data.tokenizer else None,
            tokens=spec.data.tokens,
        )
        plan = TaskPlan(task, seed=spec.mixture.seed, num_rows=spec.data.num_rows[task.data_set], num_batches=stop)
        source = open_source(data_set, modalities=task.media, cache_bytes=_CACHE_BYTES)
        self._maker, self._next = BatchMaker(plan, samples, source), 0

    def next(self) -> Row:
        row = self._maker.row(self._next, rank=0, world_size=1)
        self._next += 1
        return row

    def awaits(self) -> str:
        return "decoding"

    def close(self) -> None:
        """Nothing: no row is made ahead."""

    def join(self, timeout_s: float) -> bool:
        return True


@contextlib.contextmanager
def trained(raw: dict) -> Iterator[tuple[TrainedModel, dict, Path]]:
    """Trains a recipe from its start to its end: (the model, the summary, the run directory, which goes afterwards)."""
    recipe = recipes.from_dict(raw)
    build_corpus(recipe)
    with tempfile.TemporaryDirectory() as folder:
        spec = plan(recipe, Path(folder))

        def queues(schedule) -> dict[str, DirectQueue]:
            return {
                name: DirectQueue(spec, t, stop=schedule.batches_at_most(name)) for name, t in spec.data.tasks.items()
            }

        # Standard output is the benchmark's.
        with contextlib.redirect_stdout(io.StringIO()):
            summary = train(spec, queues)
            model = TrainedModel(Path(folder))
        yield model, summary, Path(folder)
