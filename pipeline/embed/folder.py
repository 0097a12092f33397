"""A folder of embeddings: its description, and its parts of a fixed number of manifest rows each.

    embeddings.json          model, spaces and inputs: ``Description``
    inputs/00-*.parquet      the files of an input that is a folder
    model/                   the export of a run that was given
    parts/00-000000001.parquet   rows 512 to 1023 of input 0, one line an item

A part is whole or absent, and its rows follow from its name: a job that was killed makes the absent ones, and two jobs
that make the same part write the same rows.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import re
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.errors import RequestError, one_line
from pipeline.files import TEMPORARY_SUFFIX, whole_file, write_json

FORMAT = 1
DESCRIPTION = "embeddings.json"
# Manifest rows of a part: at most their work is lost by a kill.
ROWS_PER_PART = 512
# Seconds without a write after which an unfinished file is considered abandoned.
_ABANDONED_S = 3600.0
_PART = re.compile(r"(\d{2,})-(\d{9,})\.parquet")
_WORDS = ("id", "modality", "source", "caption", "prepared_as", "reject", "detail")


@dataclasses.dataclass(frozen=True)
class StoredInput:
    """One input. uri: without credentials. data_sets: whose preparation its items have, the first that fits.

    rows: digest of its ids, texts and times.
    """

    uri: str
    num_rows: int
    rows: str
    data_sets: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Description:
    """embeddings.json. model: path of the exported model, relative to the folder where it is in it.

    digest: SHA-256 of the model's config.json, which holds those of its files. spaces: name → size of a vector.
    """

    format: int
    model: str
    digest: str
    step: int
    spaces: dict[str, int]
    clips: int
    inputs: tuple[StoredInput, ...]


@dataclasses.dataclass
class Embedded:
    """One item. vectors: space → (K,) float32 of unit length; none of a reject."""

    id: str
    modality: str
    source: str
    caption: str | None = None
    prepared_as: str | None = None
    start_s: float | None = None
    end_s: float | None = None
    reject: str | None = None
    detail: str | None = None
    vectors: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)


def write_description(folder: Path, description: Description) -> None:
    write_json(folder / DESCRIPTION, dataclasses.asdict(description))


def read_description(folder: Path, option: str) -> Description:
    """The description of a folder of embeddings. Raises RequestError."""
    path = Path(folder) / DESCRIPTION
    expected = f"{option} {folder}: expected a folder that imp embed has written"
    try:
        found = json.loads(path.read_bytes())
        if not isinstance(found, dict) or found.get("format") != FORMAT:
            raise ValueError(f"expected format {FORMAT}")
        inputs = tuple(StoredInput(**i | {"data_sets": tuple(i["data_sets"])}) for i in found["inputs"])
        description = Description(**found | {"inputs": inputs})
        if not all(isinstance(size, int) for size in description.spaces.values()):
            raise ValueError("expected sizes of spaces")
    except OSError as e:
        raise RequestError(f"{expected}, found no {DESCRIPTION} in it: {e.strerror or one_line(e)}") from e
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as e:
        raise RequestError(f"{expected}, found a damaged {DESCRIPTION}: {one_line(e)}; embed again") from e
    return description


def part_path(folder: Path, number: int, part: int) -> Path:
    """The file of one part of an input."""
    return folder / "parts" / f"{number:02d}-{part:09d}.parquet"


def num_parts(num_rows: int) -> int:
    return -(-num_rows // ROWS_PER_PART)


def part_rows(part: int, num_rows: int) -> range:
    """The manifest rows of a part."""
    return range(part * ROWS_PER_PART, min(num_rows, (part + 1) * ROWS_PER_PART))


def parts(folder: Path) -> list[tuple[int, int, Path]]:
    """(input, part, file) of every part that is there, in order."""
    matches = ((_PART.fullmatch(path.name), path) for path in (folder / "parts").glob("*.parquet"))
    return sorted((int(m[1]), int(m[2]), path) for m, path in matches if m)


def missing_parts(folder: Path, number: int, wanted: Sequence[int]) -> list[int]:
    """The parts of an input that have not been made."""
    done = {part for of, part, _ in parts(folder) if of == number}
    return [part for part in wanted if part not in done]


def remove_drafts(folder: Path) -> None:
    """Removes the unfinished files of jobs that were killed; a young one may be another job's."""
    for path in (folder / "parts").glob(f".*{TEMPORARY_SUFFIX}"):
        with contextlib.suppress(FileNotFoundError):
            if time.time() - path.stat().st_mtime > _ABANDONED_S:
                path.unlink()


def schema(spaces: dict[str, int]) -> pa.Schema:
    """The columns of a part."""
    words = [(name, pa.string()) for name in _WORDS]
    times = [(name, pa.float64()) for name in ("start_s", "end_s")]
    return pa.schema([*words, *times, *((name, pa.list_(pa.float32(), size)) for name, size in spaces.items())])


def write_part(path: Path, items: Sequence[Embedded], spaces: dict[str, int]) -> None:
    """Writes the items of a part, whole or not at all."""
    columns = {name: [getattr(item, name) for item in items] for name in (*_WORDS, "start_s", "end_s")}
    vectors = {name: _vectors([item.vectors.get(name) for item in items], size) for name, size in spaces.items()}
    table = pa.table(columns | vectors, schema=schema(spaces))
    with whole_file(path) as temporary:
        # Vectors do not compress; words are few.
        pq.write_table(table, temporary, use_dictionary=["modality", "prepared_as", "reject"], compression="NONE")


def _vectors(found: Sequence[np.ndarray | None], size: int) -> pa.Array:
    values = np.zeros((len(found), size), np.float32)
    missing = np.array([v is None for v in found], bool)
    for row, vector in enumerate(found):
        if vector is not None:
            values[row] = vector
    return pa.FixedSizeListArray.from_arrays(pa.array(values.ravel()), size, mask=pa.array(missing))
