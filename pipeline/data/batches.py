"""One batch of one task for one rank: from positions in the order to a row of arrays with their ids.

A bad sample becomes a reject and is replaced by a substitute that depends only on its position.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from pipeline.commands import command
from pipeline.data import augment, prompts
from pipeline.data.captions import best_reason, caption_fault, text_fault, usable_captions
from pipeline.data.known_rejects import NONE_KNOWN, KnownRejects
from pipeline.data.media.clip import Clip
from pipeline.data.media.errors import TRANSIENT, Reject
from pipeline.data.modalities import TEXT, load
from pipeline.data.order import name_key
from pipeline.data.plan import Row, TaskPlan
from pipeline.data.sample_tokens import TokenContext, View
from pipeline.data.sources import Source
from pipeline.data.spec import DataSetSpec, TaskSpec, TokenSpec, Variant
from pipeline.data.tokenizer import Tokenizer, encode_text
from pipeline.errors import DataError

# Maximum number of substitutes tried for one sample.
_MAX_SUBSTITUTES = 64
# Maximum number of rejects that a process remembers having met; one that it has forgotten is decoded again, in vain.
_MAX_MET = 1 << 16
# Maximum samples and CPU seconds of a measurement of a task's cost: enough to tell images from videos.
_MEASURED_SAMPLES = 8
_MEASURED_S = 1.0


class SampleMaker:
    """Makes the arrays of single samples of one task, in training or evaluation form."""

    def __init__(self, task: TaskSpec, data_set: DataSetSpec, *, tokenizer: Tokenizer | None, tokens: TokenSpec):
        self.task = task
        self.data_set = data_set
        self.tokenizer = tokenizer
        self.tokens = tokens
        self.classes = frozenset(task.classes or data_set.classes)
        self._columns = {name: column for column, name in enumerate(data_set.classes)}

    def arrays(self, clip: Clip, view: View, *, patches: np.ndarray | None = None) -> dict[str, np.ndarray]:
        """The sample's arrays. Raises Reject if labels or text are missing.

        patches: array to write the vision tokens into, a new one by default.
        """
        out = self._media(clip, view, patches)
        text = ""
        if TEXT in self.task.modalities:
            text = self._text(clip, view.rng)
            out |= encode_text(self.tokenizer, text, self.task.text_length)
        if self.task.contrasts:
            out["positive_ids"] = self._positive_id(clip, text)
        if self.task.classifies:
            out["labels"] = self.multi_hot(clip)
        return out

    def _media(self, clip: Clip, view: View, patches: np.ndarray | None) -> dict[str, np.ndarray]:
        changes = None if view.rng is None else augment.for_words(self.task.augment, self._words(clip))
        context, out = TokenContext.of(view, self.tokens, changes, patches), {}
        # Sound last: it starts with the frames.
        for name in sorted(self.task.media, key=lambda m: m == "audio"):
            to_tokens = load(self.data_set.modality(name).tokens)
            made = to_tokens(clip.media[name], self.data_set.settings(name), context)
            embedder = self.task.embedder(name)
            out |= {f"{embedder}/tokens": made.tokens, f"{embedder}/positions": made.positions}
            if made.start_s is not None:
                context = dataclasses.replace(context, start_s=made.start_s)
        return out

    def _words(self, clip: Clip) -> tuple[str, ...]:
        """The text and labels of the clip that the task uses."""
        captions = clip.text if TEXT in self.task.modalities and self.task.text == "captions" else ()
        uses_labels = self.task.classifies or self.task.positives == "labels" or self.task.text == "labels"
        return captions + (clip.labels if uses_labels else ())

    def _text(self, clip: Clip, rng: np.random.Generator | None) -> str:
        if self.task.text == "labels":
            label = " ".join(self._labels(clip))
            templates = prompts.train_templates(self.task.media[0])
            return templates[int(rng.integers(len(templates))) if rng is not None else 0].format(label)
        # All captions are checked first: whether a row has text must not depend on which caption is drawn.
        limit = self.task.max_characters
        texts = usable_captions(clip.text, self.tokenizer, max_characters=limit)
        if not texts:
            raise Reject(*best_reason([caption_fault(t, self.tokenizer, max_characters=limit) for t in clip.text]))
        return texts[int(rng.integers(len(texts))) if rng is not None else 0]

    def _labels(self, clip: Clip) -> list[str]:
        fault = functools.partial(text_fault, max_characters=self.task.max_characters)
        labels = [c for c in clip.labels if (c in self.classes if self.classes else not fault(c))]
        if labels:
            return labels
        reason, detail = best_reason([f for f in map(fault, clip.labels) if f])
        if reason == "no_text":
            reason, detail = "no_label", f"labels {list(clip.labels)[:5]} are none of the task's classes"
        raise Reject(reason, detail)

    def multi_hot(self, clip: Clip) -> np.ndarray:
        """(classes of the data set,) uint8."""
        out = np.zeros(len(self._columns), np.uint8)
        out[[self._columns[c] for c in self._labels(clip) if c in self._columns]] = 1
        return out

    def _positive_id(self, clip: Clip, text: str) -> np.ndarray:
        """(2,) int32, a 64-bit hash: keys in a batch of 65,536 collide once in 10^10 batches."""
        if self.task.positives == "instance":
            key = clip.id
        elif self.task.positives == "labels":
            key = "\n".join(sorted(self._labels(clip)))
        else:
            key = text.strip().lower()
        return np.array([name_key(key)], "<u8").view("<i4")


class Visit(NamedTuple):
    """One position of the order, with its row and epoch."""

    position: int
    row: int
    epoch: int


class Sample(NamedTuple):
    """A sample of a batch. rejects: bad samples met before it."""

    id: str
    arrays: dict[str, np.ndarray]
    rejects: list[dict]


class BatchMaker:
    """Makes whole rows: samples of a batch in order, with substitutes for bad ones.

    known_bad: rejects of an earlier part of the run. They are not tried again, so a resumed run sees the same samples.
    A transient reject holds only for the visit that found it, in this process too: batches must
    not depend on which process saw which sample before.
    """

    def __init__(self, plan: TaskPlan, samples: SampleMaker, source: Source, *, known_bad: KnownRejects | None = None):
        self.plan = plan
        self.samples = samples
        self.source = source
        self._known = known_bad or NONE_KNOWN
        self._bad: dict[str, dict] = {}

    def row(self, index: int, *, rank: int, world_size: int) -> Row:
        """The samples of one rank of batch ``index``."""
        variant, visits = self._visits(index, rank=rank, world_size=world_size)
        ids: list[str] = []
        rejects: list[dict] = []
        columns: dict[str, np.ndarray] = {}
        for number, visit in enumerate(visits):
            # Patches are nearly all of a batch: from the second sample on they are written in place.
            patches = columns["vision/tokens"][number] if "vision/tokens" in columns else None
            sample = self._sample(visit, variant, patches, then=visits[number + 1 :])
            ids.append(sample.id)
            rejects += sample.rejects
            for name, value in sample.arrays.items():
                if name not in columns:
                    columns[name] = np.empty((len(visits), *np.shape(value)), value.dtype)
                if value is not patches:
                    columns[name][number] = value
        return Row(
            task=self.plan.task.name,
            batch=index,
            rank=rank,
            variant=variant.name,
            ids=ids,
            rejects=rejects,
            arrays=columns,
        )

    def _visits(self, index: int, *, rank: int, world_size: int) -> tuple[Variant, list[Visit]]:
        """The variant of a batch, and this rank's visits."""
        variant, positions = self.plan.batch(index, rank=rank, world_size=world_size)
        rows, epochs = self.plan.order.rows(np.arange(positions.start, positions.stop))
        return variant, list(map(Visit, positions, rows.tolist(), epochs.tolist()))

    def cost_s(self, index: int) -> float:
        """Total CPU seconds of batch ``index``, estimated from its first samples."""
        variant, visits = self._visits(index, rank=0, world_size=1)
        self._sample(visits[0], variant)  # libraries load at first use
        began, done = self._cpu_s(), 0
        while done < min(_MEASURED_SAMPLES, len(visits)) and self._cpu_s() - began < _MEASURED_S:
            self._sample(visits[done], variant)
            done += 1
        return (self._cpu_s() - began) / done * len(visits)

    def _cpu_s(self) -> float:
        return time.process_time() + self.source.cpu_s

    def _sample(
        self, visit: Visit, variant: Variant, patches: np.ndarray | None = None, *, then: Sequence[Visit] = ()
    ) -> Sample:
        """The visit's row, or the first of its substitutes that is good. Raises DataError if too many are bad.

        then: the visits after it.
        """
        row, rejects = visit.row, []
        for attempt in range(_MAX_SUBSTITUTES):
            sample_id = self.source.id(row)
            reject = self._known_reject(sample_id, row, position=visit.position, attempt=attempt)
            if reject is None:
                try:
                    view = View(variant, rng=self.plan.order.generator(sample_id, visit.epoch))
                    clip = self.source.clip(row, next_rows=self._untried(then))
                    return Sample(sample_id, self.samples.arrays(clip, view, patches=patches), rejects)
                except Reject as e:
                    reject = self._new_reject(e, row, position=visit.position, attempt=attempt)
            rejects.append(reject | {"substitute": True} if attempt else reject)
            row = self.plan.order.substitute(visit.position, attempt, row=visit.row)
        last = rejects[-1]
        raise DataError(
            f"data set {self.samples.data_set.name}: {_MAX_SUBSTITUTES} samples in a row are bad, the last "
            f"{last['id']!r} ({last['reason']}: {last['detail']}); check the manifest with {command('check')}"
        )

    def _untried(self, visits: Sequence[Visit]) -> Iterator[int]:
        """The rows of visits that are not known to be bad: decoding those again may kill the decoder again."""
        for visit in visits:
            if self._known_reject(self.source.id(visit.row), visit.row, position=visit.position, attempt=0) is None:
                yield visit.row

    def _known_reject(self, sample_id: str, row: int, *, position: int, attempt: int) -> dict | None:
        reason = self._known.reason((position, attempt)) or self._known.reason(sample_id)
        if reason is None:
            return self._bad.get(sample_id)
        return self._reject(row, reason, "found before the run was started again") | {"journalled": True}

    def _new_reject(self, error: Reject, row: int, *, position: int, attempt: int) -> dict:
        reject = self._reject(row, error.reason, error.detail)
        if error.reason in TRANSIENT:
            return reject | {"position": position, "attempt": attempt}
        if len(self._bad) >= _MAX_MET:
            del self._bad[next(iter(self._bad))]
        self._bad[reject["id"]] = reject
        return reject

    def _reject(self, row: int, reason: str, detail: str) -> dict:
        return {
            "id": self.source.id(row),
            "data_set": self.samples.data_set.name,
            "source": self.source.media_path(row),
            "reason": reason,
            "detail": detail,
        }
