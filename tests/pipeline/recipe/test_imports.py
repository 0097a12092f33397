"""A recipe is read, and a wrong one refused, without the seconds that jax and Ray take to load."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
HEAVY = ("jax", "flax", "optax", "orbax", "ray")

LOAD = """
import pathlib, sys
from pipeline import recipe
recipe.load(pathlib.Path("configs/demo.yaml"))
"""
TYPO = """
import sys
from pipeline.cli import main
assert main(["pretrain", "--set", "train.num_step=3"]) == 2
"""


@pytest.mark.parametrize(("code", "says"), [(LOAD, ""), (TYPO, "did you mean 'train.num_steps'?\n")])
def test_a_recipe_is_read_or_refused_without_jax_and_ray(code, says):
    code += f"print([name for name in {HEAVY} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "[]\n"), done.stderr
    assert done.stderr.endswith(says)
