"""Say what a run will need and cost before it is started: memory, time, price."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from pipeline.cli import main

if __name__ == "__main__":
    sys.exit(main(["plan", *sys.argv[1:]]))
