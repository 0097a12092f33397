"""All that a process needs to make the batches of one task."""

from __future__ import annotations

import dataclasses
import functools
import hashlib

from pipeline.data.batches import BatchMaker, SampleMaker
from pipeline.data.columns import row_columns
from pipeline.data.known_rejects import KnownRejects
from pipeline.data.media.process import DecodeLimits
from pipeline.data.plan import TaskPlan
from pipeline.data.shards import open_source
from pipeline.data.spec import DataSetSpec, TaskSpec, TokenSpec
from pipeline.data.tokenizer import Tokenizer
from pipeline.errors import RequestError


@dataclasses.dataclass(frozen=True)
class StreamSpec:
    """The batches of one task as plain data; travels to the processes that make them.

    fingerprint: of the data set's rows as the run knows them (``columns.Fingerprint.digests``); every process compares
    its own rows with it. start, stop: the task's batches to make. share: the task's part of the run's steps.
    known_bad: rejects of an earlier part of the run.
    """

    task: TaskSpec
    data_set: DataSetSpec
    tokens: TokenSpec
    tokenizer: bytes | None
    seed: int
    fingerprint: dict
    start: int
    stop: int
    share: float
    known_bad: KnownRejects
    cache_bytes: int
    limits: DecodeLimits = dataclasses.field(default_factory=DecodeLimits)

    @functools.cached_property
    def key(self) -> str:
        """Of the maker that a process keeps: equal streams of several ranks share one, and its open decoders."""
        return hashlib.blake2b(repr(self).encode(), digest_size=16).hexdigest()

    def maker(self) -> BatchMaker:
        """Opens the data set. Raises RequestError if this process reads other rows than the run began with."""
        num_rows = self.fingerprint["num_rows"]
        plan = TaskPlan(self.task, seed=self.seed, num_rows=num_rows, num_batches=self.stop)
        media = tuple(m for m in self.task.modalities if m != "text")
        columns = row_columns(self.task, self.data_set)
        source = open_source(
            self.data_set, modalities=media, columns=columns, cache_bytes=self.cache_bytes, limits=self.limits
        )
        if source.fingerprint != self.fingerprint:
            raise RequestError(
                f"data_sets.{self.data_set.name}: a machine of the run reads other rows than the run started with; all "
                "machines must see the same manifest or shards, unchanged until the run ends"
            )
        tokenizer = Tokenizer(self.tokenizer) if self.tokenizer else None
        samples = SampleMaker(self.task, self.data_set, tokenizer=tokenizer, tokens=self.tokens)
        return BatchMaker(plan, samples, source, known_bad=self.known_bad)
