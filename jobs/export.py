"""Write the model of a run's newest checkpoint as safetensors with a JSON config, to use it without the run."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from pipeline.cli import main

if __name__ == "__main__":
    sys.exit(main(["export", *sys.argv[1:]]))
