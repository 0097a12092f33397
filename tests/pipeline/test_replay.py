"""What is compared of steps that are run again, and which requests are refused; ``train/test_run.py`` replays a run."""

import json
import math

import jax
import pytest

from pipeline import recipe as recipes
from pipeline.cli import main
from pipeline.plan import plan
from pipeline.replay_comparison import Comparison, Replay
from pipeline.run_dir import claim
from pipeline.train.devices import world

RECORD = {
    "step": 7,
    "task": "align",
    "loss": 2.3025851249694824,
    "grad_norm": 1.0,
    "temperatures": {"text_vision": 0.07},
    "finite": True,
    "step_s": 0.25,
    "data_wait_s": 0.0,
    "compile_wait_s": 0.0,
    "ids": ["a"],
    "moe": {"vision": {"expert_load": [[0.5, 0.5], [1.0, 0.0]], "z_loss": [1.0, 2.0]}},
}
# The mean over both layers.
LOGGED = RECORD | {"moe": {"vision": {"expert_load": [0.75, 0.25], "z_loss": 1.5}}, "step_s": 0.5, "wall_s": 9.0}


def compare(run_dir, *, logged=LOGGED, record=RECORD, attempts=()) -> Comparison:
    (run_dir / "attempts").mkdir(exist_ok=True)
    lines = [{"event": "open", "at": float(i)} | a for i, a in enumerate(attempts)]
    (run_dir / "attempts/rank-0.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    comparison = Comparison(run_dir, {logged["step"]: json.dumps(logged).encode() + b"\n"})
    comparison.record(record)
    return comparison


def said(comparison: Comparison) -> str:
    it = comparison
    result = Replay((6, 9), 5, compared=it.compared, exact=it.exact, keys=list(it.keys), difference=it.difference)
    return "\n".join(result.lines())


def test_results_are_compared_and_times_are_not(tmp_path):
    found = compare(tmp_path)
    assert found.difference is None and (found.compared, found.exact) == (1, True)
    assert said(found).splitlines() == [
        "equal bit for bit: steps 6 to 9, 1 of them logged, replayed from checkpoint 5",
        "compared: step, task, loss, grad_norm, temperatures, finite, moe",
    ]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        # One bit of a float32.
        ("loss", 2.302585363388062),
        ("grad_norm", math.nan),
        ("temperatures", {"text_vision": math.nextafter(0.07, 1)}),
        ("temperatures", {}),
        ("moe", {"vision": {"expert_load": [0.75, 0.2500001], "z_loss": 1.5}}),
        ("finite", False),
        ("task", "other"),
    ],
)
def test_any_other_value_is_found(tmp_path, key, value):
    found = compare(tmp_path, logged=LOGGED | {key: value})
    assert list(found.difference.values) == [key]
    assert found.difference.values[key][0] == value or math.isnan(value)


def test_a_step_whose_line_is_damaged_or_missing_is_not_compared(tmp_path):
    (tmp_path / "attempts").mkdir()
    for logged in ({}, {7: b'{"step": 7, "loss": 1, }\n'}):
        comparison = Comparison(tmp_path, logged)
        comparison.record(RECORD)
        assert (comparison.compared, comparison.difference, comparison.step) == (0, None, 7)


def test_values_that_are_no_numbers_equal_themselves(tmp_path):
    assert compare(tmp_path, logged=LOGGED | {"loss": math.nan}, record=RECORD | {"loss": math.nan}).difference is None
    assert compare(tmp_path, logged=LOGGED | {"loss": 0.0}, record=RECORD | {"loss": -0.0}).difference is not None


def test_the_first_difference_is_said_with_what_else_is_another(tmp_path):
    then = world() | {"cpu_kind": "aarch64", "libraries": world()["libraries"] | {"jaxlib": "0.0.1"}}
    # The record of step 7 is of the attempt that began last before it.
    attempts = [{"start_step": 0}, then | {"start_step": 5}, world() | {"start_step": 7}]
    found = compare(tmp_path, record=RECORD | {"loss": 2.5}, attempts=attempts)
    here = world()
    assert said(found).splitlines() == [
        "step 7 (align) differs, the first one; replayed from checkpoint 5, compared bit for bit",
        "  loss: 2.3025851249694824 in the log, 2.5 now",
        f"  cpu_kind was aarch64, here {here['cpu_kind']}",
        f"  jaxlib was 0.0.1, here {here['libraries']['jaxlib']}",
    ]
    found.record(RECORD | {"loss": 3.0})
    assert found.difference.values["loss"] == (LOGGED["loss"], 2.5)
    alone = said(compare(tmp_path, record=RECORD | {"loss": 2.5}, attempts=[world() | {"start_step": 0}]))
    assert alone.endswith("of the same kinds: look at the hardware, the media and the code")


@pytest.mark.parametrize("other", [{"world_size": 2, "num_devices": 2}, {"num_devices": 8}])
def test_another_world_may_round_otherwise(tmp_path, other):
    attempts = [world() | {"start_step": 0} | other]
    found = compare(tmp_path, record=RECORD | {"loss": LOGGED["loss"] * (1 + 9e-6)}, attempts=attempts)
    assert found.difference is None and not found.exact
    assert said(found).startswith("equal within 1e-05: the run had other workers or devices")
    found = compare(tmp_path, record=RECORD | {"loss": LOGGED["loss"] * (1 + 2e-5)}, attempts=attempts)
    assert set(found.difference.values) == {"loss"} and found.difference.world["num_devices"][1] == jax.device_count()
    assert compare(tmp_path, record=RECORD | {"finite": False}, attempts=attempts).difference is not None


@pytest.fixture
def begun(toy_recipe, tmp_path, capsys):
    """A run directory without a checkpoint whose log holds steps 2 and 4."""
    run_dir = tmp_path / "run"
    toy_recipe["logging"]["writers"] = []
    claim(run_dir, plan(recipes.from_dict(toy_recipe), run_dir))
    lines = ['{"step": 2, "task": "classes"}', '{"step": 4, "task": "classes"}', '{"step": 6, "ta']
    (run_dir / "metrics.jsonl").write_text("\n".join(lines))
    capsys.readouterr()
    return run_dir


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        ("3:4", "no checkpoint before it is kept; ask for 1:… to begin at step 1"),
        ("1:1", "metrics.jsonl has none of these; ask for steps that are logged"),
        ("1:5", "metrics.jsonl has steps up to 4 of these; ask for steps that are logged"),
        ("1:15", "the run has 14 steps"),
    ],
)
def test_steps_that_cannot_be_replayed_are_a_wrong_request(begun, capsys, steps, message):
    assert main(["check", "--replay", str(begun), "--steps", steps]) == 2
    assert message in capsys.readouterr().err


def test_a_replay_needs_a_run_and_its_steps(tmp_path, capsys):
    assert main(["check", "--replay", str(tmp_path), "--steps", "1:2"]) == 2
    assert "expected a run directory, found no config.yaml in it" in capsys.readouterr().err
    for arguments in (["--replay", "x"], ["--steps", "1:2"], ["--replay", "x", "--steps", "1:2", "--config", "demo"]):
        assert main(["check", *arguments]) == 2
        assert "expected --replay RUN with --steps FIRST:LAST and without --config" in capsys.readouterr().err
    assert main(["check"]) == 2
    assert "--config: expected a recipe to look at" in capsys.readouterr().err
    for steps in ("0:2", "5:4", "3", "a:b", "-1:2", ":"):
        with pytest.raises(SystemExit) as ended:
            main(["check", "--replay", "x", f"--steps={steps}"])
        assert ended.value.code == 2
    assert "expected FIRST:LAST, e.g. 101:200, found :" in capsys.readouterr().err
