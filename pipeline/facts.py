"""Facts about a data set, from its manifests and a look for its files: ids, labels, media, held-out rows."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from pipeline.data.ids import Overlap, Repeats, overlap, repeats
from pipeline.data.labels import LabelCounts, count_labels
from pipeline.data.manifest import Manifest
from pipeline.data.media.clip import source_path
from pipeline.data.media.errors import Reject
from pipeline.data.media.presence import present
from pipeline.data.media.storage import check_uri
from pipeline.data.spec import DataSetSpec, TaskSpec

# Rows, spread over a data set, whose media files are looked for.
_ROWS = 64
# Maximum number of files to look for in remote storage, and seconds to wait for the answers.
_MAX_REMOTE, _PRESENCE_S = 16, 5.0


@dataclasses.dataclass(frozen=True)
class MediaFound:
    """The rows of a sample whose media are missing. example: (id, the path of the missing file, or why it has none)."""

    looked_at: int
    missing: int
    example: tuple[str, str] | None


@dataclasses.dataclass(frozen=True)
class Facts:
    """Facts about a data set. held_out: name → overlap, None if it is the training manifest itself."""

    data_set: DataSetSpec
    num_rows: int
    repeats: Repeats
    labels: LabelCounts | None
    media: Mapping[str, MediaFound]
    held_out: Mapping[str, Overlap | None]


def facts_of(data_set: DataSetSpec, tasks: list[TaskSpec]) -> Facts:
    """Facts from the training manifest and the held-out ones. Raises RequestError if one cannot be read."""
    manifest = Manifest(data_set.manifest, media=data_set.media_columns)
    class_lists = {classes_of(t, data_set) for t in tasks if needs_label(t)}
    has_labels = "labels" in manifest.columns
    media = {m: _find_media(manifest, m, data_set) for m in dict.fromkeys(m for t in tasks for m in t.media)}
    return Facts(
        data_set=data_set,
        num_rows=manifest.num_rows,
        media=media,
        labels=count_labels(manifest, class_lists) if has_labels else None,
        repeats=repeats(manifest),
        held_out={name: _overlap(data_set, manifest, uri, name) for name, uri in data_set.held_out.items()},
    )


def needs_label(task: TaskSpec) -> bool:
    """Whether a row without a label that counts is a reject."""
    labelled = task.contrasts and task.positives == "labels"
    return task.classifies or labelled or ("text" in task.modalities and task.text == "labels")


def classes_of(task: TaskSpec, data_set: DataSetSpec) -> tuple[str, ...]:
    """The classes that a task learns."""
    return task.classes or data_set.classes


def _overlap(data_set: DataSetSpec, manifest: Manifest, uri: str, name: str) -> Overlap | None:
    """None if they are one and the same manifest."""
    if uri == manifest.uri or ("://" not in uri and Path(uri).resolve() == Path(manifest.uri).resolve()):
        return None
    held_out = Manifest(uri, media=data_set.media_columns)
    held_out.require({"id": f"data_sets.{data_set.name}.held_out ({name})"})
    return overlap(manifest, held_out)


def _find_media(manifest: Manifest, modality: str, data_set: DataSetSpec) -> MediaFound:
    """Looks for the files of some rows; files in storage that does not answer in time do not count."""
    files, missing = [], []
    columns = data_set.modality(modality).columns_of(modality)
    for number in np.unique(np.linspace(0, manifest.num_rows - 1, _ROWS).astype(int)).tolist():
        row = manifest.row(number)
        try:
            path, _ = source_path(row, columns)
            # A file that may not be opened is not looked for either.
            check_uri(path, data_set.allowed_schemes)
            files.append((row["id"], path))
        except Reject as e:
            missing.append((row["id"], e.detail))
    remote = [file for file in files if "://" in file[1]]
    files = [file for file in files if "://" not in file[1]] + remote[:: max(1, len(remote) // _MAX_REMOTE)]
    exists = present([path for _, path in files], timeout_s=_PRESENCE_S)
    looked_at = len(missing) + sum(e is not None for e in exists)
    missing += [file for file, found in zip(files, exists, strict=True) if found is False]
    return MediaFound(looked_at, len(missing), missing[-1] if missing else None)
