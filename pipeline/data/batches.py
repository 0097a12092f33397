"""One batch of one task for one rank: from positions in the order to a row of arrays with their ids.

A bad sample becomes a reject and is replaced by a substitute that depends only on its position.
"""

from __future__ import annotations

import functools
import time

import numpy as np

from pipeline.data import augment, prompts
from pipeline.data.media.clip import Clip
from pipeline.data.media.errors import TRANSIENT, Reject
from pipeline.data.order import name_key
from pipeline.data.plan import Row, TaskPlan
from pipeline.data.spec import DataSetSpec, SoundAugment, TaskSpec, TokenSpec, Variant
from pipeline.data.tokenizer import Tokenizer, most_telling, text_fault
from pipeline.data.tokens import choose_tokens, grid_positions, patchify, spectrogram_tokens
from pipeline.data.variants import view_frames, window_starts
from pipeline.errors import DataError

_MOST_SUBSTITUTES = 64
# Enough to tell a task of pictures from one of films.
_MEASURED_SAMPLES, _MEASURED_S = 8, 1.0


class SampleMaker:
    """Makes the arrays of single samples of one task, in training or evaluation form.

    source: reads a clip by row number (``sources.MediaSource`` or ``shards.ShardSource``).
    """

    def __init__(
        self, task: TaskSpec, data_set: DataSetSpec, *, source, tokenizer: Tokenizer | None, tokens: TokenSpec
    ):
        self.task, self.data_set, self.source, self.tokenizer = task, data_set, source, tokenizer
        self.tokens = tokens
        self.classes = task.classes or data_set.classes

    def arrays(
        self,
        clip: Clip,
        variant: Variant,
        *,
        rng: np.random.Generator | None,
        window: tuple[int, int] = (0, 1),
        patches: np.ndarray | None = None,
    ) -> dict[str, np.ndarray]:
        """The sample's arrays; rng None: the evaluation view, ``window`` (i, n) the i-th of n evenly spaced in time.

        patches: where the vision tokens are written, a new array by default. Raises Reject where labels or text are
        missing.
        """
        out, start_s = {}, None
        changes = None if rng is None else augment.for_words(self.task.augment, self._words(clip))
        # A branch begins where the sample's own draws do, however many of those follow.
        branch = functools.partial(augment.stream, rng)
        colours = branch(augment.COLOUR) if changes and changes.colour.probability else None
        sounds = branch(augment.SOUND) if changes and changes.sound != SoundAugment() else None
        # Sound last: it starts where the frames do.
        for modality in sorted(self.task.modalities, key=lambda m: m == "audio"):
            if modality in ("image", "video"):
                frames = clip.image[None] if modality == "image" else clip.video
                view, first = view_frames(frames, variant, augment=changes, rng=rng, window=window)
                if colours:
                    view = augment.jitter_colour(view, changes.colour, colours)
                # An image says nothing of when its sound begins.
                start_s = first / self.data_set.video.fps if modality == "video" else None
                out |= self._vision(view, variant, rng, patches)
            elif modality == "audio":
                out |= self._audio(clip.audio, start_s, window, sound=sounds and changes.sound, rng=sounds)
        if "text" in self.task.modalities:
            text = self._text(clip, rng)
            out |= self.encode_text(text)
        if self.task.contrasts:
            out["positive_ids"] = self._positive_id(clip, text if "text" in self.task.modalities else "")
        if self.task.classifies:
            out["labels"] = self.multi_hot(clip)
        return out

    def _vision(self, view: np.ndarray, variant: Variant, rng, patches: np.ndarray | None) -> dict:
        frames = self.tokens.vision_patch[0] if variant.num_frames else 1
        positions, keep = grid_positions(variant.grid, self.tokens.vision_positions), None
        if rng is not None and variant.drop_rate:
            keep = choose_tokens(len(positions), drop_rate=variant.drop_rate, rng=rng)
            positions = positions[keep]
        tokens = patchify(view, (frames, *self.tokens.vision_patch[1:]), keep=keep, out=patches)
        return {"vision/tokens": tokens, "vision/positions": positions}

    def _audio(self, waveform: np.ndarray, start_s: float | None, window: tuple[int, int], *, sound, rng) -> dict:
        """start_s: where the frames beside it start, None without; then the sound has windows of its own.

        sound: what to change of it with draws from ``rng``; None for nothing.
        """
        spec, (number, count) = self.data_set.audio, window
        spare = max(0, len(waveform) - spec.num_samples)
        if start_s is not None:
            start = int(start_s * spec.sample_rate_hz)
        elif sound is not None:
            start = augment.start_sample(spare, sound, rng)
        else:
            # One view of sound alone is its beginning.
            start = 0 if count == 1 else window_starts(spare, count)[number]
        part = waveform[start : start + spec.num_samples]
        if sound is not None:
            part = augment.change_waveform(part, sound, rng)
        tokens = spectrogram_tokens(part, spec)
        if sound is not None:
            augment.mask_spectrogram(tokens, spec, sound, rng)
        return {"audio/tokens": tokens, "audio/positions": grid_positions(spec.grid, self.tokens.audio_positions)}

    def _words(self, clip: Clip) -> tuple[str, ...]:
        """What the task says of the clip in words."""
        captions = clip.text if "text" in self.task.modalities and self.task.text == "captions" else ()
        told = self.task.classifies or self.task.positives == "labels" or self.task.text == "labels"
        return captions + (clip.labels if told else ())

    def _text(self, clip: Clip, rng) -> str:
        if self.task.text == "labels":
            label = " ".join(self._labels(clip))
            templates = prompts.train_templates(self.task.media[0])
            return templates[int(rng.integers(len(templates))) if rng is not None else 0].format(label)
        # Whether a row has text must not depend on which text is drawn.
        texts = self.texts(clip)
        if not texts:
            raise Reject(*most_telling([self._fault(t) for t in clip.text]))
        return texts[int(rng.integers(len(texts))) if rng is not None else 0]

    def texts(self, clip: Clip) -> tuple[str, ...]:
        """The clip's captions that can be used: UTF-8, not too long, with a token."""
        return tuple(t for t in clip.text if self._fault(t) is None)

    def _fault(self, caption: str) -> tuple[str, str] | None:
        fault = text_fault(caption, max_characters=self.task.max_characters)
        if fault is None and not self.tokenizer.has_tokens(caption):
            return "no_text", f"no tokens in {caption[:40]!r}"
        return fault

    def encode_text(self, text: str) -> dict:
        ids = self.tokenizer.encode(text, self.task.text_length)
        if not ids.any():
            raise Reject("no_text", f"no tokens in {text[:40]!r}")
        positions = np.arange(len(ids), dtype=np.int32)[:, None]
        return {"text/tokens": ids, "text/positions": positions, "text/mask": ids != 0}

    def _labels(self, clip: Clip) -> list[str]:
        fault = functools.partial(text_fault, max_characters=self.task.max_characters)
        labels = [c for c in clip.labels if (c in self.classes if self.classes else not fault(c))]
        if labels:
            return labels
        reason, detail = most_telling([f for f in map(fault, clip.labels) if f])
        if reason == "no_text":
            reason, detail = "no_label", f"labels {list(clip.labels)[:5]} are none of the task's classes"
        raise Reject(reason, detail)

    def multi_hot(self, clip: Clip) -> np.ndarray:
        """(classes of the data set,) uint8."""
        labels = self._labels(clip)
        return np.array([c in labels for c in self.data_set.classes], np.uint8)

    def _positive_id(self, clip: Clip, text: str) -> np.ndarray:
        """(2,) int32: 64 bits of a hash, so that different keys of a batch of 65,536 meet once in 10^10 batches."""
        if self.task.positives == "instance":
            key = clip.id
        elif self.task.positives == "labels":
            key = "\n".join(sorted(self._labels(clip)))
        else:
            key = text.strip().lower()
        return np.array([name_key(key)], "<u8").view("<i4")


class BatchMaker:
    """Makes whole rows: samples of a batch in order, substitutes where one is bad.

    known_bad: what an earlier part of the run rejected, by ``plan.reject_key``; not tried again, so a resume sees the
    same samples. A transient reject holds for the visit that found it alone, in this process too: batches must not
    depend on which process has met what before.
    """

    def __init__(self, plan: TaskPlan, samples: SampleMaker, *, known_bad: dict | None = None):
        self.plan, self.samples = plan, samples
        self._known, self._bad = known_bad or {}, {}

    def row(self, index: int, *, rank: int, world_size: int) -> Row:
        variant, visits = self._visits(index, rank=rank, world_size=world_size)
        ids, rejects, columns = [], [], {}
        for number, visit in enumerate(visits):
            # Patches are nearly all of a batch: from the second sample on they are written where they belong.
            patches = columns["vision/tokens"][number] if "vision/tokens" in columns else None
            sample_id, arrays = self._sample(*visit, variant, rejects, patches=patches)
            ids.append(sample_id)
            for name, value in arrays.items():
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

    def _visits(self, index: int, *, rank: int, world_size: int) -> tuple[Variant, list[tuple[int, int, int]]]:
        """The variant of a batch, and (position, row, epoch) of each of this rank's samples."""
        variant, positions = self.plan.batch(index, rank=rank, world_size=world_size)
        rows, epochs = self.plan.order.rows(np.arange(positions.start, positions.stop))
        return variant, list(zip(positions, rows.tolist(), epochs.tolist(), strict=True))

    def cost_s(self, index: int) -> float:
        """CPU seconds that batch ``index`` takes in all, from its first samples."""
        variant, visits = self._visits(index, rank=0, world_size=1)
        self._sample(*visits[0], variant, [])  # libraries load at first use
        began, done = self._cpu_s(), 0
        while done < min(_MEASURED_SAMPLES, len(visits)) and self._cpu_s() - began < _MEASURED_S:
            self._sample(*visits[done], variant, [])
            done += 1
        return (self._cpu_s() - began) / done * len(visits)

    def _cpu_s(self) -> float:
        decoders = getattr(self.samples.source, "decoders", None)
        return time.process_time() + (decoders.cpu_s if decoders else 0.0)

    def _sample(
        self,
        position: int,
        row: int,
        epoch: int,
        variant: Variant,
        rejects: list[dict],
        *,
        patches: np.ndarray | None = None,
    ) -> tuple[str, dict]:
        for attempt in range(_MOST_SUBSTITUTES):
            source = self.samples.source
            sample_id = source.id(row)
            reject = self._known_reject(sample_id, position, attempt)
            if reject is None:
                try:
                    clip = source.clip(row)
                    rng = self.plan.order.generator(sample_id, epoch)
                    return sample_id, self.samples.arrays(clip, variant, rng=rng, patches=patches)
                except Reject as e:
                    reject = self._new_reject(e, row, position=position, attempt=attempt)
            rejects.append(reject)
            row = self.plan.order.substitute(position, attempt)
        last = rejects[-1]
        raise DataError(
            f"data set {self.samples.data_set.name}: {_MOST_SUBSTITUTES} samples in a row are bad, the last "
            f"{last['id']!r} ({last['reason']}: {last['detail']}); check the manifest with jobs/check.py"
        )

    def _known_reject(self, sample_id: str, position: int, attempt: int) -> dict | None:
        reject = self._known.get((position, attempt)) or self._known.get(sample_id)
        return reject | {"journalled": True} if reject else self._bad.get(sample_id)

    def _new_reject(self, error: Reject, row: int, *, position: int, attempt: int) -> dict:
        reject = {
            "id": self.samples.source.id(row),
            "data_set": self.samples.data_set.name,
            "source": self.samples.source.where(row),
            "reason": error.reason,
            "detail": error.detail,
        }
        if error.reason in TRANSIENT:
            return reject | {"position": position, "attempt": attempt}
        self._bad[reject["id"]] = reject
        return reject
