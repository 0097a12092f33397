"""Running means of the routing, worked out by hand; the file of them."""

import json

import numpy as np
import pytest

from pipeline.train.telemetry.expert_loads import ExpertLoads, layer_means


def statistics(load: float) -> dict:
    """Two layers of two experts."""
    return {
        "expert_load": [[load, 1 - load], [0.5, 0.5]],
        "expert_slots": [[0.5, 0.5], [load, 1 - load]],
        "unrouted_fraction": [load / 2, 0.0],
        "confidence": [0.6, 0.7],
    }


def test_running_means_by_hand():
    loads = ExpertLoads()
    for load in (0.1, 0.2, 0.6):
        loads.add("a", "64", {"vision": statistics(load)})
    loads.add("a", "32", {"vision": statistics(1.0), "text": statistics(0.0)})
    entries = list(loads.entries())
    assert [(modality, entry["steps"]) for modality, entry in entries] == [("vision", 3), ("vision", 1), ("text", 1)]
    # The first hundred steps count alike.
    np.testing.assert_allclose(entries[0][1]["expert_load"], [[0.3, 0.7], [0.5, 0.5]])
    np.testing.assert_allclose(entries[0][1]["expert_slots"], [[0.5, 0.5], [0.3, 0.7]])
    np.testing.assert_allclose(entries[0][1]["unrouted_fraction"], [0.15, 0.0])


def test_a_mean_forgets():
    """After 100 zeros each one weighs a hundredth: 1 - 0.99^50."""
    loads = ExpertLoads()
    for load in [0.0] * 100 + [1.0] * 50:
        loads.add("a", "all", {"text": statistics(load)})
    ((_, entry),) = loads.entries()
    assert entry["expert_load"][0][0] == pytest.approx(1 - 0.99**50)


def test_what_is_not_finite_is_left_out():
    loads = ExpertLoads()
    loads.add("a", "all", {"text": statistics(0.25)})
    loads.add("a", "all", {"text": statistics(float("nan"))})
    ((_, entry),) = loads.entries()
    assert entry["steps"] == 1 and entry["expert_load"][0][0] == 0.25


def test_the_file_comes_back_and_goes_on(tmp_path):
    loads, path = ExpertLoads(), tmp_path / "experts.json"
    loads.write(path)
    assert not path.exists() and not list(ExpertLoads.read(path).entries())
    loads.add("a", "64", {"vision": statistics(0.25)})
    loads.write(path)
    stored = json.loads(path.read_text())
    assert stored == {
        "a": {
            "64": {
                "vision": {
                    "steps": 1,
                    "expert_load": [[0.25, 0.75], [0.5, 0.5]],
                    "expert_slots": [[0.5, 0.5], [0.25, 0.75]],
                    "unrouted_fraction": [0.125, 0.0],
                }
            }
        }
    }
    again = ExpertLoads.read(path)
    again.add("a", "64", {"vision": statistics(0.75)})
    ((_, entry),) = again.entries()
    assert entry["steps"] == 2 and entry["expert_load"][0] == pytest.approx([0.5, 0.5])


def test_layer_means():
    found = layer_means({"vision": statistics(0.1)})["vision"]
    assert found["expert_load"] == [0.3, 0.7] and found["expert_slots"] == [0.3, 0.7]
    assert found["unrouted_fraction"] == 0.025 and found["confidence"] == pytest.approx(0.65)
    assert layer_means({}) == {}
