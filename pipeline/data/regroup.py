"""A manifest written again with small row groups, so that its rows can be read in place.

    python -m pipeline.data.regroup SOURCE FOLDER

Files of an earlier try that was stopped are kept. Paths of images, videos and sounds become absolute.
"""

from __future__ import annotations

import sys
from pathlib import Path, PurePosixPath

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.data.ids import resolved
from pipeline.data.manifest import Manifest
from pipeline.data.modalities import MEDIA
from pipeline.data.parquet_files import ParquetFiles
from pipeline.errors import EXIT_DONE, EXIT_FAILED, EXIT_REQUEST, DataError, RequestError
from pipeline.files import make_folder, whole_file
from pipeline.waiting import waiting_for

_ROWS_PER_GROUP = 1024


def regroup(source: str, folder: Path) -> int:
    """Writes each file of a manifest into a folder. Returns the number of rows.

    Raises RequestError if the folder cannot be written or is the manifest's own.
    """
    make_folder(folder, "FOLDER")
    manifest, files = Manifest(source), ParquetFiles(source)
    if Path(files.folder).exists() and folder.samefile(files.folder):
        raise RequestError(f"FOLDER {folder}: expected another folder than that of the manifest; name one")
    for number, path in enumerate(files.paths):
        target = folder / PurePosixPath(path).name
        with waiting_for(f"file {number + 1:,} of {len(files.paths):,}"):
            if not target.exists():
                _write(manifest, files, path, target)
    return ParquetFiles(str(folder)).num_rows


def _write(manifest: Manifest, files: ParquetFiles, path: str, target: Path) -> None:
    footer = files.footer(path)
    schema = footer.schema.to_arrow_schema()
    with whole_file(target) as whole, pq.ParquetWriter(whole, schema, write_page_checksum=True) as writer:
        for number in range(footer.num_row_groups):
            table = files.group(path, number, schema.names)
            for name in set(MEDIA) & set(schema.names):
                column = pa.chunked_array(
                    [_absolute(manifest, chunk) for chunk in table[name].chunks], pa.large_binary()
                )
                column = column.cast(schema.field(name).type)
                table = table.set_column(schema.get_field_index(name), schema.field(name), column)
            writer.write_table(table, row_group_size=_ROWS_PER_GROUP)


def _absolute(manifest: Manifest, paths: pa.Array) -> pa.Array:
    return pc.if_else(paths.is_valid(), resolved(manifest, paths.cast(pa.large_string())), None)


def main(arguments: list[str]) -> int:
    """The command. Returns its exit code."""
    if len(arguments) != 2:
        print(__doc__, file=sys.stderr)
        return EXIT_REQUEST
    try:
        rows = regroup(arguments[0], Path(arguments[1]))
    except (RequestError, DataError) as e:
        print(f"error: {e}", file=sys.stderr)
        return EXIT_REQUEST if isinstance(e, RequestError) else EXIT_FAILED
    print(f"{arguments[1]}: {rows:,} rows in row groups of {_ROWS_PER_GROUP:,}")
    return EXIT_DONE


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
