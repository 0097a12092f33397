"""Annotation files that name media in another folder: COCO captions, AudioSet, Kinetics, ESC-50.

Missing media are left out and counted: these sets live on video sites and lose files every year.
"""

from __future__ import annotations

import csv
import io
import json
import posixpath
from collections.abc import Iterator

from pipeline.data.importers.listing import Folder, Skipped, by_stem, folder_of, read_file, text_of
from pipeline.errors import RequestError

_MISSING = "its media file is missing"


def coco_captions(source: str, skipped: Skipped, images: str = "") -> Iterator[dict]:
    """captions_*.json; images: their folder, by default the file's own. All captions of an image are one row."""
    folder = Folder(images or folder_of(source))
    paths = folder.paths(".jpg", ".jpeg", ".png")
    known, alone = set(paths), _alone(paths)
    try:
        data = json.loads(text_of(read_file(source)))
        captions: dict[int, list[str]] = {}
        for annotation in data["annotations"]:
            captions.setdefault(annotation["image_id"], []).append(" ".join(annotation["caption"].split()))
        names = [(image["id"], image["file_name"].removeprefix("./")) for image in data["images"]]
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise RequestError(f"{source}: expected COCO captions with images and annotations, found {e!r}") from e
    for number in captions.keys() - {number for number, _ in names}:
        skipped.add("captions of an image that is not listed", str(number))
    for number, name in names:
        path = name if name in known else alone.get(posixpath.basename(name), "")
        if path is None:
            skipped.add("its file name is that of several files", name)
        elif not path:
            skipped.add(_MISSING, name)
        elif not any(captions.get(number, ())):
            skipped.add("no caption", name)
        else:
            yield {"id": str(number), "image": folder.uri(path), "text": [c for c in captions[number] if c]}


def _alone(paths: list[str]) -> dict[str, str | None]:
    """File name → its path; None for the name of several files."""
    found: dict[str, str | None] = {}
    for path in paths:
        name = posixpath.basename(path)
        found[name] = None if name in found else path
    return found


def audioset(source: str, skipped: Skipped, media: str = "", names: str = "") -> Iterator[dict]:
    """*_segments.csv (YTID, start, end, "labels"); media: the folder of sound or video files.

    A file is named YTID, YTID_START or YTID_START_END, times in seconds or milliseconds, a Y before it or not; one
    named YTID alone is taken to be the whole video, and its row gets the segment's times. names:
    class_labels_indices.csv, for labels that people can read.
    """
    folder = Folder(media or folder_of(source))
    files = {m: by_stem(folder, m, skipped) for m in ("audio", "video")}
    readable = {r["mid"]: r["display_name"] for r in _records(names)} if names else {}
    for line in _lines(source):
        if len(line) < 4:
            skipped.add("fewer than four columns", ",".join(line))
            continue
        ytid, labels = line[0], ",".join(line[3:]).strip('" ')
        try:
            start, end = float(line[1]), float(line[2])
        except ValueError:
            skipped.add("times that are not numbers", ",".join(line))
            continue
        times = [(f"{a:.0f}", f"{b:.0f}") for a, b in ((start, end), (1000 * start, 1000 * end))]
        cut = [f"{ytid}_{a}_{b}" for a, b in times] + [f"{ytid}_{a}" for a, _ in times]
        row = _find(files, [p + name for name in cut for p in ("", "Y")], [ytid, "Y" + ytid], start, end)
        if row is None:
            skipped.add(_MISSING, ytid)
        else:
            yield {"id": f"{ytid}_{start:g}_{end:g}", "labels": [readable.get(x, x) for x in labels.split(",")], **row}


def kinetics(source: str, skipped: Skipped, videos: str = "", names: str = "", split: str = "") -> Iterator[dict]:
    """Kinetics' own CSV (label, youtube_id, time_start, time_end, split), or lines "PATH CLASS_NUMBER".

    videos: their folder. A clip is named ID_START_END with six digits each; a file named ID alone is the whole video.
    names: for the second form, a file with one class a line. split: only these rows of the first form.
    """
    folder = Folder(videos or folder_of(source))
    first = text_of(read_file(source)).splitlines()[:1]
    if first and "youtube_id" in first[0]:
        yield from _kinetics_official(source, skipped, by_stem(folder, "video", skipped), split)
    else:
        yield from _kinetics_paths(source, skipped, folder, names)


def _kinetics_official(source: str, skipped: Skipped, files: dict[str, str], split: str) -> Iterator[dict]:
    for record in _records(source):
        if split and record.get("split") != split:
            continue
        try:
            name = record["youtube_id"]
            start, end = float(record["time_start"]), float(record["time_end"])
        except (TypeError, ValueError, KeyError):
            skipped.add("times that are not numbers", str(record)[:80])
            continue
        cut = f"{name}_{start:06.0f}_{end:06.0f}"
        row = _find({"video": files}, [cut], [name], start, end)
        if row is None:
            skipped.add(_MISSING, name)
        else:
            yield {"id": cut, "labels": [record["label"]] if record.get("label") else [], **row}


def _kinetics_paths(source: str, skipped: Skipped, folder: Folder, names: str) -> Iterator[dict]:
    classes = [line for line in text_of(read_file(names)).splitlines() if line.strip()] if names else []
    known = set(folder.paths())
    for line in text_of(read_file(source)).splitlines():
        if not line.strip():
            continue
        path, separator, label = line.strip().replace(",", " ").rpartition(" ")
        if not separator or not label.isdigit():
            raise RequestError(
                f'{source}: expected Kinetics\' columns or lines "PATH CLASS_NUMBER", found {line[:80]!r}'
            )
        if classes and int(label) >= len(classes):
            raise RequestError(f"{source}: class {label} is not among the {len(classes)} of {names}")
        path = path.strip()
        relative = path.removeprefix(f"{folder.root}/")
        if relative in known:
            uri = folder.uri(relative)
            yield {"id": relative, "video": uri, "labels": [classes[int(label)] if classes else label]}
        else:
            skipped.add(_MISSING, path)


def esc50(source: str, skipped: Skipped, audio: str = "", folds: str = "") -> Iterator[dict]:
    """meta/esc50.csv; audio: its folder, by default ../audio. folds: only these, e.g. 1,2,3,4."""
    folder = Folder(audio or posixpath.join(posixpath.dirname(folder_of(source)), "audio"))
    files, wanted = by_stem(folder, "audio", skipped), set(folds.split(",")) if folds else None
    for record in _records(source):
        try:
            name, fold = record["filename"], record["fold"]
            label = record["category"]
        except KeyError as e:
            raise RequestError(f"{source}: expected ESC-50's columns filename, fold, category; found no {e}") from e
        stem = posixpath.splitext(name)[0]
        if wanted is not None and fold not in wanted:
            continue
        if stem in files:
            yield {"id": stem, "audio": files[stem], "labels": [label.replace("_", " ")]}
        else:
            skipped.add(_MISSING, name)


def _find(files: dict[str, dict[str, str]], cut: list[str], whole: list[str], start: float, end: float) -> dict | None:
    """The media columns of a segment: of files cut to it, or of the whole video with the segment's times."""
    for names, times in ((cut, {}), (whole, {"start_s": start, "end_s": end})):
        found = {m: stems[name] for m, stems in files.items() for name in reversed(names) if name in stems}
        if found:
            return found | times
    return None


def _records(source: str) -> Iterator[dict]:
    text = text_of(read_file(source))
    yield from _cells(source, csv.DictReader(io.StringIO(text)))


def _lines(source: str) -> Iterator[list[str]]:
    """Rows of a CSV whose comments start with # and whose cells are set apart by comma and space."""
    text = text_of(read_file(source))
    lines = (line for line in text.splitlines() if line.strip() and not line.startswith("#"))
    yield from _cells(source, csv.reader(lines, skipinitialspace=True))


def _cells(source: str, rows: Iterator) -> Iterator:
    try:
        yield from rows
    except csv.Error as e:
        raise RequestError(f"{source}: cannot be read as CSV: {e}") from e
