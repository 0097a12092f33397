"""A stop while a worker compiles for minutes: what was trained is saved, and nobody waits for the compiler."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[3]
# In every process of Ray's: the second graph takes ten minutes, in a thread that nothing interrupts.
SLOW = """
import importlib.abc, importlib.util, sys, time

class Hook(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name != "pipeline.train.compiler":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        execute = spec.loader.exec_module

        def exec_module(module):
            execute(module)
            build = module.StepCompiler._build

            def slow(compiler, structure):
                if compiler.compile_s:
                    time.sleep(600)
                build(compiler, structure)

            module.StepCompiler._build = slow

        spec.loader.exec_module = exec_module
        return spec

sys.meta_path.insert(0, Hook())
"""

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


def test_a_stop_during_a_long_compile_saves_and_ends(make_toy_recipe, tmp_path, compile_cache):
    recipe, run_dir, log = make_toy_recipe(), tmp_path / "run", tmp_path / "log"
    recipe["tasks"] = {"classes": recipe["tasks"]["classes"]}
    recipe["evaluate"] = []
    recipe["cluster"] = {"num_workers": 1, "compile_cache": str(compile_cache)}
    del recipe["text"]
    (tmp_path / "toy.yaml").write_text(yaml.safe_dump(recipe))
    (tmp_path / "hooks").mkdir()
    (tmp_path / "hooks/sitecustomize.py").write_text(SLOW)
    command = [sys.executable, ROOT / "jobs/pretrain.py", "--config", tmp_path / "toy.yaml", "--run-dir", run_dir]
    hooks = {"PYTHONPATH": f"{tmp_path / 'hooks'}:{ROOT}", "JAX_PLATFORMS": "cpu"}
    with open(log, "w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file, env=os.environ | hooks)
    metrics, deadline = run_dir / "metrics.jsonl", time.monotonic() + 200
    while not (metrics.exists() and metrics.read_text().endswith("\n")):
        assert process.poll() is None and time.monotonic() < deadline, log.read_text()
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=200) == 75, log.read_text()
    done = [json.loads(line)["step"] for line in metrics.read_text().splitlines()]
    assert done == list(range(1, len(done) + 1)) and len(done) < 14
    assert f"stopped after step {len(done)}, state saved; go on with: " in log.read_text()
    assert (run_dir / f"checkpoints/{len(done)}/run.json").exists()
