"""Runs in a bucket, killed and read by every command, on a real S3 server of this machine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline import cli
from pipeline.errors import RequestError
from pipeline.run_dir import lock_run_dir
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


@pytest.fixture(scope="module")
def recipe(make_toy_recipe, tmp_path_factory, compile_cache) -> Path:
    """The file of a recipe of twelve steps."""
    tasks = ("classes", "video_audio")
    folder = tmp_path_factory.mktemp("recipe")
    return recipe_file(make_toy_recipe(), folder, compile_cache, tasks=tasks, num_steps=12, checkpoint_every=4)


@pytest.fixture(scope="module")
def whole(recipe) -> Path:
    """The recipe's run on a disk, left alone."""
    folder = recipe.parent / "whole"
    assert start(BARE_RUN, recipe, folder).wait() == 0
    return folder


def start(program: Path, *arguments: object, **options: Any) -> subprocess.Popen:
    """Starts a program that compiles as a user's does."""
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"} | {"PYTHONPATH": str(ROOT)}
    return subprocess.Popen([sys.executable, str(program), *map(str, arguments)], env=environment, **options)


def wait_until(process: subprocess.Popen, ready: Callable[[], bool]) -> None:
    while not ready():
        assert process.poll() is None
        time.sleep(0.01)


def kill_when(process: subprocess.Popen, ready: Callable[[], bool]) -> None:
    wait_until(process, ready)
    process.kill()
    process.wait()


def assert_same_run(run_dir: Path, whole: Path) -> None:
    assert exact(run_dir) == exact(whole) and len(exact(run_dir)) == 12
    assert (run_dir / "samples.jsonl").read_bytes() == (whole / "samples.jsonl").read_bytes()
    ours, theirs = Checkpoints(run_dir), Checkpoints(whole)
    assert ours.steps == theirs.steps and ours.data()["position"] == theirs.data()["position"]


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["s3"])
def test_a_run_that_is_killed_again_and_again_ends_with_the_bits_of_one_on_a_disk(server, run_dir, recipe, whole):
    folder = server.bucket / "runs/pets/checkpoints"
    # In the middle of a save, of which some arrays are there, and once it is whole.
    for moment in ("8/state/d/*", "8/run.json"):
        kill_when(start(BARE_RUN, recipe, run_dir), lambda moment=moment: any(folder.glob(moment)))
    assert start(BARE_RUN, recipe, run_dir).wait() == 0
    assert_same_run(run_dir, whole)


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["gs"])
def test_a_killed_run_on_google_is_finished_and_read_by_the_commands(server, run_dir, recipe, whole, tmp_path):
    """The store is also away for a moment, and refuses to change an object twice a second."""
    server.control(limited=1)
    folder = server.bucket / "runs/pets/checkpoints"
    kill_when(start(BARE_RUN, recipe, run_dir), lambda: any(folder.glob("8/state/d/*")))
    process = start(ROOT / "jobs" / "pretrain.py", "--config", recipe, "--run-dir", run_dir)
    wait_until(process, (server.bucket / "runs/pets/.lock").exists)
    with pytest.raises(RequestError, match="another process is training there"):
        lock_run_dir(run_dir)
    wait_until(process, lambda: any(folder.glob("12/*")))
    server.stop()
    time.sleep(2)
    server.start()
    assert process.wait(200) == 0
    assert_same_run(run_dir, whole)
    assert (run_dir / "report.html").is_file() and not (run_dir / ".lock").exists()
    assert cli.main(["export", "--run", str(run_dir), "--out", str(tmp_path / "exported")]) == 0
    replay = ("--replay", run_dir, "--steps", "9:12")
    said, _ = start(ROOT / "jobs" / "check.py", *replay, stdout=subprocess.PIPE, text=True).communicate(timeout=250)
    assert "equal bit for bit: steps 9 to 12" in said


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["s3"])
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


@pytest.mark.parametrize("scheme", ["s3"])
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
