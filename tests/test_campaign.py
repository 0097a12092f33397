"""The campaign of faults: what it must find, and what it counts."""

import copy
import dataclasses
import json
import shutil

import pytest

from benchmarks import campaign
from benchmarks.campaign_bits import unequal
from benchmarks.campaign_episode import Episode, Log, reference
from benchmarks.campaign_run import FORMS, Site, Went, went_after

FORM = dataclasses.replace(FORMS["bare"], steps=16, gap=6, start_s=2.0)
BITS = {
    "losses": [[1, "classes", 0.5], [2, "classes", 0.25]],
    "samples": {"samples.jsonl": [{"step": 1, "ids": ["a", "b"]}, {"step": 2, "ids": ["c", "d"]}]},
    "parameters": "0123",
}


def changed(change) -> list[str]:
    found = copy.deepcopy(BITS)
    change(found)
    return unequal(found, BITS)


def test_any_part_that_differs_is_named():
    assert changed(lambda found: None) == []
    (line,) = changed(lambda found: found["losses"][1].__setitem__(2, 0.25 + 2**-54))
    assert line.startswith("losses: step 2 gave [2, 'classes', 0.25000000000000006]")
    assert changed(lambda found: found["losses"].pop()) == ["losses: 1 steps, not 2"]
    (line,) = changed(lambda found: found["samples"]["samples.jsonl"][1]["ids"].reverse())
    assert line.startswith("samples: samples.jsonl differs at {'step': 2")
    assert changed(lambda found: found["samples"]["samples.jsonl"].pop()) == [
        "samples: samples.jsonl differs at line 2"
    ]
    assert changed(lambda found: found["samples"].clear()) == ["samples: samples.jsonl differs at line 1"]
    assert changed(lambda found: found.update(parameters="0124")) == ["parameters: another digest"]


def test_what_is_published_counts_each_fault_once(tmp_path):
    log, page = Log(tmp_path / "campaign.jsonl"), tmp_path / "page.md"
    page.write_text(f"# Faults\n\n{campaign._HEAD}\n|---|---|---|---|---|---|---|---|\n\nAfter.\n")
    key = {"seed": 1, "episode": 0, "form": "bare", "commit": "abc"}
    log.write("round", **key, round=0, kind="driver", restart_s=4.0, lost=3)
    log.write("round", **key, round=1, kind="sigterm", when="steps", restart_s=6.0, lost=1)
    log.write("round", **key, round=2, kind="sigterm", when="starting", restart_s=5.0, lost=3)
    log.write("round", **(key | {"episode": 1}), round=0, kind="driver", restart_s=90.0, lost=3)
    log.write("episode", **key, unequal=["losses"], troubles=[])
    campaign.publish(log, page)
    once = page.read_text()
    # The second run has not ended: its fault is not counted.
    assert "| abc | bare | 3 in 1 runs | 1 | 0 | 5.0, 6.0 s | – |\n\nAfter." in once
    # A run that was only starting has lost what the fault before it had cost.
    lines = log.lines()
    summary = campaign.summary(lines, [line for line in lines if line["event"] == "episode"])
    assert summary["steps lost to SIGTERM, at most"] == 1
    campaign.publish(log, page)
    assert page.read_text() == once


def test_steps_of_a_worker_that_outlives_its_driver_are_no_restart(tmp_path):
    def attempt(event, at, **values):
        return json.dumps({"event": event, "at": at} | values) + "\n"

    log = tmp_path / "attempts/rank-0.jsonl"
    log.parent.mkdir()
    # Killed and started again at 10.0; Ray ends the old worker at 12.0.
    before = attempt("open", 1.0, start_step=0) + attempt("step", 9.0, step=20)
    log.write_text(before + "".join(attempt("step", 10.0 + n / 10, step=21 + n) for n in range(1, 20)))
    assert went_after(tmp_path, 10.0, started=True) is None
    assert went_after(tmp_path, 10.0) == Went(step=23, at=10.2, start=None)
    with open(log, "a") as file:
        file.write(attempt("open", 18.0, start_step=20) + attempt("step", 20.0, step=21))
    assert went_after(tmp_path, 10.0, started=True) == Went(step=21, at=20.0, start=20)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_campaign_ends_equal_and_finds_a_medium_that_changed(tmp_path):
    """Real runs with faults of a fixed seed; for the second one each image is another digit's."""
    site, log = Site(tmp_path / "site"), Log(tmp_path / "log.jsonl")
    site.server.start()
    try:
        commit = campaign.product_commit()
        Episode(site, FORM, log, seed=5, number=0, cluster=None).play(lambda: False)
        first = log.lines()[-1]
        assert reference(site, FORM, commit, None)["losses"][-1][0] == FORM.steps
        images = sorted((tmp_path / "site/corpus/digits/images").iterdir())
        for image in images[1:]:
            shutil.copy(images[0], image)
        Episode(site, FORM, log, seed=5, number=1, cluster=None).play(lambda: False)
    finally:
        site.server.stop()
        site.close()
    second = log.lines()[-1]
    assert first["event"] == second["event"] == "episode"
    assert first["unequal"] == first["troubles"] == second["troubles"] == [], json.dumps([first, second])
    assert [line.partition(":")[0] for line in second["unequal"]] == ["losses", "parameters"]
    assert {line["episode"] for line in log.lines() if line["event"] == "round"} == {0, 1}
