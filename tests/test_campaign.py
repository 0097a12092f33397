"""The campaign of faults: what it must find, and what it counts."""

import copy
import dataclasses
import json
import shutil

import pytest

from benchmarks import campaign
from benchmarks.campaign_bits import unequal
from benchmarks.campaign_episode import Episode, Log, reference
from benchmarks.campaign_run import FORMS, Site

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
    log.write("round", **key, round=1, kind="sigterm", restart_s=6.0, lost=1)
    log.write("round", **(key | {"episode": 1}), round=0, kind="driver", restart_s=90.0, lost=3)
    log.write("episode", **key, unequal=["losses"], troubles=[])
    campaign.publish(log, page)
    once = page.read_text()
    # The second run has not ended: its fault is not counted.
    assert "| abc | bare | 2 in 1 runs | 1 | 0 | 5.0, 6.0 s | – |\n\nAfter." in once
    campaign.publish(log, page)
    assert page.read_text() == once


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
