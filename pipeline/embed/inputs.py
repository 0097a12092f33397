"""The inputs of an embedding job: manifests and folders that were named, or the held-out sets of a run."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import pyarrow.fs

from pipeline.credentials import redacted
from pipeline.data.columns import type_fault
from pipeline.data.manifest import Manifest
from pipeline.data.media.storage import resolve_filesystem, with_retries
from pipeline.data.modalities import MEDIA, TEXT
from pipeline.data.spec import STORAGE_SCHEMES, DataSetSpec
from pipeline.embed.folder import StoredInput
from pipeline.embed.listing import write_listing
from pipeline.errors import RequestError


@dataclasses.dataclass(frozen=True)
class NamedInput:
    """An input as it was asked for. data_sets: whose preparation its items have, the first that fits.

    schemes: of media URIs, beside those that hold data sets.
    """

    uri: str
    data_sets: tuple[str, ...] = ()
    schemes: tuple[str, ...] = ()

    @property
    def allowed_schemes(self) -> tuple[str, ...]:
        own = {self.uri.partition("://")[0]} if "://" in self.uri else set()
        return tuple(sorted({*STORAGE_SCHEMES, *self.schemes, *own}))


def held_out_inputs(data_sets: Mapping[str, DataSetSpec]) -> list[NamedInput]:
    """The held-out manifests of a run, each prepared as its data set. Raises RequestError if it has none."""
    found = [
        NamedInput(uri, (name,), data_set.allowed_schemes)
        for name, data_set in data_sets.items()
        for uri in data_set.held_out.values()
    ]
    if not found:
        raise RequestError("--input: expected a manifest or a folder, as the run has no held-out sets")
    return found


def open_inputs(named: Sequence[NamedInput], out: Path, modalities: Sequence[str]) -> list[Manifest]:
    """The manifests of the inputs; folders are listed into ``out`` once.

    Raises RequestError for an input that is neither, or that has nothing of the model's modalities.
    """
    found = []
    for number, one in enumerate(named):
        # Its name says which folder it lists: one may be there of a request that was refused.
        name = hashlib.sha256(_absolute(one.uri).encode()).hexdigest()[:12]
        listing = out / "inputs" / f"{number:02d}-{name}.parquet"
        if not listing.exists() and not _is_manifest(one.uri):
            listing.parent.mkdir(parents=True, exist_ok=True)
            counts = write_listing(one.uri, listing, leave_out=out)
            print(f"{redacted(one.uri)}: " + ", ".join(f"{n:,} {kind}" for kind, n in counts.items()), flush=True)
        manifest = Manifest(str(listing) if listing.exists() else one.uri, media=_added(modalities))
        _check_columns(manifest, one, modalities)
        found.append(manifest)
    return found


def stored(named: Iterable[NamedInput], manifests: Iterable[Manifest]) -> tuple[StoredInput, ...]:
    """The inputs as the description keeps them."""
    return tuple(
        StoredInput(_absolute(one.uri), manifest.num_rows, _digest(manifest.fingerprint), one.data_sets)
        for one, manifest in zip(named, manifests, strict=True)
    )


def _absolute(uri: str) -> str:
    return redacted(uri if "://" in uri else os.path.abspath(uri))


def _digest(fingerprint: dict) -> str:
    return hashlib.sha256(json.dumps(fingerprint, sort_keys=True).encode()).hexdigest()


def _is_manifest(uri: str) -> bool:
    """Whether an input is a Parquet file or a folder of them. Raises RequestError unless it or a folder is there."""
    filesystem, path = with_retries(uri, lambda: resolve_filesystem(uri if "://" in uri else os.path.abspath(uri)))
    info = with_retries(uri, lambda: filesystem.get_file_info(path))
    if info.type == pyarrow.fs.FileType.Directory:
        selector = pyarrow.fs.FileSelector(path, recursive=False)
        return any(i.path.endswith(".parquet") for i in with_retries(uri, lambda: filesystem.get_file_info(selector)))
    if info.type != pyarrow.fs.FileType.File:
        raise RequestError(f"--input {redacted(uri)}: expected a manifest or a folder of media, found nothing there")
    if not path.endswith(".parquet"):
        raise RequestError(
            f"--input {redacted(uri)}: expected a manifest (.parquet) or a folder of media, found another file"
        )
    return True


def _added(modalities: Sequence[str]) -> tuple[str, ...]:
    return tuple(name for name in modalities if name not in (*MEDIA, TEXT))


def _check_columns(manifest: Manifest, one: NamedInput, modalities: Sequence[str]) -> None:
    manifest.require({"id": "--input"})
    columns = {*modalities, *(["video"] if "audio" in modalities else [])}
    wrong = sorted(columns & set(manifest.schema.names) - set(manifest.columns))
    columns &= set(manifest.columns)
    if not columns:
        manifest.require(dict.fromkeys(wrong, "--input"))
        raise RequestError(
            f"--input {redacted(one.uri)}: expected a column or files of {', '.join(modalities)}, which the model "
            f"embeds; found {', '.join(manifest.schema.names)}"
        )
    for name in wrong:
        fault = type_fault(name, manifest.schema.field(name).type)
        print(f"warning: {redacted(one.uri)}: column {name!r} is left out: {fault}", file=sys.stderr, flush=True)
