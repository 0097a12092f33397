"""The start of a run: its own checkpoint, a changed mixture, another run."""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import shutil
from pathlib import Path

import jax
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from model.step import learning_rates
from pipeline import recipe as recipes
from pipeline.cli import main
from pipeline.errors import RequestError
from pipeline.evaluate.trained_model import TrainedModel
from pipeline.plan import plan
from pipeline.recipe import specs
from pipeline.run_dir import check_run_dir
from pipeline.train import saver
from pipeline.train.checkpoint import Checkpoints

pytestmark = pytest.mark.slow


def read_jsonl(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def groups_of(run_dir: Path) -> dict:
    """Group → parameters of a run's newest checkpoint, numpy."""
    checkpoints = Checkpoints(run_dir)
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    names = json.loads((checkpoints.folder / str(checkpoints.latest_step) / "run.json").read_text())["groups"]

    def nest(paths: dict) -> dict:
        out: dict = {}
        for path, shape in paths.items():
            *outer, last = path[2:-2].split("']['")
            node = out
            for name in outer:
                node = node.setdefault(name, {})
            node[last] = jax.ShapeDtypeStruct(tuple(shape), np.float32, sharding=place)
        return out

    state = checkpoints.state({group: {"params": nest(paths)} for group, paths in names.items()})
    return {group: jax.tree.map(np.asarray, value["params"]) for group, value in state.items()}


@pytest.fixture(scope="module")
def small(make_toy_recipe, compile_cache):
    """The toy recipe with one graph a task."""
    recipe = make_toy_recipe()
    recipe["cluster"] = {"compile_cache": str(compile_cache)}
    recipe["tasks"]["classes"]["variants"] = [{"size": 32}]
    recipe["train"] |= {"num_steps": 8, "checkpoint_every": 4}
    return recipe


@pytest.fixture(scope="module")
def two_tasks(small, bare_run, tmp_path_factory):
    """(recipe, run directory) of image classification and video with sound, 8 steps."""
    recipe = copy.deepcopy(small)
    del recipe["tasks"]["image_text"]
    run_dir = tmp_path_factory.mktemp("two_tasks") / "run"
    bare_run.run(recipes.from_dict(recipe), run_dir)
    return recipe, run_dir


def copy_run(run_dir: Path, to: Path) -> Path:
    shutil.copytree(run_dir, to)
    return to


def test_the_mixture_changes_where_that_is_asked_for(two_tasks, small, bare_run, tmp_path, capsys):
    _, run_dir = two_tasks
    run_dir = copy_run(run_dir, tmp_path / "run")
    new = copy.deepcopy(small)
    del new["tasks"]["video_audio"]
    del new["data_sets"]["moving"]
    new["tasks"]["classes"]["weight"] = 10.0
    new["train"]["num_steps"] = 16
    with pytest.raises(RequestError, match=r"or allow it with --set resume\.allow_mixture_change=true"):
        check_run_dir(recipes.from_dict(new), run_dir)
    new["resume"] = {"allow_mixture_change": True}
    assert check_run_dir(recipes.from_dict(new), run_dir) == [
        "data_sets.moving is gone",
        "tasks.classes.weight: None is now 10.0",
        "tasks.image_text is new",
        "tasks.video_audio is gone",
    ]
    before = groups_of(run_dir)
    bare_run.run(recipes.from_dict(new), run_dir)
    out = capsys.readouterr().out
    assert "new, with fresh values: embed_text, pair_text_vision" in out
    assert "no longer used by any task; kept only in checkpoint 8: embed_audio, pair_audio_vision" in out
    samples = read_jsonl(run_dir / "samples.jsonl")
    assert [s["step"] for s in samples] == list(range(1, 17))
    assert {s["task"] for s in samples[:8]} == {"classes", "video_audio"}
    assert {s["task"] for s in samples[8:]} == {"classes", "image_text"}
    # The classes go on where they were: what they see is what a run of that many batches sees.
    ids = [s["ids"] for s in samples if s["task"] == "classes"]
    alone = copy.deepcopy(new)
    alone["tasks"] = {"classes": new["tasks"]["classes"]}
    alone["train"] = {"num_steps": len(ids), "log_samples": True}
    bare_run.run(recipes.from_dict(alone), tmp_path / "alone")
    assert [s["ids"] for s in read_jsonl(tmp_path / "alone" / "samples.jsonl")] == ids
    # Other changes are refused, allowed mixture or not.
    other = copy.deepcopy(new)
    other["train"]["learning_rate"] = 0.5
    with pytest.raises(RequestError, match=r"train\.learning_rate = 0\.0005, the recipe now says 0\.5"):
        check_run_dir(recipes.from_dict(other), run_dir)
    assert set(before) == {"encoder", "embed_vision", "embed_audio", "pair_audio_vision", "classifier_digits"}


def _grown(rows):
    more = rows.slice(0, 1)
    return pa.concat_tables([rows, more.set_column(0, "id", pa.array(["one more"], rows["id"].type))])


def _reversed(rows):
    return rows.take(list(range(rows.num_rows))[::-1])


def _relabelled(rows):
    labels = rows["labels"].to_pylist()
    first = next(i for i, label in enumerate(labels) if label != labels[0])
    labels[0], labels[first] = labels[first], labels[0]
    return rows.set_column(rows.schema.get_field_index("labels"), "labels", pa.array(labels, rows["labels"].type))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_grown, r"began with \d+ rows, the manifest now has \d+"),
        (_reversed, "not those that the run began with: id, labels differ, or come in another order"),
        (_relabelled, "not those that the run began with: labels differ"),
    ],
)
def test_other_rows_than_the_run_began_with_are_refused(two_tasks, bare_run, tmp_path, change, message):
    """Order, ids and labels say what a step learned from; a manifest of equal length may hold others."""
    recipe, run_dir = two_tasks
    run_dir, recipe = copy_run(run_dir, tmp_path / "run"), copy.deepcopy(recipe)
    manifest = Path(recipe["data_sets"]["digits"]["manifest"])
    other = manifest.with_name("other.parquet")
    pq.write_table(change(pq.read_table(manifest)), other)
    text = (run_dir / "config.yaml").read_text().replace(str(manifest), str(other))
    (run_dir / "config.yaml").write_text(text)
    recipe["data_sets"]["digits"]["manifest"] = str(other)
    recipe["train"]["num_steps"] = 12
    with pytest.raises(RequestError, match=message):
        bare_run.run(recipes.from_dict(recipe), run_dir)


def test_a_run_that_took_other_substitutes_is_refused(two_tasks):
    """As a run of very many rows that a version before the rule for them began."""
    recipe, run_dir = two_tasks
    spec = plan(recipes.from_dict(copy.deepcopy(recipe)), run_dir, look=False)
    rows = spec.data.fingerprints["digits"] | {"substitutes": "of 64 rows"}
    spec = dataclasses.replace(spec, data=dataclasses.replace(spec.data, fingerprints={"digits": rows}))
    with pytest.raises(RequestError, match="begun by another version of the program, which takes other substitutes"):
        spec.position()


def test_a_machine_of_another_kind_is_said(two_tasks, bare_run, tmp_path, capsys, monkeypatch):
    """Its decoders may give other bits; the run goes on all the same."""
    recipe, run_dir = two_tasks
    run_dir, recipe = copy_run(run_dir, tmp_path / "run"), copy.deepcopy(recipe)
    recipe["train"]["num_steps"] += 1
    here = saver.cpu_kind()
    monkeypatch.setattr(saver, "cpu_kind", lambda: "arm64 of another kind")
    bare_run.run(recipes.from_dict(recipe), run_dir)
    out = capsys.readouterr().out
    assert "another kind of machine, on which some media decode to other bits" in out
    assert f"There: {here}. Here: arm64 of another kind" in out
    # From now on it is a run of that machine.
    recipe["train"]["num_steps"] += 1
    bare_run.run(recipes.from_dict(recipe), run_dir)
    assert "another kind, on which" not in capsys.readouterr().out


def test_a_new_run_on_the_parameters_of_another(two_tasks, small, bare_run, tmp_path, capsys):
    _, source = two_tasks
    new = copy.deepcopy(small)
    # Ten classes in another order: the old columns would mean other digits.
    new["data_sets"]["digits"]["classes"] = list(reversed(new["data_sets"]["digits"]["classes"]))
    del new["tasks"]["video_audio"]
    new["init"] = {"from": str(source)}
    # One step at a rate of almost nothing: what the run holds is what it started with.
    new["train"] = {"num_steps": 1, "learning_rate": 1e-30, "warmup_fraction": 0.0}
    bare_run.run(recipes.from_dict(new), tmp_path / "run")
    out = capsys.readouterr().out
    assert f"parameters from {source}, step 8:" in out
    lines = [line.strip() for line in out.splitlines()]
    found = {line.partition(":")[0]: line.partition(": ")[2] for line in lines}
    assert (
        found["embed_text"] == "fresh, not in the checkpoint"
        and found["pair_text_vision"] == "fresh, not in the checkpoint"
    )
    assert found["classifier_digits"] == "fresh, another list of classes"
    assert found["not used"] == "embed_audio, pair_audio_vision"
    old, taken = groups_of(source), groups_of(tmp_path / "run")
    for group in ("encoder", "embed_vision"):
        number = len(jax.tree.leaves(old[group]))
        assert found[group] == f"{number} of {number} arrays"
        jax.tree.map(np.testing.assert_array_equal, old[group], taken[group])
    assert not np.array_equal(*(jax.tree.leaves(g["classifier_digits"])[-1] for g in (old, taken)))


def test_an_export_gives_the_parameters_of_its_run(two_tasks, small, bare_run, tmp_path, capsys):
    """With its tokenizer and classes; one that is damaged is a wrong request."""
    _, source = two_tasks
    exported = tmp_path / "exported"
    assert main(["export", "--run", str(source), "--out", str(exported)]) == 0
    new = copy.deepcopy(small)
    del new["tasks"]["image_text"]
    new["train"] = {"num_steps": 1, "learning_rate": 1e-30, "warmup_fraction": 0.0}
    runs = {}
    for name, folder in (("run", source), ("export", exported)):
        new["init"] = {"from": str(folder)}
        bare_run.run(recipes.from_dict(new), tmp_path / name)
        assert f"parameters from {folder}, step 8:" in capsys.readouterr().out
        runs[name] = groups_of(tmp_path / name)
    assert runs["run"].keys() == runs["export"].keys()
    jax.tree.map(np.testing.assert_array_equal, runs["run"], runs["export"])
    with open(exported / "model.safetensors", "r+b") as file:
        file.seek(-1, os.SEEK_END)
        last = file.read(1)
        file.seek(-1, os.SEEK_END)
        file.write(bytes([last[0] ^ 1]))
    with pytest.raises(RequestError, match=r"init\.from: .*model\.safetensors: expected the bytes that were exported"):
        bare_run.run(recipes.from_dict(new), tmp_path / "damaged")


def test_frozen_groups_stay_and_the_run_goes_on_bit_for_bit(two_tasks, bare_run, tmp_path):
    """With rates of their own for other groups; a frozen group has no moments in a checkpoint."""
    recipe, source = copy.deepcopy(two_tasks[0]), two_tasks[1]
    recipe["init"] = {"from": str(source)}
    recipe["train"] |= {"freeze": ["encoder", "embed_vision"], "learning_rate_scales": {"pair": 0.5}}
    checked = recipes.from_dict(recipe)
    bare_run.run(checked, tmp_path / "whole")
    for stop in (2, 3):
        bare_run.run(checked, tmp_path / "parts", steps=stop)
    bare_run.run(checked, tmp_path / "parts")
    exact = ("step", "task", "loss", "grad_norm")
    runs = (read_jsonl(tmp_path / name / "metrics.jsonl") for name in ("whole", "parts"))
    whole, parts = ([[r[k] for k in exact] for r in run] for run in runs)
    assert whole == parts and len(whole) == 8
    before, found, again = (groups_of(run) for run in (source, tmp_path / "whole", tmp_path / "parts"))
    jax.tree.map(np.testing.assert_array_equal, found, again)
    for group in ("encoder", "embed_vision"):
        jax.tree.map(np.testing.assert_array_equal, found[group], before[group])
    moved = ("embed_audio", "pair_audio_vision", "classifier_digits")
    assert all(not np.array_equal(*(jax.tree.leaves(g[group])[0] for g in (before, found))) for group in moved)
    assert Checkpoints(tmp_path / "whole").latest_bytes < 0.6 * Checkpoints(source).latest_bytes
    loaded = TrainedModel(tmp_path / "whole").params
    jax.tree.map(np.testing.assert_array_equal, loaded["encoder"], before["encoder"])


def test_a_source_that_is_no_run_is_a_wrong_request(small, bare_run, tmp_path):
    recipe = copy.deepcopy(small)
    recipe["init"] = {"from": str(tmp_path / "nothing")}
    with pytest.raises(RequestError, match=r"init\.from: no whole checkpoint in .*nothing"):
        bare_run.run(recipes.from_dict(recipe), tmp_path / "run")
    # The recipe that is put right may use the same directory.
    assert not (tmp_path / "run" / "config.yaml").exists()


def test_more_steps_on_a_finished_run(two_tasks, bare_run, tmp_path):
    """The rates to come are those of a run of the new length from the start; the log stays as it was."""
    recipe, run_dir = two_tasks
    run_dir, recipe = copy_run(run_dir, tmp_path / "run"), copy.deepcopy(recipe)
    before = read_jsonl(run_dir / "metrics.jsonl")
    recipe["train"]["num_steps"] = 12
    checked = recipes.from_dict(recipe)
    assert check_run_dir(checked, run_dir) == []
    summary = bare_run.run(checked, run_dir)
    assert (summary["start_step"], summary["steps"]) == (8, 12)
    after = read_jsonl(run_dir / "metrics.jsonl")
    assert after[:8] == before
    rates = learning_rates(specs.optimizer_config(checked))
    assert [r["learning_rate"] for r in after[8:]] == pytest.approx(rates[8:].tolist())


def test_a_bandit_goes_on_bit_for_bit(two_tasks, bare_run, tmp_path):
    recipe = copy.deepcopy(two_tasks[0])
    recipe["sampler"] = {"kind": "bandit", "bandit": {"lag": 8}}
    recipe["train"] |= {"num_steps": 40, "checkpoint_every": 100}
    checked = recipes.from_dict(recipe)
    bare_run.run(checked, tmp_path / "whole")
    for stop in (11, 12):
        bare_run.run(checked, tmp_path / "parts", steps=stop)
    bare_run.run(checked, tmp_path / "parts")
    exact = ("step", "task", "loss", "grad_norm")
    runs = (read_jsonl(tmp_path / name / "metrics.jsonl") for name in ("whole", "parts"))
    whole, parts = ([[r[k] for k in exact] for r in run] for run in runs)
    assert whole == parts and len(whole) == 40
