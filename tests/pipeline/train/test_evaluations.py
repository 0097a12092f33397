"""Evaluation while a run trains: it changes nothing, each point of the curve stands once, the best checkpoint stays."""

import json
import types

import jax
import numpy as np
import pytest

from pipeline import recipe as recipes
from pipeline.errors import DataError, RequestError
from pipeline.evaluate.during import check_best
from pipeline.evaluate.evaluator import Evaluator
from pipeline.evaluate.measure import default_list, evaluate
from pipeline.evaluate.trained_model import TrainedModel
from pipeline.plan import plan
from pipeline.train.checkpoint import Checkpoints
from pipeline.train.evaluations import Evaluations
from pipeline.train.saver import Best

METRIC = "digits/zero_shot_image/acc1"
ENTRIES = [{"data_set": "digits", "kind": "zero_shot", "modality": "image"}]


@pytest.fixture
def evaluated(toy_recipe, compile_cache):
    """One task of the toy recipe with a few steps, evaluated after each."""
    raw = toy_recipe | {"evaluate": ENTRIES, "cluster": {"compile_cache": str(compile_cache)}}
    raw |= {name: {key: toy_recipe[name][key]} for name, key in (("tasks", "image_text"), ("data_sets", "digits"))}
    raw["train"] = {"num_steps": 6, "checkpoint_every": 2}
    raw["logging"] |= {"evaluate_every": 1, "evaluate_rows": 8}
    return raw | {"checkpoint": {"keep_last": 1, "keep_best": METRIC}}


def lines(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.slow
def test_evaluation_changes_nothing_and_leaves_a_curve(evaluated, bare_run, tmp_path):
    without = {k: v for k, v in evaluated.items() if k != "checkpoint"} | {"logging": {"progress": "none"}}
    bare_run.run(recipes.from_dict(without), tmp_path / "without")
    # Stopped on the way, it goes on from the checkpoint of that step.
    recipe, run_dir = recipes.from_dict(evaluated), tmp_path / "with"
    bare_run.run(recipe, run_dir, steps=3)
    bare_run.run(recipe, run_dir)
    one, other = (lines(d / "metrics.jsonl") for d in (tmp_path / "without", run_dir))
    assert [(r["step"], r["loss"], r["grad_norm"]) for r in one] == [
        (r["step"], r["loss"], r["grad_norm"]) for r in other
    ]
    states = [TrainedModel(d).params for d in (tmp_path / "without", run_dir)]
    assert all(map(np.array_equal, *map(jax.tree.leaves, states)))
    curve = lines(run_dir / "eval_curve.jsonl")
    assert [point["step"] for point in curve] == list(range(1, 7))
    assert [e["num_examples"] for e in curve[0]["entries"]] == [8]
    assert_points_are_those_of_checkpoints(run_dir, curve)


def assert_points_are_those_of_checkpoints(run_dir, curve: list[dict]) -> None:
    scores = {p["step"]: p["entries"][0]["metrics"]["acc1"] for p in curve if p["step"] % 2 == 0}
    checkpoints = Checkpoints(run_dir)
    assert checkpoints.best_step == max(scores, key=scores.get)
    assert checkpoints.steps == sorted({checkpoints.best_step, 6})
    for step in ("best", 6):
        model = TrainedModel(run_dir, step)
        found = evaluate(Evaluator(model, max_rows=8), default_list(model))
        (point,) = (p for p in curve if p["step"] == model.step)
        assert [e["metrics"] for e in found] == [e["metrics"] for e in point["entries"]]
    with pytest.raises(RequestError, match=r"step 5: expected one of the checkpoints \["):
        TrainedModel(run_dir, 5)


def test_the_best_of_a_run():
    entries = [
        {"dataset": "emoji/unseen", "task": "retrieval_image", "metrics": {"text_retrieval_median_rank": 3.0}},
        {"dataset": "digits", "task": "zero_shot_image", "metrics": {"acc1": 0.5}},
    ]
    first = Best.of(METRIC, 2, entries)
    assert first == Best(METRIC, 2, 0.5) and first.beats(None) and not Best(METRIC, 4, 0.5).beats(first)
    assert Best(METRIC, 4, 0.6).beats(first) and Best("another", 4, 0.1).beats(first)
    rank = "emoji/unseen/retrieval_image/text_retrieval_median_rank"
    assert Best(rank, 4, 2.0).beats(Best.of(rank, 2, entries)) and Best.of("digits/knn_image/acc1", 2, entries) is None


def test_the_best_checkpoint_outlives_the_deletion_of_old_ones(tmp_path, monkeypatch):
    """Also if the process is killed between a save and the deletions that follow from it."""
    state = {"encoder": {"params": {"x": jax.numpy.zeros(3)}}}
    checkpoints = Checkpoints(tmp_path, keep_last=1)
    best = {1: 1, 2: 2, 3: 2, 4: 2, 5: 5, 6: 5}
    for step, kept in best.items():
        if step == 4:  # killed: whole, with the ones before it still there
            monkeypatch.setattr(checkpoints, "_in_question", lambda: [])
        data = {"best": {"metric": METRIC, "step": kept, "score": 0.0}}
        checkpoints.save(step, state=state, data=data)
        checkpoints.wait()
        if step == 4:
            assert checkpoints.steps == [2, 3, 4]
            checkpoints = Checkpoints(tmp_path, keep_last=1)
        else:
            assert checkpoints.steps == sorted({kept, step})
        assert checkpoints.best_step == kept


@pytest.mark.parametrize("error", [DataError("the storage is away"), RequestError("none of the rows could be read")])
def test_data_that_cannot_be_read_cost_a_measurement_and_not_the_run(monkeypatch, capsys, error):
    def make(spec, imp):
        def evaluate(step, params, *, heartbeat):
            if step == 1:
                raise error
            return [{"step": step}]

        return evaluate

    monkeypatch.setattr("pipeline.train.evaluations.load", {"an:evaluator": make}.__getitem__)
    spec, found = types.SimpleNamespace(logging=types.SimpleNamespace(evaluator="an:evaluator")), []
    state = {"encoder": {"params": {"x": jax.numpy.zeros(3)}}}
    parts = {"results": lambda step, entries: found.append((step, entries)), "heartbeat": lambda text: None}
    measure = Evaluations(spec, None, rank=0, **parts)
    measure(1, state)
    assert not measure.busy and capsys.readouterr().err == f"warning: step 1 is not evaluated: {error}\n"
    measure(2, state)
    Evaluations(spec, None, rank=1, **parts)(2, state)
    assert found == [(2, [{"step": 2}])]


@pytest.mark.parametrize(
    ("best", "message"),
    [
        ("digits/acc1", "expected DATA_SET/TASK/METRIC as in eval.json, DATA_SET/TASK one of digits/zero_shot_image; "),
        ("digits/zero_shot_image/accuracy", "expected a metric such as acc1, "),
    ],
)
def test_a_best_that_is_never_measured_is_refused_before_training(evaluated, best, message):
    recipe = recipes.from_dict(evaluated | {"checkpoint": {"keep_best": best}})
    spec = plan(recipe, look=False)
    with pytest.raises(RequestError, match=message):
        check_best(recipe, spec)
    check_best(recipes.from_dict(evaluated), spec)


def test_every_checkpoint_is_judged(evaluated):
    evaluated["logging"]["evaluate_every"] = 4
    with pytest.raises(RequestError, match=r"checkpoint\.keep_best: expected a logging\.evaluate_every that divides"):
        recipes.from_dict(evaluated)
