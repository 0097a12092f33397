"""The report of a run through a failure, a stop and its end; trained without Ray."""

import json

import pytest

from pipeline import pretrain as job
from pipeline import recipe as recipes


@pytest.mark.slow
def test_a_run_that_fails_then_stops_then_ends_says_each(
    toy_recipe, tmp_path, compile_cache, monkeypatch, capsys, bare_run
):
    # Of pictures and their words alone, a graph a task.
    del toy_recipe["tasks"]["video_audio"], toy_recipe["tasks"]["classes"]["variants"][1:]
    del toy_recipe["data_sets"]["moving"]
    toy_recipe["train"]["num_steps"] = 12
    toy_recipe["cluster"] = {"compile_cache": str(compile_cache)}
    recipe, run_dir = recipes.from_dict(toy_recipe), tmp_path / "run"

    def page() -> str:
        return (run_dir / "report.html").read_text()

    def trains(should_stop=lambda: False) -> None:
        monkeypatch.setattr(job, "_train", lambda *_: bare_run.run(recipe, run_dir, should_stop))

    monkeypatch.setattr(job, "_train", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        job.pretrain(recipe, run_dir)
    assert "This run failed after 0 of 12 steps." in page()
    asked = []
    trains(lambda: len(asked) > 5 or asked.append(None))
    assert not job.pretrain(recipe, run_dir)
    assert "was stopped after" in page() and "showcase.json" not in [p.name for p in run_dir.iterdir()]
    trains()
    assert job.pretrain(recipe, run_dir)
    assert "The model beats guessing in" in page() and "data:image/webp" in page() and "<dt>Commit</dt>" in page()
    assert json.loads((run_dir / "summary.json").read_text())["finished"] is True
    capsys.readouterr()
    # A report of a running run is no sign of an end; this run has ended.
    assert job.pretrain(recipe, run_dir) and "is finished" in capsys.readouterr().out
