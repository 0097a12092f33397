"""The loop without Ray: a run that is killed and run again equals one that was left alone, bit for bit."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import yaml
from jax.sharding import AbstractMesh

from pipeline import recipe as recipes
from pipeline.cli import main
from pipeline.errors import RequestError
from pipeline.plan import plan
from pipeline.train.goodput import goodput
from pipeline.train.run import train

BARE_RUN = Path(__file__).with_name("bare_run.py")
ROOT = Path(__file__).resolve().parents[3]


def read_jsonl(path: Path) -> list[dict]:
    lines = path.read_text().splitlines() if path.exists() else []
    out = []
    for line in lines:
        try:
            out.append(json.loads(line))
        except ValueError:
            continue
    return out


def start(recipe_path: Path, run_dir: Path, cache: Path, *options: object) -> subprocess.Popen:
    env = {**os.environ, "PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": str(cache)}
    return subprocess.Popen(
        [sys.executable, str(BARE_RUN), str(recipe_path), str(run_dir), *map(str, options)],
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def kill_at(process: subprocess.Popen, run_dir: Path, step: int) -> None:
    """kill -9 as soon as the metrics show the step."""
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline and process.poll() is None:
        records = read_jsonl(run_dir / "metrics.jsonl")
        if records and records[-1]["step"] >= step:
            break
        time.sleep(0.005)
    assert process.poll() is None, process.communicate()[0]
    process.send_signal(signal.SIGKILL)
    process.wait()


def finish(process: subprocess.Popen) -> None:
    output, _ = process.communicate(timeout=280)
    assert process.returncode == 0, output


@pytest.fixture(scope="module")
def whole(make_toy_recipe, tmp_path_factory, compile_cache) -> tuple[Path, Path]:
    """The toy recipe's file, and the directory of a run of it that was left alone."""
    folder = tmp_path_factory.mktemp("whole")
    recipe_path = folder / "toy.yaml"
    recipe_path.write_text(yaml.safe_dump(make_toy_recipe() | {"cluster": {"compile_cache": str(compile_cache)}}))
    finish(start(recipe_path, folder / "run", folder))
    return recipe_path, folder / "run"


@pytest.mark.slow
def test_killed_runs_equal_the_one_left_alone(whole, tmp_path):
    recipe_path, left_alone = whole
    run_dir = tmp_path / "killed"
    # Before the first checkpoint, and twice between checkpoints: from scratch, then from the newest whole one.
    for step in (3, 7, 11):
        # It cannot end before it is killed.
        kill_at(start(recipe_path, run_dir, tmp_path, "--hold", step + 2), run_dir, step)
    finish(start(recipe_path, run_dir, tmp_path))
    expected, killed = (read_jsonl(d / "metrics.jsonl") for d in (left_alone, run_dir))
    assert [r["step"] for r in killed] == list(range(1, 15))
    exact = ("step", "task", "variant", "loss", "grad_norm", "learning_rate", "temperatures")
    assert [[r[k] for k in exact] for r in killed] == [[r[k] for k in exact] for r in expected]
    assert read_jsonl(run_dir / "samples.jsonl") == read_jsonl(left_alone / "samples.jsonl")
    assert_same_state(left_alone, run_dir)
    assert_that_all_time_is_known(run_dir)


def assert_that_all_time_is_known(run_dir: Path) -> None:
    """Of a run that was killed three times, and ended after step 14."""
    life = goodput(run_dir)
    assert len(life.attempts) == 4 and life.attempts[-1].last_step == 14
    again = [a.last_step - b.start_step for a, b in itertools.pairwise(life.attempts)]
    assert life.lost_steps == sum(max(0, steps) for steps in again)
    assert (life.parts_s["lost"] > 0) == (life.lost_steps > 0)
    assert sum(life.parts_s.values()) == pytest.approx(life.up_s, rel=0.005)
    assert life.parts_s["other"] <= 0.005 * life.wall_s
    assert all(life.parts_s[part] > 0 for part in ("steps", "start", "save")) and life.down_s > 0


@pytest.mark.slow
def test_a_run_whose_newest_checkpoint_is_damaged_equals_the_one_left_alone(whole, tmp_path, capsys, bare_run):
    """One bit of its arrays: the run goes on from the checkpoint before, and from the tokenizer that is in it."""
    recipe_path, left_alone = whole
    run_dir = shutil.copytree(left_alone, tmp_path / "run")
    newest = max((p for p in (run_dir / "checkpoints").iterdir()), key=lambda p: int(p.name))
    damaged = max((p for p in newest.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    data = bytearray(damaged.read_bytes())
    data[len(data) // 2] ^= 1
    damaged.write_bytes(data)
    (run_dir / "tokenizer.model").write_bytes(b"damaged")
    bare_run.run(recipes.load(recipe_path), run_dir)
    name = damaged.relative_to(newest)
    assert f"checkpoint {newest.name} is damaged ({name} is corrupt (checksum mismatch))" in capsys.readouterr().err
    losses = [[r["loss"] for r in read_jsonl(d / "metrics.jsonl")] for d in (left_alone, run_dir)]
    assert losses[0] == losses[1] and newest.with_name(f"{newest.name}.damaged").is_dir()
    assert_same_state(left_alone, run_dir)


def assert_same_state(first: Path, second: Path) -> None:
    import jax

    from pipeline.evaluate.trained_model import TrainedModel

    a, b = (TrainedModel(d).params for d in (first, second))
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


def contents(folder: Path) -> dict[Path, tuple[int, int]]:
    return {p: (p.stat().st_mtime_ns, p.stat().st_size) for p in folder.rglob("*")}


@pytest.mark.slow
def test_steps_that_are_run_again_give_what_they_gave(whole, tmp_path, capsys):
    """From the checkpoint of step 10 and from the start; then with one bit of a loss flipped; then of a parameter."""
    run_dir = shutil.copytree(whole[1], tmp_path / "run")
    before = contents(run_dir)
    for steps, said in (("12:14", "steps 11 to 14, 4 of them logged, replayed from checkpoint 10"), ("1:3", "1 to 3")):
        assert main(["check", "--replay", str(run_dir), "--steps", steps]) == 0
        assert said in capsys.readouterr().out
    assert contents(run_dir) == before
    metrics = (run_dir / "metrics.jsonl").read_text().splitlines()
    loss = json.loads(metrics[12])["loss"]
    flipped = float((np.float32(loss).view(np.uint32) ^ 1).view(np.float32))
    (run_dir / "metrics.jsonl").write_text("\n".join(metrics).replace(f'"loss": {loss}', f'"loss": {flipped}') + "\n")
    assert main(["check", "--replay", str(run_dir), "--steps", "11:14"]) == 1
    found = capsys.readouterr().out
    assert found.startswith("step 13 (") and f"  loss: {flipped} in the log, {loss} now\n" in found
    arrays = max((p for p in (run_dir / "checkpoints/10").rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    data = bytearray(arrays.read_bytes())
    data[len(data) // 2] ^= 1
    arrays.write_bytes(data)
    assert main(["check", "--replay", str(run_dir), "--steps", "11:14"]) == 1
    assert "failed: checkpoint 10 is damaged: " in capsys.readouterr().err
    assert main(["check", "--replay", str(run_dir), "--steps", "4:5"]) == 2
    assert "the oldest is that of step 10: ask for 11:…, or ask for 1:…" in capsys.readouterr().err


def refused_before_any_queue(recipe: dict, run_dir: Path) -> str:
    def make_queues(schedule):
        raise AssertionError("decoding would have started")

    with pytest.raises(RequestError) as caught:
        train(plan(recipes.from_dict(recipe), run_dir), make_queues)
    return str(caught.value)


def test_devices_that_cannot_be_grouped_are_a_wrong_request(toy_recipe, tmp_path):
    """Tests have one device."""
    toy_recipe["cluster"] = {"expert_parallel": 2}
    found = refused_before_any_queue(toy_recipe, tmp_path)
    assert found == "cluster.expert_parallel: 1 devices cannot be split into 2 expert groups"


def test_devices_that_cannot_share_a_batch_are_a_wrong_request(toy_recipe, tmp_path, monkeypatch):
    """With three devices: 8 samples of 16 pixels, the first variant of the first task."""
    mesh = AbstractMesh((3, 1), ("data", "expert"))
    monkeypatch.setattr("model.sharding.make_mesh", lambda *, expert: mesh)
    found = refused_before_any_queue(toy_recipe, tmp_path)
    assert found == ("task classes, variant 16x16: a batch of 8 samples cannot be shared by 3 devices in equal parts")


def test_routing_groups_that_devices_would_cut_are_a_wrong_request(toy_recipe, tmp_path, monkeypatch):
    """One patch a sample: the eight of a batch fit into one group; four devices have two samples each."""
    mesh = AbstractMesh((4, 1), ("data", "expert"))
    monkeypatch.setattr("model.sharding.make_mesh", lambda *, expert: mesh)
    toy_recipe["model"]["moe"] = {"group": "tokens", "group_size": 8}
    found = refused_before_any_queue(toy_recipe, tmp_path)
    assert found.startswith(
        "task classes, variant 16x16: 2 samples a device cannot be cut into vision routing groups of 8 samples"
    )


@pytest.mark.parametrize(("kernel", "platform"), [("cudnn", "gpu"), ("pallas", "tpu")])
def test_a_fused_kernel_where_there_is_none_is_a_wrong_request(toy_recipe, tmp_path, kernel, platform):
    toy_recipe["model"]["attention"] = kernel
    found = refused_before_any_queue(toy_recipe, tmp_path)
    assert found == f"model.attention: {kernel} needs a {platform} and bfloat16; found cpu and float32"


TWO_DEVICES = """
import sys
from pathlib import Path

import bare_run
from pipeline import recipe as recipes

bare_run.run(recipes.load(Path(sys.argv[1])), Path(sys.argv[2]), steps=int(sys.argv[3]))
"""


def run_on_two_devices(recipe: dict, run_dir: Path, *, num_steps: int) -> None:
    path = run_dir.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(recipe))
    env = {
        **os.environ,
        "PYTHONPATH": f"{ROOT}:{BARE_RUN.parent}",
        "XLA_FLAGS": f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=2",
    }
    command = [sys.executable, "-c", TWO_DEVICES, str(path), str(run_dir), str(num_steps)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
def test_a_run_goes_on_with_its_parameters_laid_out_anew(toy_recipe, tmp_path, compile_cache, bare_run):
    """Experts over two devices, then everything over two, then one device: the losses of one device throughout."""
    task = toy_recipe["tasks"]["image_text"] | {"objective": {"nce": 1.0, "softmax": 0.5}}
    toy_recipe["tasks"], cluster = {"image_text": task}, {"compile_cache": str(compile_cache)}
    toy_recipe["train"]["num_steps"] = 6
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    bare_run.run(recipes.from_dict(toy_recipe | {"cluster": cluster}), whole)
    run_on_two_devices(toy_recipe | {"cluster": cluster | {"expert_parallel": 2}}, parts, num_steps=2)
    run_on_two_devices(toy_recipe | {"cluster": cluster | {"fsdp": True}}, parts, num_steps=2)
    summary = bare_run.run(recipes.from_dict(toy_recipe | {"cluster": cluster}), parts)
    assert (summary["start_step"], summary["steps"], summary["skipped_updates"]) == (4, 6, 0)
    found, expected = (read_jsonl(d / "metrics.jsonl") for d in (parts, whole))
    assert [r["step"] for r in found] == list(range(1, 7))
    np.testing.assert_allclose([r["loss"] for r in found], [r["loss"] for r in expected], rtol=1e-4)
    for record in expected:
        losses = record["losses"]
        assert set(losses) == {"nce", "softmax"}
        assert record["loss"] == pytest.approx(losses["nce"] + 0.5 * losses["softmax"], rel=1e-5)


@pytest.mark.slow
def test_run_directory_and_one_compile_a_structure(whole):
    (summary,) = read_jsonl(whole[1] / "bare_summary.json")
    records = read_jsonl(whole[1] / "metrics.jsonl")
    # classes has two variants, image_text and video_audio one each.
    assert summary["num_structures"] == 4
    assert summary["compile_count"] <= 4
    assert summary["compile_alarms"] == summary["skipped_updates"] == 0
    seen = {(r["task"], r["variant"]) for r in records}
    assert summary["compile_count"] == len(seen)
    assert sum(t["steps"] for t in summary["tasks"].values()) == 14
    by_task = {name: sum(r["task"] == name for r in records) for name in summary["tasks"]}
    assert by_task == {name: t["steps"] for name, t in summary["tasks"].items()}
    # 16 px: 1 token x 8; 32 px: 4 tokens x 2: the same vision tokens a step.
    classes = [s for s in summary["structures"] if s["task"] == "classes"]
    assert {s["vision_tokens"] for s in classes} == {8}


@pytest.mark.slow
def test_stop_saves_and_goes_on(toy_recipe, tmp_path, compile_cache, bare_run):
    toy_recipe["cluster"] = {"compile_cache": str(compile_cache)}
    recipe = recipes.from_dict(toy_recipe)
    summary = bare_run.run(recipe, tmp_path / "run", steps=7)
    assert summary["steps"] == 7
    summary = bare_run.run(recipe, tmp_path / "run")
    assert (summary["start_step"], summary["steps"]) == (7, 14)
    # The feed was ahead of the stop: what it had drawn for later steps was drawn again, and counts once.
    good = sum(count["drawn"] - count["rejected"] for count in summary["rejects"].values())
    assert good == sum(task["examples"] for task in summary["tasks"].values())
    assert [r["step"] for r in read_jsonl(tmp_path / "run" / "metrics.jsonl")] == list(range(1, 15))
