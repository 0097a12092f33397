"""Public layouts of data sets as manifests: each layout is a function from a source to rows.

A row is a dict of ``id``, media columns (full paths or URIs; ``TAR#OFFSET+LENGTH`` inside a tar), ``text``, ``labels``,
``start_s``, ``end_s``, each only if it has a value. Media are never opened, copied or extracted here.
"""

from __future__ import annotations

import dataclasses
import inspect
import textwrap
from collections.abc import Callable
from pathlib import Path

from pipeline.data.importers import annotation_files, folders, tables, tars
from pipeline.data.importers.listing import Skipped
from pipeline.data.importers.writing import write_manifests
from pipeline.errors import RequestError

LAYOUTS: dict[str, Callable] = {
    "class_folders": folders.class_folders,
    "sidecar_text": folders.sidecar_text,
    "table": tables.table,
    "webdataset": tars.webdataset,
    "img2dataset": tars.img2dataset,
    "coco_captions": annotation_files.coco_captions,
    "audioset": annotation_files.audioset,
    "kinetics": annotation_files.kinetics,
    "esc50": annotation_files.esc50,
}


@dataclasses.dataclass(frozen=True)
class Imported:
    """The result of an import.

    rows: of each manifest. skipped: reason → (number of rows or files left out, an example). kept: the same for defects
    of rows that were kept.
    """

    rows: dict[str, int]
    columns: list[str]
    skipped: dict[str, tuple[int, str]]
    kept: dict[str, tuple[int, str]]

    def lines(self) -> list[str]:
        """For people: the manifests, the defects of their rows, and last the rows left out."""
        out = [f"{path}: {rows:,} rows, columns {', '.join(self.columns)}" for path, rows in self.rows.items()]
        if self.kept:
            out.append(f"kept with defects: {_reasons(self.kept)}")
        left = sum(count for count, _ in self.skipped.values())
        why = f": {_reasons(self.skipped)}" if left else ""
        return [*out, f"{sum(self.rows.values()):,} rows, {left:,} left out{why}"]


def _reasons(counts: dict[str, tuple[int, str]]) -> str:
    return "; ".join(f"{reason} × {count:,}, e.g. {example}" for reason, (count, example) in counts.items())


def import_layout(
    layout: str, source: str, out: Path, *, held_out_share: float = 0.0, options: dict[str, str] | None = None
) -> Imported:
    """Writes the manifest ``out`` (and ``out`` with "-held_out" in its name, for a share of the ids).

    Raises RequestError for an unknown layout or option, a missing source, or one without a usable row.
    """
    if layout not in LAYOUTS:
        raise RequestError(f"layout {layout!r}: expected one of {', '.join(LAYOUTS)}")
    read, options = LAYOUTS[layout], options or {}
    known = list(inspect.signature(read).parameters)[2:]
    unknown = [name for name in options if name not in known]
    if unknown:
        raise RequestError(f"--option {unknown[0]}: {layout} has {', '.join(known) or 'no options'}")
    if not 0 <= held_out_share < 1:
        raise RequestError(f"--held-out-share: expected 0 or more and below 1, found {held_out_share}")
    _check_out(out, source)
    skipped = Skipped()
    rows, columns = write_manifests(read(source, skipped, **options), Path(out), skipped, held_out_share=held_out_share)
    if not sum(rows.values()):
        why = _reasons(skipped.reasons)
        raise RequestError(f"{layout} {source}: expected rows, found none" + (f": {why}" if why else ""))
    return Imported(rows, columns, skipped.reasons, skipped.kept)


def _check_out(out: Path, source: str) -> None:
    """Raises RequestError for a manifest in the place of a folder or of what it is made from."""
    if out.suffix != ".parquet":
        raise RequestError(f"--out {out}: expected a file that ends in .parquet, e.g. {out / 'train.parquet'}")
    if out.is_dir():
        raise RequestError(f"--out {out}: expected a file, found a folder")
    if out.exists() and Path(source).exists() and out.samefile(source):
        raise RequestError(f"--out {out}: the manifest would replace the table that it is made from; name another file")


def help_text() -> str:
    """A paragraph a layout: what it is, its options and what they mean."""
    paragraphs = []
    for name, read in LAYOUTS.items():
        first, *more = inspect.getdoc(read).splitlines()
        options = list(inspect.signature(read).parameters)[2:]
        lines = [f"  {name:14s} {first.rstrip('.')}" + (f" (options: {', '.join(options)})" if options else "")]
        text = " ".join(filter(None, more))
        paragraphs += lines + textwrap.wrap(text, 100, initial_indent=" " * 17, subsequent_indent=" " * 17)
    return "\n".join(paragraphs)
