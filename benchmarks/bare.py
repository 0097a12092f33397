"""A whole run in this process, without Ray, shared by the benchmarks that train."""

from __future__ import annotations

import contextlib
import io
import tempfile
from collections.abc import Iterator
from pathlib import Path

from pipeline import recipe as recipes
from pipeline.corpus import build_corpus
from pipeline.evaluate.trained_model import TrainedModel
from pipeline.plan import plan
from pipeline.train.run import train
from tests.pipeline.train.bare_run import DirectQueue

# Maximum bytes of decoded media in memory.
_CACHE_BYTES = 2 << 30


@contextlib.contextmanager
def trained(raw: dict) -> Iterator[tuple[TrainedModel, dict, Path]]:
    """Trains a recipe from its start to its end: (the model, the summary, the run directory, which goes afterwards)."""
    recipe = recipes.from_dict(raw)
    build_corpus(recipe)
    with tempfile.TemporaryDirectory() as folder:
        spec = plan(recipe, Path(folder))

        def queues(schedule) -> dict[str, DirectQueue]:
            return {
                name: DirectQueue(spec, task, start=0, stop=schedule.batches_at_most(name), cache_bytes=_CACHE_BYTES)
                for name, task in spec.data.tasks.items()
            }

        # Standard output is the benchmark's.
        with contextlib.redirect_stdout(io.StringIO()):
            summary = train(spec, queues)
            model = TrainedModel(Path(folder))
        yield model, summary, Path(folder)
