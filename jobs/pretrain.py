"""Pretrain a model by a recipe. Without arguments: configs/demo.yaml into runs/demo. Rerunning resumes."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from pipeline.cli import main

if __name__ == "__main__":
    sys.exit(main(["pretrain", *sys.argv[1:]]))
