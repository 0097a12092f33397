"""The jobs as a user runs them: real processes, real Ray, real kills. Each run starts Ray, which costs seconds.

Commands without Ray run in this process: one of their own would take seconds to load its libraries.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from pipeline.cli import main
from pipeline.data.shard_index import ShardEntries, read_index

ROOT = Path(__file__).resolve().parent.parent
# Recipes here name decoders of tests/decoders.py.
IMPORTS = {"PYTHONPATH": str(ROOT)}
# Settings of runs whose results nobody reads.
NO_EVALUATION = ("--set", "evaluate=[]")
EXACT = ("step", "task", "variant", "loss", "grad_norm", "temperatures")

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


def command(job: str, *arguments) -> list[str]:
    return [sys.executable, str(ROOT / "jobs" / job), *map(str, arguments)]


def run_job(job: str, *arguments, expect: int = 0) -> str:
    done = subprocess.run(
        command(job, *arguments),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=500,
        env=os.environ | IMPORTS,
    )
    assert done.returncode == expect, done.stdout
    return done.stdout


def said(capfd, *command: object, expect: int = 0) -> str:
    """All that a command without Ray prints."""
    capfd.readouterr()
    assert main([*map(str, command)]) == expect
    return "".join(capfd.readouterr())


def metrics(run_dir: Path) -> list[dict]:
    path = run_dir / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("}")]


def exact(run_dir: Path) -> list[list]:
    return [[r[k] for k in EXACT] for r in metrics(run_dir)]


@pytest.fixture(scope="module")
def recipe_file(make_toy_recipe, tmp_path_factory, compile_cache):
    """The toy recipe over a copy of the digits with one corrupt and one missing image, and two that kill decoders."""
    recipe, folder = make_toy_recipe(), tmp_path_factory.mktemp("recipe")
    digits = recipe["data_sets"]["digits"]
    copy = folder / "digits"
    shutil.copytree(Path(digits["manifest"]).parent, copy)
    rows = pq.read_table(copy / "train.parquet").to_pylist()
    (copy / rows[3]["image"]).write_bytes(b"\x89PNG\r\n\x1a\n not a picture")
    (copy / rows[5]["image"]).unlink()
    (copy / rows[7]["image"]).write_bytes(b"SEGV")
    (copy / rows[9]["image"]).write_bytes(b"LOCK")
    digits["image"]["decoder"] = "tests.decoders:deadly_image"
    digits["manifest"] = str(copy / "train.parquet")
    recipe["max_reject_fraction"] = 0.5
    recipe["train"]["num_steps"] = 40
    recipe["cluster"] = {"compile_cache": str(compile_cache), "decode_timeout_s": 2.0}
    path = folder / "toy.yaml"
    path.write_text(yaml.safe_dump(recipe))
    reasons = ("not_decodable", "missing_file", "crashed", "hung")
    return path, {rows[number]["id"]: reason for number, reason in zip((3, 5, 7, 9), reasons, strict=True)}


@pytest.fixture(scope="module")
def whole(recipe_file, tmp_path_factory):
    """A run that was left alone, which others are compared with."""
    run_dir = tmp_path_factory.mktemp("runs") / "whole"
    output = run_job("pretrain.py", "--config", recipe_file[0], "--run-dir", run_dir)
    assert "where the time went" in output
    assert "Traceback" not in output
    return run_dir


def rejected(run_dir: Path) -> dict[str, str]:
    return {r["id"]: r["reason"] for r in pq.read_table(run_dir / "quarantine.parquet").to_pylist()}


def test_what_a_run_leaves_behind(recipe_file, whole, capfd):
    path, bad = recipe_file
    for name in ("config.yaml", "metrics.jsonl", "samples.jsonl", "eval.json", "summary.json", "report.html"):
        assert (whole / name).stat().st_size, name
    assert rejected(whole) == bad
    results = json.loads((whole / "eval.json").read_text())
    assert {(r["dataset"], r["task"]) for r in results} == {
        ("digits", "classify_image"),
        ("digits", "zero_shot_image"),
        ("moving", "retrieval_video_audio"),
    }
    summary = json.loads((whole / "summary.json").read_text())
    assert summary["compile_count"] == len({(r["task"], r["variant"]) for r in metrics(whole)})
    life = summary["goodput"]
    assert sum(life["share_of_up"].values()) == pytest.approx(1, abs=0.005) and life["restarts"] == 0
    assert life["parts_s"]["other"] <= 0.005 * life["wall_s"] and life["wall_s"] == life["up_s"]
    assert life["parts_s"]["end"] >= summary["time"]["evaluation_s"]

    # Without Ray, and with the rejects of the journal: the same bits.
    again = said(capfd, "check", "--replay", whole, "--steps", "36:40")
    assert "equal bit for bit: steps 36 to 40, 5 of them logged, replayed from checkpoint 35" in again

    # A finished run says so and changes nothing.
    before = (whole / "metrics.jsonl").stat().st_mtime_ns
    assert "is finished" in said(capfd, "pretrain", "--config", path, "--run-dir", whole)
    assert (whole / "metrics.jsonl").stat().st_mtime_ns == before


def start(job: list[str], run_dir: Path, **environment: str) -> subprocess.Popen:
    """A run whose processes carry its mark."""
    return subprocess.Popen(
        job,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        env=os.environ | IMPORTS | {"IMP_TEST_MARK": str(run_dir)} | environment,
    )


def await_step(process: subprocess.Popen, run_dir: Path, step: int) -> None:
    deadline = time.monotonic() + 300
    while (not metrics(run_dir) or metrics(run_dir)[-1]["step"] < step) and time.monotonic() < deadline:
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.01)


def test_a_run_that_was_stopped_and_killed_goes_on_to_the_same_end(recipe_file, whole, tmp_path, capfd):
    """Ctrl-C, then kill -9 between two checkpoints, then left alone: the losses and samples of ``whole``."""
    path, run_dir = recipe_file[0], tmp_path / "run"
    job = command("pretrain.py", "--config", path, "--run-dir", run_dir)
    process = start(job, run_dir)
    await_step(process, run_dir, 2)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 75, output
    _assert_only_its_own_ray(output)
    stopped = metrics(run_dir)[-1]["step"]
    assert f"stopped after step {stopped}, state saved" in output and stopped < 40
    assert (run_dir / "checkpoints" / str(stopped)).is_dir()
    _await_end_of(run_dir, deadline=time.monotonic() + 300)

    process = start(job, run_dir)
    await_step(process, run_dir, stopped + 2)
    assert len(marked(run_dir)) > 4  # the driver and Ray's
    process.send_signal(signal.SIGKILL)
    process.communicate()
    killed_at = time.monotonic()
    run_job("pretrain.py", "--config", path, "--run-dir", run_dir)
    assert exact(run_dir) == exact(whole)
    assert (run_dir / "samples.jsonl").read_text() == (whole / "samples.jsonl").read_text()

    _await_end_of(run_dir, deadline=killed_at + 120)

    # The evaluation again, from the checkpoint alone.
    (run_dir / "eval.json").unlink()
    said(capfd, "evaluate", "--run", run_dir)
    assert json.loads((run_dir / "eval.json").read_text()) == json.loads((whole / "eval.json").read_text())


def _assert_only_its_own_ray(output: str) -> None:
    """A run that ends has neither started a second Ray nor joined another."""
    for said in ("Connecting to", "Started a local Ray", "Traceback"):
        assert said not in output, output


def _await_end_of(run_dir: Path, *, deadline: float) -> None:
    """No process of a run may outlive it for long."""
    while marked(run_dir) and time.monotonic() < deadline:
        time.sleep(0.5)
    assert not marked(run_dir)


def marked(run_dir: Path) -> dict[int, str]:
    """Process id → command line of those that inherited the run's mark: the driver, Ray's own, the decoders."""
    found = {}
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and f"IMP_TEST_MARK={run_dir}".encode() in (entry / "environ").read_bytes():
                line = (entry / "cmdline").read_bytes().replace(b"\0", b" ")
                found[int(entry.name)] = line.decode(errors="replace")
        except OSError:
            continue
    return found


def test_shards_give_the_same_losses_as_media(recipe_file, whole, tmp_path):
    path, bad = recipe_file
    job = ("preprocess.py", "--config", path, "--out", tmp_path / "shards", "--rows-per-shard", 4)
    # kill -9 between two shards; the second try keeps what is finished and loses nothing.
    process = subprocess.Popen(
        command(*job), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=os.environ | IMPORTS
    )
    digits = tmp_path / "shards" / "digits"
    deadline = time.monotonic() + 120
    while not list(digits.glob("shard-*.json")) and time.monotonic() < deadline:
        assert process.poll() is None
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    kept = {p: p.with_suffix(".arrow").stat().st_mtime_ns for p in digits.glob("shard-*.json")}
    assert kept and not (digits / "index.json").exists()
    assert "train from them with" in run_job(*job)
    assert {p: p.with_suffix(".arrow").stat().st_mtime_ns for p in kept} == kept
    index = read_index(digits)
    manifest = yaml.safe_load(path.read_text())["data_sets"]["digits"]["manifest"]
    assert ShardEntries(digits, index).starts[-1] == pq.read_metadata(manifest).num_rows
    shards = tmp_path / "from_shards"
    run_job(
        "pretrain.py",
        "--config",
        path,
        "--run-dir",
        shards,
        "--set",
        f"data_sets.digits.shards={tmp_path}/shards/digits",
        "--set",
        f"data_sets.moving.shards={tmp_path}/shards/moving",
        *NO_EVALUATION,
    )
    assert exact(shards) == exact(whole)
    assert (shards / "samples.jsonl").read_text() == (whole / "samples.jsonl").read_text()
    assert rejected(shards) == bad


def test_two_workers_stop_lose_one_and_end_as_one_process_does(recipe_file, whole, tmp_path):
    """SIGTERM: both save, exit code 75. The same command again, and kill -9 of a worker: the run goes on by itself."""
    two = tmp_path / "two"
    settings = ("--set", "cluster.num_workers=2", *NO_EVALUATION)
    job = command("pretrain.py", "--config", recipe_file[0], "--run-dir", two, *settings)
    process = start(job, two)
    await_step(process, two, 2)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 75, output
    _assert_only_its_own_ray(output)
    stopped = metrics(two)[-1]["step"]
    assert f"stopped after step {stopped}, state saved" in output and stopped < 40

    process = start(job, two)
    await_step(process, two, max(stopped, 20) + 1)
    workers = [pid for pid, line in marked(two).items() if "RayTrainWorker" in line]
    assert len(workers) == 2
    os.kill(workers[-1], signal.SIGKILL)
    output, _ = process.communicate(timeout=400)
    assert process.returncode == 0, output
    assert "workers started again: 2 of them" in output and "Traceback" not in output
    # Rank 0's own lines, once a group, and none that Ray forwards: those begin with the process they are of.
    assert output.count("shape budget: ") == 2 and not re.search(r"^\(.* pid=\d+", output, re.MULTILINE), output

    summary, alone = (json.loads((run_dir / "summary.json").read_text()) for run_dir in (two, whole))
    assert summary["world_size"] == 2
    # Of both ranks and all three starts; samples that were drawn again after the kill count once.
    assert summary["rejects"] == alone["rejects"] and summary["rejects"]["digits"]["rejected"] > 0
    a, b = metrics(whole), metrics(two)
    assert [(r["step"], r["task"], r["variant"]) for r in a] == [(r["step"], r["task"], r["variant"]) for r in b]
    # The same batch in two processes: the loss over all of it. Later steps have learned from rounding.
    for x, y in zip(a, b, strict=True):
        assert x["loss"] == pytest.approx(y["loss"], rel=1e-5 if x["step"] <= 5 else 1e-3)
    batches = [json.loads(line)["ids"] for line in (whole / "samples.jsonl").read_text().splitlines()]
    halves = [
        [json.loads(line)["ids"] for line in (two / name).read_text().splitlines()]
        for name in ("samples.jsonl", "samples-rank-1.jsonl")
    ]
    assert [first + second for first, second in zip(*halves, strict=True)] == batches
    assert rejected(two) == recipe_file[1]


@pytest.fixture
def toy_file(toy_recipe, tmp_path):
    path = tmp_path / "toy.yaml"
    path.write_text(yaml.safe_dump(toy_recipe))
    return path


def _assert_one_line(output: str) -> None:
    # A loaded machine may take long enough to say what it waits for.
    assert len([line for line in output.strip().splitlines() if not line.startswith("waiting for ")]) == 1, output


def test_a_wrong_request_is_one_line_and_exit_2(toy_file, tmp_path):
    settings = ("--set", "tasks.classes.batch_size=7")
    output = run_job("pretrain.py", "--config", toy_file, "--run-dir", tmp_path / "run", *settings, expect=2)
    assert "at most 5% may be missing" in output
    _assert_one_line(output)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.num_stepz=3", "did you mean 'train.num_steps'"),
        ("data_sets.digits.manifest=/nowhere/train.parquet", "found nothing there"),
        ("tasks.classes.batch_size=7", "at most 5% may be missing"),
    ],
)
def test_wrong_requests_leave_nothing(toy_file, tmp_path, capfd, override, message):
    settings = ("--config", toy_file, "--run-dir", tmp_path / "run", "--set", override)
    output = said(capfd, "pretrain", *settings, expect=2)
    assert message in output
    _assert_one_line(output)
    assert not (tmp_path / "run" / "config.yaml").exists()


def test_manifests_that_cannot_work_exit_2(toy_recipe, tmp_path, capfd):
    path = tmp_path / "toy.yaml"
    broken = tmp_path / "broken.parquet"
    toy_recipe["data_sets"]["digits"]["manifest"] = str(broken)
    path.write_text(yaml.safe_dump(toy_recipe))
    pretrain = ("pretrain", "--config", path, "--run-dir", tmp_path / "run")
    pq.write_table(pa.table({"id": ["a"], "image": ["a.png"]}), broken)
    assert "expected column 'labels'" in said(capfd, *pretrain, expect=2)
    pq.write_table(pa.table({"id": pa.array([], pa.string())}), broken)
    assert "expected rows, found none" in said(capfd, *pretrain, expect=2)


def test_another_recipe_in_the_same_run_directory_exits_2(toy_file, tmp_path, capfd):
    from pipeline import recipe as recipes

    run_dir = tmp_path / "run"
    run_dir.mkdir()
    stored = recipes.dump(recipes.load(toy_file).to_dict())
    (run_dir / "config.yaml").write_text(stored)
    output = said(capfd, "pretrain", "--config", toy_file, "--run-dir", run_dir, "--set", "seed=99", expect=2)
    assert "seed = 3" in output
    assert "99" in output
    assert (run_dir / "config.yaml").read_text() == stored
