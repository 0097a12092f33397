"""Find the embedded items of each modality that are nearest to a text or a file."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from pipeline.cli import main

if __name__ == "__main__":
    sys.exit(main(["search", *sys.argv[1:]]))
