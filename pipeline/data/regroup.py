"""A manifest written again with small row groups, so that its rows can be read in place.

    python -m pipeline.data.regroup SOURCE FOLDER [COLUMN ...]

Files of an earlier try that was stopped are kept, if they are of the same files. Paths of images, videos and sounds
become absolute, as do those of each COLUMN, of a modality that a recipe adds. Memory does not grow with the row groups.
"""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path, PurePosixPath

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.data.ids import resolved
from pipeline.data.manifest import Manifest
from pipeline.data.modalities import MEDIA
from pipeline.data.parquet_files import ParquetFiles
from pipeline.data.row_groups import equal_batches
from pipeline.errors import EXIT_DONE, EXIT_FAILED, EXIT_REQUEST, DataError, RequestError
from pipeline.files import make_folder, whole_file
from pipeline.waiting import waiting_for

# A row costs its group and, of more files than a process keeps, its footer, which lists all groups: for files of 10^6
# rows this number makes the sum smallest (1.5 ms; 3.8 with 1,024).
_ROWS_PER_GROUP = 4096
# Rows that are written at a time.
_ROWS_PER_BATCH = 4 * _ROWS_PER_GROUP
# The key of a file's metadata that holds the identity of the file it was made from.
_SOURCE = b"regrouped_from"


def regroup(source: str, folder: Path, *, media: tuple[str, ...] = ()) -> int:
    """Writes each file of a manifest into a folder. Returns the number of rows. media: added columns of paths.

    Raises RequestError if the folder cannot be written or is the manifest's own.
    """
    make_folder(folder, "FOLDER")
    manifest, files = Manifest(source, media=media), ParquetFiles(source, media)
    if Path(files.folder).exists() and folder.samefile(files.folder):
        raise RequestError(f"FOLDER {folder}: expected another folder than that of the manifest; name one")
    for number, path in enumerate(files.paths):
        name = PurePosixPath(path).name
        target = folder / (name if name.endswith(".parquet") else f"{name}.parquet")
        with waiting_for(f"file {number + 1:,} of {len(files.paths):,}"):
            identity = files.identity(path).encode()
            if _made_from(target) != identity:
                _write(manifest, files, path, target, identity=identity)
    return ParquetFiles(str(folder)).num_rows


def _made_from(target: Path) -> bytes | None:
    """The identity of the file that a file was made from; None without a whole one."""
    with contextlib.suppress(OSError, pa.ArrowException):
        return (pq.read_metadata(target).metadata or {}).get(_SOURCE)
    return None


def _write(manifest: Manifest, files: ParquetFiles, path: str, target: Path, *, identity: bytes) -> None:
    schema = files.columns(path)
    paths = [name for name in (*MEDIA, *manifest.media) if name in schema.names]
    pieces = files.file_pieces(path, schema.names)
    for name in paths:
        schema = schema.set(schema.get_field_index(name), pa.field(name, pa.large_string()))
    stamped = schema.with_metadata((schema.metadata or {}) | {_SOURCE: identity})
    with whole_file(target) as whole, pq.ParquetWriter(whole, stamped, write_page_checksum=True) as writer:
        for batch in equal_batches(pieces, _ROWS_PER_BATCH):
            for name in paths:
                column = _absolute(manifest, batch[name])
                batch = batch.set_column(schema.get_field_index(name), schema.field(name), column)
            writer.write_batch(batch.replace_schema_metadata(stamped.metadata), row_group_size=_ROWS_PER_GROUP)


def _absolute(manifest: Manifest, paths: pa.Array) -> pa.Array:
    full = pc.if_else(paths.is_valid(), resolved(manifest, paths.cast(pa.large_string())), None)
    # A path need not be UTF-8.
    return full.view(pa.large_string())


def main(arguments: list[str]) -> int:
    """The command. Returns its exit code."""
    if len(arguments) < 2:
        print(__doc__, file=sys.stderr)
        return EXIT_REQUEST
    try:
        rows = regroup(arguments[0], Path(arguments[1]), media=tuple(arguments[2:]))
    except (RequestError, DataError) as e:
        print(f"error: {e}", file=sys.stderr)
        return EXIT_REQUEST if isinstance(e, RequestError) else EXIT_FAILED
    print(f"{arguments[1]}: {rows:,} rows in row groups of {_ROWS_PER_GROUP:,}")
    return EXIT_DONE


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
