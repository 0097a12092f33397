"""A whole run in this process, without Ray, shared by the benchmarks that train."""

from __future__ import annotations

import contextlib
import io
import tempfile
from collections.abc import Iterator
from pathlib import Path

from pipeline import recipe as recipes
from pipeline.corpus import build_corpus
from pipeline.data.direct_queue import DirectQueue, direct_queues
from pipeline.evaluate.trained_model import TrainedModel
from pipeline.plan import plan
from pipeline.train.run import train

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
            batches = {name: (0, schedule.batches_at_most(name)) for name in spec.data.tasks}
            return direct_queues(spec.data, batches, seed=spec.mixture.seed, cache_bytes=_CACHE_BYTES)

        # Standard output is the benchmark's.
        with contextlib.redirect_stdout(io.StringIO()):
            summary = train(spec, queues)
            model = TrainedModel(Path(folder))
        yield model, summary, Path(folder)
