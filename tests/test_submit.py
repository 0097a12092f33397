"""``ray job submit`` as documented: a clone, a head that asks for a token, a stop, the same command again."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from pipeline.data.shard_index import read_index
from tests.ray_head import ray_head

ROOT = Path(__file__).resolve().parent.parent
CLONE = ("jobs", "model", "pipeline", "configs", "deploy", ".rayignore", ".gitignore")
STEPS = 40
# A decoder of the user's own, in the upload: slow from the 80th picture on, until it is released.
HELD = """
import pathlib, time
from pipeline.data.media.image import BUILT_IN
FOLDER = pathlib.Path({folder!r})

def image(source, spec, **times):
    with open(FOLDER / "decoded", "ab") as file:
        file.write(b".")
        late = file.tell() > 80
    if late and not (FOLDER / "released").exists():
        time.sleep(0.5)
    return BUILT_IN["pillow"](source, spec, **times)
"""

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture
def clone(make_toy_recipe, tmp_path):
    """A clone with a recipe and pictures of the user's own, all of them named by relative paths."""
    folder = tmp_path / "clone"
    for name in CLONE:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        Path(folder).mkdir(exist_ok=True)
        copy(ROOT / name, folder / name)
    recipe = make_toy_recipe()
    shutil.copytree(Path(recipe["data_sets"]["digits"]["manifest"]).parent, folder / "mine/digits")
    (folder / "mine/held.py").write_text(HELD.format(folder=str(tmp_path)))
    digits = recipe["data_sets"]["digits"] | {
        "manifest": "mine/digits/train.parquet",
        "held_out": "mine/digits/held_out.parquet",
    }
    digits["image"]["decoder"] = "mine.held:image"
    task = recipe["tasks"]["classes"] | {"variants": [{"size": 16}]}
    train = {"num_steps": STEPS, "checkpoint_every": 100, "log_samples": True}
    recipe |= {"data_sets": {"digits": digits}, "tasks": {"classes": task}, "train": train}
    # A step waits for no more than its own pictures.
    recipe["cluster"] = {"block_steps": 1}
    del recipe["text"], recipe["logging"]["progress"]
    (folder / "mine/toy.yaml").write_text(yaml.safe_dump(recipe))
    return folder


def lines(path: Path) -> list[dict]:
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text.splitlines() if line.endswith("}")]


def exact(run_dir: Path) -> list[list]:
    return [[r[k] for k in ("step", "task", "loss", "grad_norm")] for r in lines(run_dir / "metrics.jsonl")]


def test_a_submitted_run_is_stopped_and_submitted_again_after_an_edit(clone, tmp_path):
    run_dir = tmp_path / "runs/mine"
    with ray_head("--num-cpus=3") as head:
        address = ("--address", head.dashboard)
        submit = ("job", "submit", *address, "--runtime-env", "deploy/job.yaml", "--working-dir", ".")
        pretrain = ("--", "python", "jobs/pretrain.py", "--config", "mine/toy.yaml")

        refused = head.ray("job", "list", *address, RAY_AUTH_MODE="disabled", RAY_AUTH_TOKEN="")
        assert refused.returncode and "token authentication is enabled" in refused.stdout

        # The default run directory, runs/toy, would be lost.
        refused = head.ray(*submit, *pretrain, cwd=clone)
        assert refused.returncode
        assert "error: --run-dir runs/toy, a relative path: expected a folder that outlives" in refused.stdout

        first = head.ray(*submit, "--submission-id=first", "--no-wait", *pretrain, "--run-dir", run_dir, cwd=clone)
        assert first.returncode == 0, first.stdout
        _await(lambda: len(lines(run_dir / "metrics.jsonl")) > 2, head, "first")
        stopped = head.ray("job", "stop", *address, "first")
        log = head.ray("job", "logs", *address, "first").stdout
        done = len(lines(run_dir / "metrics.jsonl"))
        assert f"stopped after step {done}, state saved" in log and 2 < done < STEPS, stopped.stdout + log
        assert "was stopped" in head.ray("job", "status", *address, "first").stdout
        # No word on the grace, which is long enough.
        assert "kills this run" not in log

        (tmp_path / "released").touch()
        # Another byte, another upload, another folder.
        (clone / "mine/notes.txt").write_text("an edit")
        again = head.ray(*submit, *pretrain, "--run-dir", run_dir, cwd=clone)
        assert again.returncode == 0, again.stdout
        assert f"resuming {run_dir} after step {done} of {STEPS}" in again.stdout
        assert f"step {STEPS}/{STEPS} | classes" in again.stdout and "report: " in again.stdout

        preprocess = ("--", "python", "jobs/preprocess.py", "--config", "mine/toy.yaml", "--out", tmp_path / "shards")
        offline = head.ray(*submit, *preprocess, cwd=clone)
        assert offline.returncode == 0 and "digits: 38/38 rows" in offline.stdout, offline.stdout
        # Readable in a file.
        for text in (log, again.stdout, offline.stdout):
            of_the_job = [line for line in text.splitlines() if "SUCC" not in line and "logger" not in line]
            assert not any(c in "\n".join(of_the_job) for c in "\r\0"), text

        whole = tmp_path / "whole"
        bare = [sys.executable, ROOT / "tests/pipeline/train/bare_run.py", "mine/toy.yaml", whole]
        environment = head.environment | {"PYTHONPATH": str(clone)}
        subprocess.run(bare, check=True, timeout=300, cwd=clone, env=environment, capture_output=True)
    assert exact(run_dir) == exact(whole)
    assert (run_dir / "samples.jsonl").read_text() == (whole / "samples.jsonl").read_text()
    assert read_index(tmp_path / "shards/digits")["fingerprint"]["num_rows"] == 38


def _await(done, head, job: str) -> None:
    deadline = time.monotonic() + 200
    while not done():
        if time.monotonic() > deadline:
            raise AssertionError(head.ray("job", "logs", "--address", head.dashboard, job).stdout)
        time.sleep(0.05)
