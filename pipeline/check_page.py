"""The page of ``imp check --html``: a few samples of each task as the model will see them, and the bad rows."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from pipeline.credentials import redacted_values
from pipeline.data.batches import SampleMaker
from pipeline.data.media.clip import Clip
from pipeline.data.media.errors import Reject
from pipeline.data.modalities import TEXT
from pipeline.data.sample_tokens import View
from pipeline.data.sources import MediaSource
from pipeline.data.spec import AudioSpec, DecodeLimits, TaskSpec, Variant
from pipeline.data.thumbnails import image_uri, spectrum_uri, strip_uri, unpatched, unpatched_spectrum
from pipeline.data.tokenizer import Tokenizer
from pipeline.data.tokens import grid_positions
from pipeline.files import write_bytes
from pipeline.report.elements import Html, counted, escape, grid, picture, quiet, table
from pipeline.report.page import page
from pipeline.train.spec import RunSpec

# Maximum number of rows that are tried for the samples of a task, of those shown, and of variants of each.
_MAX_TRIED, _MAX_SHOWN, _MAX_VARIANTS = 24, 4, 3
# Maximum number of characters of a caption.
_MAX_CHARACTERS = 300


def write_check_page(
    path: Path, spec: RunSpec, tokenizer: Tokenizer | None, result: dict, limits: DecodeLimits
) -> None:
    """Writes the page, whole or not at all. result: of ``check.check``."""
    result = redacted_values(result)
    sections = {name: _task(spec, task, tokenizer, limits) for name, task in spec.data.tasks.items()}
    problems = result["problems"]
    sentence = counted(len(problems), "problem") if problems else "No problems found"
    usable = "The data can be used." if result["usable"] else "A run would stop."
    notes = "".join(f'<li class="bad">{escape(problem)}</li>' for problem in problems)
    header = Html(f'<p class="result">{sentence}. {usable}</p><ul class="findings">{notes}</ul>')
    text = page(
        title="IMP check: what the model will see", header=header, sections={**sections, "Bad rows": _bad(result)}
    )
    write_bytes(path, text.encode(errors="replace"))


def _bad(result: dict) -> Html:
    """The bad rows among the decoded ones, with their reasons."""
    rows, lines = [], []
    for name, found in result["data_sets"].items():
        lines.append(f"{name}: {found['rejects']['count']} of {found['sampled']} decoded rows are bad.")
        rows += [(name, one["id"], one["reason"], one["detail"]) for one in found["rejects"]["examples"]]
    listed = table(("Data set", "Id", "Reason", "Detail"), rows) if rows else ""
    return Html("".join(map(quiet, lines)) + listed)


def _task(spec: RunSpec, task: TaskSpec, tokenizer: Tokenizer | None, limits: DecodeLimits) -> Html:
    """A card for each sample: its media in every variant, its text in tokens, its labels."""
    data_set = spec.data.data_sets[task.data_set]
    source = MediaSource(data_set, modalities=task.media, limits=limits)
    maker = SampleMaker(task, data_set, tokenizer=tokenizer, tokens=spec.data.tokens)
    cards = [_card(maker, clip, seed) for seed, clip in enumerate(_clips(source, maker))]
    names = " + ".join(name for name, _ in task.objectives)
    variants = ", ".join(v.name for v in task.variants)
    note = quiet(f"{data_set.name}, {names}, {' and '.join(task.modalities)}; variants: {variants}")
    return Html(note + (grid(cards, kind="cards") if cards else quiet("None of the rows that were tried can be used.")))


def _clips(source: MediaSource, maker: SampleMaker) -> Iterator[Clip]:
    """Yields good rows, evenly spread."""
    shown, tried = 0, min(_MAX_TRIED, source.num_rows)
    rows = np.unique(np.linspace(0, source.num_rows - 1, tried).astype(int))
    # The first few from all over the data set, the others for rows that are bad.
    for row in np.concatenate([rows[:: _MAX_TRIED // _MAX_SHOWN], rows]).tolist():
        try:
            clip = source.clip(row)
            maker.arrays(clip, View(maker.task.variants[0]))
        except Reject:
            continue
        yield Clip(clip.id, {name: array.copy() for name, array in clip.media.items()}, clip.text, clip.labels)
        shown += 1
        if shown == _MAX_SHOWN:
            return


def _card(maker: SampleMaker, clip: Clip, seed: int) -> Html:
    """A sample as a training step sees it. seed: of the changes that are drawn."""
    task, parts = maker.task, []
    arrays: dict[str, np.ndarray] = {}
    for variant in task.variants[:_MAX_VARIANTS]:
        view = View(variant, rng=np.random.default_rng(seed))
        arrays = maker.arrays(clip, view)
        for modality in task.media:
            # A sound has one size.
            if modality == "audio" and parts and variant is not task.variants[0]:
                continue
            if image := _picture(maker, arrays, modality, variant):
                wide = " strip" if variant.num_frames or modality == "audio" else ""
                parts.append(f"<div>{picture(image, alt=f'{modality} of {clip.id}', kind=wide.strip())}")
                parts.append(f'<span class="quiet">{escape(modality)} {escape(variant.name)}</span></div>')
    text = _text(maker, arrays, clip) if TEXT in task.modalities else ""
    labels = f"<p>labels: {escape(', '.join(clip.labels))}</p>" if clip.labels else ""
    return Html(f'<div class="card"><h4>{escape(clip.id)}</h4>{"".join(parts)}{text}{labels}</div>')


def _picture(maker: SampleMaker, arrays: dict[str, np.ndarray], modality: str, variant: Variant) -> str:
    """The tokens of a modality as a picture again, as a data URI; empty for those that are none."""
    embedder, settings = maker.task.embedder(modality), maker.data_set.settings(modality)
    tokens, positions = arrays[f"{embedder}/tokens"], arrays[f"{embedder}/positions"]
    if isinstance(settings, AudioSpec):
        return spectrum_uri(unpatched_spectrum(tokens, settings))
    if embedder != "vision":
        return ""
    sizes = maker.tokens
    places = {tuple(p): i for i, p in enumerate(grid_positions(variant.grid, sizes.vision_positions).tolist())}
    patch = (sizes.vision_patch[0] if variant.num_frames else 1, *sizes.vision_patch[1:])
    frames = unpatched(tokens, variant.grid, patch, np.array([places[tuple(p)] for p in positions.tolist()]))
    return strip_uri(frames) if variant.num_frames else image_uri(frames[0])


def _text(maker: SampleMaker, arrays: dict[str, np.ndarray], clip: Clip) -> str:
    """The tokens that the model sees, and the captions of the row in full."""
    ids = [int(i) for i in arrays[f"{TEXT}/tokens"] if i]
    pieces = (
        "".join(f"<span>{escape(piece)}</span>" for piece in maker.tokenizer.pieces(ids)) if maker.tokenizer else ""
    )
    whole = " / ".join(clip.text)[:_MAX_CHARACTERS] if maker.task.text == "captions" else ""
    full = f'<p class="quiet">of: {escape(whole)}</p>' if whole else ""
    cut = f" (at most {maker.task.text_length} tokens)" if len(ids) == maker.task.text_length else ""
    return f'<p class="pieces">{pieces}{cut}</p>{full}'
