"""Exported folders in sentence-transformers, against the embeddings that jax computed when they were written.

    pip install -e '.[hub]'                       # PyTorch, 3 GB
    python -m benchmarks.hub
    python -m benchmarks.hub --python /venvs/hub/bin/python --export exported

Each folder is loaded in an empty directory by a Python that sees nothing of the project. Its self-test gives an item of
every modality and its embedding in every space; a vector may differ by 1e-5.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from pipeline.data.tokenizer import train_tokenizer
from tests.exported_models import MODELS, exported

_SENTENCES = ("a red dog runs to the left", "one two three 1 2 3", "the digit seven eight nine four five six zero")

# Run by the other Python: a line for each modality and space, the largest difference last.
_CHILD = """
import importlib.metadata, json, sys, tempfile, time
from pathlib import Path
import numpy as np
from safetensors.numpy import load_file

started = time.perf_counter()
from sentence_transformers import SentenceTransformer
names = ("sentence-transformers", "transformers", "torch", "numpy")
print(", ".join(f"{name} {importlib.metadata.version(name)}" for name in names))
assert not any(name in sys.modules for name in ("jax", "pipeline", "model"))
worst = 0.0
for folder in sys.argv[1:]:
    config, stored = json.loads((Path(folder) / "config.json").read_text()), load_file(f"{folder}/selftest.safetensors")
    found = {}
    for key in (key for key in stored if key.startswith("embedding/") and not key.endswith("/features")):
        _, name, space = key.split("/")
        fits = (i for i in config["inputs"] if i["modality"] == name and "_".join(i["pair"]) == space)
        options = {"space": space, "data_set": next(fits)["data_set"]}
        model = SentenceTransformer(folder, trust_remote_code=True, device="cpu", model_kwargs=options)
        item = stored[f"input/{name}"]
        item = {
            "text": lambda: item.tobytes().decode(),
            "image": lambda: item,
            "video": lambda: {"array": item, "video_metadata": {"fps": 8.0}},
            "audio": lambda: {"array": item, "sampling_rate": 16_000},
        }[name]()
        found[key] = float(np.abs(model.encode([item])[0] - stored[key]).max())
    model = SentenceTransformer(folder, trust_remote_code=True, device="cpu")
    texts = ["a red dog", "one two three four"]
    with tempfile.TemporaryDirectory() as saved:
        model.save_pretrained(saved)
        again = SentenceTransformer(saved, trust_remote_code=True, device="cpu").encode(texts)
    assert (again == model.encode(texts)).all(), "another vector after save_pretrained"
    worst = max(worst, *found.values())
    each = ", ".join(f"{key.removeprefix('embedding/')} {value:.1e}" for key, value in found.items())
    print(f"{Path(folder).name}: {each}", flush=True)
print(f"largest difference {worst:.1e}")
sys.exit(not worst <= 1e-5)
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", default=sys.executable, help="one that has sentence-transformers and pillow")
    parser.add_argument("--export", type=Path, nargs="*", default=[], help="folders of imp export, beside small models")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        tokenizer, folders = train_tokenizer(_SENTENCES, vocab_size=60), [p.absolute() for p in arguments.export]
        for kind, fields in MODELS.items():
            folders.append(Path(temporary) / kind.replace(" ", "_"))
            exported(folders[-1], tokenizer, fields)
        (empty := Path(temporary) / "empty").mkdir()
        environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"HF_HUB_OFFLINE": "1"}
        environment["HF_MODULES_CACHE"] = str(Path(temporary) / "modules")
        command = [arguments.python, "-I", "-c", _CHILD, *map(str, folders)]
        return subprocess.run(command, cwd=empty, env=environment).returncode


if __name__ == "__main__":
    sys.exit(main())
