"""Runs in a bucket, killed and read by every command, on a real S3 server of this machine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from pipeline import cli
from pipeline.train.checkpoint import Checkpoints

ROOT = Path(__file__).resolve().parents[3]
BARE_RUN = ROOT / "tests" / "pipeline" / "train" / "bare_run.py"


def exact(run_dir: Path) -> list[list]:
    keys = ("step", "task", "variant", "loss", "grad_norm", "temperatures")
    lines = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
    return [[line[key] for key in keys] for line in lines]


def recipe_file(recipe: dict, folder: Path, cache: Path, *, tasks: tuple[str, ...], **train: int) -> Path:
    """The toy recipe with some of its tasks, a graph each; what a store does to a run needs no more."""
    recipe["tasks"] = {name: recipe["tasks"][name] for name in tasks}
    recipe["data_sets"] = {
        name: recipe["data_sets"][name] for name in {t["data_set"] for t in recipe["tasks"].values()}
    }
    if "classes" in tasks:
        del recipe["tasks"]["classes"]["variants"][1:]
    recipe["train"] |= train
    recipe["cluster"] = {"compile_cache": str(cache)}
    path = folder / "toy.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


@pytest.mark.slow
def test_a_run_that_is_killed_again_and_again_ends_with_the_bits_of_one_on_a_disk(
    server, run_dir, toy_recipe, tmp_path, compile_cache
):
    tasks = ("classes", "video_audio")
    path = recipe_file(toy_recipe, tmp_path, compile_cache, tasks=tasks, num_steps=12, checkpoint_every=4)
    # Compiled as a user's runs are.
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"} | {"PYTHONPATH": str(ROOT)}

    def start(where) -> subprocess.Popen:
        return subprocess.Popen([sys.executable, str(BARE_RUN), str(path), str(where)], env=environment)

    assert start(tmp_path / "whole").wait() == 0
    folder = server.bucket / "runs/pets/checkpoints"
    # In the middle of a save, of which some arrays are there, and once it is whole.
    for moment in ("8/state/d/*", "8/run.json"):
        process = start(run_dir)
        while not any(folder.glob(moment)):
            assert process.poll() is None
            time.sleep(0.01)
        process.kill()
        process.wait()
    assert start(run_dir).wait() == 0
    assert exact(run_dir) == exact(tmp_path / "whole") and len(exact(run_dir)) == 12
    assert (run_dir / "samples.jsonl").read_bytes() == (tmp_path / "whole" / "samples.jsonl").read_bytes()
    ours, theirs = Checkpoints(run_dir), Checkpoints(tmp_path / "whole")
    assert ours.steps == theirs.steps and ours.data()["position"] == theirs.data()["position"]


@pytest.mark.slow
def test_the_commands_make_and_read_a_run_in_a_bucket(
    server, run_dir, toy_recipe, tmp_path, compile_cache, monkeypatch, capfd
):
    """Only the run, which starts Ray, is a process of its own."""
    monkeypatch.chdir(tmp_path)
    path = recipe_file(toy_recipe, tmp_path, compile_cache, tasks=("image_text",), num_steps=4, checkpoint_every=2)
    pretrain = ("pretrain", "--config", path, "--run-dir", run_dir)

    def said(*command: object) -> str:
        assert cli.main([*map(str, command)]) == 0
        return capfd.readouterr().out

    before = set(os.listdir(tmp_path))
    run = [sys.executable, str(ROOT / "jobs/pretrain.py"), *map(str, pretrain[1:])]
    subprocess.run(run, env=os.environ | {"PYTHONPATH": str(ROOT)}, check=True, timeout=250)
    found = capfd.readouterr()
    assert f"report: {run_dir}/report.html" in found.out and "Traceback" not in found.out + found.err
    left = {name.partition("/")[0] for name in server.files()}
    assert left >= {"config.yaml", "metrics.jsonl", "samples.jsonl", "attempts", "checkpoints", "summary.json"}
    assert left >= {"eval.json", "report.html", "quarantine.parquet", "tokenizer.model"} and ".lock" not in left
    assert "is finished: 4 of 4 steps" in said(*pretrain)
    said("evaluate", "--run", run_dir)
    said("export", "--run", run_dir, "--out", tmp_path / "exported")
    assert "equal bit for bit: steps 3 to 4" in said("check", "--replay", run_dir, "--steps", "3:4")
    # Nothing was written beside it, as into a folder "s3:".
    assert set(os.listdir(tmp_path)) - before <= {"cache", "exported"}


@pytest.mark.parametrize(
    ("command", "uri", "secret", "expected"),
    [
        ("pretrain --run-dir", "ftp://host/run", None, "expected a folder, s3://BUCKET/PATH or gs://BUCKET/PATH"),
        ("pretrain --run-dir", "s3://nobucket/run", None, "no such bucket"),
        ("pretrain --run-dir", "s3://bucket/run", "wrong-secret", "access denied"),
        ("evaluate --run", "s3://bucket/run", "wrong-secret", "access denied"),
        ("evaluate --run", "s3://bucket/run", None, "expected a run directory with checkpoints, found none"),
    ],
)
def test_a_wrong_request_is_one_line(server, monkeypatch, capsys, command, uri, secret, expected):
    """The recipe's data are not there: they are not looked at."""
    if secret:
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", secret)
    assert cli.main([*command.split(), uri]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: {command.split()[1]} {uri}: ") and expected in said and said.count("\n") == 1
    assert "wrong-secret" not in said
