"""Look at a recipe's data before a run: rows, bad files, captions, labels, the CPUs to decode."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from pipeline.cli import main

if __name__ == "__main__":
    sys.exit(main(["check", *sys.argv[1:]]))
