"""python -m pipeline.report RUN: writes the report of a run, for the process that trains it (``live``)."""

import sys
from pathlib import Path

from pipeline.report.report import write_report

if __name__ == "__main__":
    write_report(Path(sys.argv[1]))
