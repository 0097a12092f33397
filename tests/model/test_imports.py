"""model/ runs where only jax, flax, optax and numpy are installed."""

import subprocess
import sys
from pathlib import Path

SCRIPT = """
import sys

# What flax itself brings may be imported; these may not.
for name in ("jaxtyping", "beartype", "ray", "pyarrow", "pydantic", "safetensors", "librosa", "pipeline"):
    sys.modules[name] = None

import jax
import numpy as np

from model.config import ModelConfig, MoEConfig, OptimizerConfig
from model.imp import Imp
from model.structure import InputShape, Structure
from model.step import compile_step, init_state
import model.sizes

config = ModelConfig(width=8, num_heads=1, head_dim=8, depth=1, mlp_dim=8, moe=MoEConfig(2, 1), audio_patch=(2, 2))
structure = Structure("softmax", 2, (InputShape("audio", 4, 4, 2),), classifier="c", num_classes=2, classes=(0, 1))
imp = Imp.for_structures(config, [structure])
state = init_state(imp.init(0))
step = compile_step(imp, structure, OptimizerConfig(1e-3, warmup_steps=1, num_steps=2))
batch = jax.tree.map(lambda s: np.ones(s.shape, s.dtype), structure.batch_shapes())
print(np.isfinite(step(state, batch, np.float32(1e-3))["loss"]))
"""


def test_a_step_without_jaxtyping_and_the_pipeline():
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], cwd=root, capture_output=True, text=True, timeout=200, check=False
    )
    assert (done.returncode, done.stdout) == (0, "True\n"), done.stderr
