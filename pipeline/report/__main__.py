"""python -m pipeline.report RUN: writes the report of a run, for the process that trains it (``live``)."""

import sys

from pipeline.report.report import write_report
from pipeline.store.path import run_path

if __name__ == "__main__":
    write_report(run_path(sys.argv[1]))
