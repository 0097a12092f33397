"""Fills the table of figures that only a GPU can give, row by row. One JSON object a line in --out.

    python -m benchmarks.gpu --out results.jsonl [--only PATTERN ...] [--minutes 9] [--list]

Rows that --out has already are skipped, so that a table can be filled in pieces; a row that fails is written with its
error, and tried again the next time. Needs jax, flax, optax, numpy and orbax alone. On CPUs all rows run at toy size,
which shows that they run; a line then names the figures that only a GPU gives. The rows are in ``gpu_rows.py``.
"""

from __future__ import annotations

import argparse
import fnmatch
import gc
import json
import os
import sys
import time
import traceback
from pathlib import Path

# Rows with large states need nearly all of the device.
os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.93")

import jax

from benchmarks import gpu_rows, timing


def done(out: Path) -> dict[str, dict]:
    """Row → its last result that is not a failure."""
    if not out.exists():
        return {}
    found = [json.loads(line) for line in out.read_text().splitlines()]
    return {result["row"]: result for result in found if "failed" not in result}


def run_row(name: str) -> dict:
    """The figures of a row, or its error: the others go on."""
    began = time.perf_counter()
    try:
        figures = gpu_rows.ROWS[name]()
    except Exception as e:  # a row that does not fit must not cost the rest of the table
        traceback.print_exc(limit=-3)
        figures = {"failed": f"{type(e).__name__}: {str(e).strip()[:300]}"}
    gc.collect()
    jax.clear_caches()
    return {"row": name, **figures, "row_s": round(time.perf_counter() - began, 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", nargs="+", default=["*"], metavar="PATTERN", help="rows to fill, such as 'train/*'")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="no row is begun after this time")
    parser.add_argument("--list", action="store_true", help="print the names of the rows and end")
    arguments = parser.parse_args()
    names = [name for name in gpu_rows.ROWS if any(fnmatch.fnmatch(name, pattern) for pattern in arguments.only)]
    if arguments.list:
        print("\n".join(names))
        return
    began, before = time.perf_counter(), done(arguments.out)
    with arguments.out.open("a") as out:
        for name in names:
            if name in before or time.perf_counter() - began > 60 * arguments.minutes:
                continue
            line = json.dumps(timing.rounded(run_row(name) | {"device": jax.devices()[0].device_kind}))
            print(line, flush=True)
            out.write(line + "\n")
            out.flush()
    missing = [name for name in names if name not in done(arguments.out)]
    if missing:
        print(f"not filled: {', '.join(missing)}", file=sys.stderr)
    if timing.on_cpu():
        print(
            "toy sizes on a CPU: times, utilisation, measured memory and the fused attention are not those of a GPU",
            file=sys.stderr,
        )


if __name__ == "__main__":
    main()
