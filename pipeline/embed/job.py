"""The embedding job: a run or an export, its inputs, and a folder of parts that a killed job goes on with."""

from __future__ import annotations

import dataclasses
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pyarrow.parquet as pq

from pipeline.corpus import build_corpus
from pipeline.credentials import redacted
from pipeline.data.manifest import Manifest
from pipeline.data.modalities import MODALITIES, Modality
from pipeline.embed import folder as folders
from pipeline.embed import inputs as named_inputs
from pipeline.embed.decoding import Decoders, Prepared, RowPreparer, in_order
from pipeline.embed.embedding import Embedder, Part, Tally, written
from pipeline.embed.folder import Description
from pipeline.embed.inputs import NamedInput
from pipeline.embed.preparations import Preparation, modalities_of, preparations, spaces_of
from pipeline.errors import DataError, RequestError
from pipeline.evaluate.exporting import export_model
from pipeline.evaluate.trained_model import TrainedModel
from pipeline.export import Encoder, load
from pipeline.export.config import CONFIG
from pipeline.export.media import check_decoder
from pipeline.files import make_folder, sha256_of
from pipeline.waiting import waiting_for

# Seconds between two lines of progress.
_PROGRESS_S = 5.0
_MODEL = "model"


@dataclasses.dataclass(frozen=True)
class Request:
    """What ``imp embed`` was asked for.

    inputs: manifests and folders; () for the run's held-out sets. data_sets: whose preparation, the first that has an
    item's modality. shard: (i, n), the i-th of n jobs that share the folder, from 0.
    """

    run: Path
    out: Path
    inputs: tuple[str, ...] = ()
    data_sets: tuple[str, ...] = ()
    schemes: tuple[str, ...] = ()
    clips: int = 1
    features: bool = False
    shard: tuple[int, int] = (0, 1)


@dataclasses.dataclass(frozen=True)
class _Model:
    encoder: Encoder
    path: Path
    inputs: list[NamedInput]


def embed(request: Request) -> None:
    """Makes the parts that are missing. A stop or a kill at any moment loses the unfinished parts alone.

    Raises RequestError for a wrong request, DataError if storage cannot be reached or nothing could be embedded.
    """
    make_folder(request.out, "--out")
    model = _open_model(request)
    spaces = spaces_of(model.encoder, features=request.features)
    modalities = modalities_of(model.encoder, tuple(spaces))
    manifests = named_inputs.open_inputs(model.inputs, request.out, modalities)
    chosen = [_chosen(model, one, manifest, spaces) for one, manifest in zip(model.inputs, manifests, strict=True)]
    _check_same(request.out, _description(request, model, manifests, spaces))
    (request.out / "parts").mkdir(exist_ok=True)
    folders.remove_drafts(request.out)
    tally = Tally()
    with Decoders() as decoders:
        for number, one in enumerate(model.inputs):
            schemes = one.allowed_schemes
            prepare = RowPreparer(model.encoder, chosen[number], decoders, schemes=schemes, clips=request.clips)
            parts = _missing(request, number, manifests[number].num_rows)
            progress = _Progress(_label(one), parts, manifests[number].num_rows)
            rows = rows_of(manifests[number], number, parts, prepare)
            for part in written(Embedder(model.encoder).parts(rows), part_writer(request.out, spaces)):
                tally.add(part.items)
                progress.add(part.name[1])
    _finish(request.out, tally)


# --- the model ---


def _open_model(request: Request) -> _Model:
    """The model of an export, or of a run by way of an export in ``out``, which pins its step."""
    if (request.run / CONFIG).is_file():
        if not request.inputs:
            raise RequestError("--input: expected a manifest or a folder, as an export names no held-out sets")
        with waiting_for("the model to load"):
            encoder = load(request.run)
        _check_decoders(encoder)
        return _Model(encoder, request.run, _named(request))
    if not (request.run / "checkpoints").is_dir():
        raise RequestError(
            f"--run {request.run}: expected a run directory with checkpoints or an exported model, found neither"
        )
    return _open_run(request)


def _open_run(request: Request) -> _Model:
    with waiting_for("the checkpoint to load"):
        trained = TrainedModel(request.run)
        if not (request.out / _MODEL).exists():
            export_model(trained, request.out / _MODEL)
        added = _added_modalities(trained)
        encoder = load(request.out / _MODEL, modalities=added)
    if encoder.config.step != trained.step:
        print(f"the run is at step {trained.step}; its embeddings stay those of step {encoder.config.step}", flush=True)
    if request.inputs:
        return _Model(encoder, Path(_MODEL), _named(request))
    build_corpus(trained.recipe)
    return _Model(encoder, Path(_MODEL), named_inputs.held_out_inputs(trained.data_sets))


def _added_modalities(trained: TrainedModel) -> dict[str, Modality]:
    """The modalities that the run's recipe adds."""
    return {one.name: one.modality for data_set in trained.data_sets.values() for one in data_set.added}


def _check_decoders(encoder: Encoder) -> None:
    """Raises RequestError for decoders that are code of the run's own: an export runs none."""
    for one in encoder.config.inputs:
        if one.modality in MODALITIES:
            check_decoder(one.modality, one.settings.decoder if hasattr(one.settings, "decoder") else "")


def _named(request: Request) -> list[NamedInput]:
    return [NamedInput(uri, request.data_sets, request.schemes) for uri in request.inputs]


# --- the inputs ---


def _chosen(model: _Model, one: NamedInput, manifest: Manifest, spaces: dict[str, int]) -> dict[str, list[Preparation]]:
    """Modality → how its items are prepared, of the modalities that the input may have."""
    found, columns = {}, set(manifest.columns)
    known = {i.data_set for i in model.encoder.config.inputs}
    if wrong := [name for name in one.data_sets if name not in known]:
        raise RequestError(f"--data-set: the model has no data set {wrong[0]}; known: {', '.join(sorted(known))}")
    for modality in modalities_of(model.encoder, tuple(spaces)):
        of = ("audio", "video") if modality == "audio" else (modality,)
        if columns.intersection(of) and _has_values(manifest, columns.intersection(of)):
            found[modality] = preparations(model.encoder, modality, one.data_sets, tuple(spaces))
    return found


def _has_values(manifest: Manifest, columns: set[str]) -> bool:
    """Whether one of the columns has a value in some row."""
    batches = manifest.batches(tuple(columns))
    return any(column.null_count < len(column) for batch in batches for column in batch.columns)


def _description(request: Request, model: _Model, manifests: Sequence[Manifest], spaces: dict[str, int]) -> Description:
    inside = model.path == Path(_MODEL)
    return Description(
        format=folders.FORMAT,
        model=_MODEL if inside else os.path.abspath(model.path),
        digest=sha256_of((request.out / _MODEL if inside else model.path) / CONFIG),
        step=model.encoder.config.step,
        spaces=spaces,
        clips=request.clips,
        inputs=named_inputs.stored(model.inputs, manifests),
    )


def _check_same(out: Path, description: Description) -> None:
    """Writes the description, or raises RequestError if the folder has another one."""
    if not (out / folders.DESCRIPTION).exists():
        folders.write_description(out, description)
        return
    found = folders.read_description(out, "--out")
    names = [f.name for f in dataclasses.fields(found) if getattr(found, f.name) != getattr(description, f.name)]
    if names:
        raise RequestError(
            f"--out {out}: its embeddings are of another request ({', '.join(names)} differ); use another folder or "
            "remove it"
        )


# --- the work ---


def _missing(request: Request, number: int, num_rows: int) -> list[int]:
    """The parts of an input that this job makes."""
    index, count = request.shard
    return folders.missing_parts(request.out, number, range(folders.num_parts(num_rows))[index::count])


def part_writer(out: Path, spaces: dict[str, int]) -> Callable[[Part], None]:
    """Writes a part to its file."""
    return lambda part: folders.write_part(folders.part_path(out, *part.name), part.items, spaces)


def rows_of(
    manifest: Manifest, number: int, parts: Sequence[int], prepare: RowPreparer
) -> Iterator[tuple[tuple[int, int], bool, list[Prepared]]]:
    """(part, whether it is the part's last row, items) of every row of the parts."""

    def places() -> Iterator[tuple[int, bool, int]]:
        for part in parts:
            numbers = folders.part_rows(part, manifest.num_rows)
            yield from ((part, row == numbers[-1], row) for row in numbers)

    def make(place: tuple[int, bool, int]) -> tuple[int, bool, list[Prepared]]:
        part, last, row = place
        return part, last, prepare(manifest.row(row))

    for part, last, items in in_order(places(), make, lambda made: sum(one.num_bytes for one in made[2])):
        yield (number, part), last, items


def _label(one: NamedInput) -> str:
    return redacted("/".join(one.uri.rstrip("/").split("/")[-2:]))


class _Progress:
    """Lines on the rows that are done, every few seconds."""

    def __init__(self, name: str, parts: Sequence[int], num_rows: int) -> None:
        self._name, self._num_rows, self._done = name, num_rows, 0
        self._total = sum(len(folders.part_rows(part, num_rows)) for part in parts)
        self._began = self._last = time.monotonic()

    def add(self, part: int) -> None:
        """Counts the rows of a finished part."""
        self._done += len(folders.part_rows(part, self._num_rows))
        now = time.monotonic()
        if now - self._last < _PROGRESS_S and self._done < self._total:
            return
        self._last = now
        rate = self._done / max(now - self._began, 1e-6)
        left = (self._total - self._done) / rate
        print(f"{self._name}: {self._done:,}/{self._total:,} rows, {rate:.1f} rows/s, {left:.0f} s left", flush=True)


def _finish(out: Path, tally: Tally) -> None:
    """Says what was done. Raises DataError if the whole folder holds no embedding."""
    if not (tally.embedded or tally.rejected):
        listed = any((out / "inputs").glob("*.parquet"))
        more = "; of a folder they hold the files of the first time: embed files added since into another --out"
        print(f"{out}: all parts were there{more if listed else ''}", flush=True)
        return
    for line in tally.lines():
        print(line, file=sys.stderr if line.startswith("rejected") else sys.stdout, flush=True)
    if not tally.embedded and not any(_embeds(path) for _, _, path in folders.parts(out)):
        raise DataError(f"{out}: none of the items could be embedded")


def _embeds(path: Path) -> bool:
    return any(reason is None for reason in pq.read_table(path, columns=["reject"]).column(0).to_pylist())
